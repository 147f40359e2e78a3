"""The measured cases: one layer's experts at a published shape, a number of tokens, a distribution of the routing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from qwen35moe.config import Config

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
SKEWS = ("uniform", "zipf", "hot-8", "bursty")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BUNDLED = "tiny"
HOT_SHARE = 0.9  # of the tokens, in "hot-k": they choose among the k hot experts only
BURST = 64  # consecutive tokens with the same preferred experts, in "bursty"


@dataclass(frozen=True)
class Case:
    """One case. `id` is stable: results of other runs and machines are compared by it."""

    preset: str
    tokens: int
    skew: str = "uniform"
    dtype: str = "bf16"
    train: bool = False
    cold: bool = True
    seed: int = 0
    trace: str | None = None
    layer: int = 0

    @property
    def id(self) -> str:
        how = f"trace-{Path(self.trace).stem}-layer{self.layer}" if self.trace else self.skew
        direction = "forward+backward" if self.train else "forward"
        return f"moe/{self.preset}/N{self.tokens}/{how}/{self.dtype}/{direction}/{'cold' if self.cold else 'warm'}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return shapes()[self.preset]

    def routing(self) -> Tensor:
        """indices [N, top_k], int64."""
        experts, top_k, _, _ = self.shape
        if self.trace is not None:
            return traced(Path(self.trace), self.layer, self.tokens, experts)
        generator = torch.Generator().manual_seed(self.seed)
        return scores(self.skew, self.tokens, experts, top_k, generator).topk(top_k, dim=-1).indices

    @property
    def weight_bytes(self) -> int:
        experts, _, width, inner = self.shape
        return experts * 3 * width * inner * DTYPES[self.dtype].itemsize


@cache
def shapes() -> dict[str, tuple[int, int, int, int]]:
    """(experts, top_k, D, F) of every published mixture of experts, and of the bundled checkpoint ("tiny")."""
    table: dict[str, tuple[int, int, int, int]] = {}
    text = resources.files("qwen35moe").joinpath("assets/tiny/config.json").read_text(encoding="utf-8")
    configs = {name: Config.preset(name) for name in Config.presets()} | {BUNDLED: Config.from_dict(json.loads(text))}
    for name, config in configs.items():
        text_config = config.text_config
        if text_config.num_experts:
            sizes = text_config.num_experts, text_config.num_experts_per_tok
            table[name] = (*sizes, text_config.hidden_size, text_config.moe_intermediate_size)
    return table


def scores(skew: str, tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """[N, E] whose top-k are a token's experts. Gumbel noise on log popularity draws without replacement."""
    noise = -torch.empty(tokens, experts).exponential_(generator=generator).log()
    if skew == "uniform":
        return noise
    if skew == "zipf":
        order = torch.randperm(experts, generator=generator)
        return noise - (order + 1).log()
    if skew == "bursty":
        preference = -torch.empty(-(-tokens // BURST), experts).exponential_(generator=generator).log()
        return noise + 3 * preference.repeat_interleave(BURST, dim=0)[:tokens]
    if skew.startswith("hot-") and skew[4:].isdecimal():
        hot = max(int(skew[4:]), top_k)
        chosen = torch.randperm(experts, generator=generator)[:hot]
        on_hot = torch.rand(tokens, generator=generator) < HOT_SHARE
        return noise + 1e3 * on_hot[:, None] * torch.zeros(experts).index_fill(0, chosen, 1.0)
    raise ValueError(f"skew {skew!r} is none of {', '.join(SKEWS)} (hot-k with any k)")


def traced(file: Path, layer: int, tokens: int, experts: int) -> Tensor:
    """The recorded indices [N, top_k] of one layer, from a Routing file: `indices` [L, N, top_k]; tokens without a record
    (-1) are left out."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        if "indices" not in opened.keys():  # noqa: SIM118, it is no dictionary
            raise ValueError(f"{file} has no tensor 'indices': make it with `qwen35moe routing DIR --text F --out T`")
        recorded = opened.get_tensor("indices")
    if recorded.dim() != 3 or not 0 <= layer < recorded.shape[0]:
        raise ValueError(f"{file} holds indices {list(recorded.shape)} of [layers, tokens, top_k]: it has no layer {layer}")
    rows = recorded[layer].long()
    rows = rows[(rows >= 0).all(-1)]
    if tokens > len(rows) or (rows.numel() and int(rows.max()) >= experts):
        raise ValueError(
            f"{file} holds {len(rows)} routed tokens and experts up to {int(rows.max()) if rows.numel() else 0}; "
            f"the case needs {tokens} tokens of {experts} experts"
        )
    return rows[:tokens]


def rotation(
    case: Case, device: str, cache_bytes: int
) -> tuple[Callable[[], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]], int]:
    """A function that returns (hidden, gate_up, down, indices, weights) of the next run, and the number of weight sets.

    Cold: enough copies of the weights to exceed `cache_bytes`, and shifted expert indices in every run, so that the same
    load falls on weights that were not read recently. Warm: always the same.
    """
    experts, _, width, inner = case.shape
    dtype, generator = DTYPES[case.dtype], torch.Generator().manual_seed(case.seed + 1)
    copies = max(1, -(-cache_bytes // case.weight_bytes)) if case.cold else 1

    def drawn(rows: int, columns: int) -> Tensor:
        return _normal(experts, rows, columns, dtype, generator).to(device).requires_grad_(case.train)

    layers = [(drawn(2 * inner, width), drawn(width, inner)) for _ in range(copies)]
    base = case.routing()
    hidden = torch.randn(case.tokens, width, generator=generator).to(device, dtype).requires_grad_(case.train)
    weights = torch.rand(base.shape, generator=generator) + 0.1
    weights = (weights / weights.sum(-1, keepdim=True)).to(device, dtype).requires_grad_(case.train)
    step = max(1, experts // 5) if case.cold else 0
    indices = [((base + turn * step) % experts).to(device) for turn in range(5 if case.cold else 1)]
    turns = _turns(len(layers) * len(indices))

    def following() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        turn = next(turns)
        return (hidden, *layers[turn % len(layers)], indices[turn % len(indices)], weights)

    return following, copies


def _turns(period: int) -> Iterator[int]:
    turn = 0
    while True:
        yield turn
        turn = (turn + 1) % max(period, 1)


def _normal(experts: int, rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Written in full, so that every page is mapped; one expert at a time, since a float32 draw takes twice the memory."""
    out = torch.empty(experts, rows, columns, dtype=dtype)
    block = torch.randn(rows, columns, generator=generator) * columns**-0.5
    for expert in out:
        expert.copy_(block.roll(int(torch.randint(columns, (), generator=generator)), 1))
    return out
