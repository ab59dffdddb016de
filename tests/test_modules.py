"""The Flax modules: against a block written position by position, and one part of a sequence against the whole."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import block_oracle
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import jit
from test_package import run_python

import jax_sscan.linen
import jax_sscan.nnx
from jax_sscan.modules.mamba import MambaCache

D_MODEL, BATCH, LENGTH = 6, 2, 13
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"use_bias": True, "use_conv_bias": False, "dt_rank": 3, "d_conv": 3, "expand": 1.5},
    "falcon": {"inner_norm": "rms", "d_inner": 10},
    "jamba": {"inner_norm": "scaled_rms", "d_conv": 2},
}


def block(flavour: str = "nnx", compiled: bool = True, **options: Any) -> Any:
    """A function of (params, x, ...) and random parameters, none of them at its initial value."""
    options = {"d_state": 3, **options}
    module: Any = jax_sscan.nnx.Mamba(D_MODEL, rngs=flax.nnx.Rngs(0), **options)
    graph, state = flax.nnx.split(module)
    params = flax.nnx.to_pure_dict(state)
    keys = jax.random.split(jax.random.key(3), len(params))
    noise = {name: 0.3 * jax.random.normal(key, params[name].shape) for name, key in zip(params, keys, strict=True)}
    params = {name: (params[name] + noise[name]).astype(params[name].dtype) for name in params}
    linen = jax_sscan.linen.Mamba(D_MODEL, **options)

    def call(params: Any, args: Any, keywords: Any, **static: Any) -> Any:
        if flavour == "linen":
            return linen.apply({"params": params}, *args, **keywords, **static)
        flax.nnx.replace_by_pure_dict(state, params)
        return flax.nnx.merge(graph, state)(*args, **keywords, **static)

    calls = {flag: functools.partial(call, return_cache=flag) for flag in (False, True)}
    if compiled:
        calls = {flag: jit(call) for flag, call in calls.items()}

    def run(params: Any, *args: Any, return_cache: bool = False, **keywords: Any) -> Any:
        return calls[return_cache](params, args, keywords)

    return run, params


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """GPUs round the factors of float32 products otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


def inputs(seed: int = 1, length: int = LENGTH) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (BATCH, length, D_MODEL))


def close(got: Any, expected: Any, tolerance: float = 2e-5) -> None:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * (1 + np.abs(expected).max(initial=0)))


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
@pytest.mark.parametrize("name", OPTIONS)
def test_block_against_the_straight_loop(name: str, flavour: str) -> None:
    run, params = block(flavour, **OPTIONS[name])
    x = inputs()
    out, cache = run(params, x, return_cache=True)
    for b in range(BATCH):
        row = block_oracle.Row(params, "inner_norm" in OPTIONS[name])
        close(out[b], row.read(x[b]))
        close(cache.conv[b], row.window)
        close(cache.state[b], row.state)


def test_bidirectional_block_against_two_loops() -> None:
    run, params = block(bidirectional=True)
    x = inputs()
    # The first row ends early and the second begins late: padding is in front of one of the two directions.
    mask = jnp.arange(LENGTH) < jnp.array([[9], [LENGTH]])
    mask = mask.at[1, :2].set(False)
    out = run(params, x, mask=mask)
    for b, real in enumerate((slice(0, 9), slice(2, LENGTH))):
        steps = np.asarray(x[b, real], np.float64)
        there, back = block_oracle.Row(params), block_oracle.Row(params, prefix="reverse_")
        y = np.stack([there.scan(s) for s in steps]) + np.stack([back.scan(s) for s in steps[::-1]])[::-1]
        close(out[b, real], y @ there.p["out_proj"])
    with pytest.raises(ValueError, match="bidirectional"):
        run(params, x, return_cache=True)


