"""The scan under JAX's transformations, for every implementation."""

from __future__ import annotations

import functools
import re
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import EVERYTHING, F64, MAMBA, Case, make_inputs
from checks import check, cotangents, for_float64, jit, keywords_of, options_of, split, x64

import jax_sscan

CASE = Case("base", length=21, dim=4, dstate=3, **EVERYTHING)
COMPLEX = Case("complex", length=9, is_complex=True, **EVERYTHING)
DOUBLE = Case(
    "double", batch=1, dim=2, dstate=2, length=4, x64=True, u_dtype=F64, delta_dtype=F64,
    z_dtype=F64, B_dtype=F64, C_dtype=F64, **EVERYTHING,
)  # fmt: skip


def scan_of(case: Case, rest: Any, implementation: str | None) -> Any:
    """dict of differentiable inputs -> (out, last_state)."""

    def scan(arrays: Any) -> Any:
        return jax_sscan.selective_scan(
            **arrays, **rest, **keywords_of(case), return_last_state=True,
            implementation=implementation,
        )  # fmt: skip

    return scan


def loss_of(case: Case, rest: Any, implementation: str | None, out_ct: Any, last_ct: Any) -> Any:
    """A real loss whose gradient is the vjp at the two cotangents."""
    scan = scan_of(case, rest, implementation)

    def loss(arrays: Any) -> Any:
        out, last = scan(arrays)
        return jnp.sum(out * out_ct) + jnp.sum(last * last_ct).real

    return loss


def set_up(case: Case) -> tuple[Any, Any, Any, Any, dict[str, oracle.Bounded]]:
    inputs = make_inputs(case)
    out, last = oracle.selective_scan(inputs, options_of(case))
    state_dtype = inputs["A"].dtype
    out_ct, last_ct = cotangents(
        case,
        jax.ShapeDtypeStruct(out.shape, inputs["u"].dtype),
        jax.ShapeDtypeStruct(last.shape, state_dtype),
    )
    expected = oracle.selective_scan_gradients(inputs, options_of(case), out_ct, last_ct)
    return inputs, out_ct, last_ct, out, expected


@pytest.mark.parametrize(("case", "jitted"), [(CASE, False), (CASE, True), (COMPLEX, True)], ids=str)
def test_grad_and_value_and_grad(case: Case, jitted: bool, implementation: str | None) -> None:
    """With and without jit around it: the gradient is the oracle's and the value the loss's."""
    inputs, out_ct, last_ct, out, expected = set_up(case)
    arrays, rest = split(inputs)
    transform = jax.value_and_grad(loss_of(case, rest, implementation, out_ct, last_ct))
    value, gradients = (jit(transform) if jitted else transform)(arrays)
    _, last = oracle.selective_scan(inputs, options_of(case))
    wanted = np.sum(out.value * out_ct) + np.sum(last.value * last_ct).real
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)
    for name, wanted in expected.items():
        check(gradients[name], wanted, f"gradient of {name}")


@pytest.mark.parametrize("names", [("A",), ("z",), ("B", "C"), ("initial_state",)], ids=str)
def test_grad_with_respect_to_some_arguments(names: tuple[str, ...], implementation: str | None) -> None:
    """Most inputs constant: symbolic zeros and unused cotangents must not upset the rest."""
    inputs, out_ct, last_ct, _, expected = set_up(CASE)
    arrays, rest = split(inputs)
    loss = loss_of(CASE, rest, implementation, out_ct, last_ct)
    some = {name: arrays.pop(name) for name in names}
    gradients = jit(jax.grad(lambda some: loss({**arrays, **some})))(some)
    for name in names:
        check(gradients[name], expected[name], f"gradient of {name}")


def test_out_or_state_alone(implementation: str | None) -> None:
    """A loss of only one result: the other's cotangent is a symbolic zero."""
    inputs, out_ct, last_ct, _, _ = set_up(CASE)
    arrays, rest = split(inputs)
    scan = scan_of(CASE, rest, implementation)
    zeros = np.zeros_like(out_ct), np.zeros_like(last_ct)
    for index, cts in ((0, (out_ct, zeros[1])), (1, (zeros[0], last_ct))):
        ct = cts[index]
        gradients = jit(jax.grad(lambda a, i=index, ct=ct: jnp.sum(scan(a)[i] * ct)))(arrays)
        expected = oracle.selective_scan_gradients(inputs, options_of(CASE), *cts)
        for name, wanted in expected.items():
            check(gradients[name], wanted, f"gradient of {name} through result {index}")


