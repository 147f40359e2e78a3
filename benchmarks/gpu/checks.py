"""Every implementation of the backends' table against the definition in float64, at the sizes of the 35B model.

A row for each implementation, dtype and mode: training (forward and backward), and inference (without gradients, where some
implementations launch other kernels). The bound is BEYOND times the error of the definition in the same dtype, or the stated
one where that is larger.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import CASES, FULL, SMALL, Arguments, Draw
from benchmarks.gpu.rows import NOT_RUN, RIGHT, UNRUN, WRONG, Rows, is_sticky
from benchmarks.gpu.work import Work
from qwen35moe import backends
from qwen35moe.backends import verification

BEYOND = 1.25
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODES = {"inference": False, "training": True}
# Rounded once at the end, relative to the largest value: forward twice, backward four times this.
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
ONCE = ("rms_norm", "gated_rms_norm", "rotary", "short_convolution", "delta_net_step", "router")
CONSTANT = {"rotary": (2, 3), "norm_rotary": (2, 3)}  # arguments without a gradient, which the kernels do not have: cos and sin
COPIES = 8 << 30  # the most bytes of weights that a form may copy
EXPERTS = {torch.float32: 2e-6, torch.bfloat16: 2**-7}  # the activation and the output of an expert are rounded
INTERPRETER = 2  # Triton's interpreter truncates to bfloat16 instead of rounding


def run(rows: Rows, work: Work, operation: str, dtypes: Sequence[str] = tuple(DTYPES)) -> None:
    """The step of one operation, or of some dtypes of it."""
    prefix = f"check/{operation}"
    entries = sorted(backends.implementations(operation), key=turn)
    if operation not in CASES:
        rows.write(prefix, WRONG, note=f"no cases of {operation} in benchmarks/gpu/cases.py: {len(entries)} implementations")
        return
    launched: set[str] = set()
    known: References = {}
    with recorded_launches(launched):
        for entry in entries:
            reason = _of_one(rows, work, operation, entry, dtypes, launched, known)
            if reason is not None and rows.selects(f"{prefix}/{entry.name}"):
                rows.write(f"{prefix}/{entry.name}", reason[0], note=reason[1], dtypes=list(dtypes))


def turn(entry: Any) -> int:
    """Our kernels first, packages last: they may autotune for minutes, and the step may be cut."""
    return 0 if entry.name == "triton" else 1 if entry.builtin else 2


def _of_one(
    rows: Rows, work: Work, operation: str, entry: Any, dtypes: Sequence[str], launched: set[str], known: References
) -> tuple[str, str] | None:
    """The rows of an implementation; where none ran, the verdict and why."""
    prefix = f"check/{operation}/{entry.name}"
    if not rows.selects_any(prefix):
        return None
    if entry.missing or entry.fn is None:
        return NOT_RUN, entry.missing or "it has no function"
    if entry.device == "cpu" and not work.small:
        return NOT_RUN, "it runs on a CPU only"
    ran, refusals = 0, dict[str, str]()  # refusals: of the rows that no case has
    for dtype_name in dtypes:
        for mode in MODES:
            id = f"{prefix}/{dtype_name}/{mode}"
            if not rows.selects(id):
                ran += 1  # `--only` names another row, or it was measured before a crash
                continue
            result: list[Compared] = []

            def measured(dtype_name: str = dtype_name, mode: str = mode, result: list[Compared] = result) -> Any:
                result.append(compared(operation, entry, DTYPES[dtype_name], MODES[mode], work, known))
                return result[0].fields()

            rows.measure(id, measured)
            rows.append({"launched": sorted(launched)})
            ran += not result or result[0].cases > 0  # a row that failed has run
            if result and result[0].refusals and not result[0].cases:
                refusals[id] = result[0].refusals[0]
    # Forms in plain PyTorch may be for some processors only; the suite tests them on CPUs.
    optional = entry.builtin or entry.device == "cpu"
    if ran:
        for id, reason in refusals.items() if not optional else ():
            rows.write(id, NOT_RUN, note=reason)
        return None
    return NOT_RUN if optional else UNRUN, f"no case ran it: {next(iter(refusals.values()), 'it has no case')}"


@dataclass
class Compared:
    """The largest errors of an implementation over all cases, beside the definition's in the same dtype."""

    cases: int
    worst: dict[str, tuple[float, float, float]]  # pass -> error, of the definition, bound; of the case nearest its bound
    refusals: list[str]
    failure: str | None

    def fields(self) -> dict[str, Any] | None:
        """Of the row; None if no case ran."""
        if self.failure:
            return {"verdict": WRONG, "note": self.failure, "cases": self.cases}
        if not self.cases:
            return None
        right = all(error <= bound for error, _, bound in self.worst.values())
        name, (error, _, bound) = max(self.worst.items(), key=lambda item: item[1][0] / item[1][2])
        others = ", ".join(f"{key} {e:.1e} (definition {d:.1e})" for key, (e, d, _) in self.worst.items())
        return {"verdict": RIGHT if right else WRONG, "measured": error, "unit": f"error, {name}", "target": f"<= {bound:.2g}",
                "note": f"{others}; {self.cases} cases", "cases": self.cases, "refused": self.refusals[:2]}  # fmt: skip


