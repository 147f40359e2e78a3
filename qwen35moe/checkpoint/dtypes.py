"""The dtypes of stored weights, by the codes that safetensors files use for them."""

from __future__ import annotations

import torch

from .blocks import FP8

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TORCH_DTYPES = FLOATS | {FP8: torch.float8_e4m3fn}
CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


def name_of(dtype: torch.dtype) -> str:
    """bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def checked_dtype(dtype: str | torch.dtype | None, as_stored: tuple[str, ...] = ()) -> torch.dtype | None:
    """The torch.dtype of a parameter dtype or its name; None, like each name in `as_stored`, means the stored dtype."""
    if dtype is None or dtype in as_stored:
        return None
    torch_dtype = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if torch_dtype not in FLOATS.values():
        choices = ", ".join([*as_stored, *map(name_of, FLOATS.values())])
        raise ValueError(f"dtype={dtype!r} must be one of {choices}")
    return torch_dtype
