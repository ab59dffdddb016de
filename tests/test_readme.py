"""What the README shows runs as printed."""

import re
from pathlib import Path

import jax
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

    def agree(got: jax.Array, expected: jax.Array) -> None:
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * float(jnp.abs(expected).max()))

    agree(in_parts, whole)
    # The first of the three layers has the weights of the gated torch call below it.
    agree(names["outs"][0], names["out_z"].swapaxes(1, 2))
