"""`selective_scan`, every implementation against the float64 oracle and against its own laws.

How close is close: see `checks.K` and `checks.excess`. In short, each element of each result may be
off by a few epsilons of the compute dtype (float32, or float64 in x64 mode) times the conditioning
that the oracle found for that very element, plus one rounding into the result's dtype. So a bf16 or
f16 result is held to one rounding of a float32 computation, not to a percentage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BF16, CASES, EVERYTHING, F16, F32, MAMBA, Case, drawn_cases, make_inputs
from checks import check, check_case, cotangents, keywords_of, options_of, run, x64
from conftest import default_here
from hypothesis import given, seed, settings
from oracle import selective_scan

import jax_sscan


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, implementation: str | None) -> None:
    """Values, result dtypes and every gradient, last_state's included.

    Every fourth case is compiled just as users compile it; see `checks.jit`.
    """
    check_case(case, implementation, optimize=CASES.index(case) % 4 == 0)


@settings(max_examples=30)
@given(case=drawn_cases())
def test_drawn_case(case: Case, implementation: str | None) -> None:
    """The same over random points of the option space, for the combinations nobody thought of."""
    check_case(case, implementation, seed=17)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
def test_drawn_case_slow(part: int, implementation: str | None) -> None:
    """More of them, in parts that xdist runs side by side."""

    @seed(part)
    @settings(max_examples=25)
    @given(case=drawn_cases(max_length=300))
    def run_part(case: Case) -> None:
        check_case(case, implementation, seed=23)

    run_part()


def scan(case: Case, inputs: dict[str, Any], implementation: str | None, **more: Any) -> tuple[Any, Any]:
    arrays = {name: jnp.asarray(x) for name, x in inputs.items()}
    return jax_sscan.selective_scan(
        **arrays, **{**keywords_of(case), "return_last_state": True, **more},
        implementation=implementation,
    )  # fmt: skip


def run_random(case: Case, inputs: dict[str, Any], implementation: str | None) -> Any:
    out, last = selective_scan(inputs, options_of(case))
    out_ct, last_ct = cotangents(
        case,
        jax.ShapeDtypeStruct(out.shape, case.out_dtype or np.asarray(inputs["u"]).dtype),
        jax.ShapeDtypeStruct(last.shape, np.asarray(inputs["A"]).dtype),
    )
    return (*run(case, inputs, out_ct, last_ct, implementation), out_ct, last_ct)


def close(actual: Any, expected: Any, name: str) -> None:
    """Two float32 results of one implementation that differ only by the order of operations."""
    a, e = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-6 * (1 + np.abs(e).max()), err_msg=name)


def time_axis(name: str, array: Any, case: Case) -> int | None:
    """Where an argument's time axis is; None where it has none."""
    if name == "segment_ids":
        return 1
    if name in ("u", "delta", "z"):
        return 2 if case.layout == "bdl" else 1
    if name in ("B", "C") and array.ndim > 2:
        return array.ndim - 1 if case.layout == "bdl" else 1
    return None


def slice_time(inputs: dict[str, Any], case: Case, begin: int, end: int) -> dict[str, Any]:
    def cut(name: str, x: Any) -> Any:
        axis = time_axis(name, x, case)
        return x if axis is None else np.take(x, np.arange(begin, end), axis)

    return {name: cut(name, x) for name, x in inputs.items()}


