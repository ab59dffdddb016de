"""The canonical form of a selective scan: what every backend takes, and the checks that lead to it.

A backend sees one struct of arrays (`Operands`) and one struct of static flags (`Options`), whichever way the caller
spelled the problem. In canonical form

* u, delta, z and the output are (batch, dim, length) or (batch, length, dim), as ``options.layout`` says, each in its
  own dtype;
* A is (dim, dstate) in the compute dtype, or complex of that precision;
* B and C are either fixed, (dim, dstate) with A's dtype, or varying with an explicit group axis:
  (batch, groups, dstate, length) in layout "bdl", (batch, length, groups, dstate) in "bld";
* D and delta_bias are (dim,) in the compute dtype, initial_state is (batch, dim, dstate) with A's dtype;
* segment_ids are (batch, length) int32;
* batch, dim, length and dstate are at least 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_sscan import checks

RESIDUAL_NAMES = ("selective_scan_out", "selective_scan_states", "selective_scan_ungated")
"""The `checkpoint_name` of what a scan computes for its successors (the output) and its backward pass: the states
between chunks and, with a gate, the output before it.

``jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES))`` rematerialises everything
around a scan without running the scan a second time.
"""

Layout = Literal["bdl", "bld"]
LAYOUTS: tuple[str, ...] = get_args(Layout)


class Operands(NamedTuple):
    """The arrays of one scan in canonical form; absent ones are None. Gradients use the same struct."""

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any = None
    z: Any = None
    delta_bias: Any = None
    initial_state: Any = None
    segment_ids: Any = None


@dataclass(frozen=True)
class Options:
    """The static flags of one scan.

    ``last_state`` says whether the last state is wanted; ``chunk`` is the number of steps between two saved states.
    """

    delta_softplus: bool
    reverse: bool
    layout: Layout
    out_dtype: np.dtype
    last_state: bool
    chunk: int


class Saved(NamedTuple):
    """Which of the arrays that `Residuals` keep beside the operands a forward pass computes."""

    states: bool = False
    ungated: bool = False


class Sizes(NamedTuple):
    """The sizes of one scan."""

    batch: int
    dim: int
    length: int
    dstate: int
    groups: int


class Residuals(NamedTuple):
    """What the backward pass keeps: the operands, the states between chunks and, with a gate, the output before it.

    Chunk i covers positions [i * chunk, (i + 1) * chunk); ``states[:, i]`` is the state that passes between chunks i
    and i + 1, from left to right or, when reverse, from right to left: (batch, num_chunks - 1, dstate, dim), or None
    where there is one chunk.

    ``ungated`` is y + D u, like the output in shape and dtype, or None without z. The gradient of z needs it, and to
    read it takes less time than to sum it up again (docs/derivation.md).
    """

    operands: Operands
    states: Any
    ungated: Any


def is_varying(matrix: jax.Array) -> bool:
    """Whether canonical B or C changes along the sequence."""
    return matrix.ndim == 4


def sizes(operands: Operands, layout: Layout) -> Sizes:
    """Reads the sizes off canonical operands."""
    batch, *rest = operands.u.shape
    length, dim = rest if layout == "bld" else rest[::-1]
    groups = 1
    for matrix in (operands.B, operands.C):
        if is_varying(matrix):
            groups = matrix.shape[2 if layout == "bld" else 1]
    return Sizes(batch, dim, length, operands.A.shape[1], groups)


def states_of(residuals: Residuals, layout: Layout) -> jax.Array:
    """The states between chunks, as an array of none where there is one chunk."""
    if residuals.states is not None:
        return residuals.states
    size = sizes(residuals.operands, layout)
    # Made from an operand, so that inside `jax.shard_map` it varies over the mesh as they do.
    return jnp.zeros_like(
        residuals.operands.u, shape=(size.batch, 0, size.dstate, size.dim), dtype=residuals.operands.A.dtype
    )


STATE_AXES = "batch dim dstate"
SAVED_STATES_AXES = "batch chunk dstate dim"
"""Names of the axes of a state, and of the states that `Residuals` keep."""


def axes(operands: Operands, layout: Layout) -> Operands:
    """The names of the axes of canonical operands, one string each with spaces between; None for absent ones."""
    sequence, varying = (
        ("batch length dim", "batch length group dstate")
        if layout == "bld"
        else ("batch dim length", "batch group dstate length")
    )
    names = Operands(
        u=sequence,
        delta=sequence,
        A="dim dstate",
        B=varying if is_varying(operands.B) else "dim dstate",
        C=varying if is_varying(operands.C) else "dim dstate",
        D="dim",
        z=sequence,
        delta_bias="dim",
        initial_state=STATE_AXES,
        segment_ids="batch length",
    )
    return Operands(*(None if x is None else name for name, x in zip(names, operands, strict=True)))


def result_axes(axes: Operands, options: Options, saved: Saved) -> tuple[str, str | None, str | None, str | None]:
    """The names of the axes of a forward pass's results, given those of its operands."""
    return (
        axes.u,
        STATE_AXES if options.last_state else None,
        SAVED_STATES_AXES if saved.states else None,
        axes.u if saved.ungated else None,
    )


