"""The native implementations: the compiled extensions, their registration with XLA, and their custom calls.

A custom call takes the operands of the canonical form in their order, absent ones as an empty float32 vector, and the
static flags as attributes. It knows neither `jax.vmap` nor devices: `jax_sscan.backends.batching` and
`jax_sscan.backends.partitioning` do. With several instances (equal parts of the batch) weights come once per instance.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sscan.canonical import Operands, Options, Residuals, Saved, Sizes, is_varying, sizes, states_of

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


# An operand or result that is not there travels as an empty vector.
_ABSENT = jax.ShapeDtypeStruct((0,), np.float32)


def _call_operands(*operands: Any) -> list[Any]:
    # Made from an operand, so that inside `jax.shard_map` it varies over the mesh as they do.
    absent = jnp.zeros_like(operands[0], shape=_ABSENT.shape, dtype=_ABSENT.dtype)
    return [absent if x is None else x for x in operands]


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


def forward(
    operands: Operands, options: Options, saved: Saved, platform: str, instances: int
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """Calls the native forward kernel; see `jax_sscan.backends` for the contract.

    Args:
        operands: canonical operands; with several instances the weights have instances * dim rows.
        options: the static flags.
        saved: what to save for a backward pass.
        platform: whose kernel: "cpu" or "cuda".
        instances: equal parts of the batch that have weights of their own.
    """
    size = sizes(operands, options.layout)
    dtype, chunks = operands.A.dtype, -(-size.length // options.chunk)
    state = jax.ShapeDtypeStruct((size.batch, size.dim, size.dstate), dtype)
    states = jax.ShapeDtypeStruct((size.batch, chunks - 1, size.dstate, size.dim), dtype)
    sequence = jax.ShapeDtypeStruct(operands.u.shape, options.out_dtype)
    shapes = (
        sequence,
        state if options.last_state else _ABSENT,
        states if saved.states else _ABSENT,
        sequence if saved.ungated else _ABSENT,
    )
    workspace, _ = _workspaces(operands, options, False, platform, instances)
    call = jax.ffi.ffi_call("jax_sscan_forward", (*shapes, workspace))
    *results, _ = call(*_call_operands(*operands), **_attributes(operands, options, instances))
    out, last_state, saved_states, ungated = _present(results, shapes)
    assert out is not None
    return out, last_state, saved_states, ungated


def backward(
    residuals: Residuals,
    out_cotangent: jax.Array,
    last_state_cotangent: jax.Array | None,
    options: Options,
    platform: str,
    instances: int,
) -> Operands:
    """Calls the native backward kernel; see `jax_sscan.backends` for the contract and `forward` for instances."""
    operands = residuals.operands
    has_states = not (operands.initial_state is None and last_state_cotangent is None)
    _, workspace = _workspaces(operands, options, has_states, platform, instances)
    shapes = [_ABSENT if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:-1]]
    call = jax.ffi.ffi_call("jax_sscan_backward", (*shapes, workspace))
    states = states_of(residuals, options.layout)
    arrays = _call_operands(*operands, states, residuals.ungated, out_cotangent, last_state_cotangent)
    *cotangents, _ = call(*arrays, **_attributes(operands, options, instances))
    return Operands(*_present(cotangents, shapes))
