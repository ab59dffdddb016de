"""The oracle itself: against closed forms, against finite differences, and its bound's sharpness.

Everything else in the suite trusts the oracle, so it must not be trusted for its looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import EVERYTHING, F64, MAMBA, Case, make_inputs
from checks import K, excess, options_of

SCANS = [
    Case("plain", length=4),
    Case("mamba", length=4, **MAMBA),
    Case("everything", length=6, dim=4, B="4d", C="4d", groups=2, **EVERYTHING),
    Case("everything-bld", length=6, dim=4, B="4d", C="4d", groups=2, layout="bld", **EVERYTHING),
    Case("reverse", length=6, reverse=True, **EVERYTHING),
    Case("reverse-bld", length=6, reverse=True, layout="bld", B="fixed", **EVERYTHING),
    Case("fixed", length=4, B="fixed", C="fixed", **EVERYTHING),
    Case("complex", length=5, is_complex=True, **EVERYTHING),
    Case("complex-fixed-reverse", length=5, is_complex=True, B="fixed", C="fixed", reverse=True,
         segments=True, initial_state=True),
    Case("complex-groups-bld", length=5, dim=4, is_complex=True, B="4d", C="3d", groups=2,
         layout="bld", **EVERYTHING),
    Case("interleaved", length=5, dim=4, is_complex=True, B="4d-interleaved", C="3d-interleaved",
         groups=2, reverse=True, **EVERYTHING),
]  # fmt: skip


def double_inputs(case: Case) -> dict[str, Any]:
    """The case's data widened, with segment boundaries put where short sequences have some."""
    inputs = {k: oracle.wide(v) for k, v in make_inputs(case).items() if k != "segment_ids"}
    if case.segments:
        ids = np.ones((case.batch, case.length), np.int32)
        ids[0, case.length // 2 :] = 0
        ids[-1, 1:3] = 7
        inputs["segment_ids"] = ids
    return inputs


def random_like(rng: np.random.Generator, x: Any) -> Any:
    r = rng.standard_normal(x.shape)
    return r + 1j * rng.standard_normal(x.shape) if np.iscomplexobj(x) else r


def finite_differences(
    f: Callable[[Mapping[str, Any]], float], inputs: Mapping[str, Any], name: str, step: float
) -> Any:
    """The gradient of a real f in JAX's convention: df/d(re) - i df/d(im), element by element."""
    x = inputs[name]
    gradient = np.zeros_like(x)

    def difference(index: tuple[int, ...], by: complex) -> float:
        values = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * by
            values.append(f({**inputs, name: moved}))
        return (values[0] - values[1]) / (2 * step)

    for index in np.ndindex(*x.shape):
        gradient[index] = difference(index, step)
        if np.iscomplexobj(x):
            gradient[index] -= 1j * difference(index, 1j * step)
    return gradient


@pytest.mark.parametrize("case", SCANS, ids=str)
def test_scan_gradients_match_finite_differences(case: Case) -> None:
    rng = np.random.default_rng(0)
    inputs = double_inputs(case)
    options = options_of(case)
    out, last = oracle.selective_scan(inputs, options)
    out_ct, last_ct = random_like(rng, out.value), random_like(rng, last.value)

    def loss(inputs: Mapping[str, Any]) -> float:
        out, last = oracle.selective_scan(inputs, options)
        return float(np.sum(out_ct * out.value) + np.sum(last_ct * last.value).real)

    gradients = oracle.selective_scan_gradients(inputs, options, out_ct, last_ct)
    assert set(gradients) == set(inputs) - {"segment_ids"}
    for name, gradient in gradients.items():
        numeric = finite_differences(loss, inputs, name, 1e-5)
        assert gradient.shape == inputs[name].shape
        np.testing.assert_allclose(gradient.value, numeric, rtol=1e-6, atol=2e-7 * (1 + np.abs(numeric).max()))


def closed_form(case: Case, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Every output as an explicit sum over all earlier inputs; no recurrence at all. Layout "bdl",
    varying 3-D B and C, no softplus, bias or gate."""
    u, delta, A, B, C = (inputs[k] for k in ("u", "delta", "A", "B", "C"))
    batch, dim, length = u.shape
    ids = inputs.get("segment_ids", np.zeros((batch, length)))
    if case.reverse:
        u, delta, B, C, ids = (np.flip(x, -1) for x in (u, delta, B, C, ids))
    out = np.zeros((batch, dim, length))
    last = np.zeros((batch, *A.shape), A.dtype)
    for b in range(batch):
        for d in range(dim):
            for t in range(length):
                begin = t
                while begin and ids[b, begin - 1] == ids[b, begin]:
                    begin -= 1
                h = sum(
                    np.exp(A[d] * delta[b, d, s + 1 : t + 1].sum()) * (delta[b, d, s] * u[b, d, s] * B[b, :, s])
                    for s in range(begin, t + 1)
                )
                if begin == 0 and "initial_state" in inputs:
                    decay = np.exp(A[d] * delta[b, d, : t + 1].sum())
                    h = h + decay * inputs["initial_state"][b, d]
                y = np.sum(C[b, :, t] * h)
                out[b, d, t] = 2 * y.real if case.is_complex else y
                last[b, d] = h
    return out[:, :, ::-1] if case.reverse else out, last


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_scan_matches_the_closed_form(is_complex: bool, reverse: bool, extras: bool) -> None:
    case = Case("tiny", length=6, is_complex=is_complex, reverse=reverse, initial_state=extras,
                segments=extras)  # fmt: skip
    inputs = double_inputs(case)
    out, last = oracle.selective_scan(inputs, options_of(case))
    expected_out, expected_last = closed_form(case, inputs)
    np.testing.assert_allclose(out.value, expected_out, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(last.value, expected_last, rtol=1e-12, atol=1e-13)


def test_extras_around_the_scan() -> None:
    """softplus, bias, D and the gate, spelled out with other formulas than the oracle's."""
    case = Case("extras", length=5, **MAMBA)
    inputs = double_inputs(case)
    inputs["delta"][0, 0, 2] = 30.0
    plain = {k: inputs[k] for k in ("u", "A", "B", "C")}
    raw = inputs["delta"] + inputs["delta_bias"][:, None]
    plain["delta"] = np.where(raw > 20, raw, np.logaddexp(0.0, raw))
    y = oracle.selective_scan(plain)[0].value + inputs["D"][:, None] * inputs["u"]
    expected = y * inputs["z"] / (1 + np.exp(-inputs["z"]))
    out, _ = oracle.selective_scan(inputs, options_of(case))
    np.testing.assert_allclose(out.value, expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 4)])
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_scan_of_nothing(shape: tuple[int, int, int], layout: str) -> None:
    batch, dim, length = shape
    case = Case("nothing", batch=batch, dim=dim, length=length, initial_state=True, layout=layout)
    inputs = double_inputs(case)
    out, last = oracle.selective_scan(inputs, options_of(case))
    assert out.shape == inputs["u"].shape
    np.testing.assert_array_equal(last.value, inputs["initial_state"])
    ct = np.ones_like(last.value)
    gradients = oracle.selective_scan_gradients(inputs, options_of(case), out.value, ct)
    np.testing.assert_array_equal(gradients["initial_state"].value, ct)
    assert not gradients["A"].value.any()
    del inputs["initial_state"]
    assert not oracle.selective_scan(inputs, options_of(case))[1].value.any()


