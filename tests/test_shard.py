"""The option ``shard`` of modules and of the language model: results, gradients and collectives on many devices."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import jit
from distributed import AUTO, EXPLICIT, P, assert_close, assert_communicates, collectives, communicated_bytes, mesh_of
from jax.sharding import NamedSharding

import jax_sscan.linen
import jax_sscan.nnx
from jax_sscan.models import MambaConfig, MambaLM, Shard, generate, load_pretrained, save_pretrained, score

pytestmark = pytest.mark.usefixtures("devices")

VOCABULARY, BATCH, LENGTH = 32, 4, 32
CONFIG = MambaConfig(16, vocab_size=VOCABULARY, num_layers=1, d_state=3, dt_rank=4, inner_norm="scaled_rms")
STACK = {"num_layers": 2, "scan_layers": True, "remat": "keep_scans"}

# Channels: the projections to B, C and step sizes and out are sums over channels, and so are, backward, the cotangents
# of the two inputs of what channels share. Length: one exchange of the scan and one of the convolution in each
# direction. Vocabulary: the embedding is a sum forward, the cotangent of the head's input one backward. All gradients
# of parameters are summed at once, those of stacked layers too, whose loop stands in the program once. To keep the
# scans alone sends again what leads to them: the convolution's halo, the sum of the projection to B, C and step sizes.
KINDS = [
    pytest.param({"x": 8}, Shard(length="x"), {}, {"all-gather": 1, "collective-permute": 1},
                 {"all-gather": 2, "collective-permute": 2, "all-reduce": 1}, id="length"),
    pytest.param({"x": 4}, Shard(batch="x"), {}, {}, {"all-reduce": 1}, id="batch"),
    pytest.param({"x": 8}, Shard(channels="x"), {}, {"all-reduce": 2}, {"all-reduce": 4}, id="channels"),
    pytest.param({"x": 2, "y": 4}, Shard(batch="x", channels="y", vocabulary="y"), STACK, {"all-reduce": 3},
                 {"all-reduce": 3 + 3 + 1 + 1}, id="batch-channels-stacked"),
    pytest.param({"x": 2, "y": 4}, Shard(batch="x", length="y"), STACK, {"all-gather": 1, "collective-permute": 1},
                 {"all-gather": 2, "collective-permute": 3, "all-reduce": 1}, id="batch-length-stacked"),
    pytest.param({"x": 2, "y": 4}, Shard(channels="x", vocabulary="x", length="y"), {"tie_embeddings": False},
                 {"all-reduce": 3, "all-gather": 1, "collective-permute": 1},
                 {"all-reduce": 3 + 3 + 1, "all-gather": 2, "collective-permute": 2}, id="channels-length"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """GPUs round the factors of float32 products otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def tokens(batch: int = BATCH, length: int = LENGTH) -> Any:
    return np.random.default_rng(0).integers(VOCABULARY, size=(batch, length)).astype(np.int32)


def logits_and_gradients(model: MambaLM) -> Any:
    """Two functions of the model's state, tokens, and cotangents of the logits."""
    graph, _ = flax.nnx.split(model)

    def logits(state: Any, ids: Any) -> Any:
        return flax.nnx.merge(graph, state)(ids)

    def gradients(state: Any, ids: Any, cotangents: Any) -> Any:
        return jax.grad(lambda state: jnp.sum(jnp.sin(logits(state, ids)) * cotangents))(state)

    return logits, gradients


def arrays(state: Any) -> dict[Any, Any]:
    return {path: variable.get_value() for path, variable in flax.nnx.to_flat_state(state)}


@functools.cache
def on_one_device(config: MambaConfig, platform: str) -> Any:
    model = MambaLM(config, rngs=flax.nnx.Rngs(0))
    cotangents = np.random.default_rng(1).standard_normal((BATCH, LENGTH, VOCABULARY)).astype(np.float32)
    logits, gradients = map(jit, logits_and_gradients(model))
    state = flax.nnx.state(model)
    return cotangents, logits(state, tokens()), arrays(gradients(state, tokens(), cotangents))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize(("axes", "shard", "changes", "forward", "backward"), KINDS)
