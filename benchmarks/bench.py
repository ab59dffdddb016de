"""Times jax_sscan against what JAX users write without it, side by side in one run.

    python3 build/build.py bench [--all] [--shapes 1,1536,2048,16] [--methods cpu,lax.scan] [--repeats 7]

Forward, and forward with the gradients of every operand, float32 random data, layout "bld", with softplus, bias, D and
gate. Writes results.json, table.md and plot.png.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from measure import Program, compile_program, peak_memory_mb, run_in_turns
from methods import Shape, methods, operands

REFERENCES = ("lax.scan", "associative_scan")
PASSES = ("forward", "forward+backward")
DEFAULT = [(1, 1536, 2048, 16)]
QUICK = [(1, 64, 128, 16), (2, 32, 1, 16)]
MORE = [(8, 256, 512, 16), (1, 64, 65536, 16), (64, 1536, 1, 16)]


def parse_shape(text: str) -> Shape:
    batch, dim, length, dstate = (int(x) for x in text.split(","))
    return batch, dim, length, dstate


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": commit + (" with changes" if dirty else ""),
        "date": datetime.date.today().isoformat(),
    }


def check_agreement(programs: list[Program]) -> None:
    """Times of methods that compute different things mean nothing."""
    for name in PASSES:
        group = [program for program in programs if program.name == name]
        reference = jax.tree.leaves(group[-1].call())
        for program in group[:-1]:
            for ours, theirs in zip(jax.tree.leaves(program.call()), reference, strict=True):
                # At length 1 the gradient of A is 0, or what rounding leaves of it.
                scale = jnp.maximum(jnp.abs(theirs).max(), 1e-3)
                difference = float(jnp.abs(ours - theirs).max() / scale)
                if not difference < 1e-3:
                    sys.exit(f"{program.method} and {group[-1].method} differ by {difference:.1e} in {name}")


def peak_memory_apart(shape: Shape, method: str, name: str) -> float:
    """`peak_memory_mb` in a process of its own."""
    command = [sys.executable, __file__, "--peak-memory", method, name, "--shapes", ",".join(map(str, shape))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"measuring the memory of {method} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def measure_shape(shape: Shape, names: list[str], repeats: int, budget_s: float) -> list[dict[str, Any]]:
    found, args = methods(), operands(shape)
    programs = []
    for method in names:
        for name in PASSES:
            programs.append(compile_program(method, found[method], args, name))
            print(f"{shape} {method} {name}: compiled in {programs[-1].compile_s:.2f} s", flush=True)
    check_agreement(programs)
    run_in_turns(programs, repeats, budget_s)
    rows = []
    for program in programs:
        rows.append(
            {
                "shape": shape,
                "method": program.method,
                "pass": program.name,
                "median_ms": program.median_ms,
                "best_ms": min(program.times_ms),
                "runs": len(program.times_ms),
                "compile_s": program.compile_s,
                "temp_mb": program.temp_mb,
                "peak_mb": peak_memory_apart(shape, program.method, program.name),
            }
        )
        print(
            f"{shape} {program.method} {program.name}: {program.median_ms:.2f} ms, peak {rows[-1]['peak_mb']:.0f} MB",
            flush=True,
        )
    return rows


def reference_ms(rows: list[dict[str, Any]], row: dict[str, Any], method: str) -> float:
    """The median of ``method`` at the shape and pass of ``row``; nan where it was not run."""
    key = row["shape"], row["pass"], method
    return next((r["median_ms"] for r in rows if (r["shape"], r["pass"], r["method"]) == key), float("nan"))


def to_table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the ratios say how many times as long as each reference a method takes, at its shape and pass."""
    lines = [
        "| (B, D, L, N) | pass | method | median ms | / lax.scan | / associative_scan | compile s | tmp MB | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = " | ".join(f"{row['median_ms'] / reference_ms(rows, row, name):.3g}" for name in REFERENCES)
        lines.append(
            f"| {row['shape']} | {row['pass']} | {row['method']} | {row['median_ms']:.2f} | "
            f"{ratios} | {row['compile_s']:.2f} | {row['temp_mb']:.0f} | "
            f"{row['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    has_reference = all("lax.scan" in {r["method"] for r in rows if tuple(r["shape"]) == shape} for shape in shapes)
    time_label = "time / lax.scan" if has_reference else "ms"
    figure, axes = plt.subplots(3, len(shapes), figsize=(4.5 * len(shapes), 9), squeeze=False)
    for column, shape in enumerate(shapes):
        keys = (("median_ms", time_label), ("compile_s", "compile s"), ("peak_mb", "peak MB"))
        for axis, (key, label) in zip(axes[:, column], keys, strict=True):
            for offset, name in enumerate(PASSES):
                same = [r for r in rows if tuple(r["shape"]) == shape and r["pass"] == name]
                values = {r["method"]: r[key] for r in same}
                if key == "median_ms" and has_reference:
                    values = {r["method"]: r[key] / reference_ms(rows, r, "lax.scan") for r in same}
                heights = [max(values[m], 0.1) if key == "peak_mb" else values[m] for m in names]
                axis.bar([i + 0.4 * offset for i in range(len(names))], heights, 0.4, label=name)
            axis.set_yscale("log")
            axis.set_ylabel(label)
            axis.set_xticks([i + 0.2 for i in range(len(names))], names, rotation=20)
        axes[0][column].set_title(f"(B, D, L, N) = {shape}")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=DEFAULT, help="batch,dim,length,dstate ...")
    parser.add_argument("--all", action="store_true", help="also batched, long and decode-sized shapes")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and 3 repeats: does it run at all")
    parser.add_argument("--methods", help="comma-separated; all that run here by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=20, help="seconds a program may take in all (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--peak-memory", nargs=2, metavar=("METHOD", "PASS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_memory:
        method, name = args.peak_memory
        program = compile_program(method, methods()[method], operands(args.shapes[0]), name)
        print(peak_memory_mb(program))
        return
    names = args.methods.split(",") if args.methods else list(methods())
    if unknown := set(names) - set(methods()):
        parser.error(f"unknown methods {sorted(unknown)}; there are {list(methods())}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows, result = [], {}
    shapes = QUICK if args.quick else args.shapes + (MORE if args.all else [])
    for shape in shapes:
        rows += measure_shape(shape, names, min(args.repeats, 3) if args.quick else args.repeats, args.budget)
        # After each shape, so that a later one that fails loses nothing.
        result = {"machine": machine(), "rows": rows}
        (args.out / "results.json").write_text(json.dumps(result, indent=1))
        (args.out / "table.md").write_text(to_table(rows) + "\n")
        plot(rows, args.out / "plot.png")
    print(f"\n{result['machine']}\n\n{to_table(rows)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