@pytest.mark.parametrize("case", [CASE, COMPLEX], ids=str)
def test_jvp_and_linearize(case: Case, implementation: str | None) -> None:
    """Tangents out paired with the cotangents equal tangents in paired with the gradients."""
    inputs, out_ct, last_ct, out, expected = set_up(case)
    arrays, rest = split(inputs)
    scan = scan_of(case, rest, implementation)
    primal, push = jax.linearize(jax.jit(scan), arrays)
    check(primal[0], out, "linearize's primal")
    jvp = jit(lambda arrays, tangents: jax.jvp(scan, (arrays,), (tangents,)))
    rng = np.random.default_rng(5)
    for name, array in arrays.items():
        v = rng.standard_normal(array.shape)
        if jnp.iscomplexobj(array):
            v = v + 1j * rng.standard_normal(array.shape)
        tangents = {k: jnp.zeros_like(x) for k, x in arrays.items()}
        tangents[name] = jnp.asarray(v.astype(array.dtype))
        primal, tangent = jvp(arrays, tangents)
        check(primal[0], out, "jvp's primal")
        v = oracle.wide(tangents[name])
        wanted = np.sum(expected[name].value * v).real
        scale = np.sum(expected[name].error * np.abs(v))
        for way, (out_tangent, last_tangent) in (("jvp", tangent), ("linearize", push(tangents))):
            got = np.sum(oracle.wide(out_tangent) * out_ct)
            got += np.sum(oracle.wide(last_tangent) * last_ct).real
            assert abs(got - wanted) <= 1e-6 * scale + 1e-6, f"{way}, {name}"


def double_case(implementation: str | None) -> tuple[Any, Any]:
    """The tiny float64 case as (loss over a dict, dict); to be used in x64 mode."""
    arrays, rest = split(make_inputs(DOUBLE))
    scan = scan_of(DOUBLE, rest, for_float64(implementation))

    def loss(arrays: Any) -> Any:
        out, last = scan(arrays)
        return jnp.sum(jnp.sin(out)) + jnp.sum(last**3)

    return loss, arrays


def test_jacfwd_equals_jacrev(implementation: str | None) -> None:
    """Forward and reverse mode are two derivations of one Jacobian."""
    with x64():
        arrays, rest = split(make_inputs(DOUBLE))
        scan = scan_of(DOUBLE, rest, for_float64(implementation))
        forward, reverse = jit(jax.jacfwd(scan))(arrays), jit(jax.jacrev(scan))(arrays)
        jax.tree.map(lambda f, r: np.testing.assert_allclose(f, r, rtol=1e-9, atol=1e-11), forward, reverse)
        assert all(np.abs(np.asarray(forward[0][name])).max() > 0 for name in arrays)


def test_hessian_matches_finite_differences_of_the_gradient(implementation: str | None) -> None:
    with x64():
        loss, arrays = double_case(for_float64(implementation))
        names = ("A", "delta", "u", "initial_state")
        some = {name: arrays.pop(name) for name in names}

        def of_some(some: Any) -> Any:
            return loss({**arrays, **some})

        hessian = jit(jax.hessian(of_some))(some)
        gradient = jit(jax.grad(of_some))
        rng = np.random.default_rng(2)
        for column in names:
            v = jnp.asarray(rng.standard_normal(some[column].shape))
            plus, minus = (gradient({**some, column: some[column] + sign * 1e-5 * v}) for sign in (1, -1))
            for row in names:
                numeric = (plus[row] - minus[row]) / 2e-5
                exact = jnp.tensordot(hessian[row][column], v, v.ndim)
                np.testing.assert_allclose(exact, numeric, rtol=1e-6, atol=1e-6, err_msg=f"{row}, {column}")


