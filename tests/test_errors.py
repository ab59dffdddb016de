"""Every wrong call is refused with a message that names the argument, what was expected and what
came.

TypeError for dtypes and for what is no array, ValueError for shapes, ranks, names and
implementations. Nothing is cast, broadcast or truncated to make a wrong call work.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sscan


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return jnp.zeros(shape, dtype)


# batch 2, dim 6, length 5, dstate 3: no two sizes alike, so that a message shows which it means.
VALID: dict[str, Any] = {
    "u": zeros(2, 6, 5),
    "delta": zeros(2, 6, 5),
    "A": zeros(6, 3),
    "B": zeros(2, 3, 5),
    "C": zeros(2, 3, 5),
    "D": zeros(6),
    "z": zeros(2, 6, 5),
    "delta_bias": zeros(6),
    "initial_state": zeros(2, 6, 3),
    "segment_ids": zeros(2, 5, dtype=np.int32),
}
VALID_BLD = {
    **VALID,
    **{"u": zeros(2, 5, 6), "delta": zeros(2, 5, 6), "z": zeros(2, 5, 6), "B": zeros(2, 5, 3)},
    "C": zeros(2, 5, 3),
}
C64 = np.complex64


def shape_pattern(*shape: int) -> str:
    return r"\(" + r",\s*".join(map(str, shape)) + r",?\)"


def refused(error: type[Exception], function: Any, arguments: dict[str, Any], *patterns: str) -> None:
    """The call raises exactly this type, and its message says it all."""
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error, caught.type
    message = str(caught.value)
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} not in {message!r}"


SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("u", (6, 5)),
    ("u", (2, 6, 5, 1)),
    ("delta", (2, 6, 4)),
    ("delta", (2, 1, 5)),
    ("delta", (6, 5)),
    ("A", (6,)),
    ("A", (5, 3)),
    ("A", (1, 3)),
    ("A", (3, 6)),
    ("A", (6, 0)),
    ("B", (6, 4)),
    ("B", (1, 3)),
    ("B", (2, 3, 4)),
    ("B", (1, 3, 5)),
    ("B", (2, 4, 5)),
    ("B", (2, 5, 3)),
    ("B", (3,)),
    ("B", (2, 1, 1, 3, 5)),
    ("B", (2, 2, 3, 6)),
    ("B", (2, 4, 3, 5)),  # 4 groups do not divide dim 6
    ("B", (2, 12, 3, 5)),
    ("C", (6, 2)),
    ("C", (2, 3, 10)),  # interleaved needs a complex A
    ("C", (2, 2, 4, 5)),
    ("C", (2, 4, 3, 5)),
    ("D", (5,)),
    ("D", (1,)),
    ("D", (6, 1)),
    ("D", ()),
    ("z", (2, 5, 6)),
    ("z", (1, 6, 5)),
    ("delta_bias", (3,)),
    ("delta_bias", (2, 6)),
    ("initial_state", (2, 6, 4)),
    ("initial_state", (6, 3)),
    ("initial_state", (1, 6, 3)),
    ("segment_ids", (5,)),
    ("segment_ids", (2, 6)),
    ("segment_ids", (2, 5, 1)),
]


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=lambda x: str(x).replace(" ", ""))
def test_wrong_shape(name: str, shape: tuple[int, ...]) -> None:
    """The message names the argument and shows the shape that came."""
    wrong = {**VALID, name: jnp.zeros(shape, VALID[name].dtype)}
    named = rf"\b{name}\b"
    if name == "u" and len(shape) == 3:
        named = r"\b(u|delta)\b"
    refused(ValueError, jax_sscan.selective_scan, wrong, named, shape_pattern(*shape))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("u", (2, 5)),
        ("delta", (2, 6, 5)),
        ("B", (2, 3, 5)),
        ("B", (2, 5, 4, 3)),
        ("C", (2, 10, 3)),
        ("z", (2, 6, 5)),
        ("segment_ids", (2, 6)),
    ],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_wrong_shape_in_the_other_layout(name: str, shape: tuple[int, ...]) -> None:
    """The same shapes mean other things in "bld"."""
    wrong = {**VALID_BLD, name: jnp.zeros(shape, VALID[name].dtype), "layout": "bld"}
    refused(ValueError, jax_sscan.selective_scan, wrong, rf"\b{name}\b", shape_pattern(*shape))


def test_valid_calls_pass() -> None:
    """The baseline of this file is right, so each refusal is due to its one change."""
    assert jax_sscan.selective_scan(**VALID).shape == (2, 6, 5)
    assert jax_sscan.selective_scan(**VALID_BLD, layout="bld").shape == (2, 5, 6)


def test_groups_message_says_what_must_divide_what() -> None:
    wrong = {**VALID, "B": zeros(2, 4, 3, 5)}
    refused(ValueError, jax_sscan.selective_scan, wrong, r"\bB\b", "group", r"\b4\b", r"\b6\b")


@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (2, 1, 3, 5), (2, 3, 5)], ids=str)
def test_different_groups(shape: tuple[int, ...]) -> None:
    """Nobody means B in 2 groups beside C in 3, or in 1: both are named, with their counts."""
    wrong = {**VALID, "B": zeros(2, 2, 3, 5), "C": zeros(*shape)}
    groups = shape[1] if len(shape) == 4 else 1
    refused(ValueError, jax_sscan.selective_scan, wrong, r"\bB\b", r"\bC\b", r"\b2\b", rf"\b{groups}\b")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("u", np.int32),
        ("u", np.bool_),
        ("u", C64),
        ("delta", np.int32),
        ("delta", C64),
        ("A", np.int32),
        ("A", np.float16),
        ("A", jnp.bfloat16),
        ("B", np.int32),
        ("B", C64),  # A is real
        ("C", C64),
        ("C", np.int8),
        ("D", np.int32),
        ("D", C64),
        ("z", np.int32),
        ("z", C64),
        ("delta_bias", np.int32),
        ("delta_bias", C64),
        ("initial_state", np.int32),
        ("initial_state", C64),
        ("initial_state", np.float16),
        ("segment_ids", np.float32),
        ("segment_ids", np.bool_),
    ],
    ids=lambda x: x if isinstance(x, str) else np.dtype(x).name,
)
def test_wrong_dtype(name: str, dtype: Any) -> None:
    """The message names the argument and the dtype that came."""
    wrong = {**VALID, name: VALID[name].astype(dtype)}
    refused(TypeError, jax_sscan.selective_scan, wrong, rf"\b{name}\b", rf"\b{jnp.dtype(dtype).name}\b")


COMPLEX = {
    **VALID,
    "A": zeros(6, 3, dtype=C64),
    "B": zeros(2, 3, 5, dtype=C64),
    "C": zeros(2, 3, 5, dtype=C64),
    "initial_state": zeros(2, 6, 3, dtype=C64),
}


def test_complex_a_takes_complex_projections_and_state() -> None:
    assert jax_sscan.selective_scan(**COMPLEX).shape == (2, 6, 5)
    refused(
        TypeError, jax_sscan.selective_scan, {**COMPLEX, "initial_state": zeros(2, 6, 3)},
        r"\binitial_state\b", "float32", "complex64",
    )  # fmt: skip
    refused(
        TypeError, jax_sscan.selective_scan, {**COMPLEX, "B": zeros(6, 3)},
        r"\bB\b", "float32", "complex64",
    )  # fmt: skip


def test_real_projection_of_a_complex_scan_must_be_interleaved() -> None:
    """(2, 3, 5) real beside a complex A is neither complex nor of length 10."""
    wrong = {**COMPLEX, "C": zeros(2, 3, 5)}
    with pytest.raises((TypeError, ValueError)) as caught:
        jax_sscan.selective_scan(**wrong)
    assert re.search(r"\bC\b", str(caught.value))
    assert re.search(r"\b10\b|float32", str(caught.value))


@pytest.mark.parametrize("name", list(VALID))
@pytest.mark.parametrize("value", ["a string", [[1.0, 2.0]], 3.0], ids=["str", "list", "float"])
def test_what_is_no_array(name: str, value: Any) -> None:
    wrong = {**VALID, name: value}
    refused(TypeError, jax_sscan.selective_scan, wrong, rf"\b{name}\b", rf"\b{type(value).__name__}\b")


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C"])
def test_none_where_an_array_is_needed(name: str) -> None:
    refused(TypeError, jax_sscan.selective_scan, {**VALID, name: None}, rf"\b{name}\b", r"None")


@pytest.mark.parametrize("layout", ["BDL", "bhl", "", None, 3])
def test_wrong_layout(layout: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        jax_sscan.selective_scan(**VALID, layout=layout)
    message = str(caught.value)
    assert "layout" in message and repr(layout) in message
    assert "bdl" in message and "bld" in message


@pytest.mark.parametrize("out_dtype", [np.int32, np.complex64, np.bool_])
def test_wrong_out_dtype(out_dtype: Any) -> None:
    refused(
        TypeError, jax_sscan.selective_scan, {**VALID, "out_dtype": out_dtype},
        "out_dtype", np.dtype(out_dtype).name,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["numpy", "CUDA", "", "gpu"])
def test_unknown_implementation(name: str) -> None:
    """The message lists the names that exist."""
    refused(
        ValueError, jax_sscan.selective_scan, {**VALID, "implementation": name},
        "implementation", re.escape(repr(name)), "cuda", "cpu", "xla",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_missing_implementation(name: str) -> None:
    """Asked for by name, a missing one is an error that says why and what to do; never a
    fallback."""
    info = jax_sscan.implementations()[name]
    if info.available:
        pytest.skip(f"{name} is here")
    assert info.reason
    refused(
        ValueError, jax_sscan.selective_scan, {**VALID, "implementation": name},
        name, re.escape(info.reason), r"(?i)install|build",
    )  # fmt: skip


def test_errors_come_at_trace_time() -> None:
    """Under jit, vmap and grad the message speaks of the same argument."""
    wrong = {**VALID, "D": zeros(5)}

    def f(u: Any) -> Any:
        return jnp.sum(jax_sscan.selective_scan(**{**wrong, "u": u}))

    for transformed in (jax.jit(f), jax.grad(f)):
        with pytest.raises(ValueError, match=r"\bD\b.*\(5,\)|\(5,\).*\bD\b"):
            transformed(VALID["u"])


def test_segment_ids_of_another_integer_type_are_not_cast() -> None:
    """int32 it says; anything else is named, not cast."""
    wrong = {**VALID, "segment_ids": VALID["segment_ids"].astype(np.int16)}
    refused(TypeError, jax_sscan.selective_scan, wrong, r"\bsegment_ids\b", "int16", "int32")


@pytest.mark.parametrize(
    ("change", "error", "patterns"),
    [
        ({"x": zeros(2, 6)}, ValueError, [r"\bx\b", r"\(2, 6\)"]),
        ({"x": zeros(2, 6, 5, dtype=np.int32)}, TypeError, [r"\bx\b", "int32"]),
        ({"weight": zeros(5, 4)}, ValueError, [r"\bweight\b", r"\(5, 4\)"]),
        ({"weight": zeros(6)}, ValueError, [r"\bweight\b", r"\(6,\)"]),
        ({"weight": zeros(6, 0)}, ValueError, [r"\bweight\b", r"\(6, 0\)"]),
        ({"weight": zeros(6, 4, dtype=np.int32)}, TypeError, [r"\bweight\b", "int32"]),
        ({"bias": zeros(4)}, ValueError, [r"\bbias\b", r"\(4,\)"]),
        ({"bias": zeros(6, dtype=np.int32)}, TypeError, [r"\bbias\b", "int32"]),
        ({"initial_state": zeros(2, 6, 4)}, ValueError, ["initial_state", r"\(2, 6, 4\)"]),
        ({"initial_state": zeros(2, 6, 3, dtype=C64)}, TypeError, ["initial_state", "complex64"]),
        ({"segment_ids": zeros(2, 6, dtype=np.int32)}, ValueError, ["segment_ids", r"\(2, 6\)"]),
        ({"segment_ids": zeros(2, 5)}, TypeError, ["segment_ids", "float32"]),
        ({"activation": "gelu"}, ValueError, ["activation", "'gelu'", "silu"]),
        ({"layout": "ldb"}, ValueError, ["layout", "'ldb'", "bdl", "bld"]),
        ({"x": "text"}, TypeError, [r"\bx\b", "str"]),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_conv(change: dict[str, Any], error: type[Exception], patterns: list[str]) -> None:
    valid = {
        "x": zeros(2, 6, 5),
        "weight": zeros(6, 4),
        "bias": zeros(6),
        "initial_state": zeros(2, 6, 3),
        "segment_ids": zeros(2, 5, dtype=np.int32),
    }
    assert jax_sscan.causal_conv1d(**valid).shape == (2, 6, 5)
    refused(error, jax_sscan.causal_conv1d, {**valid, **change}, *patterns)


@pytest.mark.parametrize(
    ("change", "error", "patterns"),
    [
        ({"x": zeros(2, 6, 5)}, ValueError, [r"\bx\b", r"\(2, 6, 5\)"]),
        ({"x": zeros(2, 6, dtype=np.int32)}, TypeError, [r"\bx\b", "int32"]),
        ({"state": zeros(2, 6, 4)}, ValueError, [r"\bstate\b", r"\(2, 6, 4\)"]),
        ({"weight": zeros(4, 6)}, ValueError, [r"\bweight\b", r"\(4, 6\)"]),
        ({"bias": zeros(1)}, ValueError, [r"\bbias\b", r"\(1,\)"]),
        ({"activation": "relu"}, ValueError, ["activation", "'relu'"]),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_conv_update(change: dict[str, Any], error: type[Exception], patterns: list[str]) -> None:
    valid = {"x": zeros(2, 6), "state": zeros(2, 6, 3), "weight": zeros(6, 4), "bias": zeros(6)}
    assert jax_sscan.causal_conv1d_update(**valid)[0].shape == (2, 6)
    refused(error, jax_sscan.causal_conv1d_update, {**valid, **change}, *patterns)


@pytest.mark.parametrize(
    ("change", "error", "patterns"),
    [
        ({"state": zeros(2, 6, 4)}, ValueError, [r"\bstate\b", r"\(2, 6, 4\)"]),
        ({"state": zeros(2, 6, 3, dtype=C64)}, TypeError, [r"\bstate\b", "complex64"]),
        ({"x": zeros(2, 6, 1)}, ValueError, [r"\bx\b", r"\(2, 6, 1\)"]),
        ({"x": zeros(2, 6, dtype=np.int32)}, TypeError, [r"\bx\b", "int32"]),
        ({"dt": zeros(2, 1)}, ValueError, [r"\bdt\b", r"\(2, 1\)"]),
        ({"A": zeros(6)}, ValueError, [r"\bA\b", r"\(6,\)"]),
        ({"A": zeros(5, 3)}, ValueError, [r"\bA\b", r"\(5, 3\)"]),
        ({"B": zeros(2, 4)}, ValueError, [r"\bB\b", r"\(2, 4\)"]),
        ({"B": zeros(2, 4, 3)}, ValueError, [r"\bB\b", r"\(2, 4, 3\)"]),
        ({"C": zeros(1, 3)}, ValueError, [r"\bC\b", r"\(1, 3\)"]),
        ({"C": zeros(2, 3, dtype=C64)}, TypeError, [r"\bC\b", "complex64"]),
        ({"D": zeros(6, 3)}, ValueError, [r"\bD\b", r"\(6, 3\)"]),
        ({"z": zeros(6)}, ValueError, [r"\bz\b", r"\(6,\)"]),
        ({"dt_bias": zeros(2)}, ValueError, [r"\bdt_bias\b", r"\(2,\)"]),
        ({"x": 3.0}, TypeError, [r"\bx\b", "float"]),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_state_update(change: dict[str, Any], error: type[Exception], patterns: list[str]) -> None:
    valid = {
        "state": zeros(2, 6, 3),
        "x": zeros(2, 6),
        "dt": zeros(2, 6),
        "A": zeros(6, 3),
        "B": zeros(2, 3),
        "C": zeros(2, 2, 3),
        "D": zeros(6),
        "z": zeros(2, 6),
        "dt_bias": zeros(6),
    }
    assert jax_sscan.selective_state_update(**valid)[0].shape == (2, 6)
    refused(error, jax_sscan.selective_state_update, {**valid, **change}, *patterns)
