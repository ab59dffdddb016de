"""A Mamba language model: embedding, pre-norm residual blocks, norm and head."""

from typing import Any, Literal, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import PartitionSpec

from jax_sscan import checks
from jax_sscan.models.config import MambaConfig
from jax_sscan.modules import mamba
from jax_sscan.modules.mamba import MambaCache
from jax_sscan.modules.parameters import Parameter, rms_norm
from jax_sscan.modules.sharding import Shard, divided, for_call, is_inside, share, total
from jax_sscan.nnx import Mamba, add_parameters

LMCache = tuple[MambaCache, ...] | MambaCache
"""A cache per layer; with scan_layers one whose arrays have the layers as their first axis."""


class Block(nnx.Module):
    """One layer: ``x + mixer(norm(x))``, the mixer a Mamba block.

    Args:
        config: the model's configuration.
        rngs: where the initial parameters come from.
    """

    norm: nnx.Param

    def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
        self.config = config
        add_parameters(self, {"norm": _norm(config)}, rngs, config.shard)
        self.mixer = Mamba(**config.block_options, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        cache: MambaCache | None = None,
        *,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        return_cache: bool = False,
    ) -> tuple[jax.Array, MambaCache | None]:
        """Returns the new residual stream (batch, length, d_model), and the cache where it is asked for."""
        normed = rms_norm(x, self.norm[...], self.config.norm_eps, self.config.compute_dtype)
        if return_cache:
            out, cache = self.mixer(normed, cache, segment_ids=segment_ids, mask=mask, return_cache=True)
        else:
            out, cache = self.mixer(normed, cache, segment_ids=segment_ids, mask=mask), None
        return x + out.astype(x.dtype), cache


