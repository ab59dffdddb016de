"""jit over many devices: what is divided, what is communicated, and that the results are those of one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BF16, EVERYTHING, MAMBA, Case
from checks import jit
from distributed import (
    AUTO,
    EXPLICIT,
    P,
    assert_close,
    assert_communicates,
    case_inputs,
    collectives,
    gradients_of,
    mesh_of,
    on_gpus,
    put,
    scan_of,
    specs_of,
)
from jax.sharding import NamedSharding

import jax_sscan

pytestmark = pytest.mark.usefixtures("devices")

BASE = Case("base", batch=8, dim=16, length=40, dstate=3, **EVERYTHING)
BLD = Case("bld", batch=8, dim=16, length=9, dstate=3, layout="bld", reverse=True, **EVERYTHING)
FIXED = Case("fixed", batch=8, dim=16, length=9, B="fixed", C="fixed", **MAMBA)
COMPLEX = Case("complex", batch=8, dim=16, length=9, is_complex=True, layout="bld", **EVERYTHING)
NARROW = Case(
    "bf16", batch=8, dim=16, length=9, u_dtype=BF16, delta_dtype=BF16, z_dtype=BF16, B_dtype=BF16, C_dtype=BF16, **MAMBA
)
GROUPS = Case("groups-4", batch=8, dim=16, length=9, groups=4, B="4d", C="4d", **EVERYTHING)
PRIVATE = Case("groups-dim", batch=2, dim=16, length=5, groups=16, B="4d", C="4d", layout="bld", **MAMBA)
UNEVEN = Case("groups-3", batch=2, dim=24, length=9, groups=3, B="4d", C="4d", layout="bld", **EVERYTHING)

# Case, mesh, which mesh axis divides batch, channels, groups; all-reduces of the backward pass: weights over batch
# shards, dB and dC over channel shards.
DIVISIONS = [
    pytest.param(BASE, {"x": 8}, {"b": "x"}, 1, id="batch"),
    pytest.param(BASE, {"x": 8}, {"d": "x"}, 1, id="channels"),
    pytest.param(BASE, {"x": 4, "y": 2}, {"b": "x", "d": "y"}, 2, id="batch-channels"),
    pytest.param(BASE, {"x": 4, "y": 2}, {"b": "x"}, 1, id="an-idle-axis"),
    pytest.param(BLD, {"x": 2, "y": 4}, {"b": "y", "d": "x"}, 2, id="bld-batch-channels"),
    pytest.param(BLD, {"x": 2, "y": 4}, {"b": ("x", "y")}, 1, id="two-axes-for-the-batch"),
    pytest.param(FIXED, {"x": 4, "y": 2}, {"b": "x", "d": "y"}, 1, id="fixed"),
    pytest.param(FIXED, {"x": 8}, {"d": "x"}, 0, id="fixed-channels"),
    pytest.param(GROUPS, {"x": 4, "y": 2}, {"b": "y", "d": "x", "g": "x"}, 1, id="a-group-per-shard"),
    pytest.param(GROUPS, {"x": 8}, {"d": "x"}, 1, id="more-shards-than-groups"),
    pytest.param(UNEVEN, {"x": 8}, {"d": "x"}, 1, id="groups-across-shards"),
    pytest.param(PRIVATE, {"x": 8}, {"d": "x", "g": "x"}, 0, id="a-group-per-channel"),
    # Complex weights and real ones are sums of two dtypes.
    pytest.param(COMPLEX, {"x": 4, "y": 2}, {"b": "x", "d": "y"}, 3, id="complex"),
    pytest.param(NARROW, {"x": 4, "y": 2}, {"b": "x", "d": "y"}, 2, id="bf16"),
]


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(("case", "axes", "divided", "all_reduces"), DIVISIONS)
def test_divided_scan(case: Case, axes: Any, divided: Any, all_reduces: int, kind: Any) -> None:
    """No collective in the forward pass; in the backward pass the all-reduces that mathematics asks for; the results
    and gradients of one device, divided as the operands are."""
    inputs, cotangents = case_inputs(case)
    scan = scan_of(case, None)
    gradients = gradients_of(scan)
    expected = jit(scan)(inputs), jit(gradients)(inputs, cotangents)

    mesh = mesh_of(kind, **axes)
    if on_gpus() and "g" not in divided and case.groups > 1 and case.groups % mesh.size == 0:
        pytest.skip(f"needs more devices than the {case.groups} groups")
    specs = specs_of(inputs, case.layout, **divided)
    result_specs = {"out": specs["u"], "last_state": P(divided.get("b"), divided.get("d"), None)}
    with jax.set_mesh(mesh):
        arrays, cts = put(inputs, mesh, specs), put(cotangents, mesh, result_specs)
        forward = jit(scan).lower(arrays).compile()
        backward = jit(gradients).lower(arrays, cts).compile()
        got = forward(arrays), backward(arrays, cts)

    assert collectives(forward) == {}
    assert_communicates(collectives(backward), {"all-reduce": all_reduces} if all_reduces else {})
    for x, wanted, name in zip(got[0], expected[0], result_specs, strict=True):
        assert_close(x, wanted, name)
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, result_specs[name]), x.ndim), name
    for name, wanted in expected[1].items():
        # bfloat16 gradients may round to another neighbour.
        assert_close(got[1][name], wanted, f"gradient of {name}", 1e-2 if wanted.dtype == jnp.bfloat16 else 5e-6)
        assert got[1][name].sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), wanted.ndim), name


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_replicated_weights(kind: Any) -> None:
    """Whole weights and divided channels: each device reads its rows, and only weights' gradients are gathered."""
    inputs, cotangents = case_inputs(BASE)
    gradients = gradients_of(scan_of(BASE, None))
    expected = jit(gradients)(inputs, cotangents)
    mesh = mesh_of(kind, x=8)
    weights = ("A", "D", "delta_bias")
    specs = {name: P() if name in weights else spec for name, spec in specs_of(inputs, "bdl", d="x").items()}
    with jax.set_mesh(mesh):
        arrays = put(inputs, mesh, specs)
        cts = put(cotangents, mesh, {"out": specs["u"], "last_state": P(None, "x")})
        whole = {name: NamedSharding(mesh, specs[name]) for name in inputs if name != "segment_ids"}
        forward = jit(scan_of(BASE, None)).lower(arrays).compile()
        compiled = jax.jit(gradients, out_shardings=whole if kind == AUTO else None).lower(arrays, cts).compile()
        got = compiled(arrays, cts)
    assert collectives(forward) == {}
    found = collectives(compiled)
    assert found.pop("all-gather", 0) <= len(weights)
    assert_communicates(found, {"all-reduce": 1})
    for name, wanted in expected.items():
        assert_close(got[name], wanted, f"gradient of {name}", 5e-6)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_pure_jax_is_divided_too(kind: Any) -> None:
    """implementation="xla" is divided as a kernel is, not left to XLA, which would sum once for every chunk."""
    inputs, cotangents = case_inputs(BLD)
    gradients = gradients_of(scan_of(BLD, "xla"))
    expected = jit(gradients)(inputs, cotangents)
    mesh = mesh_of(kind, x=4, y=2)
    specs = specs_of(inputs, "bld", b="x", d="y")
    with jax.set_mesh(mesh):
        arrays = put(inputs, mesh, specs)
        cts = put(cotangents, mesh, {"out": specs["u"], "last_state": P("x", "y")})
        forward = jit(scan_of(BLD, "xla")).lower(arrays).compile()
        compiled = jit(gradients).lower(arrays, cts).compile()
        got = compiled(arrays, cts)
    assert collectives(forward) == {}
    assert_communicates(collectives(compiled), {"all-reduce": 2})
    for name, wanted in expected.items():
        assert_close(got[name], wanted, f"gradient of {name}", 5e-6)