def test_second_derivatives_in_every_order_of_modes(implementation: str | None) -> None:
    """Hessian times vector: reverse over reverse, reverse over forward, forward over reverse, and mapped."""
    with x64():
        loss, arrays = double_case(for_float64(implementation))
        rng = np.random.default_rng(6)
        v = {name: jnp.asarray(rng.standard_normal(x.shape)) for name, x in arrays.items()}

        def along(arrays: Any) -> Any:
            return jax.jvp(loss, (arrays,), (v,))[1]

        def dot(arrays: Any) -> Any:
            return sum(jnp.vdot(g, v[name]) for name, g in jax.grad(loss)(arrays).items())

        @jit
        def products(arrays: Any) -> Any:
            forward = jax.vmap(lambda s: jax.jvp(jax.grad(loss), (arrays,), ({k: s * x for k, x in v.items()},))[1])
            return jax.grad(dot)(arrays), jax.grad(along)(arrays), forward(jnp.array([2.0, 1.0]))

        reverse, mixed, forward = products(arrays)
        step = 1e-5
        gradient = jit(jax.grad(loss))
        plus, minus = (gradient({k: x + s * step * v[k] for k, x in arrays.items()}) for s in (1, -1))
        for name in arrays:
            numeric = (plus[name] - minus[name]) / (2 * step)
            for way, got in (
                ("reverse", reverse),
                ("mixed", mixed),
                ("forward", {k: x[1] for k, x in forward.items()}),
            ):
                np.testing.assert_allclose(got[name], numeric, rtol=1e-6, atol=1e-6, err_msg=f"{way}, {name}")


ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "segment_ids")
TOGETHER = [
    ARGUMENTS,
    ("u", "delta", "z"),
    ("A", "D", "delta_bias"),
    ("B", "initial_state"),
    ("C", "segment_ids"),
]


@functools.cache
def value_and_vjp(case: Case, implementation: str | None) -> Any:
    """Inputs, cotangents -> results and gradients of the floating inputs; not jitted."""

    def everything(inputs: Any, cts: Any) -> Any:
        arrays = dict(inputs)
        rest = {"segment_ids": arrays.pop("segment_ids")}
        results, vjp = jax.vjp(scan_of(case, rest, implementation), arrays)
        return results, vjp(cts)[0]

    return everything


@functools.cache
def looped(case: Case, implementation: str | None) -> Any:
    return jit(value_and_vjp(case, implementation))


def check_vmap(case: Case, in_axes: dict[str, int | None], implementation: str | None) -> None:
    """vmap of values and gradients against a Python loop over the mapped axis."""
    size = 3
    lanes = [make_inputs(case, seed) for seed in range(size)]
    inputs = {
        name: jnp.asarray(lanes[0][name])
        if axis is None
        else jnp.stack([jnp.asarray(lane[name]) for lane in lanes], axis)
        for name, axis in in_axes.items()
    }
    out, last = oracle.selective_scan(lanes[0], options_of(case))
    rng = np.random.default_rng(3)
    cts = tuple(jnp.asarray(rng.standard_normal((size, *r.shape)), jnp.float32) for r in (out, last))
    if case.is_complex:
        cts = (cts[0], cts[1].astype(jnp.complex64))
    function = value_and_vjp(case, implementation)
    got = jit(jax.vmap(function, in_axes=(in_axes, 0)))(inputs, cts)
    for i in range(size):
        one = {name: lanes[i if in_axes[name] is not None else 0][name] for name in in_axes}
        expected = looped(case, implementation)(one, tuple(ct[i] for ct in cts))
        jax.tree.map(
            lambda g, e, i=i: np.testing.assert_allclose(
                g[i], e, rtol=2e-5, atol=2e-6 * (1 + float(np.abs(np.asarray(e)).max()))
            ),
            got,
            expected,
        )


@pytest.mark.parametrize("name", ARGUMENTS)
def test_vmap_over_one_argument(name: str, implementation: str | None) -> None:
    """Mapped over the last axis, so that an assumption of axis 0 shows."""
    case = CASE
    ndim = make_inputs(case)[name].ndim
    axes = {n: ndim if n == name else None for n in ARGUMENTS}
    check_vmap(case, axes, implementation)


@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
def test_vmap_over_several_arguments(names: tuple[str, ...], implementation: str | None) -> None:
    """Each at another axis: 0, 1, 0, 1, ..."""
    axes: dict[str, int | None] = dict.fromkeys(ARGUMENTS)
    axes.update({name: i % 2 for i, name in enumerate(names)})
    check_vmap(CASE, axes, implementation)


@pytest.mark.parametrize(
    "case",
    [
        Case("fixed", B="fixed", C="fixed", length=11, layout="bld", **EVERYTHING),
        Case("groups", B="4d", C="4d", groups=2, dim=4, length=11, reverse=True, **EVERYTHING),
        Case("complex", is_complex=True, length=11, **EVERYTHING),
    ],
    ids=str,
)
@pytest.mark.parametrize("names", [("A", "B"), ("u", "B", "C", "initial_state")], ids="+".join)
def test_vmap_over_other_kinds(case: Case, names: tuple[str, ...], implementation: str | None) -> None:
    """Mapping a fixed B means a B per lane, mapping A a whole scan per lane."""
    axes: dict[str, int | None] = dict.fromkeys(ARGUMENTS)
    axes.update(dict.fromkeys(names, 1))
    check_vmap(case, axes, implementation)


