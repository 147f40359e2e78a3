"""The models of the comparison, and the calls that are timed on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """`kind`, see `Worker.call`. past: tokens already in the cache. runs: of one request, after `uncounted` others."""

    id: str
    kind: str
    tokens: int
    past: int = 0
    runs: int = 1
    uncounted: int = 0


@dataclass(frozen=True)
class Group:
    """A model (a preset with changes) and its scenarios."""

    preset: str
    changes: dict[str, Any]
    scenarios: tuple[Scenario, ...]


_NO_MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
_ONE_LAYER = {"num_hidden_layers": 1, "layer_types": ["linear_attention"], "vocab_size": 64}
GROUPS = {
    # 3 Gated DeltaNet layers, 1 attention layer, 0.95 GB in bfloat16
    "text": Group(
        "moe-4.54b",
        {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"], "vocab_size": 8192},
        (
            Scenario("text/prefill/T512", "text", 512),
            Scenario("text/decode/past512", "text", 1, past=512, runs=8, uncounted=1),
        ),
    ),
    # one Gated DeltaNet layer of the 35B model; its mixture of experts is 8 wide
    "delta": Group(
        "35b-a3b",
        {**_ONE_LAYER, **_NO_MOE},
        (
            Scenario("delta/layer/T512", "layer", 512),
            Scenario("delta/layer/T2048", "layer", 2048),
            Scenario("delta/layer/past8", "layer", 1, past=8, runs=16, uncounted=1),
        ),
    ),
    # the 35B model's mixture of experts, 256 experts, top-8: 1.6 GB in bfloat16
    "moe": Group(
        "35b-a3b",
        _ONE_LAYER,
        tuple(
            Scenario(f"moe/block/N{tokens}", "block", tokens, runs=runs, uncounted=int(runs > 1))
            for tokens, runs in ((1, 16), (8, 8), (64, 3), (512, 1))
        ),
    ),
}