def test_language_model(
    axes: Any, shard: Shard, changes: Any, forward: Any, backward: Any, kind: Any, devices: str
) -> None:
    """Logits and gradients of one device, divided as they should be, by no more communication than it takes."""
    config = dataclasses.replace(CONFIG, **changes)
    cotangents, expected_logits, expected = on_one_device(config, devices)
    mesh = mesh_of(kind, **axes)
    with jax.set_mesh(mesh):
        model = MambaLM(dataclasses.replace(config, shard=shard), rngs=flax.nnx.Rngs(0))
        logits, gradients = map(jit, logits_and_gradients(model))
        state = flax.nnx.state(model)
        ids = jax.device_put(tokens(), NamedSharding(mesh, shard.spec("batch", "length")))
        spec = shard.spec("batch", "length", "vocab")
        cts = jax.device_put(cotangents, NamedSharding(mesh, spec))
        run, differentiate = logits.lower(state, ids).compile(), gradients.lower(state, ids, cts).compile()
        got, got_gradients = run(state, ids), arrays(differentiate(state, ids, cts))
    assert_communicates(collectives(run), forward)
    assert_communicates(collectives(differentiate), backward)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    assert_close(got, expected_logits, "logits", 5e-6)
    for path, parameter in arrays(state).items():
        assert_close(got_gradients[path], expected[path], f"gradient of {path}", 1e-5)
        assert got_gradients[path].sharding.is_equivalent_to(parameter.sharding, parameter.ndim), path


