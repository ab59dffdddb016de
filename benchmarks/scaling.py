"""How the time grows with dstate, with length and with threads: the native kernel beside lax.scan.

    python3 build/build.py bench --scaling

Forward plus backward, float32 random data, as bench.py has it. Each number of threads is a process of its own. Writes
scaling.json and scaling.png.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from measure import compile_program, run_in_turns
from methods import Shape, methods, operands

METHODS = ("cpu", "lax.scan")
DSTATES = (1, 4, 16, 64, 256)
LENGTHS = (64, 256, 1024, 4096, 16384)


def median_ms(shape: Shape, repeats: int) -> dict[str, float]:
    args = operands(shape)
    programs = [compile_program(name, methods()[name], args, "forward+backward") for name in METHODS]
    run_in_turns(programs, repeats, budget_s=10)
    return {program.method: program.median_ms for program in programs}


def with_threads(threads: int, shape: Shape, repeats: int) -> dict[str, float]:
    """`median_ms` in a process whose XLA has that many threads."""
    command = [sys.executable, __file__, "--one", ",".join(map(str, shape)), "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NPROC": str(threads)})
    if done.returncode:
        sys.exit(f"measuring with {threads} threads failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def plot(curves: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 4))
    for axis, (title, points) in zip(axes, curves.items(), strict=True):
        label = title.split(" ")[0]
        x = [int(value) for value in points]
        for name in METHODS:
            axis.plot(x, [times[name] for times in points.values()], "o-", label=name)
        axis.set(title=title, xlabel=label, xscale="log", yscale="log")
        axis.set_xticks(x, [str(value) for value in x])
    axes[0].set_ylabel("forward + backward, ms")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        batch, dim, length, dstate = (int(x) for x in args.one.split(","))
        print(json.dumps(median_ms((batch, dim, length, dstate), args.repeats)))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = sorted({2**i for i in range(cores.bit_length())} | {cores})
    threads = [count for count in threads if count <= cores]
    curves = {
        "dstate at (1, 512, 1024)": {str(n): median_ms((1, 512, 1024, n), args.repeats) for n in DSTATES},
        "length at (1, 256, L, 16)": {str(n): median_ms((1, 256, n, 16), args.repeats) for n in LENGTHS},
        "threads at (1, 1536, 2048, 16)": {str(n): with_threads(n, (1, 1536, 2048, 16), args.repeats) for n in threads},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.json").write_text(json.dumps(curves, indent=1))
    plot(curves, args.out / "scaling.png")
    for title, points in curves.items():
        print(title)
        for value, times in points.items():
            print(f"  {value:>6}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()))


if __name__ == "__main__":
    main()
