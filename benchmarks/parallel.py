"""How a step gets faster with devices: data, channel and sequence parallelism, and what communication takes of it.

    python3 build/build.py bench --parallel [--devices 8] [--shape 8,512,4096,16] [--implementation cuda]

A step is the causal convolution and the scan after it, forward and backward, float32 random data, layout "bld", with
softplus, bias, D and gate. Strong scaling divides one shape among the devices; weak scaling gives each device what it
has when all of them share it. The communication share compares with the same work on the same devices at the same time,
in which every device keeps its results to itself. Runs on all GPUs, or on virtual CPU devices, which share the cores:
there the times say little, but the communicated bytes mean the same. Writes parallel.json and parallel.md.
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
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from measure import Program, run_in_turns
from methods import Shape

import jax_sscan

WIDTH = 4
AXES = {"data": 0, "channel": 1, "sequence": 2}
"""The kinds of parallelism, and which entry of a shape each divides."""

# Axes of each operand: batch, length, dim, state, width.
OPERANDS = {
    "u": "bld", "delta": "bld", "A": "dn", "B": "bln", "C": "bln", "D": "d", "z": "bld", "delta_bias": "d",
    "weight": "dw",
}  # fmt: skip
LETTER = {"data": "b", "channel": "d", "sequence": "l"}


def operands(kind: str, shape: Shape, copies: int) -> tuple[jax.Array, ...]:
    """Random operands of ``copies`` shapes beside each other along the divided axis; shared ones once for each copy."""
    batch, dim, length, dstate = shape
    sizes = {"b": batch, "d": dim, "l": length, "n": dstate, "w": WIDTH}
    sizes[LETTER[kind]] *= copies
    rng = np.random.default_rng(0)
    arrays = []
    for name, axes in OPERANDS.items():
        x = rng.standard_normal([sizes[axis] for axis in axes]).astype(np.float32)
        x = -np.exp(x) if name == "A" else x
        arrays.append(x if LETTER[kind] in axes else np.broadcast_to(x, (copies, *x.shape)))
    return tuple(map(jnp.asarray, arrays))


def compile_step(
    kind: str, local: Shape, devices: int, shares: bool, implementation: str | None
) -> tuple[Program, float]:
    """A step of ``devices`` devices with ``local`` on each, and what one of them communicates in MB.

    If not ``shares``, each device works on a problem of its own.
    """
    copies = 1 if shares else devices
    mesh = jax.make_mesh(
        (copies, devices // copies), ("copy", "part"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices]
    )
    whole = list(local)
    whole[AXES[kind]] *= devices // copies
    batch, dim, length, dstate = whole
    arguments = operands(kind, (batch, dim, length, dstate), copies)
    is_divided = [LETTER[kind] in axes for axes in OPERANDS.values()]
    specs = tuple(
        P(*(("copy", "part") if axis == LETTER[kind] else None for axis in axes)) if divided else P("copy")
        for axes, divided in zip(OPERANDS.values(), is_divided, strict=True)
    )
    axis_name = "part" if kind == "sequence" else None

    def loss(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, weight: Any) -> jax.Array:
        u = jax_sscan.causal_conv1d(u, weight, activation="silu", layout="bld", axis_name=axis_name)
        out = jax_sscan.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, True, layout="bld", axis_name=axis_name, implementation=implementation
        )
        assert isinstance(out, jax.Array)
        return jnp.sum(out**2)

    def step(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        own = [x if divided else x[0] for x, divided in zip(arguments, is_divided, strict=True)]
        gradients = jax.grad(loss, argnums=tuple(range(len(own))))(*own)
        return tuple(x if divided else x[None] for x, divided in zip(gradients, is_divided, strict=True))

    placed = jax.device_put(arguments, tuple(NamedSharding(mesh, spec) for spec in specs))
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs))
    begin = time.perf_counter()
    compiled = run.lower(*placed).compile()
    seconds = time.perf_counter() - begin
    name = "step" if shares else "step without communication"
    return Program(kind, name, partial(compiled, *placed), seconds, float("nan")), communicated_mb(compiled)


def communicated_mb(compiled: Any) -> float:
    """The size of the results of all collective operations on one device."""
    collective = re.compile(
        r"= (.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    )
    total = 0
    for shapes in collective.findall(compiled.as_text()):
        for sizes in re.findall(r"[fs]32\[([\d,]*)\]", shapes):
            total += 4 * int(np.prod([int(n) for n in sizes.split(",") if n], dtype=np.int64))
    return total / 1e6


def local_shape(shape: Shape, kind: str, devices: int) -> Shape:
    """``shape`` divided among ``devices``."""
    sizes = list(shape)
    if sizes[AXES[kind]] % devices:
        raise SystemExit(f"{devices} devices do not divide {kind} parallelism's axis of {shape}")
    sizes[AXES[kind]] //= devices
    batch, dim, length, dstate = sizes
    return batch, dim, length, dstate


def measure(
    shape: Shape, counts: list[int], implementation: str | None, repeats: int, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    rows = []
    for kind in AXES:
        smallest = local_shape(shape, kind, counts[-1])
        for scaling in ("strong", "weak"):
            alone_ms = None
            for devices in counts:
                local = local_shape(shape, kind, devices) if scaling == "strong" else smallest
                together, communicated = compile_step(kind, local, devices, True, implementation)
                apart, _ = compile_step(kind, local, devices, False, implementation)
                run_in_turns([together, apart], repeats, budget_s=20)
                ms, apart_ms = together.median_ms, apart.median_ms
                alone_ms = alone_ms or ms
                ideal = alone_ms / devices if scaling == "strong" else alone_ms
                rows.append(
                    {
                        "parallelism": kind,
                        "scaling": scaling,
                        "devices": devices,
                        "local_shape": local,
                        "ms": ms,
                        "efficiency": ideal / ms,
                        "communication": max(0.0, 1 - apart_ms / ms) if devices > 1 else 0.0,
                        "communicated_mb": communicated if devices > 1 else 0.0,
                    }
                )
                report(table(rows[-1:]).splitlines()[-1])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| parallelism | scaling | devices | (batch, dim, length, dstate) | ms | efficiency | communication | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        local = ", ".join(map(str, row["local_shape"]))
        lines.append(
            f"| {row['parallelism']} | {row['scaling']} | {row['devices']} | {local} | {row['ms']:.2f} | "
            f"{row['efficiency']:.0%} | {row['communication']:.0%} | {row['communicated_mb']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, help="at most that many; all GPUs, or 8 virtual CPU devices")
    parser.add_argument("--shape", default="8,512,4096,16", help="batch,dim,length,dstate")
    parser.add_argument("--implementation", choices=("cuda", "cpu", "xla"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    # Only of use without a GPU, and to be said before JAX starts.
    jax.config.update("jax_num_cpu_devices", args.devices or 8)
    batch, dim, length, dstate = (int(x) for x in args.shape.split(","))
    most = min(args.devices or jax.device_count(), jax.device_count())
    counts = [2**i for i in range(most.bit_length())]
    print(f"{most} devices: {jax.devices()[0].device_kind}, jax {jax.__version__}")
    rows = measure(
        (batch, dim, length, dstate), counts, args.implementation, args.repeats, lambda line: print(line, flush=True)
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "parallel.json").write_text(json.dumps(rows, indent=1))
    (args.out / "parallel.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
