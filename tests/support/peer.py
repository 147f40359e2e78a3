"""transformers' Qwen3.5 models in tiny, unusual shapes, and ours with the same weights.

`odd_shape(seed)` draws a configuration; `theirs` and `ours` build the two models; `adopt` copies weights into our model. `draw`
fills a model with weights at which every layer affects the output: with transformers' initialisation (std 0.02) a tiny model
is close to a bigram table, and errors in a layer disappear in the residual stream.

Gates. `ordinary`: dt_bias the inverse softplus of log-uniform 1e-3..0.1 and A in 1..16, at which the recurrent state matters.
`transformers`: A in 0.01..16 and dt_bias 1, its initialisation (a median decay of e^-9.7 per token). `hard`: decays down to
about e^-80 per token beside soft ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GAIN = 0.5  # size of the output of a layer, relative to the embedding
LINEAR, FULL = "linear_attention", "full_attention"


# ---------------------------------------------------------------------------------------------------- comparisons


def relative_error(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """max|a-b| / max|b| in float64; inf where one of them is not finite; 0 for two tensors of zeros and for empty ones.

    scale: a divisor instead of max|b|, where b is a sum of larger terms that cancel.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    a, b = actual.detach().double(), expected.detach().double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    difference, divisor = (a - b).abs().max().item(), (b.abs().max() if scale is None else scale).item()
    if difference == 0.0:
        return 0.0
    return difference / divisor if divisor > 0 else math.inf


