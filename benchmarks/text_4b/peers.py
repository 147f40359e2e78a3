"""Ours and transformers with one interface: load, prefill, decode one token, replay a routing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Ours:
    """qwen35moe with its defaults."""

    def __init__(self) -> None:
        from qwen35moe import Qwen3_5MoeForCausalLM

        self.cls = Qwen3_5MoeForCausalLM
        self.model: Any = None
        self.routing: Tensor | None = None

    def load(self, folder: Path) -> None:
        self.model = self.cls.from_pretrained(folder).eval()

    @torch.inference_mode()
    def prefill(self, ids: Tensor, keep: int = 1) -> tuple[Tensor, Any]:
        """Logits [1, keep, vocabulary] of the last tokens, and the cache."""
        cache = self.model.new_cache(1)
        out = self.model(ids, cache=cache, logits_to_keep=keep, routing=self._part(0, ids.shape[1]))
        return out.logits, cache

    @torch.inference_mode()
    def decode(self, ids: Tensor, state: Any) -> Tensor:
        start = int(state.lengths[0]) if self.routing is not None else 0
        out = self.model(ids, cache=state, logits_to_keep=1, routing=self._part(start, ids.shape[1]))
        return out.logits

    def _part(self, start: int, count: int) -> Tensor | None:
        if self.routing is None:
            return None
        return self.routing[:, start : start + count].transpose(0, 1)[None]  # [B, T, layers, top_k]

    @contextmanager
    def replaying(self, indices: Tensor) -> Iterator[None]:
        """Within the context the experts are `indices` [layers, tokens, top_k]; their weights come from the router's logits."""
        self.routing = indices
        yield
        self.routing = None


class Packed(Ours):
    """qwen35moe with packed weights."""

    def load(self, folder: Path) -> None:
        self.model = self.cls.from_pretrained(folder, weights="packed").eval()


class Transformers:
    """transformers with its defaults: sdpa attention, its own choice of the experts' implementation, mapped weights."""

    def __init__(self) -> None:
        import transformers
        from transformers import Qwen3_5MoeForCausalLM

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.cls = Qwen3_5MoeForCausalLM
        self.model: Any = None

    def load(self, folder: Path) -> None:
        self.model = self.cls.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def prefill(self, ids: Tensor, keep: int = 1) -> tuple[Tensor, Any]:
        out = self.model(ids, use_cache=True, logits_to_keep=keep)
        return out.logits, out.past_key_values

    @torch.inference_mode()
    def decode(self, ids: Tensor, state: Any) -> Tensor:
        return self.model(ids, past_key_values=state, use_cache=True, logits_to_keep=1).logits

    @contextmanager
    def replaying(self, indices: Tensor) -> Iterator[None]:
        hooks, seen = [], [0] * indices.shape[0]  # seen: tokens of each layer so far

        def forced(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple, output: tuple) -> tuple:
                logits = output[0]
                chosen = indices[layer, seen[layer] : seen[layer] + logits.shape[0]]
                seen[layer] += logits.shape[0]
                weights = logits.float().softmax(-1).gather(-1, chosen)
                return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), chosen

            return hook

        for number, layer in enumerate(self.model.model.layers):
            hooks.append(layer.mlp.gate.register_forward_hook(forced(number)))
        yield
        for hook in hooks:
            hook.remove()


def peer(name: str) -> Any:
    return {"ours": Ours, "ours packed": Packed, "transformers": Transformers}[name]()


@torch.inference_mode()
def truth(folder: Path, ids: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Logits [keep, vocabulary] of the last tokens and the routing [layers, tokens, top_k], all in float32.

    It is transformers' code, with the tensors that the files store in float32 (loading in bfloat16 has rounded A_log).
    """
    transformers = Transformers()
    transformers.load(folder)
    hidden, chosen = widened(transformers.model, ids, float32_tensors(folder))
    return head(transformers.model, hidden[0, -keep:]), chosen


def widened(model: Any, ids: Tensor, exact: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, T, D] of transformers' model in float32, and its routing [layers, B * T, top_k].

    One layer at a time is converted to float32 while it runs. exact: tensors to take instead, by their names on disk.
    """
    chosen: list[Tensor] = []
    narrow: dict[str, Tensor] = {}
    hooks: list[Any] = []

    def widen(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            for key, parameter in module.named_parameters():
                narrow[key] = parameter.data
                parameter.data = (exact or {}).get(f"model.language_model.{name}.{key}", parameter.data).float()

        return hook

    def restore(module: nn.Module, args: tuple, output: Any) -> None:
        for key, parameter in module.named_parameters():
            parameter.data = narrow.pop(key)

    hooks.append(model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.float()))
    parts = {f"layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    for name, module in {**parts, "norm": model.model.norm}.items():
        hooks.append(module.register_forward_pre_hook(widen(name)))
        hooks.append(module.register_forward_hook(restore))
    for layer in parts.values():
        if hasattr(layer.mlp, "gate"):
            hooks.append(layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2])))
    hidden = model.model(ids, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return hidden, torch.stack(chosen) if chosen else torch.empty(0)


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits in float32 of hidden states [N, D], by parts of the vocabulary."""
    rows = model.lm_head.weight.split(1 << 14)
    return torch.cat([hidden @ part.float().T for part in rows], dim=-1)


def float32_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors stored in float32: A_log and the norm of each Gated DeltaNet layer."""
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    stored = {}
    for name, file in index.items():
        if name.endswith((".A_log", ".linear_attn.norm.weight")):
            with safe_open(folder / file, "pt") as tensors:
                stored[name] = tensors.get_tensor(name)
    return stored


def seconds(function: Any, *args: Any) -> tuple[float, float, Any]:
    """(wall-clock seconds, CPU seconds of all threads, result)."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function(*args)
    return time.perf_counter() - wall, time.process_time() - cpu, result
