"""Judging implementations: each against the operation's definition in float64, forward and backward.

The error of a tensor a against the truth b is max|a-b| / max|b|. An implementation passes a case when the worst error
of its outputs and of its gradients stays within `BOUNDS` for the dtype, or within twice the error that the definition
itself makes in that dtype, whichever is larger. Integer outputs (which experts) must be equal: cases of such operations
avoid ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .cases import cases
from .operation import ALIASES, OPERATIONS, Implementation, implementations
from .record import columns

# (forward, backward). float32: the numerical contract's bounds for the chunked delta rule. Half precisions: outputs are
# rounded (2^-9 in bfloat16, 2^-12 in float16), and so may be a few values between: 10 and 20 such roundings.
BOUNDS = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (2e-5, 1e-4),
    torch.float16: (2.5e-3, 5e-3),
    torch.bfloat16: (2e-2, 4e-2),
}
Arguments = tuple[tuple, dict]


@dataclass(frozen=True)
class Row:
    """One implementation on one case. forward, backward: worst error and its bound; reason: why it did not run."""

    operation: str
    name: str
    dtype: torch.dtype
    case: int
    bounds: tuple[float, float]
    forward: float = 0.0
    backward: float = 0.0
    reason: str | None = None  # why it does not support the case
    failure: str | None = None  # it raised

    @property
    def ok(self) -> bool:
        return self.failure is None and self.forward <= self.bounds[0] and self.backward <= self.bounds[1]


@dataclass
class Report:
    """`.ok`: something ran, and all that ran is within its bounds. `.worst[operation, name]`: its worst error.

    Prints as a table. Nothing run is not ok: a report in which everything was refused proves nothing.
    """

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
    bad = [row for row in ran if not row.ok]
    if not bad:
        return cases, forward, backward, "ok"
    first = bad[0]
    why = first.failure or f"bounds {first.bounds[0]:.1e}, {first.bounds[1]:.1e}"
    return cases, forward, backward, f"FAILED on {len(bad)}, first case {first.case}: {why}"


def verify(
    name: str | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str | None = None,
    seed: int = 0,
) -> Report:
    """Run the cases of `backends.cases` against the definition in float64, forward and backward: worst error each.

    name: an implementation ("triton") or an operation ("experts"); None: all. device: CUDA if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    known = {operation: implementations(operation) for operation in OPERATIONS}
    names = sorted({entry.name for entries in known.values() for entry in entries})
    wanted = None if name is None else ALIASES.get(name, name)
    if wanted is not None and wanted not in known and wanted not in names:
        raise ValueError(f"unknown name {name!r}; implementations: {', '.join(names)}; operations: {', '.join(known)}")
    report = Report()
    for operation, entries in known.items():
        chosen = [entry for entry in entries if wanted in (None, operation, entry.name)]
        for dtype in dtypes if chosen else ():
            report.rows.extend(judge(operation, chosen, *cases(operation), dtype, device, seed))
    return report


def judge(
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
    for number, arguments in enumerate(cases(dtype, device, generator)):
        truth = _run(definition, arguments, torch.float64, seed)
        own = _run(definition, arguments, None, seed)
        own_forward, own_backward = _errors(own, truth)
        bounds = (max(BOUNDS[dtype][0], 2 * own_forward), max(BOUNDS[dtype][1], 2 * own_backward))
        for entry in entries:
            row = Row(operation, entry.name, dtype, number, bounds)
            args, kwargs = _fresh(arguments, None, grad=entry.differentiable)
            with torch.set_grad_enabled(entry.differentiable):
                reason = entry.refusal(args, kwargs)
            if reason or entry.fn is None:
                yield replace(row, reason=reason)
                continue
            try:
                result = _run(entry.fn, arguments, None, seed, backward=entry.differentiable)
                forward, backward = _errors(result, truth)
            except Exception as error:  # the report names every implementation that breaks, not only the first
                yield replace(row, forward=float("inf"), failure=f"{type(error).__name__}: {error}")
                continue
            yield replace(row, forward=forward, backward=backward)


def _fresh(arguments: Arguments, dtype: torch.dtype | None, grad: bool = True) -> Arguments:
    """Copies of the arguments (an implementation may write into a state) as leaves; floats in `dtype` if given."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.clone()
        return value.detach().to(dtype or value.dtype, copy=True).requires_grad_(grad)

    args, kwargs = arguments
    return tuple(map(fresh, args)), {name: fresh(value) for name, value in kwargs.items()}


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
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Outputs, and the gradients of every floating input under one fixed random cotangent (None without a backward)."""
    args, kwargs = _fresh(arguments, dtype, grad=backward)
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    with torch.set_grad_enabled(backward):
        outputs = list(_tensors(fn(*args, **kwargs)))
    if not backward:
        return outputs, None
    generator = torch.Generator().manual_seed(seed + 1)
    roots, cotangents = [], []
    for output in outputs:
        if output.is_floating_point():
            cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            if output.requires_grad:
                roots.append(output)
                cotangents.append(cotangent.to(output.device, output.dtype))
    if not roots or not inputs:
        return outputs, []
    grads = torch.autograd.grad(roots, inputs, cotangents, allow_unused=True)
    return outputs, [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]


def _errors(result: tuple, truth: tuple) -> tuple[float, float]:
    (outputs, grads), (true_outputs, true_grads) = result, truth
    if len(outputs) != len(true_outputs):
        raise ValueError(f"{len(outputs)} outputs, the definition has {len(true_outputs)}")
    forward = max((relative_error(a, b) for a, b in zip(outputs, true_outputs, strict=True)), default=0.0)
    if grads is None or not true_grads:
        return forward, 0.0
    if not grads:
        raise ValueError("its outputs carry no gradient, the definition's do")
    return forward, max(relative_error(a, b) for a, b in zip(grads, true_grads, strict=True))


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a-b| / max|b|; the absolute error where b is zero throughout; inf where a is not finite and b is."""
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
