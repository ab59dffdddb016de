"""The language model and generation: against themselves done another way, and sampling against its definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import jit

from jax_sscan.models import MambaConfig, MambaLM, generate, sample, score
from jax_sscan.models.generation import _continue

VOCABULARY = 29
CONFIG = MambaConfig(12, vocab_size=VOCABULARY, num_layers=2, d_state=3, tie_embeddings=False)


def model_of(config: MambaConfig = CONFIG, **changes: Any) -> MambaLM:
    """A random model that does not say the same thing all the time."""
    model = MambaLM(dataclasses.replace(config, **changes), rngs=flax.nnx.Rngs(4))
    for param in (model.embedding, model.norm, *((model.head,) if not model.config.tie_embeddings else ())):
        param[...] = 8 * param[...]
    return model


def tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCABULARY)


def run(model: MambaLM, *args: Any, **keywords: Any) -> Any:
    """The model, compiled quickly."""
    static = {"return_cache": True} if keywords.pop("return_cache", False) else {}
    graph, state = flax.nnx.split(model)
    call = lambda state, args, keywords: flax.nnx.merge(graph, state)(*args, **keywords, **static)  # noqa: E731
    return jit(call)(state, args, keywords)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """GPUs round the factors of float32 products otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


def loss_and_gradients(model: MambaLM, input_ids: jax.Array) -> Any:
    graph, state = flax.nnx.split(model)
    weights = jax.random.normal(jax.random.key(9), (*input_ids.shape, VOCABULARY))

    def loss(state: Any) -> jax.Array:
        return jnp.sum(flax.nnx.merge(graph, state)(input_ids) * weights)

    value, gradients = jit(jax.value_and_grad(loss))(state)
    return value, flax.nnx.to_pure_dict(gradients)


@pytest.mark.parametrize("remat", [None, "full", "keep_scans", jax.checkpoint_policies.dots_saveable])
def test_scanned_and_rematerialised_layers_are_the_same_model(remat: Any) -> None:
    input_ids = tokens(2, 9)
    value, gradients = loss_and_gradients(model_of(), input_ids)
    layers = gradients.pop("layers")
    gradients["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[layers[i] for i in range(2)])
    scanned_value, scanned = loss_and_gradients(model_of(scan_layers=True, remat=remat), input_ids)
    np.testing.assert_allclose(scanned_value, value, rtol=1e-5)
    jax.tree.map(
        lambda got, expected: np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max()),
        scanned,
        gradients,
    )


def test_scanned_layers_are_one_layer_to_compile() -> None:
    """The program is as large with ten layers as with two."""

    def program(**changes: Any) -> str:
        graph, state = flax.nnx.split(model_of(**changes))
        return jax.jit(lambda state, ids: flax.nnx.merge(graph, state)(ids)).lower(state, tokens(1, 5)).as_text()

    two, ten = (len(program(num_layers=layers, scan_layers=True).splitlines()) for layers in (2, 10))
    assert two == ten < len(program(num_layers=10).splitlines()) / 2


def test_initial_parameters() -> None:
    for rescale_residual, gain in ((True, 0.5), (False, 1.0)):
        config = MambaConfig(64, vocab_size=256, num_layers=4, rescale_residual=rescale_residual, tie_embeddings=False)
        model = MambaLM(config, rngs=flax.nnx.Rngs(0))
        for block in model.layers:
            largest = float(jnp.abs(block.mixer.out_proj[...]).max())
            assert 0.95 * gain * 128**-0.5 < largest <= gain * 128**-0.5 * (1 + 1e-6)
            assert (block.norm[...] == 1).all()
        for table in (model.embedding, model.head):
            assert 0.019 < table[...].std() < 0.021
        assert (model.norm[...] == 1).all()


def test_remat_keeps_what_it_says() -> None:
    """How often a forward scan is in the program: keep_scans saves its second run."""
    counts = {}
    for remat in (None, "full", "keep_scans"):
        graph, state = flax.nnx.split(model_of(remat=remat, implementation=None))

        def loss(state: Any, graph: Any = graph) -> jax.Array:
            return jnp.sum(flax.nnx.merge(graph, state)(tokens(1, 5)))

        lowered = jax.jit(jax.grad(loss)).lower(state)
        counts[remat] = str(lowered.as_text()).count("jax_sscan_forward")
    if not counts[None]:
        pytest.skip("no native kernel, whose calls could be counted")
    assert counts[None] == counts["keep_scans"] < counts["full"], counts


