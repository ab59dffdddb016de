"""Train a small Mamba on the Python standard library's own source code, then let it write some.

A byte-level language model on text that every machine with Python has. The model is plain JAX, pure functions on a
dict of parameters, around `jax_sscan`: `selective_scan` and `causal_conv1d` read whole sequences, in training and in
the prompt; `selective_state_update` and `causal_conv1d_update` then write one byte at a time, from the state in which
the prompt left them. The learning curve and the sample go into --out.
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import jax.stages
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import jax_sscan

# The model
VOCABULARY = 256  # one token per byte
LAYERS = 2
D_MODEL = 96
D_INNER = 2 * D_MODEL  # channels of the scan
D_STATE = 8  # states per channel
D_CONV = 4  # taps of the convolution
DT_RANK = math.ceil(D_MODEL / 16)

# Its training
BATCH = 4
LENGTH = 256
LEARNING_RATE = 5e-3
WARMUP = 20  # steps
DECAYED = ("in_proj", "x_proj", "dt_proj", "out_proj")  # weight decay is for these matrices

# Its evaluation and its sample
WINDOWS = 64  # of LENGTH bytes of the held-out text, in batches of BATCH
EVALUATIONS = 10
PROMPT = b"class Stack:\n    def __init__(self"
SAMPLE_LENGTH = 600
TEMPERATURE = 0.8
TOLERANCE = 1e-3  # between logits of the scan and of the recurrent step

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib"}  # not the library proper
SKIPPED |= {"encodings", "pydoc_data"}  # tables and prose

Params = dict[str, Any]


class LayerState(NamedTuple):
    """What a layer remembers of the past: the last inputs of its convolution, and the state of its scan."""

    conv: jax.Array  # (batch, D_INNER, D_CONV - 1)
    scan: jax.Array  # (batch, D_INNER, D_STATE)


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


# ---- Model


def init_layer(key: jax.Array) -> Params:
    """Parameters of one Mamba block, initialised as in arXiv 2312.00752, section 3.6 and appendix E."""
    keys = jax.random.split(key, 6)

    def dense(key: jax.Array, fan_in: int, *shape: int, gain: float = 1.0) -> jax.Array:
        bound = gain / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    # Step sizes log-uniform in [0.001, 0.1], through the inverse of softplus.
    dt = jnp.exp(jax.random.uniform(keys[0], (D_INNER,), minval=math.log(1e-3), maxval=math.log(1e-1)))
    return {
        "norm": jnp.ones(D_MODEL),
        "in_proj": dense(keys[1], D_MODEL, D_MODEL, 2 * D_INNER),
        "conv_weight": dense(keys[2], D_CONV, D_INNER, D_CONV),
        "conv_bias": jnp.zeros(D_INNER),
        "x_proj": dense(keys[3], D_INNER, D_INNER, DT_RANK + 2 * D_STATE),
        "dt_proj": dense(keys[4], DT_RANK, DT_RANK, D_INNER),
        "dt_bias": dt + jnp.log(-jnp.expm1(-dt)),
        "A_log": jnp.log(jnp.tile(jnp.arange(1.0, D_STATE + 1), (D_INNER, 1))),  # A = -1, -2, ..., -D_STATE
        "D": jnp.ones(D_INNER),
        "out_proj": dense(keys[5], D_INNER, D_INNER, D_MODEL, gain=1 / math.sqrt(LAYERS)),
    }


def init_model(key: jax.Array) -> Params:
    """Parameters of the model."""
    key, *layer_keys = jax.random.split(key, LAYERS + 1)
    return {
        "embedding": 0.02 * jax.random.normal(key, (VOCABULARY, D_MODEL)),
        "layers": [init_layer(key) for key in layer_keys],
        "norm": jnp.ones(D_MODEL),
    }


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Scales x to a mean square of 1 over its channels."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale


def select(p: Params, u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What makes the scan selective: delta, B and C computed from the input."""
    dt, B, C = jnp.split(u @ p["x_proj"], [DT_RANK, DT_RANK + D_STATE], axis=-1)
    return dt @ p["dt_proj"], B, C


