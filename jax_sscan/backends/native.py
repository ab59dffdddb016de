"""The native implementations: the compiled extension, its registration with XLA, and its custom calls.

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


def forward(operands: Operands, options: Options, instances: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the native forward kernel; see `jax_sscan.backends` for the contract.

    Args:
        operands: canonical operands; with several instances the weights have instances * dim rows.
        options: the static flags.
        instances: equal parts of the batch that have weights of their own.

    Returns:
        The output, the last state and the chunk states.
    """
    leaves, tree = jax.tree.flatten(operands)

    @jax.custom_batching.custom_vmap
    def call(*leaves: jax.Array) -> Any:
        return _forward_call(tree.unflatten(leaves), options, instances)

    @call.def_vmap
    def _(axis_size: int, batched: list[bool], *leaves: jax.Array) -> Any:
        folded = _fold(tree.unflatten(leaves), tree.unflatten(batched), axis_size)
        results = forward(folded, options, axis_size * instances)
        return _unfold(results, axis_size), (True, True, True)

    return call(*leaves)


def backward(
    residuals: Residuals,
    out_cotangent: jax.Array,
    last_state_cotangent: jax.Array,
    options: Options,
    instances: int = 1,
) -> Operands:
    """Runs the native backward kernel; see `jax_sscan.backends` for the contract and `forward` for instances."""
    sequences = (residuals.states, out_cotangent, last_state_cotangent)
    leaves, tree = jax.tree.flatten(residuals.operands)
    present = [field is not None for field in residuals.operands[:-1]]

    @jax.custom_batching.custom_vmap
    def call(*leaves: jax.Array) -> Any:
        cotangents = _backward_call(tree.unflatten(leaves[3:]), leaves[:3], options, instances)
        return [x for x in cotangents if x is not None]

    @call.def_vmap
    def _(axis_size: int, batched: list[bool], *leaves: jax.Array) -> Any:
        folded = _fold(tree.unflatten(leaves[3:]), tree.unflatten(batched[3:]), axis_size)
        states, d_out, d_last = (_fold_axis(x, batched[i], axis_size) for i, x in enumerate(leaves[:3]))
        gradients = backward(Residuals(folded, states), d_out, d_last, options, axis_size * instances)
        results = _unfold([x for x in gradients if x is not None], axis_size)
        return results, [True] * len(results)

    found = iter(call(*sequences, *leaves))
    return Operands(*(next(found) if there else None for there in present))


def _fold(operands: Operands, batched: Operands, axis_size: int) -> Operands:
    """Makes the mapped axis the outermost part of the batch, and of the rows of weights, which are by instance."""
    pairs = zip(operands, batched, strict=True)
    return Operands(*(None if x is None else _fold_axis(x, mapped, axis_size) for x, mapped in pairs))


def _fold_axis(array: jax.Array, mapped: bool, axis_size: int) -> jax.Array:
    if not mapped:
        array = jnp.broadcast_to(array, (axis_size, *array.shape))
    return array.reshape(axis_size * array.shape[1], *array.shape[2:])


def _unfold(results: Any, axis_size: int) -> Any:
    return type(results)(x.reshape(axis_size, -1, *x.shape[1:]) for x in results)


def _call_operands(operands: Operands) -> list[Any]:
    absent = np.zeros(0, np.float32)
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


def _forward_call(operands: Operands, options: Options, instances: int) -> tuple[jax.Array, ...]:
    size = sizes(operands, options.layout)
    state = operands.A.dtype
    chunks = -(-size.length // options.chunk)
    call = jax.ffi.ffi_call(
        "jax_sscan_forward",
        (
            jax.ShapeDtypeStruct(operands.u.shape, options.out_dtype),
            jax.ShapeDtypeStruct((size.batch, size.dim, size.dstate), state),
            jax.ShapeDtypeStruct((size.batch, chunks, size.dstate, size.dim), state),
        ),
    )
    return tuple(call(*_call_operands(operands), **_attributes(operands, options, instances)))


def _backward_call(operands: Operands, sequences: tuple[jax.Array, ...], options: Options, instances: int) -> Operands:
    size = sizes(operands, options.layout)
    extension = _load()
    assert not isinstance(extension, str)  # check_implementation has seen to it
    workspace = extension.cpu_workspace_bytes(
        *size,
        B_varies=is_varying(operands.B),
        C_varies=is_varying(operands.C),
        is_complex=jnp.iscomplexobj(operands.A),
        is_double=jnp.finfo(operands.A.dtype).dtype == jnp.float64,
    )
    results = [
        jax.ShapeDtypeStruct((0,), np.float32) if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)
        for x in operands[:-1]
    ]
    call = jax.ffi.ffi_call("jax_sscan_backward", (*results, jax.ShapeDtypeStruct((workspace,), np.uint8)))
    *cotangents, _ = call(*_call_operands(operands), *sequences, **_attributes(operands, options, instances))
    absent = [x is None for x in operands[:-1]]
    return Operands(*(None if gone else x for gone, x in zip(absent, cotangents, strict=True)))