def float32_scan(inputs: Mapping[str, Any], keep: Callable[[Any], Any]) -> Any:
    """A plain float32 scan, with a hook that may degrade the state at every step."""
    u, delta, A, B, C = (np.asarray(inputs[k], np.float32) for k in ("u", "delta", "A", "B", "C"))
    h = np.zeros((u.shape[0], *A.shape), np.float32)
    out = np.zeros_like(u)
    for t in range(u.shape[2]):
        decay = np.exp(delta[:, :, t, None] * A)
        h = keep(decay * h + (delta * u)[:, :, t, None] * B[:, None, :, t])
        out[:, :, t] = (h * C[:, None, :, t]).sum(-1)
    return out


@pytest.mark.parametrize("length", [3, 60, 1000])
def test_bound_accepts_float32_and_rejects_less(length: int) -> None:
    """The bound means something: honest float32 is well inside it; a state kept in bf16, or a
    tensor core's 10-bit mantissas in the sum over states, is far outside."""
    case = Case("bound", length=length, batch=1, dim=5, dstate=16)
    inputs = make_inputs(case)
    out, _ = oracle.selective_scan(inputs)
    honest = excess(float32_scan(inputs, lambda h: h), out, np.float32)
    assert 0.002 < honest < 1.0, honest

    def to_bf16(h: Any) -> Any:
        return h.astype(ml_dtypes.bfloat16).astype(np.float32)

    def to_tf32(h: Any) -> Any:
        return (h.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    assert excess(float32_scan(inputs, to_bf16), out, np.float32) > 30
    assert excess(float32_scan(inputs, to_tf32), out, np.float32) > 5
    assert K <= 4, "a few ulps times the conditioning is the promise"


CONVS = [
    {},
    {"silu": True, "bias": True},
    {"silu": True, "bias": True, "initial_state": True, "segments": True},
    {"silu": True, "bias": True, "initial_state": True, "segments": True, "layout": "bld"},
    {"width": 1, "bias": True},
    {"length": 2, "width": 4, "initial_state": True, "silu": True},
]


def conv_inputs(
    length: int = 7,
    width: int = 4,
    bias: bool = False,
    initial_state: bool = False,
    segments: bool = False,
    layout: str = "bdl",
    silu: bool = False,
) -> tuple[dict[str, Any], oracle.ConvOptions]:
    rng = np.random.default_rng(3)
    inputs = {"x": rng.standard_normal((2, 3, length)), "weight": rng.standard_normal((3, width))}
    if layout == "bld":
        inputs["x"] = inputs["x"].transpose(0, 2, 1).copy()
    if bias:
        inputs["bias"] = rng.standard_normal(3)
    if initial_state:
        inputs["initial_state"] = rng.standard_normal((2, 3, width - 1))
    if segments:
        inputs["segment_ids"] = np.array([[1, 1, 1, 2, 2, 1, 1], [5, 5, 4, 4, 4, 4, 4]])
    return inputs, oracle.ConvOptions(silu, layout)


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_conv_gradients_match_finite_differences(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    inputs, static = conv_inputs(**options)
    out, final = oracle.causal_conv1d(inputs, static)
    out_ct, final_ct = random_like(rng, out.value), random_like(rng, final.value)

    def loss(inputs: Mapping[str, Any]) -> float:
        out, final = oracle.causal_conv1d(inputs, static)
        return float(np.sum(out_ct * out.value) + np.sum(final_ct * final.value))

    gradients = oracle.causal_conv1d_gradients(inputs, static, out_ct, final_ct)
    assert set(gradients) == set(inputs) - {"segment_ids"}
    for name, gradient in gradients.items():
        numeric = finite_differences(loss, inputs, name, 1e-5)
        np.testing.assert_allclose(gradient.value, numeric, rtol=1e-6, atol=1e-8)


def test_conv_matches_numpy_convolve() -> None:
    inputs, static = conv_inputs(bias=True)
    out, final = oracle.causal_conv1d(inputs, static)
    for b in range(2):
        for d in range(3):
            full = np.convolve(inputs["x"][b, d], inputs["weight"][d, ::-1])[:7]
            np.testing.assert_allclose(out.value[b, d], full + inputs["bias"][d], rtol=1e-12)
    np.testing.assert_array_equal(final.value, inputs["x"][:, :, -3:])


def test_conv_segments_are_separate_sequences() -> None:
    """Row 0 holds the segments 1 1 1 | 2 2 | 1 1: id 1 comes back and is a new sequence."""
    inputs, static = conv_inputs(bias=True, segments=True, silu=True)
    out, final = oracle.causal_conv1d(inputs, static)
    for begin, end in ((0, 3), (3, 5), (5, 7)):
        alone = {k: inputs[k] for k in ("weight", "bias")}
        alone["x"] = inputs["x"][:1, :, begin:end]
        expected, state = oracle.causal_conv1d(alone, static)
        np.testing.assert_allclose(out.value[:1, :, begin:end], expected.value, rtol=1e-12)
    np.testing.assert_array_equal(final.value[:1], state.value)


@pytest.mark.parametrize("is_complex", [False, True])
def test_update_is_one_step_of_the_scan(is_complex: bool) -> None:
    """Two oracles written apart agree: the decode step, and the scan at length 1."""
    case = Case("step", length=1, dim=4, B="4d", C="4d", groups=2, is_complex=is_complex,
                D=True, z=True, bias=True, softplus=True, initial_state=True,
                u_dtype=F64, x64=True)  # fmt: skip
    inputs = make_inputs(case)
    out, last = oracle.selective_scan(inputs, options_of(case))
    step = {
        "state": inputs["initial_state"],
        "x": inputs["u"][..., 0],
        "dt": inputs["delta"][..., 0],
        "A": inputs["A"],
        "B": inputs["B"][..., 0],
        "C": inputs["C"][..., 0],
        "D": inputs["D"],
        "z": inputs["z"][..., 0],
        "dt_bias": inputs["delta_bias"],
    }
    out_step, state = oracle.selective_state_update(step, dt_softplus=True)
    np.testing.assert_allclose(out_step.value, out.value[..., 0], rtol=1e-13)
    np.testing.assert_allclose(state.value, last.value, rtol=1e-13)
