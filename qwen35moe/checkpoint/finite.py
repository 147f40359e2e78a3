"""NaN and infinity in stored weights, on request: it reads every byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .convert import stored_numbers
from .dtypes import TORCH_DTYPES
from .headers import StoredTensor
from .problems import Problem


def not_finite(tensors: Iterable[StoredTensor]) -> Iterator[Problem]:
    """A problem for every tensor that contains NaN or infinity; 32 MiB are read at a time."""
    for tensor in tensors:
        if tensor.dtype not in TORCH_DTYPES:
            continue
        count, first, example, at = 0, -1, 0.0, 0
        for numbers in stored_numbers(tensor):
            wide = numbers.float() if numbers.dtype.itemsize == 1 else numbers
            if not torch.isfinite(wide).all():
                bad = (~torch.isfinite(wide)).nonzero().flatten()
                if first < 0:
                    first, example = at + int(bad[0]), wide[bad[0]].item()
                count += len(bad)
            at += len(numbers)
        if count:
            place = torch.tensor(first, device="cpu")
            index = [int(i) for i in torch.unravel_index(place, tensor.shape)] if tensor.shape else []
            yield Problem("not finite", tensor.name, f"{example} at {index}" + (f", and {count - 1} more" if count > 1 else ""))
