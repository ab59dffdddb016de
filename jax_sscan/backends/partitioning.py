"""How one kernel call is divided among devices: each runs the kernel on its part of the batch and of the channels.

XLA knows nothing of what a custom call computes and would gather its operands; JAX's types in explicit mode know as
little. Both are told here, from one description: a string of axis names for every argument and result of the call
(`jax_sscan.canonical.axes`). Batch, lanes of a `jax.vmap` and channels are divided, length and dstate never are.
A result that lacks a divided axis is a partial sum on each device, and one all-reduce completes all of a kind.

Groups follow the channels: they are divided with them as far as their number allows, and beyond that every device has
all groups of its part and reads those of its own channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

WHOLE = ("length", "dstate", "chunk")
"""Axes that a kernel needs whole."""

Function = Callable[..., Any]
MeshAxes = tuple[str, ...]


def varying_axes(arrays: Any) -> tuple[str, ...]:
    """The manual mesh axes that any of ``arrays`` varies over, as `jax.shard_map` tracks them with check_vma."""
    found: set[str] = set()
    for x in jax.tree.leaves(arrays):
        aval = jax.typeof(x)
        # Its name until JAX 0.9, and after.
        found |= aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying
    return tuple(sorted(found))


def vary(arrays: Any, axes: tuple[str, ...]) -> Any:
    """Marks ``arrays`` as varying over the manual mesh axes ``axes``."""

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, arrays)


@dataclass(frozen=True)
class Call:
    """One kernel call as partitioning sees it.

    Attributes:
        function: from flat arguments to flat results.
        argument_axes: for each argument the names of its axes, separated by spaces.
        result_axes: the same of each result.
    """

    function: Function
    argument_axes: tuple[str, ...]
    result_axes: tuple[str, ...]

    def all_axes(self) -> tuple[str, ...]:
        """The axes of the arguments, then of the results."""
        return self.argument_axes + self.result_axes


@dataclass(frozen=True)
class Plan:
    """Which mesh axes divide which named axis.

    Attributes:
        mesh_axes: per named axis the mesh axes that divide it, outermost first; absent ones are whole.
        shape: the sizes of all mesh axes.
        sizes: the sizes of the named axes before division.
    """

    mesh_axes: dict[str, MeshAxes]
    shape: dict[str, int]
    sizes: dict[str, int]

    def spec(self, axes: str) -> PartitionSpec:
        """How an array with these axes is divided."""
        return PartitionSpec(*(self.mesh_axes.get(name) or None for name in axes.split()))

    def shards(self, mesh_axes: MeshAxes) -> int:
        """Into how many parts ``mesh_axes`` divide."""
        return math.prod(self.shape[axis] for axis in mesh_axes)

    def partial_over(self, axes: str) -> MeshAxes:
        """The mesh axes over which a result with these axes is a partial sum."""
        own = {axis for name in axes.split() for axis in self.mesh_axes.get(name, ())}
        divided = {axis for mesh_axes in self.mesh_axes.values() for axis in mesh_axes}
        return tuple(axis for axis in self.shape if axis in divided - own)


def _plan(call: Call, shapes: Sequence[Any], specs: Sequence[Any], shape: dict[str, int]) -> Plan:
    """The division that the arguments (and, where known, the results) have already, as far as kernels allow it."""
    sizes = {
        name: size
        for axes, x in zip(call.all_axes(), shapes, strict=False)
        for name, size in zip(axes.split(), x.shape, strict=True)
    }
    plan = Plan({}, shape, sizes)
    used: set[str] = set()
    for axes, spec in zip(call.all_axes(), specs, strict=False):
        for name, entry in zip(axes.split(), spec, strict=False):
            if name in WHOLE or name == "group" or name in plan.mesh_axes:
                continue
            wanted = (entry,) if isinstance(entry, str) else tuple(entry or ())
            wanted = tuple(axis for axis in wanted if axis in shape and axis not in used)
            if divided := _dividing(plan, wanted, sizes[name]):
                plan.mesh_axes[name] = divided
                used.update(divided)
    if "group" in sizes:
        plan.mesh_axes["group"] = _dividing(plan, plan.mesh_axes.get("dim", ()), sizes["group"])
    return plan


def _dividing(plan: Plan, mesh_axes: MeshAxes, size: int) -> MeshAxes:
    """As many of ``mesh_axes``, from the outermost, as divide ``size`` into equal parts."""
    while mesh_axes and size % plan.shards(mesh_axes):
        mesh_axes = mesh_axes[:-1]
    return mesh_axes


def _on_each_device(call: Call, plan: Plan) -> Function:
    """The function of one device's part of the arguments that gives its part of the results.

    Results with a group axis are the cotangents of the arguments with one, in their order.
    """
    over = [plan.partial_over(axes) for axes in call.result_axes]
    grouped = [i for i, axes in enumerate(call.argument_axes) if "group" in axes.split()]
    grouped_results = [i for i, axes in enumerate(call.result_axes) if "group" in axes.split()]
    sums_groups = any(over[i] for i in grouped_results)

    def own_groups(matrix: jax.Array, axes: str) -> jax.Array:
        """Those of the groups here that this device's channels read."""
        channels = plan.mesh_axes.get("dim", ())
        beyond = channels[len(plan.mesh_axes["group"]) :]
        axis = axes.split().index("group")
        if not beyond or matrix.shape[axis] == 1:
            return matrix
        per_group = plan.sizes["dim"] // plan.sizes["group"]
        dim = plan.sizes["dim"] // plan.shards(channels)
        # Channels that are sure to lie in one group become a group of their own.
        unit = math.gcd(dim, per_group)
        first = jax.lax.axis_index(beyond) * dim
        indices = (first + unit * jax.lax.iota(jnp.int32, dim // unit)) // per_group
        return jnp.take(matrix, indices, axis=axis, mode="clip", indices_are_sorted=True)

    def local(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        arguments = vary(arguments, varying_axes(arguments))
        own, transposes = list(arguments), []
        for i in grouped:
            # A cotangent has its argument's dtype: wide until the sum over devices has been taken.
            is_narrow = sums_groups and jnp.finfo(arguments[i].dtype).bits < 32
            matrix = arguments[i].astype(jnp.float32) if is_narrow else arguments[i]
            own[i], transpose = jax.vjp(lambda x, i=i: own_groups(x, call.argument_axes[i]), matrix)
            transposes.append(transpose)
        results = list(call.function(*own))
        for j, transpose in zip(grouped_results, transposes, strict=False):
            (results[j],) = transpose(results[j])
        results = _all_reduce(results, over)
        for i, j in zip(grouped, grouped_results, strict=False):
            results[j] = results[j].astype(arguments[i].dtype)
        return tuple(results)

    return local


def _all_reduce(partial: Sequence[jax.Array], over: Sequence[MeshAxes]) -> list[jax.Array]:
    """Sums each array over its mesh axes: one all-reduce for all that share axes and dtype."""
    results = list(partial)
    for mesh_axes, dtype in dict.fromkeys(zip(over, (x.dtype for x in partial), strict=True)):
        if not mesh_axes:
            continue
        members = [i for i, x in enumerate(partial) if (over[i], x.dtype) == (mesh_axes, dtype)]
        total = jax.lax.psum(jnp.concatenate([partial[i].ravel() for i in members]), mesh_axes)
        for i in members:
            part, total = total[: partial[i].size], total[partial[i].size :]
            results[i] = part.reshape(partial[i].shape)
    return results


def divided_like(arrays: Any, others: Any) -> Any:
    """``arrays`` with the divisions over explicit mesh axes that ``others`` have in their types."""

    def reshard(x: jax.Array, other: jax.Array) -> jax.Array:
        sharding = jax.typeof(other).sharding
        return jax.sharding.reshard(x, sharding) if sharding.mesh.explicit_axes else x

    return jax.tree.map(reshard, arrays, others)


def divided(call: Call, *arguments: jax.Array) -> tuple[jax.Array, ...]:
    """Runs ``call`` on as many devices as its arguments are divided among, however JAX keeps track of that."""
    if _explicit_mesh(arguments) is not None:
        return _over_explicit_axes(call, *arguments)
    if jax.sharding.get_abstract_mesh().manual_axes:
        # Inside `jax.shard_map` the arrays are one device's already.
        return tuple(call.function(*arguments))
    return _over_auto_axes(call, *arguments)


def _over_auto_axes(call: Call, *arguments: jax.Array) -> tuple[jax.Array, ...]:
    """Runs ``call`` so that XLA's partitioner divides it as its operands and results are divided."""

    def partition(mesh: Mesh, argument_shapes: Any, result_shapes: Any) -> Any:
        shapes = [*argument_shapes, *result_shapes]
        if mesh.empty:
            # No names to divide by: every device does everything.
            devices = sorted(shapes[0].sharding.device_set, key=lambda device: device.id)
            mesh = Mesh(np.array(devices), ("devices",))
            plan = Plan({}, {}, {})
        else:
            plan = _plan(call, shapes, [_spec(x, mesh) for x in shapes], dict(mesh.shape))
        shardings = [NamedSharding(mesh, plan.spec(axes)) for axes in call.all_axes()]
        split = len(argument_shapes)
        return mesh, _on_each_device(call, plan), tuple(shardings[split:]), tuple(shardings[:split])

    @custom_partitioning
    def run(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(call.function(*arguments))

    shapes = [x.shape for x in arguments]

    def sharding_rule(mesh: Mesh, *_: Any) -> tuple[str, dict[str, Any]]:
        return _sharding_rule(call, shapes, mesh)

    # JAX cannot decode what Shardy makes of a mesh axis that divides groups and, within them, channels.
    run.def_partition(partition, sharding_rule=sharding_rule, decode_shardings=False)
    return run(*arguments)


def _spec(x: jax.ShapeDtypeStruct, mesh: Mesh) -> list[MeshAxes]:
    """For each axis of ``x`` the axes of ``mesh`` that divide it; none where its division is not along whole ones."""
    # Of an array that all tilings of the mesh divide: XLA pads others, and JAX would not say where.
    indices = x.sharding.devices_indices_map((mesh.size,) * len(x.shape))
    starts = np.array([[s.start or 0 for s in indices[device]] for device in mesh.devices.flat])
    starts = starts.reshape(*mesh.devices.shape, len(x.shape))
    spec = []
    for axis in range(len(x.shape)):
        # How far one step along each mesh axis moves the part of a device.
        strides = {}
        for i, name in enumerate(mesh.axis_names):
            along = np.moveaxis(starts[..., axis], i, 0).reshape(mesh.devices.shape[i], -1)[:, 0]
            if len(along) > 1 and along[1] > along[0]:
                strides[name] = int(along[1] - along[0])
        mesh_axes = tuple(sorted(strides, key=lambda name: -strides[name]))
        parts = math.prod(mesh.shape[name] for name in mesh_axes)
        whole = len(np.unique(starts[..., axis])) == parts
        spec.append(mesh_axes if whole else ())
    return spec


def _sharding_rule(call: Call, shapes: Sequence[tuple[int, ...]], mesh: Mesh) -> tuple[str, dict[str, Any]]:
    """The same description in the language of Shardy, and the sizes of its factors."""
    sizes = {
        name: size
        for axes, shape in zip(call.argument_axes, shapes, strict=True)
        for name, size in zip(axes.split(), shape, strict=True)
    }
    factors: dict[str, Any] = {"need_replication_factors": tuple(name for name in WHOLE if name in sizes)}
    groups = sizes.get("group", 1)
    # With more shards than groups they are whole, and not tied to the channels.
    dim = "dim"
    if any(size > 1 and groups % size == 0 for size in mesh.shape.values()):
        dim = "(group channel)" if groups < sizes["dim"] else "group"
    if dim == "(group channel)":
        factors["channel"] = sizes["dim"] // groups

    def side(all_axes: tuple[str, ...]) -> str:
        return ", ".join(all_axes).replace("dim", dim)

    return f"{side(call.argument_axes)} -> {side(call.result_axes)}", factors


def over_explicit_axes(function: Function, arguments: Any, argument_axes: Any, result_axes: Any) -> Any:
    """Runs ``function`` divided over the mesh axes that its arguments' types name (explicit mode), if there are any.

    Args:
        function: from ``arguments`` to results.
        arguments: tuple of pytrees of arrays.
        argument_axes: the same tree with the names of the axes.
        result_axes: the tree of the results with the names of the axes.
    """
    leaves, tree = jax.tree.flatten(arguments)
    if _explicit_mesh(leaves) is None:
        return function(*arguments)
    result_leaves, result_tree = jax.tree.flatten(result_axes)

    def flat(*leaves: jax.Array) -> list[jax.Array]:
        return result_tree.flatten_up_to(function(*tree.unflatten(leaves)))

    call = Call(flat, tuple(jax.tree.leaves(argument_axes)), tuple(result_leaves))
    return result_tree.unflatten(_over_explicit_axes(call, *leaves))


def _explicit_mesh(arrays: Sequence[jax.Array]) -> AbstractMesh | None:
    return next((mesh for x in arrays if (mesh := jax.typeof(x).sharding.mesh).explicit_axes), None)


def _over_explicit_axes(call: Call, *arguments: jax.Array) -> tuple[jax.Array, ...]:
    mesh = _explicit_mesh(arguments)
    assert mesh is not None
    shape = {axis: size for axis, size in mesh.shape.items() if axis in mesh.explicit_axes}
    plan = _plan(call, arguments, [jax.typeof(x).sharding.spec for x in arguments], shape)
    in_specs = tuple(plan.spec(axes) for axes in call.argument_axes)
    arguments = tuple(
        jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, in_specs, strict=True)
    )
    # Only axes in use: `jax.vmap` hides from what it maps those that divide the mapped axis.
    used = {axis for mesh_axes in plan.mesh_axes.values() for axis in mesh_axes}
    if not used:
        return tuple(call.function(*arguments))
    return jax.shard_map(
        _on_each_device(call, plan),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=tuple(plan.spec(axes) for axes in call.result_axes),
        axis_names=used,
    )(*arguments)
