"""Checkpoints: against the models of transformers, in torch on the CPU, small and random."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jax_sscan.models import MambaConfig, MambaLM, generate, load_pretrained, save_pretrained, score

# Part of the "test" extra, so that `build.py test` always runs these; skipped only in environments made by hand.
torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

VOCABULARY = 53
# Whatever a config.json says that tensors do not show, none of it the default.
SETTINGS: dict[str, Any] = {
    "layer_norm_epsilon": 1e-3, "residual_in_fp32": False, "time_step_min": 0.002, "time_step_max": 0.2,
    "time_step_floor": 0.003, "time_step_scale": 2.0, "bos_token_id": 3, "pad_token_id": 4,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {}),
    "mamba-biases": ("Mamba", {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "expand": 3}),
    "falcon": ("FalconMamba", {"tie_word_embeddings": False, "mixer_rms_eps": 1e-3, **SETTINGS}),
    "falcon-inner": ("FalconMamba", {"intermediate_size": 40, "time_step_rank": 5, "conv_kernel": 3, "use_bias": True}),
}


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """GPUs round the factors of float32 products otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


@flax.nnx.jit
def read(model: Any, input_ids: Any, attention_mask: Any = None) -> jax.Array:
    return model(input_ids, attention_mask=attention_mask)


def torch_model(kind: str, dtype: str = "float32") -> Any:
    """A random model: none of its parameters is at its initial value."""
    family, options = KINDS[kind]
    config = getattr(transformers, family + "Config")(
        vocab_size=VOCABULARY, hidden_size=24, state_size=5, num_hidden_layers=2, eos_token_id=None, **options
    )
    torch.manual_seed(1)
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype))


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


