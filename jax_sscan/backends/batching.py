"""What `jax.vmap` means for a kernel, which knows one batch: mapped axes, here called lanes, join it.

Lanes stay axes of their own in front of all others until the kernel is called on one device, so that a lane axis that
is divided among devices stays so. Only a mapped weight makes weights come once per *instance*, an equal part of the
batch; otherwise all lanes read the same ones.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_sscan.backends import partitioning


class Lanes(NamedTuple):
    """Sizes of the mapped axes, and whether weights have them too."""

    sizes: tuple[int, ...] = ()
    on_weights: bool = False


NO_LANES = Lanes()


def call(
    kernel: Callable[..., Any], arguments: Any, argument_axes: Any, result_axes: Any, lanes: Lanes = NO_LANES
) -> Any:
    """Calls a kernel with a rule for `jax.vmap` around it and one for many devices.

    Args:
        kernel: from arguments with one batch, and the number of ``instances`` in it, to results.
        arguments: pytree of arrays, with axes for the lanes in front.
        argument_axes: the same tree with the names of the axes, without lanes, as `canonical.axes` has them. What has
            no batch axis is a weight: with several instances the kernel gets it with that many times the rows.
        result_axes: the axes of the results, as the kernel returns them.
        lanes: the mapped axes.
    """
    leaves, tree = jax.tree.flatten(arguments)
    axes = jax.tree.leaves(argument_axes)
    is_weight = [not _has_batch(names) for names in axes]
    result_leaves, result_tree = jax.tree.flatten(result_axes)

    def flat(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        # Of the lanes, too, a device may have a part.
        sizes = leaves[is_weight.index(False)].shape[: len(lanes.sizes)]
        instances = math.prod(sizes) if lanes.on_weights else 1
        folded = [
            x if weight and not lanes.on_weights else _fold(x, len(sizes))
            for x, weight in zip(leaves, is_weight, strict=True)
        ]
        results = result_tree.flatten_up_to(kernel(*tree.unflatten(folded), instances=instances))
        return tuple(_unfold(x, sizes) for x in results)

    def with_lanes(names: str, mapped: bool) -> str:
        return " ".join([*(f"lane{i}" for i in range(len(lanes.sizes)) if mapped), names])

    partitioned = partitioning.Call(
        flat,
        tuple(with_lanes(names, lanes.on_weights or not weight) for names, weight in zip(axes, is_weight, strict=True)),
        tuple(with_lanes(names, True) for names in result_leaves),
    )

    @jax.custom_batching.custom_vmap
    def run(*leaves: jax.Array) -> Any:
        return partitioning.divided(partitioned, *leaves)

    @run.def_vmap
    def _(axis_size: int, batched: list[bool], *leaves: jax.Array) -> Any:
        # A cotangent of weights is wanted lane by lane: then each lane is an instance.
        on_weights = (
            lanes.on_weights
            or any(weight and mapped for weight, mapped in zip(is_weight, batched, strict=True))
            or not all(_has_batch(names) for names in result_leaves)
        )
        more = Lanes((axis_size, *lanes.sizes), on_weights)
        mapped = [
            _with_lanes(x, had_axis, weight and not lanes.on_weights, lanes, axis_size)
            if on_weights or not weight
            else x
            for x, had_axis, weight in zip(leaves, batched, is_weight, strict=True)
        ]
        results = call(kernel, tree.unflatten(mapped), argument_axes, result_axes, more)
        results = tuple(result_tree.flatten_up_to(results))
        return results, (True,) * len(results)

    return result_tree.unflatten(run(*leaves))


def by_instance(function: Callable[..., Any], *arguments: Any, instances: int) -> Any:
    """Calls a ``function`` that knows one set of weights as a kernel that knows several."""
    if instances == 1:
        return function(*arguments)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(instances, x.shape[0] // instances, *x.shape[1:])

    results = jax.vmap(function)(*jax.tree.map(split, arguments))
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), results)


def _has_batch(names: str) -> bool:
    return "batch" in names.split()


def _with_lanes(x: jax.Array, mapped: bool, without_lanes: bool, lanes: Lanes, axis_size: int) -> jax.Array:
    """Gives an argument the axes that it lacks of a new lane axis and of those that were there."""
    if not mapped:
        x = x[None]
    if without_lanes:
        x = jnp.expand_dims(x, tuple(range(1, 1 + len(lanes.sizes))))
    own = x.shape[1 + len(lanes.sizes) :]
    return jnp.broadcast_to(x, (axis_size, *lanes.sizes, *own))


def _fold(x: jax.Array, lanes: int) -> jax.Array:
    """Makes the lanes the outermost part of the batch, or of the rows of weights."""
    return x.reshape(math.prod(x.shape[: lanes + 1]), *x.shape[lanes + 1 :])


def _unfold(x: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Undoes `_fold`."""
    return x.reshape(*sizes, x.shape[0] // math.prod(sizes), *x.shape[1:])
