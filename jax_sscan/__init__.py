"""Mamba's selective scan (S6, arXiv 2312.00752) as a first-class JAX operation."""

from importlib.metadata import PackageNotFoundError, version

from jax_sscan.backends import Implementation, implementations
from jax_sscan.compat import selective_scan_fn
from jax_sscan.conv import causal_conv1d, causal_conv1d_update
from jax_sscan.decode import selective_state_update
from jax_sscan.scan import (
    RESIDUAL_NAMES,
    ScanForward,
    ScanGradients,
    selective_scan,
    selective_scan_backward,
    selective_scan_forward,
)

try:
    __version__ = version("jax-sscan")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "RESIDUAL_NAMES",
    "Implementation",
    "ScanForward",
    "ScanGradients",
    "__version__",
    "causal_conv1d",
    "causal_conv1d_update",
    "implementations",
    "selective_scan",
    "selective_scan_backward",
    "selective_scan_fn",
    "selective_scan_forward",
    "selective_state_update",
]
