"""Times a Mamba block and a language model: training steps, and decoding against the roofline.

    python3 build/build.py bench --model [--d-model 768 --layers 24] [--batches 1 8] [--decode-batches 1 64]

The defaults are a model of 130M parameters in bfloat16 on a GPU, and a small one in float32 on a CPU. For each batch
size: tokens/s of a training step (AdamW) of the model and of one block, the share of it that the selective scans take,
run by themselves, and where the time goes by the profiler; tokens/s of decoding, and the time a step would take if it
only moved its memory, parameters and states, at the speed of a sweep over this device's memory. Writes model.json,
model.md and model.png.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import optax
from bench import machine
from flax import nnx
from matplotlib import pyplot as plt
from measure import Program, run_in_turns
from profile_step import large_transposes, time_by_kind

import jax_sscan
import jax_sscan.nnx
from jax_sscan.models import MambaConfig, MambaLM, generate, score
from jax_sscan.modules.mamba import inner_size

Row = dict[str, Any]


def compile_call(name: str, function: Any, *args: Any) -> tuple[Program, str]:
    """A program on these arguments, and its compiled HLO."""
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_s = time.perf_counter() - begin
    analysis = compiled.memory_analysis()
    temp = float("nan") if analysis is None else analysis.temp_size_in_bytes / 1e6
    return Program(name, name, lambda: compiled(*args), compile_s, temp), str(compiled.as_text())


def model_step(config: MambaConfig, batch: int, length: int) -> tuple[Program, str]:
    """One training step of the language model."""
    model = MambaLM(config, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    ids = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, config.vocab_size)

    def step(state: Any, ids: jax.Array) -> Any:
        model, optimizer = nnx.merge(graph, state)
        loss, gradients = nnx.value_and_grad(lambda model: -jnp.mean(score(model, ids)))(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss

    return compile_call("model", step, state, ids)


def block_step(config: MambaConfig, batch: int, length: int) -> tuple[Program, str]:
    """Forward and backward pass of one block, with the gradients of parameters and input."""
    layer = jax_sscan.nnx.Mamba(**config.block_options, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    shape = batch, length, config.d_model
    x, cotangent = (jax.random.normal(jax.random.key(k), shape, config.compute_dtype) for k in (1, 2))

    def weighted(state: Any, x: jax.Array) -> jax.Array:
        return jnp.sum((nnx.merge(graph, state)(x) * cotangent).astype(jnp.float32))

    return compile_call("block", jax.value_and_grad(weighted, argnums=(0, 1)), state, x)


def scan_step(config: MambaConfig, batch: int, length: int) -> tuple[Program, str]:
    """Forward and backward pass of one block's selective scan alone."""
    dim, n, dtype = inner_size(config), config.d_state, config.compute_dtype
    keys = jax.random.split(jax.random.key(0), 5)
    u, delta, z = (jax.random.normal(k, (batch, length, dim), dtype) for k in keys[:3])
    B, C = (jax.random.normal(k, (batch, length, n), dtype) for k in keys[3:])
    A = -jnp.broadcast_to(jnp.arange(1.0, n + 1), (dim, n))
    args = u, delta, A, B, C, jnp.ones(dim), z, jnp.full(dim, -4.0)
    scan = partial(jax_sscan.selective_scan, delta_softplus=True, layout="bld", implementation=config.implementation)

    def weighted(*args: jax.Array) -> jax.Array:
        out = scan(*args)
        assert isinstance(out, jax.Array)
        return jnp.sum(out.astype(jnp.float32))

    return compile_call("scan", jax.value_and_grad(weighted, argnums=tuple(range(len(args)))), *args)


def measure_training(config: MambaConfig, batch: int, length: int, repeats: int, budget_s: float) -> Row:
    """Of the model, one block and one scan at one batch size, run in turns."""
    (model, hlo), (block, block_hlo), (scan, _) = (
        make(config, batch, length) for make in (model_step, block_step, scan_step)
    )
    run_in_turns([model, block, scan], repeats, budget_s)
    kinds, longest = time_by_kind(model.call, hlo)
    tokens, activation = batch * length, batch * length * config.d_model
    return {
        "batch": batch,
        "length": length,
        "model_ms": model.median_ms,
        "model_tokens_per_s": 1e3 * tokens / model.median_ms,
        "block_ms": block.median_ms,
        "block_tokens_per_s": 1e3 * tokens / block.median_ms,
        "scan_ms": scan.median_ms,
        "scan_share_of_model": config.num_layers * scan.median_ms / model.median_ms,
        "scan_share_of_block": scan.median_ms / block.median_ms,
        "compile_s": model.compile_s,
        "temp_mb": model.temp_mb,
        "profile_ms": kinds,
        "longest_ms": longest,
        "large_transposes_in_block": large_transposes(block_hlo, activation),
    }


def copy_bytes_per_s() -> float:
    """How fast this device reads and writes memory: an array much larger than its caches, over and over in place."""
    size, rounds = 2**28 if jax.default_backend() == "gpu" else 2**26, 10
    x = jnp.zeros(size, jnp.float32)
    sweep = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, x: x + 1, x), donate_argnums=0)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        x = jax.block_until_ready(sweep(x))
        times.append(time.perf_counter() - begin)
    return 2 * rounds * x.nbytes / min(times)


