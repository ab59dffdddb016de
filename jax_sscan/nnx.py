"""Flax NNX modules: `Mamba`, the block of arXiv 2312.00752, and `SelectiveScan`, the model inside it.

The mathematics is in `jax_sscan.modules`; `jax_sscan.linen` has the same modules with the same parameters. With the
option ``shard`` parameters carry ``out_sharding``, and NNX wants the mesh in context when it creates them.
"""

import dataclasses
from typing import Any, Literal, overload

import jax

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ImportError("jax_sscan.nnx needs Flax; install it with: pip install 'jax-sscan[flax]'") from error

from jax_sscan.modules import mamba, scan_layer
from jax_sscan.modules.mamba import MambaCache, MambaOptions
from jax_sscan.modules.parameters import Parameter, Params
from jax_sscan.modules.scan_layer import SelectiveScanOptions
from jax_sscan.modules.sharding import Shard


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SelectiveScan(SelectiveScanOptions, nnx.Module):
    """A selective state space model (S6) with its projections to step sizes, B and C.

    Arguments are the attributes of `SelectiveScanOptions`, and:

    Attributes:
        rngs: where the initial parameters come from, of the stream "params".
    """

    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, rngs: nnx.Rngs):
        add_parameters(self, scan_layer.parameters(self), rngs, self.shard)

    def init_cache(self, batch: int) -> jax.Array:
        """The state before the first position: zeros, (batch, d_inner, d_state)."""
        return scan_layer.init_cache(self, batch)

    @overload
    def __call__(
        self,
        u: jax.Array,
        z: jax.Array | None = None,
        cache: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        return_cache: Literal[False] = False,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        u: jax.Array,
        z: jax.Array | None = None,
        cache: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        return_cache: Literal[True],
    ) -> tuple[jax.Array, jax.Array]: ...

    def __call__(
        self,
        u: jax.Array,
        z: jax.Array | None = None,
        cache: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        return_cache: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Runs the model on a sequence, or on the next part of one.

        Args:
            u: input, (batch, length, d_inner).
            z: gate, (batch, length, d_inner); None for none.
            cache: (batch, d_inner, d_state), the state before the first position; zeros if None.
            segment_ids: (batch, length) int32: the state restarts where the id changes.
            mask: (batch, length) bool, False at padding; the real positions of a row lie side by side.
            return_cache: whether to return the state after the last real position as well.

        Returns:
            The output (batch, length, d_inner), which at padding means nothing, or ``(out, cache)``.

        Raises:
            ValueError: a shape is wrong.
            TypeError: a dtype is wrong or something is not an array.
        """
        return scan_layer.apply(
            self, parameter_values(self), u, z, cache, segment_ids=segment_ids, mask=mask, return_cache=return_cache
        )


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Mamba(MambaOptions, nnx.Module):
    """The Mamba block: projection in, causal convolution, SiLU, selective scan, gate and projection out.

    Arguments are the attributes of `MambaOptions`, d_model in first place, and:

    Attributes:
        rngs: where the initial parameters come from, of the stream "params".
    """

    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, rngs: nnx.Rngs):
        add_parameters(self, mamba.parameters(self), rngs, self.shard)

    def init_cache(self, batch: int) -> MambaCache:
        """The cache before the first position: zeros."""
        return mamba.init_cache(self, batch)

    @overload
    def __call__(
        self,
        x: jax.Array,
        cache: MambaCache | None = None,
        *,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        return_cache: Literal[False] = False,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        x: jax.Array,
        cache: MambaCache | None = None,
        *,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        return_cache: Literal[True],
    ) -> tuple[jax.Array, MambaCache]: ...

    def __call__(
        self,
        x: jax.Array,
        cache: MambaCache | None = None,
        *,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        return_cache: bool = False,
    ) -> jax.Array | tuple[jax.Array, MambaCache]:
        """Runs the block on a sequence, or on the next part of one: any number of positions, or a single one.

        Args:
            x: (batch, length, d_model).
            cache: what the block remembers of the positions before x; nothing if None.
            segment_ids: (batch, length) int32: nothing is carried across a change of id. The first position continues
                the cache.
            mask: (batch, length) bool, False at padding, on the left or on the right; the real positions of a row lie
                side by side. Padding changes nothing: rows and caches are as if it were not there.
            return_cache: whether to return the cache after the last real position as well.

        Returns:
            The output (batch, length, d_model), which at padding means nothing, or ``(out, cache)``.

        Raises:
            ValueError: a shape is wrong, or a bidirectional block is asked for a cache.
            TypeError: a dtype is wrong or something is not an array.
        """
        return mamba.apply(
            self, parameter_values(self), x, cache, segment_ids=segment_ids, mask=mask, return_cache=return_cache
        )


def add_parameters(module: nnx.Module, table: dict[str, Parameter], rngs: nnx.Rngs, shard: Shard | None) -> None:
    """Gives ``module`` an `nnx.Param` with an initial value for each row of the table, divided over the mesh."""
    for name, parameter in table.items():
        value = parameter.initializer(rngs.params(), parameter.shape, parameter.dtype)
        metadata: dict[str, Any] = {"out_sharding": tuple(shard.spec(*parameter.axes))} if shard else {}
        setattr(module, name, nnx.Param(value, **metadata))


def parameter_values(module: nnx.Module) -> Params:
    """The arrays in the parameters of ``module`` itself, by name."""
    return {name: value[...] for name, value in vars(module).items() if isinstance(value, nnx.Param)}


__all__ = ["Mamba", "MambaCache", "MambaOptions", "SelectiveScan", "SelectiveScanOptions", "Shard"]
