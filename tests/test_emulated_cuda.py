"""The CUDA kernels, built as C++ and run on a CPU: their arithmetic, indices, barriers, copies and alignment.

Not their speed, and not every race (tests/native/sanitize_cuda.cu): see tests/native/emulator/cuda/vendor.h.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

TOP = Path(__file__).parent.parent


def runs_here() -> bool:
    """The emulator wants Linux on x86-64 with instructions that all of them have had since 2013."""
    cpu = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpu.exists() and {"avx2", "fma", "f16c"} <= set(cpu.read_text().split())


@pytest.mark.skipif(not runs_here(), reason="the emulator is for Linux, x86-64")
def test_kernels_on_a_cpu(tmp_path: Path, cxx: str) -> None:
    includes = [TOP / "tests/native/emulator", TOP / "csrc", jax.ffi.include_dir()]
    flags = ["-std=c++17", "-O1", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=off", "-fPIC", "-w"]
    # So that the passes before some spans look for what is forgotten, those of `forgets`, and before others do not.
    flags += ["-DJAX_SSCAN_LONG_SPAN=11"]
    sources = [
        *sorted((TOP / "csrc/cuda").glob("*.cu")),
        *sorted((TOP / "tests/native/emulator").glob("*.cc")),
        TOP / "csrc/cuda/plan.cc",
        TOP / "csrc/ffi/scan.cc",
    ]

    def compile_source(source: Path) -> Path:
        compiled = tmp_path / f"{source.parent.name}_{source.stem}.o"
        command = [cxx, *flags, *(f"-I{x}" for x in includes), "-x", "c++", "-c", source, "-o", compiled]
        subprocess.run(command, check=True)
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, sources))
    library = tmp_path / "emulated.so"
    subprocess.run([cxx, "-shared", *objects, "-o", library], check=True)
    # On an H100, and some on a GPU with less shared memory.
    for every, environment in (("1", {}), ("4", {"JAX_SSCAN_EMULATED_LITTLE_SHARED": "1"})):
        ran = subprocess.run(
            [sys.executable, TOP / "tests/emulated_cuda.py", library, every],
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, f"{environment}: {ran.stdout[-4000:]}{ran.stderr[-4000:]}"
        assert "cases pass" in ran.stdout
