"""Breakdown of a forward's time: seconds of each part, without the time of the parts inside it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

# functions that transformers looks up in its modelling module, and the names of our operations
FUNCTIONS = {
    "torch_chunk_gated_delta_rule": "gated_delta_rule",
    "torch_recurrent_gated_delta_rule": "gated_delta_rule",
    "causal_conv1d_fn": "short_convolution",
    "causal_conv1d_update": "short_convolution",
    "apply_rotary_pos_emb": "rotary",
}
KINDS = {"RMSNormGated": "gated_rms_norm", "RMSNorm": "rms_norm", "Experts": "experts", "TopKRouter": "router"}


class Breakdown:
    """A context manager that times modules by hooks and operations by wrapping them. One thread."""

    def __init__(self, model: nn.Module, peer: str) -> None:
        self.model, self.peer = model, peer
        self.own: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open: list[list[Any]] = []  # [name, started, seconds of inner parts]
        self._undo: list[Callable[[], None]] = []

    def clear(self) -> None:
        self.own.clear()
        self.calls.clear()

    def table(self, wall: float, times: int = 1) -> dict[str, dict[str, float]]:
        """Part -> milliseconds and calls per repetition, the most expensive first; "rest" is the time outside all parts."""
        parts = {name: {"ms": s / times * 1e3, "calls": self.calls[name] / times} for name, s in self.own.items()}
        parts["rest"] = {"ms": (wall - sum(self.own.values())) / times * 1e3, "calls": 1}
        parts["total"] = {"ms": wall / times * 1e3, "calls": 1}
        return dict(sorted(parts.items(), key=lambda item: -item[1]["ms"]))

    def _enter(self, name: str) -> None:
        self._open.append([name, time.perf_counter(), 0.0])

    def _leave(self) -> None:
        name, started, inner = self._open.pop()
        taken = time.perf_counter() - started
        self.own[name] += taken - inner
        self.calls[name] += 1
        if self._open:
            self._open[-1][2] += taken

    def _wrapped(self, function: Callable, name: str | None = None) -> Callable:
        """`name` None: the function is a method of `Operation`, whose name is taken."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(name or args[0].name)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return timed

    def _replace(self, owner: Any, name: str, label: str | None) -> None:
        original = getattr(owner, name)
        setattr(owner, name, self._wrapped(original, label))
        self._undo.append(lambda: setattr(owner, name, original))

    def _hook(self, module: nn.Module, label: str) -> None:
        before = module.register_forward_pre_hook(lambda m, args: self._enter(label))
        after = module.register_forward_hook(lambda m, args, output: self._leave())
        self._undo += [before.remove, after.remove]

    def __enter__(self) -> Breakdown:
        for name, module in self.model.named_modules():
            kind, last = type(module).__name__.removeprefix("Qwen3_5Moe"), name.rpartition(".")[2]
            if isinstance(module, nn.Linear):
                shared = "shared_expert." if ".shared_expert." in name else ""
                self._hook(module, shared + last)
            elif last in ("linear_attn", "self_attn", "mlp", "embed_tokens"):
                self._hook(module, f"{last} (rest)" if last != "embed_tokens" else last)
            elif self.peer == "transformers" and kind in KINDS:
                self._hook(module, KINDS[kind])
        if self.peer == "ours":
            from qwen35moe.backends.operation import Operation

            self._replace(Operation, "__call__", None)
            self._replace(Operation, "fused", None)
        else:
            from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as theirs

            for function, label in FUNCTIONS.items():
                self._replace(theirs, function, label)
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        while self._undo:
            self._undo.pop()()
