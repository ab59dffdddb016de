"""What surrounds a compiled computation: export, caches, donation, and JAX's debugging modes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EVERYTHING, MAMBA, Case
from checks import jit, x64
from distributed import P, case_inputs, gradients_of, mesh_of, put, scan_of, specs_of

from jax_sscan.models import MambaConfig, MambaLM, Shard

CASE = Case("base", length=21, dim=4, **EVERYTHING)
KERNELS = ("jax_sscan_forward", "jax_sscan_backward")
CHECKS = [jax.export.DisabledSafetyCheck.custom_call(name) for name in KERNELS]


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts JAX's settings back."""
    names = ("jax_check_tracer_leaks", "jax_debug_nans")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def in_a_new_process(code: str, *arguments: str, **environment: str) -> str:
    """What ``code`` prints in a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
    import sys
    import jax, jax.export, numpy as np
    import jax_sscan
    jax_sscan.implementations()  # registers the kernels
    exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
    arrays = np.load(sys.argv[2])
    out = exported.call({name: arrays[name] for name in arrays})
    np.savez(sys.argv[3], *jax.tree.leaves(out))
"""


def test_export_to_a_new_process(tmp_path: Path, implementation: str | None) -> None:
    """Values and gradients: exported, saved, loaded and run where nothing has been traced."""
    inputs, cotangents = case_inputs(CASE)
    scan, gradients = scan_of(CASE, implementation), gradients_of(scan_of(CASE, implementation))

    @jax.jit
    def both(inputs: Any) -> Any:
        return scan(inputs), gradients(inputs, cotangents)

    platforms = ["cuda" if implementation == "cuda" else "cpu"]
    exported = jax.export.export(both, platforms=platforms, disabled_checks=CHECKS)(inputs)
    (tmp_path / "exported").write_bytes(exported.serialize())
    np.savez(tmp_path / "in.npz", **inputs)
    files = (str(tmp_path / name) for name in ("exported", "in.npz", "out.npz"))
    in_a_new_process(LOAD, *files, JAX_PLATFORMS=",".join(platforms))
    got = np.load(tmp_path / "out.npz")
    for x, wanted in zip(got.values(), jax.tree.leaves(both(inputs)), strict=True):
        np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=1e-5)


