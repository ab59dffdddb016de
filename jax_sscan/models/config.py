"""The configuration of a Mamba language model."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_sscan import checks
from jax_sscan.modules.mamba import MambaOptions
from jax_sscan.modules.ssm import check_size
from jax_sscan.scan import RESIDUAL_NAMES

Remat = Literal["full", "keep_scans"] | Callable[..., Any] | None


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MambaConfig(MambaOptions):
    """The options of a language model, beside those of its Mamba blocks (`MambaOptions`).

    Attributes:
        vocab_size: tokens, the rows of the embedding.
        num_layers: Mamba blocks.
        norm_eps: epsilon of the RMS norms in front of the blocks and of the head.
        residual_f32: whether the residual stream is float32 where the computation is narrower.
        tie_embeddings: whether the head's weights are those of the embedding.
        rescale_residual: whether the blocks' projections out are initialised 1 / sqrt(num_layers) as large.
        scan_layers: whether the layers are one `jax.lax.scan` over stacked parameters: one layer to compile, instead
            of num_layers of them. Decoding is faster without: the loop copies each layer's parameters out of the stack.
        remat: what a layer computes a second time in the backward pass, to save memory: None for nothing, "full" for
            everything, "keep_scans" for everything but the selective scan, or a policy of `jax.checkpoint_policies`.
        bos_token_id: as the checkpoint says; nothing here reads it.
        eos_token_id: as the checkpoint says: what to pass to `generate` as stop_tokens.
        pad_token_id: as the checkpoint says.
    """

    vocab_size: int
    num_layers: int
    norm_eps: float = 1e-5
    residual_f32: bool = True
    tie_embeddings: bool = True
    rescale_residual: bool = True
    scan_layers: bool = False
    remat: Remat = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        check_size("vocab_size", self.vocab_size)
        check_size("num_layers", self.num_layers)
        if self.bidirectional:
            raise ValueError("a language model must not be bidirectional: it would see the tokens it is to predict")
        if not callable(self.remat):
            checks.check_choice("remat", self.remat, (None, "full", "keep_scans"))
        self.param_dtype = jnp.dtype(self.param_dtype)
        if self.dtype is not None:
            self.dtype = jnp.dtype(self.dtype)

    @property
    def compute_dtype(self) -> Any:
        """The dtype of the activations."""
        return self.param_dtype if self.dtype is None else self.dtype

    @property
    def block_options(self) -> dict[str, Any]:
        """The keyword arguments of each Mamba block."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(MambaOptions)}
        if self.rescale_residual:
            options["out_proj_gain"] *= self.num_layers**-0.5
        return options

    def checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` under `jax.checkpoint` with the policy that remat asks for."""
        if self.remat is None:
            return function
        policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES) if self.remat == "keep_scans" else None
        # prevent_cse only matters outside of a loop; inside one it would only cost.
        policy = self.remat if callable(self.remat) else policy
        return jax.checkpoint(function, policy=policy, prevent_cse=not self.scan_layers)