def test_parameters_are_divided() -> None:
    """Those with channels and the vocabulary, also when layers are stacked; a device has its part of them only."""
    mesh = mesh_of(x=2, y=4)
    shard = Shard(batch="x", channels="y", vocabulary="y")
    with jax.set_mesh(mesh):
        for scan_layers in (False, True):
            config = dataclasses.replace(CONFIG, scan_layers=scan_layers, shard=shard)
            model = MambaLM(config, rngs=flax.nnx.Rngs(0))
            layer = model.layers if scan_layers else model.layers[0]
            first = (None,) if scan_layers else ()
            for param, spec in (
                (layer.mixer.in_proj, P(*first, None, "y")),
                (layer.mixer.A_log, P(*first, "y")),
                (layer.mixer.out_proj, P(*first, "y")),
                (layer.norm, P()),
                (model.embedding, P("y")),
            ):
                assert param[...].sharding.is_equivalent_to(NamedSharding(mesh, spec), param.ndim)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_loading(kind: Any, tmp_path: Path) -> None:
    """Each device its part; what `nnx.update` brings from a model that is not divided works too, if more slowly."""
    config = dataclasses.replace(CONFIG, inner_norm="rms", scan_layers=kind is AUTO)
    model = MambaLM(config, rngs=flax.nnx.Rngs(0))
    save_pretrained(model, tmp_path / "whole")
    shard = Shard(batch="x", channels="y", vocabulary="y")
    with jax.set_mesh(mesh_of(kind, x=2, y=2)):
        divided = MambaLM(dataclasses.replace(config, shard=shard), rngs=flax.nnx.Rngs(1))
        loaded = load_pretrained(tmp_path / "whole", scan_layers=config.scan_layers, shard=shard)
        for (path, got), wanted in zip(
            arrays(flax.nnx.state(loaded)).items(), arrays(flax.nnx.state(divided)).values(), strict=True
        ):
            assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim), path
        save_pretrained(loaded, tmp_path / "divided")
        whole = load_pretrained(tmp_path / "whole", scan_layers=config.scan_layers)
        flax.nnx.update(divided, flax.nnx.state(whole))
        logits = divided(tokens())
    file = "model.safetensors"
    assert (tmp_path / "divided" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert_close(logits, model(tokens()), "logits", 5e-6)


def test_communication_does_not_grow_with_the_length() -> None:
    shard = Shard(length="x")
    with jax.set_mesh(mesh_of(x=8)):
        model = MambaLM(dataclasses.replace(CONFIG, shard=shard), rngs=flax.nnx.Rngs(0))
        graph, state = flax.nnx.split(model)

        def volume(length: int) -> int:
            gradient = jax.grad(lambda state, ids: jnp.sum(flax.nnx.merge(graph, state)(ids)))
            ids = jax.device_put(tokens(1, length), NamedSharding(mesh_of(x=8), P(None, "x")))
            return communicated_bytes(jit(gradient).lower(state, ids).compile())

        assert volume(64) == volume(1024)


@pytest.mark.parametrize(
    "shard",
    [Shard(batch="x"), Shard(channels="x", vocabulary="x"), Shard(length="x")],
    ids=["data", "channels", "sequence"],
)
def test_training(shard: Shard, implementation: str | None) -> None:
    """Three steps of AdamW with `score` as the loss on two devices, GPUs where there are: the losses of one device, and
    parameters stay where they were."""
    ids = tokens()

    def train(config: MambaConfig, ids: Any) -> Any:
        model = MambaLM(config, rngs=flax.nnx.Rngs(0))
        optimizer = flax.nnx.Optimizer(model, optax.adamw(1e-2), wrt=flax.nnx.Param)
        graph, state = flax.nnx.split((model, optimizer))

        def step(state: Any, ids: Any) -> Any:
            model, optimizer = flax.nnx.merge(graph, state)
            loss, gradients = flax.nnx.value_and_grad(lambda model: -jnp.mean(score(model, ids)))(model)
            optimizer.update(model, gradients)
            return loss, flax.nnx.state((model, optimizer))

        run = jit(step).lower(state, ids).compile()
        # Those of the scan's states, forward and backward: of logits, activations and parameters nothing is gathered.
        gathers = len(re.findall(r"= \(?f32\[.* all-gather(?:-start)?\(", run.as_text()))
        wanted = 2 * config.num_layers if config.shard and config.shard.length else 0
        assert_communicates({"all-gather": gathers}, {"all-gather": wanted})
        losses, before = [], jax.tree.map(lambda x: x.sharding, state)
        for _ in range(3):
            loss, state = run(state, ids)
            losses.append(float(loss))
        return losses, before, state

    config = dataclasses.replace(CONFIG, implementation=implementation)
    expected, _, _ = train(config, ids)
    assert expected[2] < expected[0]
    mesh = mesh_of(x=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(ids, NamedSharding(mesh, shard.spec("batch", "length")))
        losses, before, state = train(dataclasses.replace(config, shard=shard), placed)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim) or pytest.fail(), state, before)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_reading_in_parts_and_generating(scan_layers: bool) -> None:
    """Caches pass from call to call, and single tokens, which no length divides, continue divided sequences."""
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    model = MambaLM(config, rngs=flax.nnx.Rngs(0))
    ids = tokens()[:, :16]
    segment_ids = jnp.asarray(np.arange(16) >= 6, jnp.int32)[None].repeat(BATCH, 0)
    expected = model(ids, segment_ids=segment_ids)
    continued = generate(model, ids, 3)
    shard = Shard(batch="x", channels="y", vocabulary="y", length="z")
    with jax.set_mesh(mesh_of(x=2, y=2, z=2)):
        divided = MambaLM(dataclasses.replace(config, shard=shard), rngs=flax.nnx.Rngs(0))
        graph, state = flax.nnx.split(divided)

        @jit
        def read(state: Any, ids: Any, cache: Any, segment_ids: Any) -> Any:
            return flax.nnx.merge(graph, state)(ids, cache, segment_ids=segment_ids, return_cache=True)

        first, cache = read(state, ids[:, :8], divided.init_cache(BATCH), segment_ids[:, :8])
        second, cache = read(state, ids[:, 8:14], cache, segment_ids[:, 8:14])
        third, cache = read(state, ids[:, 14:15], cache, None)
        fourth, _ = read(state, ids[:, 15:], cache, None)
        assert_close(jnp.concatenate([first, second, third, fourth], 1), expected, "logits", 1e-5)
        np.testing.assert_array_equal(generate(divided, ids, 3), continued)


MODULES = {
    "nnx.Mamba": (jax_sscan.nnx.Mamba, 8),
    "nnx.SelectiveScan": (jax_sscan.nnx.SelectiveScan, 16),
    "linen.Mamba": (jax_sscan.linen.Mamba, 8),
    "linen.SelectiveScan": (jax_sscan.linen.SelectiveScan, 16),
}
OPTIONS: dict[str, Any] = {"d_state": 3, "dt_rank": 4, "inner_norm": "scaled_rms"}
EIGHTHS = Shard(batch="b", length="s", channels="c")


