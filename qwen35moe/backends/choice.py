"""Choosing implementations by name: `use` for the process, and the choices of a forward that is recomputed in backward.

The choices are process-wide, and deliberately neither thread-local nor a context variable: autograd runs the backward, and
with it the recomputation of checkpointed layers, on its own worker threads. The exception is a recomputation: on its thread the
choices of its forward apply.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint

from qwen35moe import taps

from .operation import AUTO, CHOICES, current_choices, recomputing, thread
from .registry import checked_choices


@dataclass(eq=False)
class _Entry:
    """The choice of one `use` for one operation. owner: a reference to that `use`; it gives None after the `use` is
    gone, and then nothing can end the choice."""

    name: str
    owner: Callable[[], use | None]
    thread: int

    @property
    def permanent(self) -> bool:
        """Whether it was a statement, whose `use` is gone."""
        return self.owner() is None


_stacks: dict[str, list[_Entry]] = {}  # operation -> what was chosen before all, then by every `use`, in order
_lock = threading.RLock()  # around changes of _stacks and CHOICES


class use(AbstractContextManager["use"]):
    """Choose implementations by name: `use(experts="sorted", delta_rule="auto")`.

    As a statement it sets the process default; as a context manager its choices end with the block, and with them those of
    statements inside it. Blocks may overlap (threads, generators, tasks): each end takes back its own choices alone, and the
    latest of the others applies. Process-wide in both cases: other threads use them too.
    """

    def __init__(self, **choices: str) -> None:
        self.choices = checked_choices(choices)
        self.entered = False
        self._begin()

    def _begin(self) -> None:
        with _lock:
            for operation, name in self.choices.items():
                stack = _stacks.setdefault(operation, [])
                current = CHOICES.get(operation, AUTO)
                if not stack or stack[-1].name != current:  # changed by other means than `use`, such as `unregister`
                    stack[:] = [_Entry(current, lambda: None, 0)]
                if not any(entry.owner() is self for entry in stack):
                    stack.append(_Entry(name, weakref.ref(self), threading.get_ident()))
                while len(stack) > 1 and stack[1].permanent:  # nothing below it can come back
                    del stack[0]
                _choose(operation, stack[-1].name)

    def __enter__(self) -> use:
        self.entered = True
        self._begin()
        return self

    def __exit__(self, *exc: object) -> None:
        self.entered = False
        with _lock:
            for operation in self.choices:
                stack = _stacks.get(operation, [])
                own = next((i for i, entry in enumerate(stack) if entry.owner() is self), None)
                if own is None or stack[-1].name != CHOICES.get(operation, AUTO):
                    continue
                thread, above = stack[own].thread, stack[own + 1 :]
                stack[own:] = [entry for entry in above if entry.thread != thread or _entered(entry)]
                _choose(operation, stack[-1].name)


def _entered(entry: _Entry) -> bool:
    owner = entry.owner()
    return owner is not None and owner.entered


def _choose(operation: str, name: str) -> None:
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
