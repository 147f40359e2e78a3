"""Speeds of the delta rule beside fla, and of the experts beside grouped_mm; each answer is checked before it is timed."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import targets
from benchmarks.gpu.cases import FULL, SMALL, Draw, Sizes, decays
from benchmarks.gpu.rows import MEASURED, WRONG, Rows, judged, said
from benchmarks.gpu.work import Work, rates
from qwen35moe import backends, ops
from qwen35moe.backends.verification import relative_error  # on the device: the outputs have 10^8 elements

AGREE = 3e-2  # bfloat16, relative to the largest value: two implementations with roundings of their own
IN_CACHE = 256 << 20  # bytes of weights of which a GPU's L2 cache (50 MB) may keep a good part from one run to the next
SETS = 4  # of indices, where the weights are fewer
Run = Callable[[], Any]


def gpu_name(work: Work) -> str:
    return "" if work.small else torch.cuda.get_device_name()


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def usable(peers: Mapping[str, Run | str], ours: Tensor) -> tuple[dict[str, Run], dict[str, str]]:
    """Peers that run and agree with us, and why the others do not count."""
    good, refused = {}, {}
    for name, peer in peers.items():
        if isinstance(peer, str):
            refused[name] = peer
            continue
        try:
            error = relative_error(first(peer()), ours)
        except Exception as problem:  # a package that fails ends its own column
            refused[name] = said(problem)
            continue
        good[name] = peer
        if error > AGREE:
            refused[name] = f"relative difference {error:.1e}"
    return good, refused


def compare(
    work: Work, ours: Run, peers: Mapping[str, Run | str], *, rounds: int, ratio: float | None, faster_by: float | None,
    against: str, **facts: Any,
) -> dict[str, Any]:  # fmt: skip
    """Fields of a row: times in turns, the ratio to one peer beside its target, a profile.

    ratio: the target of our time over the peer's; faster_by: of the peer's over ours.
    """
    answer = first(ours())
    good, refused = usable(peers, answer)
    if against in refused and against in good:
        return {"verdict": WRONG, "note": f"ours and {against} differ: {refused[against]}"}
    timings = work.time({"ours": ours, **good}, rounds=rounds)
    times = {name: rates(timing) for name, timing in timings.items()}
    milliseconds = ", ".join(f"{name} {timing.min * 1e3:.4g} ms" for name, timing in timings.items())
    more = "".join(f"; {name} not timed: {reason}" for name, reason in refused.items())
    facts |= {"implementations": times, "baseline": against, **work.profile(ours)}
    note = f"{milliseconds}{more}"
    if against not in timings:
        return {"verdict": MEASURED, "measured": timings["ours"].min * 1e3, "unit": "ms", "note": note, **facts}
    quotient = timings["ours"].min / timings[against].min
    if ratio is not None:
        return judged(quotient, f"of {against}'s time", None if work.small else ratio, most=True, note=note, **facts)
    return judged(1 / quotient, f"times {against}'s speed", None if work.small else faster_by, note=note, **facts)


def training(function: Callable[..., Any], tensors: list[Tensor]) -> Run:
    """A forward and the gradients of all tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    cotangent: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        out = first(function(*leaves))
        if not cotangent:
            cotangent.append(torch.ones_like(out))
        return torch.autograd.grad(out, leaves, cotangent[0])

    return run


# --------------------------------------------------------------------------------------------------------------- delta rule


def delta(rows: Rows, work: Work) -> None:
    for T in (5,) if work.small else (32768, 4096):
        for train in (False, True):
            mode = "training" if train else "forward"
            with work.own_kernels():
                rows.measure(f"delta/{mode}/T{T}", lambda T=T, train=train: delta_row(work, T, train))


