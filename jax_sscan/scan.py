"""The selective scan: checks, canonical form, and the derivatives wired to the kernels."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_sscan import backends, canonical, checks, linear, sequence
from jax_sscan.backends import partitioning
from jax_sscan.canonical import RESIDUAL_NAMES, Layout, Operands, Options, Residuals, Saved


class ScanForward(NamedTuple):
    """Result of `selective_scan_forward`: the output, the last state, and what is saved for the backward pass.

    That is the states between chunks and, with z, the output before the gate, y + D u (None without).
    """

    out: jax.Array
    last_state: jax.Array
    states: jax.Array
    ungated: jax.Array | None


class ScanGradients(NamedTuple):
    """Result of `selective_scan_backward`: one cotangent per floating operand, None for absent ones."""

    u: jax.Array
    delta: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None
    z: jax.Array | None
    delta_bias: jax.Array | None
    initial_state: jax.Array | None


def selective_scan(
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
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    return_last_state: bool = False,
    layout: Layout = "bdl",
    out_dtype: Any = None,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Mamba's selective scan (S6), algorithm 2 of arXiv 2312.00752.

    Per batch, channel and state, in time order::

        delta_t = softplus?(delta_t + delta_bias)
        h_t     = exp(delta_t A) h_{t-1} + delta_t u_t B_t
        y_t     = sum_n C_t h_t          (A real)    or    2 Re sum_n C_t h_t    (A complex)
        out_t   = (y_t + D u_t) silu(z_t)

    The state and every sum are float32 (float64 if any operand is float64), whatever the dtype of u. Gradients are
    exact for every floating operand and through the last state, and are the same bits from run to run.

    Args:
        u: input, (batch, dim, length) in layout "bdl" or (batch, length, dim) in "bld"; float32, bfloat16, float16 or
            float64. delta and z may have other dtypes of these than u.
        delta: step sizes, shape of u.
        A: (dim, dstate), float32 or float64; complex64 or complex128 for a complex state.
        B: (dim, dstate) with the kind of A if fixed. If it varies along the sequence, (batch, dstate, length) or
            (batch, groups, dstate, length) in "bdl", (batch, length, dstate) or (batch, length, groups, dstate) in
            "bld", of any real dtype that u may have; channel d reads group d // (dim / groups). With a complex A it is
            complex; "bdl" also takes the real array (..., 2 * length) of interleaved real and imaginary parts.
        C: as B, fixed or varying independently of it.
        D: skip connection, (dim,), float32 or float64.
        z: gate, shape of u.
        delta_bias: (dim,), float32 or float64, added to delta before softplus.
        delta_softplus: whether delta goes through softplus(x) = log(1 + exp(x)), and x for x > 20.
        initial_state: (batch, dim, dstate), float32 or float64, complex when A is; zeros if None.
        segment_ids: (batch, length) int32: the state restarts from 0 where the id differs from the previous
            position's (the next one's if reverse). The first position processed continues initial_state.
        reverse: whether time runs from the last position to the first.
        return_last_state: whether to return the state after the last position processed as well.
        layout: "bdl" or "bld", the order of the axes of u, delta, z, B, C and the output.
        out_dtype: dtype of the output; that of u if None.
        axis_name: inside `jax.shard_map`, the mesh axis over which the sequence is divided: each device passes its part
            of u, delta, B, C, z and segment_ids, in order and of one length, and gets its part of the output.
            initial_state (the first device's counts) and last_state (the same on all) are those of the whole sequence.
        implementation: None for the best one of the platform the computation is lowered for, or "cuda", "cpu"
            (native) or "xla" (pure JAX). See `implementations`.

    Returns:
        The output, of u's shape, or ``(out, last_state)`` with last_state (batch, dim, dstate) in the state's dtype.

    Raises:
        ValueError: a shape, a name or the number of groups is wrong, the implementation cannot run here, or axis_name
            is no axis of a `jax.shard_map` around the call.
        TypeError: a dtype is wrong or something is not an array.
    """
    operands = Operands(u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids)
    backends.check_implementation(implementation)
    operands, options = canonical.canonicalize(
        operands,
        delta_softplus=delta_softplus,
        reverse=reverse,
        layout=layout,
        out_dtype=out_dtype,
        last_state=checks.check_flag("return_last_state", return_last_state),
        chunk_length=partial(backends.chunk_length, implementation),
    )
    if operands.u.size == 0:
        out, last_state = _empty(operands, options)
    else:
        out, last_state = _run(operands, options, implementation, axis_name)
    return (out, last_state) if options.last_state else out


