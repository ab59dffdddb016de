"""What the README and docs/models.md show runs as printed."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def run_blocks(path: Path, at_least: int) -> dict[str, Any]:
    """The names that the page's Python blocks, one after the other, leave behind."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert len(blocks) >= at_least
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks), str(path), "exec"), names)
    return names


def test_readme_code_runs_and_means_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_blocks(ROOT / "README.md", 2)
    whole = names["selective_scan"](
        *(names[n] for n in ("u", "delta", "A", "B", "C")), delta_softplus=True, layout="bld"
    )
    in_parts = jnp.concatenate([names["first"], names["rest"]], axis=1)

    def agree(got: jax.Array, expected: jax.Array) -> None:
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))

    agree(in_parts, whole)
    # The first of the three layers has the weights of the gated torch call below it.
    agree(names["outs"][0], names["out_z"].swapaxes(1, 2))


def test_models_page_runs_and_means_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_blocks(ROOT / "docs/models.md", 8)

    def agree(got: jax.Array, expected: jax.Array) -> None:
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))

    y, x = names["y"], names["x"]
    agree(jnp.concatenate([names["first"], names["step"], names["rest"]], axis=1), y)
    agree(names["ragged"][1, :40], y[1, :40])
    agree(names["packed"][:, :50], y[:, :50])
    agree(names["same"], y)
    agree(names["layer"](x), names["linen_layer"].apply(names["variables"], x))
    assert names["losses"][-1] < 0.8 * names["losses"][0]
    np.testing.assert_allclose(names["loaded"](names["text"][None]), names["model"](names["text"][None]), atol=0.1)
    assert names["greedy"].shape == names["drawn"].shape == (2, 30)
    assert (names["greedy"][:, :10] == names["prompts"]).all()
