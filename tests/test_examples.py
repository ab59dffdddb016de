"""The example programs run, and training goes on where it stopped."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jax_sscan.models import MambaConfig, MambaLM, generate, save_pretrained

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *args: str | Path) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(script: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"{script}_example", EXAMPLES / f"{script}.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def small_model(vocab_size: int = 256) -> MambaLM:
    return MambaLM(MambaConfig(12, vocab_size=vocab_size, num_layers=2, d_state=3), rngs=flax.nnx.Rngs(0))


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """GPUs round the factors of float32 products otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


def test_demo(tmp_path: Path) -> None:
    """It checks itself that scan and recurrent step agree."""
    printed = run("demo.py", "--steps", "3", "--out", tmp_path)
    assert "recurrent step and scan agree" in printed
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert (tmp_path / "sample.txt").read_text().startswith("class Stack:")


def test_training_stops_goes_on_and_generates(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint ends with the same bits as one that was never stopped."""
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    size = ["--d-model", "16", "--layers", "2", "--d-state", "4", "--batch", "2", "--length", "24"]
    options = ["--text", tmp_path / "a.txt", *size, "--steps", "6", "--eval-every", "2", "--save-every", "3"]
    out = tmp_path / "out"
    printed = run("train_lm.py", *options, "--out", out)
    assert "; bfloat16 on " in printed and " tokens/s; held out " in printed
    assert (out / "loss.png").stat().st_size > 1000
    losses, weights = (out / "losses.json").read_text(), (out / "model/model.safetensors").read_bytes()
    curve = json.loads(losses)
    assert set(curve["training"]) == set("123456") and set(curve["held_out"]) == set("0246")
    assert curve["held_out"]["6"] < curve["held_out"]["0"]
    shutil.rmtree(out / "checkpoints/6")
    shutil.rmtree(out / "model")
    assert "going on after step 3" in run("train_lm.py", *options, "--out", out)
    assert (out / "losses.json").read_text() == losses
    assert (out / "model/model.safetensors").read_bytes() == weights
    printed = run("generate.py", out / "model", "--prompt", "the ", "--max-new-tokens", "8", "--top-k", "5")
    assert printed.startswith("the ") and len(printed) > len("the \n")


def test_text_is_streamed_in_whole_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes and by a byte-level tokenizer, both of which cut characters into several tokens."""
    example = load("generate")
    text = "déjà vu: Δ, σ and 漢字"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["and and and"], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet))
    for vocab_size in (256, tokenizer.get_vocab_size()):
        encode, decode = example.text_codec(tmp_path, vocab_size)
        ids = encode(text)
        pieces = list(decode(iter(ids)))
        assert "".join(pieces) == text
        assert len(text) / 2 < sum(map(bool, pieces)) < len(ids)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(text)
    read, size = load("train_lm").read_tokens([tmp_path / "a.txt"], tmp_path / "tokenizer.json")
    assert (read.tolist(), size) == (ids, tokenizer.get_vocab_size())
    # The whole program, and without the package.
    save_pretrained(small_model(vocab_size=size), tmp_path)
    printed = run("generate.py", tmp_path, "--prompt", "and then", "--max-new-tokens", "20")
    assert printed.startswith("and then") and len(printed) > len("and then\n")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(SystemExit, match="pip install tokenizers"):
            example.text_codec(tmp_path, size)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(SystemExit, match="does not read bytes"):
        example.text_codec(tmp_path, 300)


def test_what_is_streamed_is_what_generate_returns() -> None:
    """And the end of a text ends it."""
    example, model = load("generate"), small_model()
    model.embedding[...] = 8 * model.embedding[...]
    prompt = [5, 6, 7]
    expected = generate(model, jnp.array([prompt]), 8)[0, 3:].tolist()
    stream = lambda: list(example.stream(model, prompt, 8, jax.random.key(0), temperature=0.0))  # noqa: E731
    assert stream() == expected
    stop = expected[4]
    for stops in (stop, (stop, 300)):
        model.config.eos_token_id = stops
        assert stream() == expected[: expected.index(stop)]


def test_accumulated_gradients_are_those_of_the_larger_batch() -> None:
    example = load("train_lm")
    batch = jax.random.randint(jax.random.key(0), (4, 9), 0, 256)
    results = []
    for accumulate in (1, 2):
        model = small_model()
        args = argparse.Namespace(accumulate=accumulate, learning_rate=1e-2, warmup=0, steps=10)
        optimizer = example.make_optimizer(model, args)
        before = flax.nnx.to_pure_dict(flax.nnx.state(model))
        for micro in jnp.split(batch, accumulate):
            now = flax.nnx.to_pure_dict(flax.nnx.state(model))
            jax.tree.map(np.testing.assert_array_equal, now, before)  # no update in between
            example.train_step(model, optimizer, micro)
        results.append(flax.nnx.to_pure_dict(flax.nnx.state(model)))
    # Adam's first step is the sign of the gradient: the smallest ones are noise.
    differences = jax.tree.map(lambda a, b: jnp.mean(jnp.abs(a - b) > 1e-4), *results)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), results[0], before)
    assert max(jax.tree.leaves(differences)) < 0.01 and min(jax.tree.leaves(moved)) > 1e-3