# (dtype, training, number of the case) -> outputs and gradients in float64, and the definition's errors in the dtype
References = dict[tuple[torch.dtype, bool, int], tuple[Any, tuple[float, float]]]


def compared(
    operation: str, entry: Any, dtype: torch.dtype, training: bool, work: Work, known: References
) -> Compared:
    """Run the cases of an operation in one implementation."""
    definition = backends.cases(operation)[0]
    if not training:
        entry = replace(entry, differentiable=False)
    elif not entry.differentiable:
        return Compared(0, {}, ["it has no backward"], None)
    result = Compared(0, {}, [], None)
    draw = Draw(dtype, work.device, SMALL if work.small else FULL, training)
    for number, arguments in enumerate(CASES[operation](draw)):
        arguments = _with_defaults(definition, arguments)
        if reason := _refusal(entry, arguments, training):
            result.refusals.append(reason)
            continue
        lengths = arguments[1].get("lengths")
        constant = CONSTANT.get(operation, ())
        exactly, fn = (detached(visible(f, lengths), constant) for f in (definition, entry.fn))
        key = dtype, training, number
        if key not in known:
            exact = verification._run(exactly, arguments, torch.float64, 0, training)
            known[key] = exact, verification._errors(verification._run(exactly, arguments, None, 0, training), exact)
        names = list(inspect.signature(definition).parameters)
        result.cases += 1
        result.failure = _one_case(result, fn, arguments, names, known[key], stated_bounds(operation, dtype), training)
        if result.failure:
            break
    return result


def _refusal(entry: Any, arguments: Arguments, training: bool) -> str | None:
    args, kwargs = verification._copies(arguments, None, grad=training)
    args = tuple(x.detach() if number in CONSTANT.get(entry.operation, ()) else x for number, x in enumerate(args))
    with torch.set_grad_enabled(training):
        reason = entry.refusal(args, kwargs)
    if reason is None and entry.name == "gathered":
        copied = args[3].numel() * (args[1][0].nbytes + args[2][0].nbytes)
        reason = f"it would copy {copied / 1e9:.0f} GB of weights" if copied > COPIES else None
    return reason