def layer_forward(p: Params, x: jax.Array) -> tuple[jax.Array, LayerState]:
    """A Mamba block on a sequence (batch, length, D_MODEL), and its state after the last position."""
    u, z = jnp.split(rms_norm(x, p["norm"]) @ p["in_proj"], 2, axis=-1)
    u, conv = jax_sscan.causal_conv1d(
        u, p["conv_weight"], p["conv_bias"], activation="silu", return_final_state=True, layout="bld"
    )
    delta, B, C = select(p, u)
    A = -jnp.exp(p["A_log"])
    y, scan = jax_sscan.selective_scan(
        u, delta, A, B, C, p["D"], z, p["dt_bias"], delta_softplus=True, return_last_state=True, layout="bld"
    )
    return x + y @ p["out_proj"], LayerState(conv, scan)


def layer_step(p: Params, state: LayerState, x: jax.Array) -> tuple[jax.Array, LayerState]:
    """The same block on the next position alone, (batch, D_MODEL)."""
    u, z = jnp.split(rms_norm(x, p["norm"]) @ p["in_proj"], 2, axis=-1)
    u, conv = jax_sscan.causal_conv1d_update(u, state.conv, p["conv_weight"], p["conv_bias"], activation="silu")
    delta, B, C = select(p, u)
    A = -jnp.exp(p["A_log"])
    y, scan = jax_sscan.selective_state_update(state.scan, u, delta, A, B, C, p["D"], z, p["dt_bias"], dt_softplus=True)
    return x + y @ p["out_proj"], LayerState(conv, scan)


@jax.jit
def forward(params: Params, tokens: jax.Array) -> tuple[jax.Array, list[LayerState]]:
    """Logits (batch, length, VOCABULARY) of what follows each token (batch, length), and the last state per layer."""
    x = params["embedding"][tokens]
    states = []
    for p in params["layers"]:
        x, state = layer_forward(p, x)
        states.append(state)
    return rms_norm(x, params["norm"]) @ params["embedding"].T, states


def step(params: Params, states: list[LayerState], token: jax.Array) -> tuple[jax.Array, list[LayerState]]:
    """Logits (batch, VOCABULARY) of what follows the next token (batch,), and the new state per layer."""
    x = params["embedding"][token]
    new_states = []
    for p, state in zip(params["layers"], states, strict=True):
        x, state = layer_step(p, state, x)
        new_states.append(state)
    return rms_norm(x, params["norm"]) @ params["embedding"].T, new_states


# ---- Training


def bits_per_byte(params: Params, batch: jax.Array) -> jax.Array:
    """Mean cross-entropy, in bits, of predicting each byte of the (batch, LENGTH + 1) windows from those before it."""
    logits, _ = forward(params, batch[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:].astype(jnp.int32))
    return jnp.mean(nats) / math.log(2)


