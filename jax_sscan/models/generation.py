"""Continuing prompts, and scoring texts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_sscan.models.language_model import MambaLM, as_mask, check_token_ids


def sample(
    logits: jax.Array,
    key: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 0.0,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
) -> jax.Array:
    """Draws a token from each row of logits.

    Args:
        logits: (..., vocab_size).
        key: random key; needed unless greedy.
        temperature: divides the logits; 0 takes the likeliest token. A traced value must not be 0.
        top_k: only the top_k likeliest tokens are drawn.
        top_p: of those, only the likeliest whose probabilities sum up to top_p, and at least one.

    Returns:
        (...) int32.

    Raises:
        ValueError: a value is out of range, or there is no key to draw with.
    """
    if isinstance(temperature, (int, float)):
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError("key must be given where temperature is not 0: pass a key made by jax.random.key")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if isinstance(top_p, (int, float)) and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    logits = logits / temperature
    if top_k is not None:
        smallest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p is not None:
        falling = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(falling, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities  # than each token itself
        smallest = jnp.min(jnp.where(likelier < top_p, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def generate(
    model: MambaLM,
    input_ids: jax.Array,
    max_new_tokens: int,
    *,
    attention_mask: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: int | Sequence[int] = (),
    pad_token: int = 0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Continues prompts, each by up to max_new_tokens tokens.

    The prompts are read at once, by the scan; then each token is one step in memory that does not grow. Both are one
    jitted program, compiled once per shape of the prompts, max_new_tokens, top_k and kind of sampling.

    Args:
        model: the language model.
        input_ids: prompts, (batch, length) integers, length at least 1. Shorter prompts are padded on the left.
        max_new_tokens: how many tokens to add.
        attention_mask: (batch, length), 0 or False at the padding on the left; None where there is none.
        temperature: as in `sample`; 0, the default, is greedy.
        top_k: as in `sample`.
        top_p: as in `sample`.
        stop_tokens: tokens that end a row; the row keeps the token, and pad_token follows. The loop ends early once
            all rows have ended.
        pad_token: what stands after the end of a row.
        key: random key; needed unless greedy.

    Returns:
        (batch, length + max_new_tokens) int32: the prompts as they were given, and their continuations.

    Raises:
        ValueError: a shape or a value is wrong, a prompt is padded on the right, or there is no key to draw with.
        TypeError: a dtype is wrong or something is not an array.
    """
    input_ids = check_token_ids("input_ids", input_ids, model.config.vocab_size)
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids must hold at least one token a row, such as the one that begins a text")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an int of at least 0, got {max_new_tokens!r}")
    mask = None
    if attention_mask is not None:
        mask = as_mask(attention_mask, input_ids.shape)
        if not bool(jnp.all(mask[:, -1])) or not bool(jnp.all(mask[:, 1:] >= mask[:, :-1])):
            raise ValueError("prompts must be padded on the left: attention_mask must be 0s, then 1s in each row")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sample(jnp.zeros(1), key, **sampling)  # raises now what it would raise when traced
    input_ids = input_ids.astype(jnp.int32)
    if max_new_tokens == 0:
        return input_ids
    stop = jnp.asarray([stop_tokens] if isinstance(stop_tokens, int) else list(stop_tokens), jnp.int32)
    is_greedy = temperature == 0
    traced = {} if is_greedy else {"temperature": jnp.float32(temperature)}
    if not is_greedy and top_p is not None:
        traced["top_p"] = jnp.float32(top_p)
    graph, state = nnx.split(model)
    new = _continue(
        state, input_ids, mask, traced, stop, jnp.int32(pad_token), jax.random.key(0) if key is None else key,
        graph=graph, max_new_tokens=max_new_tokens, top_k=None if is_greedy else top_k,
        twice=input_ids.shape[0] == 1 and jax.default_backend() == "gpu",
    )  # fmt: skip
    return jnp.concatenate([input_ids, new], axis=1)


