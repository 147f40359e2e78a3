"""What a parameter may be stored in, by the names that files have for it."""

from __future__ import annotations

import torch

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
