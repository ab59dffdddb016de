"""The causal depthwise convolution in front of Mamba's scan, and its decode step.

A shifted multiply-add, width times over, that XLA fuses into one pass: for the widths in use (2 to 4) a grouped
convolution would be slower, and the gradients are as plain as the sum itself.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_sscan import checks, sequence
from jax_sscan.canonical import LAYOUTS, Layout, sequence_dims

Activation = Literal["silu"] | None


def causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    activation: Activation = None,
    return_final_state: bool = False,
    layout: Layout = "bdl",
    axis_name: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal depthwise convolution: ``out[t] = activation(bias + sum_k weight[:, k] x[t - (width - 1) + k])``.

    Sums are float32 (float64 if any operand is float64).

    Args:
        x: (batch, dim, length) in layout "bdl", (batch, length, dim) in "bld"; float32, bfloat16, float16 or float64.
        weight: (dim, width), of any of these dtypes; the last tap multiplies the present.
        bias: (dim,), of any of these dtypes.
        initial_state: (batch, dim, width - 1) in both layouts, the inputs before position 0, oldest first; zeros if
            None.
        segment_ids: (batch, length) int32: nothing is read across a change of id. Position 0 continues initial_state.
        activation: None or "silu".
        return_final_state: whether to return the state that continues the sequence as well.
        layout: "bdl" or "bld".
        axis_name: inside `jax.shard_map`, the mesh axis over which the sequence is divided, as in `selective_scan`.
            Each device needs at least width - 1 positions, the last of which its neighbour gets.

    Returns:
        The output, of x's shape and dtype, or ``(out, final_state)``. final_state, (batch, dim, width - 1), holds the
        last inputs, with zeros where they belong to an earlier segment than the last position; its dtype is x's,
        widened to initial_state's where that is wider.

    Raises:
        ValueError: a shape or a name is wrong, or a device's part is too short.
        TypeError: a dtype is wrong or something is not an array.
    """
    checks.check_choice("layout", layout, LAYOUTS)
    checks.check_choice("activation", activation, (None, "silu"))
    x = checks.sequence("x", x, sequence_dims(layout))
    batch, dim, length = x.shape if layout == "bdl" else (x.shape[0], x.shape[2], x.shape[1])
    weight, bias = _filter(weight, bias, dim)
    if initial_state is not None:
        initial_state = _conv_state("initial_state", initial_state, batch, weight)
    if segment_ids is not None:
        segment_ids = checks.segments(segment_ids, batch, length)
    here = None
    if axis_name is not None:
        here = sequence.part(axis_name)
        if length < weight.shape[1] - 1:
            raise ValueError(
                f"x must have at least width - 1 = {weight.shape[1] - 1} positions on each device of {axis_name!r}, "
                f"got {length}; divide the sequence among fewer devices"
            )
        initial_state = _entering(x, weight, initial_state, segment_ids, here, layout)
    out, final_state = _conv(x, weight, bias, initial_state, segment_ids, activation, layout)
    if return_final_state:
        return out, final_state if here is None else sequence.from_last(final_state, here)
    return out


def _entering(
    x: jax.Array,
    weight: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    here: sequence.Part,
    layout: Layout,
) -> jax.Array:
    """The initial state of this device's part: the last inputs of the one before it, where their segment goes on."""
    past = weight.shape[1] - 1
    time = 1 if layout == "bld" else 2
    length = x.shape[time]
    state = sequence.from_previous(jax.lax.slice_in_dim(x, length - past, length, axis=time), here)
    state = state.swapaxes(1, 2) if layout == "bld" else state
    if segment_ids is not None:
        ids = sequence.from_previous(segment_ids[:, length - past :], here)
        differs = ids != segment_ids[:, :1]
        same = jnp.cumsum(differs[:, ::-1], axis=1)[:, ::-1] == 0
        state = jnp.where(same[:, None], state, 0)
    if initial_state is None:
        return state
    dtype = jnp.promote_types(state.dtype, initial_state.dtype)
    return jnp.where(here.is_first(), initial_state.astype(dtype), state.astype(dtype))


