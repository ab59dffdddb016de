"""What tests with many devices share: meshes, how inputs are divided, and what a compiled program communicates."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make_inputs
from checks import keywords_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_sscan

P = PartitionSpec
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
_BYTES = {"f32": 4, "s32": 4, "c64": 8, "f64": 8, "bf16": 2, "f16": 2, "pred": 1, "u8": 1}


def on_gpus() -> bool:
    """Whether the test runs on GPUs rather than on virtual CPUs (see the fixture ``devices``)."""
    default = jax.config.jax_default_device
    return default is not None and default.platform == "gpu"


def mesh_of(kind: AxisType = AUTO, **axes: int) -> jax.sharding.Mesh:
    """A mesh of virtual CPU devices, which conftest.py asks for, or of GPUs.

    Of GPUs there are fewer: as long as they do not suffice, the largest axis, the first of several, is halved.
    """
    devices = jax.devices("gpu" if on_gpus() else "cpu")
    if len(devices) < 2:
        pytest.skip("needs two devices")
    while int(np.prod(list(axes.values()))) > len(devices):
        largest = max(axes, key=lambda name: axes[name])
        axes[largest] //= 2
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes), devices=devices[:count])


def collectives(compiled: Any) -> dict[str, int]:
    """How often each collective operation stands in a compiled program."""
    return dict(Counter(kind for _, kind in _COLLECTIVE.findall(compiled.as_text())))


def assert_communicates(found: dict[str, int], expected: dict[str, int]) -> None:
    """So many of each collective operation and no others; on GPUs at most so many.

    There an axis of the mesh may have one device left, and XLA makes one of several operations.
    """
    if on_gpus():
        assert all(count <= expected.get(name, 0) for name, count in found.items()), (found, expected)
    else:
        assert found == expected


def communicated_bytes(compiled: Any) -> int:
    """The size of what all collective operations of a compiled program result in, on one device."""
    total = 0
    for shapes, _ in _COLLECTIVE.findall(compiled.as_text()):
        for name, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            total += _BYTES[name] * int(np.prod([int(n) for n in sizes.split(",") if n], dtype=np.int64))
    return total


def axes_of(name: str, x: Any, layout: str) -> str:
    """One letter for each axis of an input: batch, channel, length, state, group."""
    weights = {"A": "dn", "D": "d", "delta_bias": "d", "initial_state": "bdn", "segment_ids": "bl"}
    if name in weights:
        return weights[name]
    if name in ("u", "delta", "z"):
        return "bld" if layout == "bld" else "bdl"
    if x.ndim == 2:
        return "dn"
    axes = "blgn" if layout == "bld" else "bgnl"
    return axes if x.ndim == 4 else axes.replace("g", "")


def specs_of(inputs: dict[str, Any], layout: str, **divided: Any) -> dict[str, PartitionSpec]:
    """A spec for each input, from the mesh axes that divide each of the letters of `axes_of`."""
    return {name: P(*(divided.get(letter) for letter in axes_of(name, x, layout))) for name, x in inputs.items()}


def put(inputs: dict[str, Any], mesh: jax.sharding.Mesh, specs: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in inputs.items()}


def case_inputs(case: Case) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Random inputs, and random cotangents of the two results."""
    inputs = {name: jnp.asarray(x) for name, x in make_inputs(case).items()}
    rng = np.random.default_rng(3)
    state = rng.standard_normal((case.batch, case.dim, case.dstate))
    if case.is_complex:
        state = state + 1j * rng.standard_normal(state.shape)
    cotangents = {
        "out": jnp.asarray(rng.standard_normal(inputs["u"].shape), inputs["u"].dtype),
        "last_state": jnp.asarray(state, inputs["A"].dtype),
    }
    return inputs, cotangents


def scan_of(case: Case, implementation: str | None, **options: Any) -> Any:
    """dict of inputs -> (out, last_state)."""

    def scan(inputs: Any) -> Any:
        return jax_sscan.selective_scan(
            **inputs, **keywords_of(case), return_last_state=True, implementation=implementation, **options
        )

    return scan


def gradients_of(scan: Any) -> Any:
    """inputs, cotangents -> gradients of all floating inputs."""

    def gradients(inputs: Any, cotangents: Any) -> Any:
        arrays = {name: x for name, x in inputs.items() if name != "segment_ids"}
        rest = {name: x for name, x in inputs.items() if name == "segment_ids"}

        def loss(arrays: Any) -> Any:
            out, last_state = scan({**arrays, **rest})
            return jnp.sum(out * cotangents["out"]) + jnp.sum(last_state * cotangents["last_state"]).real

        return jax.grad(loss)(arrays)

    return gradients


def assert_close(got: Any, expected: Any, what: str, tolerance: float = 2e-6) -> None:
    """Equal but for rounding, on the scale of the largest element (sums over devices take another order)."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    got, expected = (x.astype(np.result_type(x.dtype, np.float32)) for x in (got, expected))
    scale = np.abs(expected).max()
    assert scale > 0, f"{what} is all zero, which shows nothing"
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale, err_msg=what)
