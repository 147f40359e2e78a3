"""The token embedding: torch's, with gradients that are summed over tokens in float32. See `ops.embedding`."""

from __future__ import annotations

from torch import Tensor, nn

from qwen35moe.ops.embedding import embedding


class Embedding(nn.Embedding):
    """weight [vocabulary, D]; ids [...] to [..., D]."""

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.weight, self.padding_idx)
