"""The native implementations: the compiled extension, its registration with XLA, and its custom calls.

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

from jax_sscan.canonical import Operands, Options, Residuals, Sizes, is_varying, sizes

# A saved state every 32 steps costs as much as half of u at dstate 16, and a chunk's history fits the L1 cache.
_CHUNK = 32


def chunk_length(size: Sizes) -> int:
    """Steps between two saved states."""
    return max(1, min(size.length, _CHUNK))


@functools.cache
def _load() -> ModuleType | str:
    """The extension module with its handlers registered, or the reason why it cannot be had."""
    try:
        extension = importlib.import_module("jax_sscan._native")
    except ModuleNotFoundError:
        return (
            "jax_sscan was installed without its compiled extension; install a C++17 compiler and reinstall jax_sscan"
        )
    except ImportError as error:
        return f"the compiled extension does not load ({error}); reinstall jax_sscan"
    for platform, handlers in extension.handlers().items():
        for name, handler in handlers.items():
            jax.ffi.register_ffi_target(f"jax_sscan_{name}", handler, platform=platform)
    return extension


def missing(implementation: str) -> str | None:
    """Why the native ``implementation`` ("cpu" or "cuda") cannot run here, or None if it can."""
    extension = _load()
    if isinstance(extension, str):
        return extension
    info = extension.build_info()
    if not info[implementation]:
        return (
            f"this build of jax_sscan {info['version']} holds no native {implementation} kernel; "
            'use implementation="xla" or a build that has it'
        )
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


def forward(
    operands: Operands, options: Options, save_states: bool, instances: int
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Calls the native forward kernel; see `jax_sscan.backends` for the contract.

    Args:
        operands: canonical operands; with several instances the weights have instances * dim rows.
        options: the static flags.
        save_states: whether to save the states for a backward pass.
        instances: equal parts of the batch that have weights of their own.
    """
    size = sizes(operands, options.layout)
    dtype, chunks = operands.A.dtype, -(-size.length // options.chunk)
    state = jax.ShapeDtypeStruct((size.batch, size.dim, size.dstate), dtype)
    states = jax.ShapeDtypeStruct((size.batch, chunks - 1, size.dstate, size.dim), dtype)
    shapes = (
        jax.ShapeDtypeStruct(operands.u.shape, options.out_dtype),
        state if options.last_state else _ABSENT,
        states if save_states else _ABSENT,
    )
    call = jax.ffi.ffi_call("jax_sscan_forward", shapes)
    results = call(*_call_operands(*operands), **_attributes(operands, options, instances))
    out, last_state, saved = _present(results, shapes)
    assert out is not None
    return out, last_state, saved


def backward(
    residuals: Residuals,
    out_cotangent: jax.Array,
    last_state_cotangent: jax.Array | None,
    options: Options,
    instances: int,
) -> Operands:
    """Calls the native backward kernel; see `jax_sscan.backends` for the contract and `forward` for instances."""
    operands = residuals.operands
    attributes = _attributes(operands, options, instances)
    extension = _load()
    assert not isinstance(extension, str)  # check_implementation has seen to it
    workspace = extension.cpu_workspace_bytes(
        *sizes(operands, options.layout),
        chunk=options.chunk,
        instances=instances,
        channel_last=options.layout == "bld",
        has_states=not (operands.initial_state is None and last_state_cotangent is None),
        B_varies=is_varying(operands.B),
        C_varies=is_varying(operands.C),
        is_complex=jnp.iscomplexobj(operands.A),
        is_double=jnp.finfo(operands.A.dtype).dtype == jnp.float64,
    )
    shapes = [_ABSENT if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:-1]]
    call = jax.ffi.ffi_call("jax_sscan_backward", (*shapes, jax.ShapeDtypeStruct((workspace,), np.uint8)))
    arrays = _call_operands(*operands, residuals.states, out_cotangent, last_state_cotangent)
    *cotangents, _ = call(*arrays, **attributes)
    return Operands(*_present(cotangents, shapes))
