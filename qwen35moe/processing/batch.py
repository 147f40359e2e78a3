"""`BatchEncoding`: what tokenizers and processors return, a dict that also moves to a device and reads keys as attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BatchEncoding(dict[str, Any]):
    """A model's inputs by name, as transformers' BatchEncoding and BatchFeature hold them.

    inputs = tokenizer(texts, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs)                      # a dict
    length = inputs.input_ids.shape[1]                  # the same as inputs["input_ids"]
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    @property
    def data(self) -> dict[str, Any]:
        """The mapping itself, under transformers' name."""
        return self

    def to(
        self, device: Any = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> BatchEncoding:
        """Moves every tensor to `device` and casts those of floating point (pixel_values) to `dtype`, in this object; ids
        and masks keep their dtype. `to(torch.bfloat16)` casts only. ValueError for anything else.

        Each tensor is one transfer. With non_blocking=True and pinned memory (`pin_memory()`, or a DataLoader's) the host does
        not wait for a GPU, and the cast runs there."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"to() casts to dtypes of floating point, got {dtype!r}")
        if device is not None:
            try:
                device = torch.device(device)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"to() takes a device and a dtype, got {device!r}: {str(error)[:100]}") from None
        for name, value in self.items():
            if isinstance(value, Tensor):
                cast = dtype if value.is_floating_point() else None
                self[name] = value.to(device=device, dtype=cast, non_blocking=non_blocking)
        return self

    def pin_memory(self, device: Any = None) -> BatchEncoding:
        """Copies every tensor of the CPU to pinned memory, in this object, so that `to(device, non_blocking=True)` does not
        wait."""
        for name, value in self.items():
            if isinstance(value, Tensor) and value.is_cpu:
                self[name] = value.pin_memory()
        return self

    def convert_to_tensors(self, tensor_type: Any = "pt") -> BatchEncoding:
        """Makes tensors of the lists, in this object. ValueError for rows of different lengths."""
        for name, value in self.items():
            self[name] = as_tensor(name, value, tensor_kind(tensor_type))
        return self

    def copy(self) -> BatchEncoding:
        return BatchEncoding(self)

    def __repr__(self) -> str:
        return f"BatchEncoding({', '.join(f'{name}={_shown(value)}' for name, value in self.items())})"


def tensor_kind(value: Any) -> str | None:
    """"pt", "np" or None of a value of return_tensors; transformers' TensorType is a str too. ValueError for others."""
    kind = getattr(value, "value", value)
    if kind not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {str(kind)[:40]!r}")
    return kind


def as_tensor(name: str, value: Any, kind: str | None) -> Any:
    """A list (of rows) or a tensor as an int64 tensor or array; kind None: as it is."""
    if kind is None:
        return value
    if not isinstance(value, Tensor):
        lengths = {len(row) for row in value if isinstance(row, (list, tuple))}
        if len(lengths) > 1:
            raise ValueError(f"{name}: rows of {min(lengths)} to {max(lengths)} tokens do not form a tensor: pass padding=True")
        value = torch.tensor(value, dtype=torch.float32 if _has_floats(value) else torch.int64, device="cpu")
    return value.cpu().numpy() if kind == "np" else value


def _has_floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_floats, value))
    return isinstance(value, float)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{place}"
    text = repr(value)
    return text if len(text) <= 80 else text[:76] + " ..."
