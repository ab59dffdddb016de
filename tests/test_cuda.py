"""The CUDA kernels as machine code, and what only they promise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MAMBA, Case, make_inputs
from checks import check_case, keywords_of, split, x64

import jax_sscan
from jax_sscan.backends import native

LIBRARY = native.missing("cuda")
needs_library = pytest.mark.skipif(LIBRARY is not None, reason=f"{LIBRARY}")


@needs_library
def test_the_library_has_its_handlers() -> None:
    from jax_sscan import _cuda

    assert set(_cuda.handlers()) == {"forward", "backward"}
    info = _cuda.build_info()
    assert info["compiler"].startswith("nvcc") and info["target"]
    assert jax_sscan.implementations()["cuda"].default_for == ("cuda",)


@needs_library
def test_import_needs_no_driver() -> None:
    """On a machine without a GPU the library loads, and nothing of CUDA is started."""
    code = "import jax_sscan._cuda as m; m.handlers(); assert 'libcuda.so' not in open('/proc/self/maps').read()"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_library
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_lowers_for_cuda_without_a_gpu(layout: str) -> None:
    """One program for both platforms, with the layout read as it is: no transpose anywhere."""
    inputs = {n: jnp.asarray(x) for n, x in make_inputs(Case("lower", layout=layout, **MAMBA)).items()}

    def loss(inputs: dict[str, Any]) -> Any:
        return jnp.sum(jax_sscan.selective_scan(**inputs, delta_softplus=True, layout=layout))

    exported = jax.export.export(
        jax.jit(jax.value_and_grad(loss)),
        platforms=["cpu", "cuda"],
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call("jax_sscan_forward"),
            jax.export.DisabledSafetyCheck.custom_call("jax_sscan_backward"),
        ],
    )(inputs)
    text = exported.mlir_module()
    assert "jax_sscan_forward" in text and "jax_sscan_backward" in text
    assert "stablehlo.transpose" not in text


@needs_library
def test_memory_promises() -> None:
    """At (8, 1536, 2048, 16): saved states at most 4 bytes per element of u, workspace at most 64 MiB."""
    from jax_sscan import _cuda

    batch, dim, length, dstate = 8, 1536, 2048, 16
    sizes = jax_sscan.canonical.Sizes(batch, dim, length, dstate, 1)
    chunk = native.chunk_length(sizes)
    states = batch * (length // chunk - 1) * dim * dstate * 4
    assert states <= 4 * batch * dim * length
    forward, backward = _cuda.workspace_bytes(
        *sizes,
        chunk=chunk,
        instances=1,
        channel_last=True,
        B_varies=True,
        C_varies=True,
        has_segments=False,
        is_complex=False,
        is_double=False,
        has_states=False,
    )
    assert forward == 0 and backward <= 64 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("gate", [False, True])
def test_compiled_memory(gate: bool) -> None:
    """What XLA allots to a gradient step is what the kernels ask for: residuals, workspace, cotangents."""
    batch, dim, length, dstate = 8, 1536, 2048, 16
    u = jax.ShapeDtypeStruct((batch, length, dim), jnp.bfloat16)
    A = jax.ShapeDtypeStruct((dim, dstate), jnp.float32)
    B = jax.ShapeDtypeStruct((batch, length, dstate), jnp.bfloat16)

    arguments = {"u": u, "delta": u, "A": A, "B": B, "C": B} | ({"z": u} if gate else {})

    def loss(arguments: Any) -> Any:
        out = jax_sscan.selective_scan(**arguments, delta_softplus=True, layout="bld")
        return jnp.sum(out.astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss)).lower(arguments).compile()
    elements = batch * dim * length
    out, states, workspace = 2 * elements, 4 * elements, 64 * 2**20
    ungated = out if gate else 0
    # The cotangent of out is a broadcast constant of its size.
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * out + states + ungated + workspace + 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bdl", "bld"])
def test_no_transpose_in_the_compiled_program(layout: str) -> None:
    case = Case("hlo", batch=2, dim=64, length=128, dstate=16, layout=layout, **MAMBA)
    arrays, _ = split(make_inputs(case))

    def loss(arrays: Any) -> Any:
        return jnp.sum(jax_sscan.selective_scan(**arrays, **keywords_of(case)))

    text = jax.jit(jax.grad(loss)).lower(arrays).compile().as_text()
    assert "jax_sscan_backward" in text and " transpose(" not in text


@pytest.mark.gpu
def test_twenty_runs_give_the_same_bits() -> None:
    case = Case("bits", batch=2, dim=200, length=1000, dstate=16, layout="bld", **MAMBA)
    arrays, _ = split(make_inputs(case))

    def loss(arrays: Any) -> Any:
        return jnp.sum(jnp.sin(jax_sscan.selective_scan(**arrays, **keywords_of(case), implementation="cuda")))

    step = jax.jit(jax.value_and_grad(loss))
    first = jax.tree.map(np.asarray, step(arrays))
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, first, jax.tree.map(np.asarray, step(arrays)))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["automatic", "by name"])
def test_float64_runs_in_pure_jax(mode: str) -> None:
    """The kernels compute in float32: float64 goes to "xla", and asking for them by name is an error."""
    inputs = make_inputs(Case("x64", x64=True, **{f"{n}_dtype": "float64" for n in ("u", "delta", "z", "B", "C")}))
    with x64():
        arrays = {n: jnp.asarray(x) for n, x in inputs.items()}
        if mode == "automatic":
            assert jax_sscan.selective_scan(**arrays).dtype == jnp.float64
        else:
            with pytest.raises(ValueError, match="float64"):
                jax_sscan.selective_scan(**arrays, implementation="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "batch, dim, length, reverse",
    [
        (1, 40, 5000, False),
        (2, 24, 3000, True),
        (2, 7, 1030, False),
        (1, 1, 20000, True),
        (1, 640, 2500, False),  # several teams to a block, of which those of the last span have fewer tiles
        (1, 640, 2500, True),
        (1, 2100, 650, True),  # teams alone on a multiprocessor
        (2, 520, 500, False),  # the same with segments, of 40 channels
    ],
)
@pytest.mark.parametrize("segments", [False, True])
def test_spans_agree_with_the_whole(batch: int, dim: int, length: int, reverse: bool, segments: bool) -> None:
    """Small batches are cut along the sequence; pure JAX in float64 knows nothing of that."""
    case = Case(
        "spans", batch=batch, dim=dim, length=length, dstate=16, layout="bld", segments=segments,
        reverse=reverse, initial_state=True, **MAMBA,
    )  # fmt: skip
    arrays, rest = split(make_inputs(case))
    wide = {n: np.asarray(x, np.float64) for n, x in arrays.items()}
    rng = np.random.default_rng(0)
    out_ct, state_ct = rng.standard_normal((batch, length, dim)), rng.standard_normal((batch, dim, 16))

    def loss(arrays: Any, implementation: str) -> Any:
        out, state = jax_sscan.selective_scan(
            **arrays, **rest, **keywords_of(case), return_last_state=True, implementation=implementation
        )
        return jnp.sum(out * out_ct) + jnp.sum(state * state_ct)

    actual = jax.jit(jax.grad(lambda a: loss(a, "cuda")))(arrays)
    with x64(), jax.default_device(jax.devices("cpu")[0]):
        expected = jax.jit(jax.grad(lambda a: loss(a, "xla")))(jax.tree.map(jnp.asarray, wide))
    errors = {}
    for name, gradient in actual.items():
        error = np.linalg.norm(np.asarray(gradient, np.float64) - np.asarray(expected[name]))
        errors[name] = error / np.linalg.norm(np.asarray(expected[name]))
    assert max(errors.values()) <= 1e-5, errors


# Sizes for which the plan (csrc/cuda/plan.cc) takes each of its kernels of 16 states, forward and backward: threads
# that walk, those that are thin, and channels of a lane. None fills its blocks.
BLOCKS = [
    pytest.param(2, 60, 36, False, "96x1", "320x2", id="few channels"),
    pytest.param(2, 2652, 36, False, "96x1", "320x2", id="blocks of 24 channels, two to a multiprocessor"),
    pytest.param(16, 252, 36, False, "128x1", "320x2", id="of 32"),
    pytest.param(42, 252, 36, False, "128x1", "384x2", id="of 32, three to a multiprocessor"),
    pytest.param(3, 1692, 36, False, "160x1", "320x2", id="of 40"),
    pytest.param(6, 1692, 36, False, "160x1", "320x2", id="of 40, two to a multiprocessor"),
    pytest.param(16, 252, 324, False, "128x1 alone", "320x2 in spans", id="of 32, alone on one"),
    pytest.param(3, 1692, 340, False, "128+64x1 alone", "320x2 in spans", id="of 40, alone"),
    pytest.param(3, 1692, 324, False, "128+64x1 alone", "320x2 in spans", id="of 40, alone, an odd number of tiles"),
    pytest.param(2, 2652, 340, False, "128+128x1 alone", "384x2 in spans", id="of 48, alone"),
    pytest.param(16, 252, 324, True, "128x1 alone", "384x2 in spans", id="of 32, alone, segments"),
    pytest.param(3, 1692, 340, True, "128+64x1 alone", "384x2 in spans", id="of 40, alone, segments"),
    pytest.param(2, 2652, 340, True, "128+128x1 alone", "384x2 in spans", id="of 48, alone, segments"),
    pytest.param(70, 188, 36, False, "128x2", "320x2", id="two channels a lane, backward by blocks of 80"),
    pytest.param(70, 190, 34, False, "128x2", "320x2", id="the same, moved by pairs"),
    pytest.param(8, 1532, 36, False, "128x1", "384x2", id="backward by blocks of 96"),
    pytest.param(16, 1020, 36, False, "128x2", "256x2", id="backward by blocks of 128"),
    pytest.param(16, 1022, 34, False, "128x2", "256x2", id="the same, moved by pairs, of 128"),
]


@pytest.fixture(scope="module")
def plan_program(compile_native: Callable[..., Path]) -> Path:
    """tests/native/plan_test.cc, which says how problems are cut up."""
    return compile_native("tests/native/plan_test.cc", "csrc/cuda/plan.cc")


def test_plans_of_drawn_problems(plan_program: Path) -> None:
    """Blocks, spans and pieces cover all, and workspace suffices whatever dtypes and pointers turn out to be."""
    checked = subprocess.run([plan_program], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert int(checked.stdout) > 1000


@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("batch, dim, length, segments, forward, backward", BLOCKS)
def test_the_plan_takes_every_kernel(
    plan_program: Path, batch: int, dim: int, length: int, segments: bool, forward: str, backward: str, layout: str
) -> None:
    """Or the test after this one would not run it."""
    arguments = [str(x) for x in (plan_program, batch, dim, length, layout, int(segments))]
    assert subprocess.check_output(arguments, text=True).splitlines() == [forward, backward]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("batch, dim, length, segments, forward, backward", BLOCKS)
def test_every_shape_of_block(
    batch: int, dim: int, length: int, segments: bool, forward: str, backward: str, layout: str
) -> None:
    del forward, backward
    case = Case(
        "blocks", batch=batch, dim=dim, length=length, dstate=16, layout=layout, segments=segments,
        initial_state=True, last_state=True, **MAMBA,
    )  # fmt: skip
    check_case(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dstate", [16, 40])
@pytest.mark.parametrize("length", [50, 51, 56, 702, 704])
@pytest.mark.parametrize("projections", ["bfloat16", "float32"])
@pytest.mark.parametrize("segments", [False, True])
def test_every_way_of_storing(projections: str, length: int, segments: bool, dstate: int, layout: str) -> None:
    """Dtypes alike or not, sizes odd, even or multiples of 8, with and without segments, one span or several."""
    case = Case(
        "storage", batch=2, dim=200 - length % 8, length=length, dstate=dstate, layout=layout, segments=segments,
        u_dtype="bfloat16", delta_dtype=projections, z_dtype="bfloat16", B_dtype=projections, C_dtype=projections,
        initial_state=True, last_state=True, **MAMBA,
    )  # fmt: skip
    check_case(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("delta_softplus", [False, True])
@pytest.mark.parametrize(("batch", "dim", "length"), [(1, 64, 20_000), (3, 512, 40_000), (1, 2048, 65_536)])
def test_a_long_sequence_is_its_halves(batch: int, dim: int, length: int, delta_softplus: bool) -> None:
    """However a sequence is cut up for the GPU, and whatever workspace that takes."""
    keys = jax.random.split(jax.random.key(length), 5)
    A = -jnp.exp(jax.random.uniform(keys[0], (dim, 16), maxval=2.5))
    A = jnp.sort(A, axis=1)  # the last state forgets last
    u = jax.random.normal(keys[1], (batch, length, dim))
    delta = jax.random.uniform(keys[2], (batch, length, dim), maxval=0.1) - (4.0 if delta_softplus else 0.0)
    B, C = (jax.random.normal(key, (batch, length, 16)) for key in keys[3:])

    def scan(state: Any, part: slice) -> Any:
        return jax_sscan.selective_scan(
            u[:, part], delta[:, part], A, B[:, part], C[:, part], delta_softplus=delta_softplus,
            layout="bld", initial_state=state, return_last_state=True, implementation="cuda",
        )  # fmt: skip

    state = jnp.zeros((batch, dim, 16))
    out, last = scan(state, slice(None))
    first, middle = scan(state, slice(length // 2))
    second, last_of_second = scan(middle, slice(length // 2, None))
    expected = jnp.concatenate([first, second], 1)
    for actual, wanted in ((out, expected), (last, last_of_second)):
        assert float(jnp.linalg.norm(actual - wanted) / jnp.linalg.norm(wanted)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", ["forgets", "forgets in part", "grows"])
def test_long_spans_agree_with_short_ones(state: str, reverse: bool) -> None:
    """Of a long span, the kernel skips what the state has forgotten by its end. Takes 20 GB of GPU memory."""
    length, dim, parts = 2**19, 512, 32
    keys = jax.random.split(jax.random.key(0), 6)
    A = -jnp.exp(jax.random.uniform(keys[0], (dim, 16), maxval=2.5))
    bias = jax.random.uniform(keys[1], (dim,), minval=-3.0, maxval=-1.0)
    if state == "forgets in part":  # no block may stop for the others
        bias = bias.at[::48].add(-9.0)
    if state == "grows":
        A = A.at[-1, 3].set(1e-6)
    u, delta = (jax.random.normal(key, (1, length, dim)) for key in keys[2:4])
    B, C = (jax.random.normal(key, (1, length, 16)) for key in keys[4:])

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, bias: Any, state: Any) -> Any:
        return jax_sscan.selective_scan(
            u, delta, A, B, C, None, None, bias, True,
            layout="bld", reverse=reverse, initial_state=state, return_last_state=True, implementation="cuda",
        )  # fmt: skip

    def whole(u: Any, delta: Any, A: Any, B: Any, C: Any, bias: Any) -> Any:
        return scan(u, delta, A, B, C, bias, jnp.zeros((1, dim, 16)))

    def in_parts(u: Any, delta: Any, A: Any, B: Any, C: Any, bias: Any) -> Any:
        def step(state: Any, xs: Any) -> Any:
            u, delta, B, C = xs
            return scan(u, delta, A, B, C, bias, state)[::-1]

        cut = [x.reshape(parts, 1, length // parts, -1) for x in (u, delta, B, C)]
        state, out = jax.lax.scan(step, jnp.zeros((1, dim, 16)), cut, reverse=reverse)
        return out.reshape(1, length, dim), state

    @partial(jax.jit, static_argnums=0)
    def with_gradients(function: Any, *args: Any) -> Any:
        results, pullback = jax.vjp(function, *args)
        return results, pullback((jnp.cos(args[0]), jnp.cos(args[2])[None]))

    args = u, delta, A, B, C, bias
    errors = jax.tree.map(
        lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)),
        with_gradients(whole, *args),
        with_gradients(in_parts, *args),
    )
    # What never decays adds up half a million roundings.
    assert max(jax.tree.leaves(errors)) <= (1e-3 if state == "grows" else 1e-5), errors


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bdl", "bld"])
@pytest.mark.parametrize("dstate", [66, 128, 130, 256, 1024])
def test_many_states(dstate: int, layout: str) -> None:
    """States that are taken in turn, up to the most that shared memory holds."""
    check_case(Case("states", batch=2, dim=10, length=40, dstate=dstate, layout=layout, **MAMBA), "cuda")