@jax.jit
def evaluate(params: Params, batches: jax.Array) -> jax.Array:
    """Mean of `bits_per_byte` over batches."""
    return jnp.mean(jax.lax.map(lambda batch: bits_per_byte(params, batch), batches))


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW with gradient clipping; the learning rate warms up and then falls as a cosine."""
    warmup = min(WARMUP, steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup, steps, end_value=0.02 * LEARNING_RATE)

    def is_decayed(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=is_decayed)
    )


def make_train_step(optimizer: optax.GradientTransformation) -> jax.stages.Wrapped:
    """The jitted training step: random windows of the text, the loss on them and the update."""

    @jax.jit
    def train_step(params: Params, optimizer_state: Any, text: jax.Array, key: jax.Array):
        starts = jax.random.randint(key, (BATCH, 1), 0, len(text) - LENGTH)
        batch = text[starts + jnp.arange(LENGTH + 1)]
        loss, gradients = jax.value_and_grad(bits_per_byte)(params, batch)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, loss

    return train_step


def train(
    params: Params, training: jax.Array, held_out: jax.Array, steps: int, key: jax.Array, console: Console
) -> tuple[Params, list[float], dict[int, float]]:
    """Trains the model under a progress bar.

    Returns:
        The parameters, the training loss of each step, and the held-out loss after some numbers of steps.
    """
    optimizer = make_optimizer(steps)
    optimizer_state = optimizer.init(params)
    # Compiled ahead, so that the speed shown is the speed of training.
    with console.status("compiling"):
        train_step = make_train_step(optimizer).lower(params, optimizer_state, training, key).compile()
        held_out_losses = {0: float(evaluate(params, held_out))}
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
        bar = progress.add_task("training", total=steps, report="")
        for number in range(1, steps + 1):
            start = time.perf_counter()
            step_key = jax.random.fold_in(key, number)
            params, optimizer_state, loss = train_step(params, optimizer_state, training, step_key)
            losses.append(float(loss))
            seconds += time.perf_counter() - start
            recent = float(np.mean(losses[-20:]))
            report = f"{recent:.2f} bits/byte, {number * BATCH * LENGTH / seconds:,.0f} tokens/s"
            progress.update(bar, completed=number, report=report)
            if number in evaluated:
                held_out_losses[number] = float(evaluate(params, held_out))
                console.print(f"step {number:4d}: training {report}; held out {held_out_losses[number]:.3f} bits/byte")
    return params, losses, held_out_losses


# ---- Generation


@jax.jit
def replay(params: Params, states: list[LayerState], tokens: jax.Array) -> jax.Array:
    """The logits of `forward` on tokens (batch, length), by one recurrent step per token."""

    def body(states: list[LayerState], token: jax.Array) -> tuple[list[LayerState], jax.Array]:
        logits, states = step(params, states, token)
        return states, logits

    _, logits = jax.lax.scan(body, states, tokens.T)
    return logits.swapaxes(0, 1)


def check_recurrence(params: Params, tokens: jax.Array) -> float:
    """The largest difference between the logits of one `forward`, and of half of it continued by recurrent steps."""
    half = tokens.shape[1] // 2
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs round the factors of a product otherwise
        logits, _ = forward(params, tokens)
        _, states = forward(params, tokens[:, :half])
        replayed = replay(params, states, tokens[:, half:])
    return float(jnp.max(jnp.abs(replayed - logits[:, half:])))


@jax.jit
def generate(params: Params, prompt: jax.Array, key: jax.Array) -> jax.Array:
    """SAMPLE_LENGTH tokens drawn one after the other after each prompt (batch, length)."""

    def draw(key: jax.Array, logits: jax.Array) -> jax.Array:
        return jax.random.categorical(key, logits / TEMPERATURE)

    def body(carry: tuple[list[LayerState], jax.Array], key: jax.Array):
        states, token = carry
        logits, states = step(params, states, token)
        return (states, draw(key, logits)), token

    first_key, *keys = jax.random.split(key, SAMPLE_LENGTH + 1)
    logits, states = forward(params, prompt)
    _, tokens = jax.lax.scan(body, (states, draw(first_key, logits[:, -1])), jnp.stack(keys))
    return tokens.T


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
    params = init_model(init_key)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    console.print(f"text: {len(training) / 1e6:.1f} MB to train on, {len(held_out) / 1e6:.1f} MB in held-out files")
    console.print(f"model: {LAYERS} Mamba layers of {D_INNER} channels × {D_STATE} states, {size:,} parameters")

    params, losses, held_out_losses = train(
        params, jnp.asarray(training), held_out_windows, args.steps, train_key, console
    )
    final = held_out_losses[args.steps]
    console.print(
        f"held-out loss: {final:.3f} bits/byte, {final / unigram:.0%} of the unigram entropy of {unigram:.3f} bits/byte"
    )

    difference = check_recurrence(params, held_out_windows[0])
    if not difference < TOLERANCE:  # so that NaN fails too
        raise SystemExit(f"demo.py: the recurrent step's logits differ from the scan's by {difference:.2g}")
    console.print(f"recurrent step and scan agree: their logits differ by at most {difference:.2g}")

    prompt = jnp.frombuffer(PROMPT, jnp.uint8)[None]
    continuation = bytes(np.asarray(generate(params, prompt, sample_key)[0], np.uint8))
    sample = (PROMPT + continuation).decode(errors="replace")
    console.rule("sample")
    console.print(sample, markup=False, soft_wrap=True)
    console.rule()

    plot(args.out / "loss.png", losses, held_out_losses, unigram)
    (args.out / "sample.txt").write_text(sample, encoding="utf-8")
    console.print(f"wrote {args.out / 'loss.png'} and {args.out / 'sample.txt'}")
    console.print(f"{args.steps} steps, {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
