"""Batches of rows of unequal length, padded on the left, on the right or on both sides.

At padding a layer does nothing: its input is 0 and its step size is 0, so that the state passes through unchanged, and
the convolution sees the row as if it began at its first real position and ended at its last.
"""

import jax
import jax.numpy as jnp

from jax_sscan import checks
from jax_sscan.conv import Activation, causal_conv1d

# A step size before softplus for which softplus, and its derivative, are 0 in every dtype.
_NO_STEP = -1e4


def check_mask(mask: jax.Array, batch: int, length: int) -> jax.Array:
    """Returns ``mask`` as a checked (batch, length) array of bool."""
    mask = checks.as_array("mask", mask)
    checks.check_dtype("mask", mask, (jnp.bool_,), "True is a token and False is padding")
    checks.check_shape("mask", mask, "(batch, length)", (batch, length))
    return mask


def silence(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """x, (batch, length, dim), with zeros at padding."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def stand_still(mask: jax.Array | None, delta: jax.Array) -> jax.Array:
    """Delta before softplus, (batch, length, dim), with steps of size 0 at padding."""
    return delta if mask is None else jnp.where(mask[..., None], delta, _NO_STEP)


def extend_segments(mask: jax.Array | None, segment_ids: jax.Array | None) -> jax.Array | None:
    """Gives padding the segment of the nearest real position, so that none begins or ends at padding."""
    if mask is None or segment_ids is None:
        return segment_ids
    start, end = _bounds(mask)
    nearest = jnp.clip(jnp.arange(mask.shape[1]), start[:, None], end[:, None] - 1)
    return jnp.take_along_axis(segment_ids, nearest, axis=1)


def masked_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    window: jax.Array | None,
    mask: jax.Array,
    segment_ids: jax.Array | None,
    activation: Activation,
) -> tuple[jax.Array, jax.Array]:
    """`causal_conv1d` in layout "bld" of the real part of each row, and the window that continues it.

    Args:
        x: (batch, length, dim), zeros at padding.
        weight: (dim, width).
        bias: (dim,) or None.
        window: (batch, dim, width - 1), the inputs before the first real position; zeros if None.
        mask: (batch, length); the real positions of a row lie side by side.
        segment_ids: (batch, length) as `extend_segments` leaves them, or None.
        activation: as in `causal_conv1d`.
    """
    batch, _, dim = x.shape
    past = weight.shape[1] - 1
    start, end = _bounds(mask)
    rows, steps = jnp.arange(batch)[:, None], jnp.arange(past)
    joined = jnp.concatenate([jnp.zeros((batch, past, dim), x.dtype), x], axis=1)
    if window is not None:
        # Right in front of the first real position, wherever that is.
        joined = joined.astype(jnp.promote_types(x.dtype, window.dtype))
        joined = joined.at[rows, start[:, None] + steps].set(window.swapaxes(1, 2).astype(joined.dtype))
    out = causal_conv1d(
        joined[:, past:],
        weight,
        bias,
        initial_state=joined[:, :past].swapaxes(1, 2),
        segment_ids=segment_ids,
        activation=activation,
        layout="bld",
    )
    last = end[:, None] + steps  # of joined
    tail = joined[rows, last]
    if segment_ids is not None and past:
        # What belongs to an earlier segment than the row's end is zero, as causal_conv1d leaves its final state.
        ids = jnp.take_along_axis(segment_ids, jnp.maximum(last - past, 0), axis=1)
        changes = ids != jnp.take_along_axis(segment_ids, jnp.maximum(end[:, None] - 1, 0), axis=1)
        later_changes = jnp.cumsum(changes[:, ::-1], axis=1)[:, ::-1]
        tail = jnp.where(later_changes[..., None] > 0, 0, tail)
    assert isinstance(out, jax.Array)
    return out.astype(x.dtype), tail.swapaxes(1, 2)


def _bounds(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first real position of each row and the one after its last; both are the length in a row without any."""
    length = mask.shape[1]
    positions = jnp.arange(length)
    start = jnp.min(jnp.where(mask, positions, length), axis=1, initial=length)
    end = jnp.max(jnp.where(mask, positions + 1, 0), axis=1, initial=0)
    return start, jnp.maximum(start, end)
