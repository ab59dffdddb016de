"""`causal_conv1d` and `causal_conv1d_update` against the oracle and against each other."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BF16, F16, F32, F64, dtype
from checks import check, jit, x64
from jax.test_util import check_grads

import jax_sscan


def conv_inputs(
    batch: int = 2,
    dim: int = 5,
    length: int = 37,
    width: int = 4,
    x_dtype: str = F32,
    weight_dtype: str = F32,
    bias: bool = False,
    initial_state: bool = False,
    segments: bool = False,
    layout: str = "bdl",
) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((batch, dim, length)).astype(dtype(x_dtype))
    weight = rng.standard_normal((dim, width)).astype(dtype(weight_dtype))
    inputs: dict[str, Any] = {"x": x if layout == "bdl" else x.transpose(0, 2, 1).copy()}
    inputs["weight"] = weight
    if bias:
        inputs["bias"] = rng.standard_normal(dim).astype(weight.dtype)
    if initial_state:
        inputs["initial_state"] = rng.standard_normal((batch, dim, width - 1)).astype(x.dtype)
    if segments:
        runs = np.cumsum(rng.random((batch, length)) < 0.15, axis=1)
        inputs["segment_ids"] = (runs % 3).astype(np.int32)
    return inputs


FULL: dict[str, Any] = {"bias": True, "initial_state": True, "segments": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "silu": {"silu": True},
    "initial-state": {"initial_state": True},
    "segments": {"segments": True},
    "bld": {"layout": "bld"},
    "full": dict(**FULL, silu=True),
    "full-bld": dict(**FULL, silu=True, layout="bld"),
    "width-1": {"width": 1, "bias": True},
    "width-2": dict(width=2, **FULL),
    "width-3-bld": dict(width=3, **FULL, layout="bld", silu=True),
    "width-7": dict(width=7, **FULL, silu=True),
    "length-1": dict(length=1, **FULL, silu=True),
    "length-2": dict(length=2, **FULL),
    "length-2-no-state": {"length": 2, "bias": True, "layout": "bld"},
    "length-1000": dict(length=1000, batch=1, **FULL, silu=True),
    "dim-1-batch-1": dict(dim=1, batch=1, **FULL),
    "dim-131": {"dim": 131, "batch": 1, "length": 9, "silu": True, "layout": "bld"},
    "bf16": dict(x_dtype=BF16, weight_dtype=BF16, **FULL, silu=True),
    "bf16-f32-weight": dict(x_dtype=BF16, **FULL, silu=True, layout="bld"),
    "f16": {"x_dtype": F16, "weight_dtype": F16, "bias": True, "silu": True},
    "f64": dict(x_dtype=F64, weight_dtype=F64, **FULL, silu=True),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    """Values, dtypes, and the gradients of x, weight, bias and initial_state."""
    options = dict(CASES[name])
    silu = options.pop("silu", False)
    layout = options.get("layout", "bdl")
    inputs = conv_inputs(**options)
    static = oracle.ConvOptions(silu, layout)
    compute = np.dtype(F64 if options.get("x_dtype") == F64 else F32)
    out, final = oracle.causal_conv1d(inputs, static)
    rng = np.random.default_rng(1)
    x_dtype = inputs["x"].dtype
    out_ct = rng.standard_normal(out.shape).astype(x_dtype)
    final_ct = rng.standard_normal(final.shape).astype(x_dtype)
    expected = oracle.causal_conv1d_gradients(inputs, static, out_ct, final_ct)

    with x64(compute == np.float64):
        arrays = {k: jnp.asarray(v) for k, v in inputs.items()}
        ids = arrays.pop("segment_ids", None)

        @jit
        def everything(arrays: Any, out_ct: Any, final_ct: Any) -> Any:
            def conv(arrays: Any) -> Any:
                return jax_sscan.causal_conv1d(
                    **arrays,
                    segment_ids=ids,
                    activation="silu" if silu else None,
                    return_final_state=True,
                    layout=layout,
                )

            results, vjp = jax.vjp(conv, arrays)
            return results, vjp((out_ct, final_ct))[0]

        results, gradients = everything(arrays, jnp.asarray(out_ct), jnp.asarray(final_ct))
    assert results[0].dtype == x_dtype and results[1].dtype == x_dtype
    check(results[0], out, "out", compute)
    check(results[1], final, "final_state", compute)
    assert set(gradients) == set(expected)
    for key, gradient in gradients.items():
        assert gradient.dtype == inputs[key].dtype, key
        check(gradient, expected[key], f"gradient of {key}", compute)


def test_without_final_state_only_out_comes_back() -> None:
    inputs = conv_inputs(bias=True)
    out = jax_sscan.causal_conv1d(inputs["x"], inputs["weight"], inputs["bias"])
    assert isinstance(out, jax.Array)
    check(out, oracle.causal_conv1d(inputs)[0], "out")


@pytest.mark.parametrize("cut", [1, 2, 20])
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_two_parts_with_the_state_passed_on_equal_the_whole(cut: int, layout: str) -> None:
    """Also when a part is shorter than the filter: its final state still holds the older one."""
    inputs = conv_inputs(**FULL, layout=layout)
    inputs["segment_ids"][:, cut - 1] = inputs["segment_ids"][:, cut]
    axis = 2 if layout == "bdl" else 1

    def part(begin: int, end: int, state: Any) -> Any:
        return jax_sscan.causal_conv1d(
            jnp.asarray(np.take(inputs["x"], np.arange(begin, end), axis)),
            jnp.asarray(inputs["weight"]),
            jnp.asarray(inputs["bias"]),
            initial_state=state,
            segment_ids=jnp.asarray(inputs["segment_ids"][:, begin:end]),
            activation="silu",
            return_final_state=True,
            layout=layout,
        )

    first, state = part(0, cut, jnp.asarray(inputs["initial_state"]))
    second, state = part(cut, 37, state)
    out, final = oracle.causal_conv1d(inputs, oracle.ConvOptions(True, layout))
    check(jnp.concatenate([first, second], axis), out, "out")
    check(state, final, "final_state")


@pytest.mark.parametrize("shape", [(2, 5, 0), (0, 5, 3)])
def test_nothing_to_convolve(shape: tuple[int, int, int]) -> None:
    x = jnp.zeros(shape)
    state = jnp.asarray(np.random.default_rng(0).standard_normal((shape[0], 5, 3)), jnp.float32)
    out, final = jax_sscan.causal_conv1d(x, jnp.ones((5, 4)), initial_state=state, return_final_state=True)
    assert out.shape == shape
    np.testing.assert_array_equal(final, state)


@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_update(x_dtype: str, silu: bool, bias: bool, width: int) -> None:
    inputs = conv_inputs(x_dtype=x_dtype, bias=bias, initial_state=True, width=width)
    step = {"x": inputs["x"][:, :, 0], "state": inputs["initial_state"], "weight": inputs["weight"]}
    if bias:
        step["bias"] = inputs["bias"]
    arrays = {k: jnp.asarray(v) for k, v in step.items()}
    out, state = jax_sscan.causal_conv1d_update(**arrays, activation="silu" if silu else None)
    expected_out, expected_state = oracle.causal_conv1d_update(step, silu)
    assert out.dtype == step["x"].dtype and state.dtype == step["state"].dtype
    check(out, expected_out, "out")
    np.testing.assert_array_equal(oracle.wide(state), expected_state.value)


def test_stepping_equals_the_convolution() -> None:
    """A prompt in one call, then token by token, as a model decodes."""
    inputs = conv_inputs(bias=True, length=12)
    x, weight, bias = (jnp.asarray(inputs[k]) for k in ("x", "weight", "bias"))
    whole, final = jax_sscan.causal_conv1d(x, weight, bias, activation="silu", return_final_state=True)
    out, state = jax_sscan.causal_conv1d(x[:, :, :5], weight, bias, activation="silu", return_final_state=True)
    for t in range(5, 12):
        step, state = jax_sscan.causal_conv1d_update(x[:, :, t], state, weight, bias, "silu")
        out = jnp.concatenate([out, step[:, :, None]], 2)
    np.testing.assert_allclose(out, whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(state, final)


def test_nan_stays_in_its_batch_row() -> None:
    inputs = conv_inputs(batch=3, **FULL)
    dirty = {**inputs, "x": inputs["x"].copy()}
    dirty["x"][1] = np.nan

    def conv(inputs: dict[str, Any]) -> Any:
        return jax_sscan.causal_conv1d(**{k: jnp.asarray(v) for k, v in inputs.items()})

    clean_out, dirty_out = conv(inputs), conv(dirty)
    np.testing.assert_array_equal(dirty_out[jnp.array([0, 2])], clean_out[jnp.array([0, 2])])


def test_nan_does_not_cross_a_segment_boundary() -> None:
    inputs = conv_inputs(batch=1, length=10)
    inputs["x"][:, :, 4] = np.nan
    inputs["segment_ids"] = np.repeat(np.array([[1, 2]], np.int32), 5, axis=1)
    out = jax_sscan.causal_conv1d(**{k: jnp.asarray(v) for k, v in inputs.items()})
    assert np.isfinite(np.asarray(out[:, :, 5:])).all()
    assert np.isnan(np.asarray(out[:, :, 4])).all()


ARGUMENTS = ("x", "weight", "bias", "initial_state", "segment_ids")


def conv_with_gradients(inputs: dict[str, Any]) -> Any:
    """Output, final state and the gradients of all floating inputs of a loss of both."""

    def loss(arrays: Any) -> Any:
        out, state = jax_sscan.causal_conv1d(
            **{**inputs, **arrays}, activation="silu", layout="bld", return_final_state=True
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(state**3), (out, state)

    return jax.grad(loss, has_aux=True)({name: x for name, x in inputs.items() if name != "segment_ids"})


@pytest.mark.parametrize("outer", [("x",), ("weight", "bias"), ("x", "segment_ids"), ARGUMENTS], ids="+".join)
@pytest.mark.parametrize("inner", [("x", "initial_state"), ("weight",)], ids="+".join)
def test_nested_vmap_of_gradients_equals_a_loop(outer: tuple[str, ...], inner: tuple[str, ...]) -> None:
    """Two maps, the outer one over last axes and the inner one over axis 1: no loop, whatever is mapped."""
    one = {name: jnp.asarray(x) for name, x in conv_inputs(length=9, layout="bld", **FULL).items()}

    def mapped(array: jax.Array, size: int, axis: int) -> jax.Array:
        step = jnp.ones((), array.dtype)
        return jnp.stack([jnp.roll(array, i, 0) + i * step for i in range(size)], axis)

    inputs, in_axes, out_axes = dict(one), {}, {}
    for name in one:
        in_axes[name] = 1 if name in inner else None
        inputs[name] = mapped(inputs[name], 2, 1) if name in inner else inputs[name]
        out_axes[name] = inputs[name].ndim if name in outer else None
        inputs[name] = mapped(inputs[name], 3, out_axes[name]) if name in outer else inputs[name]
    nested = jit(jax.vmap(jax.vmap(conv_with_gradients, (in_axes,)), (out_axes,))).lower(inputs)
    assert "stablehlo.while" not in nested.as_text()
    got, single = nested.compile()(inputs), jit(conv_with_gradients)
    for i in range(3):
        for j in range(2):
            lane = {k: x if out_axes[k] is None else jnp.take(x, i, out_axes[k]) for k, x in inputs.items()}
            lane = {k: x if in_axes[k] is None else jnp.take(x, j, in_axes[k]) for k, x in lane.items()}
            expected = single(lane)
            jax.tree.map(
                lambda g, e, i=i, j=j: np.testing.assert_allclose(g[i, j], e, rtol=1e-5, atol=1e-5), got, expected
            )


def test_gradient_of_a_vmap() -> None:
    """A filter that the lanes share gets the sum of their gradients."""
    inputs = {name: jnp.asarray(x) for name, x in conv_inputs(length=9, layout="bld", **FULL).items()}
    x = inputs.pop("x")
    lanes = jnp.stack([x, 2 * x, -x], 1)

    def loss(weight: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(jax_sscan.causal_conv1d(x, **{**inputs, "weight": weight}, layout="bld")))

    gradient = jax.jit(jax.grad(lambda w: jnp.sum(jax.vmap(loss, (None, 1))(w, lanes))))(inputs["weight"])
    expected = sum(jax.grad(loss)(inputs["weight"], lanes[:, i]) for i in range(3))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_derivatives_of_first_and_second_order() -> None:
    """Both modes and their combinations, against finite differences."""
    with x64():
        inputs = conv_inputs(batch=1, dim=2, length=6, x_dtype=F64, weight_dtype=F64, **FULL)
        ids = inputs.pop("segment_ids")

        def conv(inputs: Any) -> Any:
            return jax_sscan.causal_conv1d(**inputs, segment_ids=ids, activation="silu", return_final_state=True)

        check_grads(conv, (inputs,), order=2, modes=("fwd", "rev"))


def test_eval_shape_and_checkpoint() -> None:
    x, weight = jax.ShapeDtypeStruct((64, 1 << 20, 8192), jnp.bfloat16), jax.ShapeDtypeStruct((8192, 4), jnp.float32)
    conv = partial(jax_sscan.causal_conv1d, activation="silu", layout="bld")
    assert jax.eval_shape(conv, x, weight).shape == x.shape
    small = {name: jnp.asarray(value) for name, value in conv_inputs(length=9).items()}
    loss = lambda x, weight: jnp.sum(jnp.sin(jax_sscan.causal_conv1d(x, weight)))  # noqa: E731
    got = jit(jax.grad(jax.checkpoint(loss), (0, 1)))(small["x"], small["weight"])
    for gradient, expected in zip(got, jit(jax.grad(loss, (0, 1)))(small["x"], small["weight"]), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)
