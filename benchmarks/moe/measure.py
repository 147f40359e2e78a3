"""Measuring one case: the check of the answers, the interleaved times, the peak memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.moe.breakdown import breakdown
from benchmarks.moe.cases import DTYPES, Case, rotation
from benchmarks.moe.implementations import Form, reasons, training_products
from benchmarks.moe.packed import PRODUCTS, Packed, bare_products, forget
from benchmarks.moe.roofline import limit, work
from benchmarks.tools import limits
from benchmarks.tools.common import Timing, interleave, relative_error
from qwen35moe import ops
from qwen35moe.backends.verification import BOUNDS

loop_experts = ops.experts.definition

_CHECKED = 6  # tokens whose result is compared with float64
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def measure(
    case: Case, forms: Mapping[str, Form | str], roof: Mapping[str, float], *, device: str = "cpu", rounds: int = 9,
    seconds: float = 10.0, cache_bytes: int = 256 << 20, with_breakdown: bool = False, memory: bool = True,
) -> dict[str, Any]:
    """One case as in the JSON file. A wrong implementation is not timed.

    Each implementation runs `rounds` times in turns, less often (3 at least) if that would take more than `seconds`.
    """
    forget()  # packed matrices of a case that failed
    following, copies = rotation(case, device, cache_bytes)
    inputs = following()
    needed = work(case, inputs[3])
    rows: dict[str, dict[str, Any]] = {name: {"skipped": form} for name, form in forms.items() if isinstance(form, str)}
    check = AnswerCheck(case, inputs)
    running: dict[str, Callable[[], object]] = {}
    for name, form in forms.items():
        if isinstance(form, str):
            continue
        reason = reasons(name, form, inputs)
        rows[name] = {"skipped": reason} if reason else check(form)
        if not reason and rows[name]["wrong"] is None:
            running[name] = lambda form=form: run(form, following(), case.train)
    alone: Mapping[str, Form] = {f"{PRODUCTS}, torch": training_products} if case.train else bare_products(inputs[1][0])
    for name, form in alone.items():
        running[name] = lambda form=form: run(form, following(), False)
    packed = [form for name, form in (*forms.items(), *alone.items()) if name in running and isinstance(form, Packed)]
    for library in {form.library for form in packed}:
        for _ in range(copies):
            Packed(lambda *arguments: arguments[0], library)(*following())  # all sets of weights, before anything is timed
    trial = interleave(running, rounds=1, warmup=0, device=device)
    fits = int(seconds / max(sum(timing.min for timing in trial.values()), 1e-9))
    timings = interleave(running, rounds=max(3, min(rounds, fits)), warmup=0, device=device)
    grads = [x.numel() * x.element_size() for x in inputs[1:3]] if case.train else []
    for name, timing in timings.items():
        row = rows.setdefault(name, {"error": None, "wrong": None})
        row.update(_speed(timing, needed, roof))
        if memory and not name.startswith(PRODUCTS):
            row["peak_bytes"] = peak(running[name], device, grads)
    forget()
    result = {"id": case.id, "case": vars(case), **needed, "weight_copies": copies, "implementations": rows}
    if with_breakdown:
        hidden, gate_up, down, indices, weights = (x.detach() for x in inputs)
        result["breakdown"] = breakdown(hidden, gate_up, down, indices, weights)
    return result


def run(form: Form, inputs: Arguments, train: bool) -> object:
    """One call; in training also the gradients of hidden, both weights and the routing weights, for a fixed cotangent."""
    with torch.set_grad_enabled(train):
        out = form(*inputs)
        if not train:
            return out
        leaves = [x for x in inputs if x.requires_grad]
        return torch.autograd.grad(out, leaves, inputs[0].detach())


def _speed(timing: Timing, needed: Mapping[str, float], roof: Mapping[str, Any]) -> dict[str, Any]:
    shares = limits.share(roof, timing.min, needed["bytes"], needed["flops"])
    return {
        "min_s": timing.min, "median_s": timing.median, "runs": len(timing.seconds), "seconds": list(timing.seconds),
        "tflops": needed["flops"] / timing.min / 1e12, "gbps": needed["bytes"] / timing.min / 1e9,
        "of_roofline": limit(dict(needed), roof) / timing.min, "of_read": shares["of_read"], "of_product": shares["of_product"],
    }


class AnswerCheck:
    """Results and gradients of some tokens, and gradients of some experts, against the definition in float64.

    A token's result and the gradients of its row depend on that token alone, an expert's gradient on the tokens routed to
    it, so that parts of a large case can be checked in full.
    """

    def __init__(self, case: Case, inputs: Arguments) -> None:
        self.case, self.inputs = case, inputs
        hidden, gate_up, down, indices, weights = (x.detach() for x in inputs)
        self.tokens = torch.linspace(0, case.tokens - 1, min(_CHECKED, case.tokens), device=indices.device).long()
        load = torch.bincount(indices.reshape(-1), minlength=gate_up.shape[0])
        order = load.argsort()
        self.experts = sorted({int(order[0]), int(order[-1]), int(order[len(order) // 2])})
        self.expected = self._by_token(hidden, gate_up, down, indices, weights)

    def _by_token(self, hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> list[Tensor]:
        """y of the checked tokens; in training also their dx and dw, for the cotangent x. Only their experts become float64."""
        chosen = indices[self.tokens]
        hit, places = chosen.unique(return_inverse=True)
        leaves = [hidden[self.tokens].double().requires_grad_(), weights[self.tokens].double().requires_grad_()]
        out = loop_experts(leaves[0], gate_up[hit].double(), down[hit].double(), places, leaves[1])
        if not self.case.train:
            return [out.detach()]
        return [out.detach(), *torch.autograd.grad(out, leaves, leaves[0].detach())]

    def _of_expert(self, expert: int) -> list[Tensor]:
        """dW_gate_up and dW_down of one expert, for the cotangent x."""
        hidden, gate_up, down, indices, weights = (x.detach() for x in self.inputs)
        token, rank = (indices == expert).nonzero(as_tuple=True)
        leaves = [gate_up[expert : expert + 1].double().requires_grad_(), down[expert : expert + 1].double().requires_grad_()]
        if not token.numel():
            return [torch.zeros_like(leaf[0]) for leaf in leaves]
        x, first = hidden[token].double(), torch.zeros(len(token), 1, dtype=torch.long, device=token.device)
        out = loop_experts(x, leaves[0], leaves[1], first, weights[token, rank, None].double())
        return [grad[0] for grad in torch.autograd.grad(out, leaves, x)]

    def __call__(self, form: Form) -> dict[str, Any]:
        """{"error": worst relative error, "wrong": None or why it is not timed}."""
        bounds = BOUNDS[DTYPES[self.case.dtype]]
        try:
            with torch.set_grad_enabled(self.case.train):
                out = form(*self.inputs)
                if out.shape != self.inputs[0].shape:
                    raise ValueError(f"it returned {list(out.shape)}, expected {list(self.inputs[0].shape)}")
                grads: list[Tensor] = []
                if self.case.train:
                    grads += torch.autograd.grad(out, self._leaves(), self.inputs[0].detach())
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as failure:
            return {"error": None, "wrong": f"{type(failure).__name__}: {str(failure).splitlines()[0]}"}
        errors = [relative_error(out[self.tokens], self.expected[0])]
        if self.case.train:
            compared = [(grads[0][self.tokens], self.expected[1]), (grads[3][self.tokens], self.expected[2])]
            for expert in self.experts:
                compared += zip((grads[1][expert], grads[2][expert]), self._of_expert(expert), strict=True)
            errors += [_error(actual, expected) for actual, expected in compared]
        worst = max([errors[0] / bounds[0], *(error / bounds[1] for error in errors[1:])])
        wrong = None if worst <= 1 else f"relative errors {_list(errors)}, bounds {bounds[0]:.0e} and {bounds[1]:.0e}"
        return {"error": max(errors), "wrong": wrong}

    def _leaves(self) -> list[Tensor]:
        return [x for x in self.inputs if x.requires_grad]


def _error(actual: Tensor, expected: Tensor) -> float:
    """Relative error; infinite for a nonzero value where zeros are expected."""
    if not expected.any():
        return float("inf") if actual.any() else 0.0
    return relative_error(actual, expected)


def _list(errors: list[float]) -> str:
    return ", ".join(f"{error:.1e}" for error in errors)


def peak(function: Callable[[], object], device: str, grads: Sequence[int] = ()) -> int:
    """Peak bytes that one run allocates through torch, beyond those allocated before.

    grads: sizes of the weights' gradients. On a CPU one live allocation of each is left out at every moment; on a GPU
    all of them are subtracted from the peak. On a CPU the profiler records every allocation: the heap's reserve and the
    system's pages do not count, nor does scratch memory inside the matrix library.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        del result
        return torch.cuda.max_memory_allocated(device) - before - sum(grads)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
        del result
    now = highest = 0
    live = dict.fromkeys(grads, 0)  # number of live allocations of a gradient's size
    events: Any = recorded.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            if abs(event.nbytes()) in live:
                live[abs(event.nbytes())] += 1 if event.nbytes() > 0 else -1
            highest = max(highest, now - sum(size for size, count in live.items() if count > 0))
    return highest
