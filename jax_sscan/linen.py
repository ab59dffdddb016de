"""Flax Linen modules: `Mamba`, the block of arXiv 2312.00752, and `SelectiveScan`, the model inside it.

The mathematics is in `jax_sscan.modules`; `jax_sscan.nnx` has the same modules with the same parameters. With the
option ``shard`` parameters are `linen.Partitioned`.
"""

import jax

try:
    from flax import linen
except ModuleNotFoundError as error:
    raise ImportError("jax_sscan.linen needs Flax; install it with: pip install 'jax-sscan[flax]'") from error

from jax_sscan.modules import mamba, scan_layer
from jax_sscan.modules.mamba import MambaCache, MambaOptions
from jax_sscan.modules.parameters import Parameter, Params
from jax_sscan.modules.scan_layer import SelectiveScanOptions
from jax_sscan.modules.sharding import Shard


class SelectiveScan(SelectiveScanOptions, linen.Module):
    """A selective state space model (S6) with its projections to step sizes, B and C.

    Attributes are those of `SelectiveScanOptions`.
    """

    def init_cache(self, batch: int) -> jax.Array:
        """The state before the first position: zeros, (batch, d_inner, d_state)."""
        return scan_layer.init_cache(self, batch)

    @linen.compact
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
        """Runs the model; arguments, results and errors are those of `jax_sscan.nnx.SelectiveScan`."""
        params = _params(self, scan_layer.parameters(self), self.shard)
        return scan_layer.apply(
            self, params, u, z, cache, segment_ids=segment_ids, mask=mask, return_cache=return_cache
        )


class Mamba(MambaOptions, linen.Module):
    """The Mamba block: projection in, causal convolution, SiLU, selective scan, gate and projection out.

    Attributes are those of `MambaOptions`, d_model in first place.
    """

    def init_cache(self, batch: int) -> MambaCache:
        """The cache before the first position: zeros."""
        return mamba.init_cache(self, batch)

    @linen.compact
    def __call__(
        self,
        x: jax.Array,
        cache: MambaCache | None = None,
        *,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        return_cache: bool = False,
    ) -> jax.Array | tuple[jax.Array, MambaCache]:
        """Runs the block; arguments, results and errors are those of `jax_sscan.nnx.Mamba`."""
        params = _params(self, mamba.parameters(self), self.shard)
        return mamba.apply(self, params, x, cache, segment_ids=segment_ids, mask=mask, return_cache=return_cache)


def _params(module: linen.Module, table: dict[str, Parameter], shard: Shard | None) -> Params:
    """The values of the table's parameters, which Linen creates when it initialises the module."""
    values = {}
    for name, parameter in table.items():
        initializer = parameter.initializer
        if shard:
            initializer = linen.with_partitioning(initializer, tuple(shard.spec(*parameter.axes)))
        values[name] = module.param(name, initializer, parameter.shape, parameter.dtype)
    return values


__all__ = ["Mamba", "MambaCache", "MambaOptions", "SelectiveScan", "SelectiveScanOptions", "Shard"]
