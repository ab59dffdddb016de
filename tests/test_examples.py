"""The example programs run, and training goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *args: str | Path) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    run("train_lm.py", *options, "--out", out)
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


def test_text_is_streamed_in_whole_characters(tmp_path: Path) -> None:
    """By bytes and by a byte-level tokenizer, both of which cut characters into several tokens."""
    spec = importlib.util.spec_from_file_location("generate_example", EXAMPLES / "generate.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
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
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(SystemExit, match="does not read bytes"):
        example.text_codec(tmp_path, 300)