def test_sizes_that_no_axis_divides() -> None:
    """7 batch rows on 8 devices: XLA pads such arrays, kernels get them whole."""
    case = Case("seven", batch=7, dim=6, length=5, **MAMBA)
    inputs, _ = case_inputs(case)
    mesh = mesh_of(x=8)

    def scan(inputs: Any) -> Any:
        u = jax.lax.with_sharding_constraint(jnp.sin(inputs["u"]), NamedSharding(mesh, P("x")))
        return scan_of(case, None)({**inputs, "u": u})

    arrays = put(inputs, mesh, dict.fromkeys(inputs, P()))
    expected = jit(scan_of(case, None))({**inputs, "u": jnp.sin(inputs["u"])})
    for got, wanted in zip(jit(scan)(arrays), expected, strict=True):
        assert_close(got, wanted, "result")


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_divided_length_without_axis_name(kind: Any) -> None:
    """Gathered, since nobody asked for an exchange, and right."""
    case = Case("length", batch=2, dim=4, length=16, dstate=8, layout="bld", **MAMBA)
    inputs, _ = case_inputs(case)
    mesh = mesh_of(kind, x=4)
    with jax.set_mesh(mesh):
        arrays = put(inputs, mesh, specs_of(inputs, "bld", l="x") | {"A": P(None, "x")})
        compiled = jit(scan_of(case, None)).lower(arrays).compile()
        got = compiled(arrays)
    assert set(collectives(compiled)) == {"all-gather"}
    for x, wanted in zip(got, jit(scan_of(case, None))(inputs), strict=True):
        assert_close(x, wanted, "result")


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("mapped", ["data", "everything"])
def test_vmap_on_many_devices(mapped: str, kind: Any) -> None:
    """A mapped axis that is divided among devices stays so; only gradients of what the lanes share are summed."""
    if kind == EXPLICIT and jax.__version_info__ < (0, 10):
        pytest.skip("JAX 0.9 forbids batching rules a shard_map over the mapped axis")
    case = Case("lanes", batch=2, dim=4, length=9, **MAMBA)
    inputs, _ = case_inputs(case)
    names = ("u", "delta", "z") if mapped == "data" else tuple(inputs)
    lanes = {name: jnp.stack([inputs[name] * (1 + 0.1 * i) for i in range(8)]) for name in names}
    stacked = {**inputs, **lanes}
    in_axes = ({name: 0 if name in names else None for name in inputs},)
    scan = jax.vmap(scan_of(case, None), in_axes)
    gradients = jax.grad(lambda inputs: jnp.sum(jnp.sin(scan(inputs)[0])))
    mesh = mesh_of(kind, x=8)
    with jax.set_mesh(mesh):
        arrays = put(stacked, mesh, {name: P("x") if name in names else P() for name in inputs})
        compiled = jit(scan).lower(arrays).compile()
        backward = jit(gradients).lower(arrays).compile()
        got = compiled(arrays), backward(arrays)
    assert collectives(compiled) == {}
    assert_communicates(collectives(backward), {"all-reduce": 1} if mapped == "data" else {})
    for x, wanted in zip(got[0], jit(scan)(stacked), strict=True):
        assert_close(x, wanted, "result")
    for name, wanted in jit(gradients)(stacked).items():
        assert_close(got[1][name], wanted, f"gradient of {name}", 5e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma: bool, implementation: str | None) -> None:
    """Batch and channels divided by hand, weights whole along the batch: their gradients are summed by JAX."""
    inputs, cotangents = case_inputs(BLD)
    scan = scan_of(BLD, implementation)
    mesh = mesh_of(x=4, y=2)
    specs = specs_of(inputs, "bld", b="x", d="y")
    divided = jax.shard_map(
        scan, mesh=mesh, in_specs=(specs,), out_specs=(specs["u"], P("x", "y")), check_vma=check_vma
    )
    compiled = jit(gradients_of(divided)).lower(inputs, cotangents).compile()
    assert set(collectives(compiled)) == {"all-reduce"}
    expected = jit(gradients_of(scan))(inputs, cotangents)
    for name, got in compiled(inputs, cotangents).items():
        assert_close(got, expected[name], f"gradient of {name}", 5e-6)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(("layout", "whole_weights"), [("bdl", False), ("bld", False), ("bld", True)])
