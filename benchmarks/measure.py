"""How a method is measured: compile time, run time, and the memory that its program asks for."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass
class Program:
    """One compiled computation and what has been measured of it."""

    method: str
    name: str  # "forward" or "forward+backward"
    call: Callable[[], Any]
    compile_s: float
    temp_mb: float
    times_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)

    def run(self) -> float:
        """Runs once; returns and notes the time in milliseconds."""
        begin = time.perf_counter()
        jax.block_until_ready(self.call())
        self.times_ms.append(1e3 * (time.perf_counter() - begin))
        return self.times_ms[-1]


def compile_program(method: str, function: Callable[..., Any], operands: tuple[jax.Array, ...], name: str) -> Program:
    """Compiles the forward pass, or the value and the gradients of every operand for a random cotangent."""
    if method.startswith("torch"):
        return torch_program(method, function, operands, name)
    if name == "forward+backward":
        cotangent = jax.random.normal(jax.random.key(1), operands[0].shape)
        forward = function

        def weighted(*args: jax.Array) -> jax.Array:
            return jnp.sum(forward(*args) * cotangent)

        function = jax.value_and_grad(weighted, argnums=tuple(range(len(operands))))
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*operands).compile()
    compile_s = time.perf_counter() - begin
    analysis = compiled.memory_analysis()
    temp = float("nan") if analysis is None else analysis.temp_size_in_bytes / 1e6
    return Program(method, name, lambda: compiled(*operands), compile_s, temp)


def torch_program(method: str, function: Callable[..., Any], operands: tuple[jax.Array, ...], name: str) -> Program:
    """The same of a torch function, which is not compiled."""
    import torch  # pyright: ignore[reportMissingImports]

    tensors = [torch.from_numpy(np.array(x)) for x in operands]
    cotangent = torch.from_numpy(np.array(jax.random.normal(jax.random.key(1), operands[0].shape)))

    def call() -> Any:
        if name == "forward":
            with torch.no_grad():
                return np.asarray(function(*tensors))
        leaves = [x.detach().requires_grad_() for x in tensors]
        value = (function(*leaves) * cotangent).sum()
        value.backward()
        return np.asarray(value.detach()), tuple(np.asarray(x.grad) for x in leaves)

    return Program(method, name, call, float("nan"), float("nan"))


def run_in_turns(programs: list[Program], repeats: int, budget_s: float) -> None:
    """Times all programs round-robin after one warm-up each, so that ratios come from the same minutes.

    In its turn a program runs for 50 ms at least, and then once more, which counts: before, it finds the caches and the
    allocator as the program before it left them, and a core busy giving that one's gigabytes back to the system. Those
    that take seconds run once, since gigabytes of their own are what they find. A program that has used up its budget
    stops after two measured runs.
    """
    for program in programs:
        program.run()
        program.times_ms.clear()
    for turn in range(repeats):
        for program in programs:
            if turn >= 2 and sum(program.times_ms) > 1e3 * budget_s:
                continue
            settled = time.perf_counter() + 50e-3
            while program.run() < 3e3:
                program.times_ms.pop()
                if time.perf_counter() > settled:
                    program.run()
                    break


def peak_memory_mb(program: Program) -> float:
    """How far one run raises this process's peak resident size; a fresh process makes it meaningful."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        jax.block_until_ready(program.call())
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit

    def kilobytes(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    # Not ru_maxrss: across exec Linux hands a child the peak of its parent. 5 sets VmHWM back, past compilation.
    clear.write_text("5")
    before = kilobytes("VmRSS:")
    jax.block_until_ready(program.call())
    return (kilobytes("VmHWM:") - before) / 1024