@pytest.mark.parametrize("scan_layers", [False, True])
def test_cache_continues_and_padding_changes_nothing(scan_layers: bool) -> None:
    model = model_of(scan_layers=scan_layers, residual_f32=False, tie_embeddings=True)
    input_ids = tokens(2, 11)
    whole, end = run(model, input_ids, return_cache=True)
    first, cache = run(model, input_ids[:, :4], model.init_cache(2), return_cache=True)
    step, cache = run(model, input_ids[:, 4:5], cache, return_cache=True)
    # The rest as a ragged batch: 6 and 4 tokens, one row padded on the left and one on the right.
    mask = jnp.array([[1] * 6 + [0], [0] * 3 + [1] * 4])
    rest = jnp.stack([jnp.append(input_ids[0, 5:], 0), jnp.append(jnp.zeros(3, jnp.int32), input_ids[1, 5:9])])
    third, cache = run(model, rest, cache, attention_mask=mask, return_cache=True)
    close = lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)  # noqa: E731
    close(jnp.concatenate([first, step], 1), whole[:, :5])
    close(third[0, :6], whole[0, 5:])
    close(third[1, 3:], whole[1, 5:9])
    axis = 1 if scan_layers else 0
    jax.tree.map(lambda c, e: close(jnp.take(c, 0, axis), jnp.take(e, 0, axis)), cache, end)


def test_packed_sequences() -> None:
    model = model_of()
    input_ids = tokens(1, 10)
    ids = jnp.array([[0] * 6 + [1] * 4], jnp.int32)
    packed = run(model, input_ids, segment_ids=ids)
    apart = jnp.concatenate([run(model, input_ids[:, :6]), run(model, input_ids[:, 6:])], 1)
    np.testing.assert_allclose(packed, apart, rtol=1e-4, atol=1e-5)
    hidden, cache = model.hidden_states(input_ids, segment_ids=ids)
    assert cache is None
    np.testing.assert_allclose(model.logits(hidden), packed, rtol=1e-4, atol=1e-5)


def test_bfloat16_computation() -> None:
    """Logits are float32, the residual stream too unless it is told otherwise, and both are near float32's."""
    input_ids = tokens(2, 9)
    expected = run(model_of(), input_ids)
    errors = []
    for residual_f32 in (True, False):
        model = model_of(dtype=jnp.bfloat16, residual_f32=residual_f32)
        assert model.embedding.dtype == jnp.float32
        block, cache = model.layers[0], model.init_cache(2)[0]
        assert (cache.conv.dtype, cache.state.dtype) == (jnp.bfloat16, jnp.float32)
        x = jnp.ones((2, 3, 12), jnp.float32 if residual_f32 else jnp.bfloat16)
        assert jax.eval_shape(block, x)[0].dtype == x.dtype
        logits = run(model, input_ids)
        assert logits.dtype == jnp.float32
        errors.append(float(jnp.abs(logits - expected).max() / jnp.abs(expected).max()))
    assert 0 < errors[0] < 0.03 and 0 < errors[1] < 0.05


# ---- Generation


