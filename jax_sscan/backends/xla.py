"""The selective scan in pure JAX: runs on every platform and differentiates to any order.

The sequence is cut into chunks. A `jax.lax.scan` over chunks carries the state; inside a chunk the recurrence
h_t = a_t h_{t-1} + b_t is an `associative_scan`, or a loop where the platform is a CPU, for which an associative scan
only means more arithmetic and more passes over memory (docs/performance.md). Arrays of a chunk are time-major, (chunk,
batch, groups, dstate, channels of a group): the sum over states then runs over an outer axis and the channels fill the
vector lanes.

The recurrence is written as the linear system it is (docs/derivation.md, "pure JAX"), so that `custom_linear_solve`
gives its transpose (the same scan, run backwards) and its derivatives of every order. `jax.checkpoint` around a chunk
keeps its inputs and its entry state only; no array of size batch * dim * length * dstate ever exists.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_sscan.canonical import Operands, Options, Residuals, Saved, Sizes, is_varying, sizes, states_of

# Measured on a CPU, where this implementation matters most: 32 steps are as fast as any and need the least memory.
_CHUNK = 32


def chunk_length(size: Sizes) -> int:
    """Steps per chunk."""
    return max(1, min(size.length, _CHUNK))


class _Weights(NamedTuple):
    """What every chunk shares: A, B and C when fixed, D; (groups, dstate or 1, channels)."""

    A: Any
    B: Any
    C: Any
    D: Any


class _Inputs(NamedTuple):
    """What is cut into chunks: (num_chunks, chunk, batch, groups, dstate or 1, channels or 1)."""

    u: Any
    delta: Any
    B: Any
    C: Any
    z: Any


class _Masks(NamedTuple):
    """Where the state restarts: (num_chunks, chunk, batch, 1, 1, 1), or None."""

    reset: Any


def forward(
    operands: Operands, options: Options, saved: Saved
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """Runs the scan; see `jax_sscan.backends` for the contract."""
    size = sizes(operands, options.layout)
    weights, state, inputs = _split(operands, options, size)
    # prevent_cse only matters outside of a loop; inside one it would only cost.
    chunk = jax.checkpoint(partial(_chunk, options), prevent_cse=False)

    def step(state: jax.Array, xs: tuple[_Inputs, _Masks]) -> tuple[jax.Array, Any]:
        next_state, out, ungated = chunk(weights, state, *xs)
        return next_state, (out, state if saved.states else None, ungated if saved.ungated else None)

    xs = inputs, _masks(operands.segment_ids, options, size)
    last_state, (out, states, ungated) = lax.scan(step, state, xs, reverse=options.reverse)
    if saved.states:
        states = states[:-1] if options.reverse else states[1:]
        states = jnp.moveaxis(states, (0, 3), (1, 2))
        states = states.reshape(size.batch, states.shape[1], size.dstate, size.dim)
    return (
        _merge_sequence(out, options, size),
        _merge_state(last_state, size) if options.last_state else None,
        states,
        _merge_sequence(ungated, options, size) if saved.ungated else None,
    )


def backward(
    residuals: Residuals,
    out_cotangent: jax.Array,
    last_state_cotangent: jax.Array | None,
    options: Options,
) -> Operands:
    """Runs the backward pass; see `jax_sscan.backends` for the contract.

    Walks the chunks against the processing order, recomputing each from its saved entry state, whole: it has no use for
    the output before the gate.
    """
    operands, states = residuals.operands, states_of(residuals, options.layout)
    size = sizes(operands, options.layout)
    (weights, state, inputs), split_vjp = jax.vjp(
        lambda operands: _split(operands, options, size), operands._replace(segment_ids=None)
    )
    states = states.reshape(*states.shape[:3], size.groups, size.dim // size.groups)
    states = _in_order(state[None], jnp.moveaxis(states, (1, 2), (0, 3)), options.reverse)

    def step(carry: tuple[jax.Array, _Weights], xs: Any) -> tuple[Any, _Inputs]:
        state_cotangent, weights_cotangent = carry
        inputs, masks, state, out_cotangent = xs

        def chunk(weights: _Weights, state: jax.Array, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
            return _chunk(options, weights, state, inputs, masks)[:2]

        _, vjp = jax.vjp(chunk, weights, state, inputs)
        d_weights, state_cotangent, d_inputs = vjp((state_cotangent, out_cotangent))
        weights_cotangent = jax.tree.map(jnp.add, weights_cotangent, d_weights)
        return (state_cotangent, weights_cotangent), d_inputs

    zeros = jnp.zeros_like(state)
    state_cotangent = zeros if last_state_cotangent is None else _split_state(last_state_cotangent, size)
    (d_state, d_weights), d_inputs = lax.scan(
        step,
        (state_cotangent, jax.tree.map(jnp.zeros_like, weights)),
        (
            inputs,
            _masks(operands.segment_ids, options, size),
            states,
            _split_sequence(out_cotangent, options, size),
        ),
        reverse=not options.reverse,
    )
    (cotangents,) = split_vjp((d_weights, d_state, d_inputs))
    return cotangents


def _chunk(
    options: Options, weights: _Weights, state: jax.Array, inputs: _Inputs, masks: _Masks
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One chunk: from its entry state and inputs to its exit state, its outputs and those before the gate."""
    A = weights.A
    real = jnp.finfo(A.dtype).dtype
    u, delta, B, C, z = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, real)), inputs)
    B = weights.B if B is None else B
    C = weights.C if C is None else C
    decay = jnp.exp(delta * A)
    if masks.reset is not None:
        decay = jnp.where(masks.reset, 0, decay)
    restarts = masks.reset is not None
    states = _recurrence(decay, (delta * u) * B, state, options.reverse, restarts)
    y = jnp.sum(C * states, axis=-2, keepdims=True)
    if jnp.iscomplexobj(y):
        y = 2 * y.real
    if weights.D is not None:
        y = y + weights.D * u
    out = y if z is None else y * (z * jax.nn.sigmoid(z))
    last_state = states[0 if options.reverse else -1]
    return last_state, out.astype(options.out_dtype), y.astype(options.out_dtype)


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)), and x itself above 20, as Mamba defines it. Exact for very negative x."""
    # min keeps exp finite where the other branch is taken, so that no NaN enters the gradient.
    return jnp.where(x > 20, x, jnp.log1p(jnp.exp(jnp.minimum(x, 20))))


def _recurrence(decay: jax.Array, source: jax.Array, state: jax.Array, reverse: bool, restarts: bool) -> jax.Array:
    """All states of h_t = decay_t h_{t-1} + source_t along axis 0, entered with ``state``.

    ``restarts`` says that some decays are exactly 0, and that not even NaN may pass them.
    """
    first = slice(-1, None) if reverse else slice(0, 1)
    entry = _carry(decay[first], state, restarts) + source[first]
    source = _in_order(entry, source[:-1] if reverse else source[1:], reverse)

    def matvec(states: jax.Array) -> jax.Array:
        return states - decay * _previous(states, reverse)

    def solve(_: Any, source: jax.Array) -> jax.Array:
        return _solve(decay, source, reverse, restarts)

    def transpose_solve(_: Any, cotangent: jax.Array) -> jax.Array:
        return _solve(_previous(decay, not reverse), cotangent, not reverse, restarts)

    return lax.custom_linear_solve(matvec, source, solve, transpose_solve)


def _in_order(first: jax.Array, rest: jax.Array, reverse: bool) -> jax.Array:
    return jnp.concatenate([rest, first] if reverse else [first, rest])


def _previous(array: jax.Array, reverse: bool) -> jax.Array:
    """The value one step earlier in processing order; zero at the first step."""
    return _in_order(jnp.zeros_like(array[:1]), array[1:] if reverse else array[:-1], reverse)


def _carry(decay: jax.Array, state: jax.Array, restarts: bool) -> jax.Array:
    carried = decay * state
    return jnp.where(decay == 0, 0, carried) if restarts else carried


def _solve(decay: jax.Array, source: jax.Array, reverse: bool, restarts: bool) -> jax.Array:
    def associative_scan(decay: jax.Array, source: jax.Array) -> jax.Array:
        def combine(left: Any, right: Any) -> Any:
            return left[0] * right[0], _carry(right[0], left[1], restarts) + right[1]

        return lax.associative_scan(combine, (decay, source), reverse=reverse)[1]

    def loop(decay: jax.Array, source: jax.Array) -> jax.Array:
        def step(state: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
            state = _carry(xs[0], state, restarts) + xs[1]
            return state, state

        return lax.scan(step, jnp.zeros_like(source[0]), (decay, source), reverse=reverse)[1]

    return lax.platform_dependent(decay, source, cpu=loop, default=associative_scan)


def _split(operands: Operands, options: Options, size: Sizes) -> tuple[_Weights, jax.Array, _Inputs]:
    """Canonical operands as what chunks share, the first state, and what is cut into chunks."""

    def per_channel(matrix: jax.Array) -> jax.Array:
        return matrix.reshape(size.groups, -1, matrix.shape[-1]).swapaxes(1, 2)

    def fixed(matrix: jax.Array) -> jax.Array | None:
        return None if is_varying(matrix) else per_channel(matrix)

    def vector(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else x.reshape(size.groups, 1, -1)

    def sequence(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else _split_sequence(x, options, size)

    def varying(matrix: jax.Array) -> jax.Array | None:
        if not is_varying(matrix):
            return None
        axes = (1, 0, 2, 3) if options.layout == "bld" else (3, 0, 1, 2)
        return _split_time(matrix.transpose(axes)[..., None], options.chunk)

    # Softplus is taken here, once per element: inside a chunk XLA would fuse it into the decays and take it per state.
    # Positions that pad the last chunk then have delta 0: decay 1, input 0, and no gradient.
    real = jnp.finfo(operands.A.dtype).dtype
    delta = operands.delta.astype(real)
    if operands.delta_bias is not None:
        delta = delta + (operands.delta_bias if options.layout == "bld" else operands.delta_bias[:, None])
    if options.delta_softplus:
        delta = softplus(delta)
    A, state = operands.A, operands.initial_state
    weights = _Weights(
        per_channel(A),
        fixed(operands.B),
        fixed(operands.C),
        vector(operands.D),
    )
    if state is None:
        state = jnp.zeros_like(operands.u, shape=(size.batch, size.dim, size.dstate), dtype=A.dtype)
    inputs = _Inputs(
        sequence(operands.u),
        sequence(delta),
        varying(operands.B),
        varying(operands.C),
        sequence(operands.z),
    )
    return weights, _split_state(state, size), inputs


def _split_sequence(x: jax.Array, options: Options, size: Sizes) -> jax.Array:
    x = x.transpose((1, 0, 2) if options.layout == "bld" else (2, 0, 1))
    return _split_time(x.reshape(size.length, size.batch, size.groups, 1, -1), options.chunk)


def _merge_sequence(x: jax.Array, options: Options, size: Sizes) -> jax.Array:
    x = x.reshape(-1, size.batch, size.dim)[: size.length]
    return x.transpose((1, 0, 2) if options.layout == "bld" else (1, 2, 0))


def _split_time(x: jax.Array, chunk: int) -> jax.Array:
    """Cuts axis 0 into chunks, padding the last one with zeros."""
    padding = -x.shape[0] % chunk
    if padding:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])


def _split_state(state: jax.Array, size: Sizes) -> jax.Array:
    """(batch, dim, dstate) -> (batch, groups, dstate, channels of a group)."""
    return state.reshape(size.batch, size.groups, -1, size.dstate).swapaxes(2, 3)


def _merge_state(state: jax.Array, size: Sizes) -> jax.Array:
    return state.swapaxes(2, 3).reshape(size.batch, size.dim, size.dstate)


def _masks(segment_ids: jax.Array | None, options: Options, size: Sizes) -> _Masks:
    def split(mask: jax.Array) -> jax.Array:
        return _split_time(mask[..., None, None, None], options.chunk)

    reset = None
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        # The first position in processing order continues the initial state, whatever its id.
        padding = (0, 1) if options.reverse else (1, 0)
        reset = split(jnp.pad(changes, [(0, 0), padding]).T)
    return _Masks(reset)
