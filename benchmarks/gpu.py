"""Times the CUDA kernels: by themselves, inside jit, against their floors and against other methods.

    python3 build/build.py bench --gpu [--shapes 8,1536,2048,16] [--dtypes bfloat16,float32] [--layouts bld,bdl]

Random data with softplus, D, bias and gate. Kernel times come from JAX's profiler and hold no launches; times inside
jit from programs of ten scans, each of what the one before gave, queued one after the other. Writes results.json,
table.md and plot.png.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
from bench import machine, parse_shape
from matplotlib import pyplot as plt
from methods import Shape, associative_scan, lax_scan, operands

import jax_sscan

# Ceilings of an H200, measured: exp2 a second, and bytes a second of a copy.
EXP2_RATE, COPY_RATE = 4.16e12, 4.23e12
# mamba_ssm's kernels on an H200, for where it is not installed: microseconds forward and backward.
MAMBA_SSM = {
    ((8, 1536, 2048, 16), "bfloat16"): (488, 1799),
    ((8, 1536, 2048, 16), "float32"): (884, 2076),
    ((4, 4096, 4096, 16), "bfloat16"): (1161, 4637),
    ((1, 5120, 2048, 16), "bfloat16"): (199, 855),
    ((1, 2048, 65536, 16), "bfloat16"): (2954, 11104),
    ((32, 768, 1024, 16), "bfloat16"): (434, 1793),
    ((64, 384, 256, 16), "bfloat16"): (131, 634),
    ((16, 1536, 512, 16), "bfloat16"): (225, 868),
    ((8, 1536, 2048, 64), "bfloat16"): (1500, 6731),
}
SCANS_IN_JIT, QUEUED_US = 10, 5e4
ANCHORS = list(dict.fromkeys(shape for shape, _ in MAMBA_SSM))
EDGES = [(64, 1536, 1, 16), (64, 1536, 16, 16), (8, 1536, 64, 16), (1, 1536, 2048, 16), (1, 512, 1048576, 16)]


def arrays(shape: Shape, dtype: str, layout: str) -> tuple[jax.Array, ...]:
    """The operands of `methods.operands` in a dtype and layout; weights stay float32."""
    u, delta, A, B, C, D, z, bias = operands(shape)

    def sequence(x: jax.Array) -> jax.Array:
        return (x if layout == "bld" else jnp.swapaxes(x, 1, 2)).astype(dtype)

    return sequence(u), sequence(delta), A, sequence(B), sequence(C), D, sequence(z), bias


def kernel_us(call: Callable[[], Any], runs: int = 5) -> dict[str, float]:
    """Microseconds a run spends in each kernel of jax_sscan, by the kernel's name.

    A kernel that begins before the one before it has ended (the walk, beside the pass before spans) counts from there.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        events = [
            (event.start_ns, event.start_ns + event.duration_ns, event.name)
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
            if "jax_sscan" in event.name
        ]
    found: dict[str, float] = {}
    ended = 0.0
    for start, end, name in sorted(events):
        found[name] = found.get(name, 0.0) + max(end - max(start, ended), 0.0) / 1e3 / runs
        ended = max(ended, end)
    return found


@functools.cache
def mamba_ssm_us(shape: Shape, dtype: str) -> tuple[float, float] | None:
    """Microseconds of mamba_ssm's own CUDA operator, forward and backward: timed here if it is installed."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return MAMBA_SSM.get((shape, dtype))
    import torch  # pyright: ignore[reportMissingImports]
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]

    tensors = [torch.from_dlpack(x).requires_grad_() for x in arrays(shape, dtype, "bdl")]
    u, delta, A, B, C, D, z, delta_bias = tensors
    cotangent = torch.randn_like(u)

    def forward() -> Any:
        return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)

    def median_us(call: Callable[[], Any], calls: int = 10) -> float:
        """Of a call in a CUDA graph of several, which holds no launches."""
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        times = []
        for _ in range(7):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / calls)
        return statistics.median(times)

    both = median_us(lambda: torch.autograd.grad(forward(), tensors, cotangent))
    with torch.no_grad():
        alone = median_us(forward)
    return alone, both - alone


def chain(step: Callable[..., Any], state: Any, *args: jax.Array) -> Any:
    """SCANS_IN_JIT steps, each of the state that the one before left."""
    for _ in range(SCANS_IN_JIT):
        state = step(state, *args)
    return state


def in_jit_us(call: Callable[[], Any], queued: int, repeats: int = 5) -> float:
    """Microseconds a call takes when calls are queued one after the other."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        results = [call() for _ in range(queued)]
        jax.block_until_ready(results)
        times.append(1e6 * (time.perf_counter() - begin) / queued)
    return statistics.median(times)


def temp_megabytes(compiled: Any) -> float:
    """What a compiled program asks for beside its operands and results."""
    analysis = compiled.memory_analysis()
    return float("nan") if analysis is None else analysis.temp_size_in_bytes / 1e6


def floors_us(shape: Shape, dtype: str) -> dict[str, tuple[float, float]]:
    """For each pass, the times that exp2 and memory alone would take."""
    batch, dim, length, dstate = shape
    elements, size = batch * dim * length, jnp.dtype(dtype).itemsize
    exp2 = 1e6 * elements * dstate / EXP2_RATE
    projections = 2 * batch * length * dstate * size

    def memory(sequences: int, matrices: int) -> float:
        return 1e6 * (sequences * elements * size + matrices * projections) / COPY_RATE

    return {"forward": (exp2, memory(4, 1)), "backward": (exp2, memory(7, 2))}