def native_calls(text: str, kernel: str) -> list[str]:
    """The calls of a kernel in the text of a program before XLA optimises it."""
    return [line for line in text.splitlines() if f"@jax_sscan_{kernel}(" in line]


@pytest.mark.parametrize("mapped", [("u",), ("u", "B", "segment_ids"), ("A",)], ids="+".join)
def test_vmap_folds(mapped: tuple[str, ...], implementation: str | None) -> None:
    """Two nested maps, gradient inside: one call of each kernel, no loop, and weights that no map names stay one."""
    if implementation not in ("cpu", "cuda"):
        pytest.skip("no kernel to count")
    case = Case("fold", batch=2, dim=5, length=7, dstate=3, **EVERYTHING)
    inputs = {name: jnp.asarray(x) for name, x in make_inputs(case).items()}
    rest = {"segment_ids": inputs["segment_ids"]}
    axes = {name: 1 if name in mapped else None for name in inputs}
    stacked = {name: jnp.stack([jnp.stack([x] * 4, 1)] * 3, 1) if name in mapped else x for name, x in inputs.items()}

    def scan(inputs: Any) -> Any:
        return scan_of(case, {}, implementation)(inputs)[0]

    def gradients(inputs: Any) -> Any:
        arrays = {name: x for name, x in inputs.items() if name not in rest}
        return jax.grad(lambda x: jnp.sum(scan({**inputs, **x}) ** 2))(arrays)

    for function, kernels in ((scan, {"forward": 1}), (gradients, {"forward": 1, "backward": 1})):
        text = jax.jit(jax.vmap(jax.vmap(function, (axes,)), (axes,))).lower(stacked).as_text()
        assert {kernel: len(native_calls(text, kernel)) for kernel in kernels} == kernels
        assert "stablehlo.while" not in text
        (call,) = native_calls(text, "forward")
        if "A" not in mapped:
            # u has 12 times the batch, A the rows it had.
            assert "(tensor<24x5x7xf32>, tensor<24x5x7xf32>, tensor<5x3xf32>" in call


def test_nested_vmap(implementation: str | None) -> None:
    case = Case("nested", length=6, **MAMBA)
    inputs = {k: jnp.asarray(x) for k, x in make_inputs(case).items()}
    u = inputs.pop("u") * jnp.array([1.0, -0.5])[:, None, None, None]
    delta = inputs.pop("delta") - jnp.array([0.0, 0.1, 0.3])[:, None, None, None]

    def f(u: Any, delta: Any) -> Any:
        return jax_sscan.selective_scan(u, delta, **inputs, delta_softplus=True, implementation=implementation)

    got = jax.vmap(lambda u: jax.vmap(lambda d: f(u, d))(delta))(u)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(got[i, j], f(u[i], delta[j]), rtol=1e-5, atol=1e-5)


def test_gradient_of_a_vmap(implementation: str | None) -> None:
    """Weights shared by the lanes: their gradient is the sum of the lanes' own."""
    inputs, out_ct, last_ct, _, expected = set_up(CASE)
    arrays, rest = split(inputs)
    loss = loss_of(CASE, rest, implementation, out_ct, last_ct)
    u = jnp.stack([arrays.pop("u")] * 2)

    def total(A: Any, u: Any) -> Any:
        return jnp.sum(jax.vmap(lambda u: loss({**arrays, "A": A, "u": u}))(u))

    grad_A, grad_u = jit(jax.grad(total, (0, 1)))(arrays["A"], u)
    check(grad_A / 2, expected["A"], "gradient of A")
    check(grad_u[1], expected["u"], "gradient of u")


