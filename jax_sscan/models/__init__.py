"""Whole models: a Mamba language model, generation, and checkpoints in the formats that exist.

Walked through in docs/models.md.
"""

try:
    import flax as _flax  # noqa: F401
    import safetensors as _safetensors  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"jax_sscan.models needs {error.name}; install it with: pip install 'jax-sscan[models]'"
    ) from error

from jax_sscan.models.checkpoints import load_pretrained, save_pretrained
from jax_sscan.models.config import MambaConfig
from jax_sscan.models.generation import generate, sample, score
from jax_sscan.models.language_model import Block, MambaLM
from jax_sscan.modules.sharding import Shard

__all__ = [
    "Block",
    "MambaConfig",
    "MambaLM",
    "Shard",
    "generate",
    "load_pretrained",
    "sample",
    "save_pretrained",
    "score",
]
