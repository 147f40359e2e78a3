"""Taps under activation checkpointing: a recomputation applies the patches of its forward and records nothing twice.

This holds even when the patches' with-blocks have ended before the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .active import ACTIVE, Tap, current_taps, recomputations, rows


class _Recomputation(Tap):
    """Around a recomputation: the taps of its forward apply. May be entered repeatedly.

    It is a tap without targets: its presence in ACTIVE makes `tap` look for the taps of the forward.
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = tuple(taps)
        self.rows = rows.shape, rows.lengths  # of the forward, which runs on another thread

    def __enter__(self) -> _Recomputation:
        recomputations.taps.append(self.taps)
        rows.shape, rows.lengths = self.rows
        return super().__enter__() if self.taps else self

    def __exit__(self, *exc: object) -> None:
        recomputations.taps.pop()
        super().__exit__()


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=taps.checkpoint_contexts)`."""
    return nullcontext(), _Recomputation(current_taps() if ACTIVE else ())