def test_lax_scan_over_chunks(implementation: str | None) -> None:
    """The op inside a scan's body, the state as the carry: equals one call, gradients included."""
    case = Case("chunks", length=24, D=True, z=True, softplus=True, initial_state=True)
    inputs, out_ct, last_ct, out, expected = set_up(case)
    arrays, _ = split(inputs)
    sequences = ("u", "delta", "B", "C", "z")

    def chunked(arrays: Any) -> Any:
        def cut(x: Any) -> Any:
            return jnp.moveaxis(x.reshape(*x.shape[:-1], 4, 6), -2, 0)

        def body(state: Any, chunk: Any) -> Any:
            y, state = jax_sscan.selective_scan(
                **chunk, A=arrays["A"], D=arrays["D"], delta_softplus=True, initial_state=state,
                return_last_state=True, implementation=implementation,
            )  # fmt: skip
            return state, y

        chunks = {name: cut(arrays[name]) for name in sequences}
        last, y = jax.lax.scan(body, arrays["initial_state"], chunks)
        return jnp.moveaxis(y, 0, -2).reshape(out_ct.shape), last

    @jit
    def everything(arrays: Any) -> Any:
        results, vjp = jax.vjp(chunked, arrays)
        return results, vjp((out_ct, last_ct))[0]

    (got, _), gradients = everything(arrays)
    check(got, out, "out")
    for name, wanted in expected.items():
        check(gradients[name], wanted, f"gradient of {name}")


