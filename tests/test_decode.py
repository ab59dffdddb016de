"""`selective_state_update`, the decode step: against the oracle, and stepped against the scan."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BF16, F16, F32, F64, Case, make_inputs
from checks import check, jit, x64

import jax_sscan


def step_inputs(case: Case, t: int = 0) -> dict[str, Any]:
    """Position t of a "bdl" case with varying B and C, as the arguments of one decode step."""
    inputs = make_inputs(case)
    step = {
        "x": inputs["u"][..., t],
        "dt": inputs["delta"][..., t],
        "A": inputs["A"],
        "B": inputs["B"][..., t],
        "C": inputs["C"][..., t],
    }
    for name, source in (("D", "D"), ("dt_bias", "delta_bias"), ("state", "initial_state")):
        if source in inputs:
            step[name] = inputs[source]
    if "z" in inputs:
        step["z"] = inputs["z"][..., t]
    return step


ALL: dict[str, Any] = {"D": True, "z": True, "bias": True, "softplus": True}
CASES = [
    Case("plain"),
    Case("D", D=True),
    Case("z", z=True),
    Case("bias", bias=True),
    Case("softplus", softplus=True),
    Case("everything", **ALL, dim=24, dstate=16),
    Case("groups", **ALL, dim=24, dstate=17, B="4d", C="4d", groups=3),
    Case("one-group", **ALL, B="4d", C="4d"),
    Case("complex", **ALL, is_complex=True),
    Case("complex-groups", **ALL, is_complex=True, dim=6, B="4d", C="4d", groups=2),
    Case("dstate-300", **ALL, dstate=300),
    Case("dstate-1-dim-1", **ALL, dim=1, dstate=1, batch=1),
    Case("bf16", **ALL, dim=24, u_dtype=BF16, delta_dtype=BF16, z_dtype=BF16, B_dtype=BF16,
         C_dtype=BF16),
    Case("f16", **ALL, u_dtype=F16, delta_dtype=F16, z_dtype=F16, B_dtype=F16, C_dtype=F16),
    Case("bf16-mixed", **ALL, u_dtype=BF16, delta_dtype=F32, z_dtype=BF16, B_dtype=F32),
    Case("f64", **ALL, x64=True, u_dtype=F64, delta_dtype=F64, z_dtype=F64, B_dtype=F64,
         C_dtype=F64),
]  # fmt: skip


def with_state(case: Case) -> Case:
    return Case(**{**case.__dict__, "initial_state": True, "length": 5})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case) -> None:
    step = step_inputs(with_state(case))
    expected_out, expected_state = oracle.selective_state_update(step, case.softplus)
    compute = np.dtype(F64 if case.x64 else F32)
    with x64(case.x64):
        arrays = {name: jnp.asarray(x) for name, x in step.items()}
        out, state = jit(lambda arrays: jax_sscan.selective_state_update(**arrays, dt_softplus=case.softplus))(arrays)
    assert out.dtype == step["x"].dtype and state.dtype == step["state"].dtype
    check(out, expected_out, "out", compute)
    check(state, expected_state, "new_state", compute)


@pytest.mark.parametrize(
    "case",
    [
        Case("real", length=9, **ALL, dim=6, dstate=16),
        Case("groups", length=9, **ALL, dim=6, B="4d", C="4d", groups=2),
        Case("complex", length=9, **ALL, is_complex=True),
    ],
    ids=str,
)
def test_stepping_equals_the_scan(case: Case, implementation: str | None) -> None:
    """A prompt through the scan, the rest token by token: the state that the one leaves is the
    state
    that the other takes."""
    inputs = {name: jnp.asarray(x) for name, x in make_inputs(case).items()}
    out, last = jax_sscan.selective_scan(
        **inputs, delta_softplus=True, return_last_state=True, implementation=implementation
    )
    prompt = 4
    cut = {name: x[..., :prompt] if name in ("u", "delta", "z", "B", "C") else x for name, x in inputs.items()}
    start, state = jax_sscan.selective_scan(
        **cut, delta_softplus=True, return_last_state=True, implementation=implementation
    )
    steps = [start]
    for t in range(prompt, case.length):
        step = {name: jnp.asarray(x) for name, x in step_inputs(case, t).items()}
        y, state = jax_sscan.selective_state_update(state, **step, dt_softplus=True)
        steps.append(y[..., None])
    scale = float(jnp.abs(out).max())
    np.testing.assert_allclose(jnp.concatenate(steps, -1), out, rtol=1e-5, atol=1e-6 * scale)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-5)


def test_arguments_by_position() -> None:
    """The order of mamba_ssm: state, x, dt, A, B, C, D, z, dt_bias, dt_softplus."""
    step = step_inputs(with_state(Case("everything", **ALL)))
    names = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    out, state = jax_sscan.selective_state_update(*(jnp.asarray(step[n]) for n in names), True)
    expected_out, expected_state = oracle.selective_state_update(step, True)
    check(out, expected_out, "out")
    check(state, expected_state, "new_state")


def test_gradients_of_a_step_equal_those_of_the_scan_at_length_one() -> None:
    """Decode steps are plain JAX operations: they are differentiable, and by the same
    convention."""
    case = Case("step", length=1, is_complex=True, initial_state=True, **ALL)
    inputs = make_inputs(case)
    step = {name: jnp.asarray(x) for name, x in step_inputs(case).items()}
    rng = np.random.default_rng(0)
    out_ct = rng.standard_normal((2, 3)).astype(np.float32)
    state_ct = rng.standard_normal((2, 3, 3)) + 1j * rng.standard_normal((2, 3, 3))
    state_ct = state_ct.astype(np.complex64)
    _, vjp = jax.vjp(lambda s: jax_sscan.selective_state_update(**s, dt_softplus=True), step)
    (got,) = vjp((jnp.asarray(out_ct), jnp.asarray(state_ct)))
    expected = oracle.selective_scan_gradients(
        inputs, oracle.ScanOptions(delta_softplus=True), out_ct[..., None], state_ct
    )
    for name, source in (
        ("x", "u"), ("dt", "delta"), ("A", "A"), ("B", "B"), ("C", "C"), ("D", "D"), ("z", "z"),
        ("dt_bias", "delta_bias"), ("state", "initial_state"),
    ):  # fmt: skip
        wanted = expected[source]
        check(got[name], wanted[..., 0] if wanted.shape[-1] == 1 else wanted, name)


@pytest.mark.parametrize("in_axes", [0, 1])
def test_vmap_equals_a_loop(in_axes: int) -> None:
    step = step_inputs(with_state(Case("everything", **ALL)))
    arrays = {name: jnp.asarray(x) for name, x in step.items()}
    batched = {k: jnp.stack([arrays[k], 0.5 * arrays[k]], in_axes) for k in ("state", "x", "B")}
    axes = {name: in_axes if name in batched else None for name in arrays}
    got = jax.vmap(lambda s: jax_sscan.selective_state_update(**s), (axes,))({**arrays, **batched})
    for i in range(2):
        one = {**arrays, **{k: jnp.take(v, i, in_axes) for k, v in batched.items()}}
        expected = jax_sscan.selective_state_update(**one)
        for g, e in zip(got, expected, strict=True):
            np.testing.assert_allclose(g[i], e, rtol=1e-5, atol=1e-6)
