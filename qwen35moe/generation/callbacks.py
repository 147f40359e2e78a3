"""Calls the caller's functions and checks their results: a logits processor's scores, a stopping criterion's truth values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat import short


def scores_of(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    """processor(ids, scores) [B, vocabulary] on `scores`' device, in the wider of both dtypes; else ValueError."""
    shape = scores.shape
    new = processor(ids, scores)
    if not isinstance(new, Tensor):
        hint = " (return the scores, also after changing them in place)" if new is None else ""
        raise ValueError(
            f"the logits processor {_name(processor)} returned {type(new).__name__}, expected scores {list(shape)}{hint}"
        )
    if new.shape != shape or not new.is_floating_point():
        raise ValueError(
            f"the logits processor {_name(processor)} returned {list(new.shape)} {new.dtype}, expected floating-point scores "
            f"{list(shape)}"
        )
    return new.to(scores.device, torch.promote_types(new.dtype, scores.dtype))


def verdicts(criterion: Any, ids: Tensor, scores: Any, rows: int) -> Tensor:
    """criterion(ids, scores): [] or [B] bool on the device of `ids`.

    As in transformers one truth value stands for all rows. [B, 1] is read as [B], and integers as truth values if they are
    0 and 1. ValueError for anything else.
    """
    result = criterion(ids, scores)
    try:
        verdict = result if isinstance(result, Tensor) else torch.as_tensor(result, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        verdict = None
    if verdict is None or verdict.is_floating_point() or verdict.is_complex():
        raise ValueError(
            f"the stopping criterion {_name(criterion)} returned {short(result)}, expected True, False or [{rows}] bool"
        )
    if verdict.shape == (rows, 1):
        verdict = verdict[:, 0]
    if verdict.shape not in ((), (1,), (rows,)):
        raise ValueError(
            f"the stopping criterion {_name(criterion)} returned {list(verdict.shape)} values for {rows} rows: return one "
            f"truth value, or [{rows}]"
        )
    if verdict.dtype != torch.bool and bool(((verdict != 0) & (verdict != 1)).any()):
        raise ValueError(f"the stopping criterion {_name(criterion)} returned {short(result)}: return truth values, or 0 and 1")
    return verdict.to(ids.device, torch.bool)


def _name(function: Any) -> str:
    return short(getattr(function, "__name__", type(function).__name__))
