"""The names that mamba_ssm users know, and the two kernels run directly, outside autodiff."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BF16, EVERYTHING, MAMBA, Case, make_inputs
from checks import check, jit, keywords_of, options_of, split
from oracle import selective_scan, selective_scan_gradients, ungated_scan

import jax_sscan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@pytest.mark.parametrize(
    "case",
    [
        Case("real", length=19, D=True, bias=True, softplus=True),
        Case("plain"),
        Case("complex", is_complex=True, B="3d-interleaved", C="3d-interleaved", D=True),
        Case("bf16", u_dtype=BF16, delta_dtype=BF16, B_dtype=BF16, C_dtype=BF16, D=True),
    ],
    ids=str,
)
def test_selective_scan_fn_without_a_gate(case: Case) -> None:
    inputs = make_inputs(case)
    arrays = [jnp.asarray(inputs[n]) if n in inputs else None for n in NAMES]
    out = jax_sscan.selective_scan_fn(*arrays, case.softplus)
    assert isinstance(out, jax.Array) and out.dtype == inputs["u"].dtype
    check(out, selective_scan(inputs, options_of(case))[0], "out")


@pytest.mark.parametrize("is_complex", [False, True])
def test_selective_scan_fn_with_a_gate(is_complex: bool) -> None:
    """(out, out_z): before the gate, D u included, and after it."""
    case = Case("gate", length=19, is_complex=is_complex, **MAMBA)
    inputs = make_inputs(case)
    out, out_z = jax_sscan.selective_scan_fn(*(jnp.asarray(inputs[n]) for n in NAMES), True)
    check(out, ungated_scan(inputs, options_of(case)), "out")
    check(out_z, selective_scan(inputs, options_of(case))[0], "out_z")


def test_selective_scan_fn_differentiates_through_both_results() -> None:
    """d(out, out_z) = the ungated scan's gradient at one cotangent plus the gated one's at the
    other."""
    case = Case("gate", length=19, **MAMBA)
    inputs = make_inputs(case)
    rng = np.random.default_rng(0)
    ct, ct_z = (rng.standard_normal(inputs["u"].shape).astype(np.float32) for _ in range(2))

    @jit
    def gradients(arrays: Any) -> Any:
        _, vjp = jax.vjp(lambda a: jax_sscan.selective_scan_fn(**a, delta_softplus=True), arrays)
        return vjp((ct, ct_z))[0]

    got = gradients(split(inputs)[0])
    gated = selective_scan_gradients(inputs, options_of(case), ct_z)
    ungated_inputs = {k: v for k, v in inputs.items() if k != "z"}
    ungated = selective_scan_gradients(ungated_inputs, options_of(case), ct)
    for name, expected in gated.items():
        check(got[name], expected + ungated[name] if name in ungated else expected, name)


KERNEL_CASES = [
    Case("plain"),
    Case("everything", length=129, **EVERYTHING),
    Case("one-chunk", length=5, **EVERYTHING),
    Case("one-step", batch=3, length=1, layout="bld", **MAMBA),
    Case("everything-bld", length=33, layout="bld", **EVERYTHING),
    Case("reverse", length=33, reverse=True, **EVERYTHING),
    Case("fixed", length=33, B="fixed", C="fixed", **EVERYTHING),
    Case("groups-bf16", length=33, dim=6, B="4d", C="4d", groups=2, u_dtype=BF16,
         delta_dtype=BF16, z_dtype=BF16, B_dtype=BF16, C_dtype=BF16, **MAMBA),
    Case("complex", length=33, is_complex=True, **EVERYTHING),
    Case("interleaved", is_complex=True, B="3d-interleaved", C="3d-interleaved", **MAMBA),
    Case("out-dtype", out_dtype=BF16, **MAMBA),
]  # fmt: skip
FIELDS = (*NAMES, "initial_state")


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_forward_and_backward_equal_the_vjp(case: Case, implementation: str | None) -> None:
    """The pair is what autodiff runs: same results, None for what was not given."""
    inputs = make_inputs(case)
    arrays, rest = split(inputs)
    keywords = {
        **keywords_of(case),
        **rest,
        "implementation": implementation,
    }

    def scan(arrays: Any) -> Any:
        return jax_sscan.selective_scan(**arrays, **keywords, return_last_state=True)

    @jit
    def through_autodiff(arrays: Any, out_ct: Any, last_ct: Any) -> Any:
        results, vjp = jax.vjp(scan, arrays)
        return results, vjp((out_ct, last_ct))[0]

    forward = jit(lambda arrays: tuple(jax_sscan.selective_scan_forward(**arrays, **keywords)))
    out, last, states, ungated = forward(arrays)
    rng = np.random.default_rng(0)
    out_ct = jnp.asarray(rng.standard_normal(out.shape)).astype(out.dtype)
    last_ct = jnp.asarray(rng.standard_normal(last.shape)).astype(last.dtype)
    (expected_out, expected_last), expected = through_autodiff(arrays, out_ct, last_ct)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    narrow: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-3}

    def same(got: Any, wanted: Any, name: str) -> None:
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, name
        wide = np.complex64 if jnp.iscomplexobj(got) else np.float32
        scale = 1 + float(np.abs(np.asarray(wanted, wide)).max())
        bound = tolerance if got.dtype in (jnp.float32, jnp.complex64) else narrow
        np.testing.assert_allclose(
            np.asarray(got, wide) / scale, np.asarray(wanted, wide) / scale, err_msg=name, **bound
        )

    same(out, expected_out, "out")
    same(last, expected_last, "last_state")
    if "z" in arrays:
        assert ungated.dtype == out.dtype
        check(ungated, ungated_scan(inputs, options_of(case)), "ungated")
    else:
        assert ungated is None

    backward = jit(
        lambda arrays, states, ungated, out_ct, last_ct: jax_sscan.selective_scan_backward(
            **arrays, **keywords, states=states, ungated=ungated, out_cotangent=out_ct, last_state_cotangent=last_ct
        )
    )
    gradients = backward(arrays, states, ungated, out_ct, last_ct)
    assert set(gradients._fields) == set(FIELDS)
    for name in FIELDS:
        if name in expected:
            same(getattr(gradients, name), expected[name], name)
        else:
            assert getattr(gradients, name) is None, name


def test_forward_returns_a_named_tuple() -> None:
    inputs, _ = split(make_inputs(Case("plain")))
    result = jax_sscan.selective_scan_forward(**inputs)
    assert result._fields == ("out", "last_state", "states", "ungated")


def test_backward_without_a_cotangent_of_the_state(implementation: str | None) -> None:
    """last_state_cotangent=None means zero."""
    case = Case("none", length=19, **EVERYTHING)
    inputs = make_inputs(case)
    arrays, rest = split(inputs)
    keywords = {**keywords_of(case), **rest, "implementation": implementation}
    _, _, states, ungated = jax_sscan.selective_scan_forward(**arrays, **keywords)
    ct = np.random.default_rng(0).standard_normal(inputs["u"].shape).astype(np.float32)
    got = jax_sscan.selective_scan_backward(
        **arrays, **keywords, states=states, ungated=ungated, out_cotangent=jnp.asarray(ct)
    )
    for name, expected in selective_scan_gradients(inputs, options_of(case), ct).items():
        check(getattr(got, name), expected, name)


def test_backward_refuses_a_cotangent_of_another_shape() -> None:
    case = replace(Case("wrong"), length=5)
    arrays, _ = split(make_inputs(case))
    states = jax_sscan.selective_scan_forward(**arrays).states
    with pytest.raises(ValueError, match=r"(?s)out_cotangent.*\(2, 3, 4\)"):
        jax_sscan.selective_scan_backward(**arrays, states=states, out_cotangent=jnp.zeros((2, 3, 4)))


def test_backward_takes_the_ungated_output_with_z_only() -> None:
    arrays, _ = split(make_inputs(Case("gate", length=20, **MAMBA)))
    out, _, states, ungated = jax_sscan.selective_scan_forward(**arrays)
    backward = partial(jax_sscan.selective_scan_backward, states=states, out_cotangent=jnp.zeros_like(out))
    with pytest.raises(ValueError, match=r"ungated must be given with z.*`ungated` of selective_scan_forward"):
        backward(**arrays)
    with pytest.raises(ValueError, match=rf"(?s)ungated.*{re.escape(str(out.shape))}"):
        backward(**arrays, ungated=ungated[1:])
    with pytest.raises(TypeError, match=r"ungated.*float32.*float16"):
        backward(**arrays, ungated=ungated.astype(jnp.float16))
    del arrays["z"]
    with pytest.raises(ValueError, match=r"ungated must be given with z, and only with it"):
        backward(**arrays, ungated=ungated)


def test_signatures() -> None:
    """Positional order is an interface of its own: torch code calls these by position."""
    order = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"]
    for function in (
        jax_sscan.selective_scan,
        jax_sscan.selective_scan_fn,
        jax_sscan.selective_scan_forward,
        jax_sscan.selective_scan_backward,
    ):
        parameters = list(inspect.signature(function).parameters)
        assert parameters[: len(order)] == order, function.__name__
    update = list(inspect.signature(jax_sscan.selective_state_update).parameters)
    assert update[:10] == [
        "state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus",
    ]  # fmt: skip
