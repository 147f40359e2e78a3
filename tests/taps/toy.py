"""A small model whose modules call `tap`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen35moe import backends
from qwen35moe.taps import tap

# Pairwise different, so that a wrong axis cannot pass.
B, T, D, H, V, E, TOP_K, VOCABULARY = 2, 5, 12, 3, 4, 7, 6, 11


class LinearAttn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.rand(H))
        self.in_proj_a = nn.Linear(D, H, bias=False)
        self.out_proj = nn.Linear(H * V, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        decay = tap(self, "decay", -self.A_log.exp() * self.in_proj_a(x).sigmoid())
        core = tap(self, "core", decay.exp()[..., None].expand(-1, -1, -1, V) * torch.arange(1.0, V + 1))
        tap(self, "state", core.sum(1)[:, :, None].expand(-1, -1, V + 1, -1))
        return tap(self, "output", self.out_proj(core.flatten(2)))


class SelfAttn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = tap(self, "scores", (x @ x.mT).softmax(-1)[:, None].expand(-1, H, -1, -1))
        return tap(self, "output", self.o_proj(scores.mean(1) @ x))


class SparseMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList()

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        logits = tap(self, "router_logits", self.gate(rows))
        indices = tap(self, "indices", logits.topk(TOP_K).indices)
        tap(self, "expert_in", rows.repeat_interleave(TOP_K, 0))
        routed = tap(self, "routed", rows * indices.float().mean(-1, keepdim=True))
        return tap(self, "output", routed.view_as(hidden))


class DenseMlp(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return tap(self, "output", hidden.tanh())


class Layer(nn.Module):
    def __init__(self, index: int, dense: bool) -> None:
        super().__init__()
        if index % 2:
            self.self_attn = SelfAttn()
        else:
            self.linear_attn = LinearAttn()
        self.mlp = DenseMlp() if dense else SparseMlp()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = tap(self, "input", hidden)
        mixer = self.linear_attn if hasattr(self, "linear_attn") else self.self_attn
        hidden = hidden + mixer(hidden)
        return tap(self, "output", hidden + self.mlp(hidden))


class TextModel(nn.Module):
    def __init__(self, layers: int = 3, dense: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(Layer(index, dense) for index in range(layers))
        self.checkpointing = False

    def forward(self, ids: Tensor) -> Tensor:
        hidden = tap(self, "embed", self.embed_tokens(ids))
        for layer in self.layers:
            hidden = backends.checkpoint(layer, hidden) if self.checkpointing else layer(hidden)
        return tap(self, "norm", hidden)


class CausalLM(nn.Module):
    def __init__(self, dense: bool = False) -> None:
        super().__init__()
        self.model = TextModel(dense=dense)
        self.lm_head = nn.Linear(D, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))


class Multimodal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.language_model = TextModel()
        self.mtp = nn.Module()
        self.mtp.layers = nn.ModuleList([Layer(1, dense=False)])

    def forward(self, ids: Tensor) -> Tensor:
        return self.mtp.get_submodule("layers.0")(self.model.get_submodule("language_model")(ids))
