"""A linear map with a transpose of its own, which JAX has for functions only without `jax.vmap`.

With it a `jax.custom_jvp` rule gives both modes: forward mode evaluates the map, reverse mode calls its transpose. A
`jax.custom_vjp` would close off forward mode, and `jax.custom_derivatives.linear_call` has no batching rule.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_linear_p = Primitive("linear_map")
_linear_p.multiple_results = True


def call(
    function: Callable[[Any, Any], Any], transpose: Callable[[Any, Any], Any], saved: Any, operands: Any, results: Any
) -> Any:
    """Returns ``function(saved, operands)``, which is linear in ``operands``.

    Args:
        function: what forward mode runs.
        transpose: from ``saved`` and the cotangents of the results to those of ``operands``.
        saved: pytree of arrays, what both need.
        operands: pytree of arrays.
        results: pytree of arrays like the results.
    """
    saved_leaves, saved_tree = jax.tree.flatten(saved)
    leaves, tree = jax.tree.flatten(operands)
    result_leaves, result_tree = jax.tree.flatten(results)
    split = len(saved_leaves)

    def flat(*args: jax.Array) -> list[jax.Array]:
        result = function(saved_tree.unflatten(args[:split]), tree.unflatten(args[split:]))
        return result_tree.flatten_up_to(result)

    def flat_transpose(*args: jax.Array) -> list[jax.Array]:
        cotangents = transpose(saved_tree.unflatten(args[:split]), result_tree.unflatten(args[split:]))
        return tree.flatten_up_to(cotangents)

    out = _linear_p.bind(
        *saved_leaves,
        *leaves,
        function=flat,
        transpose=flat_transpose,
        avals=tuple(jax.typeof(x) for x in result_leaves),
        split=split,
    )
    return result_tree.unflatten(out)


def _evaluate(*args: jax.Array, function: Callable[..., Any], **_: Any) -> list[jax.Array]:
    return function(*args)


def _abstract(*_: Any, avals: Sequence[Any], **__: Any) -> Sequence[Any]:
    return avals


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, function: Callable[..., Any], **_: Any) -> Any:
    # A second derivative: of the function as JAX sees it.
    return jax.jvp(function, tuple(primals), tuple(ad.instantiate_zeros(t) for t in tangents))


def _transpose(
    cotangents: Sequence[Any], *args: Any, transpose: Callable[..., Any], avals: Sequence[Any], split: int, **_: Any
) -> list[Any]:
    if all(type(ct) is ad.Zero for ct in cotangents):
        return [None] * len(args)
    # Where a value stands in place of an operand it is a constant, 0 as a rule.
    wanted = [ad.is_undefined_primal(x) for x in args[split:]]
    found = transpose(*args[:split], *(ad.instantiate_zeros(ct) for ct in cotangents))
    return [None] * split + [x if is_wanted else None for x, is_wanted in zip(found, wanted, strict=True)]


def _batch(
    args: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    function: Callable[..., Any],
    transpose: Callable[..., Any],
    split: int,
    **_: Any,
) -> tuple[list[jax.Array], list[int]]:
    args = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(args, axes, strict=True)]
    in_axes = [None if axis is None else 0 for axis in axes]
    mapped = jax.vmap(function, in_axes)

    def mapped_transpose(*args: jax.Array) -> list[jax.Array]:
        cotangent_axes = [0] * (len(args) - split)
        found = jax.vmap(transpose, in_axes[:split] + cotangent_axes)(*args)
        # What all lanes share gets the sum of their cotangents.
        return [x if axis == 0 else jnp.sum(x, 0) for x, axis in zip(found, in_axes[split:], strict=True)]

    avals = tuple(jax.make_jaxpr(mapped)(*args).out_avals)
    out = _linear_p.bind(*args, function=mapped, transpose=mapped_transpose, avals=avals, split=split)
    return out, [0] * len(out)


_linear_p.def_impl(_evaluate)
_linear_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_evaluate, multiple_results=True))
