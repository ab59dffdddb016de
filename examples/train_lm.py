"""Train a Mamba language model on text files, from scratch or from where the last run stopped.

    python examples/train_lm.py --text corpus.txt more/*.txt --tokenizer tokenizer.json
    python examples/train_lm.py                   # bytes of Python's own standard library

Computes in bfloat16 with float32 parameters, accumulates gradients over micro-batches (--accumulate), keeps the last
checkpoints with Orbax and goes on from the newest one in --out. In the end --out/model holds the model as transformers
and examples/generate.py load it; loss.png and losses.json tell how it went.
"""

import argparse
import json
import math
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jax_sscan.models import MambaConfig, MambaLM, save_pretrained, score

HELD_OUT = 0.05  # of the tokens, at the end
EVALUATION_BATCHES = 16
NOT_DECAYED = {"norm", "conv_bias", "dt_bias", "A_log", "D", "embedding"}


def read_tokens(paths: list[Path], tokenizer: Path | None) -> tuple[np.ndarray, int]:
    """The text of all files as tokens, and how many different tokens there are; bytes without a tokenizer."""
    if not paths:
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if tokenizer is None:
        return np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8).astype(np.int32), 256
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    ids = [np.asarray(encoder.encode(path.read_text(errors="replace")).ids, np.int32) for path in paths]
    return np.concatenate(ids), encoder.get_vocab_size()


def loss_of(model: MambaLM, batch: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats of predicting each token of (batch, length + 1) windows from those before it."""
    return -jnp.mean(score(model, batch))


@nnx.jit
def train_step(model: MambaLM, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    """One micro-batch; the optimizer updates the model when it has seen as many as it accumulates."""
    loss, gradients = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def evaluate(model: MambaLM, batches: jax.Array) -> jax.Array:
    """Mean loss over batches, (batches, batch, length + 1)."""
    return jnp.mean(jax.lax.map(lambda batch: loss_of(model, batch), batches))


def make_optimizer(model: MambaLM, args: argparse.Namespace) -> nnx.Optimizer:
    """AdamW on the mean gradient of the micro-batches; the learning rate warms up and then falls as a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(args.warmup, args.steps // 2), args.steps, end_value=0.1 * args.learning_rate
    )

    def is_decayed(params: Any) -> Any:
        def by_name(path: Any, _: Any) -> bool:
            return NOT_DECAYED.isdisjoint(getattr(key, "key", None) for key in path)

        return jax.tree_util.tree_map_with_path(by_name, params)

    adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=is_decayed)
    accumulated = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), adamw), args.accumulate)
    return nnx.Optimizer(model, accumulated.gradient_transformation(), wrt=nnx.Param)


def windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> jax.Array:
    """(..., length + 1) tokens from each start; inputs and targets overlap."""
    return jnp.asarray(tokens[starts[..., None] + np.arange(length + 1)])


