"""One decode step of the selective scan: what a generating model runs per token."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_sscan import checks
from jax_sscan.backends.xla import softplus


def selective_state_update(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Advances the state by one step: `selective_scan` at length 1, without its length axis.

    Pure JAX that XLA fuses into one pass over the state; differentiable to any order. Sums are float32 (float64 if any
    operand is float64).

    Args:
        state: (batch, dim, dstate), float32 or float64, complex when A is.
        x: input, (batch, dim); float32, bfloat16, float16 or float64.
        dt: step sizes, (batch, dim), of any of these dtypes.
        A: (dim, dstate), float32 or float64; complex for a complex state.
        B: (batch, dstate) or (batch, groups, dstate), of any dtype that x may have; complex when A is. Channel d reads
            group d // (dim / groups).
        C: as B.
        D: (dim,), float32 or float64.
        z: gate, (batch, dim).
        dt_bias: (dim,), float32 or float64.
        dt_softplus: whether dt goes through softplus after the bias, as in `selective_scan`.

    Returns:
        The output (batch, dim) in the dtype of x, and the new state in the dtype of state.

    Raises:
        ValueError: a shape or the number of groups is wrong.
        TypeError: a dtype is wrong or something is not an array.
    """
    dt_softplus = checks.check_flag("dt_softplus", dt_softplus)
    dims = "(batch, dim)"
    x = checks.sequence("x", x, dims)
    batch, dim = x.shape
    dt = checks.sequence("dt", dt, dims, x.shape)
    A = checks.transition(A, dim)
    state = checks.state("state", state, batch, A)
    if D is not None:
        D = checks.channel_vector("D", D, dim)
    if z is not None:
        z = checks.sequence("z", z, dims, x.shape)
    if dt_bias is not None:
        dt_bias = checks.channel_vector("dt_bias", dt_bias, dim)
    B, C = _matrix("B", B, A, batch), _matrix("C", C, A, batch)
    return _state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _matrix(name: str, value: Any, A: jax.Array, batch: int) -> jax.Array:
    """Checks B or C of one step and gives it its group axis."""
    array = checks.as_array(name, value)
    checks.check_dtype(name, array, checks.COMPLEX if jnp.iscomplexobj(A) else checks.REAL, f"A is {A.dtype}")
    dim, dstate = A.shape
    if array.ndim == 2:
        checks.check_shape(name, array, "(batch, dstate)", (batch, dstate))
        return array[:, None]
    checks.check_rank(name, array, "(batch, dstate) or (batch, groups, dstate)", 3)
    groups = checks.check_groups(name, array, 1, dim)
    checks.check_shape(name, array, "(batch, groups, dstate)", (batch, groups, dstate))
    return array


@partial(jax.jit, static_argnames="dt_softplus")
def _state_update(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    z: jax.Array | None,
    dt_bias: jax.Array | None,
    dt_softplus: bool,
) -> tuple[jax.Array, jax.Array]:
    real = checks.compute_dtype(state, x, dt, A, B, C, D, z, dt_bias)
    batch, dim, dstate = state.shape

    def per_channel(matrix: jax.Array) -> jax.Array:
        """(batch, groups, dstate) -> (batch, dim, dstate), each group repeated over its channels."""
        shape = (batch, matrix.shape[1], dim // matrix.shape[1], dstate)
        wide = matrix.astype(jnp.promote_types(matrix.dtype, real))
        return jnp.broadcast_to(wide[:, :, None], shape).reshape(batch, dim, dstate)

    u = x.astype(real)
    delta = dt.astype(real)
    if dt_bias is not None:
        delta = delta + dt_bias
    if dt_softplus:
        delta = softplus(delta)
    decay = jnp.exp(delta[..., None] * A)
    new_state = decay * state + (delta * u)[..., None] * per_channel(B)
    y = jnp.sum(per_channel(C) * new_state, axis=-1)
    if jnp.iscomplexobj(y):
        y = 2 * y.real
    if D is not None:
        y = y + D * u
    if z is not None:
        gate = z.astype(real)
        y = y * (gate * jax.nn.sigmoid(gate))
    return y.astype(x.dtype), new_state.astype(state.dtype)
