"""What the tests share: the elementwise bound, x64 mode, and one run of a case."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case, dtype, make_inputs
from oracle import Bounded, ScanOptions, selective_scan, selective_scan_gradients, wide

import jax_sscan

# How many epsilons of the compute dtype each unit of the oracle's error scale is worth.
#
# The scale (oracle.Bounded) already is a first-order worst-case bound for an implementation whose
# every operation, exponentials included, is off by one epsilon (two correctly rounded ulps/2). 2
# covers what that model leaves out: exponentials of two ulps (CUDA's ex2.approx and XLA's
# polynomial), and orders of evaluation other than the oracle's own (a scan in chunks multiplies
# decays together, then multiplies a state by the product, about twice the operations of the
# straight loop).
K = 2.0


@contextlib.contextmanager
def x64(enabled: bool = True) -> Iterator[None]:
    """64-bit mode for one test; older JAX kept the context manager elsewhere."""
    if hasattr(jax, "enable_x64"):
        with jax.enable_x64(enabled):
            yield
    else:
        from jax.experimental import enable_x64  # pyright: ignore

        with enable_x64(enabled):
            yield


def jit(function: Callable[..., Any], optimize: bool = False) -> Callable[..., Any]:
    """jax.jit; on a CPU without LLVM's optimisation, which would be nine tenths of a test's time.

    XLA's own passes run as ever. Tests that need what users run (`optimize`, and every call that
    is not jitted here) still get LLVM's too.
    """
    quick = jax.default_backend() == "cpu" and not optimize
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0} if quick else None)


def excess(actual: Any, expected: Bounded, compute: Any, k: float = K) -> float:
    """The largest error as a multiple of what the bound allows; above 1 is a failure.

    Allowed, element by element: ``k * eps(compute) * scale``, one rounding of the value into the
    result's dtype (bf16 and f16 results are computed in float32 and rounded once; eps is twice the
    half ulp of that rounding, which leaves room for a double rounding), and the smallest number
    that the result dtype can hold (f16 has subnormals at 6e-8; kernels may flush float32 ones to
    zero).
    """
    out = jnp.finfo(actual.dtype)
    a, v = wide(actual), expected.value
    assert a.shape == v.shape, f"shape {a.shape}, expected {v.shape}"
    if not a.size:
        return 0.0
    floor = float(out.smallest_subnormal) if out.bits < 32 else 8 * float(out.tiny)
    allowed = k * float(jnp.finfo(compute).eps) * expected.error + floor
    if out.bits < 32:
        allowed = allowed + float(out.eps) * np.abs(v)
    ratio = np.abs(a - v) / allowed
    return float(np.max(np.where(np.isnan(ratio), np.inf, ratio)))


def check(actual: Any, expected: Bounded, name: str, compute: Any = np.float32) -> None:
    """Hold one result to the oracle's bound, elementwise."""
    ratio = excess(actual, expected, compute)
    if not ratio <= 1.0:
        difference = np.abs(wide(actual) - expected.value)
        worst = np.unravel_index(int(np.nanargmax(difference / (expected.error + 1e-300))), difference.shape)
        raise AssertionError(
            f"{name}: {ratio:.3g} times the allowed error; at {tuple(map(int, worst))} "
            f"got {wide(actual)[worst]!r}, expected {expected.value[worst]!r}"
        )


def cotangents(case: Case, out: Any, last_state: Any, seed: int = 1) -> tuple[Any, Any]:
    """Random cotangents with the shapes and dtypes of the two results."""
    rng = np.random.default_rng(seed)
    out_ct = rng.standard_normal(out.shape).astype(out.dtype)
    last_ct = rng.standard_normal(last_state.shape)
    if case.is_complex:
        last_ct = last_ct + 1j * rng.standard_normal(last_state.shape)
    return out_ct, last_ct.astype(last_state.dtype)


def for_float64(implementation: str | None) -> str | None:
    """What computes in float64 where ``implementation`` is the choice: not the CUDA kernels (test_cuda.py)."""
    return None if implementation == "cuda" else implementation


def options_of(case: Case) -> ScanOptions:
    return ScanOptions(case.softplus, case.reverse, case.layout)


def keywords_of(case: Case) -> dict[str, Any]:
    """The static keywords of `jax_sscan.selective_scan` for a case."""
    return {
        "delta_softplus": case.softplus,
        "reverse": case.reverse,
        "layout": case.layout,
        "out_dtype": case.out_dtype,
    }


def split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The differentiable inputs, and the others."""
    arrays = {name: jnp.asarray(x) for name, x in inputs.items()}
    rest = {name: arrays.pop(name) for name in ("segment_ids",) if name in arrays}
    return arrays, rest


def run(
    case: Case,
    inputs: Mapping[str, Any],
    out_ct: Any,
    last_ct: Any,
    implementation: str | None,
    optimize: bool = False,
) -> tuple[Any, Any, dict[str, Any]]:
    """Out, last_state (None if the case wants none) and every gradient, with one compilation."""

    def everything(arrays: Any, rest: Any, out_ct: Any, last_ct: Any) -> Any:
        def scan(arrays: Any) -> Any:
            return jax_sscan.selective_scan(
                **arrays,
                **rest,
                **keywords_of(case),
                return_last_state=case.last_state,
                implementation=implementation,
            )

        results, vjp = jax.vjp(scan, arrays)
        if not case.last_state:
            return results, None, vjp(out_ct)[0]
        return *results, vjp((out_ct, last_ct))[0]

    return jit(everything, optimize)(*split(inputs), jnp.asarray(out_ct), jnp.asarray(last_ct))


def check_case(case: Case, implementation: str | None, seed: int = 0, optimize: bool = False) -> None:
    """Values, dtypes and all gradients of one case against the oracle."""
    if case.x64:
        implementation = for_float64(implementation)
    inputs = make_inputs(case, seed)
    compute = np.dtype(np.float64 if case.x64 else np.float32)
    state_dtype = np.result_type(compute, np.complex64) if case.is_complex else compute
    out_dtype = dtype(case.out_dtype or case.u_dtype)
    out, last_state = selective_scan(inputs, options_of(case))
    out_ct, last_ct = cotangents(
        case,
        jax.ShapeDtypeStruct(out.shape, out_dtype),
        jax.ShapeDtypeStruct(last_state.shape, state_dtype),
    )
    if not case.last_state:
        last_ct = np.zeros_like(last_ct)
    expected = selective_scan_gradients(inputs, options_of(case), out_ct, last_ct)
    with x64(case.x64):
        got_out, got_last, gradients = run(case, inputs, out_ct, last_ct, implementation, optimize)

    assert got_out.dtype == out_dtype, f"out is {got_out.dtype}, expected {out_dtype}"
    assert set(gradients) == set(expected)
    check(got_out, out, "out", compute)
    if case.last_state:
        assert got_last.dtype == state_dtype, f"last_state is {got_last.dtype}"
        check(got_last, last_state, "last_state", compute)
    for name, gradient in gradients.items():
        wanted = np.asarray(inputs[name]).dtype
        assert gradient.dtype == wanted, f"gradient of {name} is {gradient.dtype}, not {wanted}"
        check(gradient, expected[name], f"gradient of {name}", compute)