def plot(path: Path, losses: dict[int, float], held_out: dict[int, float]) -> None:
    """Draws the learning curve."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(list(losses), list(losses.values()), color="C0", alpha=0.6, linewidth=1, label="training")
    axes.plot(list(held_out), list(held_out.values()), color="C1", marker="o", label="held out")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def train(
    model: MambaLM, tokens: np.ndarray, args: argparse.Namespace, console: Console
) -> tuple[dict[int, float], dict[int, float]]:
    """Trains the model, from the newest checkpoint on; returns training and held-out losses by step."""
    split = int(len(tokens) * (1 - HELD_OUT))
    training, held_out_tokens = tokens[:split], tokens[split:]
    if min(len(training), len(held_out_tokens)) <= args.length + 1:
        raise SystemExit(f"train_lm.py: {len(tokens)} tokens of text are too few for windows of {args.length}")
    starts = np.linspace(0, len(held_out_tokens) - args.length - 1, EVALUATION_BATCHES * args.batch).astype(int)
    held_out_batches = windows(held_out_tokens, starts.reshape(EVALUATION_BATCHES, args.batch), args.length)

    optimizer = make_optimizer(model, args)
    losses: dict[int, float] = {}
    held_out: dict[int, float] = {}
    first = 0
    record = args.out / "losses.json"
    with ocp.CheckpointManager(
        (args.out / "checkpoints").resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as checkpoints:
        if (latest := checkpoints.latest_step()) is not None:
            # Into the shapes, dtypes and shardings of the state that is there.
            state = nnx.state((model, optimizer))
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            nnx.update((model, optimizer), checkpoints.restore(latest, args=ocp.args.StandardRestore(abstract)))
            first = latest
            losses, held_out = (
                {int(step): loss for step, loss in curve.items() if int(step) <= first}
                for curve in json.loads(record.read_text()).values()
            )
            console.print(f"going on after step {first}")
        if not held_out:
            held_out[0] = float(evaluate(model, held_out_batches))
        tokens_a_step = args.accumulate * args.batch * args.length
        seconds, timed = 0.0, 0
        with Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[report]}"),
            TimeRemainingColumn(),
            console=console,
        ) as progress:
            bar = progress.add_task("training", total=args.steps, completed=first, report="compiling")
            for step in range(first + 1, args.steps + 1):
                begin = time.perf_counter()
                # Of the step's number alone, so that a run that was interrupted sees what it would have seen.
                random = np.random.default_rng((args.seed, step))
                chosen = random.integers(0, len(training) - args.length - 1, (args.accumulate, args.batch))
                micro = [train_step(model, optimizer, batch) for batch in windows(training, chosen, args.length)]
                losses[step] = float(jnp.mean(jnp.stack(micro)))
                if step > first + 1:  # the first one compiles
                    seconds, timed = seconds + time.perf_counter() - begin, timed + 1
                speed = f", {timed * tokens_a_step / seconds:,.0f} tokens/s" if timed else ""
                progress.update(bar, completed=step, report=f"{losses[step]:.3f} nats/token{speed}")
                is_last = step == args.steps
                if step % args.eval_every == 0 or is_last:
                    held_out[step] = float(evaluate(model, held_out_batches))
                    console.print(f"step {step}: training {losses[step]:.3f}{speed}; held out {held_out[step]:.3f}")
                if step % args.save_every == 0 or is_last:
                    record.write_text(json.dumps({"training": losses, "held_out": held_out}))
                    checkpoints.save(step, args=ocp.args.StandardSave(nnx.state((model, optimizer))))
    return losses, held_out


def main() -> None:
    """Trains, saves and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="text files (default: Python's library)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; bytes are the tokens without one")
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-state", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="sequences in a micro-batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="updates of the model (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=20, help="steps (default: %(default)s)")
    parser.add_argument("--eval-every", type=int, default=50, help="steps (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=100, help="steps (default: %(default)s)")
    parser.add_argument("--float32", action="store_true", help="compute in float32")
    parser.add_argument("--scan-layers", action="store_true", help="compile one layer instead of all")
    parser.add_argument("--remat", choices=["full", "keep_scans"], help="compute twice to save memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/train_lm"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    plt.switch_backend("Agg")
    console = Console(highlight=False)

    tokens, vocab_size = read_tokens(args.text, args.tokenizer)
    config = MambaConfig(
        args.d_model,
        num_layers=args.layers,
        d_state=args.d_state,
        vocab_size=vocab_size,
        dtype=jnp.float32 if args.float32 else jnp.bfloat16,
        scan_layers=args.scan_layers,
        remat=args.remat,
    )
    model = MambaLM(config, rngs=nnx.Rngs(args.seed))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    console.print(
        f"{len(tokens):,} tokens of {vocab_size}; {size:,} parameters; "
        f"{config.compute_dtype} on {jax.devices()[0].device_kind}"
    )
    losses, held_out = train(model, tokens, args, console)

    save_pretrained(model, args.out / "model")
    if args.tokenizer is not None:
        shutil.copy(args.tokenizer, args.out / "model/tokenizer.json")
    plot(args.out / "loss.png", losses, held_out)
    final = held_out[max(held_out)]
    console.print(f"held-out loss {final:.3f} nats/token, perplexity {math.exp(final):.2f}; wrote {args.out}")


if __name__ == "__main__":
    main()
