"""The native CPU kernel as machine code: every instruction set it is built for, its vector functions,
and its threads. What it computes is tested with all other implementations, in test_scan.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import jax_sscan

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not jax_sscan.implementations()["cpu"].available,
    reason=str(jax_sscan.implementations()["cpu"].reason),
)


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def targets() -> dict[str, list[str]]:
    """The instruction sets that this machine can run, with their compiler flags."""
    flags = cpu_flags()
    found = {"baseline": ["-DJAX_SSCAN_VECTOR_BYTES=16"]}
    if {"avx2", "fma"} <= flags:
        found["avx2"] = ["-DJAX_SSCAN_VECTOR_BYTES=32", "-mavx2", "-mfma"]
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        wide = [f"-mavx512{part}" for part in ("f", "dq", "bw", "vl")]
        found["avx512"] = ["-DJAX_SSCAN_VECTOR_BYTES=64", *wide, "-mfma"]
    return found


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints that can import the tests' own modules."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Ulps of the largest error. exp is what every state of every step goes through; softplus and sigmoid
# are taken once per element, and are ratios and sums of a few such values. SoftplusFar is 1 if softplus fails anywhere
# far from 0.
BOUNDS = {"Exp2": 1.5, "Exp": 2, "Softplus": 4, "SoftplusFar": 0, "Sigmoid": 3, "Cos": 2, "Sin": 2}


@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_vector_functions(target: str, compile_native: Callable[..., Path]) -> None:
    """exp within 2 ulp and the others within their bounds, over their whole domains."""
    if target not in targets():
        pytest.skip(f"this machine has no {target}")
    program = compile_native("tests/native/vector_test.cc", flags=["-Wno-psabi", *targets()[target]])
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    errors = {name: float(ulps) for name, ulps in (line.split() for line in printed.splitlines())}
    assert set(errors) == {f"{name}<{dtype}>" for name in BOUNDS for dtype in ("float", "double")}
    too_large = {name: ulps for name, ulps in errors.items() if not ulps <= BOUNDS[name.split("<")[0]]}
    assert not too_large


@pytest.mark.parametrize("target", ["baseline", "avx2", "avx512"])
def test_instruction_sets(target: str) -> None:
    """All of them give right results, not only the one that this machine would choose."""
    if target not in targets():
        pytest.skip(f"this machine has no {target}")
    code = """
from cases import CASES
from checks import check_case
from jax_sscan import _cpu
names = "everything", "everything-bld", "complex-groups", "bf16", "f16-reverse-bld", "f64", "f64-complex", "short-bld"
for case in CASES:
    if case.id in names:
        check_case(case, "cpu")
        names = tuple(name for name in names if name != case.id)
assert not names, names
print(_cpu.build_info()["target"])
"""
    assert run_python(code, JAX_SSCAN_CPU_TARGET=target) == target


def test_an_instruction_set_that_is_not_there() -> None:
    """An unknown name falls back to what runs everywhere."""
    code = "from jax_sscan import _cpu; print(_cpu.build_info()['target'])"
    assert run_python(code, JAX_SSCAN_CPU_TARGET="neon9000") == "baseline"


def test_any_number_of_threads_gives_the_same_bits() -> None:
    code = """
import hashlib, jax, jax.numpy as jnp, jax_sscan
from cases import MAMBA, Case, make_inputs
digest = hashlib.sha256()
for case in (
    Case("wide", batch=3, dim=150, length=300, dstate=16, **MAMBA),
    Case("short", batch=64, dim=90, length=3, dstate=16, layout="bld", **MAMBA),
):
    arrays = {name: jnp.asarray(x) for name, x in make_inputs(case).items()}
    def loss(arrays):
        out = jax_sscan.selective_scan(**arrays, delta_softplus=True, layout=case.layout, implementation="cpu")
        return jnp.sum(out * out), out
    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    for x in [out, *(gradients[name] for name in sorted(gradients))]:
        digest.update(bytes(memoryview(jax.device_get(x))))
print(digest.hexdigest())
"""
    # NPROC is how many threads XLA gives its pool.
    digests = {threads: run_python(code, NPROC=str(threads)) for threads in (1, 2, 7)}
    assert len(set(digests.values())) == 1, digests
