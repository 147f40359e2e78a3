"""What the decoder layers of one forward share, and what each returns beside its hidden states."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen35moe.cache import DeltaNetUpdate, KVCache
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.routing import ForcedRouting, RouterOutput


@dataclass(frozen=True)
class LayerContext:
    """layout: how the tokens are arranged. rotation: cos and sin [B, T, R/2]. routing: what overrides the routers. record:
    whether the cache keeps what a rollback needs. attentions: whether attention weights are returned."""

    layout: TokenLayout
    rotation: tuple[Tensor, Tensor]
    routing: ForcedRouting | None = None
    record: bool = False
    attentions: bool = False

    def to(self, device: torch.device) -> LayerContext:
        """The same on another device; forced routing moves its rows layer by layer."""
        cos, sin = self.rotation
        return replace(self, layout=self.layout.to(device), rotation=(cos.to(device), sin.to(device)))


@dataclass(frozen=True)
class LayerOutput:
    """A layer's state after the new tokens, what its router chose, and its attention weights [B, H, T, P] if returned."""

    state: KVCache | DeltaNetUpdate | None = None
    router: RouterOutput | None = None
    attention: Tensor | None = None

    def to(self, device: torch.device) -> LayerOutput:
        """With what the caller sees on another device; the state stays beside its layer."""
        router, attention = self.router, self.attention
        if router is not None:
            router = RouterOutput(*(getattr(router, name).to(device) for name in ("logits", "indices", "weights")))
        return LayerOutput(self.state, router, None if attention is None else attention.to(device))
