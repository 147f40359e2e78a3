"""One decoder layer: a mixer over time, then a feed-forward over width, each on the residual stream.

    h' = h + mixer(norm(h))          mixer: Gated DeltaNet or Gated Attention, by layer_types
    y  = h' + mlp(norm(h'))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen35moe import backends, ops
from qwen35moe.cache import LayerState
from qwen35moe.config import TextConfig
from qwen35moe.modules.attention import GatedAttention
from qwen35moe.modules.context import LayerContext, LayerOutput
from qwen35moe.modules.gated_deltanet import GatedDeltaNet
from qwen35moe.modules.hooks import add_residual, is_plain, weight_of
from qwen35moe.modules.initialise import Initialised, initialise
from qwen35moe.modules.moe import DenseMLP, SparseMoeBlock, chooses_inside, routed_inside
from qwen35moe.modules.norm import RMSNorm
from qwen35moe.taps import tap


class DecoderLayer(Initialised):
    """Layer `index` of the configuration. The mixer is `linear_attn` or `self_attn`; `mlp` is sparse or dense."""

    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        self.kind = config.layer_types[index]
        if self.kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        self.mlp = SparseMoeBlock(config, index) if config.is_moe else DenseMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        initialise(self, config.initializer_range)

    def forward(
        self, hidden: Tensor, context: LayerContext, state: LayerState | None = None
    ) -> tuple[Tensor, LayerOutput]:
        """hidden [B, T, D]; returns [B, T, D] and the layer's other outputs."""
        run = backends.checkpoint if self.gradient_checkpointing and torch.is_grad_enabled() else _run
        hidden = tap(self, "input", hidden)
        mixed, after, attention = run(self._mixer_of_norm, hidden, context, state)
        # On a CPU there is no fused implementation, unless one was chosen or registered.
        ordinary = hidden.is_cpu and ops.add_rms_norm.is_ordinary(self) and ops.add_shared_expert.is_ordinary(self)
        fused = None if ordinary else self._fused_add_norm(hidden, mixed)
        if fused is None:
            hidden = add_residual(hidden, mixed)
            normed = run(self.post_attention_layernorm, hidden)
        else:
            hidden, normed = fused
        if isinstance(self.mlp, DenseMLP):
            hidden = add_residual(hidden, run(self.mlp, normed))
            return tap(self, "output", hidden), LayerOutput(after, None, attention)
        if chooses_inside(self.mlp):
            change, router = routed_inside(self.mlp, normed, context.routing, run)
            return tap(self, "output", add_residual(hidden, change)), LayerOutput(after, router, attention)
        # Outside the checkpointed function, so that a recomputation cannot choose other experts.
        assert isinstance(self.mlp, SparseMoeBlock)
        router = self.mlp.route(normed.flatten(0, 1), context.routing)
        if ordinary or torch.is_grad_enabled() or not is_plain(self.mlp, SparseMoeBlock):
            hidden = add_residual(hidden, run(self.mlp, normed, router))
        else:
            hidden = self.mlp(normed, router, hidden)
        return tap(self, "output", hidden), LayerOutput(after, router, attention)

    def _fused_add_norm(self, hidden: Tensor, change: Tensor) -> tuple[Tensor, Tensor] | None:
        """hidden + change and its norm by a fused implementation of `ops.add_rms_norm`; None where `forward` composes them."""
        norm = self.post_attention_layernorm
        weight = None if torch.is_grad_enabled() else weight_of(norm, RMSNorm)
        return None if weight is None else ops.add_rms_norm.fused(hidden, change, weight, eps=norm.eps, caller=norm)

    def _mixer_of_norm(self, hidden: Tensor, context: LayerContext, state: LayerState | None) -> Any:
        mixer = self.linear_attn if self.kind == "linear_attention" else self.self_attn
        return mixer(self.input_layernorm(hidden), context, state)


def _run(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
