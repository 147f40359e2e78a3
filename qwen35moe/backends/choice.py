"""Choosing and running: a model's own choice, then `use`, then the first implementation without an unsupported.

The choices are process-wide and deliberately neither thread-local nor a context variable: autograd runs backward, and
with it the recomputation of checkpointed layers, on worker threads of its own. Only inside a recomputation do the
choices of the forward that it repeats hold, on the thread that runs it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils.checkpoint

from qwen35moe import taps

from . import table
from .calls import RECORDING, Call
from .table import AUTO, TABLE, Implementation, find, operation_name, tensors

log = logging.getLogger("qwen35moe.backends")

_choices: dict[str, str] = {}  # backends.use: operation -> name; absent means "auto"
_said: set[str | tuple[str, str]] = set()  # operations, and (operation, refused implementation), already logged
LAST: dict[str, Implementation] = {}  # what ran last, for describe()
REFUSED: dict[tuple[str, str], str] = {}  # why an implementation was last passed over, for describe()
_recomputing: list[object] = []  # recomputations in progress; on their own thread, the choices of their forward hold
_thread = threading.local()


def unregister(operation: str, name: str) -> None:
    """Remove an implementation again. A process-wide choice of it goes back to "auto"; a model's own choice raises."""
    table.unregister(operation, name)
    if _choices.get(operation_name(operation)) == name:
        del _choices[operation_name(operation)]


def run(operation: str, *args: Any, caller: Any = None, **kwargs: Any) -> Any:
    """Run `operation` on these arguments with the implementation that is chosen for them.

    caller: the nn.Module that calls. Its `backend_choices` beat `backends.use`, its `path` names the layer in `ran()`,
    and what is listened to on it decides about implementations that go around named values.
    """
    entry, refused = _choose(operation, args, kwargs, caller)
    # Compiling is asked first: torch.compile would guard on every list that is looked at.
    if not torch.compiler.is_compiling() and (refused or RECORDING or LAST.get(operation) is not entry):
        _note(entry, refused, args, kwargs, caller)
    return entry.fn(*args, **kwargs)  # type: ignore[misc]


def resolve(operation: str, *args: Any, caller: Any = None, **kwargs: Any) -> Implementation:
    """The implementation that `run` would call with these arguments; ValueError with the reasons if there is none."""
    return _choose(operation, args, kwargs, caller)[0]


_Refusals = Sequence[tuple[Implementation, str, bool]]  # who was passed over, why, and whether it could have run


def _choose(operation: str, args: tuple, kwargs: dict[str, Any], caller: Any) -> tuple[Implementation, _Refusals]:
    """The chosen implementation, and those before it with the reasons why they were passed over."""
    if not table.loaded:
        table.prepare()  # before the table is looked at: torch.compile takes what it saw first
    if operation not in TABLE:
        operation = operation_name(operation)
    choice = choice_of(operation, caller)
    if choice is not None:
        entry = find(operation, choice)
        if reason := entry.refusal(args, kwargs, caller):
            raise ValueError(f"backend={choice!r} cannot run {operation}: {reason}")
        return entry, ()
    refused = []
    for entry in TABLE[operation]:
        reason = entry.refusal(args, kwargs, caller) if entry.conditional else None
        slower = entry.passed_over(args, kwargs) if reason is None else None
        if reason is None and slower is None:
            return entry, refused
        refused.append((entry, reason or slower or "", reason is None))
    for entry, _, could in refused:
        if could:
            return entry, ()  # nothing faster can run
    reasons = "; ".join(f"{entry.name}: {reason}" for entry, reason, _ in refused) or "none is registered"
    raise ValueError(f"no implementation can run {operation}: {reasons}")


def choice_of(operation: str, caller: Any = None) -> str | None:
    """The name chosen for an operation, None for "auto"."""
    if caller is not None:
        own = caller.__dict__.get("backend_choices")
        if own and operation in own:
            return None if own[operation] == AUTO else own[operation]
    return (_here() if _recomputing else _choices).get(operation)


def _note(entry: Implementation, refused: _Refusals, args: tuple, kwargs: dict[str, Any], caller: Any) -> None:
    """Record the call, remember it for `describe`, and log: each operation once, and each refused fast path once."""
    operation = entry.operation
    LAST[operation] = entry
    if RECORDING:
        path = "" if caller is None else caller.__dict__.get("path") or ""
        call = Call(operation, entry.name, path, tuple(tuple(tensor.shape) for tensor in tensors(args, kwargs)))
        for recording in tuple(RECORDING):
            recording.calls.append(call)
    news = []
    for other, reason, could in refused:
        REFUSED[operation, other.name] = reason
        if not could and not other.missing and not other.own and (operation, other.name) not in _said:
            news.append(other)
    if not news and operation in _said:
        return
    _said.add(operation)
    _said.update((operation, other.name) for other in news)
    why = "; ".join(
        f"{other.name} was {'passed over' if could else 'refused'}: {reason}" for other, reason, could in refused
    )
    level = logging.WARNING if news else logging.INFO
    log.log(level, "%s runs on %r%s", operation, entry.name, f" ({why})" if why else "")


def checked_choices(choices: Mapping[str, str]) -> dict[str, str]:
    """The choices with aliases resolved; ValueError for unknown operations and implementations, with the known ones."""
    result = {}
    for operation, name in choices.items():
        operation = operation_name(operation)
        if name != AUTO:
            find(operation, name)
        result[operation] = name
    return result


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
            self._before = {operation: _choices.get(operation, AUTO) for operation in self.choices}
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
            _choices.pop(operation, None)
        else:
            _choices[operation] = name


class _Recompute(AbstractContextManager[None]):
    """Around a recomputation: the choices and the listeners of its forward hold again. May be entered repeatedly."""

    def __init__(self, listeners: AbstractContextManager[None]) -> None:
        self.listeners = listeners
        self.choices = dict(_here())
        self.before: list[dict[str, str] | None] = []

    def __enter__(self) -> None:
        self.listeners.__enter__()
        self.before.append(getattr(_thread, "choices", None))
        if self.choices != _here():  # else nothing to do, and compiled layers keep their guards
            _thread.choices = self.choices
            _recomputing.append(self)

    def __exit__(self, *exc: Any) -> None:
        before = self.before.pop()
        if self in _recomputing:
            _recomputing.remove(self)
            _thread.choices = before
        self.listeners.__exit__(*exc)


def _here() -> dict[str, str]:
    """The choices that hold on this thread: those of `use`, or of the forward that is being recomputed."""
    own = getattr(_thread, "choices", None) if _recomputing else None
    return _choices if own is None else own


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The context_fn of `torch.utils.checkpoint.checkpoint`: (forward, recomputation).

    The recomputation makes the choices of the forward again, even when their with-block has ended: another
    implementation there would save other tensors. Includes `taps.checkpoint_contexts`.
    """
    forward, recompute = taps.checkpoint_contexts()
    return forward, _Recompute(recompute)


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), computed again in backward instead of kept (non-reentrant activation checkpointing).

    Under torch.compile it is the graph that is computed again, choices and taps included: no context is needed there,
    and none but dispatch modes are accepted.
    """
    if torch.compiler.is_compiling():
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=checkpoint_contexts)