def selective_scan_forward(
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
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    layout: Layout = "bdl",
    out_dtype: Any = None,
    implementation: str | None = None,
) -> ScanForward:
    """Runs the forward kernel alone, outside autodiff; arguments as in `selective_scan`.

    Returns:
        ``out``, ``last_state``, and what `selective_scan_backward` takes: ``states``, the saved states, and
        ``ungated``, the output before the gate, of the shape and dtype of ``out``, or None without z.

    Raises:
        ValueError: as `selective_scan`; also if batch or length is 0.
        TypeError: as `selective_scan`.
    """
    operands = Operands(u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids)
    operands, options = _kernel_form(operands, delta_softplus, reverse, layout, out_dtype, True, implementation)
    out, last_state, states, ungated = _jitted_forward(operands, options, True, implementation)
    states = canonical.states_of(Residuals(operands, states, ungated), layout)
    return ScanForward(out, last_state, states, ungated)


def selective_scan_backward(
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
    states: jax.Array,
    ungated: jax.Array | None = None,
    out_cotangent: jax.Array,
    last_state_cotangent: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    layout: Layout = "bdl",
    out_dtype: Any = None,
    implementation: str | None = None,
) -> ScanGradients:
    """Runs the backward kernel alone, outside autodiff.

    Args:
        u: as in `selective_scan`, and so are all operands and options not described here.
        delta: as u.
        A: (dim, dstate).
        B: fixed or varying.
        C: fixed or varying.
        D: (dim,).
        z: as u.
        delta_bias: (dim,).
        delta_softplus: whether delta goes through softplus.
        states: ``states`` of `selective_scan_forward` with the same arguments.
        ungated: ``ungated`` of `selective_scan_forward` with the same arguments; with z only, and then required.
        out_cotangent: cotangent of the output, with its shape and dtype.
        last_state_cotangent: cotangent of the last state, with its shape and dtype; zeros if None.
        initial_state: (batch, dim, dstate).
        segment_ids: (batch, length).
        reverse: whether time runs from the last position to the first.
        layout: "bdl" or "bld".
        out_dtype: dtype of the output.
        implementation: whose kernel to run.

    Returns:
        The cotangents as `jax.vjp` defines them: of each operand's shape and dtype, complex ones not conjugated.

    Raises:
        ValueError: as `selective_scan_forward`, a cotangent, ``states`` or ``ungated`` has a wrong shape, or z is given
            without ``ungated`` or ``ungated`` without z.
        TypeError: as `selective_scan_forward`, or a cotangent, ``states`` or ``ungated`` has a wrong dtype.
    """
    given = Operands(u, delta, A, B, C, D, z, delta_bias, initial_state)

    def kernel_form(given: Operands) -> tuple[Operands, Options]:
        operands = given._replace(segment_ids=segment_ids)
        has_last_state = last_state_cotangent is not None
        return _kernel_form(operands, delta_softplus, reverse, layout, out_dtype, has_last_state, implementation)

    operands, options = kernel_form(given)
    # Differentiating the way to canonical form takes the cotangents back to the caller's shapes and dtypes.
    _, form_vjp = jax.vjp(lambda given: kernel_form(given)[0]._replace(segment_ids=None), given)
    forward = partial(backends.xla.forward, options=options, saved=Saved(states=True))
    out, last_state, saved_states, _ = jax.eval_shape(forward, operands)
    checks.check_like("out_cotangent", out_cotangent, out)
    checks.check_like("states", states, saved_states)
    if (ungated is None) != (z is None):
        raise ValueError("ungated must be given with z, and only with it: it is `ungated` of selective_scan_forward")
    if ungated is not None:
        checks.check_like("ungated", ungated, out)
    if last_state_cotangent is not None:
        checks.check_like("last_state_cotangent", last_state_cotangent, last_state)
    residuals = Residuals(operands, states if states.size else None, ungated)
    cotangents = _jitted_backward(residuals, out_cotangent, last_state_cotangent, options, implementation)
    (gradients,) = form_vjp(cotangents)
    return ScanGradients(*gradients[:-1])


