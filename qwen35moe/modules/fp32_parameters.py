"""Parameters that stay float32 in a bfloat16 model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen35moe.modules.initialise import Initialised


def new_fp32(*shape: int, value: float = 0.0) -> nn.Parameter:
    """A parameter that stays float32: float32 at least, whatever torch's default dtype is."""
    return nn.Parameter(torch.full(shape, value, dtype=torch.promote_types(torch.float32, torch.get_default_dtype())))


class FP32Parameters(Initialised):
    """A module whose parameters named in `fp32_parameters` stay float32 at least, after `.to(...)` and after loading.

    `.double()` makes them float64; `.to(bfloat16)` and `.half()` do not change them. `stored_dtypes`: their dtypes in the
    checkpoint, in which they are saved again if that is exact.
    """

    fp32_parameters: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.stored_dtypes: dict[str, torch.dtype] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # A parametrized parameter is not here: torch moves its original, in the dtype of the rest.
        parameters = {name: self._parameters.get(name) for name in self.fp32_parameters}
        original = {name: None if parameter is None else parameter.data for name, parameter in parameters.items()}
        super()._apply(fn, recurse)
        for name, data in original.items():
            parameter = self._parameters.get(name)
            if data is None or parameter is None:
                continue
            dtype = torch.promote_types(torch.float32, parameter.dtype)
            if parameter.dtype == dtype:
                continue
            if data.is_meta:  # to_empty: no values to keep
                parameter.data = torch.empty_like(parameter, dtype=dtype)
            else:
                parameter.data = data.to(parameter.device, dtype)
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to(dtype)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        widened = dict(state_dict)
        for name in self.fp32_parameters:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                widened[prefix + name] = value.to(torch.promote_types(torch.float32, value.dtype))
        super()._load_from_state_dict(widened, prefix, *rest)