def worst_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over named tensors, and the name of its tensor. The names must be equal."""
    assert actual.keys() == expected.keys(), f"names differ: {sorted(actual.keys() ^ expected.keys())}"
    errors = {name: relative_error(actual[name], expected[name]) for name in actual}
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name


def assert_close(actual: Tensor, expected: Tensor, bound: float, name: str = "") -> None:
    error = relative_error(actual, expected)
    assert error <= bound, f"{name or 'value'}: relative error {error:.2e}, bound {bound:.0e}"


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float, title: str = "") -> None:
    assert actual.keys() == expected.keys(), f"{title}: names differ: {sorted(actual.keys() ^ expected.keys())}"
    errors = {name: relative_error(actual[name], expected[name]) for name in actual}
    too_large = {name: f"{error:.2e}" for name, error in errors.items() if not error <= bound}
    assert not too_large, f"{title}: beyond {bound:.0e}: {too_large}"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that are drawn in float64, so that every dtype gets the same ones, rounded."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Case:
    """One tiny configuration (the text part of a config.json) and the shape of its inputs."""

    seed: int
    text: dict[str, Any] = field(hash=False)
    batch: int
    length: int

    @property
    def dense(self) -> bool:
        return self.text["model_type"] == "qwen3_5_text"

    def __repr__(self) -> str:
        return f"seed{self.seed}"

    def ids(self, batch: int | None = None, length: int | None = None, salt: int = 0) -> Tensor:
        shape = (batch or self.batch, length or self.length)
        return torch.randint(0, self.text["vocab_size"], shape, generator=generator(1000 * self.seed + salt))


def _distinct(rng: random.Random, choices: list[int], taken: set[int]) -> int:
    """A size that no other dimension has, so that a transposed tensor is an error."""
    unused = [size for size in choices if size not in taken]
    size = rng.choice(unused)
    taken.add(size)
    return size


def odd_shape(seed: int, *, dense: bool = False, **overrides: Any) -> Case:
    """A random tiny configuration. Head ratios, K and V, the convolution, the order of the layers, rotary share,
    sections, expert counts, biases and tying all vary; sizes are pairwise different."""
    rng = random.Random(seed)
    taken: set[int] = set()
    hidden = _distinct(rng, [18, 22, 26, 30, 34, 38], taken)
    vocabulary = _distinct(rng, [53, 59, 61, 67, 71, 73], taken)
    head_dim = _distinct(rng, [8, 12, 16, 20, 24, 28], taken)
    rotary_dim = rng.choice([size for size in range(2, head_dim + 1, 2) if size / head_dim >= 0.24])
    key_width = _distinct(rng, [9, 11, 14, 19, 25], taken)
    value_width = _distinct(rng, [10, 13, 15, 17], taken)
    layers = rng.randint(1, 5)
    pattern = rng.choice(["period", "full first", "full first", "any", "any", "all linear", "all full"])
    layer_types = {
        "period": [FULL if (i + 1) % min(3, layers) == 0 else LINEAR for i in range(layers)],
        "full first": [FULL if i % 2 == 0 else LINEAR for i in range(layers)],
        "all linear": [LINEAR] * layers,
        "all full": [FULL] * layers,
        "any": [rng.choice([LINEAR, FULL]) for _ in range(layers)],
    }[pattern]
    groups, value_groups = rng.randint(1, 3), rng.randint(1, 3)
    half = rotary_dim // 2
    section = rng.choice([_sections(half), [max(1, half // 3)] * 3, [11, 11, 10], [half, half, half]])
    text: dict[str, Any] = {
        "model_type": "qwen3_5_text" if dense else "qwen3_5_moe_text",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "layer_types": layer_types,
        "num_attention_heads": groups * rng.choice([1, 1, 2, 3, 4]),
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "attention_bias": rng.random() < 0.3,
        "linear_num_key_heads": value_groups,
        "linear_num_value_heads": value_groups * rng.randint(1, 3),
        "linear_key_head_dim": key_width,
        "linear_value_head_dim": value_width,
        "linear_conv_kernel_dim": rng.randint(2, 5),
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "tie_word_embeddings": rng.random() < 0.4,
        "max_position_embeddings": rng.choice([512, 2048]),
        "initializer_range": 0.02,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rng.choice([100.0, 10_000.0, 1e7]),
            "partial_rotary_factor": rotary_dim / head_dim,
            "mrope_section": section,
            "mrope_interleaved": True,
        },
    }
    if rng.random() < 0.3:
        text["rope_parameters"] |= _yarn(rng)
    if dense:
        text["intermediate_size"] = _distinct(rng, [21, 23, 25, 27], taken)
    else:
        experts = rng.randint(3, 9)
        text |= {
            "num_experts": experts,
            "num_experts_per_tok": rng.choice([1, experts, (experts + 1) // 2, rng.randint(1, experts)]),
            "router_aux_loss_coef": rng.choice([0.001, 0.02, 0.3]),
            "moe_intermediate_size": _distinct(rng, [19, 21, 23, 25], taken),
            "shared_expert_intermediate_size": _distinct(rng, [27, 29, 31, 33], taken),
        }
        if text["num_experts_per_tok"] == 1:
            # The weight of a single expert is always 1: the router gets gradients from the balancing loss only.
            text["router_aux_loss_coef"] = 0.3
    batch, length = rng.randint(1, 3), rng.choice([5, 11, 16, 37, 63, 64, 65, 70, 131])
    return Case(seed, text | overrides, batch, length)


def _sections(half: int) -> list[int]:
    """As in the published sections: temporal gets the frequencies that height and width leave."""
    height = width = half // 3
    return [half - height - width, height, width]


def _yarn(rng: random.Random) -> dict[str, Any]:
    yarn: dict[str, Any] = {"rope_type": "yarn", "factor": rng.choice([2.0, 4.0, 7.5])}
    yarn["original_max_position_embeddings"] = rng.choice([32, 128])
    if rng.random() < 0.5:
        yarn |= {"beta_fast": 16.0, "beta_slow": 2.0}
    extra = rng.choice(["none", "attention_factor", "mscale", "mscale", "truncate"])
    if extra == "attention_factor":
        yarn["attention_factor"] = 1.3
    elif extra == "mscale":
        yarn |= {"mscale": 0.8, "mscale_all_dim": 0.5}
    elif extra == "truncate":
        yarn["truncate"] = False
    return yarn


ODDITIES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "key heads grouped": lambda t: t["linear_num_value_heads"] > t["linear_num_key_heads"] > 1,
    "one key head": lambda t: t["linear_num_key_heads"] == 1 < t["linear_num_value_heads"],
    "key heads not grouped": lambda t: t["linear_num_value_heads"] == t["linear_num_key_heads"] > 1,
    "K > V": lambda t: t["linear_key_head_dim"] > t["linear_value_head_dim"],
    "K < V": lambda t: t["linear_key_head_dim"] < t["linear_value_head_dim"],
    "convolution of 2": lambda t: t["linear_conv_kernel_dim"] == 2,
    "convolution of 5": lambda t: t["linear_conv_kernel_dim"] == 5,
    "full attention first": lambda t: t["layer_types"][0] == FULL and LINEAR in t["layer_types"],
    "linear only": lambda t: FULL not in t["layer_types"],
    "full only": lambda t: LINEAR not in t["layer_types"],
    "grouped queries, three to a key": lambda t: t["num_attention_heads"] == 3 * t["num_key_value_heads"],
    "multi-head": lambda t: t["num_attention_heads"] == t["num_key_value_heads"] > 1,
    "heads wider than the model": lambda t: t["num_attention_heads"] * t["head_dim"] > t["hidden_size"],
    "sections longer than the rotary half": lambda t: sum(t["rope_parameters"]["mrope_section"]) > _half(t),
    "sections shorter than the rotary half": lambda t: sum(t["rope_parameters"]["mrope_section"]) < _half(t),
    "full rotary": lambda t: t["rope_parameters"]["partial_rotary_factor"] == 1.0,
    "partial rotary": lambda t: t["rope_parameters"]["partial_rotary_factor"] < 1.0,
    "yarn": lambda t: t["rope_parameters"]["rope_type"] == "yarn",
    "yarn, not truncated": lambda t: t["rope_parameters"].get("truncate") is False,
    "yarn, mscale": lambda t: "mscale" in t["rope_parameters"],
    "attention bias": lambda t: t["attention_bias"] and FULL in t["layer_types"],
    "tied": lambda t: t["tie_word_embeddings"],
    "untied": lambda t: not t["tie_word_embeddings"],
}
MOE_ODDITIES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "every expert chosen": lambda t: t["num_experts_per_tok"] == t["num_experts"],
    "top-1": lambda t: t["num_experts_per_tok"] == 1 < t["num_experts"],
    "some experts chosen": lambda t: 1 < t["num_experts_per_tok"] < t["num_experts"],
}


def _half(text: dict[str, Any]) -> int:
    return int(text["head_dim"] * text["rope_parameters"]["partial_rotary_factor"]) // 2


# ---------------------------------------------------------------------------------------------------- the two models


def theirs(case: Case, *, attention: str = "eager") -> Any:
    """transformers' model of a case in float32 and eval mode, with eager attention and experts, before `draw`."""
    import transformers

    transformers.logging.set_verbosity_error()  # otherwise warnings for every YaRN factor and missing kernel
    dense = case.dense
    config_class = transformers.Qwen3_5TextConfig if dense else transformers.Qwen3_5MoeTextConfig
    model_class = transformers.Qwen3_5ForCausalLM if dense else transformers.Qwen3_5MoeForCausalLM
    # transformers modifies rope_parameters: pass a copy.
    text = {key: dict(value) if isinstance(value, dict) else value for key, value in case.text.items()}
    config = config_class(**{key: value for key, value in text.items() if key != "model_type"})
    config._attn_implementation = attention
    config._experts_implementation = "eager"
    return model_class(config).eval()