def torch_logits(model: Any, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
    mask = None if attention_mask is None else torch.from_numpy(attention_mask)
    with torch.no_grad():
        return model(torch.from_numpy(input_ids), attention_mask=mask).logits.float().numpy()


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model in torch, and what is loaded here of it; one of them from a sharded checkpoint."""
    directory = tmp_path_factory.mktemp(request.param)
    model = torch_model(request.param)
    sharded = {"max_shard_size": "20KB"} if request.param == "mamba" else {}
    model.save_pretrained(directory, **sharded)
    assert (directory / "model.safetensors.index.json").exists() == bool(sharded)
    return model, load_pretrained(directory)


def test_logits(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    input_ids = tokens(2, 37)
    expected = torch_logits(theirs, input_ids)
    got = read(ours, input_ids)
    assert got.dtype == jnp.float32 and ours.config.vocab_size == VOCABULARY
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    log_probabilities = torch.log_softmax(torch.from_numpy(expected), -1).numpy()[:, :-1]
    chosen = np.take_along_axis(log_probabilities, input_ids[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(score(ours, input_ids), chosen, rtol=0, atol=1e-4)


# transformers lets biases of the projection in into the convolution at padding: see test_ragged_prompts.
@pytest.mark.parametrize(
    ("pair", "ragged"),
    [*((kind, False) for kind in KINDS), ("mamba", True), ("falcon", True)],
    indirect=["pair"],
)
def test_gradients_of_every_parameter(pair: tuple[Any, Any], tmp_path: Path, ragged: bool) -> None:
    """Of the mean loss of a token; ragged: one row padded on the left and one on the right."""
    theirs, ours = pair
    input_ids = tokens(2, 19, 1)
    real = np.array([[5], [0]]) <= np.arange(19)
    real &= np.arange(19) < np.array([[19], [12]])
    mask = real.astype(np.int64) if ragged else np.ones_like(input_ids)
    # What is predicted: transformers would also have the first token of a row, from the padding in front of it.
    predicted = np.pad(mask[:, 1:] * mask[:, :-1], ((0, 0), (1, 0))).astype(bool)
    labels = torch.from_numpy(np.where(predicted, input_ids, -100))
    theirs.zero_grad()
    loss = theirs(torch.from_numpy(input_ids), attention_mask=torch.from_numpy(mask), labels=labels).loss
    loss.backward()

    def ours_loss(model: Any) -> jax.Array:
        attention_mask = jnp.asarray(mask) if ragged else None
        return -jnp.sum(score(model, input_ids, attention_mask=attention_mask)) / predicted.sum()

    value, gradients = flax.nnx.jit(flax.nnx.value_and_grad(ours_loss))(ours)
    np.testing.assert_allclose(float(value), loss.item(), rtol=1e-5)
    # A model whose parameters are the gradients, under the names of transformers: every map of parameters is linear.
    save_pretrained(flax.nnx.merge(flax.nnx.graphdef(ours), gradients), tmp_path)
    got = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    named = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert got.keys() == named.keys()
    for name, expected in named.items():
        assert np.abs(expected).max() > 0, name
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("pair", ["mamba", "falcon"], indirect=True)
def test_greedy_generation_token_for_token(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    input_ids = tokens(2, 7, 2)
    expected = theirs.generate(torch.from_numpy(input_ids), max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert expected.unique().numel() > 10
    np.testing.assert_array_equal(generate(ours, input_ids, 64), expected.numpy())


@pytest.mark.parametrize("pair", ["mamba", "mamba-biases", "falcon"], indirect=True)
def test_ragged_prompts(pair: tuple[Any, Any]) -> None:
    """Padded on the left: logits and generation are transformers', and those of each row alone.

    But for biases of the projection in: transformers lets them into the convolution at padding, so that a row depends
    on how far it was padded. There each row alone is the reference.
    """
    theirs, ours = pair
    input_ids = tokens(3, 9, 3)
    lengths = (4, 9, 1)
    mask = np.arange(9) >= 9 - np.array(lengths)[:, None]
    input_ids = np.where(mask, input_ids, 7)
    got = read(ours, input_ids, mask)
    continued = generate(ours, input_ids, 16, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = input_ids[row : row + 1, 9 - length :]
        np.testing.assert_allclose(got[row, 9 - length :], torch_logits(theirs, alone)[0], rtol=0, atol=1e-4)
        expected = theirs.generate(torch.from_numpy(alone), max_new_tokens=16, do_sample=False, pad_token_id=0)
        np.testing.assert_array_equal(continued[row, 9 - length :], expected[0].numpy())
    if not ours.config.use_bias:
        expected = torch_logits(theirs, input_ids, mask.astype(np.int64))
        np.testing.assert_allclose(np.asarray(got)[mask], expected[mask], rtol=0, atol=1e-4)
        expected = theirs.generate(
            torch.from_numpy(input_ids), attention_mask=torch.from_numpy(mask.astype(np.int64)),
            max_new_tokens=16, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        np.testing.assert_array_equal(continued, expected.numpy())


@pytest.mark.parametrize("options", [{}, {"expand": 1.5, "dt_scale": 1, "norm_eps": 1, "eos_token_id": (2, 3)}])
@pytest.mark.parametrize(("family", "inner_norm"), [("Mamba", None), ("FalconMamba", "rms")])
def test_what_is_made_here_transformers_loads(
    family: str, inner_norm: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    """With the defaults of `MambaConfig`, which are not those of transformers, and numbers that it is strict on."""
    config = MambaConfig(24, vocab_size=VOCABULARY, num_layers=3, inner_norm=inner_norm, **options)
    model = MambaLM(config, rngs=flax.nnx.Rngs(0))
    model.embedding[...] = 8 * model.embedding[...]
    save_pretrained(model, tmp_path)
    theirs, info = getattr(transformers, family + "ForCausalLM").from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    input_ids = tokens(2, 11)
    expected = torch_logits(theirs.eval(), input_ids)
    for ours in (model, load_pretrained(tmp_path)):
        np.testing.assert_allclose(read(ours, input_ids), expected, rtol=0, atol=1e-4)
    assert ours.config.eos_token_id == config.eos_token_id


@pytest.mark.parametrize("pair", ["falcon"], indirect=True)
def test_settings(pair: tuple[Any, Any], tmp_path: Path) -> None:
    _, ours = pair
    config = ours.config
    assert (config.norm_eps, config.residual_f32) == (1e-3, False)
    assert (config.dt_min, config.dt_max, config.dt_init_floor, config.dt_scale) == (0.002, 0.2, 0.003, 2.0)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, None, 4)
    save_pretrained(ours, tmp_path)
    written = transformers.AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(written, name) for name in SETTINGS} == SETTINGS


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_is_saved_here_transformers_loads(pair: tuple[Any, Any], tmp_path: Path, scan_layers: bool) -> None:
    theirs, ours = pair
    theirs.save_pretrained(tmp_path / "theirs")
    save_pretrained(load_pretrained(tmp_path / "theirs", scan_layers=scan_layers), tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name
    input_ids = tokens(1, 11)
    np.testing.assert_array_equal(torch_logits(again, input_ids), torch_logits(theirs, input_ids))
    loaded = load_pretrained(tmp_path / "ours")
    assert loaded.config == ours.config


def test_shards(tmp_path: Path) -> None:
    """Several files, read back here and by transformers, and nothing is left of what was in the directory before."""
    theirs = torch_model("falcon", "bfloat16")
    theirs.save_pretrained(tmp_path)
    ours, whole = load_pretrained(tmp_path), (tmp_path / "model.safetensors").stat().st_size
    index = tmp_path / "model.safetensors.index.json"
    for limit in ("4KB", 9000, "1 GB"):
        save_pretrained(ours, tmp_path, max_shard_size=limit)
        files = {path.name: safetensors.numpy.load_file(path) for path in tmp_path.glob("*.safetensors")}
        sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in files.values()]
        if limit == "1 GB":
            assert list(files) == ["model.safetensors"] and not index.exists()
        else:
            bytes_ = 4000 if limit == "4KB" else 9000
            assert len(files) >= whole // bytes_
            assert all(size <= bytes_ or len(file) == 1 for size, file in zip(sizes, files.values(), strict=True))
            written = json.loads(index.read_text())
            assert written["metadata"]["total_size"] == sum(sizes)
            assert written["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
        again, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        for name, parameter in theirs.state_dict().items():
            assert torch.equal(parameter, again.state_dict()[name]), name
        states = (flax.nnx.state(model) for model in (ours, load_pretrained(tmp_path)))
        jax.tree.map(np.testing.assert_array_equal, *states)
    for wrong in ("5 apples", "GB", 0, None):
        with pytest.raises(ValueError, match="max_shard_size must"):
            save_pretrained(ours, tmp_path, max_shard_size=wrong)  # pyright: ignore[reportArgumentType]


def test_bfloat16_checkpoints(tmp_path: Path) -> None:
    """The file's dtype is the parameters', but for those kept wide; torch computes in bfloat16 throughout."""
    theirs = torch_model("mamba", "bfloat16")
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    mixer = ours.layers[0].mixer
    assert (ours.embedding.dtype, mixer.in_proj.dtype, mixer.A_log.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    input_ids = tokens(2, 15)
    got, expected = read(ours, input_ids), torch_logits(theirs.float(), input_ids)
    assert got.dtype == jnp.float32
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
    wide = load_pretrained(tmp_path, param_dtype=jnp.float32)
    np.testing.assert_allclose(read(wide, input_ids), expected, rtol=0, atol=1e-4)
    save_pretrained(ours, tmp_path / "again")
    assert (
        safetensors.numpy.load_file(tmp_path / "again/model.safetensors")["backbone.norm_f.weight"].dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize(
    ("file", "kind", "ssm", "settings"),
    [
        ("model.safetensors", "mamba", {}, {}),
        ("pytorch_model.bin", "mamba", {"layer": "Mamba1"}, {}),
        (
            "pytorch_model.bin",
            "mamba-biases",
            {"bias": True, "conv_bias": False, "expand": 3},
            {"tie_embeddings": False},
        ),
    ],
)
def test_original_layout(tmp_path: Path, file: str, kind: str, ssm: dict[str, Any], settings: dict[str, Any]) -> None:
    """Names, config and padded vocabulary of state-spaces/mamba."""
    theirs = torch_model(kind)
    tensors = {name: value.clone() for name, value in theirs.state_dict().items()}
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    assert "lm_head.weight" in tensors
    config = {
        "d_model": 24, "n_layer": 2, "vocab_size": VOCABULARY - 2, "ssm_cfg": {"d_state": 5, **ssm}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": VOCABULARY, **settings,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        torch.save(tensors, tmp_path / file)
    else:
        arrays = {name: np.array(value.numpy()) for name, value in tensors.items()}
        safetensors.numpy.save_file(arrays, tmp_path / file)
    ours = load_pretrained(tmp_path)
    input_ids = tokens(2, 13)
    np.testing.assert_allclose(read(ours, input_ids), torch_logits(theirs, input_ids), rtol=0, atol=1e-4)


def test_wrong_tensors_are_listed(tmp_path: Path) -> None:
    theirs = torch_model("mamba")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = safetensors.numpy.load_file(file)
    bad = dict(good)
    del bad["backbone.layers.1.mixer.A_log"]
    bad["backbone.layers.2.norm.weight"] = np.ones(24, np.float32)
    bad["backbone.layers.0.mixer.D"] = np.ones(7, np.float32)
    safetensors.numpy.save_file(bad, file)
    with pytest.raises(ValueError) as caught:
        load_pretrained(tmp_path)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.strip() for line in lines) == [
        "missing: backbone.layers.1.mixer.A_log (48, 5)",
        "of shape (7,): backbone.layers.0.mixer.D, expected (48,)",
        "unexpected: backbone.layers.2.norm.weight (24,)",
    ]
    safetensors.numpy.save_file(good | {"lm_head.weight": np.ones((VOCABULARY, 24), np.float32)}, file)
    with pytest.raises(ValueError, match="ties the head"):
        load_pretrained(tmp_path)


def test_unknown_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no config"):
        load_pretrained(tmp_path)
    original = {"d_model": 8, "n_layer": 1, "vocab_size": 9}
    for config, match in (
        ({"model_type": "mamba2"}, "mamba2"),
        ({"model_type": "mamba", "hidden_act": "gelu"}, "hidden_act"),
        (original | {"rms_norm": False}, "rms_norm"),
        (original | {"ssm_cfg": {"layer": "Mamba2"}}, "Mamba2"),
        (original | {"attn_layer_idx": [0]}, "attn_layer_idx"),
        (original | {"ssm_cfg": {"ngroups": 2}}, "ngroups"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=match):
            load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(original))
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_pretrained(tmp_path)


def test_what_transformers_lacks_is_not_written(tmp_path: Path) -> None:
    config = MambaConfig(8, vocab_size=9, num_layers=1, inner_norm="scaled_rms")
    with pytest.raises(ValueError, match=r"scaled_rms.*Orbax"):
        save_pretrained(MambaLM(config, rngs=flax.nnx.Rngs(0)), tmp_path / "model")
    assert not (tmp_path / "model").exists()
