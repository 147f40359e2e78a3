"""Choosing implementations by name: `use` for the process, and the choices of a forward that is recomputed in backward.

The choices are process-wide, and deliberately neither thread-local nor a context variable: autograd runs the backward, and
with it the recomputation of checkpointed layers, on its own worker threads. The exception is a recomputation: on its thread the
choices of its forward apply.
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

    As a statement it sets the process default; as a context manager it restores the previous choices at the end of the block.
    Process-wide in both cases: other threads use them too.
    """

    def __init__(self, **choices: str) -> None:
        self.choices = checked_choices(choices)
        self._previous: dict[str, str] | None = None
        self._begin()

    def _begin(self) -> None:
        if self._previous is None:
            self._previous = {operation: CHOICES.get(operation, AUTO) for operation in self.choices}
            _apply(self.choices)

    def __enter__(self) -> use:
        self._begin()
        return self

    def __exit__(self, *exc: object) -> None:
        _apply(self._previous or {})
        self._previous = None


def _apply(choices: Mapping[str, str]) -> None:
    for operation, name in choices.items():
        if name == AUTO:
            CHOICES.pop(operation, None)
        else:
            CHOICES[operation] = name


class _Recompute(AbstractContextManager[None]):
    """Around a recomputation: restores the choices and the taps of its forward. May be entered repeatedly."""

    def __init__(self, active_taps: AbstractContextManager[None]) -> None:
        self.active_taps = active_taps
        self.choices = dict(current_choices())
        self.previous: list[dict[str, str] | None] = []

    def __enter__(self) -> None:
        self.active_taps.__enter__()
        self.previous.append(getattr(thread, "choices", None))
        if self.choices != current_choices():  # otherwise unchanged, so that the guards of compiled layers hold
            thread.choices = self.choices
            recomputing.append(self)

    def __exit__(self, *exc: Any) -> None:
        previous = self.previous.pop()
        if self in recomputing:
            recomputing.remove(self)
            thread.choices = previous
        self.active_taps.__exit__(*exc)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The context_fn of `torch.utils.checkpoint.checkpoint`: (forward, recomputation).

    The recomputation uses the choices of the forward, even after the end of their with-block: another implementation would save
    other tensors. Includes `taps.checkpoint_contexts`.
    """
    forward, recompute = taps.checkpoint_contexts()
    return forward, _Recompute(recompute)


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) with non-reentrant activation checkpointing: recomputed in backward.

    Under torch.compile the traced graph is recomputed, with its choices and taps: no context is needed, and torch accepts only
    dispatch modes.
    """
    if torch.compiler.is_compiling():
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=checkpoint_contexts)