@pytest.mark.parametrize("padded", [False, True])
def test_bidirectional_block_of_packed_sequences(padded: bool) -> None:
    run, params = block(bidirectional=True)
    x = inputs()
    ids = (jnp.arange(LENGTH) >= 6).astype(jnp.int32)[None].repeat(BATCH, 0)
    mask = jnp.ones((BATCH, LENGTH), bool).at[0, 9:].set(False).at[1, :2].set(False)
    masks = (lambda part: {"mask": mask[:, part]}) if padded else lambda _: {}
    out = run(params, x, segment_ids=ids, **masks(slice(None)))
    for part in (slice(0, 6), slice(6, LENGTH)):
        real = mask[:, part] | (not padded)
        close(out[:, part][real], run(params, x[:, part], **masks(part))[real])


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("Mamba", {}),
        ("Mamba", {"inner_norm": "scaled_rms", "use_bias": True, "bidirectional": True}),
        ("SelectiveScan", {}),
        ("SelectiveScan", {"inner_norm": "scaled_rms"}),
    ],
)
def test_parameters_convert_between_the_flavours(module: str, options: dict[str, Any]) -> None:
    """The trees are the same, and so is what the modules compute from them."""
    options = {"d_state": 3, **options}
    nnx = getattr(jax_sscan.nnx, module)(D_MODEL, rngs=flax.nnx.Rngs(0), **options)
    linen = getattr(jax_sscan.linen, module)(D_MODEL, **options)
    x = inputs()
    variables = linen.init(jax.random.key(1), x)
    shapes = jax.tree.map(lambda p: (p.shape, p.dtype), variables["params"])
    params = flax.nnx.to_pure_dict(flax.nnx.state(nnx, flax.nnx.Param))
    assert shapes == jax.tree.map(lambda p: (p.shape, p.dtype), params)
    np.testing.assert_array_equal(linen.apply({"params": params}, x), nnx(x))
    flax.nnx.update(nnx, variables["params"])
    np.testing.assert_array_equal(linen.apply(variables, x), nnx(x))


def bare_scan(flavour: str) -> Any:
    """A function of (u, z, cache) that returns outputs and cache, and its parameters."""
    options: dict[str, Any] = {"d_state": 3, "dt_rank": 2}
    graph, state = flax.nnx.split(jax_sscan.nnx.SelectiveScan(D_MODEL, rngs=flax.nnx.Rngs(0), **options))
    params = flax.nnx.to_pure_dict(state)
    linen = jax_sscan.linen.SelectiveScan(D_MODEL, **options)

    @jit
    def call(args: Any, keywords: Any) -> Any:
        if flavour == "linen":
            return linen.apply({"params": params}, *args, **keywords, return_cache=True)
        return flax.nnx.merge(graph, state)(*args, **keywords, return_cache=True)

    return lambda *args, **keywords: call(args, keywords), params


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_bare_selective_scan_against_the_straight_loop(flavour: str) -> None:
    run, params = bare_scan(flavour)
    u, z = inputs(1), inputs(2)
    out, state = run(u, z)
    params["conv_kernel"] = np.zeros((D_MODEL, 1))
    for b in range(BATCH):
        row = block_oracle.Row(params)
        rows = zip(np.asarray(u[b], np.float64), np.asarray(z[b], np.float64), strict=True)
        close(out[b], np.stack([row.model(u, z) for u, z in rows]))
        close(state[b], row.state)


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_bare_selective_scan_in_parts_packed_and_padded(flavour: str) -> None:
    run, _ = bare_scan(flavour)
    u, z = inputs(1), inputs(2)
    whole, end = run(u, z)
    parts, cache, begin = [], jax_sscan.linen.SelectiveScan(D_MODEL, d_state=3).init_cache(BATCH), 0
    for length in (0, 5, 1, 3, 4):
        here = slice(begin, begin + length)
        part, cache = run(u[:, here], z[:, here], cache)
        parts.append(part)
        begin += length
    close(jnp.concatenate(parts, 1), whole)
    close(cache, end)
    # The first row is padded on the left and the second on the right; both begin a second sequence at position 6.
    mask = jnp.array([[False] * 4 + [True] * 9, [True] * 10 + [False] * 3])
    ids = jnp.where(mask, jnp.arange(LENGTH) >= 6, 7).astype(jnp.int32)
    padded = jnp.where(mask[..., None], u, 1e3)
    out, last = run(padded, z, cache, segment_ids=ids, mask=mask)
    for b, (begin, finish) in enumerate(((4, 13), (0, 10))):
        row, first, second = slice(b, b + 1), slice(begin, 6), slice(6, finish)
        close(out[b, first], run(u[row, first], z[row, first], cache[row])[0][0])
        alone, expected = run(u[row, second], z[row, second])
        close(out[b, second], alone[0])
        close(last[b], expected[0])


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_parts_of_a_sequence_give_what_the_whole_gives(flavour: str) -> None:
    """Prefill, one step, several steps, and parts shorter than the convolution, each continuing the cache before."""
    run, params = block(flavour)
    x = inputs()
    whole, end = run(params, x, return_cache=True)
    module = jax_sscan.linen.Mamba(D_MODEL, d_state=3)
    for lengths in ((7, 6), (1, 1, 2, 9), (0, 5, 1, 7)):
        parts, cache, begin = [], module.init_cache(BATCH), 0
        for length in lengths:
            part, cache = run(params, x[:, begin : begin + length], cache, return_cache=True)
            parts.append(part)
            begin += length
        close(jnp.concatenate(parts, 1), whole)
        jax.tree.map(close, cache, end)
    # The cache of one prefill serves several continuations.
    _, cache = run(params, x[:, :5], return_cache=True)
    for other in (2, 3):
        y = jnp.concatenate([x[:, :5], inputs(other)[:, 5:]], 1)
        close(run(params, y[:, 5:], cache), run(params, y)[:, 5:])


