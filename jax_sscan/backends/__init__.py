"""The implementations of the selective scan, and which one runs.

Every implementation is a pair of functions on the canonical form of `jax_sscan.canonical`:

* ``forward(operands, options, saved) -> (out, last_state, states, ungated)``: last_state, (batch, dim, dstate), is None
  unless the options want it, and so are states and ungated, those of `Residuals`, unless ``saved`` does, a `Saved`;
* ``backward(residuals, out_cotangent, last_state_cotangent, options) -> Operands`` of cotangents, None for absent
  operands and for segment_ids; last_state_cotangent is None where the forward pass gave no last state.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jax_sscan import canonical
from jax_sscan.backends import batching, native, partitioning, xla
from jax_sscan.canonical import Operands, Options, Residuals, Saved, Sizes

NAMES = ("cuda", "cpu", "xla")
_GPU_PLATFORMS = ("cuda", "rocm", "gpu")


class Implementation(NamedTuple):
    """What is known of one implementation on this machine.

    Attributes:
        available: whether it can run here.
        platforms: the JAX platforms it runs on.
        default_for: the platforms on which ``implementation=None`` takes it.
        reason: why it is not available, and what to install; None where it is.
    """

    available: bool
    platforms: tuple[str, ...]
    default_for: tuple[str, ...]
    reason: str | None


def implementations() -> dict[str, Implementation]:
    """Which implementations of the selective scan exist here.

    Returns:
        For each of "cuda", "cpu" and "xla", an `Implementation`: whether it is available, the platforms it serves, the
        platforms it is the default for, and for a missing one the reason.
    """
    found = {}
    native_platforms = []
    for name in reversed(native.PLATFORMS):
        reason = native.missing(name)
        if reason is None:
            native_platforms.append(name)
        default_for = () if reason else (name,)
        found[name] = Implementation(reason is None, (name,), default_for, reason)
    everywhere = ("cpu", "cuda", "rocm", "tpu")
    rest = tuple(platform for platform in everywhere if platform not in native_platforms)
    found["xla"] = Implementation(True, everywhere, rest, None)
    return found


def check_implementation(implementation: str | None) -> None:
    """Raises ``ValueError`` where ``implementation`` is unknown or cannot run here; warns of a fallback on a GPU."""
    if implementation is None:
        _warn_of_gpu_fallback(native.missing("cuda"))
        return
    if implementation not in NAMES:
        names = ", ".join(repr(name) for name in NAMES)
        raise ValueError(f"implementation must be None or one of {names}, got {implementation!r}")
    reason = implementations()[implementation].reason
    if reason is not None:
        raise ValueError(
            f"implementation={implementation!r} cannot run here: {reason}. "
            f"jax_sscan.implementations() lists what can; None takes the best of them"
        )


_warned = False


def _warn_of_gpu_fallback(reason: str | None) -> None:
    """A fallback on a GPU is never silent: the first one warns, once per process."""
    global _warned
    if reason is None or _warned or jax.default_backend() not in _GPU_PLATFORMS:
        return
    _warned = True
    warnings.warn(f"jax_sscan runs its pure-JAX implementation on this GPU: {reason}", stacklevel=4)


def chunk_length(implementation: str | None, size: Sizes) -> int:
    """Steps between two saved states: one length for whatever may run, since the states are a residual of all."""
    is_pure = implementation == "xla" or all(native.missing(platform) for platform in native.PLATFORMS)
    return (xla if is_pure else native).chunk_length(size)


def forward(
    operands: Operands, options: Options, for_backward: bool, implementation: str | None
) -> tuple[jax.Array, jax.Array | None, Any, Any]:
    """Runs the forward pass of ``implementation``, or of the best one for the platform it is lowered for.

    ``for_backward`` says whether what `Residuals` keep is wanted; where there is none of it, it is None.
    """
    # Nothing passes between chunks where there is one. XLA for GPUs crashes on an empty array that leaves a
    # `jax.shard_map`, so that there is none rather than one of no elements.
    has_states = canonical.sizes(operands, options.layout).length > options.chunk
    saved = Saved(for_backward and has_states, for_backward and operands.z is not None)
    axes = canonical.axes(operands, options.layout)
    result_axes = canonical.result_axes(axes, options, saved)
    keywords: dict[str, Any] = {"options": options, "saved": saved}
    kernels = _kernels(native.forward, xla.forward, operands, options, implementation, keywords)
    return _run(kernels, implementation, (operands,), (axes,), result_axes)


def backward(
    residuals: Residuals,
    out_cotangent: jax.Array,
    last_state_cotangent: jax.Array | None,
    options: Options,
    implementation: str | None,
) -> Operands:
    """Runs the backward pass that belongs to `forward`."""
    operands = residuals.operands._replace(segment_ids=None)
    arguments = residuals, out_cotangent, last_state_cotangent
    axes = canonical.axes(residuals.operands, options.layout)
    argument_axes = canonical.backward_axes(axes, residuals.states, last_state_cotangent)
    kernels = _kernels(native.backward, xla.backward, operands, options, implementation, {"options": options})
    gradients = _run(kernels, implementation, arguments, argument_axes, axes._replace(segment_ids=None))
    # The type of a cotangent is that of its operand.
    return partitioning.divided_like(gradients, operands)


def _kernels(
    native_kernel: Callable[..., Any],
    xla_kernel: Callable[..., Any],
    operands: Operands,
    options: Options,
    implementation: str | None,
    keywords: dict[str, Any],
) -> dict[str, Callable[..., Any]]:
    """The kernels, by implementation, that compute this scan here."""
    kernels = {"xla": partial(xla_kernel, **keywords)}
    for platform in native.PLATFORMS:
        if native.missing(platform) is not None:
            continue
        reason = native.unsupported(platform, operands, options)
        if reason is None:
            kernels[platform] = partial(native_kernel, platform=platform, **keywords)
        elif implementation is None:
            _warn_of_gpu_fallback(reason)
        elif implementation == platform:
            raise ValueError(f"implementation={platform!r} cannot run this: {reason}; use implementation='xla'")
    return kernels


def _run(
    kernels: dict[str, Callable[..., Any]],
    implementation: str | None,
    arguments: tuple[Any, ...],
    argument_axes: Any,
    result_axes: Any,
) -> Any:
    """Runs one of the kernels on all lanes and devices; for ``implementation=None`` lowering chooses.

    A kernel has no derivative of its own (the backward kernel is one, which `jax_sscan.scan` knows): that is "xla"'s.
    """

    def kernel(*arguments: Any, instances: int) -> Any:
        def call(name: str, *arguments: Any) -> Any:
            if name == "xla":
                return batching.by_instance(kernels[name], *arguments, instances=instances)
            # JAX cannot know that what a custom call gives varies over a `jax.shard_map`'s axes as what it takes.
            results = kernels[name](*arguments, instances=instances)
            return partitioning.vary(results, partitioning.varying_axes(arguments))

        if implementation is not None:
            return call(implementation, *arguments)
        branches = {name: partial(call, name) for name in kernels if name != "xla"}
        return jax.lax.platform_dependent(*arguments, default=partial(call, "xla"), **branches)

    @jax.custom_jvp
    def run(*arguments: Any) -> Any:
        return batching.call(kernel, arguments, argument_axes, result_axes)

    def pure(*arguments: Any) -> Any:
        return partitioning.over_explicit_axes(kernels["xla"], arguments, argument_axes, result_axes)

    run.defjvp(partial(jax.jvp, pure))
    return run(*arguments)


__all__ = [
    "NAMES",
    "Implementation",
    "backward",
    "check_implementation",
    "chunk_length",
    "forward",
    "implementations",
    "xla",
]