def backward_axes(axes: Operands, states: Any, last_state_cotangent: Any) -> tuple[Residuals, str, str | None]:
    """The names of the axes of a backward pass's arguments, given those of the operands."""
    residuals = Residuals(axes, None if states is None else SAVED_STATES_AXES, axes.z)
    return residuals, axes.u, None if last_state_cotangent is None else STATE_AXES


def sequence_dims(layout: Layout) -> str:
    """The axes of u in ``layout``, for messages."""
    return "(batch, length, dim)" if layout == "bld" else "(batch, dim, length)"


def _matrix(name: str, value: Any, A: jax.Array, batch: int, length: int, layout: Layout) -> jax.Array:
    """Checks B or C and gives a varying one its group axis."""
    array = checks.as_array(name, value)
    dim, dstate = A.shape
    is_complex = jnp.iscomplexobj(A)
    same_kind = checks.COMPLEX if is_complex else checks.WIDE_REAL
    if array.ndim == 2:
        checks.check_dtype(name, array, same_kind, f"a fixed {name} has the kind of A ({A.dtype})")
        checks.check_shape(name, array, "(dim, dstate)", (dim, dstate))
        return array
    if array.ndim not in (3, 4):
        raise ValueError(
            f"{name} must have 2 axes (dim, dstate), or 3 or 4 when it varies along the sequence; "
            f"got {array.ndim} in shape {array.shape}"
        )
    interleaved = is_complex and layout == "bdl" and not jnp.iscomplexobj(array)
    if interleaved:
        checks.check_dtype(name, array, checks.REAL)
    elif is_complex:
        checks.check_dtype(name, array, checks.COMPLEX, f"A is {A.dtype}")
    else:
        checks.check_dtype(name, array, checks.REAL, f"A is {A.dtype}")
    group_axis = 2 if layout == "bld" else 1
    if array.ndim == 3:
        expected, dims = (
            ((batch, length, dstate), "(batch, length, dstate)")
            if layout == "bld"
            else ((batch, dstate, length), "(batch, dstate, length)")
        )
    else:
        groups = checks.check_groups(name, array, group_axis, dim)
        expected, dims = (
            ((batch, length, groups, dstate), "(batch, length, groups, dstate)")
            if layout == "bld"
            else ((batch, groups, dstate, length), "(batch, groups, dstate, length)")
        )
    if interleaved:
        expected = (*expected[:-1], 2 * length)
        dims = dims.replace("length", "2 * length") + " (real and imaginary parts interleaved)"
    checks.check_shape(name, array, dims, expected)
    if interleaved:
        wide = array.astype(checks.compute_dtype(A, array))
        pairs = wide.reshape(*wide.shape[:-1], length, 2)
        array = jax.lax.complex(pairs[..., 0], pairs[..., 1])
    return jnp.expand_dims(array, group_axis) if array.ndim == 3 else array


