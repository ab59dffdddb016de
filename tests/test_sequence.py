"""Sequence parallelism: the length divided over a mesh axis, for the scan and the convolution."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BF16, EVERYTHING, F64, MAMBA, Case, make_inputs
from checks import jit, x64
from distributed import (
    EXPLICIT,
    P,
    assert_close,
    assert_communicates,
    case_inputs,
    collectives,
    communicated_bytes,
    gradients_of,
    mesh_of,
    on_gpus,
    put,
    scan_of,
    specs_of,
)

import jax_sscan

pytestmark = pytest.mark.usefixtures("devices")

CASES = [
    Case("plain", length=24, dim=4),
    Case("everything", length=64, dim=4, **EVERYTHING),
    Case("everything-reverse-bld", length=64, dim=4, reverse=True, layout="bld", **EVERYTHING),
    Case("complex", length=24, dim=4, is_complex=True, **EVERYTHING),
    Case("complex-fixed-reverse", length=24, dim=4, is_complex=True, B="fixed", C="fixed", reverse=True, **EVERYTHING),
    Case("groups", length=24, dim=4, groups=2, B="4d", C="4d", layout="bld", **EVERYTHING),
    Case("one-step-each", length=8, dim=4, **EVERYTHING),
    Case("bf16", length=40, dim=4, u_dtype=BF16, z_dtype=BF16, layout="bld", **MAMBA),
]

WIDE: dict[str, Any] = {f"{name}_dtype": F64 for name in ("u", "delta", "z", "B", "C")}


def divided(case: Case, implementation: str | None, mesh: Any, inputs: Any, **options: Any) -> Any:
    """The scan of a case with its length divided over the mesh axis "s", its batch over "b", its channels over "d"."""
    others = {name: name for name in ("b", "d") if name in mesh.axis_names}
    specs = specs_of(inputs, case.layout, l="s", **others)
    return jax.shard_map(
        scan_of(case, implementation, axis_name="s"),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(specs["u"], P(others.get("b"), others.get("d"))),
        **options,
    )


def check_against_one_device(case: Case, implementation: str | None, mesh: Any, **options: Any) -> Any:
    """Results and all gradients; returns the compiled gradient."""
    inputs, cotangents = case_inputs(case)
    whole = scan_of(case, implementation)
    parts = divided(case, implementation, mesh, inputs, **options)
    tolerance = 1e-2 if case.u_dtype == BF16 else 5e-6
    for got, wanted in zip(jit(parts)(inputs), jit(whole)(inputs), strict=True):
        assert_close(got, wanted, "result", tolerance)
    compiled = jit(gradients_of(parts)).lower(inputs, cotangents).compile()
    got = compiled(inputs, cotangents)
    for name, wanted in jit(gradients_of(whole))(inputs, cotangents).items():
        assert_close(got[name], wanted, f"gradient of {name}", tolerance)
    return compiled


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_device(case: Case) -> None:
    """One exchange of states forward, one of cotangents backward; last_state and the weights' gradients are sums over
    devices, and segment ids pass to the neighbour."""
    found = collectives(check_against_one_device(case, None, mesh_of(s=8)))
    # Weights of one dtype in one, complex in another.
    assert found.pop("all-reduce") <= (2 if case.is_complex else 1)
    assert_communicates(found, {"all-gather": 2} | ({"collective-permute": 1} if case.segments else {}))


@pytest.mark.parametrize("check_vma", [True, False])
def test_every_implementation(check_vma: bool, implementation: str | None) -> None:
    """On a mesh that divides the batch as well."""
    case = Case("both", length=24, dim=3, layout="bld", **EVERYTHING)
    mesh = mesh_of(b=2, s=4)
    check_against_one_device(case, implementation, mesh, check_vma=check_vma)


def test_batch_channels_and_length_together() -> None:
    """Three mesh axes: gradients of weights are summed over the devices of two, those of B and C over one."""
    case = Case("three", length=12, dim=4, **EVERYTHING)
    found = collectives(check_against_one_device(case, None, mesh_of(b=2, d=2, s=2)))
    assert found.pop("all-reduce") > 0
    assert_communicates(found, {"all-gather": 2, "collective-permute": 1})


def test_forward_mode(implementation: str | None) -> None:
    case = Case("jvp", length=16, dim=3, **EVERYTHING)
    inputs, _ = case_inputs(case)
    rest = {"segment_ids": inputs.pop("segment_ids")}
    tangents = {name: jnp.cos(17 * x) for name, x in inputs.items()}

    def push(scan: Any) -> Any:
        return jit(lambda x, t: jax.jvp(lambda x: scan({**x, **rest}), (x,), (t,)))(inputs, tangents)

    got = push(divided(case, implementation, mesh_of(s=8), inputs | rest))
    jax.tree.map(lambda x, y: assert_close(x, y, "jvp", 5e-6), got, push(scan_of(case, "xla")))


def test_explicit_batch_around_it() -> None:
    """Only the sequence by hand; the batch axis, explicit, is in the types."""
    case = Case("partial", batch=4, length=16, dim=3, layout="bld", **MAMBA)
    inputs, _ = case_inputs(case)
    mesh = mesh_of(EXPLICIT, b=2, s=4)
    specs = specs_of(inputs, "bld", l="s")
    with jax.set_mesh(mesh):
        arrays = put(inputs, mesh, specs_of(inputs, "bld", l="s", b="b"))
        scan = jax.shard_map(
            scan_of(case, None, axis_name="s"), in_specs=(specs,), out_specs=(specs["u"], P()), axis_names={"s"}
        )
        got = jit(scan)(arrays)
    for x, wanted in zip(got, jit(scan_of(case, None))(inputs), strict=True):
        assert_close(x, wanted, "result")


def test_communication_does_not_grow_with_the_length() -> None:
    mesh = mesh_of(s=8)

    def volume(length: int) -> int:
        case = Case("volume", length=length, dim=4, dstate=5, layout="bld", **MAMBA)
        inputs, cotangents = case_inputs(case)
        gradients = gradients_of(divided(case, None, mesh, inputs))
        return communicated_bytes(jit(gradients).lower(inputs, cotangents).compile())

    short = volume(64)
    assert short == volume(4096)
    # Twice a (decay, state) pair from each device, the last state, and the gradients of A, D and the bias.
    states, weights = 2 * 4 * 5, 4 * 5 + 2 * 4
    assert short <= 4 * (2 * 2 * 8 * states + states + weights)


@pytest.mark.parametrize("reverse", [False, True])
def test_nan_does_not_cross_a_segment_boundary(reverse: bool) -> None:
    """Neither inside a part nor from device to device."""
    case = Case("nan", length=32, dim=3, reverse=reverse, segments=True, **MAMBA)
    inputs, _ = case_inputs(case)
    ids = jnp.broadcast_to((jnp.arange(32) >= 13).astype(jnp.int32), (2, 32))
    dirty = 6 if not reverse else 20
    inputs |= {"segment_ids": ids, "u": inputs["u"].at[:, :, dirty].set(jnp.nan)}
    out, last_state = jit(divided(case, None, mesh_of(s=8), inputs))(inputs)
    clean = slice(13, None) if not reverse else slice(None, 13)
    assert np.isfinite(np.asarray(out[:, :, clean])).all() and np.isfinite(np.asarray(last_state)).all()
    assert np.isnan(np.asarray(out[:, :, dirty])).all()


def test_steps_of_zero() -> None:
    """delta of exactly 0 passes states and cotangents on unchanged."""
    case = Case("zeros", length=32, dim=3, D=True, z=True, layout="bld")
    inputs, cotangents = case_inputs(case)
    mask = (jnp.arange(32) % 4 != 3)[:, None]
    inputs["delta"] = jnp.where(mask, inputs["delta"], 0)
    got = jit(gradients_of(divided(case, None, mesh_of(s=8), inputs)))(inputs, cotangents)
    expected = jit(gradients_of(scan_of(case, None)))(inputs, cotangents)
    for name, wanted in expected.items():
        assert_close(got[name], wanted, f"gradient of {name}", 5e-6)


def test_float64() -> None:
    case = Case("double", length=24, dim=3, x64=True, **WIDE, **EVERYTHING)
    with x64():
        inputs, cotangents = case_inputs(case)
        got = jit(gradients_of(divided(case, None, mesh_of(s=8), inputs)))(inputs, cotangents)
        for name, wanted in jit(gradients_of(scan_of(case, None)))(inputs, cotangents).items():
            assert_close(got[name], wanted, f"gradient of {name}", 1e-13)


def test_a_million_steps() -> None:
    """2^20 positions over 8 devices agree with one device; channels that forget at once and ones that never do.

    In float64, where rounding a million decays close to 1 leaves digits to compare.
    """
    case = Case("long", batch=1, dim=2, dstate=2, length=1 << 20, x64=True, **WIDE, **MAMBA)
    with x64():
        inputs, cotangents = case_inputs(case)
        inputs["A"] = -jnp.array([[1e-6, 1e-3], [1.0, 30.0]])
        parts = divided(case, None, mesh_of(s=8), inputs)
        for got, wanted in zip(jit(parts)(inputs), jit(scan_of(case, None))(inputs), strict=True):
            assert_close(got, wanted, "result", 1e-11)
        got = jit(gradients_of(parts))(inputs, cotangents)
        for name, wanted in jit(gradients_of(scan_of(case, None)))(inputs, cotangents).items():
            assert_close(got[name], wanted, f"gradient of {name}", 1e-11)


def test_remat_saves_the_exchange() -> None:
    """With RESIDUAL_NAMES saved, the forward kernels and the exchange are not repeated."""
    case = Case("remat", length=16, dim=3, **MAMBA)
    inputs, cotangents = case_inputs(case)
    scan = divided(case, None, mesh_of(s=8), inputs)
    policy = jax.checkpoint_policies.save_only_these_names(*jax_sscan.RESIDUAL_NAMES)

    def gathers(function: Any) -> int:
        def gradients(inputs: Any) -> Any:
            results, vjp = jax.vjp(function, inputs)
            return results, vjp((cotangents["out"], cotangents["last_state"]))

        return jax.jit(gradients).lower(inputs).as_text().count("stablehlo.all_gather")

    plain, saved, again = gathers(scan), gathers(jax.checkpoint(scan, policy=policy)), gathers(jax.checkpoint(scan))
    assert (plain, saved, again) == (2, 2, 3)


def test_unknown_axis() -> None:
    inputs = make_inputs(CASES[0])
    with pytest.raises(ValueError, match=r"axis_name must be a mesh axis.*'nowhere'"):
        jax_sscan.selective_scan(**inputs, axis_name="nowhere")
    with pytest.raises(ValueError, match=r"axis_name must be a mesh axis.*'nowhere'"):
        jax_sscan.causal_conv1d(jnp.ones((1, 2, 8)), jnp.ones((2, 4)), axis_name="nowhere")


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_convolution(width: int, segments: bool, layout: str) -> None:
    """Values, final state and gradients of one device; one neighbour's last inputs are all that is sent."""
    if width == 1 and on_gpus():
        pytest.skip("XLA for GPUs (jax 0.11) crashes on an empty array, here a state, that enters a shard_map")
    rng = np.random.default_rng(4)
    batch, dim, length = 2, 3, 24
    shape = (batch, length, dim) if layout == "bld" else (batch, dim, length)
    inputs = {
        "x": rng.standard_normal(shape).astype(np.float32),
        "weight": rng.standard_normal((dim, width)).astype(np.float32),
        "bias": rng.standard_normal(dim).astype(np.float32),
        "initial_state": rng.standard_normal((batch, dim, width - 1)).astype(np.float32),
    }
    # Segments shorter than the filter too, and ids that come back.
    ids = (np.cumsum(rng.random((batch, length)) < 0.4, axis=1) % 2).astype(np.int32) if segments else None

    def conv(inputs: Any, ids: Any, axis_name: str | None = None) -> Any:
        return jax_sscan.causal_conv1d(
            **inputs, segment_ids=ids, activation="silu", return_final_state=True, layout=layout, axis_name=axis_name
        )

    sequence = P(None, "s") if layout == "bld" else P(None, None, "s")
    specs = dict.fromkeys(inputs, P()) | {"x": sequence}
    parts = jax.shard_map(
        lambda inputs, ids: conv(inputs, ids, "s"),
        mesh=mesh_of(s=8),
        in_specs=(specs, P(None, "s")),
        out_specs=(sequence, P()),
    )

    def loss(conv: Any) -> Any:
        def loss(inputs: Any) -> Any:
            out, state = conv(inputs, ids)
            return jnp.sum(jnp.sin(out)) + jnp.sum(state**3)

        return jax.grad(loss)

    compiled = jit(parts).lower(inputs, ids).compile()
    assert set(collectives(compiled)) <= {"collective-permute", "all-reduce"}
    for got, wanted in zip(compiled(inputs, ids), jit(conv)(inputs, ids), strict=True):
        if wanted.size:
            assert_close(got, wanted, "result")
    got = jit(loss(parts))(inputs)
    for name, wanted in jit(loss(conv))(inputs).items():
        if wanted.size:
            assert_close(got[name], wanted, f"gradient of {name}", 5e-6)


def test_convolution_of_too_short_parts() -> None:
    mesh = mesh_of(s=8)
    conv = jax.shard_map(
        lambda x: jax_sscan.causal_conv1d(x, jnp.ones((2, 4)), axis_name="s"),
        mesh=mesh,
        in_specs=P(None, None, "s"),
        out_specs=P(None, None, "s"),
    )
    with pytest.raises(ValueError, match="at least width - 1 = 3 positions on each device of 's', got 2"):
        conv(jnp.ones((1, 2, 2 * mesh.size)))
