"""`verify`: every implementation against the operation's definition in float64, forward and backward.

The error of a tensor a against the reference b is max|a-b| / max|b|. An implementation passes a case if the largest error of
its outputs and of its gradients is within `BOUNDS` for the dtype, or within twice the error of the definition in that dtype,
whichever is larger, and if it has left the bits of its arguments unchanged: callers go on using their tensors. It is called as
the modules call it, with every keyword.
Integer outputs (the indices of the router) must be equal: cases of such operations have no ties.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .cases import cases
from .operation import ALIASES, OPERATIONS, Implementation
from .record import columns
from .registry import implementations

# (forward, backward). float32: the bounds of the chunked delta rule (docs/reference/numerics.md). Half precisions: outputs and
# a few intermediate values are rounded (2^-9 in bfloat16, 2^-12 in float16): 10 and 20 such roundings.
BOUNDS = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (2e-5, 1e-4),
    torch.float16: (2.5e-3, 5e-3),
    torch.bfloat16: (2e-2, 4e-2),
}
Arguments = tuple[tuple, dict]


@dataclass(frozen=True)
class Row:
    """One implementation on one case. forward, backward: the largest errors; bounds: their limits."""

    operation: str
    name: str
    dtype: torch.dtype
    case: int
    bounds: tuple[float, float]
    forward: float = 0.0
    backward: float = 0.0
    reason: str | None = None  # it did not run: why it does not support the case
    failure: str | None = None  # it raised this error, or which arguments it changed

    @property
    def ok(self) -> bool:
        return self.failure is None and self.forward <= self.bounds[0] and self.backward <= self.bounds[1]


@dataclass
class Report:
    """`.ok`: at least one implementation ran, and every one that ran is within its bounds. `.worst[operation, name]`: its
    largest error. Prints as a table."""

    rows: list[Row] = field(default_factory=list)

    @property
    def ran(self) -> list[Row]:
        return [row for row in self.rows if row.reason is None]

    @property
    def ok(self) -> bool:
        return bool(self.ran) and all(row.ok for row in self.ran)

    @property
    def worst(self) -> dict[tuple[str, str], float]:
        result: dict[tuple[str, str], float] = {}
        for row in self.ran:
            key = (row.operation, row.name)
            result[key] = max(result.get(key, 0.0), row.forward, row.backward)
        return result

    def __str__(self) -> str:
        lines = [("operation", "implementation", "dtype", "cases", "forward", "backward", "verdict")]
        for key in dict.fromkeys((row.operation, row.name, row.dtype) for row in self.rows):
            group = [row for row in self.rows if (row.operation, row.name, row.dtype) == key]
            lines.append((key[0], key[1], str(key[2]).removeprefix("torch."), *_summary(group)))
        return columns(lines) if self.rows else "nothing to verify"

    __repr__ = __str__


def _summary(group: Sequence[Row]) -> tuple[str, str, str, str]:
    ran = [row for row in group if row.reason is None]
    cases = f"{len(ran)}/{len(group)}"
    if not ran:
        return cases, "-", "-", f"did not run: {group[0].reason}"
    forward, backward = (f"{max(getattr(row, which) for row in ran):.1e}" for which in ("forward", "backward"))
    failed = [row for row in ran if not row.ok]
    if not failed:
        return cases, forward, backward, "ok"
    first = failed[0]
    cause = first.failure or f"bounds {first.bounds[0]:.1e}, {first.bounds[1]:.1e}"
    return cases, forward, backward, f"FAILED on {len(failed)}, first case {first.case}: {cause}"


def verify(
    name: str | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str | None = None,
    seed: int = 0,
) -> Report:
    """Run the cases of `backends.cases` and compare with the definition in float64, forward and backward.

    name: an implementation ("triton") or an operation ("experts"); None: all. device: None is CUDA if available.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    table = {operation: implementations(operation) for operation in OPERATIONS}
    names = sorted({entry.name for entries in table.values() for entry in entries})
    target = None if name is None else ALIASES.get(name, name)
    if target is not None and target not in table and target not in names:
        raise ValueError(f"unknown name {name!r}; implementations: {', '.join(names)}; operations: {', '.join(table)}")
    report = Report()
    for operation, entries in table.items():
        selected = [entry for entry in entries if target in (None, operation, entry.name)]
        for dtype in dtypes if selected else ():
            report.rows.extend(compare(operation, selected, *cases(operation), dtype, device, seed))
    return report