def detached(fn: Callable[..., Any], constant: tuple[int, ...]) -> Callable[..., Any]:
    """The function with some arguments as constants."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*(x.detach() if number in constant else x for number, x in enumerate(args)), **kwargs)

    return call if constant else fn


def visible(fn: Callable[..., Any], lengths: torch.Tensor | None) -> Callable[..., Any]:
    """The function with zeros in y [B, T, C] behind each row's length, where some forms leave other numbers: nobody reads
    them."""
    if lengths is None:
        return fn

    def masked(*args: Any, **kwargs: Any) -> Any:
        y, state = fn(*args, **kwargs)
        beyond = torch.arange(y.shape[1], device=y.device) >= lengths[:, None]
        return y.masked_fill(beyond[..., None], 0), state

    return masked


def _with_defaults(definition: Callable[..., Any], arguments: Arguments) -> Arguments:
    """As the modules call: with every keyword."""
    parameters = inspect.signature(definition).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    return arguments[0], defaults | arguments[1]


def _one_case(
    result: Compared, fn: Callable[..., Any], arguments: Arguments, names: list[str],
    reference: tuple[Any, tuple[float, float]], stated: tuple[float, float], training: bool,
) -> str | None:  # fmt: skip
    """Enter the errors of one case; returns how it failed, or None."""
    exact, in_dtype = reference
    try:
        errors = verification._errors(verification._run(fn, arguments, None, 0, training, names=names), exact)
    except verification.ChangedArguments as error:
        return str(error)
    except Exception as error:
        if is_sticky(str(error)):
            raise
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    for name, error, theirs, least in zip(("forward", "backward"), errors, in_dtype, stated, strict=True):
        if name == "backward" and not training:
            continue
        bound = max(BEYOND * theirs, least)
        before = result.worst.get(name)
        if before is None or not error / bound <= before[0] / before[2]:
            result.worst[name] = (error, theirs, bound)
    return None


def stated_bounds(operation: str, dtype: torch.dtype) -> tuple[float, float]:
    """(forward, backward)."""
    scale = INTERPRETER if not torch.cuda.is_available() and dtype == torch.bfloat16 else 1
    if operation in ONCE:
        return 2 * scale * ROUNDED[dtype], 4 * scale * ROUNDED[dtype]
    if operation == "experts":
        return scale * EXPERTS[dtype], 4 * scale * EXPERTS[dtype]
    forward, backward = verification.BOUNDS[dtype]
    return scale * forward, scale * backward


# ------------------------------------------------------------------------------------------------- which kernels have run


class recorded_launches:
    """Within the context, the kernels that the package's launches take from their modules are added to a set."""

    def __init__(self, launched: set[str]) -> None:
        self.launched = launched

    def __enter__(self) -> None:
        try:
            from qwen35moe_kernels import runtime
        except ModuleNotFoundError as error:
            if error.name != "qwen35moe_kernels":
                raise
            self.runtime: Any = None
            return
        self.runtime, self.real = runtime, runtime.kernels
        self.runtime.kernels = lambda file: Recorder(file, self.real(file), self.launched)

    def __exit__(self, *exc: object) -> None:
        if self.runtime is not None:
            self.runtime.kernels = self.real


class Recorder:
    """In place of a module of Triton kernels."""

    def __init__(self, file: str, module: Any, launched: set[str]) -> None:
        self.file, self.module, self.launched = file, module, launched

    def __getattr__(self, name: str) -> Any:
        self.launched.add(f"{self.file}.{name}")
        return getattr(self.module, name)


def implementations_not_run(records: list[dict[str, Any]]) -> dict[str, str]:
    """check/OPERATION/IMPLEMENTATION -> why, of those that no dtype's step has run."""
    measured = [r["id"].split("/") for r in records if r.get("id", "").count("/") == 4 and r["verdict"] != NOT_RUN]
    ran = {"/".join(parts[:3]) for parts in measured}
    unrun = {record["id"]: record["note"] for record in records if record.get("verdict") == UNRUN}
    return {id: note for id, note in unrun.items() if id not in ran}


def kernels_of_the_package() -> set[str]:
    """file.kernel of every Triton kernel that the package's own launches name."""
    folder = Path(__file__).resolve().parents[2] / "kernels" / "qwen35moe_kernels"
    sources = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    named = set(re.findall(r"\bkernels(?:\([^)]*\))?\.(\w+)", "\n".join(sources.values())))
    jit = re.compile(r"@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+)")
    return {f"{file}.{name}" for file, text in sources.items() for name in jit.findall(text) if name in named}


def kernels_not_launched(records: list[dict[str, Any]]) -> list[str]:
    """Kernels that no check has launched."""
    launched = {name for record in records for name in record.get("launched", ())}
    return sorted(kernels_of_the_package() - launched)