@pytest.mark.parametrize(
    "case",
    [
        Case("bdl", length=53, B="fixed", **EVERYTHING),
        Case("bld-complex", length=41, layout="bld", is_complex=True, **EVERYTHING),
        Case("reverse", length=41, reverse=True, **EVERYTHING),
    ],
    ids=str,
)
def test_two_halves_with_the_state_passed_on_equal_the_whole(case: Case, implementation: str | None) -> None:
    """The state is all that crosses time, forwards; its cotangent is all that crosses it backwards.

    The cut is put inside a segment: the second half continues the state that it is given.
    """
    inputs = make_inputs(case)
    cut = case.length // 3
    ids = inputs["segment_ids"]
    ids[:, cut - 1] = ids[:, cut]
    out, last, whole, out_ct, last_ct = run_random(case, inputs, implementation)

    axis = time_axis("u", inputs["u"], case)
    assert axis is not None
    halves = [slice_time(inputs, case, 0, cut), slice_time(inputs, case, cut, case.length)]
    cts = [np.take(out_ct, np.arange(*s), axis) for s in ((0, cut), (cut, case.length))]
    if case.reverse:
        halves.reverse()
        cts.reverse()
    first, second = halves
    first_ct, second_ct = cts

    def half(inputs: dict[str, Any], out_ct: Any, last_ct: Any) -> Any:
        return run(replace(case, initial_state=True), inputs, out_ct, last_ct, implementation)

    # Forward once to get the state; then backward, the later half first.
    _, middle = scan(case, first, implementation)
    out2, last2, grad2 = half({**second, "initial_state": np.asarray(middle)}, second_ct, last_ct)
    out1, _, grad1 = half(first, first_ct, np.asarray(grad2["initial_state"]))

    order = (lambda a, b: (b, a)) if case.reverse else (lambda a, b: (a, b))
    close(jnp.concatenate(order(out1, out2), axis), out, "out")
    close(last2, last, "last_state")
    close(grad1["initial_state"], whole["initial_state"], "initial_state")
    for name, gradient in whole.items():
        if name == "initial_state":
            continue
        along = time_axis(name, inputs[name], case)
        joined = grad1[name] + grad2[name] if along is None else jnp.concatenate(order(grad1[name], grad2[name]), along)
        close(joined, gradient, f"gradient of {name}")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_packed_sequences_equal_sequences_apart(layout: str, reverse: bool, implementation: str | None) -> None:
    """Three documents packed into one row; two of them bear the same id, apart from each other."""
    case = Case("packed", batch=1, length=31, reverse=reverse, layout=layout, **MAMBA)
    inputs = make_inputs(case)
    bounds = [(0, 9), (9, 10), (10, 31)]
    ids = np.concatenate([np.full(9, 4), np.full(1, 2), np.full(21, 4)])[None].astype(np.int32)
    packed = {**inputs, "segment_ids": ids}
    out, last, whole, out_ct, last_ct = run_random(case, packed, implementation)
    final = bounds[0] if reverse else bounds[-1]
    axis = time_axis("u", inputs["u"], case)
    assert axis is not None
    apart = []
    for begin, end in bounds:
        ct = np.take(out_ct, np.arange(begin, end), axis)
        seed = last_ct if (begin, end) == final else np.zeros_like(last_ct)
        apart.append(run(case, slice_time(inputs, case, begin, end), ct, seed, implementation))
        if (begin, end) == final:
            close(apart[-1][1], last, "last_state")
    close(jnp.concatenate([a[0] for a in apart], axis), out, "out")
    for name, gradient in whole.items():
        along = time_axis(name, inputs[name], case)
        parts = [a[2][name] for a in apart]
        joined = sum(parts) if along is None else jnp.concatenate(parts, along)
        close(joined, gradient, f"gradient of {name}")


@pytest.mark.parametrize("is_complex", [False, True])
def test_reverse_is_the_flipped_scan(is_complex: bool, implementation: str | None) -> None:
    """Segments and the initial state included: everything runs from the last position to the
    first."""
    case = Case("flip", length=45, dim=6, B="4d", C="4d", groups=2, is_complex=is_complex,
                reverse=True, **EVERYTHING)  # fmt: skip
    inputs = make_inputs(case)

    def flip(tree: dict[str, Any]) -> dict[str, Any]:
        axes = {name: time_axis(name, x, case) for name, x in tree.items()}
        return {k: x if axes[k] is None else np.flip(x, axes[k]) for k, x in tree.items()}

    out, last, grads, out_ct, last_ct = run_random(case, inputs, implementation)
    flipped = run(replace(case, reverse=False), flip(inputs), np.flip(out_ct, -1), last_ct, implementation)
    close(np.flip(flipped[0], -1), out, "out")
    close(flipped[1], last, "last_state")
    for name, gradient in flip(flipped[2]).items():
        close(gradient, grads[name], f"gradient of {name}")


