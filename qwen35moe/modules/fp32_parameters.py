"""Parameters that stay float32 in a bfloat16 model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class FP32Parameters(nn.Module):
    """A module whose parameters named in `fp32_parameters` are float32 at least, whatever `.to(...)` or a checkpoint asks for.

    `.double()` widens them, `.to(bfloat16)` and `.half()` leave them in float32 with every digit. `stored_dtypes` is
    the dtypes in the checkpoint, which are written back where that loses nothing.
    """

    fp32_parameters: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.stored_dtypes: dict[str, torch.dtype] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: self._parameters[name] for name in self.fp32_parameters}
        kept = {name: None if p is None else p.data for name, p in before.items()}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            parameter = self._parameters[name]
            if data is None or parameter is None:
                continue
            wanted = torch.promote_types(torch.float32, parameter.dtype)
            if parameter.dtype == wanted:
                continue
            if data.is_meta:  # to_empty: there are no values to keep
                parameter.data = torch.empty_like(parameter, dtype=wanted)
            else:
                parameter.data = data.to(parameter.device, wanted)
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to(wanted)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        widened = dict(state_dict)
        for name in self.fp32_parameters:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                widened[prefix + name] = value.to(torch.promote_types(torch.float32, value.dtype))
        super()._load_from_state_dict(widened, prefix, *rest)
