"""Choosing implementations by name: `use` for the process, and the choices of a forward that is recomputed in backward.

The choices are process-wide and deliberately neither thread-local nor a context variable: autograd runs backward, and
with it the recomputation of checkpointed layers, on worker threads of its own. Only inside a recomputation do the
choices of the forward that it repeats hold, on the thread that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils.checkpoint

from qwen35moe import taps

from .operation import AUTO, CHOICES, checked_choices, current_choices, recomputing, thread


class use(AbstractContextManager["use"]):
    """Choose implementations by name: `use(experts="sorted", delta_rule="auto")`.

    As a statement it sets the process default; as a context manager the choices hold inside the block and the former
    ones return at its end. Process-wide either way: other threads see them too.
    """

    def __init__(self, **choices: str) -> None:
        self.choices = checked_choices(choices)
        self._before: dict[str, str] | None = None
        self._begin()

    def _begin(self) -> None:
        if self._before is None:
            self._before = {operation: CHOICES.get(operation, AUTO) for operation in self.choices}
            _apply(self.choices)

    def __enter__(self) -> use:
        self._begin()
        return self

    def __exit__(self, *exc: object) -> None:
        _apply(self._before or {})
        self._before = None


def _apply(choices: Mapping[str, str]) -> None:
    for operation, name in choices.items():
        if name == AUTO:
            CHOICES.pop(operation, None)
        else:
            CHOICES[operation] = name


class _Recompute(AbstractContextManager[None]):
    """Around a recomputation: the choices and the taps of its forward hold again. May be entered repeatedly."""

    def __init__(self, active_taps: AbstractContextManager[None]) -> None:
        self.active_taps = active_taps
        self.choices = dict(current_choices())
        self.before: list[dict[str, str] | None] = []

    def __enter__(self) -> None:
        self.active_taps.__enter__()
        self.before.append(getattr(thread, "choices", None))
        if self.choices != current_choices():  # else nothing to do, and compiled layers keep their guards
            thread.choices = self.choices
            recomputing.append(self)

    def __exit__(self, *exc: Any) -> None:
        before = self.before.pop()
        if self in recomputing:
            recomputing.remove(self)
            thread.choices = before
        self.active_taps.__exit__(*exc)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The context_fn of `torch.utils.checkpoint.checkpoint`: (forward, recomputation).

    The recomputation makes the choices of the forward again, even when their with-block has ended: another
    implementation would save other tensors. Includes `taps.checkpoint_contexts`.
    """
    forward, recompute = taps.checkpoint_contexts()
    return forward, _Recompute(recompute)


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), computed again in backward instead of kept (non-reentrant activation checkpointing).

    Under torch.compile the graph is computed again, choices and taps included: no context is needed there, and none but
    dispatch modes are accepted.
    """
    if torch.compiler.is_compiling():
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=checkpoint_contexts)