def test_threads(implementation: str | None) -> None:
    """32 jitted calls from 32 threads: on a CPU they share XLA's pool, on which a call must never wait."""
    count = 32
    rng = np.random.default_rng(0)
    shape = (2, 40, 200)

    def array(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    A, B = -jnp.exp(array(40, 16)), array(2, 16, 200)

    @functools.partial(jax.jit, static_argnums=2)
    def value_and_gradient(u: Any, delta: Any, repeats: int) -> Any:
        def loss(u: Any) -> Any:
            # Several kernels in one program too, which XLA may run side by side.
            scans = [
                jax_sscan.selective_scan(
                    u * (i + 1), delta, A, B, B, delta_softplus=True, implementation=implementation
                )
                for i in range(repeats)
            ]  # fmt: skip
            return sum(jnp.sum(scan**2) for scan in scans)

        return jax.value_and_grad(loss)(u)

    inputs = [(array(*shape), array(*shape)) for _ in range(count)]
    expected = [jax.device_get(value_and_gradient(u, delta, 3)) for u, delta in inputs]
    results: list[Any] = [None] * count
    start = threading.Barrier(count)

    def work(i: int) -> None:
        start.wait()
        for _ in range(5):
            results[i] = jax.device_get(value_and_gradient(*inputs[i], 3))

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "a call never came back"
    for got, wanted in zip(results, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def heavy_operations(lowered: Any) -> int:
    """How many kernels or, without any, loops a program runs.

    Kernels are counted before XLA optimises: it may merge two equal calls, which is its good right.
    """
    kernels = lowered.as_text().count("@jax_sscan_")
    return kernels or len(re.findall(r"\swhile\(", str(lowered.compile().as_text())))


def test_checkpoint(implementation: str | None) -> None:
    """Rematerialisation gives the same gradients; saving RESIDUAL_NAMES spares the second forward
    pass, which a policy that saves nothing pays for."""
    case = Case("remat", length=150, dstate=4, **EVERYTHING)
    inputs, out_ct, last_ct, _, expected = set_up(case)
    arrays, rest = split(inputs)
    loss = loss_of(case, rest, implementation, out_ct, last_ct)
    named = jax.checkpoint_policies.save_only_these_names(*jax_sscan.RESIDUAL_NAMES)
    counts = []
    for function in (loss, jax.checkpoint(loss), jax.checkpoint(loss, policy=named)):
        # The value is asked for too: without it, JAX drops the first forward pass by itself.
        lowered = jit(jax.value_and_grad(function)).lower(arrays)
        counts.append(heavy_operations(lowered))
        _, gradients = lowered.compile()(arrays)
        for name, wanted in expected.items():
            check(gradients[name], wanted, f"gradient of {name}")
    assert counts[1] > counts[0], f"nothing was rematerialised, so nothing is shown: {counts}"
    assert counts[2] == counts[0], f"the policy did not spare the second forward: {counts}"


def test_kernels_in_a_rematerialised_stack(implementation: str | None) -> None:
    """A scan over layers, as XLA compiles it: a layer's forward kernel stands in the forward loop, and again in the
    backward loop if nothing is saved."""
    if implementation not in ("cpu", "cuda"):
        pytest.skip("no kernel to count")
    # Longer than a chunk: a backward pass that needs no saved states needs no second forward pass either.
    case = Case("stack", length=70, **MAMBA)
    arrays = {name: jnp.asarray(x) for name, x in make_inputs(case).items()}
    u, A = arrays.pop("u"), arrays.pop("A")
    weights = jnp.stack([A, A / 2, 2 * A])

    def layer(u: Any, A: Any) -> Any:
        return scan_of(case, {}, implementation)({**arrays, "u": u, "A": A})[0]

    def loss(layer: Any) -> Any:
        return lambda u, weights: jnp.sum(jax.lax.scan(lambda u, A: (layer(u, A), None), u, weights)[0] ** 2)

    named = jax.checkpoint_policies.save_only_these_names(*jax_sscan.RESIDUAL_NAMES)
    expected = jit(jax.grad(loss(layer), (0, 1)))(u, weights)
    for wrapped, count in ((jax.checkpoint(layer, policy=named), 1), (jax.checkpoint(layer), 2)):
        compiled = jax.jit(jax.grad(loss(wrapped), (0, 1))).lower(u, weights).compile()
        assert len(re.findall(r'custom_call_target="jax_sscan_forward"', compiled.as_text())) == count
        for got, wanted in zip(compiled(u, weights), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_eval_shape(layout: str, implementation: str | None) -> None:
    """Shapes and dtypes without data; also at sizes that no machine could hold."""
    big = {"bdl": (64, 8192, 1 << 20), "bld": (64, 1 << 20, 8192)}[layout]
    projection = {"bdl": (64, 16, 1 << 20), "bld": (64, 1 << 20, 16)}[layout]
    u = jax.ShapeDtypeStruct(big, jnp.bfloat16)
    A = jax.ShapeDtypeStruct((8192, 16), jnp.float32)
    B = jax.ShapeDtypeStruct(projection, jnp.bfloat16)

    def f(u: Any, A: Any, B: Any) -> Any:
        return jax_sscan.selective_scan(
            u, u, A, B, B, layout=layout, return_last_state=True, implementation=implementation
        )

    out, last = jax.eval_shape(f, u, A, B)
    assert (out.shape, out.dtype) == (big, jnp.bfloat16)
    assert (last.shape, last.dtype) == ((64, 8192, 16), jnp.float32)

    def loss(u: Any, A: Any, B: Any) -> Any:
        return jnp.sum(f(u, A, B)[0].astype(jnp.float32))

    for gradient, like in zip(jax.eval_shape(jax.grad(loss, (0, 1, 2)), u, A, B), (u, A, B), strict=True):
        assert (gradient.shape, gradient.dtype) == (like.shape, like.dtype)


@pytest.mark.parametrize("length", [5, 70])
@pytest.mark.parametrize("gate", [False, True])
def test_residuals(gate: bool, length: int, implementation: str | None) -> None:
    """Kept for the backward pass, beyond the operands: states between chunks if there are several, and with a gate one
    array like the output."""
    inputs = make_inputs(Case("residuals", length=length, B="4d", C="4d", **{**MAMBA, "z": gate}))
    operands = {name: jnp.asarray(x) for name, x in inputs.items()}

    def scan(operands: Any) -> Any:
        return jax_sscan.selective_scan(**operands, out_dtype=jnp.bfloat16, implementation=implementation)

    def kinds(arrays: Any) -> Counter[Any]:
        return Counter((x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(arrays))

    kept = kinds(jax.eval_shape(lambda operands: jax.vjp(scan, operands)[1], operands)) - kinds(operands)
    states = [kind for kind in kept if len(kind[0]) == 4]
    assert len(states) == (length > 32)  # which is the longest chunk
    assert kept == Counter([*states, *[(inputs["u"].shape, jnp.dtype(jnp.bfloat16))] * gate])


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_peak_memory(what: str, layout: str, implementation: str | None) -> None:
    """The states (batch, dim, length, dstate) are never all in memory at once: the reason to have
    this package at all."""
    case = Case("memory", batch=1, dim=128, length=16384, dstate=64, layout=layout, **MAMBA)
    small = make_inputs(replace(case, length=1))
    arrays = {
        # Shapes are all that compiling needs.
        name: jax.ShapeDtypeStruct(
            tuple(case.length if size == 1 and x.ndim == 3 and axis else size for axis, size in enumerate(x.shape)),
            x.dtype,
        )
        for name, x in small.items()
    }
    scan = scan_of(case, {}, implementation)

    def loss(arrays: Any) -> Any:
        return jnp.sum(scan(arrays)[0])

    function = scan if what == "forward" else jax.grad(loss)
    analysis = jax.jit(function).lower(arrays).compile().memory_analysis()
    assert analysis is not None
    states = case.batch * case.dim * case.length * case.dstate * 4
    assert analysis.temp_size_in_bytes < states // 4, f"{analysis.temp_size_in_bytes / states:.2f} of the states' size"