def compare(
    operation: str,
    entries: Iterable[Implementation],
    definition: Callable[..., Any],
    cases: Callable[..., Any],
    dtype: torch.dtype,
    device: str,
    seed: int,
) -> Iterator[Row]:
    """One row for each implementation and case."""
    generator = torch.Generator().manual_seed(seed)
    parameters = inspect.signature(definition).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    for number, (tensors, options) in enumerate(cases(dtype, device, generator)):
        arguments = tensors, defaults | options
        reference = _run(definition, arguments, torch.float64, seed)
        forward, backward = _errors(_run(definition, arguments, None, seed), reference)
        bounds = (max(BOUNDS[dtype][0], 2 * forward), max(BOUNDS[dtype][1], 2 * backward))
        for entry in entries:
            row = Row(operation, entry.name, dtype, number, bounds)
            args, kwargs = _copies(arguments, None, grad=entry.differentiable)
            with torch.set_grad_enabled(entry.differentiable):
                reason = entry.refusal(args, kwargs)
            if reason or entry.fn is None:
                yield replace(row, reason=reason)
                continue
            try:
                result = _run(entry.fn, arguments, None, seed, entry.differentiable, names=[p.name for p in parameters])
                forward, backward = _errors(result, reference)
            except ChangedArguments as error:
                yield replace(row, forward=float("inf"), failure=str(error))
            except Exception as error:  # reported as a row, so that the other implementations are compared too
                yield replace(row, forward=float("inf"), failure=f"{type(error).__name__}: {error}")
            else:
                yield replace(row, forward=forward, backward=backward)


class ChangedArguments(Exception):
    """An implementation has changed arguments that its caller goes on using."""


def _copies(arguments: Arguments, dtype: torch.dtype | None, grad: bool = True) -> Arguments:
    """Copies of the arguments as leaves, also of those in tuples and lists; floats in `dtype` if not None."""

    def copy(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [copy(x) for x in value] if isinstance(value, list) else tuple(map(copy, value))
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.clone()
        return value.detach().to(dtype or value.dtype, copy=True).requires_grad_(grad)

    args, kwargs = arguments
    return tuple(map(copy, args)), {name: copy(value) for name, value in kwargs.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _run(
    fn: Callable[..., Any],
    arguments: Arguments,
    dtype: torch.dtype | None,
    seed: int,
    backward: bool = True,
    names: Sequence[str] | None = None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Outputs, and the gradients of every floating-point input for a fixed random gradient of the outputs, which is the same
    for every implementation (None without a backward). With the parameters' `names`: ChangedArguments if the forward or the
    backward changes one."""
    args, kwargs = _copies(arguments, dtype, grad=backward)
    inputs = [x for x in _tensors((*args, *kwargs.values())) if x.is_floating_point()]
    before = None if names is None else _named_bits((args, kwargs), names)
    with torch.set_grad_enabled(backward):
        outputs = list(_tensors(fn(*args, **kwargs)))
    if names is not None:
        _check_unchanged(before, _named_bits((args, kwargs), names))
    if not backward:
        return outputs, None
    generator = torch.Generator().manual_seed(seed + 1)
    roots, d_outputs = [], []
    for output in outputs:
        if output.is_floating_point():
            d_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            if output.requires_grad:
                roots.append(output)
                d_outputs.append(d_output.to(output.device, output.dtype))
    if not roots or not inputs:
        return outputs, []
    grads = torch.autograd.grad(roots, inputs, d_outputs, allow_unused=True)
    if names is not None:
        _check_unchanged(before, _named_bits((args, kwargs), names))
    return outputs, [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]


def _named_bits(arguments: Arguments, names: Sequence[str]) -> dict[str, list[tuple[object, Tensor]]]:
    """Argument -> the layout of each of its tensors, and a copy of its bits."""
    args, kwargs = arguments
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    return {
        name: [((x.dtype, x.shape, x.stride()), x.detach().reshape(-1).clone().view(torch.uint8)) for x in _tensors(value)]
        for name, value in values.items()
    }


def _check_unchanged(before: Any, after: Any) -> None:
    """ChangedArguments if a tensor has other bits or another shape: NaN equals the same NaN, and -0.0 differs from 0.0."""
    changed = [
        name for name in before
        if len(before[name]) != len(after[name])
        or any(a[0] != b[0] or not torch.equal(a[1], b[1]) for a, b in zip(before[name], after[name], strict=True))
    ]
    if changed:
        names = ", ".join(changed)
        raise ChangedArguments(f"it changed its argument {names}; callers go on using their tensors: write to a copy")


def _errors(result: tuple, reference: tuple) -> tuple[float, float]:
    (outputs, grads), (reference_outputs, reference_grads) = result, reference
    if len(outputs) != len(reference_outputs):
        raise ValueError(f"{len(outputs)} outputs, the definition has {len(reference_outputs)}")
    forward = max((relative_error(a, b) for a, b in zip(outputs, reference_outputs, strict=True)), default=0.0)
    if grads is None or not reference_grads:
        return forward, 0.0
    if not grads:
        raise ValueError("no output requires a gradient, the definition's outputs do")
    return forward, max(relative_error(a, b) for a, b in zip(grads, reference_grads, strict=True))


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a-b| / max|b|; max|a| if b is zero; inf if a is not finite where b is."""
    if a.shape != b.shape:
        raise ValueError(f"shape {list(a.shape)}, the definition has {list(b.shape)}")
    if not b.is_floating_point():
        return 0.0 if torch.equal(a.to(b.dtype), b) else float("inf")
    if b.numel() == 0:
        return 0.0
    a, b = a.detach().to(torch.float64), b.detach().to(torch.float64)
    difference = torch.where(a == b, 0.0, (a - b).abs()).max().item()
    scale = b.abs().max().item()
    error = difference / scale if scale > 0 else difference
    return error if error == error else float("inf")