class MambaLM(nnx.Module):
    """A Mamba language model.

    Args:
        config: its configuration.
        rngs: where the initial parameters come from, of the stream "params".

    Attributes:
        config: the configuration.
        embedding: (vocab_size, d_model).
        layers: the list of `Block`; with scan_layers one `Block` whose parameters have the layers as their first axis.
        norm: (d_model,).
        head: (vocab_size, d_model); not there if it is tied to the embedding.
    """

    embedding: nnx.Param
    norm: nnx.Param
    head: nnx.Param

    def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
        self.config = config
        add_parameters(self, _parameters(config), rngs, config.shard)
        blocks = [Block(config, rngs=rngs) for _ in range(config.num_layers)]
        self.layers = _stack(blocks) if config.scan_layers else nnx.List(blocks)

    def init_cache(self, batch: int) -> LMCache:
        """The cache before the first token: zeros."""
        if not isinstance(self.layers, Block):
            return tuple(block.mixer.init_cache(batch) for block in self.layers)
        one = self.layers.mixer.init_cache(batch)
        return jax.tree.map(lambda leaf: jnp.zeros((self.config.num_layers, *leaf.shape), leaf.dtype), one)

    def hidden_states(
        self,
        input_ids: jax.Array,
        cache: LMCache | None = None,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        return_cache: bool = False,
    ) -> tuple[jax.Array, LMCache | None]:
        """What the head turns into logits, (batch, length, d_model); arguments as in ``__call__``.

        Returns:
            The normed output of the last block, and the cache, which is None unless asked for.
        """
        return self._run(False, input_ids, cache, attention_mask, segment_ids, return_cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., d_model) -> (..., vocab_size), summed up and returned in float32 or wider."""
        shard = self.config.shard
        weight = (self.embedding if self.config.tie_embeddings else self.head)[...].astype(hidden.dtype)
        # Rows as in jax_sscan.modules.parameters.dense, unless jit would have to gather them.
        whole = shard is None or is_inside(shard)
        rows = hidden.reshape(-1, hidden.shape[-1]) if whole else hidden
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        out = jax.lax.dot_general(rows, weight, (((rows.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)
        return out.reshape(*hidden.shape[:-1], weight.shape[0])

    def _run(
        self,
        to_logits: bool,
        input_ids: jax.Array,
        cache: LMCache | None,
        attention_mask: jax.Array | None,
        segment_ids: jax.Array | None,
        return_cache: bool,
    ) -> tuple[jax.Array, LMCache | None]:
        """Checks the arguments and divides the work; returns hidden states or logits, and the cache."""
        config = self.config
        input_ids = check_token_ids("input_ids", input_ids, config.vocab_size)
        mask = None if attention_mask is None else as_mask(attention_mask, input_ids.shape)
        shard = for_call(config.shard, input_ids.shape[1], mask)
        if cache is not None and not (shard and is_inside(shard)):
            _check_cache(cache, jax.eval_shape(lambda: self.init_cache(len(input_ids))))
        graph, state = nnx.split(self)
        leaves, tree = jax.tree.flatten(state)
        stack = (None,) if config.scan_layers else ()
        leaf_specs = _specs(shard, config, state)
        ids_spec = shard.spec("batch", "length")
        cache_spec = shard.spec(*stack, "batch", "d_inner")

        def run(leaves: Any, input_ids: jax.Array, cache: Any, segment_ids: Any, mask: Any) -> Any:
            model: MambaLM = nnx.merge(graph, tree.unflatten(share(leaves, shard.rows)))
            hidden, cache = model._hidden_states(shard, input_ids, cache, segment_ids, mask, return_cache)
            return (model.logits(hidden) if to_logits else hidden), cache

        out_spec = shard.spec("batch", "length", "vocab" if to_logits else None)
        return divided(
            shard,
            run,
            (leaf_specs, ids_spec, cache_spec, ids_spec, ids_spec),
            (out_spec, cache_spec),
            leaves,
            input_ids,
            cache,
            segment_ids,
            mask,
        )

    def _hidden_states(
        self,
        shard: Shard,
        input_ids: jax.Array,
        cache: LMCache | None,
        segment_ids: jax.Array | None,
        mask: jax.Array | None,
        return_cache: bool,
    ) -> tuple[jax.Array, LMCache | None]:
        """The model on one device's part of everything."""
        config = self.config
        x = self._embed(input_ids)
        if config.residual_f32:
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        graph, _ = nnx.split(self.layers if isinstance(self.layers, Block) else self.layers[0])

        @config.checkpoint
        def run(x: jax.Array, state: Any, cache: MambaCache | None) -> tuple[jax.Array, MambaCache | None]:
            block = nnx.merge(graph, state)
            block.mixer.shard = shard  # what divides this call
            return block(x, cache, segment_ids=segment_ids, mask=mask, return_cache=return_cache)

        new_cache: LMCache | None
        if isinstance(self.layers, Block):
            layers = nnx.split(self.layers)[1], cache
            x, new_cache = jax.lax.scan(lambda x, layer: run(x, *layer), x, layers)
        else:
            new = []
            for index, block in enumerate(self.layers):
                before = None if cache is None else cast(MambaCache, cache[index])
                x, after = run(x, nnx.split(block)[1], before)
                new.append(after)
            new_cache = tuple(new) if return_cache else None
        return rms_norm(x, self.norm[...], config.norm_eps, config.compute_dtype), new_cache

    def _embed(self, input_ids: jax.Array) -> jax.Array:
        """The rows of the embedding: where devices have some each, a sum of which all terms but one are zero."""
        config, table = self.config, self.embedding[...]
        if config.shard is None or config.shard.vocabulary is None:
            return table[input_ids].astype(config.compute_dtype)
        axes = config.shard.vocabulary
        # As JAX clamps them on one device.
        index = jnp.clip(input_ids, 0, config.vocab_size - 1) - jax.lax.axis_index(axes) * table.shape[0]
        is_here = (index >= 0) & (index < table.shape[0])
        rows = jnp.where(is_here[..., None], table[jnp.where(is_here, index, 0)], 0)
        return total(rows.astype(config.compute_dtype), axes)

    @overload
    def __call__(
        self,
        input_ids: jax.Array,
        cache: LMCache | None = None,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        return_cache: Literal[False] = False,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        input_ids: jax.Array,
        cache: LMCache | None = None,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        return_cache: Literal[True],
    ) -> tuple[jax.Array, LMCache]: ...

    def __call__(
        self,
        input_ids: jax.Array,
        cache: LMCache | None = None,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        return_cache: bool = False,
    ) -> jax.Array | tuple[jax.Array, LMCache]:
        """The logits of what follows each token.

        Args:
            input_ids: (batch, length) integers.
            cache: what the model remembers of the tokens before these; nothing if None.
            attention_mask: (batch, length), 0 or False at padding, on the left or on the right; the tokens of a row
                lie side by side. Padding changes nothing of what comes out at tokens.
            segment_ids: (batch, length) int32, for sequences packed in one row: nothing is carried across a change.
            return_cache: whether to return the cache after the last token as well.

        Returns:
            The logits (batch, length, vocab_size), float32, which at padding mean nothing, or ``(logits, cache)``.

        Raises:
            ValueError: a shape is wrong.
            TypeError: a dtype is wrong or something is not an array.
        """
        logits, cache = self._run(True, input_ids, cache, attention_mask, segment_ids, return_cache)
        return (logits, cast(LMCache, cache)) if return_cache else logits


