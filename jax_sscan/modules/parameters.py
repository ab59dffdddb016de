"""What a parameter is before it has a value, and the two operations that every layer is made of."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_sscan.modules.sharding import MeshAxes, total

Initializer = Callable[..., jax.Array]
Params = Mapping[str, jax.Array]


class Parameter(NamedTuple):
    """One row of a layer's parameter table.

    Attributes:
        shape: its shape.
        axes: the name of each axis ("d_model", "d_inner", "d_state", "d_conv", "dt_rank", "ssm", "vocab"), which a
            `jax_sscan.modules.sharding.Shard` maps to axes of a mesh.
        initializer: ``initializer(key, shape, dtype)``.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: Initializer
    dtype: Any


def uniform_fan_in(gain: float = 1.0, in_axis: int = -2, out_axis: int = -1) -> Initializer:
    """Uniform in ±gain / sqrt(fan_in), as the paper's code initialises its projections."""
    return jax.nn.initializers.variance_scaling(gain**2 / 3, "fan_in", "uniform", in_axis=in_axis, out_axis=out_axis)


def wide(param_dtype: Any) -> Any:
    """The dtype of parameters that enter an exponential or a sum over the whole sequence: float32 at least.

    An error of A or of the step size is raised to the power of the sequence's length, and bfloat16 would round the
    updates of A_log and of the step sizes' bias, which are tiny beside their values, to nothing.
    """
    return jnp.promote_types(param_dtype, jnp.float32)


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: Any, divided: MeshAxes = None) -> jax.Array:
    """``x @ kernel + bias`` on the last axis, in dtype; ``divided`` are the mesh axes that divide that axis of x.

    A plain matrix product of all positions: contracted over two axes, batch and length, for the kernel's gradient, XLA
    would transpose both factors first.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    out = total(jnp.dot(rows, kernel.astype(dtype)), divided).reshape(*x.shape[:-1], kernel.shape[-1])
    return out if bias is None else out + bias.astype(dtype)


def rms_norm(x: jax.Array, scale: jax.Array | None, eps: float, dtype: Any) -> jax.Array:
    """Scales the last axis to a mean square of 1, computed in float32 or wider; the result is of dtype."""
    x = x.astype(wide(x.dtype))
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x if scale is None else x * scale).astype(dtype)
