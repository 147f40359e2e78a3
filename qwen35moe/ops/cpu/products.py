"""x W^T on a CPU: the forms of the product, and which is the fastest for a number of rows. Used by `linear` and by the experts.

    torch        torch.mm
    split        float32 as a batch of products with parts of the weight: up to 2.5 times as fast as one product where torch
                 uses MKL (Zen 4 as AVX2), with the same error
    onednn       one float32 row through oneDNN, where torch uses a BLAS. With more rows its error is 1.2 to 2.2 times torch's
    gemv         one bfloat16 row through torch's own kernel, where torch uses oneDNN
    transposed   (W x^T)^T, for a few bfloat16 rows
    widened      half precision with the weight converted to float32, a block at a time: for processors without products in half
                 precision (AVX2), where torch's own are a quarter as fast as those in float32
    packed       a weight in oneDNN's own layout (see `packed_weight`), for a few rows

The torch operators of oneDNN are made for torch's compiler and are not part of its public API.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qwen35moe.backends import measured
from qwen35moe.backends.operation import choice_of

SMALL = 1 << 18  # numbers in a weight below which torch's own product runs: all forms take microseconds
_TINY = 1 << 12  # the same for a form that is not measured, of many rows
ROWS = (1, 4, 16, 64)  # upper ends of the kinds of calls that are measured apart
_FEW = 64  # rows up to which `transposed` is tried
_PART = 256  # rows of a weight in one of the products of `split`
_BLOCK = 1 << 20  # numbers of a weight that are widened at once: 4 MB in float32
_GRADIENT_BLOCK = 1 << 19  # the same in a backward, where the result or its terms are as large: 2 MB
_SAMPLE = 3 << 20  # numbers of a weight that a measurement reads at once, and
_OPERATIONS = 3 << 25  # products that it computes: about 1.5 ms
_SLOW = 1 << 25  # the same where torch's own products are slow
_HALF = (torch.bfloat16, torch.float16)
_TENSORS = (Tensor, nn.Parameter)
_switch = threading.Lock()  # held while oneDNN is disabled

_CHOSEN: dict[tuple[torch.dtype, int], str] = {}  # (dtype, range of rows) -> the fastest form

Form = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def torch_product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [N, D], weight [F, D]; returns [N, F], written into `out` if it is passed. The other forms have the same arguments."""
    return torch.mm(x, weight.t()) if out is None else torch.mm(x, weight.t(), out=out)


def onednn_product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """oneDNN's product, also of a tensor in oneDNN's layout."""
    y = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y if out is None else out.copy_(y)


def packed_product(x: Tensor, weight: Any, out: Tensor | None = None) -> Tensor:
    """oneDNN's product of a PackedMatrix, or of a tensor in oneDNN's layout."""
    return onednn_product(x, getattr(weight, "packed", weight), out)


def split_product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """One product of the batch for every _PART rows of the weight."""
    parts = len(weight) // _PART
    if parts < 2:
        return torch_product(x, weight, out)
    whole, out = parts * _PART, x.new_empty(len(x), len(weight)) if out is None else out
    y = torch.bmm(x.expand(parts, -1, -1), weight[:whole].view(parts, _PART, weight.shape[1]).mT)
    out[:, :whole].unflatten(1, (parts, _PART)).copy_(y.transpose(0, 1))
    if whole < len(weight):
        torch.mm(x, weight[whole:].t(), out=out[:, whole:])
    return out


def gemv_product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """One row, with oneDNN disabled. The switch is of the whole process: see `only_thread`."""
    with _switch:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            y = torch.mv(weight, x[0])[None] if out is None else torch.mv(weight, x[0], out=out[0])[None]
        finally:
            torch._C._set_mkldnn_enabled(before)
    return y if out is None else out


def transposed_product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    y = torch.mv(weight, x[0])[None] if len(x) == 1 else torch.mm(weight, x.t()).t()
    return y.contiguous() if out is None else out.copy_(y)