def test_export_for_two_platforms() -> None:
    """One artefact for CPUs and NVIDIA GPUs, with each platform's kernels where this build has them."""
    inputs, cotangents = case_inputs(CASE)
    exported = jax.export.export(
        jax.jit(gradients_of(scan_of(CASE, None))), platforms=["cpu", "cuda"], disabled_checks=CHECKS
    )(inputs, cotangents)
    assert set(exported.platforms) == {"cpu", "cuda"}
    assert len(exported.serialize()) > 0
    got = jax.jit(exported.call)(inputs, cotangents)
    for name, wanted in jax.jit(gradients_of(scan_of(CASE, None)))(inputs, cotangents).items():
        np.testing.assert_allclose(got[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def test_export_from_many_devices() -> None:
    """By way of `jax.shard_map`, whose program names no Python callback."""
    inputs, _ = case_inputs(CASE)
    mesh = mesh_of(x=2)
    specs = specs_of(inputs, CASE.layout, b="x")
    scan = jax.jit(jax.shard_map(scan_of(CASE, None), mesh=mesh, in_specs=(specs,), out_specs=(specs["u"], P("x"))))
    arrays = put(inputs, mesh, specs)
    exported = jax.export.export(scan, disabled_checks=CHECKS)(arrays)
    assert exported.nr_devices == 2
    again = jax.export.deserialize(exported.serialize())
    for got, wanted in zip(jax.jit(again.call)(arrays), scan(arrays), strict=True):
        np.testing.assert_array_equal(got, wanted)


CACHED = """
    import jax, jax.numpy as jnp
    import jax_sscan
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    hits = []
    jax.monitoring.register_event_listener(
        lambda name, **_: hits.append(name) if name == "/jax/compilation_cache/cache_hits" else None)
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.{kind},))
    u = jax.device_put(jnp.ones((8, 4, 9)), jax.sharding.NamedSharding(mesh, P("x")))
    A, B = -jnp.ones((4, 3)), jnp.ones((8, 3, 9))

    def loss(u, A, B):
        return jax_sscan.selective_scan(u, u, A, B, B).sum()

    B = jax.device_put(B, jax.sharding.NamedSharding(mesh, P("x")))
    A = jax.device_put(A, jax.sharding.NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss)).lower(u, A, B)
        hits.clear()
        compiled = lowered.compile()
        print(len(hits), float(compiled(u, A, B).sum()))
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_compilation_cache(kind: str, tmp_path: Path) -> None:
    """A second process finds what the first one compiled, and computes the same.

    In auto mode XLA calls back into Python while it partitions, and JAX has to be told to leave that address out.
    """
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    if kind == "Auto":
        settings["JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY"] = "true"
    first, second = (in_a_new_process(CACHED.replace("{kind}", kind), **settings).split() for _ in range(2))
    assert first[0] == "0" and second[0] == "1"
    assert first[1] == second[1]


def test_donation(implementation: str | None) -> None:
    """The output may take the place of u."""
    inputs, _ = case_inputs(CASE)
    u = inputs.pop("u")

    def scan(u: Any, inputs: Any) -> Any:
        return scan_of(CASE, implementation)({"u": u, **inputs})[0]

    expected = np.asarray(jit(scan)(u, inputs))
    donating = jax.jit(scan, donate_argnums=0).lower(u, inputs).compile()
    assert re.search(r"input_output_alias=\{.*\}", donating.as_text())
    given = jnp.array(u)
    np.testing.assert_allclose(donating(given, inputs), expected, rtol=1e-5, atol=1e-5)
    assert given.is_deleted()


@pytest.mark.usefixtures("restored")
def test_no_tracer_leaks(implementation: str | None) -> None:
    case = Case("leaks", length=5, dim=2, dstate=2, **MAMBA)
    inputs, cotangents = case_inputs(case)
    gradients = gradients_of(scan_of(case, implementation))
    jax.clear_caches()
    jax.config.update("jax_check_tracer_leaks", True)
    got = jax.jit(jax.vmap(gradients, ({**dict.fromkeys(inputs), "A": 0}, None)))(
        {**inputs, "A": jnp.stack([inputs["A"]] * 2)}, cotangents
    )
    jax.config.update("jax_check_tracer_leaks", False)
    for name, wanted in jit(gradients)(inputs, cotangents).items():
        np.testing.assert_allclose(got[name][1], wanted, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.usefixtures("restored")
def test_debug_nans(implementation: str | None) -> None:
    """Quiet where nothing is NaN, workspaces included, and loud where something is."""
    inputs, cotangents = case_inputs(CASE)
    gradients = jax.jit(gradients_of(scan_of(CASE, implementation)))
    jax.config.update("jax_debug_nans", True)
    jax.block_until_ready(gradients(inputs, cotangents))
    with pytest.raises(FloatingPointError, match="nan"):
        gradients({**inputs, "u": inputs["u"].at[0, 0, 0].set(jnp.nan)}, cotangents)


def test_x64_mode_changes_no_float32_result(implementation: str | None) -> None:
    """64-bit mode alone, with 32-bit operands: the same dtypes and bits."""
    inputs, cotangents = case_inputs(CASE)
    function = gradients_of(scan_of(CASE, implementation))
    expected = jit(function)(inputs, cotangents)
    with x64():
        got = jit(function)(inputs, cotangents)
    for name, wanted in expected.items():
        assert got[name].dtype == wanted.dtype, name
        np.testing.assert_array_equal(got[name], wanted, err_msg=name)


def model_gradients(shard: Shard | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """The loss of a language model and its gradients as a function of a dict of arrays, and such a dict."""
    options = {"num_layers": 2, "scan_layers": True, "remat": "keep_scans", "d_state": 3, **options}
    model = MambaLM(MambaConfig(8, vocab_size=11, shard=shard, **options), rngs=flax.nnx.Rngs(0))
    graph, state = flax.nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    ids = np.random.default_rng(0).integers(11, size=(2, 9)).astype(np.int32)

    def gradients(inputs: Any) -> Any:
        def loss(leaves: Any) -> Any:
            return jnp.sum(jnp.sin(flax.nnx.merge(graph, tree.unflatten(leaves))(inputs["ids"])))

        return jax.value_and_grad(loss)([inputs[f"parameter_{i}"] for i in range(len(leaves))])

    return gradients, {"ids": ids} | {f"parameter_{i}": leaf for i, leaf in enumerate(leaves)}, state


@pytest.mark.usefixtures("virtual_devices")
def test_a_model_exported_to_a_new_process(tmp_path: Path) -> None:
    """Loss and gradients of stacked, rematerialised layers: one artefact for two platforms."""
    gradients, inputs, _ = model_gradients()
    exported = jax.export.export(jax.jit(gradients), platforms=["cpu", "cuda"], disabled_checks=CHECKS)(inputs)
    (tmp_path / "exported").write_bytes(exported.serialize())
    np.savez(tmp_path / "in.npz", **inputs)
    in_a_new_process(LOAD, *(str(tmp_path / name) for name in ("exported", "in.npz", "out.npz")), JAX_PLATFORMS="cpu")
    got = np.load(tmp_path / "out.npz")
    for x, wanted in zip(got.values(), jax.tree.leaves(jit(gradients)(inputs)), strict=True):
        np.testing.assert_allclose(x, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("virtual_devices")
def test_a_divided_model_is_exported() -> None:
    """With ``shard`` the program names no Python callback, so that nothing has to be left out."""
    shard = Shard(batch="x", channels="y")
    expected_of, expected_inputs, _ = model_gradients()
    with jax.set_mesh(mesh_of(x=2, y=2)):
        gradients, inputs, _ = model_gradients(shard)
        exported = jax.export.export(jax.jit(gradients), platforms=["cpu"], disabled_checks=CHECKS)(inputs)
        assert exported.nr_devices == 4
        got = jax.jit(jax.export.deserialize(exported.serialize()).call)(inputs)
    for x, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(jit(expected_of)(expected_inputs)), strict=True):
        np.testing.assert_allclose(x, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("restored")
def test_a_model_in_debugging_modes() -> None:
    """No leaked tracer, no NaN on the way, and 64-bit mode changes nothing of a float32 model."""
    gradients, inputs, _ = model_gradients()
    expected = jit(gradients)(inputs)
    with x64():
        wide = jit(gradients)(inputs)
    for x, wanted in zip(jax.tree.leaves(wide), jax.tree.leaves(expected), strict=True):
        assert x.dtype == wanted.dtype
        np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=1e-5)
    jax.clear_caches()
    jax.config.update("jax_check_tracer_leaks", True)
    jax.config.update("jax_debug_nans", True)
    jax.block_until_ready(jit(gradients)(inputs))


def test_a_training_step_donates_its_state() -> None:
    gradients, inputs, state = model_gradients()
    leaves = jax.tree.leaves(state)

    def step(leaves: Any) -> Any:
        updates = gradients({"ids": inputs["ids"]} | {f"parameter_{i}": leaf for i, leaf in enumerate(leaves)})[1]
        return [leaf - 0.1 * update for leaf, update in zip(leaves, updates, strict=True)]

    new = jax.jit(step, donate_argnums=0)(leaves)
    assert all(leaf.is_deleted() for leaf in leaves) and not any(leaf.is_deleted() for leaf in new)
    assert jax.eval_shape(step, new) == [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in new]
