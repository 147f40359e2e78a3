"""Our model, the same with packed weights, and transformers' on the storage of our weights: prefill and one cached token."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen35moe import Config, Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM

WRITERS = ("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight")  # what a layer adds to the residual stream
WRITTEN = 1 / 5  # of their initial size, see `tools.synthetic.WRITER`: else bfloat16's roundings grow with depth
EXPERTS = ("grouped_mm", "eager", "batched_mm")
ATTENTION = ("sdpa", "eager")
CACHES = ("dynamic", "static")


def configuration(preset: str, layers: int | None) -> Config:
    """A preset's decoder with its first layers, and a vocabulary smaller in proportion: the head's share of the time stays."""
    config = Config.preset(preset).text_only()
    kinds = config.text_config.layer_types
    if layers is None or layers == len(kinds):
        return config
    if not 1 <= layers <= len(kinds):
        raise ValueError(f"--layers {layers}: {preset} has {len(kinds)} layers")
    vocabulary = max(64, config.text_config.vocab_size * layers // len(kinds) // 64 * 64)
    return config.replace(num_hidden_layers=layers, layer_types=tuple(kinds[:layers]), vocab_size=vocabulary)


def build(config: Config, dtype: torch.dtype) -> Any:
    """Our model with the library's initial weights at ordinary gates; what bfloat16 transformers would round is rounded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # no copy of the weights in float32
    try:
        with torch.device("meta"):  # drawn once, by init_weights
            model: Any = (Qwen3_5MoeForCausalLM if config.text_config.num_experts else Qwen3_5ForCausalLM)(config)
    finally:
        torch.set_default_dtype(before)
    if lost := [name for name, _ in model.named_buffers()]:
        raise ValueError(f"{type(model).__name__} has buffers that no weight fills: {', '.join(lost)}")
    model.to_empty(device="cpu").tie_weights()  # to_empty separates the head from the embedding
    model.init_weights(seed=0).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(WRITERS):
                parameter.mul_(WRITTEN)
            parameter.copy_(parameter.to(dtype))
    return model


def nbytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes of a model's parameters."""
    with torch.device("meta"):
        model: Any = (Qwen3_5MoeForCausalLM if config.text_config.num_experts else Qwen3_5ForCausalLM)(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def packed(model: Any) -> Any:
    """A copy with packed weights of a model that keeps its own; ValueError where weights cannot be packed."""
    if not hasattr(model, "pack_weights"):
        raise ValueError("this version of the library has no model.pack_weights()")
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    twin.pack_weights()
    return twin


class Ours:
    """qwen35moe with its defaults. Rows of a batch continue one prompt with tokens of their own."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.routing: Tensor | None = None

    @torch.inference_mode()
    def prefill(self, ids: Tensor, room: int = 0) -> tuple[Tensor, Any]:
        """Logits [1, V] of the last token, and the state."""
        cache = self.model.new_cache(1)
        return self.model(ids, cache=cache, logits_to_keep=1, routing=self._part(0, ids)).logits[:, -1], cache

    def rows(self, state: Any, batch: int) -> Any:
        state.reorder([0] * batch)
        return state

    @torch.inference_mode()
    def step(self, ids: Tensor, state: Any) -> Tensor:
        """Logits [B, V] after one more token of each row. ids [B, 1]."""
        start = 0 if self.routing is None else int(state.lengths[0])
        return self.model(ids, cache=state, logits_to_keep=1, routing=self._part(start, ids)).logits[:, -1]

    def _part(self, start: int, ids: Tensor) -> Tensor | None:
        if self.routing is None:
            return None
        part = self.routing[:, : len(ids), start : start + ids.shape[1]]
        return part.permute(1, 2, 0, 3).contiguous()  # [B, T, layers, top_k]

    @contextmanager
    def replaying(self, routing: Tensor) -> Iterator[None]:
        """Within the context the experts are `routing` [layers, B, T, top_k]."""
        self.routing = routing
        yield
        self.routing = None


@dataclass(frozen=True)
class Setting:
    """Of transformers."""

    experts: str = "grouped_mm"
    attention: str = "sdpa"
    cache: str = "dynamic"

    def __str__(self) -> str:
        return f"experts {self.experts}, attention {self.attention}, {self.cache} cache"


class Theirs:
    """transformers in inference mode, with one of its settings."""

    def __init__(self, ours: Any, setting: Setting | None = None) -> None:
        import transformers

        self.library = transformers
        transformers.utils.logging.set_verbosity_error()
        config = ours.config.to_transformers()
        kind = transformers.Qwen3_5MoeForCausalLM if getattr(config, "num_experts", 0) else transformers.Qwen3_5ForCausalLM
        with torch.device("meta"):
            self.model: Any = kind(config).eval()
        dtype = ours.get_input_embeddings().weight.dtype
        weights = {name: value.detach().to(dtype) for name, value in ours.state_dict().items()}
        self.model.load_state_dict(weights, assign=True, strict=False)
        self.model.tie_weights()
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config)
        left = [name for name, value in self.model.named_parameters() if value.is_meta]
        if left:
            raise ValueError(f"transformers' parameters have no weight of ours: {', '.join(left[:3])}")
        self.model.requires_grad_(False)
        self.set(setting or Setting())

    def set(self, setting: Setting) -> None:
        self.setting = setting
        self.model.set_experts_implementation(setting.experts)
        self.model.set_attn_implementation(setting.attention)

    @torch.inference_mode()
    def prefill(self, ids: Tensor, room: int = 0) -> tuple[Tensor, Any]:
        """room: further tokens of a static cache."""
        kind, config = self.library, self.model.config
        static = self.setting.cache == "static"
        cache = kind.StaticCache(config, max_cache_len=ids.shape[1] + room) if static else kind.DynamicCache(config=config)
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1], cache

    def rows(self, state: Any, batch: int) -> Any:
        if batch > 1:
            state.reorder_cache(torch.zeros(batch, dtype=torch.long))
        return state

    @torch.inference_mode()
    def step(self, ids: Tensor, state: Any) -> Tensor:
        return self.model(ids, past_key_values=state, use_cache=True, logits_to_keep=1).logits[:, -1]

    @contextmanager
    def replaying(self, routing: Tensor) -> Iterator[None]:
        hooks, seen = [], [0] * len(routing)

        def forced(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple, output: tuple) -> tuple:
                logits = output[0]  # [B * T, experts]; a call has one row of the prompt or one token of all rows
                first = seen[layer]
                prompt = logits.shape[0] == routing.shape[2] - 1 and first == 0
                chosen = routing[layer, 0, : logits.shape[0]] if prompt else routing[layer, :, first]
                seen[layer] += logits.shape[0] if prompt else 1
                weights = logits.float().softmax(-1).gather(-1, chosen)
                return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), chosen

            return hook

        for number, layer in enumerate(self.model.model.layers):
            if hasattr(layer.mlp, "gate"):
                hooks.append(layer.mlp.gate.register_forward_hook(forced(number)))
        yield
        for hook in hooks:
            hook.remove()


def best_setting(theirs: Theirs, prompt: Tensor, batch: int, steps: int = 3) -> tuple[Setting, dict[str, float]]:
    """The fastest setting for one cached token of `batch` rows, and the seconds of all that were tried.

    First the experts' implementation, then with the fastest one attention's, then the cache.
    """
    best, seconds = Setting(), {}
    for field, values in (("experts", EXPERTS), ("attention", ATTENTION), ("cache", CACHES)):
        tried = []
        for value in values:
            setting = Setting(**{**vars(best), field: value})
            if str(setting) not in seconds:
                seconds[str(setting)] = _seconds(theirs, setting, prompt, batch, steps)
            tried.append((seconds[str(setting)], value))
        best = Setting(**{**vars(best), field: min(tried)[1]})
    theirs.set(best)
    return best, seconds


def _seconds(theirs: Theirs, setting: Setting, prompt: Tensor, batch: int, steps: int) -> float:
    """Of the fastest step; infinite where transformers refuses the setting."""
    theirs.set(setting)
    try:
        state = theirs.rows(theirs.prefill(prompt, room=steps + 1)[1], batch)
        taken = []
        for number in itertools.count(1):
            token, start = prompt[:, number % prompt.shape[1]].expand(batch, 1).contiguous(), time.perf_counter()
            theirs.step(token, state)
            taken.append(time.perf_counter() - start)
            if number > steps:
                return min(taken[1:])
    except (RuntimeError, ValueError, NotImplementedError, AttributeError):
        pass
    return float("inf")
