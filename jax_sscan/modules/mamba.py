"""The Mamba block: arXiv 2312.00752, section 3.4 and figure 3, channel-last throughout."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jax_sscan import checks
from jax_sscan.conv import causal_conv1d, causal_conv1d_update
from jax_sscan.modules import padding, ssm
from jax_sscan.modules.parameters import Parameter, Params, dense, uniform_fan_in
from jax_sscan.modules.sharding import Shard, divided, for_call, share
from jax_sscan.modules.ssm import SSMOptions, check_size

_REVERSE = "reverse_"  # prefix of the parameters of the direction from the last position to the first


class MambaCache(NamedTuple):
    """What a Mamba block remembers of the past.

    Attributes:
        conv: the last inputs of its convolution, (batch, d_inner, d_conv - 1), oldest first.
        state: the state of its scan, (batch, d_inner, d_state), float32 at least.
    """

    conv: jax.Array
    state: jax.Array


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class MambaOptions(SSMOptions):
    """The options of a Mamba block, beside those of its state space model.

    Attributes:
        d_model: channels of input and output.
        d_conv: taps of the convolution.
        expand: d_inner / d_model.
        d_inner: channels of the scan; None is expand * d_model.
        use_conv_bias: whether the convolution has a bias.
        use_bias: whether the projections in and out have one.
        out_proj_gain: scales the initial kernel of the projection out; 1 / sqrt(layers) in a deep residual model.
        bidirectional: whether a second convolution and scan, with parameters of their own, run from the last position
            to the first, their output added to that of the first. Such a block has no cache.
    """

    d_model: int = dataclasses.field(kw_only=False)
    d_conv: int = 4
    expand: float = 2
    d_inner: int | None = None
    use_conv_bias: bool = True
    use_bias: bool = False
    out_proj_gain: float = 1.0
    bidirectional: bool = False


def inner_size(options: MambaOptions) -> int:
    """The number of channels of the scan."""
    return int(options.expand * options.d_model) if options.d_inner is None else options.d_inner


def rank(options: MambaOptions) -> int:
    """The rank of the projection to step sizes."""
    return math.ceil(options.d_model / 16) if options.dt_rank == "auto" else options.dt_rank


def parameters(options: MambaOptions) -> dict[str, Parameter]:
    """The parameter table of a Mamba block.

    The gate z has a projection of its own: halves of one product would be copied on their way into the scan, and could
    not be split over the devices of a mesh without being sent around.
    """
    d_inner = inner_size(options)
    for name, size in (("d_model", options.d_model), ("d_inner", d_inner), ("d_conv", options.d_conv)):
        check_size(name, size)
    dtype, zeros = options.param_dtype, jax.nn.initializers.zeros
    kernel = Parameter((options.d_model, d_inner), ("d_model", "d_inner"), uniform_fan_in(), dtype)
    bias = Parameter((d_inner,), ("d_inner",), zeros, dtype)
    inner = {
        "conv_kernel": Parameter(
            (d_inner, options.d_conv), ("d_inner", "d_conv"), uniform_fan_in(in_axis=1, out_axis=0), dtype
        ),
        **({"conv_bias": bias} if options.use_conv_bias else {}),
        **ssm.parameters(options, d_inner, rank(options)),
    }
    table = {"in_proj": kernel, "z_proj": kernel, **inner}
    if options.bidirectional:
        table |= {_REVERSE + name: parameter for name, parameter in inner.items()}
    out_kernel = uniform_fan_in(options.out_proj_gain)
    table["out_proj"] = Parameter((d_inner, options.d_model), ("d_inner", "d_model"), out_kernel, dtype)
    if options.use_bias:
        table |= {"in_proj_bias": bias, "z_proj_bias": bias}
        table["out_proj_bias"] = Parameter((options.d_model,), ("d_model",), zeros, dtype)
    return table


def init_cache(options: MambaOptions, batch: int) -> MambaCache:
    """The cache before the first position: zeros."""
    if options.bidirectional:
        raise ValueError("a bidirectional block has no cache: it reads whole sequences only")
    d_inner = inner_size(options)
    dtype = options.param_dtype if options.dtype is None else options.dtype
    return MambaCache(jnp.zeros((batch, d_inner, options.d_conv - 1), dtype), ssm.init_state(options, batch, d_inner))


def apply(
    options: MambaOptions,
    params: Params,
    x: jax.Array,
    cache: MambaCache | None = None,
    *,
    segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    return_cache: bool = False,
) -> jax.Array | tuple[jax.Array, MambaCache]:
    """Runs the block; see `jax_sscan.nnx.Mamba` for the arguments."""
    x = checks.sequence("x", x, "(batch, length, d_model)")
    batch, length, d_model = x.shape
    if d_model != options.d_model:
        raise ValueError(f"x must have shape (batch, length, d_model = {options.d_model}), got {x.shape}")
    if segment_ids is not None:
        segment_ids = checks.segments(segment_ids, batch, length)
    if mask is not None:
        mask = padding.check_mask(mask, batch, length)
    if options.bidirectional and (cache is not None or return_cache):
        raise ValueError("a bidirectional block has no cache: it reads whole sequences only")
    shard = for_call(options.shard, length, mask, options.bidirectional)
    cache_spec = shard.spec("batch", "d_inner")
    x_spec, ids_spec = shard.spec("batch", "length", None), shard.spec("batch", "length")
    param_specs = {name: shard.spec(*parameter.axes) for name, parameter in parameters(options).items()}
    out, new_cache = divided(
        shard,
        partial(_apply, options, shard, return_cache),
        (param_specs, x_spec, cache_spec, ids_spec, ids_spec),
        (x_spec, cache_spec),
        params,
        x,
        cache,
        segment_ids,
        mask,
    )
    return (out, new_cache) if return_cache else out


def _apply(
    options: MambaOptions,
    shard: Shard,
    return_cache: bool,
    params: Params,
    x: jax.Array,
    cache: MambaCache | None,
    segment_ids: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, MambaCache | None]:
    """The block on one device's part of everything."""
    dtype = jnp.result_type(x.dtype, options.param_dtype) if options.dtype is None else options.dtype
    params = share(params, shard.rows)
    x = share(x, shard.channels)
    u = dense(x, params["in_proj"], params.get("in_proj_bias"), dtype)
    z = dense(x, params["z_proj"], params.get("z_proj_bias"), dtype)
    run = partial(_inner, options, shard=shard, u=u, z=z, segment_ids=segment_ids, mask=mask)
    y, new_cache = run(params, cache=cache, return_cache=return_cache)
    if options.bidirectional:
        params_back = {name.removeprefix(_REVERSE): p for name, p in params.items() if name.startswith(_REVERSE)}
        y = y + run(params_back, reverse=True)[0]
    return dense(y, params["out_proj"], params.get("out_proj_bias"), dtype, shard.channels), new_cache


