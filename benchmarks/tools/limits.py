"""Measured limits of the machine: read bandwidth, rate of a matrix product, size of the cache.

A limit is one only if no known way of doing the same is faster. Read bandwidth is therefore the best of sums, a copy and
products of one row; the product rate of a dtype is the best over the forms of `ops.cpu.products`, and of float32 where a
dtype's own products are slower (its values can be converted).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tools.load import OtherLoad, wait_until_quiet
from qwen35moe.ops.cpu import products

Limits = dict[str, Any]

_COPY = 256 << 20  # bytes of the buffer that is read
_WIDTH = {"cpu": 2048, "cuda": 8192}  # of the square product
_COLUMNS = 2048  # of the one-row product's weight
_WAIT = 5.0  # seconds to wait for a quiet moment
_HALF = (torch.bfloat16, torch.float16)


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MB if the system does not report it."""
    sizes = [int(file.read_text()[:-2]) << 10 for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=32 << 20)


def measured(device: str, dtype: torch.dtype) -> Limits:
    """read_gbps, product_tflops (of dtype), the form that reached each, all measured ones, and the load of others meanwhile.

    copy_gbps (read and written) and matmul_tflops (torch's own product in dtype) are among them; they are limits of nothing.
    """
    quiet = wait_until_quiet(_WAIT) if device == "cpu" and _COPY > 1 << 24 else True
    load = OtherLoad()
    with torch.inference_mode():
        reads, rates = _reads(device), _rates(device, dtype)
    return {
        **_best_of(reads, rates), "copy_gbps": reads["copy"], "matmul_tflops": rates[_name("torch", dtype)],
        "reads": reads, "products": rates, "load": {**load.as_dict(), "quiet_before": quiet},
    }


def better(one: Limits, other: Limits) -> Limits:
    """Of two measurements in one run, the best of every number, and the load during the quieter one."""
    merged = {key: {name: max(one[key][name], other[key][name]) for name in one[key]} for key in ("reads", "products")}
    load = min((one["load"], other["load"]), key=lambda row: row.get("other_cores", 0.0))
    numbers = {key: max(one[key], other[key]) for key in ("copy_gbps", "matmul_tflops")}
    return {**_best_of(merged["reads"], merged["products"]), **numbers, **merged, "load": load}


def sentence(limits: Limits) -> str:
    """The limits in words."""
    busy = limits["load"].get("other_cores")
    beside = "" if busy is None else f"; others used {busy:.2f} cores meanwhile"
    return (
        f"limits: read {limits['read_gbps']:.1f} GB/s ({limits['read_form']}), products "
        f"{limits['product_tflops'] * 1e3:.0f} GFLOP/s ({limits['product_form']}){beside}"
    )


def share(limits: Mapping[str, Any], seconds: float, nbytes: float = 0, flops: float = 0) -> dict[str, float]:
    """Rates of a run that has to read nbytes and to compute flops, and the shares of the machine's limits.

    of_limit is the larger of the two shares: the one that the run cannot raise above 1.
    """
    row: dict[str, float] = {}
    if nbytes:
        row |= {"gb_per_s": nbytes / seconds / 1e9, "of_read": nbytes / seconds / 1e9 / limits["read_gbps"]}
    if flops:
        row["gflop_per_s"] = flops / seconds / 1e9
        row["of_product"] = row["gflop_per_s"] / 1e3 / limits["product_tflops"]
    if row:
        row["of_limit"] = max(row.get("of_read", 0.0), row.get("of_product", 0.0))
    return row


def share_text(row: Mapping[str, float]) -> str:
    """The rate that is nearer to its limit, and its share of it."""
    if "of_limit" not in row:
        return ""
    if row.get("of_read", 0.0) >= row.get("of_product", 0.0):
        return f"  {row['gb_per_s']:6.1f} GB/s, {row['of_read']:4.0%} of read"
    return f"  {row['gflop_per_s']:6.0f} GFLOP/s, {row['of_product']:4.0%} of products"