def test_divided_convolution(layout: str, whole_weights: bool, kind: Any) -> None:
    """No collective forward, one all-reduce of the filter's gradients over the batch shards backward.

    Whole weights of divided channels are read in part, and only their gradients are gathered.
    """
    rng = np.random.default_rng(0)
    batch, dim, length, width = 8, 16, 11, 4
    sequence = (batch, length, dim) if layout == "bld" else (batch, dim, length)
    inputs = {
        "x": rng.standard_normal(sequence).astype(np.float32),
        "weight": rng.standard_normal((dim, width)).astype(np.float32),
        "bias": rng.standard_normal(dim).astype(np.float32),
        "initial_state": rng.standard_normal((batch, dim, width - 1)).astype(np.float32),
    }
    ids = np.cumsum(rng.random((batch, length)) < 0.2, axis=1).astype(np.int32)

    def conv(inputs: Any, ids: Any) -> Any:
        return jax_sscan.causal_conv1d(
            **inputs, segment_ids=ids, activation="silu", layout=layout, return_final_state=True
        )

    def loss(inputs: Any, ids: Any) -> Any:
        out, state = conv(inputs, ids)
        return jnp.sum(jnp.sin(out)) + jnp.sum(state**3)

    mesh = mesh_of(kind, x=4, y=2)
    x_spec = P("x", None, "y") if layout == "bld" else P("x", "y", None)
    weight_spec = P() if whole_weights else P("y")
    specs = {"x": x_spec, "weight": weight_spec, "bias": weight_spec, "initial_state": P("x", "y")}
    with jax.set_mesh(mesh):
        arrays = put(inputs, mesh, specs), jax.device_put(ids, NamedSharding(mesh, P("x")))
        forward = jit(conv).lower(*arrays).compile()
        backward = jit(jax.grad(loss)).lower(*arrays).compile()
        got = forward(*arrays), backward(*arrays)
    assert collectives(forward) == {}
    found = collectives(backward)
    if whole_weights:
        found.pop("all-gather", None)
    assert_communicates(found, {"all-reduce": 1})
    jax.tree.map(lambda x, y: assert_close(x, y, "result"), got[0], jit(conv)(inputs, ids))
    expected = jit(jax.grad(loss))(inputs, ids)
    for name, wanted in expected.items():
        assert_close(got[1][name], wanted, f"gradient of {name}", 5e-6)
