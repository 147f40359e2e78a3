"""Experts whose matrices are packed, and the bare products of a case in every form that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tools.limits import pack
from qwen35moe.ops.cpu import packed_weight, products

PRODUCTS = "products alone"  # beginning of the names of the bare products


class Packed:
    """A form that packs each set of weights once, before it is timed, and then runs `function` on the packed matrices."""

    def __init__(self, function: Callable[[Tensor, Any, Any, Tensor, Tensor], Tensor], library: bool = False) -> None:
        """library: packed as `model.pack_weights()` does, else matrix by matrix for the case's number of rows."""
        self.function, self.library = function, library

    def refusal(self, gate_up: Tensor) -> str | None:
        """The reason why these weights cannot be packed."""
        if not gate_up.is_cpu:
            return f"packed weights are for CPUs, the weights are on {gate_up.device}"
        if gate_up.requires_grad:
            return "packed weights are for inference"
        if self.library:
            return packed_weight.refusal(gate_up.dtype)
        if pack(gate_up[0, :2], 1) is None:
            return f"oneDNN has no products of {gate_up.dtype} on this processor: nothing can be packed"
        return None

    def matrices(self, gate_up: Tensor, down: Tensor, rows: int) -> Any:
        """The packed matrices of one set of weights; another set of the case is packed at its first use."""
        key = (gate_up.data_ptr(), self.library)
        if key not in _PACKED:
            both = (gate_up, down)
            _PACKED[key] = [packed_weight.pack(weight) if self.library else _packed(weight, rows) for weight in both]
        return _PACKED[key]

    def __call__(self, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        up, back = self.matrices(gate_up, down, max(1, indices.numel() // len(gate_up)))
        return self.function(hidden, up, back, indices, weights)


_PACKED: dict[tuple[int, bool], Any] = {}  # (address of the weights, by the library) -> both packed weights of a case


def _packed(weights: Tensor, rows: int) -> list[Tensor]:
    matrices = [pack(weight, rows) for weight in weights.unbind()]
    return [matrix for matrix in matrices if matrix is not None]


def forget() -> None:
    """Release the packed matrices of a case."""
    _PACKED.clear()


def by_hand(hidden: Tensor, up: Sequence[Tensor], down: Sequence[Tensor], indices: Tensor, weights: Tensor) -> Tensor:
    """One product per expert on its rows, nothing fused: what packing alone gives."""
    product, out = products.FORMS["packed"], torch.zeros_like(hidden, dtype=torch.float32)
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    for expert, rows in enumerate(order.split(torch.bincount(flat, minlength=len(up)).tolist())):
        if len(rows):
            token = rows // indices.shape[1]
            gate, value = product(hidden[token], up[expert], None).chunk(2, dim=-1)
            scaled = product(F.silu(gate) * value, down[expert], None) * weights.reshape(-1)[rows, None]
            out.index_add_(0, token, scaled.float())
    return out.to(hidden.dtype)


def bare(
    hidden: Tensor, gate_up: Sequence[Tensor] | Tensor, down: Sequence[Tensor] | Tensor, indices: Tensor, weights: Tensor, *,
    form: products.Form,
) -> Tensor:
    """Only the two products of each expert of the case, on arbitrary rows that stay in cache."""
    counts = torch.bincount(indices.reshape(-1), minlength=len(gate_up)).tolist()
    inner = int(down[0].shape[-1])
    rows = hidden[:1].expand(max(counts), -1).contiguous()
    act = rows[:, :1].expand(-1, inner).contiguous()
    up, out = rows.new_empty(len(rows), 2 * inner), torch.empty_like(rows)
    for expert, n in enumerate(counts):
        if n:
            form(rows[:n], gate_up[expert], up[:n])
            form(act[:n], down[expert], out[:n])
    return out


def bare_products(weight: Tensor) -> dict[str, Callable[..., Tensor]]:
    """The bare products of a forward by every form that multiplies such a weight here, and by the library's own choice."""
    forms: dict[str, Callable[..., Tensor]] = {f"{PRODUCTS}, chosen form": partial(bare, form=products.product)}
    for name in ("torch", "onednn", "widened"):
        if weight.is_cpu and products.refusal(name, 8, weight) is None:
            forms[f"{PRODUCTS}, {name}"] = partial(bare, form=products.FORMS[name])
    if weight.is_cpu and pack(weight[:2], 1) is not None:
        forms[f"{PRODUCTS}, packed"] = Packed(partial(bare, form=products.FORMS["packed"]))
    return forms
