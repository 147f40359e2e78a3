"""The arguments that all decoder layers of a forward share, and the outputs of a layer other than its hidden states."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen35moe.cache import DeltaNetUpdate, KVCache
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.routing import ForcedRouting, RouterOutput


@dataclass(frozen=True)
class LayerContext:
    """layout: padding, packed documents and positions of the tokens. rotation: cos and sin [B, T, R/2]. routing: overrides the
    routers. record: whether the cache records the tokens for a rollback. attentions: whether attention weights are returned."""

    layout: TokenLayout
    rotation: tuple[Tensor, Tensor]
    routing: ForcedRouting | None = None
    record: bool = False
    attentions: bool = False

    def to(self, device: torch.device) -> LayerContext:
        """A copy on another device, except `routing`, which moves its rows when a layer reads them."""
        cos, sin = self.rotation
        return replace(self, layout=self.layout.to(device), rotation=(cos.to(device), sin.to(device)))


@dataclass(frozen=True)
class LayerOutput:
    """state: of the layer after the new tokens. router: its choice. attention: its weights [B, H, T, P] if returned."""

    state: KVCache | DeltaNetUpdate | None = None
    router: RouterOutput | None = None
    attention: Tensor | None = None

    def to(self, device: torch.device) -> LayerOutput:
        """A copy with `router` and `attention` on another device; the state stays on the device of its layer."""
        router, attention = self.router, self.attention
        if router is not None:
            router = RouterOutput(*(getattr(router, name).to(device) for name in ("logits", "indices", "weights")))
        return LayerOutput(self.state, router, None if attention is None else attention.to(device))