def check_token_ids(name: str, value: Any, vocab_size: int) -> jax.Array:
    """Returns ``value`` as a checked (batch, length) array of tokens below vocab_size.

    Tokens whose values are only known when the program runs are not checked: JAX clamps those that are out of range.
    """
    array = _integers(name, value, "integers")
    checks.check_rank(name, array, "(batch, length)", 2)
    if array.size and not isinstance(value, Tracer) and getattr(value, "is_fully_addressable", True):
        known = np.asarray(value)
        least, most = known.min(), known.max()
        if least < 0 or most >= vocab_size:
            raise ValueError(f"{name} must be tokens from 0 to {vocab_size - 1}, got values from {least} to {most}")
    return array


def as_mask(attention_mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns an attention mask, bool or integers as tokenizers make them, as a checked array of bool."""
    array = _integers("attention_mask", attention_mask, "bool or integers")
    checks.check_shape("attention_mask", array, "(batch, length)", shape)
    return array != 0


def _check_cache(cache: Any, expected: LMCache) -> None:
    """Raises ``ValueError`` for the cache of another model, or of another batch."""
    arrays, named = jax.tree.leaves(cache), jax.tree_util.tree_leaves_with_path(expected)
    if len(arrays) != len(named):
        raise ValueError(
            f"cache must hold {len(named)} arrays, as init_cache and earlier calls of this model return it, "
            f"got {len(arrays)}: it is of another model"
        )
    for array, (path, like) in zip(arrays, named, strict=True):
        if jnp.shape(array) != like.shape:
            raise ValueError(
                f"cache{jax.tree_util.keystr(path)} must have shape {like.shape}, got {jnp.shape(array)}: "
                "it is of another model or another batch"
            )


def _integers(name: str, value: Any, expected: str) -> jax.Array:
    """Returns an array of integers, of 64 bits too, as tokenizers and NumPy make them, or of bool where expected."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}; convert it with jnp.asarray")
    array = jnp.asarray(value)
    is_bool = array.dtype == jnp.bool_ and "bool" in expected
    if not is_bool and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be {expected}, got {array.dtype}")
    return array


def _norm(config: MambaConfig) -> Parameter:
    return Parameter((config.d_model,), ("d_model",), jax.nn.initializers.ones, config.param_dtype)


def _parameters(config: MambaConfig) -> dict[str, Parameter]:
    """The parameter table of the model itself, without its layers."""
    initializer = jax.nn.initializers.normal(0.02)
    tokens = Parameter((config.vocab_size, config.d_model), ("vocab", "d_model"), initializer, config.param_dtype)
    table = {"embedding": tokens, "norm": _norm(config)}
    return table if config.tie_embeddings else {**table, "head": tokens}


def _specs(shard: Shard, config: MambaConfig, state: Any) -> list[PartitionSpec]:
    """How the leaves of the model's state are divided.

    By the tables of parameters, not by what the variables say of themselves: `nnx.update` replaces that as well, with
    nothing where it comes from a model that was not divided.
    """
    axes = {name: parameter.axes for name, parameter in (mamba.parameters(config) | _parameters(config)).items()}
    specs = []
    for path, _ in jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        stack = (None,) if config.scan_layers and path[0].key == "layers" else ()
        specs.append(shard.spec(*stack, *axes[path[-1].key]))
    return specs


def _stack(blocks: list[Block]) -> Block:
    """One block whose parameters are those of all, stacked along a new first axis, which no mesh splits."""
    graphs, states = zip(*[nnx.split(block) for block in blocks], strict=True)
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    for _, variable in nnx.to_flat_state(state):
        if sharding := variable.get_metadata().get("out_sharding"):
            variable.set_metadata(out_sharding=(None, *sharding))
    return nnx.merge(graphs[0], state)
