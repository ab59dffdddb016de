"""How a training step gets faster with devices: data, channel and sequence parallelism, and what communication takes.

    python3 build/build.py bench --parallel [--devices 2] [--batch 8 --length 4096 --d-model 1024 --layers 8]

A step is that of a language model (`jax_sscan.models.MambaLM`): loss, gradients and AdamW, divided by its option
``shard`` and by nothing else; one device runs the plain step. Strong scaling divides one problem among the devices;
weak scaling gives each device what it has when all of them share that problem. The communication share compares with
the same work on the same devices at the same time, in which every device trains a model of its own; with the length
divided it holds the second runs of the forward kernel too, which a device by itself does not need. Runs on all GPUs, or
on virtual CPU devices, which share the cores: there the times say little, but the communicated bytes mean the same.
Writes parallel.json and parallel.md.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from measure import Program, run_in_turns

from jax_sscan.models import MambaConfig, MambaLM, Shard

Sizes = dict[str, int]  # batch, length, d_inner, vocab_size

KINDS = {
    "data": (Shard(batch="part"), ("batch",)),
    "channel": (Shard(channels="part", vocabulary="part"), ("d_inner", "vocab_size")),
    "sequence": (Shard(length="part"), ("length",)),
}
"""The kinds of parallelism, and which sizes each divides."""

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


def training(sizes: Sizes, shard: Shard, options: dict[str, Any]) -> tuple[Callable[..., Any], Any, Any]:
    """A training step, the state of model and optimizer, and random tokens."""
    config = MambaConfig(**options, d_inner=sizes["d_inner"], vocab_size=sizes["vocab_size"], shard=shard)
    model = MambaLM(config, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def loss_of(model: MambaLM, ids: jax.Array, targets: jax.Array) -> jax.Array:
        logits = model(ids)
        right = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits * right, axis=-1))

    def step(state: Any, ids: jax.Array, targets: jax.Array) -> tuple[jax.Array, Any]:
        model, optimizer = nnx.merge(graph, state)
        loss, gradients = nnx.value_and_grad(loss_of)(model, ids, targets)
        optimizer.update(model, gradients)
        return loss, nnx.state((model, optimizer))

    rng = np.random.default_rng(0)
    ids = rng.integers(sizes["vocab_size"], size=(2, sizes["batch"], sizes["length"])).astype(np.int32)
    return step, state, ids


def together(kind: str, local: Sizes, devices: int, options: dict[str, Any]) -> tuple[Program, float]:
    """A step of ``devices`` that share a problem, ``local`` on each, and what one of them communicates in MB."""
    shard, divides = KINDS[kind] if devices > 1 else (Shard(), ())
    sizes = {name: size * devices if name in divides else size for name, size in local.items()}
    mesh = jax.make_mesh((devices,), ("part",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        step, state, (ids, targets) = training(sizes, shard, options)
        rows = NamedSharding(mesh, shard.spec("batch", "length"))
        return compile_step(kind, "step", step, state, *jax.device_put((ids, targets), rows))


def apart(kind: str, local: Sizes, devices: int, options: dict[str, Any]) -> tuple[Program, float]:
    """The same work, ``local`` on each device, each with a model of its own: sums are over the one device of a part."""
    mesh = jax.make_mesh(
        (devices, 1), ("copy", "part"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices]
    )
    with jax.set_mesh(mesh):
        step, state, ids = training(local, KINDS[kind][0], options)

        def own_step(*arguments: Any) -> Any:
            results = step(*jax.tree.map(lambda x: x[0], arguments))
            return jax.tree.map(lambda x: x[None], results)

        each = jax.shard_map(own_step, in_specs=P("copy"), out_specs=P("copy"), check_vma=False)
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *x.shape)), (state, *ids))
        return compile_step(kind, "step apart", each, *jax.device_put(copies, NamedSharding(mesh, P("copy"))))


def compile_step(kind: str, name: str, step: Callable[..., Any], *arguments: Any) -> tuple[Program, float]:
    begin = time.perf_counter()
    compiled = jax.jit(step).lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    return Program(kind, name, partial(compiled, *arguments), seconds, float("nan")), communicated_mb(compiled)


def communicated_mb(compiled: Any) -> float:
    """The size of the results of all collective operations on one device."""
    collective = re.compile(
        r"= (.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-done)?\("
    )
    total = 0
    for shapes in collective.findall(compiled.as_text()):
        for name, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            total += BYTES[name] * int(np.prod([int(n) for n in sizes.split(",") if n], dtype=np.int64))
    return total / 1e6


def part_of(sizes: Sizes, kind: str, devices: int) -> Sizes:
    """One of ``devices`` equal parts."""
    divides = KINDS[kind][1]
    for name in divides:
        if sizes[name] % devices:
            raise SystemExit(f"{kind} parallelism over {devices} devices must divide {name}, got {sizes[name]}")
    return {name: size // devices if name in divides else size for name, size in sizes.items()}


def measure(
    sizes: Sizes, counts: list[int], options: dict[str, Any], repeats: int, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        for scaling in ("strong", "weak"):
            alone_ms = None
            for devices in counts:
                local = part_of(sizes, kind, devices if scaling == "strong" else counts[-1])
                step, communicated = together(kind, local, devices, options)
                own = apart(kind, local, devices, options)[0] if devices > 1 else step
                run_in_turns([step, own] if devices > 1 else [step], repeats, budget_s=20)
                ms, own_ms = step.median_ms, own.median_ms
                alone_ms = alone_ms or ms
                ideal = alone_ms / devices if scaling == "strong" else alone_ms
                rows.append(
                    {
                        "parallelism": kind,
                        "scaling": scaling,
                        "devices": devices,
                        "local": local,
                        "ms": ms,
                        "efficiency": ideal / ms,
                        "communication": max(0.0, 1 - own_ms / ms),
                        "communicated_mb": communicated,
                    }
                )
                report(table(rows[-1:]).splitlines()[-1])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| parallelism | scaling | devices | batch, length, channels of one | ms | efficiency | communication | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        local = ", ".join(str(row["local"][name]) for name in ("batch", "length", "d_inner"))
        lines.append(
            f"| {row['parallelism']} | {row['scaling']} | {row['devices']} | {local} | {row['ms']:.2f} | "
            f"{row['efficiency']:.0%} | {row['communication']:.0%} | {row['communicated_mb']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, help="at most that many; all GPUs, or 8 virtual CPU devices")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, help="4096, or 256 on CPUs")
    parser.add_argument("--d-model", type=int, help="1024, or 64 on CPUs; twice as many channels")
    parser.add_argument("--layers", type=int, help="8, or 2 on CPUs")
    parser.add_argument("--vocabulary", type=int, help="32768, or 512 on CPUs")
    parser.add_argument("--dtype", help="bfloat16, or float32 on CPUs; parameters are float32")
    parser.add_argument("--implementation", choices=("cuda", "cpu", "xla"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    # Only of use without a GPU, and to be said before JAX starts.
    jax.config.update("jax_num_cpu_devices", args.devices or 8)
    small = jax.default_backend() == "cpu"
    sizes = {
        "batch": args.batch,
        "length": args.length or (256 if small else 4096),
        "d_inner": 2 * (args.d_model or (64 if small else 1024)),
        "vocab_size": args.vocabulary or (512 if small else 32768),
    }
    options = {
        "d_model": sizes["d_inner"] // 2,
        "num_layers": args.layers or (2 if small else 8),
        "dtype": jnp.dtype(args.dtype or ("float32" if small else "bfloat16")),
        "implementation": args.implementation,
    }
    most = min(args.devices or jax.device_count(), jax.device_count())
    counts = [2**i for i in range(most.bit_length())]
    print(f"{most} devices: {jax.devices()[0].device_kind}, jax {jax.__version__}; {sizes}, {options}")
    rows = measure(sizes, counts, options, args.repeats, lambda line: print(line, flush=True))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "parallel.json").write_text(json.dumps(rows, indent=1))
    (args.out / "parallel.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