def test_layouts_agree(implementation: str | None) -> None:
    """Layout "bld" is "bdl" with the axes moved, for values and gradients."""
    case = Case("layouts", length=33, dim=6, B="4d", C="3d", groups=1, **EVERYTHING)
    inputs = make_inputs(case)

    def move(tree: dict[str, Any]) -> dict[str, Any]:
        moved = dict(tree)
        for name, x in tree.items():
            axis = time_axis(name, x, case)
            if axis is not None:
                moved[name] = np.moveaxis(x, axis, 1)
        return moved

    out, last, grads, out_ct, last_ct = run_random(case, inputs, implementation)
    bld = run(
        replace(case, layout="bld"), move(inputs), np.moveaxis(out_ct, -1, 1), last_ct,
        implementation,
    )  # fmt: skip
    close(np.moveaxis(np.asarray(bld[0]), 1, -1), out, "out")
    close(bld[1], last, "last_state")
    for name, gradient in move(grads).items():
        close(bld[2][name], gradient, f"gradient of {name}")


def test_interleaved_equals_complex(implementation: str | None) -> None:
    """mamba_ssm stores complex B and C as (..., 2 * length), real and imaginary parts
    alternating."""
    case = Case("interleaved", is_complex=True, B="3d-interleaved", C="3d-interleaved", **EVERYTHING)
    inputs = make_inputs(case)
    out, last, grads, out_ct, last_ct = run_random(case, inputs, implementation)
    joined = {k: inputs[k][..., 0::2] + 1j * inputs[k][..., 1::2] for k in "BC"}
    plain = replace(case, B="3d", C="3d")
    got = run(plain, {**inputs, **joined}, out_ct, last_ct, implementation)
    close(got[0], out, "out")
    close(got[1], last, "last_state")
    for name in "BC":
        pair = np.asarray(grads[name])
        assert pair.dtype == np.float32
        # JAX's cotangent c pairs with a tangent t as Re(c t): the imaginary part changes its sign.
        close(pair[..., 0::2] - 1j * pair[..., 1::2], got[2][name], f"gradient of {name}")


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("poisoned", ["u", "delta", "z"])
def test_nan_stays_in_its_batch_row(layout: str, poisoned: str, implementation: str | None) -> None:
    """One bad example must not take the others of its batch with it, not even through a padded
    tile, a shared partial sum or a `where`. (dA, dD and so on sum over the batch: NaN there.)"""
    case = Case("nan", batch=3, length=37, dim=5, layout=layout, **EVERYTHING)
    clean = make_inputs(case)
    dirty = {**clean, poisoned: clean[poisoned].copy()}
    dirty[poisoned][1] = np.nan
    out, last, grads, _, _ = run_random(case, clean, implementation)
    bad_out, bad_last, bad_grads, _, _ = run_random(case, dirty, implementation)
    others = np.array([0, 2])
    np.testing.assert_array_equal(bad_out[others], out[others])
    np.testing.assert_array_equal(bad_last[others], last[others])
    assert np.isnan(bad_out[1]).all()
    for name in ("u", "delta", "z", "B", "C", "initial_state"):
        np.testing.assert_array_equal(bad_grads[name][others], grads[name][others], err_msg=name)


def test_nan_does_not_cross_a_segment_boundary(implementation: str | None) -> None:
    """A reset replaces the state; a state multiplied by 0 would let a NaN or an inf through."""
    case = Case("nan-segment", batch=1, length=20, D=True, z=True, softplus=True)
    clean = make_inputs(case)
    clean["segment_ids"] = np.repeat(np.array([[1, 2]], np.int32), 10, axis=1)
    dirty = {**clean, "u": clean["u"].copy()}
    dirty["u"][:, :, 3] = np.nan
    out, last = scan(case, clean, implementation)
    bad_out, bad_last = scan(case, dirty, implementation)
    np.testing.assert_array_equal(bad_out[:, :, 10:], out[:, :, 10:])
    np.testing.assert_array_equal(bad_last, last)
    np.testing.assert_array_equal(bad_out[:, :, :3], out[:, :, :3])
    assert np.isnan(bad_out[:, :, 3:10]).all()