def _inner(
    options: MambaOptions,
    params: Params,
    *,
    shard: Shard,
    u: jax.Array,
    z: jax.Array,
    segment_ids: jax.Array | None,
    mask: jax.Array | None,
    cache: MambaCache | None = None,
    return_cache: bool = False,
    reverse: bool = False,
) -> tuple[jax.Array, MambaCache | None]:
    """Convolution and state space model, in one direction."""
    window, state = (None, None) if cache is None else cache

    def turn(array: Any) -> Any:
        """The sequence in the order of processing, or back in that of positions."""
        return jnp.flip(array, 1) if reverse and array is not None else array

    conv_kernel, conv_bias = params["conv_kernel"], params.get("conv_bias")
    if mask is not None:
        ids = padding.extend_segments(mask, segment_ids)
        silent = padding.silence(mask, u)
        u, window = padding.masked_conv1d(turn(silent), conv_kernel, conv_bias, window, turn(mask), turn(ids), "silu")
    elif u.shape[1] == 1 and window is not None and shard.length is None:
        u, window = causal_conv1d_update(u[:, 0], window, conv_kernel, conv_bias, "silu")
        u = u[:, None]
    else:
        u, window = cast(
            tuple[jax.Array, jax.Array],
            causal_conv1d(
                turn(u),
                conv_kernel,
                conv_bias,
                initial_state=window,
                segment_ids=turn(segment_ids),
                activation="silu",
                return_final_state=True,
                layout="bld",
                axis_name=shard.length,
            ),
        )
    y, state = ssm.apply(
        options,
        params,
        turn(u),
        z,
        state,
        segment_ids=segment_ids,
        mask=mask,
        reverse=reverse,
        return_state=return_cache,
        shard=shard,
    )
    return y, MambaCache(window, cast(jax.Array, state)) if return_cache else None
