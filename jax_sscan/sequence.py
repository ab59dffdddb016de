"""Sequence parallelism: the length divided over a mesh axis inside `jax.shard_map`.

A part of a sequence maps the state that enters it to the one that leaves it, h -> decay h + state, element by element:
decay = exp(A sum of delta), and ``state`` is what leaves it when nothing enters. One all-gather of these two tells each
device what enters its part, whatever the length; then the kernel runs on the part from there. The backward pass is the
same from the other end: the cotangent of what leaves a part becomes that of what enters it, g -> decay g + cotangent
(docs/parallelism.md). Both kernels see exact states and cotangents at their borders, so that gradients need no more.

Each pass costs one more run of the forward kernel, which finds ``state`` or ``cotangent``.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_sscan import backends, linear
from jax_sscan.canonical import RESIDUAL_NAMES, Operands, Options, Residuals


@dataclass(frozen=True)
class Part:
    """Where a device stands, in processing order.

    Attributes:
        axis_name: the mesh axis.
        count: how many devices it has.
        index: this device's place among them.
        reverse: whether the order runs against that of the axis.
    """

    axis_name: str
    count: int
    index: jax.Array
    reverse: bool

    def is_first(self) -> jax.Array:
        """Whether the sequence begins here."""
        return self.index == 0

    def is_last(self) -> jax.Array:
        """Whether the sequence ends here."""
        return self.index == self.count - 1


def part(axis_name: str, reverse: bool = False) -> Part:
    """This device's place on a mesh axis.

    Raises:
        ValueError: ``axis_name`` is no axis of an enclosing `jax.shard_map`.
    """
    try:
        count = lax.axis_size(axis_name)
        index = lax.axis_index(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name must be a mesh axis of the jax.shard_map around the call, got {axis_name!r}; "
            "leave it out to scan whole sequences"
        ) from None
    return Part(axis_name, count, count - 1 - index if reverse else index, reverse)


def from_previous(x: jax.Array, part: Part) -> jax.Array:
    """``x`` of the device before this one in processing order; zeros on the first."""
    pairs = [(i, i + 1) for i in range(part.count - 1)]
    return lax.ppermute(x, part.axis_name, [pair[::-1] for pair in pairs] if part.reverse else pairs)


def from_last(x: jax.Array, part: Part) -> jax.Array:
    """``x`` of the last device in processing order, on every device."""
    return lax.psum(jnp.where(part.is_last(), x, jnp.zeros_like(x)), part.axis_name)


def run(
    operands: Operands, options: Options, implementation: str | None, axis_name: str
) -> tuple[jax.Array, jax.Array | None]:
    """The scan of a sequence of which each device of ``axis_name`` has a part, in order; see `selective_scan`."""
    if operands.initial_state is None:
        # Like what has a state's shape and is divided as it is.
        operands = operands._replace(initial_state=jnp.zeros_like(_decay(operands, options)))
    results: Any = _scan(operands, options, implementation, axis_name)
    out, last_state = results
    return out, None if last_state is None else from_last(last_state, part(axis_name, options.reverse))


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _scan(
    operands: Operands, options: Options, implementation: str | None, axis_name: str
) -> tuple[jax.Array, jax.Array | None]:
    return _forward(operands, options, False, implementation, axis_name)[:2]


@_scan.defjvp
def _scan_jvp(
    options: Options,
    implementation: str | None,
    axis_name: str,
    primals: tuple[Operands],
    tangents: tuple[Operands],
) -> tuple[tuple[jax.Array, jax.Array | None], Any]:
    """As that of `jax_sscan.scan`."""
    (operands,), (tangent,) = primals, tangents
    out, last_state, residuals, decay = _forward(operands, options, True, implementation, axis_name)
    out = checkpoint_name(out, RESIDUAL_NAMES[0])
    entering, states, decay = (
        checkpoint_name(x, RESIDUAL_NAMES[1]) for x in (residuals.operands.initial_state, residuals.states, decay)
    )
    ungated = checkpoint_name(residuals.ungated, RESIDUAL_NAMES[2])
    saved = Residuals(operands._replace(initial_state=entering), states, ungated), decay, operands.initial_state

    def push(saved: Any, tangent: Operands) -> tuple[jax.Array, jax.Array | None]:
        residuals, _, initial_state = saved
        operands = residuals.operands._replace(initial_state=initial_state, segment_ids=None)

        def forward(operands: Operands) -> tuple[jax.Array, jax.Array | None]:
            operands = operands._replace(segment_ids=residuals.operands.segment_ids)
            return _forward(operands, options, False, "xla", axis_name)[:2]

        return jax.jvp(forward, (operands,), (tangent,))[1]

    def pull(saved: Any, cotangents: tuple[jax.Array, jax.Array | None]) -> Operands:
        residuals, decay, _ = saved
        return _backward(residuals, decay, *cotangents, options, implementation, axis_name)

    results = out, last_state
    return results, linear.call(push, pull, saved, tangent._replace(segment_ids=None), results)


def _backward(
    residuals: Residuals,
    decay: jax.Array,
    out_cotangent: jax.Array,
    last_state_cotangent: jax.Array | None,
    options: Options,
    implementation: str | None,
    axis_name: str,
) -> Operands:
    operands = residuals.operands
    here = part(axis_name, not options.reverse)
    if last_state_cotangent is None:
        last_state_cotangent = jnp.zeros_like(operands.initial_state)
    entry_cotangent = _entry_cotangent(operands, out_cotangent, options, implementation)
    # What enters and is dropped, since a segment begins, gets no cotangent.
    entry_cotangent = jnp.where(_continues(operands, part(axis_name, options.reverse)), entry_cotangent, 0)
    leaving_cotangent = _entering(decay, entry_cotangent, last_state_cotangent, here, operands.segment_ids is not None)
    gradients = backends.backward(residuals, out_cotangent, leaving_cotangent, options, implementation)
    # Only the first device's part begins with the caller's initial state.
    return gradients._replace(initial_state=jnp.where(here.is_last(), gradients.initial_state, 0))


def _forward(
    operands: Operands, options: Options, for_backward: bool, implementation: str | None, axis_name: str
) -> tuple[jax.Array, jax.Array | None, Residuals, jax.Array]:
    """Output, last state of the part, residuals with the state that enters the part, and what the part lets pass."""
    here = part(axis_name, options.reverse)
    continues = _continues(operands, here)
    decay = jnp.where(continues, _decay(operands, options), 0)
    # All that the output needs is left out.
    state_only = operands._replace(D=None, z=None, initial_state=None)
    _, state, *_ = backends.forward(state_only, replace(options, last_state=True), False, implementation)
    entering = _entering(decay, cast(jax.Array, state), operands.initial_state, here, operands.segment_ids is not None)
    operands = operands._replace(initial_state=jnp.where(continues, entering, 0))
    out, last_state, *saved = backends.forward(operands, options, for_backward, implementation)
    return out, last_state, Residuals(operands, *saved), decay


def _entering(decay: jax.Array, state: jax.Array, first: jax.Array, part: Part, restarts: bool) -> jax.Array:
    """What enters this device's part: the first device's ``first``, led through the parts before this one.

    ``restarts`` says that some decays are exactly 0, and that not even NaN may pass them.
    """

    def through(decay: jax.Array, state: jax.Array, entering: jax.Array) -> jax.Array:
        passed = decay * entering
        return (jnp.where(decay == 0, 0, passed) if restarts else passed) + state

    state = jnp.where(part.is_first(), through(decay, state, first), state)
    # Tiled: JAX 0.10 loses track of other, explicit mesh axes where all_gather adds an axis.
    parts = lax.all_gather(jnp.stack([decay, state])[None], part.axis_name, tiled=True)
    parts = parts[::-1] if part.reverse else parts
    # Those before this one only; the first part holds ``first`` already, so nothing enters it here.
    before = jnp.arange(part.count) < part.index

    def step(entering: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        (decay, state), is_before = xs
        return jnp.where(is_before, through(decay, state, entering), entering), None

    entering, _ = lax.scan(step, jnp.zeros_like(state), (parts, before))
    return jnp.where(part.is_first(), first, entering)


def _delta(operands: Operands, options: Options) -> jax.Array:
    """The step sizes as the recurrence has them: wide, with bias, through softplus."""
    delta = operands.delta.astype(jnp.finfo(operands.A.dtype).dtype)
    if operands.delta_bias is not None:
        delta = delta + (operands.delta_bias if options.layout == "bld" else operands.delta_bias[:, None])
    return backends.xla.softplus(delta) if options.delta_softplus else delta


def _decay(operands: Operands, options: Options) -> jax.Array:
    """What this part lets pass of the state that enters it: (batch, dim, dstate)."""
    total = jnp.sum(_delta(operands, options), axis=1 if options.layout == "bld" else 2)
    decay = jnp.exp(total[..., None] * operands.A)
    if operands.segment_ids is not None:
        ids = operands.segment_ids
        decay = jnp.where(jnp.any(ids != ids[:, :1], axis=1)[:, None, None], 0, decay)
    return decay


def _continues(operands: Operands, part: Part) -> jax.Array:
    """Whether this part continues the segment before it, per batch row; the first continues the initial state."""
    ids = operands.segment_ids
    if ids is None:
        return jnp.array(True)
    first, last = (ids[:, -1], ids[:, 0]) if part.reverse else (ids[:, 0], ids[:, -1])
    return (part.is_first() | (from_previous(last, part) == first))[:, None, None]


def _entry_cotangent(
    operands: Operands, out_cotangent: jax.Array, options: Options, implementation: str | None
) -> jax.Array:
    """The cotangent of the state that enters this part, of its own output alone: (batch, dim, dstate).

    With y's cotangent g_y it is sum_t exp(A (delta_0 + ... + delta_t)) C_t g_y,t: but for the first decay, the last
    state of a scan from the other end with C in the place of B and delta one step ahead.
    """
    wide = operands.A.dtype
    real = jnp.finfo(wide).dtype
    cotangent = out_cotangent.astype(real)
    if operands.z is not None:
        gate = operands.z.astype(real)
        cotangent = cotangent * (gate * jax.nn.sigmoid(gate))
    if jnp.issubdtype(wide, jnp.complexfloating):
        cotangent = 2 * cotangent
    axis = 1 if options.layout == "bld" else 2
    length = cotangent.shape[axis]
    delta = _delta(operands, options)
    first = length - 1 if options.reverse else 0
    first_delta = lax.index_in_dim(delta, first, axis, keepdims=False)
    edge = [(0, 0)] * 3
    edge[axis] = (1, 0) if options.reverse else (0, 1)
    rest = lax.slice_in_dim(delta, 0, -1, axis=axis) if options.reverse else lax.slice_in_dim(delta, 1, None, axis=axis)
    ahead = jnp.pad(rest, edge)
    # The kernel multiplies its input by delta. A step as small as this decays nothing and can be divided by.
    ahead = jnp.where(jnp.abs(ahead) < _SMALL_STEP, _SMALL_STEP, ahead)
    adjoint = Operands(cotangent / ahead, ahead, operands.A, operands.C, operands.C, segment_ids=operands.segment_ids)
    backwards = replace(
        options, delta_softplus=False, reverse=not options.reverse, last_state=True, out_dtype=jnp.dtype(real)
    )
    _, state, *_ = backends.forward(adjoint, backwards, False, implementation)
    return jnp.exp(first_delta[..., None] * operands.A) * cast(jax.Array, state)


_SMALL_STEP = 1e-20
