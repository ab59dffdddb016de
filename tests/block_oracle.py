"""One row through a Mamba block, position by position, in float64 NumPy: what the modules are held to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def unit_mean_square(x: np.ndarray, scale: Any) -> np.ndarray:
    x = x / np.sqrt(np.mean(x**2) + 1e-6)
    return x if scale is None else x * scale


class Row:
    """A row's past, and the block that reads its next position."""

    def __init__(self, params: Mapping[str, Any], inner_norm: bool = False, prefix: str = ""):
        self.p = {name: np.asarray(value, np.float64) for name, value in params.items()}
        for name in ("conv_kernel", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D"):
            if prefix + name in self.p:
                self.p[name] = self.p[prefix + name]
        self.inner_norm = inner_norm
        self.restart()

    def restart(self) -> None:
        d_inner, width = self.p["conv_kernel"].shape
        self.window = np.zeros((d_inner, width - 1))
        self.state = np.zeros(self.p["A_log"].shape)

    def scan(self, x: np.ndarray) -> np.ndarray:
        """Of one position (d_model,), what goes into the projection out."""
        p = self.p
        u = x @ p["in_proj"] + p.get("in_proj_bias", 0)
        z = x @ p["z_proj"] + p.get("z_proj_bias", 0)
        taps = np.concatenate([self.window, u[:, None]], axis=1)
        self.window = taps[:, 1:]
        return self.model(silu((taps * p["conv_kernel"]).sum(1) + p.get("conv_bias", 0)), z)

    def model(self, u: np.ndarray, z: np.ndarray | None) -> np.ndarray:
        p, (rank, n) = self.p, (self.p["dt_proj"].shape[0], self.p["A_log"].shape[1])
        dt, B, C = np.split(u @ p["x_proj"], [rank, rank + n])
        if self.inner_norm:
            dt, B, C = (unit_mean_square(v, p.get(k)) for v, k in ((dt, "dt_norm"), (B, "B_norm"), (C, "C_norm")))
        delta = np.log1p(np.exp(dt @ p["dt_proj"] + p["dt_bias"]))
        self.state = np.exp(-delta[:, None] * np.exp(p["A_log"])) * self.state + (delta * u)[:, None] * B
        y = self.state @ C + p["D"] * u
        return y if z is None else y * silu(z)

    def read(self, x: np.ndarray) -> np.ndarray:
        """(length, d_model) -> (length, d_model)."""
        y = np.stack([self.scan(step) for step in np.asarray(x, np.float64)])
        return y @ self.p["out_proj"] + self.p.get("out_proj_bias", 0)