def by_hand(model: MambaLM, prompt: jax.Array, count: int) -> list[int]:
    """Greedy continuation of one prompt, the whole sequence read again for every token."""
    length = prompt.shape[0] + count
    graph, state = flax.nnx.split(model)
    read = jit(lambda state, ids, mask: flax.nnx.merge(graph, state)(ids, attention_mask=mask))
    ids = jnp.zeros(length, jnp.int32).at[: prompt.shape[0]].set(prompt)
    for position in range(prompt.shape[0], length):
        logits = read(state, ids[None], jnp.arange(length)[None] < position)
        ids = ids.at[position].set(jnp.argmax(logits[0, position - 1]))
    return ids.tolist()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_generate_continues_each_row_as_by_hand(scan_layers: bool) -> None:
    """Left-padded prompts, then stop tokens: a row keeps its stop token and pads, the others go on."""
    model = model_of(scan_layers=scan_layers)
    prompts = [tokens(1, length, length)[0] for length in (6, 3, 1)]
    expected = [by_hand(model, prompt, 12)[len(prompt) :] for prompt in prompts]
    padded = jnp.stack([jnp.concatenate([jnp.full(6 - len(p), 5), p]) for p in prompts])
    mask = jnp.stack([jnp.arange(6) >= 6 - len(p) for p in prompts])
    got = generate(model, padded, 12, attention_mask=mask)
    np.testing.assert_array_equal(got[:, :6], padded)
    assert got[:, 6:].tolist() == expected
    assert len({tuple(row) for row in expected}) == 3
    stop = [expected[0][3], expected[1][5]]
    stopped = generate(model, padded, 12, attention_mask=mask, stop_tokens=stop, pad_token=-1)
    for row, whole in zip(stopped[:, 6:].tolist(), expected, strict=True):
        end = next((i + 1 for i, token in enumerate(whole) if token in stop), 12)
        assert row == whole[:end] + [-1] * (12 - end)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_one_row_steps_twice_on_a_gpu(scan_layers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = model_of(scan_layers=scan_layers), tokens(1, 5)
    options: dict[str, Any] = {"temperature": 2.0, "top_k": 9, "key": jax.random.key(1), "stop_tokens": [3]}
    expected = generate(model, prompt, 9, **options)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if jax.devices()[0].platform == "gpu" else "gpu")
    compiled = _continue._cache_size()
    np.testing.assert_array_equal(generate(model, prompt, 9, **options), expected)
    assert _continue._cache_size() == compiled + 1


def test_generate_compiles_once_per_shape() -> None:
    model = model_of()
    before = _continue._cache_size()
    for seed in range(3):
        generate(model, tokens(2, 4, seed), 3, temperature=0.5 + seed, key=jax.random.key(seed), stop_tokens=[seed])
    # The same configuration, loaded or made again, is the same program.
    generate(model_of(), tokens(2, 4), 3, temperature=1.0, key=jax.random.key(0), stop_tokens=2)
    assert _continue._cache_size() == before + 1


def test_generate_draws_what_sample_draws() -> None:
    """Each row and step on its own, reproducibly, and within top_k."""
    model = model_of()
    prompts = jnp.tile(tokens(1, 4), (64, 1))
    draw = lambda seed: generate(model, prompts, 2, temperature=30.0, top_k=3, key=jax.random.key(seed))  # noqa: E731
    got = draw(0)
    np.testing.assert_array_equal(got, draw(0))
    assert (got != draw(1)).any()
    likeliest = jnp.argsort(run(model, prompts[:1])[0, -1])[-3:]
    assert set(got[:, 4].tolist()) == set(likeliest.tolist())
    free = generate(model, prompts, 2, temperature=30.0, key=jax.random.key(0))
    assert len(set(free[:, 4].tolist())) > 3 and len(set(free[:, 5].tolist())) > 3
    cold = generate(model, prompts, 2, temperature=1e-3, key=jax.random.key(0))
    assert (cold[:, 4] == likeliest[-1]).all()
    np.testing.assert_array_equal(
        cold, generate(model, prompts, 2, temperature=30.0, top_p=1e-6, key=jax.random.key(0))
    )


def test_prompts_are_read_by_the_scan_and_steps_take_constant_memory() -> None:
    """One scan per layer, for the prompt; a thousand tokens more take the memory of the tokens themselves."""
    model = model_of()
    graph, state = flax.nnx.split(model)

    def program(count: int) -> Any:
        scalar, key = jnp.int32(0), jax.random.key(0)
        arguments = state, tokens(2, 50), None, {}, jnp.zeros(0, jnp.int32), scalar, key
        return _continue.lower(*arguments, graph=graph, max_new_tokens=count, top_k=None).compile()

    few, many = program(10), program(1010)
    growth = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    assert growth <= 2 * (1000 * 2 * 4)
    if native_calls := str(many.as_text()).count('custom_call_target="jax_sscan_forward'):
        assert native_calls == model.config.num_layers


