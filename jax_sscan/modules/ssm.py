"""The selective state space model (S6) with its own projections: arXiv 2312.00752, section 3.2 and appendix E."""

import dataclasses
import math
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from jax_sscan import checks
from jax_sscan.decode import selective_state_update
from jax_sscan.modules import padding
from jax_sscan.modules.parameters import Parameter, Params, dense, rms_norm, uniform_fan_in, wide
from jax_sscan.modules.sharding import Shard, share
from jax_sscan.scan import selective_scan


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SSMOptions:
    """What `SelectiveScan` and `Mamba` have in common.

    Attributes:
        d_state: states per channel, N in the paper.
        dt_rank: rank of the projection to step sizes; "auto" is d_model / 16, rounded up.
        dt_min: smallest step size that the bias is initialised to.
        dt_max: largest one; the initial step sizes are log-uniform between the two.
        dt_init_floor: no initial step size is below it.
        dt_scale: scales the initial kernel of the projection to step sizes.
        inner_norm: RMS norm of B, C and the low-rank dt: None, "rms" without weights (Falcon-Mamba), or "scaled_rms"
            with weights (Jamba).
        inner_norm_eps: its epsilon.
        dtype: dtype of the computation; None promotes that of the input and of the parameters. States, A and the step
            sizes are float32 at least, whatever it is.
        param_dtype: dtype of the parameters; A_log, D and dt_bias are float32 at least.
        implementation: of the scan; see `jax_sscan.selective_scan`.
        shard: which axes of the mesh in context divide the work and the parameters; None for one device, or to leave it
            to jit.
    """

    d_state: int = 16
    dt_rank: int | Literal["auto"] = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_scale: float = 1.0
    inner_norm: Literal["rms", "scaled_rms"] | None = None
    inner_norm_eps: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: str | None = None
    shard: Shard | None = None


def parameters(options: SSMOptions, d_inner: int, dt_rank: int) -> dict[str, Parameter]:
    """The parameter table of a selective state space model of d_inner channels."""
    checks.check_choice("inner_norm", options.inner_norm, (None, "rms", "scaled_rms"))
    for name, size in (("d_inner", d_inner), ("d_state", options.d_state), ("dt_rank", dt_rank)):
        check_size(name, size)
    n, dtype, wide_dtype = options.d_state, options.param_dtype, wide(options.param_dtype)
    ones = jax.nn.initializers.ones

    def step_size_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        low, high = math.log(options.dt_min), math.log(options.dt_max)
        dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
        dt = jnp.maximum(dt, options.dt_init_floor)
        return dt + jnp.log(-jnp.expm1(-dt))  # softplus of it is dt

    def s4d_real(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)  # A = -1, -2, ..., -N

    table = {
        "x_proj": Parameter((d_inner, dt_rank + 2 * n), ("d_inner", "ssm"), uniform_fan_in(), dtype),
        "dt_proj": Parameter((dt_rank, d_inner), ("dt_rank", "d_inner"), uniform_fan_in(options.dt_scale), dtype),
        "dt_bias": Parameter((d_inner,), ("d_inner",), step_size_bias, wide_dtype),
        "A_log": Parameter((d_inner, n), ("d_inner", "d_state"), s4d_real, wide_dtype),
        "D": Parameter((d_inner,), ("d_inner",), ones, wide_dtype),
    }
    if options.inner_norm == "scaled_rms":
        table["dt_norm"] = Parameter((dt_rank,), ("dt_rank",), ones, dtype)
        table["B_norm"] = Parameter((n,), ("d_state",), ones, dtype)
        table["C_norm"] = Parameter((n,), ("d_state",), ones, dtype)
    return table


def init_state(options: SSMOptions, batch: int, d_inner: int) -> jax.Array:
    """The state before the first position: zeros, (batch, d_inner, d_state)."""
    return jnp.zeros((batch, d_inner, options.d_state), wide(options.param_dtype))


def apply(
    options: SSMOptions,
    params: Params,
    u: jax.Array,
    z: jax.Array | None = None,
    state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    reverse: bool = False,
    return_state: bool = False,
    shard: Shard,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs the model on a sequence, or on one step of it where length is 1 and there is a state.

    Args:
        options: the options.
        params: values of the parameter table.
        u: input, (batch, length, d_inner).
        z: gate, (batch, length, d_inner), or None.
        state: (batch, d_inner, d_state) before the first position; zeros if None.
        segment_ids: (batch, length) int32, or None; see `jax_sscan.selective_scan`.
        mask: (batch, length) bool, False at padding, or None.
        reverse: whether time runs from the last position to the first.
        return_state: whether to return the state after the last real position, which is None otherwise.
        shard: how all these are divided, if this is inside of `jax.shard_map`.

    Returns:
        The output (batch, length, d_inner) in u's dtype, which at padding means nothing, and the state.
    """
    dtype = u.dtype
    u = padding.silence(mask, u)
    segment_ids = padding.extend_segments(mask, segment_ids)
    dt_rank, n = params["dt_proj"].shape[0], params["A_log"].shape[1]
    projected = share(dense(u, params["x_proj"], None, dtype, shard.channels), shard.channels)
    dt, B, C = jnp.split(projected, [dt_rank, dt_rank + n], axis=-1)
    if options.inner_norm is not None:
        eps = options.inner_norm_eps
        dt = rms_norm(dt, params.get("dt_norm"), eps, dtype)
        B = rms_norm(B, params.get("B_norm"), eps, dtype)
        C = rms_norm(C, params.get("C_norm"), eps, dtype)
    delta = padding.stand_still(mask, dense(dt, params["dt_proj"], None, dtype))
    A = -jnp.exp(params["A_log"])
    if u.shape[1] == 1 and state is not None and mask is None and shard.length is None:
        gate = None if z is None else z[:, 0]
        y, state = selective_state_update(
            state, u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], params["D"], gate, params["dt_bias"], dt_softplus=True
        )
        return y[:, None], state
    y = selective_scan(
        u,
        delta,
        A,
        B,
        C,
        params["D"],
        z,
        params["dt_bias"],
        delta_softplus=True,
        initial_state=state,
        segment_ids=segment_ids,
        reverse=reverse,
        return_last_state=return_state,
        layout="bld",
        axis_name=shard.length,
        implementation=options.implementation,
    )
    return cast(tuple[jax.Array, jax.Array], y) if return_state else (cast(jax.Array, y), None)


def check_size(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