def test_large_delta_gives_no_nan(implementation: str | None) -> None:
    """exp(delta A) underflows to 0 and softplus goes to its identity; neither gives inf - inf."""
    case = Case("large", batch=1, length=9, **{**EVERYTHING, "segments": False})
    inputs = make_inputs(case)
    inputs["delta"][:] = np.where(np.arange(9) % 2, 300.0, -200.0)
    out, last, grads, _, _ = run_random(case, inputs, implementation)
    for name, x in {"out": out, "last_state": last, **grads}.items():
        assert np.isfinite(np.asarray(x)).all(), name
    expected_out, expected_last = selective_scan(inputs, options_of(case))
    check(out, expected_out, "out")
    check(last, expected_last, "last_state")


@pytest.mark.parametrize("initial_state", [False, True])
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("empty", ["length", "batch"])
def test_nothing_to_scan(empty: str, layout: str, initial_state: bool, implementation: str | None) -> None:
    """Length 0 and batch 0: empty outputs; the state passes through, and so does its gradient."""
    sizes = {"batch": 2, "length": 5, empty: 0}
    options = {**EVERYTHING, "initial_state": initial_state}
    case = Case("nothing", **sizes, layout=layout, **options)
    inputs = make_inputs(case)
    out, last, grads, _, last_ct = run_random(case, inputs, implementation)
    assert out.shape == inputs["u"].shape and out.dtype == np.float32
    assert last.shape == (case.batch, case.dim, case.dstate) and last.dtype == np.float32
    start = inputs.get("initial_state", np.zeros(last.shape, np.float32))
    np.testing.assert_array_equal(last, start)
    assert set(grads) == set(inputs) - {"segment_ids"}
    for name, gradient in grads.items():
        assert gradient.shape == inputs[name].shape
        if name == "initial_state":
            np.testing.assert_array_equal(gradient, last_ct)
        else:
            assert not np.asarray(gradient).any(), name


@pytest.mark.parametrize(
    "case",
    [
        Case("f32", batch=3, dim=24, length=150, dstate=16, groups=2, B="4d", C="4d", **EVERYTHING),
        Case("fixed-bld", length=150, B="fixed", C="fixed", layout="bld", **EVERYTHING),
    ],
    ids=str,
)
def test_results_are_bitwise_reproducible(case: Case, implementation: str | None) -> None:
    """Sums are reduced in a fixed order: run after run gives the same bits, gradients included."""
    inputs = make_inputs(case)
    arrays = {k: jnp.asarray(x) for k, x in inputs.items() if k != "segment_ids"}
    ids = jnp.asarray(inputs["segment_ids"])

    @jax.jit
    def everything(arrays: Any) -> Any:
        def f(a: Any) -> Any:
            return jax_sscan.selective_scan(
                **a, segment_ids=ids, **keywords_of(case), return_last_state=True,
                implementation=implementation,
            )  # fmt: skip

        results, vjp = jax.vjp(f, arrays)
        return results, vjp(jax.tree.map(jnp.ones_like, results))

    first = jax.tree.map(np.asarray, everything(arrays))
    for _ in range(4):
        jax.tree.map(np.testing.assert_array_equal, everything(arrays), first)