def measure_decoding(model: MambaLM, batch: int, steps: int, repeats: int, bandwidth: float) -> Row:
    """A step of `generate`, greedy, after prompts of one token."""
    prompts = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def seconds(steps: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(generate(model, prompts, steps))
        return time.perf_counter() - begin

    for count in (2 * steps, steps):  # compiles
        seconds(count)
    # What it costs to start the program and to read the prompt cancels.
    step_s = min((seconds(2 * steps) - seconds(steps)) / steps for _ in range(repeats))
    cache = model.init_cache(batch)
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    if not model.config.tie_embeddings:
        parameter_bytes -= model.embedding[...].nbytes  # only a few of its rows are read
    moved = parameter_bytes + 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    return {
        "batch": batch,
        "step_ms": 1e3 * step_s,
        "tokens_per_s": batch / step_s,
        "moved_mb": moved / 1e6,
        "roofline_ms": 1e3 * moved / bandwidth,
        "of_roofline": moved / bandwidth / step_s,
    }


def to_markdown(result: dict[str, Any]) -> str:
    lines = [f"{result['model']}", "", "| batch × length | model ms | tokens/s | scans | block ms | tokens/s | scan |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in result["training"]:
        lines.append(
            f"| {row['batch']} × {row['length']} | {row['model_ms']:.1f} | {row['model_tokens_per_s']:,.0f} | "
            f"{row['scan_share_of_model']:.0%} | {row['block_ms']:.2f} | {row['block_tokens_per_s']:,.0f} | "
            f"{row['scan_share_of_block']:.0%} |"
        )
    for row in result["training"]:
        total = sum(row["profile_ms"].values())
        parts = ", ".join(f"{kind} {ms:.1f} ms ({ms / total:.0%})" for kind, ms in row["profile_ms"].items())
        count = len(row["large_transposes_in_block"])
        lines += ["", f"Profile of the step at batch {row['batch']}: {parts}. Transposes in the block's HLO: {count}."]
    lines += ["", f"Decoding; a sweep over memory moves {result['copy_gb_per_s']:.0f} GB/s here.", ""]
    lines += ["| batch | step ms | tokens/s | MB a step | roofline ms | of roofline |", "|---|---|---|---|---|---|"]
    for row in result["decoding"]:
        lines.append(
            f"| {row['batch']} | {row['step_ms']:.3f} | {row['tokens_per_s']:,.0f} | {row['moved_mb']:.1f} | "
            f"{row['roofline_ms']:.3f} | {row['of_roofline']:.0%} |"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    batches = [row["batch"] for row in result["training"]]
    left.plot(batches, [row["model_tokens_per_s"] for row in result["training"]], marker="o", label="training step")
    left.set(xlabel="batch", ylabel="tokens/s", title="training", xscale="log", yscale="log")
    batches = [row["batch"] for row in result["decoding"]]
    right.plot(batches, [row["tokens_per_s"] for row in result["decoding"]], marker="o", label="measured")
    ideal = [1e3 * row["batch"] / row["roofline_ms"] for row in result["decoding"]]
    right.plot(batches, ideal, linestyle="--", color="0.4", label="memory roofline")
    right.set(xlabel="batch", ylabel="tokens/s", title="decoding", xscale="log", yscale="log")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=768 if on_gpu else 256)
    parser.add_argument("--layers", type=int, default=24 if on_gpu else 4)
    parser.add_argument("--vocab", type=int, default=50280 if on_gpu else 4096)
    parser.add_argument("--length", type=int, default=1024 if on_gpu else 256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16] if on_gpu else [1, 4])
    parser.add_argument("--decode-batches", type=int, nargs="+", default=[1, 8, 64, 256] if on_gpu else [1, 16, 64])
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", help="of computation and of decoding")
    parser.add_argument("--scan-layers", action="store_true", help="the model's layers as one lax.scan")
    parser.add_argument("--remat", choices=["full", "keep_scans"])
    parser.add_argument("--implementation", help="of the scan; the platform's best by default")
    parser.add_argument("--decode-steps", type=int, default=200 if on_gpu else 50)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=20, help="seconds a program may take in all (default: 20)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    if args.quick:
        args.d_model, args.layers, args.vocab, args.length = 32, 2, 64, 32
        args.batches, args.decode_batches, args.decode_steps, args.repeats = [2], [2], 5, 2
    args.out.mkdir(parents=True, exist_ok=True)
    config = MambaConfig(
        args.d_model,
        num_layers=args.layers,
        vocab_size=args.vocab,
        dtype=jnp.dtype(args.dtype),
        scan_layers=args.scan_layers,
        remat=args.remat,
        implementation=args.implementation,
    )
    model = MambaLM(
        MambaConfig(args.d_model, num_layers=args.layers, vocab_size=args.vocab, param_dtype=jnp.dtype(args.dtype)),
        rngs=nnx.Rngs(0),
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    bandwidth = copy_bytes_per_s()
    result: dict[str, Any] = {
        "machine": machine(),
        "model": f"{size / 1e6:.1f}M parameters, d_model {args.d_model}, {args.layers} layers, {args.dtype}",
        "copy_gb_per_s": bandwidth / 1e9,
        "training": [],
        "decoding": [],
    }

    def write() -> None:  # after each batch size, so that a later one that fails loses nothing
        (args.out / "model.json").write_text(json.dumps(result, indent=1))
        (args.out / "model.md").write_text(to_markdown(result) + "\n")

    for batch in args.decode_batches:
        result["decoding"].append(measure_decoding(model, batch, args.decode_steps, min(args.repeats, 5), bandwidth))
        print({name: round(value, 3) for name, value in result["decoding"][-1].items()}, flush=True)
        write()
    for batch in args.batches:
        row = measure_training(config, batch, args.length, args.repeats, args.budget)
        result["training"].append(row)
        print({name: round(value, 3) for name, value in row.items() if isinstance(value, (int, float))}, flush=True)
        for name, ms in row["longest_ms"]:
            print(f"  {ms:9.3f} ms  {name[:100]}", flush=True)
        write()
    plot(result, args.out / "model.png")
    print(f"\n{result['machine']}\n\n{to_markdown(result)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
