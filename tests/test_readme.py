"""What the README shows runs as printed."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

README = Path(__file__).parents[1] / "README.md"


def test_readme_code_runs_and_means_what_it_says() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    exec(compile("\n".join(blocks), str(README), "exec"), names)
    whole = names["selective_scan"](
        *(names[n] for n in ("u", "delta", "A", "B", "C")), delta_softplus=True, layout="bld"
    )
    in_parts = jnp.concatenate([names["first"], names["rest"]], axis=1)
    np.testing.assert_allclose(in_parts, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(names["outs"][0], names["out"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(names["out_z"].swapaxes(1, 2), names["out"], rtol=1e-5, atol=1e-5)