@pytest.mark.parametrize("u_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("out_dtype", [None, F32, BF16, F16])
@pytest.mark.parametrize("is_complex", [False, True])
def test_result_types(u_dtype: str, out_dtype: str | None, is_complex: bool, implementation: str | None) -> None:
    """Out has out_dtype, else u's; the state is float32 or complex64 beside any u."""
    case = Case("types", u_dtype=u_dtype, out_dtype=out_dtype, is_complex=is_complex)
    inputs = make_inputs(case)

    def f(**arrays: Any) -> Any:
        return scan(case, arrays, implementation)

    out, last = jax.eval_shape(f, **inputs)
    assert out.dtype == jnp.dtype(out_dtype or u_dtype) and out.shape == inputs["u"].shape
    assert last.dtype == (jnp.complex64 if is_complex else jnp.float32)
    assert last.shape == (case.batch, case.dim, case.dstate)


def test_out_dtype_is_a_rounding_of_the_float32_result(implementation: str | None) -> None:
    """The output is computed in float32 and rounded once, whatever out_dtype says."""
    case = Case("rounding", u_dtype=BF16, length=33, **MAMBA)
    inputs = make_inputs(case)
    exact, _ = scan(case, inputs, implementation, out_dtype=jnp.float32)
    rounded, _ = scan(case, inputs, implementation)
    assert exact.dtype == jnp.float32 and rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), np.asarray(exact.astype(jnp.bfloat16), np.float32))


@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_subnormal_float16_inputs_count(layout: str, implementation: str | None) -> None:
    """XLA's threads read subnormal float32 numbers as 0; subnormal float16 ones are normal numbers in float32."""
    case = Case("subnormal", **dict.fromkeys(["u_dtype", "B_dtype", "C_dtype"], F16), out_dtype=F32, layout=layout)
    inputs = make_inputs(case)
    inputs["C"] *= np.float16(2.0**-16)
    assert 0 < np.max(np.abs(inputs["C"])) < np.finfo(np.float16).smallest_normal
    expected, _ = selective_scan(inputs, options_of(case))
    check(scan(case, inputs, implementation)[0], expected, "out")


def test_without_last_state_only_out_comes_back(implementation: str | None) -> None:
    case = Case("plain", **MAMBA)
    inputs = make_inputs(case)
    with_state, _ = scan(case, inputs, implementation)
    out = scan(case, inputs, implementation, return_last_state=False)
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(out, with_state)


def test_arguments_by_position(implementation: str | None) -> None:
    """The order of mamba_ssm: u, delta, A, B, C, D, z, delta_bias, delta_softplus."""
    case = Case("plain", **MAMBA)
    inputs = make_inputs(case)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    arrays = [jnp.asarray(inputs[name]) for name in names]
    out = jax_sscan.selective_scan(*arrays, True, implementation=implementation)
    check(out, selective_scan(inputs, options_of(case))[0], "out")


def test_automatic_choice_runs_the_default_of_the_platform() -> None:
    """implementation=None computes, to the bit, what implementations() calls the default here;
    gradients too, but for "xla", which named leaves them to JAX."""
    default = default_here()
    assert len(default) == 1, f"{jax.default_backend()} has the defaults {default}"
    case = Case("auto", length=50, **EVERYTHING)
    inputs = make_inputs(case)
    automatic, named = run_random(case, inputs, None), run_random(case, inputs, default[0])
    jax.tree.map(np.testing.assert_array_equal, automatic[:2], named[:2])
    for name, gradient in named[2].items():
        if default == ["xla"]:
            close(automatic[2][name], gradient, name)
        else:
            np.testing.assert_array_equal(automatic[2][name], gradient, err_msg=name)


def test_float64_needs_no_other_call(implementation: str | None) -> None:
    """In x64 mode float32 inputs stay float32: the mode does not widen anything by itself."""
    case = Case("f32-in-x64", **EVERYTHING)
    inputs = make_inputs(case)
    out, last, grads, _, _ = run_random(case, inputs, implementation)
    with x64():
        out64, last64, grads64, _, _ = run_random(case, inputs, implementation)
    assert out64.dtype == last64.dtype == np.float32
    close(out64, out, "out")
    close(last64, last, "last_state")
    for name, gradient in grads64.items():
        assert gradient.dtype == np.float32, name
        close(gradient, grads[name], name)
