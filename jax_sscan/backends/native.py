"""The native implementations: the compiled extensions, their registration with XLA, and their custom calls.

A custom call takes the operands of the canonical form in their order, absent ones as an empty float32 vector, and the
static flags as attributes. It knows nothing of `jax.vmap`, so each call carries its own batching rule: the mapped axis
joins the batch and the kernel runs once. Weights then come once per *instance*, an equal part of the batch.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sscan.canonical import Operands, Options, Residuals, Sizes, is_varying, sizes

# Steps between two saved states, as many as the registers of the CUDA kernels hold the history of (kTile in
# csrc/cuda/plan.h). A float32 state every 16 steps takes 4 bytes per element of u at dstate 16.
_CHUNK = 16

PLATFORMS = ("cpu", "cuda")

# What the shared memory of a CUDA block holds; kMostStates in csrc/cuda/plan.h.
_MOST_STATES = 1024

_INSTALL = {"cpu": "install a C++17 compiler", "cuda": "install the CUDA toolkit (nvcc 12 or newer)"}


def chunk_length(size: Sizes) -> int:
    """Steps between two saved states."""
    return max(1, min(size.length, _CHUNK))


@functools.cache
def _load(platform: str) -> ModuleType | str:
    """The extension module of a platform with its handlers registered, or the reason why it cannot be had."""
    name = f"jax_sscan._{platform}"
    try:
        extension = importlib.import_module(name)
    except ModuleNotFoundError:
        return f"jax_sscan was installed without {name}; {_INSTALL[platform]} and reinstall jax_sscan"
    except ImportError as error:
        return f"{name} does not load ({error}); reinstall jax_sscan"
    for call, handler in extension.handlers().items():
        jax.ffi.register_ffi_target(f"jax_sscan_{call}", handler, platform={"cuda": "CUDA"}.get(platform, platform))
    return extension


def missing(platform: str) -> str | None:
    """Why the native implementation for ``platform`` ("cpu" or "cuda") cannot run here, or None if it can."""
    extension = _load(platform)
    return extension if isinstance(extension, str) else None


def unsupported(platform: str, operands: Operands, options: Options) -> str | None:
    """Why the native implementation for ``platform`` does not compute this scan, or None if it does."""
    if platform != "cuda":
        return None
    if operands.A.shape[1] > _MOST_STATES:
        return f"the CUDA kernels take up to {_MOST_STATES} states, and this scan has {operands.A.shape[1]}"
    if np.float64 in (jnp.finfo(operands.A.dtype).dtype, options.out_dtype):
        return "the CUDA kernels compute in float32 and complex64, and this scan has float64 or complex128 in it"
    return None


def forward(
    operands: Operands, options: Options, save_states: bool, platform: str, instances: int = 1
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Runs the native forward kernel; see `jax_sscan.backends` for the contract.

    Args:
        operands: canonical operands; with several instances the weights have instances * dim rows.
        options: the static flags.
        save_states: whether to save the states for a backward pass.
        platform: whose kernel: "cpu" or "cuda".
        instances: equal parts of the batch that have weights of their own.
    """
    leaves, tree = jax.tree.flatten(operands)

    @jax.custom_batching.custom_vmap
    def call(*leaves: jax.Array) -> Any:
        return _forward_call(tree.unflatten(leaves), options, save_states, platform, instances)

    @call.def_vmap
    def _(axis_size: int, batched: list[bool], *leaves: jax.Array) -> Any:
        folded = _fold(tree.unflatten(leaves), tree.unflatten(batched), axis_size)
        return _unfold(forward(folded, options, save_states, platform, axis_size * instances), axis_size)

    return call(*leaves)


def backward(
    residuals: Residuals,
    out_cotangent: jax.Array,
    last_state_cotangent: jax.Array | None,
    options: Options,
    platform: str,
    instances: int = 1,
) -> Operands:
    """Runs the native backward kernel; see `jax_sscan.backends` for the contract and `forward` for the rest."""
    leaves, tree = jax.tree.flatten((residuals, out_cotangent, last_state_cotangent))

    @jax.custom_batching.custom_vmap
    def call(*leaves: jax.Array) -> Any:
        residuals, out_cotangent, last_state_cotangent = tree.unflatten(leaves)
        return _backward_call(residuals, out_cotangent, last_state_cotangent, options, platform, instances)

    @call.def_vmap
    def _(axis_size: int, batched: list[bool], *leaves: jax.Array) -> Any:
        residuals, *cotangents = _fold(tree.unflatten(leaves), tree.unflatten(batched), axis_size)
        results = backward(residuals, cotangents[0], cotangents[1], options, platform, axis_size * instances)
        return _unfold(results, axis_size)

    return call(*leaves)