def canonicalize(
    operands: Operands,
    *,
    delta_softplus: bool,
    reverse: bool,
    layout: Layout,
    out_dtype: Any,
    last_state: bool,
    chunk_length: Callable[[Sizes], int],
) -> tuple[Operands, Options]:
    """Checks a scan as the caller wrote it and brings it into canonical form.

    Weights, states and fixed B and C are widened to the compute dtype (never narrowed), which JAX differentiates by
    itself; u, delta, z and varying real B and C keep the dtype they came in. ``chunk_length`` says for the sizes found
    how many steps lie between two saved states.

    Raises:
        ValueError: a shape, the layout or the number of groups is wrong.
        TypeError: a dtype is wrong, or something is not an array.
    """
    checks.check_choice("layout", layout, LAYOUTS)
    delta_softplus = checks.check_flag("delta_softplus", delta_softplus)
    reverse = checks.check_flag("reverse", reverse)
    dims = sequence_dims(layout)

    u = checks.sequence("u", operands.u, dims)
    batch, *rest = u.shape
    length, dim = rest if layout == "bld" else rest[::-1]
    if dim == 0:
        raise ValueError(f"u must have at least one channel, got shape {u.shape} with dim = 0")
    delta = checks.sequence("delta", operands.delta, dims, u.shape)
    z = None if operands.z is None else checks.sequence("z", operands.z, dims, u.shape)
    A = checks.transition(operands.A, dim)
    B = _matrix("B", operands.B, A, batch, length, layout)
    C = _matrix("C", operands.C, A, batch, length, layout)
    group_axis = 2 if layout == "bld" else 1
    if is_varying(B) and is_varying(C) and B.shape[group_axis] != C.shape[group_axis]:
        raise ValueError(
            f"B and C must have the same number of groups, got {B.shape[group_axis]} in B and "
            f"{C.shape[group_axis]} in C"
        )
    D, delta_bias = operands.D, operands.delta_bias
    state, segment_ids = operands.initial_state, operands.segment_ids
    if D is not None:
        D = checks.channel_vector("D", D, dim)
    if delta_bias is not None:
        delta_bias = checks.channel_vector("delta_bias", delta_bias, dim)
    if state is not None:
        state = checks.state("initial_state", state, batch, A)
    if segment_ids is not None:
        segment_ids = checks.segments(segment_ids, batch, length)

    out_dtype = np.dtype(u.dtype if out_dtype is None else out_dtype)
    if not any(out_dtype == dtype for dtype in checks.REAL):
        raise TypeError(f"out_dtype must be float32, bfloat16, float16 or float64, got {out_dtype}")
    if out_dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise TypeError("out_dtype is float64, which needs JAX's x64 mode")

    real = checks.compute_dtype(u, delta, A, B, C, D, z, delta_bias, state)
    weight = jnp.result_type(A.dtype, real)

    def widen(array: jax.Array | None, dtype: Any) -> jax.Array | None:
        return None if array is None else array.astype(dtype)

    def widen_matrix(matrix: jax.Array) -> jax.Array:
        keeps_dtype = is_varying(matrix) and not jnp.iscomplexobj(matrix)
        return matrix if keeps_dtype else matrix.astype(weight)

    canonical = Operands(
        u=u,
        delta=delta,
        A=A.astype(weight),
        B=widen_matrix(B),
        C=widen_matrix(C),
        D=widen(D, real),
        z=z,
        delta_bias=widen(delta_bias, real),
        initial_state=widen(state, weight),
        segment_ids=segment_ids,
    )
    chunk = chunk_length(sizes(canonical, layout))
    return canonical, Options(delta_softplus, reverse, layout, out_dtype, last_state, chunk)
