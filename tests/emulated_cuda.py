"""Runs cases on the CUDA kernels without a GPU: `python emulated_cuda.py LIBRARY [EVERY]`, see test_emulated_cuda.py.

In a process of its own, where the library, tests/native/emulator with the kernels, takes the place of the native CPU
kernel. EVERY: one case in so many.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import numpy as np
from cases import BF16, CASES, F16, F32, MAMBA, Case, all_of, drawn_cases
from checks import check_case
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_cuda import BLOCKS


class EmulatedModule(ModuleType):
    """What `jax_sscan._cpu` offers, with other kernels."""

    def __init__(self, name: str, library: str) -> None:
        super().__init__(name)
        self.library = ctypes.CDLL(library)

    def handlers(self) -> dict[str, Any]:
        calls = {"forward": self.library.EmulatedForward, "backward": self.library.EmulatedBackward}
        return {name: jax.ffi.pycapsule(call) for name, call in calls.items()}

    def workspace_bytes(self, *sizes: int, is_double: bool, has_states: bool, **flags: Any) -> tuple[int, int]:
        assert not is_double
        names = ("chunk", "instances", "channel_last", "B_varies", "C_varies", "has_segments", "is_complex")
        numbers = [ctypes.c_int64(size) for size in sizes]
        numbers += [ctypes.c_int64(int(flags[name])) for name in names[:2]]
        bools = [ctypes.c_bool(bool(flags[name])) for name in names[2:]]
        result = np.zeros(2, np.int64)
        self.library.EmulatedWorkspaceBytes(*numbers, *bools, result.ctypes.data_as(ctypes.c_void_p))
        return int(result[0]), int(result[1])


def kernels() -> list[Case]:
    """Sizes, dtypes and layouts that take every kernel, beside the table."""
    cases = [
        Case(
            f"{name} {layout}{' segments' * segments}", batch=batch, dim=dim, length=length, dstate=16, layout=layout,
            segments=segments, initial_state=True, **MAMBA,
        )
        for batch, dim, length, segments, name in [(*p.values[:4], p.id) for p in BLOCKS]
        for layout in ("bdl", "bld")
        if batch * dim * length < 300_000  # seconds, not minutes
    ]  # fmt: skip
    for layout in ("bdl", "bld"):
        for dtypes in ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)):
            for length, dim, dstate in ((50, 198, 16), (51, 197, 16), (56, 200, 40), (300, 24, 16), (33, 130, 5)):
                for segments in (False, True):
                    cases.append(
                        Case(
                            f"{dtypes} {length} x {dim} x {dstate} {layout}{' segments' * segments}", batch=2, dim=dim,
                            length=length, dstate=dstate, layout=layout, segments=segments, reverse=segments,
                            initial_state=True, **MAMBA,
                            **{**all_of(dtypes[1]), "u_dtype": dtypes[0], "z_dtype": dtypes[0]},
                        )
                    )  # fmt: skip
    # In spans of 11 tiles, which are long here: the states of one lane are forgotten before another's.
    for layout in ("bdl", "bld"):
        for batch, dim, dtype in ((2, 24, F32), (1, 40, BF16)):
            cases.append(
                Case(
                    f"forgets {batch} x {dim} {dtype} {layout}", batch=batch, dim=dim, length=490, dstate=16,
                    layout=layout, initial_state=True, fast_first=True, **all_of(dtype), **MAMBA,
                )
            )  # fmt: skip
    # Two channels to a lane, in either pass, and blocks of 80, of 16 bits.
    for batch, dim, length in ((70, 188, 20), (16, 1020, 20), (16, 252, 36)):
        for layout in ("bdl", "bld"):
            cases.append(
                Case(
                    f"bfloat16 {batch} x {dim} x {length} {layout}", batch=batch, dim=dim, length=length, dstate=16,
                    layout=layout, **all_of(BF16), **MAMBA,
                )
            )  # fmt: skip
    return cases


def drawn(count: int) -> list[Case]:
    """Any options, the same in each run, at sizes that let 16 bytes be moved at once, and parts of blocks and tiles."""
    cases = []
    some = st.sampled_from

    @settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate])
    @given(drawn_cases(), some([8, 24, 40, 104]), some([16, 24, 48]), some([4, 16, 40]))
    def draw(case: Case, group_dim: int, length: int, dstate: int) -> None:
        name = f"drawn {len(cases)}"
        cases.append(replace(case, id=name, dim=case.groups * group_dim, length=length, dstate=dstate))

    draw()
    return cases


def main(library: str, every: int = 1) -> None:
    sys.modules["jax_sscan._cpu"] = EmulatedModule("jax_sscan._cpu", library)
    failed, cases = [], [case for case in [*CASES, *kernels(), *drawn(70)] if not case.x64][::every]
    for case in cases:
        try:
            check_case(case, "cpu")
        except (AssertionError, ValueError) as error:  # the latter of NaNs alone
            failed.append(f"{case}: {error}")
    print(*failed, sep="\n")
    print(f"{len(cases) - len(failed)} of {len(cases)} cases pass")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