def causal_conv1d_update(
    x: jax.Array,
    state: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    activation: Activation = None,
) -> tuple[jax.Array, jax.Array]:
    """One decode step of `causal_conv1d`.

    Args:
        x: (batch, dim).
        state: (batch, dim, width - 1), the inputs before x, oldest first.
        weight: (dim, width).
        bias: (dim,).
        activation: None or "silu".

    Returns:
        The output (batch, dim) in the dtype of x, and the new state in the dtype of state.

    Raises:
        ValueError: a shape or a name is wrong.
        TypeError: a dtype is wrong or something is not an array.
    """
    checks.check_choice("activation", activation, (None, "silu"))
    x = checks.sequence("x", x, "(batch, dim)")
    weight, bias = _filter(weight, bias, x.shape[1])
    state = _conv_state("state", state, x.shape[0], weight)
    out, new_state = _conv(x[..., None], weight, bias, state, None, activation, "bdl")
    return out[..., 0], new_state.astype(state.dtype)


def _filter(weight: Any, bias: Any, dim: int) -> tuple[jax.Array, jax.Array | None]:
    weight = checks.sequence("weight", weight, "(dim, width)")
    if weight.shape[0] != dim or weight.shape[1] == 0:
        raise ValueError(f"weight must have shape (dim, width) = ({dim}, width >= 1), got {weight.shape}")
    if bias is not None:
        bias = checks.sequence("bias", bias, "(dim,)", (dim,))
    return weight, bias


def _conv_state(name: str, value: Any, batch: int, weight: jax.Array) -> jax.Array:
    dim, width = weight.shape
    return checks.sequence(name, value, "(batch, dim, width - 1)", (batch, dim, width - 1))


@partial(jax.jit, static_argnames=("activation", "layout"))
def _conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    activation: Activation,
    layout: Layout,
) -> tuple[jax.Array, jax.Array]:
    """The convolution on checked arguments; returns the output and the final state."""
    time = 1 if layout == "bld" else 2
    batch, length, width = x.shape[0], x.shape[time], weight.shape[1]
    dim = weight.shape[0]
    if initial_state is None:
        initial_state = jnp.zeros_like(x, shape=(batch, dim, width - 1))
    state_dtype = jnp.promote_types(x.dtype, initial_state.dtype)
    past = initial_state.swapaxes(1, 2) if layout == "bld" else initial_state
    padded = jnp.concatenate([past.astype(state_dtype), x.astype(state_dtype)], axis=time)
    segments = None
    if segment_ids is not None:
        segments = _segment_numbers(segment_ids, width)

    real = checks.compute_dtype(x, weight, bias, initial_state)

    # Widened before anything is cut out, so that the gradients of all cuts are summed wide as well.
    wide = padded.astype(real)

    def channels(vector: jax.Array) -> jax.Array:
        return vector.astype(real) if layout == "bld" else vector.astype(real)[:, None]

    def tap(shift: int) -> jax.Array:
        """Delays x by width - 1 - shift steps, without what belongs to another segment."""
        window = jax.lax.slice_in_dim(wide, shift, shift + length, axis=time)
        if segments is None or shift == width - 1:
            return window
        same = segments[:, shift : shift + length] == segments[:, width - 1 :]
        return jnp.where(jnp.expand_dims(same, 3 - time), window, 0)

    out = channels(weight[:, -1]) * tap(width - 1)
    for shift in range(width - 1):
        out = out + channels(weight[:, shift]) * tap(shift)
    if bias is not None:
        out = out + channels(bias)
    if activation == "silu":
        out = out * jax.nn.sigmoid(out)

    final = jax.lax.slice_in_dim(wide, length, length + width - 1, axis=time)
    if segments is not None:
        same = segments[:, length:] == segments[:, -1:]
        final = jnp.where(jnp.expand_dims(same, 3 - time), final, 0)
    final = final.swapaxes(1, 2) if layout == "bld" else final
    return out.astype(x.dtype), final.astype(state_dtype)


def _segment_numbers(segment_ids: jax.Array, width: int) -> jax.Array:
    """Numbers the segments 0, 1, ... so that an id that comes back later is another segment.

    The width - 1 positions of the initial state in front belong to segment 0, as position 0 does.
    """
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    in_front = min(segment_ids.shape[1], 1)
    return jnp.cumsum(jnp.pad(changes, [(0, 0), (width - 1 + in_front, 0)]), axis=1)
