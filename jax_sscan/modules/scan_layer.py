"""The state space model as a layer of its own, without convolution and projections in and out."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from jax_sscan import checks
from jax_sscan.modules import padding, ssm
from jax_sscan.modules.parameters import Parameter, Params
from jax_sscan.modules.sharding import Shard, divided, for_call, is_inside, mesh_size, share
from jax_sscan.modules.ssm import SSMOptions


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SelectiveScanOptions(SSMOptions):
    """The options of a bare selective scan, beside those of its state space model.

    Attributes:
        d_inner: channels of input and output. dt_rank="auto" is d_inner / 32, as in a Mamba block that expands by 2.
    """

    d_inner: int = dataclasses.field(kw_only=False)


def parameters(options: SelectiveScanOptions) -> dict[str, Parameter]:
    """The parameter table."""
    dt_rank = math.ceil(options.d_inner / 32) if options.dt_rank == "auto" else options.dt_rank
    return ssm.parameters(options, options.d_inner, dt_rank)


def init_cache(options: SelectiveScanOptions, batch: int) -> jax.Array:
    """The state before the first position: zeros."""
    return ssm.init_state(options, batch, options.d_inner)


def apply(
    options: SelectiveScanOptions,
    params: Params,
    u: jax.Array,
    z: jax.Array | None = None,
    cache: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    return_cache: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Runs the layer; see `jax_sscan.nnx.SelectiveScan` for the arguments."""
    u = checks.sequence("u", u, "(batch, length, d_inner)")
    batch, length, d_inner = u.shape
    expected = options.d_inner
    if options.shard is not None and is_inside(options.shard):
        expected //= mesh_size(options.shard.channels)
    if d_inner != expected:
        raise ValueError(f"u must have shape (batch, length, d_inner = {expected}), got {u.shape}")
    if z is not None:
        z = checks.sequence("z", z, "u.shape", u.shape)
    if segment_ids is not None:
        segment_ids = checks.segments(segment_ids, batch, length)
    if mask is not None:
        mask = padding.check_mask(mask, batch, length)
    shard = for_call(options.shard, length, mask)
    u_spec, ids_spec = shard.spec("batch", "length", "d_inner"), shard.spec("batch", "length")
    cache_spec = shard.spec("batch", "d_inner")
    param_specs = {name: shard.spec(*parameter.axes) for name, parameter in parameters(options).items()}
    out, state = divided(
        shard,
        partial(_apply, options, shard, return_cache),
        (param_specs, u_spec, u_spec, cache_spec, ids_spec, ids_spec),
        (u_spec, cache_spec),
        params,
        u,
        z,
        cache,
        segment_ids,
        mask,
    )
    return (out, state) if return_cache else out


def _apply(
    options: SelectiveScanOptions,
    shard: Shard,
    return_cache: bool,
    params: Params,
    u: jax.Array,
    z: jax.Array | None,
    cache: jax.Array | None,
    segment_ids: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """The layer on one device's part of everything."""
    dtype = jnp.result_type(u.dtype, options.param_dtype) if options.dtype is None else options.dtype
    return ssm.apply(
        options,
        share(params, shard.rows),
        u.astype(dtype),
        None if z is None else z.astype(dtype),
        cache,
        segment_ids=segment_ids,
        mask=mask,
        return_state=return_cache,
        shard=shard,
    )
