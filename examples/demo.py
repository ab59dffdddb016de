"""Train a small Mamba on the Python standard library's own source code, then let it write some.

A byte-level language model, `jax_sscan.models.MambaLM`, on text that every machine with Python has. It reads whole
sequences by the selective scan, in training and in the prompt, and then writes one byte at a time, from the state in
which the prompt left it. The learning curve and the sample go into --out.
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import jax_sscan
from jax_sscan.models import MambaConfig, MambaLM, generate, score

# The model
VOCABULARY = 256  # one token per byte
CONFIG = MambaConfig(d_model=96, num_layers=2, d_state=8, vocab_size=VOCABULARY)

# Its training
BATCH = 4
LENGTH = 256
LEARNING_RATE = 5e-3
WARMUP = 20  # steps
DECAYED = {"in_proj", "z_proj", "x_proj", "dt_proj", "out_proj"}  # weight decay is for these matrices

# Its evaluation and its sample
WINDOWS = 64  # of LENGTH bytes of the held-out text, in batches of BATCH
EVALUATIONS = 10
PROMPT = b"class Stack:\n    def __init__(self"
SAMPLE_LENGTH = 600
TEMPERATURE = 0.8
TOLERANCE = 1e-3  # between logits of the scan and of the recurrent step

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib"}  # not the library proper
SKIPPED |= {"encodings", "pydoc_data"}  # tables and prose

# ---- Text


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the standard library's modules: the text to train on, and whole files held out from it."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if SKIPPED.isdisjoint(p.relative_to(root).parts))
    held_out = files[9::20]
    training = sorted(set(files) - set(held_out))
    if not held_out:
        raise SystemExit(f"demo.py: no standard library in source form under {root}")
    as_bytes = [np.frombuffer(b"".join(p.read_bytes() for p in part), np.uint8) for part in (training, held_out)]
    return as_bytes[0], as_bytes[1]


def windows(text: np.ndarray) -> jax.Array:
    """(batches, BATCH, LENGTH + 1) bytes in windows spread evenly over the text; inputs and targets overlap."""
    starts = np.linspace(0, len(text) - LENGTH - 1, WINDOWS).astype(int)
    return jnp.asarray(text[starts[:, None] + np.arange(LENGTH + 1)].reshape(-1, BATCH, LENGTH + 1))


def unigram_entropy(training: np.ndarray, held_out: np.ndarray) -> float:
    """Bits per byte of the held-out text, if each byte is predicted with its frequency in the training text."""
    counts = np.bincount(training, minlength=VOCABULARY) + 1  # no byte is impossible
    return float(-np.mean(np.log2(counts / counts.sum())[held_out]))


# ---- Training


def bits_per_byte(model: MambaLM, batch: jax.Array) -> jax.Array:
    """Mean cross-entropy, in bits, of predicting each byte of the (batch, LENGTH + 1) windows from those before it."""
    return -jnp.mean(score(model, batch.astype(jnp.int32))) / math.log(2)


@nnx.jit
def evaluate(model: MambaLM, batches: jax.Array) -> jax.Array:
    """Mean of `bits_per_byte` over batches."""
    return jnp.mean(jax.lax.map(lambda batch: bits_per_byte(model, batch), batches))


def make_optimizer(model: MambaLM, steps: int) -> nnx.Optimizer:
    """AdamW with gradient clipping; the learning rate warms up and then falls as a cosine."""
    warmup = min(WARMUP, steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup, steps, end_value=0.02 * LEARNING_RATE)

    def is_decayed(params: Any) -> Any:
        def by_name(path: Any, _: Any) -> bool:
            return not DECAYED.isdisjoint(getattr(key, "key", None) for key in path)

        return jax.tree_util.tree_map_with_path(by_name, params)

    adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=is_decayed)
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adamw), wrt=nnx.Param)


@nnx.jit
def train_step(model: MambaLM, optimizer: nnx.Optimizer, text: jax.Array, key: jax.Array) -> jax.Array:
    """Updates the model on random windows of the text, and returns the loss on them before the update."""
    starts = jax.random.randint(key, (BATCH, 1), 0, len(text) - LENGTH)
    batch = text[starts + jnp.arange(LENGTH + 1)]
    loss, gradients = nnx.value_and_grad(bits_per_byte)(model, batch)
    optimizer.update(model, gradients)
    return loss


def train(
    model: MambaLM, training: jax.Array, held_out: jax.Array, steps: int, key: jax.Array, console: Console
) -> tuple[list[float], dict[int, float]]:
    """Trains the model under a progress bar.

    Returns:
        The training loss of each step, and the held-out loss after some numbers of steps.
    """
    optimizer = make_optimizer(model, steps)
    held_out_losses = {0: float(evaluate(model, held_out))}
    evaluated = {round(steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    losses: list[float] = []
    seconds = 0.0
    with Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[report]}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("training", total=steps, report="compiling")
        for number in range(1, steps + 1):
            start = time.perf_counter()
            losses.append(float(train_step(model, optimizer, training, jax.random.fold_in(key, number))))
            if number > 1:  # the first step compiles
                seconds += time.perf_counter() - start
            speed = f", {(number - 1) * BATCH * LENGTH / seconds:,.0f} tokens/s" if seconds else ""
            report = f"{float(np.mean(losses[-20:])):.2f} bits/byte{speed}"
            progress.update(bar, completed=number, report=report)
            if number in evaluated:
                held_out_losses[number] = float(evaluate(model, held_out))
                console.print(f"step {number:4d}: training {report}; held out {held_out_losses[number]:.3f} bits/byte")
    return losses, held_out_losses


# ---- Generation


@nnx.jit
def check_recurrence(model: MambaLM, tokens: jax.Array) -> jax.Array:
    """The largest difference between the logits of one pass, and of half of it continued by recurrent steps."""
    half = tokens.shape[1] // 2

    def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        logits, cache = model(token[:, None], cache, return_cache=True)
        return cache, logits[:, 0]

    with jax.default_matmul_precision("highest"):  # GPUs and TPUs round the factors of a product otherwise
        logits = model(tokens)
        _, cache = model(tokens[:, :half], return_cache=True)
        _, replayed = jax.lax.scan(step, cache, tokens[:, half:].T)
    return jnp.max(jnp.abs(replayed.swapaxes(0, 1) - logits[:, half:]))


# ---- Report


def describe_implementations() -> str:
    """Which implementation of the scan runs on the default backend, and why others do not."""
    backend = jax.extend.backend.get_backend()
    platform = backend.platform
    if platform == "gpu":  # JAX's one name for two
        platform = "rocm" if "rocm" in backend.platform_version else "cuda"
    found = jax_sscan.implementations()
    running = next(name for name, one in found.items() if platform in one.default_for)
    lines = [f"selective_scan runs its implementation {running!r} on {platform}"]
    lines += [f"  {name!r} is missing: {one.reason}" for name, one in found.items() if not one.available]
    return "\n".join(lines)


def plot(path: Path, losses: list[float], held_out_losses: dict[int, float], unigram: float) -> None:
    """Draws the learning curve."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="C0", alpha=0.5, linewidth=1, label="training")
    axes.plot(list(held_out_losses), list(held_out_losses.values()), color="C1", marker="o", label="held out")
    axes.axhline(unigram, color="0.4", linestyle="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None), title="A small Mamba on Python's standard library")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Trains, checks, samples and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is random (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="directory for loss.png and sample.txt (%(default)s)"
    )
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    plt.switch_backend("Agg")
    console = Console(highlight=False)
    began = time.perf_counter()

    console.print(describe_implementations(), markup=False, soft_wrap=True)
    training, held_out = read_text()
    held_out_windows = windows(held_out)
    unigram = unigram_entropy(training, np.asarray(held_out_windows[..., 1:]))
    init_key, train_key, sample_key = jax.random.split(jax.random.key(args.seed), 3)
    model = MambaLM(CONFIG, rngs=nnx.Rngs(init_key))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    console.print(f"text: {len(training) / 1e6:.1f} MB to train on, {len(held_out) / 1e6:.1f} MB in held-out files")
    channels = int(CONFIG.expand * CONFIG.d_model)
    console.print(
        f"model: {CONFIG.num_layers} Mamba layers of {channels} channels × {CONFIG.d_state} states, {size:,} parameters"
    )

    losses, held_out_losses = train(model, jnp.asarray(training), held_out_windows, args.steps, train_key, console)
    final = held_out_losses[args.steps]
    console.print(
        f"held-out loss: {final:.3f} bits/byte, {final / unigram:.0%} of the unigram entropy of {unigram:.3f} bits/byte"
    )

    difference = float(check_recurrence(model, held_out_windows[0].astype(jnp.int32)))
    if not difference < TOLERANCE:  # so that NaN fails too
        raise SystemExit(f"demo.py: the recurrent step's logits differ from the scan's by {difference:.2g}")
    console.print(f"recurrent step and scan agree: their logits differ by at most {difference:.2g}")

    prompt = jnp.frombuffer(PROMPT, jnp.uint8)[None].astype(jnp.int32)
    written = generate(model, prompt, SAMPLE_LENGTH, temperature=TEMPERATURE, key=sample_key)
    sample = bytes(np.asarray(written[0], np.uint8)).decode(errors="replace")
    console.rule("sample")
    console.print(sample, markup=False, soft_wrap=True)
    console.rule()

    plot(args.out / "loss.png", losses, held_out_losses, unigram)
    (args.out / "sample.txt").write_text(sample, encoding="utf-8")
    console.print(f"wrote {args.out / 'loss.png'} and {args.out / 'sample.txt'}")
    console.print(f"{args.steps} steps, {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
