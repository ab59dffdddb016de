"""Argument checks shared by every public operation.

Each check raises for users: the message names the argument, what was expected, what came and, where there is one, the
remedy. Shapes and names raise ``ValueError``; dtypes and things that are not arrays raise ``TypeError``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

REAL = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
WIDE_REAL = (jnp.float32, jnp.float64)
COMPLEX = (jnp.complex64, jnp.complex128)


def as_array(name: str, value: Any) -> jax.Array:
    """Returns ``value`` as a JAX array of the same dtype, or raises ``TypeError`` naming ``name``."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}; convert it with jnp.asarray")
    array = jnp.asarray(value)
    if array.dtype != value.dtype:
        raise TypeError(
            f"{name} is {value.dtype}, which JAX would truncate to {array.dtype}: enable x64 mode "
            f'(jax.config.update("jax_enable_x64", True)) or cast {name} yourself'
        )
    return array


def check_dtype(name: str, array: jax.Array, allowed: Sequence[Any], remedy: str = "") -> None:
    """Raises ``TypeError`` unless the dtype of ``array`` is one of ``allowed``."""
    if not any(array.dtype == dtype for dtype in allowed):
        expected = " or ".join(np.dtype(dtype).name for dtype in allowed)
        raise TypeError(f"{name} must be {expected}, got {array.dtype}" + (f"; {remedy}" if remedy else ""))


def check_shape(name: str, array: jax.Array, dims: str, expected: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless ``array`` has shape ``expected``, whose axes are called ``dims``."""
    if array.shape != expected:
        raise ValueError(
            f"{name} must have shape {dims} = {expected}, got {array.shape}; nothing is broadcast silently"
        )


def check_rank(name: str, array: jax.Array, dims: str, rank: int) -> None:
    """Raises ``ValueError`` unless ``array`` has ``rank`` axes, called ``dims``."""
    if array.ndim != rank:
        raise ValueError(f"{name} must have {rank} axes {dims}, got {array.ndim} in shape {array.shape}")


def check_like(name: str, value: Any, expected: jax.ShapeDtypeStruct) -> None:
    """Raises unless ``value`` is an array with the shape and dtype of ``expected``."""
    array = as_array(name, value)
    check_dtype(name, array, (expected.dtype,))
    if array.shape != expected.shape:
        raise ValueError(f"{name} must have shape {expected.shape}, got {array.shape}")


def sequence(name: str, value: Any, dims: str, expected: tuple[int, ...] | None = None) -> jax.Array:
    """Returns ``value`` as a checked real array of any float dtype, of shape ``expected`` if one is given."""
    array = as_array(name, value)
    check_dtype(name, array, REAL)
    if expected is None:
        check_rank(name, array, dims, dims.count(",") + 1)
    else:
        check_shape(name, array, dims, expected)
    return array


def channel_vector(name: str, value: Any, dim: int) -> jax.Array:
    """Returns ``value`` as a checked (dim,) weight, float32 or float64."""
    array = as_array(name, value)
    check_dtype(name, array, WIDE_REAL, f"cast it: {name}.astype(jnp.float32)")
    check_shape(name, array, "(dim,)", (dim,))
    return array


def transition(value: Any, dim: int) -> jax.Array:
    """Returns ``value`` as a checked A, (dim, dstate), real or complex."""
    A = as_array("A", value)
    check_dtype("A", A, WIDE_REAL + COMPLEX, "cast it: A.astype(jnp.float32)")
    check_rank("A", A, "(dim, dstate)", 2)
    if A.shape[0] != dim or A.shape[1] == 0:
        raise ValueError(f"A must have shape (dim, dstate) = ({dim}, dstate >= 1), got {A.shape}")
    return A


def state(name: str, value: Any, batch: int, A: jax.Array) -> jax.Array:
    """Returns ``value`` as a checked (batch, dim, dstate) state, real or complex as A is."""
    array = as_array(name, value)
    kind = COMPLEX if jnp.iscomplexobj(A) else WIDE_REAL
    check_dtype(name, array, kind, f"A is {A.dtype}")
    check_shape(name, array, "(batch, dim, dstate)", (batch, *A.shape))
    return array


def segments(value: Any, batch: int, length: int) -> jax.Array:
    """Returns ``value`` as checked segment_ids, (batch, length) int32."""
    array = as_array("segment_ids", value)
    check_dtype("segment_ids", array, (jnp.int32,))
    check_shape("segment_ids", array, "(batch, length)", (batch, length))
    return array


def check_groups(name: str, array: jax.Array, axis: int, dim: int) -> int:
    """Returns the number of groups on ``axis``, or raises ``ValueError`` if it does not divide dim."""
    groups = array.shape[axis]
    if groups == 0 or dim % groups:
        raise ValueError(
            f"the groups of {name} must divide dim = {dim}, got {groups} groups on axis {axis} of shape {array.shape}"
        )
    return groups


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")


def check_flag(name: str, value: Any) -> bool:
    """Returns ``value`` as a bool; a traced or non-boolean value raises ``TypeError``."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"{name} must be a Python bool, known when tracing, got {type(value).__name__}; "
            f"mark it static (static_argnames) if it is an argument of a jitted function"
        )
    return bool(value)


def compute_dtype(*arrays: jax.Array | None) -> Any:
    """The dtype of the state and of every accumulator: float64 if any operand has it, else float32."""
    wide = (jnp.float64, jnp.complex128)
    if any(x is not None and x.dtype in wide for x in arrays):
        return jnp.float64
    return jnp.float32