def _best_of(reads: Mapping[str, float], rates: Mapping[str, float]) -> Limits:
    fastest, product = max(reads, key=reads.__getitem__), max(rates, key=rates.__getitem__)
    return {
        "read_gbps": reads[fastest], "read_form": fastest, "product_tflops": rates[product], "product_form": product,
    }


def _reads(device: str) -> dict[str, float]:
    """GB/s of every way to read memory that is tried. The copy's is read and written."""
    kind = torch.device(device).type
    source = torch.ones(_COPY // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], object]] = {"sum int64": source.sum, "copy": lambda: target.copy_(source)}
    runs["sum float32"] = source.view(torch.float32).sum
    runs["max int32"] = source.view(torch.int32).max
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        weight = source.view(dtype)[: source.nbytes // dtype.itemsize // _COLUMNS * _COLUMNS].view(-1, _COLUMNS)
        if len(weight):
            runs |= _one_row(name, weight.fill_(1.0))
    return {name: (1 + (name == "copy")) * _COPY / _best(run, kind, times=6) / 1e9 for name, run in runs.items()}


def _one_row(name: str, weight: Tensor) -> dict[str, Callable[[], object]]:
    """Products of one row with a plain weight, by every form that runs here."""
    x = weight.new_ones(1, weight.shape[1])
    forms = {form: run for form, run in _forms(1, weight).items() if form != "widened"}  # which writes every number once more
    return {f"one row {form} {name}": lambda run=run: run(x, weight, None) for form, run in forms.items()}


def _rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a square product by every form, in dtype and in float32."""
    kind = torch.device(device).type
    width = _WIDTH.get(kind, 2048)
    rates: dict[str, float] = {}
    seconds = float("inf")  # of the fastest form
    for kept in dict.fromkeys((dtype, torch.float32) if dtype in _HALF and kind == "cpu" else (dtype,)):
        x, weight = (torch.randn(width, width, device=device).to(kept) for _ in range(2))
        for form, run in _forms(width, weight).items():
            least = _best(lambda run=run, x=x, weight=weight: run(x, weight, None), kind, 4, seconds)
            rates[_name(form, kept)], seconds = 2 * width**3 / least / 1e12, min(seconds, least)
        if kind == "cpu" and (packed := pack(weight, width)) is not None:
            least = _best(lambda packed=packed, x=x: products.FORMS["packed"](x, packed, None), kind, 4, seconds)
            rates[_name("packed", kept)], seconds = 2 * width**3 / least / 1e12, min(seconds, least)
    return rates


def _forms(rows: int, weight: Tensor) -> dict[str, products.Form]:
    if not weight.is_cpu:
        return {"torch": products.FORMS["torch"]}
    names = (name for name in products.FORMS if products.refusal(name, rows, weight) is None)
    return {name: products.FORMS[name] for name in names}


def pack(weight: Tensor, rows: int) -> Tensor | None:
    """The weight [F, D] in oneDNN's layout for that many rows; None where oneDNN does not multiply its dtype."""
    if not products.has_onednn() or (weight.dtype in _HALF and not products.multiplies(weight.dtype)):
        return None
    if weight.dtype not in (torch.float32, *_HALF):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _name(form: str, dtype: torch.dtype) -> str:
    return f"{form} {str(dtype).removeprefix('torch.')}"


def _best(run: Callable[[], object], kind: str, times: int, other: float = float("inf")) -> float:
    """The least seconds of some runs after one that is not counted; of one run where that is twice as slow as another form."""
    best = float("inf")
    for number in range(times + 1):
        start = time.perf_counter()
        run()
        if kind == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        best = min(best, taken) if number else best
        if taken > 2 * other:
            return min(best, taken)
    return best


def of_all(device: str, dtypes: Iterable[torch.dtype]) -> dict[str, Limits]:
    """The limits by the dtype's short name: bf16, fp32, ..."""
    return {SHORT[dtype]: measured(device, dtype) for dtype in dict.fromkeys(dtypes)}


SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.float64: "fp64"}
