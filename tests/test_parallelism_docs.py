"""What docs/parallelism.md shows runs as printed, and divided work gives what one device does."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jax_sscan

PAGE = Path(__file__).parents[1] / "docs/parallelism.md"


@pytest.mark.skipif(jax.device_count() < 8, reason="the page wants eight devices of the default kind")
def test_the_page_runs_and_means_what_it_says() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names: dict = {}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    u, delta, A, B, C, weight = (np.asarray(names[name]) for name in ("u", "delta", "A", "B", "C", "weight"))
    x = jax_sscan.causal_conv1d(u, weight, activation="silu", layout="bld")
    _, last_state = jax_sscan.selective_scan(
        x, delta, A, B, C, delta_softplus=True, layout="bld", return_last_state=True
    )
    np.testing.assert_allclose(names["last_state"], last_state, rtol=1e-4, atol=1e-4)
    whole = jax.grad(names["loss"], argnums=(0, 1, 2, 3, 4, 5))(u, delta, A, B, C, weight)
    for got, wanted in zip(names["gradients"], whole, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(names["same"], names["losses"], rtol=1e-5)
    one_device = dataclasses.replace(names["config"], shard=names["Shard"]())
    alone = names["train"](jax.make_mesh((1,), ("x",)), one_device)
    np.testing.assert_allclose(names["losses"], alone, rtol=1e-5)