def widened_product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """The weight in blocks of rows, each converted to float32; sums in float32, rounded once."""
    width = weight.shape[1]
    out = x.new_empty(len(x), len(weight)) if out is None else out
    wide, step = x.float(), max(1, _BLOCK // max(1, width))
    block = wide.new_empty(min(step, len(weight)), width)
    form = onednn_product if has_onednn() else torch_product
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        out[:, start : start + step] = form(wide, block[: len(rows)].copy_(rows), None)
    return out


FORMS: dict[str, Form] = {
    "torch": torch_product, "split": split_product, "onednn": onednn_product, "gemv": gemv_product,
    "transposed": transposed_product, "widened": widened_product, "packed": packed_product,
}  # fmt: skip


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN's linear map."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products in this half-precision dtype on this processor."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return has_onednn() and bool(getattr(torch.ops.mkldnn, name, lambda: False)())


def only_thread() -> bool:
    """Whether no other Python thread runs (tqdm's monitor, which uses no torch, aside): disabling oneDNN would change the last
    bits of its products."""
    if threading.active_count() == 1:
        return True
    return sum(type(thread).__name__ != "TMonitor" for thread in threading.enumerate()) == 1


def refusal(name: str, rows: int, weight: Tensor) -> str | None:
    """The reason why a form cannot multiply `rows` rows with a plain weight, or None."""
    dtype = weight.dtype
    if name == "torch":
        return None
    if name == "packed":
        return "the weight is not packed: model.pack_weights() packs it"
    if name == "widened":
        return None if dtype in _HALF else f"the weight is {dtype}, not in half precision"
    if name == "split":
        return None if dtype == torch.float32 else f"the weight is {dtype}, not float32"
    if not torch._C._get_mkldnn_enabled() and name != "transposed":
        return "torch.backends.mkldnn.enabled is False"
    if name == "onednn":
        if dtype != torch.float32:
            return f"the weight is {dtype}, not float32"
        if rows != 1:
            return f"{rows} rows: from two on oneDNN's error is up to 2.2 times torch's"
        if not weight.is_contiguous():
            return "the weight is not contiguous: oneDNN would copy it at every call"
        return None if has_onednn() else "this build of torch has no oneDNN"
    if dtype != torch.bfloat16:
        return f"the weight is {dtype}, not bfloat16"
    if name == "transposed":
        return None if rows <= _FEW else f"{rows} rows, the limit is {_FEW}"
    if rows != 1:
        return f"{rows} rows instead of one"
    return None if only_thread() else "another thread runs, and the switch of oneDNN is the process's"


def candidates(dtype: torch.dtype, rows: int) -> list[str]:
    """The forms that are compared for plain weights. The first one runs unless another is clearly faster."""
    if dtype == torch.float32:
        return [*["onednn"] * (rows == 1 and has_onednn()), "split", "torch"]
    if dtype not in _HALF:
        return ["torch"]
    if not multiplies(dtype):
        return ["torch", "widened"] if rows <= ROWS[1] else ["widened", "torch"]
    few = dtype == torch.bfloat16
    return ["torch", *["gemv"] * (few and rows == 1), *["transposed"] * (few and rows <= _FEW), "widened"]


def fastest(rows: int, weight: Tensor) -> str:
    """The fastest form for `rows` rows and a plain weight on this machine: measured once for each dtype and range of rows."""
    if not rows or not measured.allowed():
        return "torch"
    if weight.numel() < SMALL:
        many = rows > ROWS[-1] and weight.dtype in _HALF and weight.numel() > _TINY
        return "widened" if many and not multiplies(weight.dtype) else "torch"
    kind = bisect_left(ROWS, rows)
    name = _CHOSEN.get((weight.dtype, kind))
    if name is None:
        name = _measure(kind, rows, weight)
    if name in ("torch", "split", "widened") or refusal(name, rows, weight) is None:
        return name
    return "torch"


def _measure(kind: int, rows: int, weight: Tensor) -> str:
    """Time the forms on parts of this weight, other ones in each round, so that they come from memory. Not now if one of them
    cannot run now."""
    names, width = candidates(weight.dtype, rows), weight.shape[1]
    if len(names) == 1 or any(refusal(name, rows, weight) for name in names):
        return "torch"
    rows = min(rows, 2 * ROWS[-1])
    operations = _OPERATIONS if weight.dtype == torch.float32 or multiplies(weight.dtype) else _SLOW
    step = max(1, min(len(weight), _SAMPLE // width, max(operations // (width * rows), 64)))
    x = weight.new_ones(rows, width)
    parts = max(1, len(weight) // step)

    def run(name: str, number: int) -> Tensor:
        start = number * len(names) + names.index(name)
        return FORMS[name](x, weight[(start % parts) * step :][:step], None)

    title = ("1 row", *(f"up to {end} rows" for end in ROWS[1:]), f"more than {ROWS[-1]} rows")[kind]
    with torch.no_grad():
        forms = {name: partial(run, name) for name in names}
        name = measured.fastest("linear", f"{str(weight.dtype)[6:]}, {title}", forms)
    _CHOSEN[weight.dtype, kind] = name
    return name


def plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors with values in memory: no subclass (sharded, quantised, fake), and no dispatch mode,
    such as a counter of operations, which handles torch's own operators."""
    return all(type(x) in _TENSORS for x in tensors) and not torch._C._len_torch_dispatch_stack()


def product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [N, D] times weight [F, D]^T without a gradient, by the form chosen for `linear` or else the fastest; [N, F].

    weight may be packed.
    """
    return form_of(x, weight)(x, weight, out)


def form_of(x: Tensor, weight: Tensor) -> Form:
    """The form that `product` runs; it depends on x's number of rows, on the weight's dtype, size and layout."""
    if weight.is_mkldnn and plain(x):
        return packed_product
    if not x.is_cpu or weight.dtype is torch.float64 or not plain(x, weight):
        return torch_product
    name = choice_of("linear")
    if name is None:
        name = fastest(len(x), weight)
    elif name not in FORMS or refusal(name, len(x), weight):
        name = "torch"  # a form of others is for `linear`; one that cannot run here is refused there
    return FORMS[name]


def input_gradient(grad: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """grad [N, F] times weight [F, D], the gradient of x in x W^T; [N, D], written into `out` if it is passed."""
    if not _widens(grad, weight):
        return torch.mm(grad, weight) if out is None else torch.mm(grad, weight, out=out)
    step, wide = _gradient_step(weight), grad.float()
    total = wide.new_empty(len(grad), weight.shape[1])
    block = wide.new_empty(min(step, len(weight)), weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        torch.addmm(
            total, wide[:, start : start + step], block[: len(rows)].copy_(rows), beta=0 if start == 0 else 1, out=total
        )
    return total.to(grad.dtype) if out is None else out.copy_(total)


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """grad [N, F] transposed times x [N, D], the gradient of W in x W^T; [F, D], written into `out` if it is passed."""
    if not _widens(grad, x):
        return torch.mm(grad.t(), x) if out is None else torch.mm(grad.t(), x, out=out)
    out = x.new_empty(grad.shape[1], x.shape[1]) if out is None else out
    step, wide_x, wide_grad = _gradient_step(out), x.float(), grad.float()
    block = wide_x.new_empty(min(step, len(out)), x.shape[1])
    for start in range(0, len(out), step):
        rows = out[start : start + step]
        rows.copy_(torch.mm(wide_grad[:, start : start + step].t(), wide_x, out=block[: len(rows)]))
    return out


def _gradient_step(weight: Tensor) -> int:
    return max(1, _GRADIENT_BLOCK // max(1, weight.shape[1]))


def _widens(*tensors: Tensor) -> bool:
    """Whether the products of a backward run in float32, a block at a time: in half precision on a processor without such
    products, where torch's own for dy W is up to 100 times slower. A form that the user chose for `linear` holds here too."""
    dtype = tensors[0].dtype
    if dtype not in _HALF or not all(x.is_cpu and x.dtype is dtype for x in tensors) or not plain(*tensors):
        return False
    choice = choice_of("linear")
    return choice == "widened" or (choice is None and not multiplies(dtype))
