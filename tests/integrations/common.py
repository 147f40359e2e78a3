"""Tiny random models for the tests with other libraries, and the same weights in transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.config import Config
from qwen35moe.models.text import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM
from tests.support.configs import FULL, LINEAR, TINY, TINY_DENSE, peer_config

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "eos_token_id": 60, "pad_token_id": 59}
KINDS: dict[str, dict[str, Any]] = {
    "experts": TINY | SIZES,
    "tied": TINY | SIZES | {"tie_word_embeddings": True},
    "dense": TINY_DENSE | SIZES,
    "router loss": TINY | SIZES | {"output_router_logits": True, "router_aux_loss_coef": 0.3},
}
VOCABULARY = TINY["vocab_size"]


def tiny(kind: str = "experts", dtype: torch.dtype = torch.float32, seed: int = 1, **changes: Any) -> Any:
    """A model whose weights are large enough that every layer affects the logits."""
    config = Config.from_dict(KINDS[kind] | changes)
    model = (Qwen3_5ForCausalLM if kind == "dense" else Qwen3_5MoeForCausalLM)(config).init_weights(seed=seed).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter) * 0.1)
    return model.to(dtype)


def twin(model: Any) -> Any:
    """transformers' model with the same weights."""
    import transformers

    config = peer_config(model.config)
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("cpu"):
        theirs = getattr(transformers, type(model).__name__)(config).to(model.dtype).eval()
    theirs.load_state_dict(model.state_dict())
    theirs.tie_weights()
    return theirs


def tokens(rows: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    """Ids [rows, length] without the special ones."""
    return torch.randint(0, 59, (rows, length), generator=torch.Generator().manual_seed(seed))


def next_token_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of -log p(next token) over labels other than -100, in float64."""
    return F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def targets(labels: Tensor) -> int:
    """How many labels a position predicts: those other than -100 without the first of each row."""
    return int((labels[:, 1:] != -100).sum())


@torch.no_grad()
def cached_logits(model: Any, cache: Any) -> Tensor:
    """The logits of tokens() with a cache: four tokens, then one at a time."""
    parts = [model(tokens()[:, :4], cache=cache).logits]
    return torch.cat([*parts, *(model(tokens()[:, t : t + 1], cache=cache).logits for t in range(4, 9))], 1)