def _kernel_form(
    operands: Operands,
    delta_softplus: bool,
    reverse: bool,
    layout: Layout,
    out_dtype: Any,
    last_state: bool,
    implementation: str | None,
) -> tuple[Operands, Options]:
    backends.check_implementation(implementation)
    operands, options = canonical.canonicalize(
        operands,
        delta_softplus=delta_softplus,
        reverse=reverse,
        layout=layout,
        out_dtype=out_dtype,
        last_state=last_state,
        chunk_length=partial(backends.chunk_length, implementation),
    )
    if operands.u.size == 0:
        raise ValueError(
            f"u must not be empty when a kernel is called directly, got shape {operands.u.shape}; "
            "selective_scan takes empty sequences"
        )
    return operands, options


def _empty(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """The scan of no elements: nothing comes out, and the state is as it was."""
    state = operands.initial_state
    if state is None:
        size = canonical.sizes(operands, options.layout)
        state = jnp.zeros((size.batch, size.dim, size.dstate), operands.A.dtype)
    return jnp.zeros(operands.u.shape, options.out_dtype), state


# jitted, so that an eager call compiles once per shape and not once per call.
@partial(jax.jit, static_argnames=("options", "implementation", "axis_name"))
def _run(
    operands: Operands, options: Options, implementation: str | None, axis_name: str | None
) -> tuple[jax.Array, jax.Array | None]:
    # Inside `jax.shard_map`, the transpose of this sums the gradient of what devices share.
    operands = partitioning.vary(operands, partitioning.varying_axes(operands))
    if axis_name is not None:
        return sequence.run(operands, options, implementation, axis_name)
    return _scan(operands, options, implementation)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _scan(operands: Operands, options: Options, implementation: str | None) -> tuple[jax.Array, jax.Array | None]:
    return backends.forward(operands, options, False, implementation)[:2]


@_scan.defjvp
def _scan_jvp(
    options: Options, implementation: str | None, primals: tuple[Operands], tangents: tuple[Operands]
) -> tuple[tuple[jax.Array, jax.Array | None], Any]:
    """Reverse mode runs the backward kernel, forward mode pure JAX."""
    (operands,), (tangent,) = primals, tangents
    out, last_state, states, ungated = backends.forward(operands, options, True, implementation)
    out, states, ungated = map(checkpoint_name, (out, states, ungated), RESIDUAL_NAMES)

    def push(residuals: Residuals, tangent: Operands) -> tuple[jax.Array, jax.Array | None]:
        ids = residuals.operands.segment_ids

        def forward(operands: Operands) -> tuple[jax.Array, jax.Array | None]:
            return backends.forward(operands._replace(segment_ids=ids), options, False, "xla")[:2]

        return jax.jvp(forward, (residuals.operands._replace(segment_ids=None),), (tangent,))[1]

    def pull(residuals: Residuals, cotangents: tuple[jax.Array, jax.Array | None]) -> Operands:
        return backends.backward(residuals, *cotangents, options, implementation)

    results = out, last_state
    tangent = tangent._replace(segment_ids=None)
    return results, linear.call(push, pull, Residuals(operands, states, ungated), tangent, results)


_jitted_forward = jax.jit(backends.forward, static_argnames=("options", "for_backward", "implementation"))
_jitted_backward = jax.jit(backends.backward, static_argnames=("options", "implementation"))
