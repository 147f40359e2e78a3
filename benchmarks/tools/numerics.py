"""Errors of every form of the gated delta rule against its definition in float64: output, recurrent state, gradients.

`python -m benchmarks numerics --write docs/reports/numerics.md` renews the page. Nothing is timed. One draw per length and
gates, at small heads (2 key heads, 4 value heads, 32 wide); every form gets the same inputs, rounded to its dtype first, so
that an error is the form's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.delta import peers
from benchmarks.delta.scenarios import Answer, Implementation, draw_gates
from benchmarks.tools.common import output_path, relative_error
from benchmarks.tools.machine import environment
from qwen35moe import backends, ops
from qwen35moe.files import write_text

recurrent_gated_delta_rule = ops.gated_delta_rule.definition

GROUPS, HEADS, WIDTH = 2, 4, 32
LENGTHS = (64, 512, 2048)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
GATES = {
    "ordinary": "A in 1 ... 16, dt_bias the inverse softplus of log-uniform 1e-3 ... 0.1: states that last up to 1000 tokens",
    "transformers": "A in 0.01 ... 16 and dt_bias 1, that library's init: a median decay of about e^-10 per token",
    "hard": "every token log-uniform between -1e-4 and -80: gates that keep the state next to gates that erase it",
}
COLUMNS = ("output", "recurrent state", "d query, key, value", "d beta", "d decay")
Form = Callable[..., tuple[Tensor, Tensor]]

PAGE = """# Numerics of the gated delta rule

Written by `python -m benchmarks numerics --write docs/reports/numerics.md`; do not edit.

Each entry is max|a-b| / max|b| against the definition (`ops.gated_delta_rule.definition`) in float64, for one draw
of {heads} value heads on {groups} key heads, {width} wide, with an initial recurrent state; gradients for one random
cotangent of output and state. The inputs are rounded to the dtype first; decay, beta and state are float32 or wider.
Bounds of the numerical contract: 2e-5 in float32, 1e-4 for the decay's gradient where gates are beyond -20.
Forms that do not run on this machine are left out; `-` marks a form without a backward. In float64 there is no row for the
recurrence, which is the reference, nor for transformers' function, which computes in float32 for every input dtype.

At hard gates transformers' chunked form loses one to two digits. It computes the decay between two tokens as the difference
of two cumulative sums; ours sums it for each pair of tokens (`ops.cpu.delta_chunks.segment_sums`).

{versions}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks numerics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=list(LENGTHS))
    parser.add_argument("--write", type=output_path, help="write the page here")
    options = parser.parse_args(argv)
    text = "\n".join(page(options.tokens, options.device))
    if options.write:
        write_text(options.write, text + "\n")
    print(text)
    return 0


def page(lengths: Sequence[int], device: str) -> Iterator[str]:
    """The lines of the page."""
    facts = environment()
    versions = ", ".join(f"{key} {facts[key]}" for key in ("torch", "transformers", "triton", "gpu") if key in facts)
    yield PAGE.format(heads=HEADS, groups=GROUPS, width=WIDTH, versions=f"Run on a {device.split(':')[0]} with {versions}.")
    for gates, meaning in GATES.items():
        yield f"## {gates} gates\n\n{meaning}.\n"
        yield f"| form | dtype | T | {' | '.join(COLUMNS)} |"
        yield "|---" * (3 + len(COLUMNS)) + "|"
        for dtype in DTYPES:
            for tokens in lengths:
                yield from rows(gates, dtype, tokens, device)
        yield ""


def rows(gates: str, dtype: torch.dtype, tokens: int, device: str) -> Iterator[str]:
    """A row for every form that runs."""
    values = draw(gates, dtype, tokens, device)
    truth = answered(recurrent_gated_delta_rule, {n: t.double() for n, t in values.items()})
    for name, form, differentiable in forms(values):
        if dtype == torch.float64 and (form is recurrent_gated_delta_rule or name.startswith("transformers")):
            continue
        answer = answered(form, values, differentiable)
        cells = [f"{error:.0e}" if error is not None else "-" for error in errors(answer, truth)]
        yield f"| {name} | {str(dtype).removeprefix('torch.')} | {tokens} | {' | '.join(cells)} |"


def draw(gates: str, dtype: torch.dtype, tokens: int, device: str) -> Answer:
    """query, key, value in `dtype`; decay, beta and state drawn in float32, in float32 or wider."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    decay = -torch.exp(torch.rand(1, tokens, HEADS, generator=generator) * 13.6 - 9.21)  # 1e-4 ... 80
    if gates != "hard":
        decay = draw_gates(gates, 1, tokens, HEADS, generator)
    wide = torch.promote_types(torch.float32, dtype)
    heads = {"query": GROUPS, "key": GROUPS, "value": HEADS}
    narrow = {name: random(tokens, count, WIDTH) for name, count in heads.items()}
    exact = {"decay": decay, "beta": random(tokens, HEADS).sigmoid(), "state": random(HEADS, WIDTH, WIDTH)}
    return {n: t.to(device, dtype) for n, t in narrow.items()} | {n: t.to(device, wide) for n, t in exact.items()}


def forms(values: Answer) -> Iterator[tuple[str, Form, bool]]:
    """(name, function, whether it has a backward) of every form that runs on these values."""
    args, kwargs = _arguments(values)
    for entry in backends.implementations("gated_delta_rule"):
        with torch.no_grad():
            refused = entry.refusal(args, kwargs) is not None
        if entry.fn is not None and not refused:
            yield entry.name, entry.fn, entry.differentiable
    peer = peers.modeling()
    if peer is not None:
        yield "transformers chunk", _theirs(peer.torch_chunk_gated_delta_rule), True
    fla = peers.optional("fla.ops.gated_delta_rule")
    if fla is not None and values["query"].is_cuda and values["query"].dtype != torch.float64:
        yield "fla chunk", _theirs(fla.chunk_gated_delta_rule), True


def _theirs(function: Callable[..., tuple[Tensor, Tensor]]) -> Form:
    def form(query: Tensor, key: Tensor, value: Tensor, **options: Tensor) -> tuple[Tensor, Tensor]:
        answer = peers.rule(function, {"query": query, "key": key, "value": value, **options})
        return answer["out"], answer["recurrent_state"]

    return form


def _arguments(values: Answer) -> tuple[tuple[Tensor, ...], Answer]:
    named = {name: tensor for name, tensor in values.items() if name not in ("query", "key", "value")}
    return (values["query"], values["key"], values["value"]), named


def answered(form: Form, values: Answer, differentiable: bool = True) -> Answer:
    """Output, recurrent state, and gradients d_name of every input."""
    leaves = {name: tensor.detach().clone().requires_grad_(differentiable) for name, tensor in values.items()}
    args, kwargs = _arguments(leaves)

    def forward() -> Answer:
        out, state = form(*args, **kwargs)
        return {"out": out, "recurrent_state": state}

    return Implementation(forward, leaves).answer("train" if differentiable else "forward")


def errors(answer: Answer, truth: Answer) -> Iterator[float | None]:
    """In the order of COLUMNS; None for a gradient of a form without a backward."""
    for names in (("out",), ("recurrent_state",), ("d_query", "d_key", "d_value"), ("d_beta",), ("d_decay",)):
        values = [relative_error(answer[name], truth[name]) for name in names if name in answer]
        yield max(values) if values else None