def module_of(name: str, shard: Shard | None) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A function of (params, x, cache, segment_ids), its random parameters, and how they are divided."""
    module, size = MODULES[name]
    options = {**OPTIONS, "shard": shard, **({"use_bias": True} if "Mamba" in name else {})}
    reference = getattr(jax_sscan.nnx, name.split(".")[1])(size, rngs=flax.nnx.Rngs(0), **options)
    graph, state = flax.nnx.split(reference)
    rng = np.random.default_rng(2)
    params = {
        key: variable.get_value() + 0.3 * rng.standard_normal(variable.shape).astype(np.float32)
        for (key,), variable in flax.nnx.to_flat_state(state)
    }
    specs = {
        key: P(*variable.get_metadata().get("out_sharding", ())) for (key,), variable in flax.nnx.to_flat_state(state)
    }

    def call(params: Any, x: Any, cache: Any, segment_ids: Any) -> Any:
        if name.startswith("linen"):
            linen = module(size, **options)
            return linen.apply({"params": params}, x, cache=cache, segment_ids=segment_ids, return_cache=True)
        flax.nnx.replace_by_pure_dict(state, params)
        return flax.nnx.merge(graph, state)(x, cache=cache, segment_ids=segment_ids, return_cache=True)

    return call, params, specs


def module_inputs(name: str) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(3)
    size = MODULES[name][1]
    x = rng.standard_normal((BATCH, 12, size)).astype(np.float32)
    state = rng.standard_normal((BATCH, 16, 3)).astype(np.float32)
    window = rng.standard_normal((BATCH, 16, 3)).astype(np.float32)
    cache = jax_sscan.nnx.MambaCache(window, state) if "Mamba" in name else state
    return x, cache, (np.arange(12) >= 5).astype(np.int32)[None].repeat(BATCH, 0)


def value_and_gradients(call: Any) -> Any:
    def loss(params: Any, x: Any, cache: Any, segment_ids: Any) -> Any:
        results = call(params, x, cache, segment_ids)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(results)), results

    return jit(jax.grad(loss, (0, 1, 2), has_aux=True))


@functools.cache
def module_on_one_device(name: str, platform: str) -> Any:
    call, params, _ = module_of(name, None)
    return value_and_gradients(call)(params, *module_inputs(name))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *[("nnx.Mamba", way) for way in ("auto", "explicit", "inside", "no-vma")],
        *[("nnx.SelectiveScan", way) for way in ("auto", "explicit", "inside", "no-vma")],
        ("linen.Mamba", "auto"),
        ("linen.SelectiveScan", "explicit"),
    ],
)
def test_modules(name: str, way: str, devices: str) -> None:
    """Batch, channels and length at once, with a cache and segments; also inside the caller's own `jax.shard_map`."""
    mesh = mesh_of(EXPLICIT if way == "explicit" else AUTO, b=2, c=2, s=2)
    with jax.set_mesh(mesh):
        call, params, specs = module_of(name, EIGHTHS)
        x_spec = EIGHTHS.spec("batch", "length", "d_inner" if "Scan" in name else None)
        ids_spec, cache_spec = EIGHTHS.spec("batch", "length"), EIGHTHS.spec("batch", "d_inner")
        in_specs = specs, x_spec, cache_spec, ids_spec
        if way in ("inside", "no-vma"):
            call = jax.shard_map(
                call, mesh=mesh, in_specs=in_specs, out_specs=(x_spec, cache_spec), check_vma=way == "inside"
            )
        x, cache, segment_ids = module_inputs(name)
        params = {key: jax.device_put(value, NamedSharding(mesh, specs[key])) for key, value in params.items()}
        x, segment_ids = (
            jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in ((x, x_spec), (segment_ids, ids_spec))
        )
        cache = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, cache_spec)), cache)
        compiled = value_and_gradients(call).lower(params, x, cache, segment_ids).compile()
        got = compiled(params, x, cache, segment_ids)
    if way in ("auto", "explicit"):
        # One exchange of (decay, state) forward and one backward: parameters and activations stay where they are.
        gathers = {name: count for name, count in collectives(compiled).items() if name == "all-gather"}
        assert_communicates(gathers, {"all-gather": 2})
    expected = module_on_one_device(name, devices)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert_close(leaf, wanted, jax.tree_util.keystr(path), 1e-5)


