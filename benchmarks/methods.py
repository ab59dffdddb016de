"""The methods that are compared: all of jax_sscan's that run here, and what JAX users write without it.

Every method is a function of the same operands in layout "bld", with softplus, D, bias and gate, in float32.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jax_sscan

Method = Callable[..., Any]
Shape = tuple[int, int, int, int]  # batch, dim, length, dstate


def operands(shape: Shape, seed: int = 0) -> tuple[jax.Array, ...]:
    """Random u, delta, A, B, C, D, z and delta_bias of realistic size."""
    batch, dim, length, dstate = shape
    k = jax.random.split(jax.random.key(seed), 8)
    return (
        jax.random.normal(k[0], (batch, length, dim)),
        jax.random.normal(k[1], (batch, length, dim)) - 1,
        -jnp.exp(jax.random.uniform(k[2], (dim, dstate), maxval=2.5)),
        jax.random.normal(k[3], (batch, length, dstate)),
        jax.random.normal(k[4], (batch, length, dstate)),
        jax.random.normal(k[5], (dim,)),
        jax.random.normal(k[6], (batch, length, dim)),
        jax.random.uniform(k[7], (dim,), minval=-4.0, maxval=-2.0),
    )


def _gated(y: jax.Array, u: jax.Array, D: jax.Array, z: jax.Array) -> jax.Array:
    return (y + D * u) * jax.nn.silu(z)


def associative_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any) -> jax.Array:
    """`jax.lax.associative_scan` over the whole sequence at once."""
    delta = jax.nn.softplus(delta + delta_bias)
    decay = jnp.exp(delta[..., None] * A)
    source = (delta * u)[..., None] * B[:, :, None, :]

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    states = jax.lax.associative_scan(combine, (decay, source), axis=1)[1]
    return _gated(jnp.sum(states * C[:, :, None, :], -1), u, D, z)


def lax_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any) -> jax.Array:
    """`jax.lax.scan`, one step at a time."""
    delta = jax.nn.softplus(delta + delta_bias)

    def step(state: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        u, delta, B, C = inputs
        state = jnp.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None]
        return state, jnp.sum(state * C[:, None], -1)

    time_major = [jnp.swapaxes(x, 0, 1) for x in (u, delta, B, C)]
    state = jnp.zeros((u.shape[0], *A.shape), u.dtype)
    _, y = jax.lax.scan(step, state, tuple(time_major))
    return _gated(jnp.swapaxes(y, 0, 1), u, D, z)


def cumulative_sum(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any) -> jax.Array:
    """Cumulative sums of the inputs divided by the cumulative decay, as one-file versions do it.

    In chunks of 16 steps, since the division overflows float32 where delta A sums up to more than 88.
    """
    delta = jax.nn.softplus(delta + delta_bias)
    chunk = min(16, u.shape[1])

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def step(state: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        u, delta, B, C = inputs
        total = jnp.cumsum(delta[..., None] * A, axis=1)
        source = jnp.cumsum((delta * u)[..., None] * B[:, :, None, :] * jnp.exp(-total), axis=1)
        states = jnp.exp(total) * (state[:, None] + source)
        return states[:, -1], jnp.sum(states * C[:, :, None, :], -1)

    state = jnp.zeros((u.shape[0], *A.shape), u.dtype)
    _, y = jax.lax.scan(step, state, tuple(split(x) for x in (u, delta, B, C)))
    return _gated(jnp.moveaxis(y, 0, 1).reshape(u.shape), u, D, z)


def torch_loop(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any) -> Any:
    """The loop over steps that torch users have without a GPU; takes and returns torch tensors."""
    import torch  # pyright: ignore[reportMissingImports]

    delta = torch.nn.functional.softplus(delta + delta_bias)
    decay = torch.exp(delta[..., None] * A)
    source = (delta * u)[..., None] * B[:, :, None, :]
    state = torch.zeros(u.shape[0], *A.shape)
    y = []
    for t in range(u.shape[1]):
        state = decay[:, t] * state + source[:, t]
        y.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    return (torch.stack(y, dim=1) + D * u) * torch.nn.functional.silu(z)


def methods() -> dict[str, Method]:
    """All methods that run on this machine, by name."""
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    ours: dict[str, Method] = {
        name: partial(jax_sscan.selective_scan, delta_softplus=True, layout="bld", implementation=name)
        for name, info in jax_sscan.implementations().items()
        if info.available and platform in info.platforms
    }
    ours["lax.scan"] = lax_scan
    ours["associative_scan"] = associative_scan
    ours["cumulative_sum"] = cumulative_sum
    if importlib.util.find_spec("torch") is not None and platform == "cpu":
        ours["torch loop"] = torch_loop
    return ours
