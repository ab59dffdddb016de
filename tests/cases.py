"""The one table of selective-scan cases, their data, and a hypothesis strategy over the same space.

The sizes are odd on purpose: no power of two, no multiple of a tile or a warp, lengths on both
sides of any chunk. Large dims never meet large lengths, so that compiling, not running, is what the
suite costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

F32, F64, F16, BF16 = "float32", "float64", "float16", "bfloat16"


def dtype(name: str) -> np.dtype[Any]:
    """NumPy knows bfloat16 only through ml_dtypes."""
    return np.dtype(ml_dtypes.bfloat16 if name == BF16 else name)


@dataclass(frozen=True)
class Case:
    """One point of the option space. `B` and `C` are "fixed", "3d", "4d", "3d-interleaved" or
    "4d-interleaved" (the last two: complex numbers in a real array of twice the length)."""

    id: str
    batch: int = 2
    dim: int = 3
    length: int = 7
    dstate: int = 3
    groups: int = 1
    u_dtype: str = F32
    delta_dtype: str = F32
    z_dtype: str = F32
    B_dtype: str = F32
    C_dtype: str = F32
    is_complex: bool = False
    B: str = "3d"
    C: str = "3d"
    D: bool = False
    z: bool = False
    bias: bool = False
    softplus: bool = False
    initial_state: bool = False
    segments: bool = False
    reverse: bool = False
    layout: str = "bdl"
    out_dtype: str | None = None
    last_state: bool = True
    x64: bool = False
    fast_first: bool = False  # states in the order of their rates, the fastest first

    def __str__(self) -> str:
        return self.id

    @property
    def has_interleaved(self) -> bool:
        return "interleaved" in self.B + self.C


def _projection(rng: np.random.Generator, case: Case, kind: str, dtype_name: str) -> np.ndarray[Any, Any]:
    """B or C: unit normals, complex where A is."""

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        x = rng.standard_normal(shape)
        return x + 1j * rng.standard_normal(shape) if case.is_complex else x

    wide = dtype(F64 if case.x64 else F32)
    if kind == "fixed":
        x = normal(case.dim, case.dstate)
        return x.astype(np.result_type(wide, np.complex64) if case.is_complex else wide)
    groups = (case.groups,) if kind.startswith("4d") else ()
    x = normal(case.batch, *groups, case.dstate, case.length)
    if kind.endswith("interleaved"):
        pairs = np.stack([x.real, x.imag], -1).reshape(*x.shape[:-1], 2 * case.length)
        return pairs.astype(dtype(dtype_name))
    if case.layout == "bld":
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    if case.is_complex:
        return x.astype(np.result_type(wide, np.complex64))
    return x.astype(dtype(dtype_name))


def make_inputs(case: Case, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Realistic data: A in the left half-plane over two decades, time steps from 1e-3 to 1 (and,
    under softplus, a few raw values above 20, where softplus is the identity), states that both
    forget within a step and remember hundreds."""
    rng = np.random.default_rng([seed, case.batch, case.dim, case.length, case.dstate])
    wide = dtype(F64 if case.x64 else F32)
    sequence = (case.batch, case.dim, case.length)

    def lay_out(x: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        x = x if case.layout == "bdl" else np.ascontiguousarray(x.transpose(0, 2, 1))
        return x.astype(dtype(name))

    A: np.ndarray[Any, Any] = -np.exp(rng.uniform(-3.0, 2.5, (case.dim, case.dstate)))
    if case.is_complex:
        A = (A + 1j * rng.uniform(-4.0, 4.0, A.shape)).astype(np.result_type(wide, np.complex64))
    else:
        A = A.astype(wide)
    if case.fast_first:
        A = np.sort(A, axis=1)
    bias = rng.uniform(-1.0, 1.0, case.dim) if case.bias else np.zeros(case.dim)
    step = np.exp(rng.uniform(np.log(1e-3), 0.0, sequence))
    raw = np.log(np.expm1(step)) if case.softplus else step
    raw = raw - bias[:, None]
    if case.softplus:
        raw = np.where(rng.random(sequence) < 0.02, rng.uniform(20.5, 25.0, sequence), raw)

    inputs = {
        "u": lay_out(rng.standard_normal(sequence), case.u_dtype),
        "delta": lay_out(raw, case.delta_dtype),
        "A": A,
        "B": _projection(rng, case, case.B, case.B_dtype),
        "C": _projection(rng, case, case.C, case.C_dtype),
    }
    if case.D:
        inputs["D"] = rng.standard_normal(case.dim).astype(wide)
    if case.z:
        inputs["z"] = lay_out(2.0 * rng.standard_normal(sequence), case.z_dtype)
    if case.bias:
        inputs["delta_bias"] = bias.astype(wide)
    if case.initial_state:
        state = rng.standard_normal((case.batch, case.dim, case.dstate))
        if case.is_complex:
            state = state + 1j * rng.standard_normal(state.shape)
        inputs["initial_state"] = state.astype(A.dtype)
    if case.segments:
        # Runs of random ids out of three, so that an id reappears later and is a new segment then.
        starts = rng.random((case.batch, case.length)) < max(0.02, min(0.3, 3 / (case.length or 1)))
        run = np.cumsum(starts.astype(np.int64), axis=1)
        ids = rng.integers(0, 3, (case.batch, case.length + 1))
        inputs["segment_ids"] = np.take_along_axis(ids, run, axis=1).astype(np.int32)
    return inputs


def all_of(name: str) -> dict[str, str]:
    """Every tensor of that dtype."""
    return {f"{tensor}_dtype": name for tensor in ("u", "delta", "z", "B", "C")}


EVERYTHING: dict[str, Any] = {
    "D": True,
    "z": True,
    "bias": True,
    "softplus": True,
    "initial_state": True,
    "segments": True,
}
MAMBA: dict[str, Any] = {"D": True, "z": True, "bias": True, "softplus": True}


def _table() -> list[Case]:
    cases = [
        # Each option by itself, so that a failure names it.
        Case("plain"),
        Case("D", D=True),
        Case("z", z=True),
        Case("bias", bias=True),
        Case("softplus", softplus=True, length=129),
        Case("softplus-bias", softplus=True, bias=True, length=129),
        Case("initial-state", initial_state=True),
        Case("segments", segments=True, length=40),
        Case("reverse", reverse=True),
        Case("bld", layout="bld"),
        Case("reverse-initial-state", reverse=True, initial_state=True),
        Case("reverse-segments", reverse=True, segments=True, length=40),
        Case("segments-initial-state", segments=True, initial_state=True, length=40),
        Case("reverse-segments-initial-state", reverse=True, segments=True, initial_state=True),
        Case("mamba", **MAMBA, length=129, dstate=16, dim=24),
        Case("everything", **EVERYTHING, length=129, dim=6),
        Case("everything-bld", **EVERYTHING, length=129, dim=6, layout="bld"),
        Case("everything-reverse", **EVERYTHING, length=129, reverse=True),
        Case("everything-reverse-bld", **EVERYTHING, length=129, reverse=True, layout="bld"),
        # Fixed and varying, independently.
        Case("B-fixed", B="fixed", **EVERYTHING),
        Case("C-fixed", C="fixed", **EVERYTHING),
        Case("BC-fixed", B="fixed", C="fixed", **EVERYTHING),
        Case("BC-fixed-bld", B="fixed", C="fixed", **EVERYTHING, layout="bld", length=129),
        Case("B-fixed-C-groups", B="fixed", C="4d", groups=3, dim=24, **MAMBA),
        Case("B-groups-C-fixed", B="4d", C="fixed", groups=2, dim=24, layout="bld"),
        Case("B-one-group-4d-C-3d", B="4d", C="3d", **EVERYTHING),
        Case("one-group-4d", B="4d", C="4d", groups=1),
        Case("groups-2", B="4d", C="4d", groups=2, dim=24, length=129, **EVERYTHING),
        Case("groups-3-bld", B="4d", C="4d", groups=3, dim=24, layout="bld", **EVERYTHING),
        Case("groups-dim", B="4d", C="4d", groups=3, dim=3, reverse=True, **MAMBA),
        # Sizes.
        Case("length-1", length=1, **EVERYTHING),
        Case("length-1-bld-reverse", length=1, **EVERYTHING, layout="bld", reverse=True),
        Case("length-2", length=2, **EVERYTHING),
        Case("length-1000", length=1000, batch=1, **EVERYTHING),
        Case("length-1000-bld", length=1000, batch=1, dstate=16, layout="bld", **MAMBA),
        Case("length-1000-reverse", length=1000, batch=1, reverse=True, **EVERYTHING),
        Case("length-1000-dim-1", length=1000, batch=1, dim=1, dstate=1, initial_state=True),
        Case("length-257-dstate-17", length=257, dim=5, dstate=17, **EVERYTHING),
        Case("dstate-1", dstate=1, length=129, **EVERYTHING),
        Case("dstate-1-dim-1", dstate=1, dim=1, **MAMBA),
        Case("dstate-17", dstate=17, **EVERYTHING),
        Case("dstate-64", dstate=64, length=33, **EVERYTHING, layout="bld"),
        Case("dstate-300", dstate=300, length=7, **EVERYTHING),
        Case("dstate-300-fixed", dstate=300, length=7, B="fixed", C="fixed", **MAMBA),
        Case("batch-1-dim-1", batch=1, dim=1, length=129, dstate=16, **EVERYTHING),
        Case("batch-5", batch=5, dim=1, length=19, **EVERYTHING, layout="bld"),
        Case("dim-131", batch=1, dim=131, length=5, dstate=16, **MAMBA),
        Case("dim-131-bld", batch=1, dim=131, length=5, dstate=16, layout="bld", **EVERYTHING),
        # Without the last state, which kernels may use: short batch rows run as one long sequence.
        Case("no-last-state", **MAMBA, length=129, last_state=False),
        Case("no-last-state-initial-state", **EVERYTHING, length=7, layout="bld", last_state=False),
        Case("short-bld", batch=24, dim=40, length=7, dstate=16, layout="bld", **MAMBA, last_state=False),
        Case("short-bdl", batch=5, length=7, **MAMBA, last_state=False),
        Case("short-reverse", batch=64, dim=5, length=3, layout="bld", reverse=True, **MAMBA, last_state=False),
        Case("short-segments", batch=48, dim=3, length=16, segments=True, layout="bld", **MAMBA, last_state=False),
        Case("short-fixed", batch=37, length=2, B="fixed", C="fixed", layout="bld", **MAMBA, last_state=False),
        Case("short-groups", batch=70, dim=6, length=5, B="4d", C="4d", groups=2, layout="bld", last_state=False),
        Case("steps", batch=96, dim=24, length=1, dstate=16, **MAMBA, last_state=False),
        Case("steps-groups", batch=90, dim=6, length=1, B="4d", C="4d", groups=3, **MAMBA, last_state=False),
        Case("steps-complex", batch=80, dim=3, length=1, is_complex=True, **MAMBA, last_state=False),
        # Complex.
        Case("complex", is_complex=True, length=129),
        Case("complex-everything", is_complex=True, **EVERYTHING, length=129, dim=6),
        Case("complex-bld", is_complex=True, **EVERYTHING, layout="bld", dstate=16),
        Case("complex-reverse", is_complex=True, **EVERYTHING, reverse=True, length=33),
        Case("complex-fixed", is_complex=True, B="fixed", C="fixed", **EVERYTHING, length=129),
        Case("complex-B-fixed", is_complex=True, B="fixed", **EVERYTHING),
        Case("complex-C-fixed", is_complex=True, C="fixed", layout="bld", **EVERYTHING),
        Case("complex-groups", is_complex=True, B="4d", C="4d", groups=2, dim=24, **EVERYTHING),
        Case("complex-dstate-1-length-1", is_complex=True, dstate=1, length=1, **EVERYTHING),
        Case("complex-dstate-64", is_complex=True, dstate=64, layout="bld", **MAMBA),
        Case("interleaved", is_complex=True, B="3d-interleaved", C="3d-interleaved", **MAMBA),
        Case(
            "interleaved-groups-reverse",
            is_complex=True,
            B="4d-interleaved",
            C="4d-interleaved",
            groups=3,
            reverse=True,
            **EVERYTHING,
        ),
        Case("interleaved-B", is_complex=True, B="3d-interleaved", C="3d", initial_state=True),
        Case(
            "complex-bf16",
            is_complex=True,
            B="3d-interleaved",
            C="3d-interleaved",
            length=33,
            **all_of(BF16),
            **EVERYTHING,
        ),
        # Narrow and mixed dtypes.
        Case("bf16", **all_of(BF16), **EVERYTHING, length=129),
        Case("bf16-bld", **all_of(BF16), **MAMBA, length=129, dstate=16, dim=24, layout="bld"),
        Case("f16", **all_of(F16), **EVERYTHING, length=33),
        Case("f16-reverse-bld", **all_of(F16), **EVERYTHING, layout="bld", reverse=True),
        Case("bf16-out-f32", **all_of(BF16), **EVERYTHING, out_dtype=F32),
        Case("f32-out-bf16", **EVERYTHING, out_dtype=BF16, layout="bld"),
        Case("bf16-f32-projections", u_dtype=BF16, delta_dtype=BF16, z_dtype=BF16, **MAMBA),
        Case("bf16-f32-delta", **{**all_of(BF16), "delta_dtype": F32}, **EVERYTHING),
        Case(
            "bf16-mixed",
            u_dtype=BF16,
            z_dtype=F32,
            B_dtype=BF16,
            C_dtype=F32,
            **EVERYTHING,
            layout="bld",
        ),
        Case("bf16-fixed", **all_of(BF16), B="fixed", C="fixed", **EVERYTHING),
        Case("f16-dstate-17-groups", **all_of(F16), B="4d", C="4d", groups=3, dstate=17, **MAMBA),
    ]
    double = [
        Case("f64", **MAMBA, length=129, dstate=16),
        Case("f64-everything-bld", **EVERYTHING, length=33, layout="bld"),
        Case("f64-reverse-fixed", **EVERYTHING, B="fixed", C="fixed", reverse=True),
        Case("f64-complex", is_complex=True, **EVERYTHING, length=33),
        Case("f64-interleaved", is_complex=True, B="3d-interleaved", C="3d-interleaved", **MAMBA),
        Case("f64-groups", B="4d", C="4d", groups=3, length=129, **EVERYTHING),
    ]
    return cases + [replace(case, x64=True, **all_of(F64)) for case in double]


CASES = _table()
assert len({case.id for case in CASES}) == len(CASES), "two cases bear one id"


@st.composite
def drawn_cases(draw: st.DrawFn, max_length: int = 40) -> Case:
    """Any point of the option space at a small size."""
    is_complex = draw(st.booleans())
    x64 = draw(st.integers(0, 5)) == 0
    layout = draw(st.sampled_from(["bdl", "bld"]))
    kinds = ["fixed", "3d", "4d"]
    if is_complex and layout == "bdl":
        kinds += ["3d-interleaved", "4d-interleaved"]
    B, C = draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds))
    # B and C that both vary have one number of groups, and 3-D means one group.
    groups = 1 if "3d" in B + C else draw(st.integers(1, 3))
    u_dtype = F64 if x64 else draw(st.sampled_from([F32, F32, BF16, F16]))
    near_u = st.just(F64) if x64 else st.sampled_from([u_dtype, F32])
    return Case(
        id="drawn",
        batch=draw(st.integers(1, 3)),
        dim=groups * draw(st.integers(1, 4)),
        length=draw(st.integers(1, max_length)),
        dstate=draw(st.integers(1, 19)),
        groups=groups,
        u_dtype=u_dtype,
        delta_dtype=draw(near_u),
        z_dtype=draw(near_u),
        B_dtype=draw(near_u),
        C_dtype=draw(near_u),
        is_complex=is_complex,
        B=B,
        C=C,
        D=draw(st.booleans()),
        z=draw(st.booleans()),
        bias=draw(st.booleans()),
        softplus=draw(st.booleans()),
        initial_state=draw(st.booleans()),
        segments=draw(st.booleans()),
        reverse=draw(st.booleans()),
        layout=layout,
        out_dtype=None if x64 else draw(st.sampled_from([None, None, F32, BF16])),
        last_state=draw(st.booleans()),
        x64=x64,
    )
