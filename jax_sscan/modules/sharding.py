"""How layers and models are divided among the devices of a mesh.

With a `Shard` a layer runs inside `jax.shard_map`, where every sum over devices is written out here: a device holds its
rows of the batch, its part of the length and its channels, and what it sends is what the mathematics asks for. Called
inside a `jax.shard_map` of the caller's, it takes its part of the arrays from there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jax_sscan.backends import partitioning

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Which axes of the mesh in context (`jax.set_mesh`) divide the work and the parameters of a layer or a model.

    What names no mesh axis is whole on every device, and the sizes of what is divided must be multiples of the number
    of devices. Mesh axes may be of the types Auto and Explicit.

    Attributes:
        batch: the rows of a batch: data parallelism.
        length: the positions of a sequence, in order: sequence parallelism. A single position, as in decoding, is not
            divided. Not for layers that are bidirectional, nor together with a mask.
        channels: d_inner, of activations and of the parameters that have it: channel (tensor) parallelism.
        vocabulary: the rows of the embedding and of the head; of `jax_sscan.models.MambaLM` only, and as a rule the
            axis of ``channels``.

    Raises:
        TypeError: something else than the name of a mesh axis, a tuple of names or, of ``length``, a name is given.
        ValueError: a mesh axis is named for two of batch, length and channels, or for batch or length and vocabulary.
    """

    batch: MeshAxes = None
    length: str | None = None
    channels: MeshAxes = None
    vocabulary: MeshAxes = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            names = value if isinstance(value, tuple) and field.name != "length" else (value,)
            if value is not None and not all(isinstance(name, str) for name in names):
                expected = "a mesh axis" if field.name == "length" else "a mesh axis or a tuple of them"
                raise TypeError(f"{field.name} must be the name of {expected}, or None, got {value!r}")
        for last in (self.channels, self.vocabulary):
            names = [*_names(self.batch), *_names(self.length), *_names(last)]
            if len(set(names)) < len(names):
                raise ValueError(f"a mesh axis can divide one thing only, got {self}")

    def __bool__(self) -> bool:
        return bool(self.mesh_axes)

    def spec(self, *axes: str | None) -> PartitionSpec:
        """How an array is divided whose axes are "batch", "length", "d_inner", "vocab", or whole if None or others."""
        divided = {"batch": self.batch, "length": self.length, "d_inner": self.channels, "vocab": self.vocabulary}
        return PartitionSpec(*(divided.get(axis or "") for axis in axes))

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """All that are named, once each."""
        values = (self.batch, self.length, self.channels, self.vocabulary)
        return tuple(dict.fromkeys(name for value in values for name in _names(value)))

    @property
    def rows(self) -> tuple[str, ...]:
        """The mesh axes over which each device has rows and positions of its own, and parameters are the same."""
        return _names(self.batch) + _names(self.length)


def for_call(shard: Shard | None, length: int, mask: Any, bidirectional: bool = False) -> Shard:
    """The division of one call on sequences of ``length``, of which none need be.

    Raises:
        ValueError: a part of a sequence would not do.
    """
    if shard is None or shard.length is None:
        return shard or Shard()
    if length == 1 and not is_inside(shard):
        return dataclasses.replace(shard, length=None)
    if mask is not None:
        raise ValueError(
            f"mask (attention_mask) must be None where the mesh axis {shard.length!r} divides the length, got one; "
            "padding on the right needs none, and segment_ids tell a row from what stands before it"
        )
    if bidirectional:
        raise ValueError(f"a bidirectional block must have whole sequences, got {shard}")
    return shard


def is_inside(shard: Shard) -> bool:
    """Whether a `jax.shard_map` over the mesh axes of ``shard`` is around the call, so that arrays are one device's.

    Raises:
        ValueError: it is over some of them only.
    """
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    inside = [axis for axis in shard.mesh_axes if axis in manual]
    if inside and len(inside) < len(shard.mesh_axes):
        raise ValueError(f"the jax.shard_map around the call must be over all of {shard.mesh_axes}, got {inside}")
    return bool(inside)


def divided(shard: Shard, function: Callable[..., Any], in_specs: Any, out_specs: Any, *arguments: Any) -> Any:
    """Calls ``function`` with each device's part of the arguments, unless they are one device's already.

    Args:
        shard: how they are divided.
        function: from arguments to results.
        in_specs: a tuple with a prefix of each argument's tree.
        out_specs: a prefix of the results' tree.
        *arguments: trees of arrays.

    Raises:
        ValueError: the mesh in context lacks an axis, or does not divide an array into equal parts.
    """
    if not shard or is_inside(shard):
        return function(*arguments)
    mesh = jax.sharding.get_abstract_mesh()
    if missing := [axis for axis in shard.mesh_axes if axis not in mesh.axis_names]:
        raise ValueError(
            f"the mesh in context must have the axes {missing} that {shard} names, got {mesh.axis_names}; "
            "enter one: with jax.set_mesh(mesh)"
        )

    def prepare(spec: PartitionSpec, x: jax.Array) -> jax.Array:
        for axis, names in enumerate(spec):
            parts = mesh_size(_names(names))
            if x.shape[axis] % parts:
                raise ValueError(
                    f"axis {axis} of an array of shape {x.shape} must be a multiple of {parts}, the size of the mesh "
                    f"axes {names!r} that {shard} divides it by"
                )
        # Where divisions are types, jax.shard_map does not change them.
        return jax.sharding.reshard(x, NamedSharding(mesh, spec)) if mesh.explicit_axes else x

    arguments = jax.tree.map(
        lambda spec, tree: jax.tree.map(lambda x: prepare(spec, x), tree), in_specs, arguments, is_leaf=_is_spec
    )
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs)(*arguments)


def mesh_size(mesh_axes: MeshAxes) -> int:
    """The number of devices along axes of the mesh in context."""
    size = 1
    for name in _names(mesh_axes):
        size *= jax.sharding.get_abstract_mesh().shape[name]
    return size


def total(x: jax.Array, mesh_axes: MeshAxes) -> jax.Array:
    """The sum over devices of partial sums: one all-reduce, if there are axes."""
    return x if mesh_axes is None else jax.lax.psum(x, mesh_axes)


def share(x: Any, mesh_axes: MeshAxes) -> Any:
    """Marks what devices have in common before they use it in several ways: one all-reduce for all its cotangents."""
    if not _names(mesh_axes):
        return x
    # Nothing where JAX does not keep track of what varies (check_vma=False): there the caller's transpose sums.
    tracked = partitioning.varying_axes(jax.lax.axis_index(_names(mesh_axes)))
    return partitioning.vary(x, tracked)


def _names(mesh_axes: MeshAxes) -> tuple[str, ...]:
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
