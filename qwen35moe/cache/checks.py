"""Checks of the numbers with which a cache is made and reordered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen35moe.compat import short


def check_new_cache(batch_size: object, max_length: object, record: object) -> None:
    """ValueError for sizes of a new cache that are no whole numbers or too small. max_length may be None."""
    for number, least in ((batch_size, 1), (1 if max_length is None else max_length, 1), (record, 0)):
        if not hasattr(number, "__index__") or isinstance(number, bool) or number < least:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(
                f"a cache needs batch_size={short(batch_size)} >= 1, max_length={short(max_length)} >= 1 or None, and "
                f"record={short(record)} >= 0, whole numbers"
            )


def row_numbers(rows: Sequence[int] | Tensor, batch_size: int, device: torch.device) -> tuple[Tensor, list[int] | None]:
    """Rows as a tensor [rows] of int64 on the device, and as a list; None for a tensor on a GPU, which asserts its values.

    ValueError for anything but numbers 0 ... batch_size - 1. An empty list is one.
    """
    try:
        index = rows if isinstance(rows, Tensor) else torch.as_tensor(rows, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        index = None
    right = index is not None and index.dim() == 1
    if index is not None and right and index.numel():
        right = not index.is_floating_point() and index.dtype != torch.bool
    if index is not None and right:
        inside = ((index >= 0) & (index < batch_size)).all()
        if index.is_cuda:
            torch._assert_async(inside, f"rows are not 0 ... {batch_size - 1}")  # pyright: ignore[reportPrivateImportUsage]
        else:
            right = bool(inside)
    if index is None or not right:
        raise ValueError(f"rows {short(rows)} are not a list of rows 0 ... {batch_size - 1}")
    numbers = index.tolist() if index.is_cpu else None
    return index.to(device, torch.long, non_blocking=device.type != "cpu"), numbers