def test_segments_are_sequences_of_their_own() -> None:
    run, params = block()
    x = inputs()
    ids = jnp.array([[4] * 5 + [0] * 6 + [4] * 2, [1] * 13], jnp.int32)
    out, cache = run(params, x, segment_ids=ids, return_cache=True)
    for b, pieces in enumerate((((0, 5), (5, 11), (11, 13)), ((0, 13),))):
        for begin, end in pieces:
            alone, last = run(params, x[b : b + 1, begin:end], return_cache=True)
            close(out[b, begin:end], alone[0])
        jax.tree.map(lambda c, a, b=b: close(c[b], a[0]), cache, last)


LEFT = [(4, 13), (0, 13)]
RIGHT = [(0, 8), (0, 2)]
BOTH = [(3, 4), (5, 11)]
NOTHING = [(0, 0), (6, 13)]


@pytest.mark.parametrize("inner_norm", [None, "rms"])
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("real", [LEFT, RIGHT, BOTH, NOTHING], ids=["left", "right", "both", "nothing"])
def test_a_ragged_batch_equals_each_row_alone(real: Any, continued: bool, inner_norm: Any) -> None:
    """Outputs, caches and gradients; padding holds numbers that would be seen if anything read them."""
    run, params = block(inner_norm=inner_norm, compiled=False)
    x = inputs()
    mask = jnp.array([[begin <= t < end for t in range(LENGTH)] for begin, end in real])
    padded = jnp.where(mask[..., None], x, 1e3)
    cache = jit(lambda p, x: run(p, x, return_cache=True)[1])(params, inputs(9)) if continued else None

    def ragged(params: Any, padded: Any) -> Any:
        out, new = run(params, padded, cache, mask=mask, return_cache=True)
        out = jnp.where(mask[..., None], out, 0)
        return jnp.sum(jnp.sin(out)) + sum(jnp.sum(jnp.cos(leaf)) for leaf in new), (out, new)

    def alone(params: Any, x: Any) -> Any:
        loss, results = 0.0, []
        for b, (begin, end) in enumerate(real):
            before = jax.tree.map(lambda c, b=b: c[b : b + 1], cache)
            out, new = run(params, x[b : b + 1, begin:end], before, return_cache=True)
            loss += jnp.sum(jnp.sin(out)) + sum(jnp.sum(jnp.cos(leaf)) for leaf in new)
            results.append((out[0], jax.tree.map(lambda c: c[0], new)))
        return loss, results

    (got_d, got_dx), (got, got_cache) = jit(jax.grad(ragged, (0, 1), has_aux=True))(params, padded)
    (expected_d, expected_dx), expected = jit(jax.grad(alone, (0, 1), has_aux=True))(params, x)
    for b, (begin, end) in enumerate(real):
        close(got[b, begin:end], expected[b][0])
        jax.tree.map(lambda c, e, b=b: close(c[b], e), got_cache, expected[b][1])
    close(got_dx, jnp.where(mask[..., None], expected_dx, 0), 1e-4)
    jax.tree.map(lambda g, e: close(g, e, 1e-4), got_d, expected_d)