def ours(case: Case, *, dtype: torch.dtype = torch.float32, source: nn.Module | None = None) -> Any:
    """Our model of a case in eval mode, with the weights of `source` where it is passed."""
    from qwen35moe.config import Config
    from qwen35moe.models.text import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM

    config = Config.from_dict({key: dict(v) if isinstance(v, dict) else v for key, v in case.text.items()})
    model = (Qwen3_5ForCausalLM if case.dense else Qwen3_5MoeForCausalLM)(config).eval()
    if source is not None:
        adopt(model, source)
    return model.to(dtype)


def adopt(model: nn.Module, source: nn.Module) -> None:
    """Copy all weights of `source` into `model`. The names must be equal."""
    actual, expected = set(model.state_dict()), set(source.state_dict())
    assert actual == expected, f"missing: {sorted(expected - actual)}; unexpected: {sorted(actual - expected)}"
    model.load_state_dict(source.state_dict(), strict=True)


def to_bfloat16(model: Any) -> Any:
    """Round the parameters of transformers' model, but not its buffers (inv_freq), as its loader does for bf16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


@torch.no_grad()
def draw(model: nn.Module, seed: int, gates: str = "ordinary") -> None:
    """Fill a model with weights of unit gain, norms around 1 and gates of the named kind."""
    rng = generator(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        if name.endswith("A_log"):
            parameter.copy_(_gates(parameter.shape, rng, gates)[0])
        elif name.endswith("dt_bias"):
            parameter.copy_(_gates(parameter.shape, rng, gates)[1])
        elif name.endswith("linear_attn.norm.weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith("norm.weight") or name.endswith("layernorm.weight"):
            parameter.copy_(0.2 * noise)
        elif name.endswith("embed_tokens.weight"):
            parameter.copy_(noise)
        elif name.endswith(".bias"):
            parameter.copy_(0.5 * noise)
        elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight")):
            parameter.copy_(GAIN * noise * parameter.shape[-1] ** -0.5)
        elif name.endswith("conv1d.weight"):
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    for module in model.modules():
        if hasattr(module, "in_proj_qkv"):
            _correlate_keys_with_queries(module)


def _correlate_keys_with_queries(module: Any) -> None:
    """Correlation 0.8. The output for the first token of a row is (q . k) v, which the output norm scales to size one: with q
    and k nearly orthogonal by chance, float32 would lose two digits, in all gradients too."""
    width = (module.in_proj_qkv.weight.shape[0] - module.out_proj.weight.shape[1]) // 2
    for weight in (module.in_proj_qkv.weight, module.conv1d.weight):
        query, key = weight[:width], weight[width : 2 * width]
        key.copy_(0.8 * query + 0.6 * key)


def _gates(shape: torch.Size, rng: torch.Generator, gates: str) -> tuple[Tensor, Tensor]:
    """A_log and dt_bias."""
    uniform = torch.rand(shape, generator=rng)
    if gates == "ordinary":
        step = torch.exp(math.log(1e-3) + uniform * math.log(100.0))
        return torch.log(1 + 15 * uniform.flip(0)), torch.log(torch.expm1(step))
    if gates == "transformers":
        return torch.log(0.01 + (16 - 0.01) * uniform), torch.ones(shape)
    if gates == "hard":
        # every second head has a decay of -80 per token (16 * softplus(5)), the others are soft
        soft = torch.arange(shape[0]) % 2 == 1
        return torch.where(soft, -4.0, math.log(16.0)), torch.where(soft, -2.0, 5.0)
    raise ValueError(f"gates are 'ordinary', 'transformers' or 'hard', not {gates!r}")


@contextmanager
def forced_routing(model: Any, indices: list[Tensor]) -> Iterator[None]:
    """Make the routers of transformers' model choose the experts indices[layer] [N, k], with weights from its own logits,
    rounded as it rounds them."""
    handles = []
    for layer, chosen in zip(model.model.layers, indices, strict=bool(indices)):

        def force(_module: nn.Module, _inputs: Any, output: Any, chosen: Tensor = chosen) -> tuple[Tensor, ...]:
            logits = output[0]
            weights = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(-1, chosen)
            return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), chosen

        handles.append(layer.mlp.gate.register_forward_hook(force))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids as transformers' `generate` passes them: the number of tokens before each one; 0 for padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def padded(rows: list[Tensor], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """ids [B, T] and mask [B, T] of rows of unequal length, padded on one side."""
    length = max(row.numel() for row in rows)
    ids, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.long)
    for r, row in enumerate(rows):
        span = slice(length - row.numel(), length) if side == "left" else slice(0, row.numel())
        ids[r, span], mask[r, span] = row, 1
    return ids, mask


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; zeros for a parameter without a gradient."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
    }


def gradients_with_and_without_checkpointing(model: Any, backward: Callable[[], None]) -> list[dict[str, Tensor]]:
    """The gradients of a model in training mode after `backward`, first without gradient checkpointing, then with it."""
    results = []
    for recompute in (False, True):
        model.zero_grad(set_to_none=True)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        backward()
        results.append(gradients(model))
    return results


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The next-token loss by definition: labels shifted by one, -100 ignored, float32 at least."""
    shifted = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(shifted.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