def delta_row(work: Work, T: int, train: bool) -> dict[str, Any]:
    work.free()
    s = SMALL if work.small else FULL
    draw = Draw(torch.bfloat16, work.device, s, train)
    tensors = [draw(1, T, s.G, s.K), draw(1, T, s.G, s.K), draw(1, T, s.H, s.K)]
    tensors += [decays(draw, "ordinary", 1, T, s.H), draw.uniform(1, T, s.H)]

    def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        return backends.run("gated_delta_rule", q, k, v, decay=g, beta=beta)

    module, reason = optional("fla.ops.gated_delta_rule", work)

    def theirs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        return module.chunk_gated_delta_rule(
            q, k, v, g=g, beta=beta, output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    peers: dict[str, Run | str] = {"fla": reason or ""}
    if train:
        if module is not None:
            peers["fla"] = training(theirs, tensors)
        fields = compare(work, training(ours, tensors), peers, rounds=5, ratio=None, faster_by=None, against="fla")
    else:
        if module is not None:
            peers["fla"] = lambda: theirs(*tensors)
        target = targets.DELTA_RATIO if T >= 32768 else None
        with torch.no_grad():
            fields = compare(work, lambda: ours(*tensors), peers, rounds=9, ratio=target, faster_by=None, against="fla")
    with backends.ran() as ran, torch.set_grad_enabled(train):
        ours(*(x.requires_grad_() for x in tensors) if train else tensors)
    return {**fields, "ran": ran.calls[-1].name, "peak_bytes": work.peak()}


def optional(name: str, work: Work) -> tuple[Any, str | None]:
    """(module, None), or (None, why not)."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a package that fails to import ends its own column
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.split(".")[0]
        return None, f"{error.name} is not installed" if missing else said(error)  # pyright: ignore
    return (None, "it runs on a GPU only") if work.small else (module, None)


# ------------------------------------------------------------------------------------------------------------------ experts


def moe(rows: Rows, work: Work) -> None:
    s = SMALL if work.small else FULL
    few, many = ((1, 3), (5,)) if work.small else ((1, 4, 8, 16, 64, 256, 512), (4096, 8192, 16384, 32768))
    ids = {f"moe/forward/N{N}": (N, False) for N in (many[-1], *few, *many[:-1])}
    ids |= {f"moe/training/N{N}": (N, True) for N in reversed(many)}
    if not any(map(rows.selects, ids)):
        return
    draw = Draw(torch.bfloat16, work.device, s, False)
    weights = draw(s.E, 2 * s.F, s.D, scale=s.D**-0.5), draw(s.E, s.D, s.F, scale=s.F**-0.5)
    order = sorted(ids, key=lambda id: (ids[id][0] != many[-1], list(ids).index(id)))  # the rows with targets first
    for id in order:
        rows.measure(id, lambda id=id: moe_row(work, draw, s, weights, *ids[id]))


def moe_row(work: Work, draw: Draw, s: Sizes, weights: tuple[Tensor, Tensor], N: int, train: bool) -> dict[str, Any]:
    work.free()
    gate_up, down = weights
    nbytes = min(s.E, N * s.top_k) * 3 * s.D * s.F * 2
    hidden = draw(N, s.D)
    sets = [draw.uniform(N, s.E).topk(s.top_k).indices for _ in range(SETS if nbytes < IN_CACHE and not train else 1)]
    scale = draw.uniform(N, s.top_k).softmax(-1).to(torch.bfloat16)
    forms: dict[str, Any] = {"torch grouped_mm": next(e for e in backends.implementations("experts") if e.name == "grouped").fn}
    try:
        forms["transformers grouped_mm"] = transformers_grouped()
    except Exception as error:  # not installed, or another version
        forms["transformers grouped_mm"] = said(error)
    tensors = [hidden, gate_up, down, scale]

    called = Turns(sets)
    big, peers = N >= 32768, {}
    for name, form in forms.items():
        bound = called(form) if callable(form) else None
        peers[name] = form if bound is None else training(bound, tensors) if train else lambda b=bound: b(*tensors)
    ours = called(lambda *arguments: ops.experts(*arguments))
    goal = targets.MOE_TRAIN_RATIO if train else targets.MOE_RATIO
    flops = (18 if train else 6) * N * s.top_k * s.D * s.F
    run = training(ours, tensors) if train else lambda: ours(*tensors)
    with torch.set_grad_enabled(train):
        fields = compare(work, run, peers, rounds=5 if big else 9, ratio=None, faster_by=goal if big else None,
                         against="torch grouped_mm")  # fmt: skip
    if "implementations" not in fields:
        return fields
    seconds = fields["implementations"]["ours"]["min_s"]
    tflops, gbps = flops / seconds / 1e12, nbytes / seconds / 1e9
    fields["note"] = f"{tflops:.4g} TFLOP/s, {gbps:.4g} GB/s of weights; {fields['note']}"
    if big and not train and (goal := targets.compute_bound(targets.MOE_TFLOPS, gpu_name(work))) is not None:
        fields["target"] += f" and >= {goal:.0f} TFLOP/s"
        fields["verdict"] = "met" if fields["verdict"] == "met" and tflops >= goal else "missed"
    return {**fields, "tflops": tflops, "gbps": gbps, "peak_bytes": work.peak()}


class Turns:
    """Calls of forms with other experts each time, so that their weights come from memory. The first call of every form, whose
    answer is compared, has the same experts."""

    def __init__(self, sets: Sequence[Tensor]) -> None:
        self.first, self.following = sets[0], itertools.cycle([*sets[1:], sets[0]])

    def __call__(self, form: Callable[..., Any]) -> Callable[..., Any]:
        indices = itertools.chain([self.first], self.following)
        return lambda h, g, d, w: form(h, g, d, next(indices), w)


def transformers_grouped() -> Callable[..., Any]:
    from benchmarks.moe.implementations import transformers_experts

    return transformers_experts("grouped_mm")