@pytest.mark.parametrize(("flavour", "padding_id"), [("nnx", 0), ("nnx", 7), ("nnx", 2), ("linen", 7)])
def test_segments_and_padding_together(flavour: str, padding_id: int) -> None:
    """Whatever ids padding has, segments begin and end at real positions only."""
    run, params = block(flavour)
    x = inputs()
    mask = jnp.array([[False] * 4 + [True] * 9, [True] * 10 + [False] * 3])
    ids = jnp.array([[0] * 4 + [7] * 3 + [2] * 6, [2] * 8 + [7] + [2] + [0] * 3], jnp.int32)
    ids = jnp.where(mask, ids, padding_id)
    cache = run(params, inputs(9), return_cache=True)[1]
    out, new = run(params, x, cache, segment_ids=ids, mask=mask, return_cache=True)
    for b, real in enumerate((slice(4, 13), slice(0, 10))):
        before = jax.tree.map(lambda c, b=b: c[b : b + 1], cache)
        row = slice(b, b + 1)
        alone, last = run(params, x[row, real], before, segment_ids=ids[row, real], return_cache=True)
        close(out[b, real], alone[0])
        jax.tree.map(lambda c, a, b=b: close(c[b], a[0]), new, last)


def test_initial_parameters_are_the_papers() -> None:
    options: dict[str, Any] = {"dt_min": 0.01, "dt_max": 0.05, "dt_scale": 0.5, "out_proj_gain": 0.25, "use_bias": True}
    module = jax_sscan.nnx.Mamba(32, **options, rngs=flax.nnx.Rngs(0))
    dt = jax.nn.softplus(module.dt_bias[...])
    assert 0.01 * (1 - 1e-5) <= dt.min() < 0.013 and 0.04 < dt.max() <= 0.05 * (1 + 1e-5)
    close(-jnp.exp(module.A_log[...]), np.tile(-np.arange(1.0, 17), (64, 1)), 1e-6)
    close(module.D[...], np.ones(64))
    for name in ("in_proj_bias", "z_proj_bias", "out_proj_bias", "conv_bias"):
        assert not getattr(module, name)[...].any(), name
    for name, bound in (
        ("in_proj", 32**-0.5),
        ("z_proj", 32**-0.5),
        ("conv_kernel", 4**-0.5),
        ("x_proj", 64**-0.5),
        ("dt_proj", 0.5 * 2**-0.5),
        ("out_proj", 0.25 * 64**-0.5),
    ):
        largest = float(jnp.abs(getattr(module, name)[...]).max())
        assert 0.9 * bound < largest <= bound * (1 + 1e-6), name
    floored = jax_sscan.nnx.Mamba(32, dt_init_floor=0.5, rngs=flax.nnx.Rngs(0))
    close(jax.nn.softplus(floored.dt_bias[...]), np.full(64, 0.5), 1e-6)


def test_bfloat16_where_it_belongs() -> None:
    """Parameters and activations; not A, D, the step sizes' bias and the state."""
    options = {"param_dtype": jnp.bfloat16, "inner_norm": "scaled_rms"}
    run, params = block(**options)
    kept = {name for name, value in params.items() if value.dtype == jnp.float32}
    assert kept == {"A_log", "D", "dt_bias"}
    x = inputs()
    out, cache = run(params, x.astype(jnp.bfloat16), return_cache=True)
    assert (out.dtype, cache.conv.dtype, cache.state.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    wide, _ = block(inner_norm="scaled_rms")
    expected = wide(jax.tree.map(lambda p: p.astype(jnp.float32), params), x)
    close(out, expected, 0.03)
    half, wide_params = block(dtype=jnp.bfloat16)
    assert half(wide_params, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("mapped", ["x", "params", "both"])
def test_vmap_equals_a_loop(mapped: str) -> None:
    """Of values and gradients, inside and outside: over inputs at axis 1, an ensemble of parameters, and both."""
    run, params = block(compiled=False)
    x = inputs(length=5)
    over_x, over_params = mapped != "params", mapped != "x"
    xs = jnp.stack([x, -x, 2 * x], 1) if over_x else x
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 0.9 * p, 1.1 * p], p.ndim), params) if over_params else params
    axes = jax.tree.map(lambda p: p.ndim if over_params else None, params), 1 if over_x else None

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(run(params, x)))

    each = jax.value_and_grad(loss, (0, 1))
    outside = jax.grad(lambda params, x: jnp.sum(jax.vmap(loss, axes)(params, x)), (0, 1))
    got, summed = jit(lambda params, x: (jax.vmap(each, axes)(params, x), outside(params, x)))(ensemble, xs)
    one = jit(each)
    lanes = [
        one(
            jax.tree.map(lambda p, i=i: p[..., i] if over_params else p, ensemble),
            xs[:, i] if over_x else xs,
        )
        for i in range(3)
    ]
    jax.tree.map(lambda g, *e: close(g, np.stack(e), 1e-4), got, *lanes)
    for total, separate, is_mapped in ((summed[0], got[1][0], over_params), (summed[1], got[1][1], over_x)):
        axis = 1 if separate is got[1][1] else None
        jax.tree.map(
            lambda t, s, m=is_mapped, a=axis: close(t, jnp.moveaxis(s, 0, a or t.ndim - 1) if m else s.sum(0), 1e-4),
            total,
            separate,
        )