def test_sample_draws_from_the_distribution() -> None:
    logits = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.3, 0.15]))
    many = jnp.tile(logits, (20000, 1))

    def frequencies(**options: Any) -> np.ndarray:
        return np.bincount(sample(many, jax.random.key(0), **options), minlength=5) / len(many)

    def expect(got: np.ndarray, weights: list[float]) -> None:
        np.testing.assert_allclose(got, np.array(weights) / np.sum(weights), rtol=0, atol=0.015)

    expect(frequencies(temperature=1.0), [0.05, 0.4, 0.1, 0.3, 0.15])
    expect(frequencies(temperature=0.5), [0.05**2, 0.4**2, 0.1**2, 0.3**2, 0.15**2])
    expect(frequencies(temperature=1.0, top_k=2), [0, 0.4, 0, 0.3, 0])
    expect(frequencies(temperature=1.0, top_p=0.71), [0, 0.4, 0, 0.3, 0.15])
    expect(frequencies(temperature=1.0, top_p=0.69), [0, 0.4, 0, 0.3, 0])
    expect(frequencies(temperature=1.0, top_k=3, top_p=0.8), [0, 0.4, 0, 0.3, 0])
    expect(frequencies(temperature=1.0, top_p=1e-6), [0, 1, 0, 0, 0])
    expect(frequencies(), [0, 1, 0, 0, 0])
    assert frequencies(temperature=1.0, top_k=2)[[0, 2, 4]].max() == 0


def test_score_is_the_log_probability_of_each_token() -> None:
    model = model_of()
    input_ids = tokens(2, 8)
    mask = jnp.array([[0, 0] + [1] * 6, [1] * 5 + [0] * 3])
    logits = np.asarray(run(model, input_ids, attention_mask=mask), np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.log(np.take_along_axis(probabilities[:, :-1], np.asarray(input_ids)[:, 1:, None], -1)[..., 0])
    expected = np.where(np.asarray(mask[:, 1:] * mask[:, :-1]), expected, 0)
    got = score(model, input_ids, attention_mask=mask)
    assert (np.asarray(got) != 0).sum() == 5 + 4
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_named() -> None:
    model = model_of()
    ids = tokens(2, 4)
    right_padded = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    key = jax.random.key(0)
    for match, call in {
        "input_ids must be integers": lambda: model(jnp.ones((1, 2))),
        "input_ids must be an array": lambda: model([[1, 2]]),
        "tokens from 0 to 28, got values from 3 to 29": lambda: model(np.array([[29, 3]])),
        "tokens from 0 to 28, got values from -1 to 3": lambda: generate(model, np.array([[-1, 3]]), 2),
        r"input_ids must have 2 axes": lambda: model(ids[0]),
        "attention_mask must have shape": lambda: model(ids, attention_mask=jnp.ones((2, 3), jnp.int32)),
        "attention_mask must be bool": lambda: model(ids, attention_mask=jnp.ones((2, 4))),
        r"cache must hold 4 arrays": lambda: model(ids, model.init_cache(2)[:1]),
        r"cache\[0\].conv must have shape \(2, .*, got \(3, ": lambda: model(ids, model.init_cache(3)),
        "padded on the left": lambda: generate(model, ids, 2, attention_mask=right_padded),
        "at least one token": lambda: generate(model, ids[:, :0], 2),
        "max_new_tokens": lambda: generate(model, ids, -1),
        "key must be given": lambda: generate(model, ids, 2, temperature=1.0),
        "temperature must be": lambda: generate(model, ids, 2, temperature=-1.0),
        "top_k must be": lambda: generate(model, ids, 2, temperature=1.0, top_k=0, key=key),
        r"top_p must be in \(0, 1\]": lambda: generate(model, ids, 2, temperature=1.0, top_p=1.5, key=key),
        "bidirectional": lambda: dataclasses.replace(CONFIG, bidirectional=True),
        "remat must be": lambda: dataclasses.replace(CONFIG, remat="some"),
        "num_layers must be": lambda: dataclasses.replace(CONFIG, num_layers=0),
    }.items():
        with pytest.raises((ValueError, TypeError), match=match):
            call()