def _fold(arrays: Any, batched: Any, axis_size: int) -> Any:
    """Makes the mapped axis the outermost part of the batch, and of the rows of weights, which are by instance."""

    def fold(array: jax.Array, mapped: bool) -> jax.Array:
        if not mapped:
            array = jnp.broadcast_to(array, (axis_size, *array.shape))
        return array.reshape(axis_size * array.shape[1], *array.shape[2:])

    return jax.tree.map(fold, arrays, batched)


def _unfold(results: Any, axis_size: int) -> tuple[Any, Any]:
    """Undoes `_fold` on results, and says as a batching rule must that all are mapped."""
    unfolded = jax.tree.map(lambda x: x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:]), results)
    return unfolded, jax.tree.map(lambda _: True, results)


# An operand or result that is not there travels as an empty vector.
_ABSENT = jax.ShapeDtypeStruct((0,), np.float32)


def _call_operands(*operands: Any) -> list[Any]:
    return [np.zeros(_ABSENT.shape, _ABSENT.dtype) if x is None else x for x in operands]


def _attributes(operands: Operands, options: Options, instances: int) -> dict[str, Any]:
    return {
        "delta_softplus": options.delta_softplus,
        "reverse": options.reverse,
        "channel_last": options.layout == "bld",
        "chunk": np.int64(options.chunk),
        "groups": np.int64(sizes(operands, options.layout).groups),
        "instances": np.int64(instances),
    }


def _present(results: Any, shapes: Any) -> list[jax.Array | None]:
    return [None if shape is _ABSENT else result for result, shape in zip(results, shapes, strict=True)]


def _workspaces(
    operands: Operands, options: Options, has_states: bool, platform: str, instances: int
) -> list[jax.ShapeDtypeStruct]:
    """The workspace results of the forward and the backward call."""
    extension = _load(platform)
    assert not isinstance(extension, str)  # check_implementation has seen to it
    workspaces = extension.workspace_bytes(
        *sizes(operands, options.layout),
        chunk=options.chunk,
        instances=instances,
        channel_last=options.layout == "bld",
        B_varies=is_varying(operands.B),
        C_varies=is_varying(operands.C),
        has_segments=operands.segment_ids is not None,
        is_complex=jnp.iscomplexobj(operands.A),
        is_double=jnp.finfo(operands.A.dtype).dtype == jnp.float64,
        has_states=has_states,
    )
    return [jax.ShapeDtypeStruct((size,), np.uint8) for size in workspaces]


def _forward_call(
    operands: Operands, options: Options, save_states: bool, platform: str, instances: int
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    size = sizes(operands, options.layout)
    dtype, chunks = operands.A.dtype, -(-size.length // options.chunk)
    state = jax.ShapeDtypeStruct((size.batch, size.dim, size.dstate), dtype)
    states = jax.ShapeDtypeStruct((size.batch, chunks - 1, size.dstate, size.dim), dtype)
    shapes = (
        jax.ShapeDtypeStruct(operands.u.shape, options.out_dtype),
        state if options.last_state else _ABSENT,
        states if save_states else _ABSENT,
    )
    workspace, _ = _workspaces(operands, options, False, platform, instances)
    call = jax.ffi.ffi_call("jax_sscan_forward", (*shapes, workspace))
    *results, _ = call(*_call_operands(*operands), **_attributes(operands, options, instances))
    out, last_state, saved = _present(results, shapes)
    assert out is not None
    return out, last_state, saved


def _backward_call(
    residuals: Residuals,
    out_cotangent: jax.Array,
    last_state_cotangent: jax.Array | None,
    options: Options,
    platform: str,
    instances: int,
) -> Operands:
    operands = residuals.operands
    has_states = not (operands.initial_state is None and last_state_cotangent is None)
    _, workspace = _workspaces(operands, options, has_states, platform, instances)
    shapes = [_ABSENT if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:-1]]
    call = jax.ffi.ffi_call("jax_sscan_backward", (*shapes, workspace))
    arrays = _call_operands(*operands, residuals.states, out_cotangent, last_state_cotangent)
    *cotangents, _ = call(*arrays, **_attributes(operands, options, instances))
    return Operands(*_present(cotangents, shapes))