def test_forward_mode_and_second_derivatives() -> None:
    """The tangent is that of the gradient, and the Hessian times a vector that of finite differences."""
    run, params = block(compiled=False)
    x = inputs(length=5)
    rng = np.random.default_rng(5)
    v = {name: jnp.asarray(rng.standard_normal(p.shape), p.dtype) for name, p in params.items()}

    def loss(params: Any) -> Any:
        return jnp.sum(jnp.sin(run(params, x)))

    @jit
    def derivatives(params: Any) -> Any:
        value = jax.grad(loss)(params)
        return value, jax.jvp(loss, (params,), (v,))[1], jax.jvp(jax.grad(loss), (params,), (v,))[1]

    gradient, tangent, product = derivatives(params)
    close(tangent, sum(np.vdot(gradient[name], v[name]) for name in v), 1e-4)
    moved = [derivatives({name: params[name] + step * v[name] for name in v})[0] for step in (1e-2, -1e-2)]
    for name in params:
        close(product[name], (moved[0][name] - moved[1][name]) / 2e-2, 2e-2)


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ({}, {}),
        ({"use_bias": True, "inner_norm": "rms"}, {}),
        ({"bidirectional": True}, {}),
        ({}, {"mask": np.ones((BATCH, 64), bool), "segment_ids": np.zeros((BATCH, 64), np.int32)}),
    ],
    ids=["plain", "falcon", "bidirectional", "packed-padded"],
)
def test_nothing_is_transposed_around_the_scan(options: dict[str, Any], keywords: dict[str, Any]) -> None:
    """Of arrays as large as the scan's input, in the compiled forward and backward passes."""
    native = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if not jax_sscan.implementations()[native].available:
        pytest.skip("pure JAX is time-major inside; what matters is what a custom call is fed")
    length, d_model = 64, 24
    module = jax_sscan.nnx.Mamba(d_model, rngs=flax.nnx.Rngs(0), **options)
    graph, state = flax.nnx.split(module)

    def loss(state: Any, x: jax.Array, keywords: Any) -> jax.Array:
        return jnp.sum(jnp.sin(flax.nnx.merge(graph, state)(x, **keywords)))

    x = jnp.ones((BATCH, length, d_model))
    text = str(jax.jit(jax.grad(loss, (0, 1))).lower(state, x, keywords).compile().as_text())
    assert text.count("jax_sscan_forward") and text.count("jax_sscan_backward")
    # XLA's CPU compiler writes a change of layout as a copy too.
    moves = "transpose|copy" if native == "cpu" else "transpose"
    transposes = re.findall(rf"\w+\[([\d,]+)\]\S* (?:{moves})\(.*", text)
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in transposes]
    assert all(size < BATCH * length * d_model for size in sizes), transposes


def test_wrong_arguments_are_named() -> None:
    run, params = block()
    x = inputs()
    for match, call in {
        "d_model = 6": lambda: run(params, x[..., :5]),
        "mask must be bool": lambda: run(params, x, mask=jnp.ones((BATCH, LENGTH))),
        "mask must have shape": lambda: run(params, x, mask=jnp.ones((BATCH, 1), bool)),
        "segment_ids must": lambda: run(params, x, segment_ids=jnp.ones((BATCH, LENGTH))),
        "initial_state must": lambda: run(params, x, MambaCache(jnp.zeros((1, 12, 3)), jnp.zeros((BATCH, 12, 3)))),
        "inner_norm must": lambda: block(inner_norm="layer"),
        "d_conv must": lambda: block(d_conv=0),
    }.items():
        with pytest.raises((ValueError, TypeError), match=match):
            call()


@pytest.mark.parametrize("module", ["nnx", "linen", "models"])
def test_a_missing_flax_says_what_to_install(module: str) -> None:
    printed = run_python(
        "import sys; sys.modules['flax'] = None\n"
        f"try:\n    import jax_sscan.{module}\nexcept ImportError as error:\n    print(error)"
    )
    assert "pip install 'jax-sscan[" in printed