def measure(shape: Shape, dtype: str, layout: str) -> list[dict[str, Any]]:
    args = arrays(shape, dtype, layout)
    cotangent = jax.random.normal(jax.random.key(1), args[0].shape).astype(dtype)

    def scan(*args: jax.Array) -> Any:
        u, delta, A, B, C, D, z, delta_bias = args
        return jax_sscan.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, True, layout=cast(Literal["bdl", "bld"], layout), implementation="cuda"
        )

    def both(cotangent: jax.Array, *args: jax.Array) -> Any:
        out, pull = jax.vjp(scan, *args)
        return out, pull(cotangent)

    def both_again(state: Any, *rest: jax.Array) -> Any:
        cotangent, u = state
        out, gradients = both(cotangent, u, *rest)
        return out, gradients[0]

    forward_chain = jax.jit(functools.partial(chain, scan))
    both_chain = jax.jit(functools.partial(chain, both_again))
    u, *rest = args
    begin = time.perf_counter()
    forward = jax.jit(scan).lower(*args).compile()
    gradients = jax.jit(both).lower(cotangent, *args).compile()
    compile_s = time.perf_counter() - begin
    temp_mb = temp_megabytes(gradients)
    forward_kernels = kernel_us(lambda: forward(*args))
    kernels = kernel_us(lambda: gradients(cotangent, *args))
    saving = sum(
        us for name, us in kernels.items() if "ForwardKernel" in name or "SpanKernel<jax_sscan::Forward" in name
    )

    def in_chain_us(call: Callable[[], Any], kernel_us: float) -> float:
        # So many programs that the first's dispatch and the last's return are less than a hundredth.
        return in_jit_us(call, max(2, round(QUEUED_US / (SCANS_IN_JIT * kernel_us)))) / SCANS_IN_JIT

    forward_us, both_us = sum(forward_kernels.values()), sum(kernels.values())
    times = {
        "forward": (forward_us, in_chain_us(lambda: forward_chain(u, *rest), forward_us)),
        "backward": (both_us - saving, float("nan")),
        "both": (both_us, in_chain_us(lambda: both_chain((cotangent, u), *rest), both_us)),
    }
    rows = []
    mamba = mamba_ssm_us(shape, dtype)
    for index, (name, (kernel, in_jit)) in enumerate(times.items()):
        row = {"shape": shape, "dtype": dtype, "layout": layout, "pass": name, "kernel_us": kernel, "in_jit_us": in_jit}
        row |= {"compile_s": compile_s, "temp_mb": temp_mb}
        if name != "both":
            row["exp2_us"], row["memory_us"] = floors_us(shape, dtype)[name]
            row["times_mamba_ssm"] = mamba[index] / kernel if mamba else None
        rows.append(row)
        print(f"{shape} {dtype} {layout} {name}: {kernel:.0f} us in kernels, {in_jit:.0f} us in jit", flush=True)
    return rows


def measure_references(shape: Shape) -> list[dict[str, Any]]:
    """What JAX users write without jax_sscan, float32."""
    args = arrays(shape, "float32", "bld")
    rows = []
    for name, method in (("lax.scan", lax_scan), ("associative_scan", associative_scan)):
        for label, function in (
            ("forward", method),
            ("both", jax.value_and_grad(lambda *a, m=method: jnp.sum(m(*a)), argnums=tuple(range(8)))),
        ):
            compiled = jax.jit(function).lower(*args).compile()
            us = in_jit_us(lambda call=compiled: call(*args), 2, 3)
            temp_mb = temp_megabytes(compiled)
            rows.append({"shape": shape, "method": name, "pass": label, "in_jit_us": us, "temp_mb": temp_mb})
            print(f"{shape} {name} {label}: {us:.0f} us", flush=True)
    return rows


def to_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| (B, D, L, N) | dtype | layout | pass | kernel µs | in jit µs | exp2 floor | HBM floor | mamba_ssm / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "method" in row:
            lines.append(
                f"| {row['shape']} | float32 | bld | {row['pass']} | {row['method']} | {row['in_jit_us']:.0f} | | | |"
            )
            continue
        shares = [
            f"{row[key]:.0f} ({row[key] / row['kernel_us']:.0%})" if key in row else ""
            for key in ("exp2_us", "memory_us")
        ]
        ratio = f"{row['times_mamba_ssm']:.2f}" if row.get("times_mamba_ssm") else ""
        in_jit = f"{row['in_jit_us']:.0f}" if row["pass"] != "backward" else ""
        lines.append(
            f"| {row['shape']} | {row['dtype']} | {row['layout']} | {row['pass']} | {row['kernel_us']:.0f} | "
            f"{in_jit} | {shares[0]} | {shares[1]} | {ratio} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times as long as the larger floor each kernel takes."""
    shown = [row for row in rows if row.get("layout") == "bld" and row["pass"] != "both"]
    figure, axis = plt.subplots(figsize=(8, 0.3 * len(shown) + 1))
    labels = [f"{row['shape']} {row['dtype']} {row['pass']}" for row in shown]
    axis.barh(labels, [row["kernel_us"] / max(row["exp2_us"], row["memory_us"]) for row in shown])
    axis.set_xlabel("kernel time / floor")
    axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", type=parse_shape, nargs="+", default=ANCHORS + EDGES, help="batch,dim,length,dstate"
    )
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--layouts", default="bld,bdl")
    parser.add_argument(
        "--references", type=parse_shape, nargs="*", default=[ANCHORS[0]], help="shapes for other methods"
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench-gpu"))
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("there is no GPU here")
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    tasks = [(s, d, y) for s in args.shapes for d in args.dtypes.split(",") for y in args.layouts.split(",")]
    for task in tasks:
        rows += measure(*task)
    for shape in args.references:
        rows += measure_references(shape)
    (args.out / "results.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    (args.out / "table.md").write_text(to_table(rows) + "\n")
    plot(rows, args.out / "plot.png")
    print(f"\n{machine()}\n\n{to_table(rows)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    main()
