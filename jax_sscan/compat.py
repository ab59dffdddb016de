"""The name that users of the torch packages `selective_scan` and `mamba_ssm` know: change one import."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from jax_sscan import checks
from jax_sscan.scan import selective_scan


def selective_scan_fn(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = False,
    *,
    out_dtype: Any = None,
    **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The selective scan in the argument order, layout and return values of the torch packages.

    Args:
        u: (batch, dim, length), and all others as in `selective_scan` with layout "bdl".
        delta: as u.
        A: (dim, dstate).
        B: fixed or varying; complex values may be interleaved reals.
        C: as B.
        D: (dim,).
        z: as u.
        delta_bias: (dim,).
        delta_softplus: whether delta goes through softplus.
        out_dtype: dtype of both results; that of u if None.
        **options: other keyword arguments of `selective_scan`, but for ``return_last_state``.

    Returns:
        ``out``, or with z ``(out, out_z)``: the output before the gate, D u included, and after it, out silu(z).

    Raises:
        ValueError: as `selective_scan`.
        TypeError: as `selective_scan`.
    """
    if "return_last_state" in options:
        raise TypeError("selective_scan_fn takes no return_last_state: call selective_scan for the last state")
    operands = (u, delta, A, B, C, D, None, delta_bias)
    if z is None:
        return selective_scan(*operands, delta_softplus, out_dtype=out_dtype, **options)
    z = checks.as_array("z", z)
    checks.check_dtype("z", z, checks.REAL)
    checks.check_shape("z", z, "u.shape", jnp.shape(u))
    # One scan serves both results: its output stays wide until the gate has been applied.
    arrays = [checks.as_array("operand", x) for x in (*operands, z) if x is not None]
    wide = checks.compute_dtype(*arrays)
    out = cast(jax.Array, selective_scan(*operands, delta_softplus, out_dtype=wide, **options))
    gate = z.astype(wide)
    dtype = u.dtype if out_dtype is None else out_dtype
    return out.astype(dtype), (out * (gate * jax.nn.sigmoid(gate))).astype(dtype)