@partial(jax.jit, static_argnames=("graph", "max_new_tokens", "top_k", "twice"))
def _continue(
    state: Any,
    prompts: jax.Array,
    mask: jax.Array | None,
    sampling: dict[str, jax.Array],
    stop: jax.Array,
    pad_token: jax.Array,
    key: jax.Array,
    *,
    graph: Any,
    max_new_tokens: int,
    top_k: int | None,
    twice: bool = False,
) -> jax.Array:
    """The continuations (batch, max_new_tokens).

    With ``twice`` each row is stepped beside a copy of itself. On a GPU, XLA makes of a matrix product of one row two
    kernels, of which the first writes every single product to memory, and rounds it to the dtype of the factors; two
    rows are one product.
    """
    model: MambaLM = nnx.merge(graph, state)
    batch = prompts.shape[0]

    def doubled(x: jax.Array, axis: int = 0) -> jax.Array:
        return jnp.concatenate([x, x], axis) if twice else x

    def draw(hidden: jax.Array, number: Any) -> jax.Array:
        logits = model.logits(hidden[:, -1])
        return sample(logits, jax.random.fold_in(key, number), **sampling, top_k=top_k)

    def ended(tokens: jax.Array) -> jax.Array:
        return jnp.any(tokens[:, None] == stop, axis=1)

    def goes_on(carry: Any) -> jax.Array:
        number, _, done, _, _ = carry
        return (number < max_new_tokens) & ~jnp.all(done)

    def step(carry: Any) -> Any:
        number, tokens, done, cache, new = carry
        hidden, cache = model.hidden_states(doubled(tokens)[:, None], cache, return_cache=True)
        tokens = jnp.where(done, pad_token, draw(hidden[:batch], number))
        new = jax.lax.dynamic_update_slice(new, tokens[:, None], (0, number))
        return number + 1, tokens, done | ended(tokens), cache, new

    hidden, cache = model.hidden_states(prompts, attention_mask=mask, return_cache=True)
    tokens = draw(hidden, 0)
    cache = jax.tree.map(partial(doubled, axis=1 if model.config.scan_layers else 0), cache)
    new = jnp.full((batch, max_new_tokens), pad_token).at[:, 0].set(tokens)
    return jax.lax.while_loop(goes_on, step, (jnp.int32(1), tokens, ended(tokens), cache, new))[-1]


def score(model: MambaLM, input_ids: jax.Array, *, attention_mask: jax.Array | None = None) -> jax.Array:
    """The log-probability of each token after the first, given those before it.

    Args:
        model: the language model.
        input_ids: (batch, length) integers.
        attention_mask: (batch, length), 0 or False at padding, on the left or on the right.

    Returns:
        (batch, length - 1) float32 natural logarithms: column t is of ``input_ids[:, t + 1]``. 0 at padding and at the
        first token of a row, so that a row's sum is the log-probability of its text after its first token.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong or something is not an array.
    """
    input_ids = check_token_ids("input_ids", input_ids, model.config.vocab_size)
    mask = None if attention_mask is None else as_mask(attention_mask, input_ids.shape)
    graph, state = nnx.split(model)
    return _score(state, input_ids, mask, graph=graph)


@partial(jax.jit, static_argnames="graph")
def _score(state: Any, input_ids: jax.Array, mask: jax.Array | None, *, graph: Any) -> jax.Array:
    model: MambaLM = nnx.merge(graph, state)
    hidden, _ = model.hidden_states(input_ids, attention_mask=mask)
    logits = model.logits(hidden[:, :-1])
    chosen = jnp.take_along_axis(logits, input_ids[:, 1:, None], axis=-1)[..., 0]
    scores = chosen - jax.nn.logsumexp(logits, axis=-1)
    return scores if mask is None else jnp.where(mask[:, 1:] & mask[:, :-1], scores, 0.0)