def test_a_module_left_to_jit(devices: str) -> None:
    """Without ``shard``, parameters and inputs that are divided by hand: XLA finds the same division."""
    call, params, _ = module_of("nnx.Mamba", None)
    x, cache, segment_ids = module_inputs("nnx.Mamba")
    mesh = mesh_of(x=4, y=2)
    divided = {"in_proj", "z_proj", "conv_kernel", "conv_bias", "x_proj", "A_log", "D", "dt_bias", "out_proj"}
    last = {"in_proj", "z_proj", "dt_proj"}
    specs = {key: P(None, "y") if key in last else P("y") if key in divided else P() for key in params}
    specs |= {key: P("y") for key in ("in_proj_bias", "z_proj_bias")}
    with jax.set_mesh(mesh):
        params = {key: jax.device_put(value, NamedSharding(mesh, specs[key])) for key, value in params.items()}
        x, segment_ids = (jax.device_put(array, NamedSharding(mesh, P("x"))) for array in (x, segment_ids))
        cache = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P("x", "y"))), cache)
        compiled = value_and_gradients(call).lower(params, x, cache, segment_ids).compile()
        got = compiled(params, x, cache, segment_ids)
    assert set(collectives(compiled)) == {"all-reduce"}
    expected = module_on_one_device("nnx.Mamba", devices)
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert_close(leaf, wanted, jax.tree_util.keystr(path), 1e-5)


@pytest.mark.parametrize("name", ["nnx.Mamba", "linen.Mamba"])
def test_a_batch_in_the_types(name: str, devices: str) -> None:
    """Without ``shard``, on an Explicit mesh: the batch is divided by its type alone, gradients are summed once."""
    call, params, _ = module_of(name, None)
    x, cache, segment_ids = module_inputs(name)
    mesh = mesh_of(EXPLICIT, x=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put((x, cache, segment_ids), NamedSharding(mesh, P("x")))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        compiled = value_and_gradients(call).lower(params, *placed).compile()
        got = compiled(params, *placed)
    assert_communicates(collectives(compiled), {"all-reduce": 1})
    assert got[1][0].sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 3)
    for (path, leaf), wanted in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(module_on_one_device(name, devices)), strict=True
    ):
        assert_close(leaf, wanted, jax.tree_util.keystr(path), 1e-5)


def test_linen_initialises_divided_parameters() -> None:
    with jax.set_mesh(mesh_of(c=2)):
        layer = jax_sscan.linen.Mamba(8, shard=Shard(channels="c"))
        variables = layer.init(jax.random.key(0), jnp.ones((1, 2, 8)))
    assert flax.linen.get_partition_spec(variables)["params"]["in_proj"] == P(None, "c")


def test_wrong_arguments_are_named() -> None:
    ids = tokens(3)
    mesh = mesh_of(x=8)

    def model(**changes: Any) -> MambaLM:
        return MambaLM(dataclasses.replace(CONFIG, **changes), rngs=flax.nnx.Rngs(0))

    with jax.set_mesh(mesh):
        by_length, by_batch = model(shard=Shard(length="x")), model(shard=Shard(batch="x"))
        block = jax_sscan.nnx.Mamba(8, bidirectional=True, shard=Shard(length="x"), rngs=flax.nnx.Rngs(0))
        for match, call in {
            f"multiple of {mesh.size}": lambda: by_batch(ids),
            "mask .attention_mask. must be None": lambda: by_length(ids, attention_mask=jnp.ones(ids.shape, bool)),
            "bidirectional": lambda: block(jnp.ones((1, 16, 8))),
            "one thing only": lambda: Shard(batch="x", length="x"),
            "length must be the name of a mesh axis": lambda: Shard(length=("x", "y")),  # pyright: ignore[reportArgumentType]
            "batch must be the name": lambda: Shard(batch=0),  # pyright: ignore[reportArgumentType]
        }.items():
            with pytest.raises((ValueError, TypeError), match=match):
                call()
    with pytest.raises(ValueError, match=r"must have the axes \['x'\].*jax.set_mesh"):
        by_batch(ids)
