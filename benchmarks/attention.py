"""Causal attention at the published head counts: every form that runs here beside SDPA; errors beside transformers' eager.

    python -m benchmarks attention [--heads 35b-a3b,moe-4.54b] [--tokens 512,2048,8192] [--dtype bf16,fp32] [--json out.json]

The core alone, without projections: query [1, T, H, K], key and value [1, T, G, K], no mask but the causal one. Errors are
those of the last query rows and some others, all heads, against float64; a form whose error is above its dtype's bound, or
above 1.25 times that of transformers' eager attention on the same rows, is not timed. Operations counted: the two products
over the visible keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe.cases import DTYPES
from benchmarks.tools.common import Case, Report, arguments, limit_dtypes, relative_error, touch
from qwen35moe import Config, backends, ops
from qwen35moe.backends.verification import BOUNDS

HEADS = ("35b-a3b", "moe-4.54b")
ROWS = 48  # query rows whose error is measured
WORSE = 1.25  # ours over transformers' eager
DEFINITION = 512  # tokens up to which a form that stores all scores is timed
LONG = 4096  # tokens above which two rounds are enough: a run takes seconds
SDPA, EAGER, OURS = "sdpa", "transformers eager", "ours"


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=7)
    parser.prog = "python -m benchmarks attention"
    parser.add_argument("--heads", default=",".join(HEADS), help="presets, with commas")
    parser.add_argument("--tokens", default="512,2048,8192", help="lengths, with commas")
    parser.add_argument("--dtype", default="bf16,fp32", help="with commas: bf16, fp32, fp16")
    parser.add_argument("--only", help="forms, with commas (sdpa always runs)")
    options = parser.parse_args(None if argv is None else list(argv))
    presets, dtypes = options.heads.split(","), options.dtype.split(",")
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise ValueError(f"--dtype {unknown[0]!r}: there are {', '.join(DTYPES)}")
    report = Report("attention", rounds=options.rounds, dtypes=limit_dtypes(options, *(DTYPES[name] for name in dtypes)))
    for preset in presets:
        for dtype in dtypes:
            for tokens in (int(text) for text in options.tokens.split(",")):
                with report.case(f"attention/{preset}/T{tokens}/{dtype}") as case:
                    case.limits = report.limits_of(dtype)
                    measure(case, preset, tokens, dtype, options.only.split(",") if options.only else None)
    return report.finish(options)


def measure(case: Case, preset: str, tokens: int, dtype: str, only: Sequence[str] | None = None) -> None:
    """Check every form on some rows, then time those that are right."""
    text = Config.preset(preset).text_config
    heads, groups, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    query, key, value = drawn(tokens, heads, groups, width, DTYPES[dtype])
    case.facts.update(preset=preset, tokens=tokens, heads=heads, key_heads=groups, width=width, dtype=dtype)
    case.needed.update(flops=2.0 * heads * width * tokens * (tokens + 1))
    scale = width**-0.5
    rows = torch.cat([torch.randint(0, tokens, (ROWS // 2,), generator=torch.Generator().manual_seed(1)),
                      torch.arange(max(0, tokens - ROWS // 2), tokens)]).unique()  # fmt: skip
    expected = truth(query, key, value, scale, rows)
    case.errors[EAGER] = relative_error(eager(query[:, rows], key, value, scale, rows), expected)
    bound = BOUNDS[DTYPES[dtype]][0]
    forms = implementations(case, query, key, value, scale, only)
    case.facts["auto"] = f"ours {backends.resolve('attention', query, key, value, scale=scale).name}"
    for name, run in forms.items():
        if name == EAGER:
            continue
        with torch.inference_mode():
            case.check(name, run()[:, rows], expected, bound=bound)
        if name not in case.wrong and name != SDPA and case.errors[name] > WORSE * max(case.errors[EAGER], 1e-6):
            case.wrong[name] = f"error {case.errors[name]:.1e}, {WORSE} times transformers' eager {case.errors[EAGER]:.1e}"
    touch(query, key, value)
    case.rounds = min(case.rounds, 2) if tokens > LONG else case.rounds
    case.time({name: _inference(run) for name, run in forms.items()}, baseline=SDPA, warmup=1)


def drawn(tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value. Queries and keys are normed in the model: scores of unit size times sqrt(width) before scaling."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, tokens, n, width, generator=generator).to(dtype) for n in (heads, groups, groups))
    return query, key, value


def truth(query: Tensor, key: Tensor, value: Tensor, scale: float, rows: Tensor) -> Tensor:
    """The definition in float64 at some query rows; [1, rows, H, V]."""
    parts = []
    repeats = query.shape[2] // key.shape[2]
    visible = torch.arange(key.shape[1]) <= rows[:, None]
    for head in range(query.shape[2]):
        scores = query[0, rows, head].double() @ key[0, :, head // repeats].double().t() * scale
        parts.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value[0, :, head // repeats].double())
    return torch.stack(parts, dim=1)[None]


def eager(query: Tensor, key: Tensor, value: Tensor, scale: float, rows: Tensor | None = None) -> Tensor:
    """transformers' eager attention of all queries, or of those at `rows`."""
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import eager_attention_forward

    module: Any = SimpleNamespace(num_key_value_groups=query.shape[2] // key.shape[2], training=False)
    at = torch.arange(query.shape[1]) if rows is None else rows
    mask = torch.zeros(len(at), key.shape[1], dtype=query.dtype)
    mask = mask.masked_fill(torch.arange(key.shape[1]) > at[:, None], torch.finfo(query.dtype).min)[None, None]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, _ = eager_attention_forward(module, q, k, v, mask, scale)
    return out


def implementations(
    case: Case, query: Tensor, key: Tensor, value: Tensor, scale: float, only: Sequence[str] | None
) -> dict[str, Callable[[], Tensor]]:
    """Name -> call, of those that run here; the reasons of the others into `case.refused`."""

    def sdpa() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)

    forms: dict[str, Callable[[], Tensor]] = {SDPA: sdpa, OURS: lambda: ops.attention(query, key, value, scale=scale)}
    if query.shape[1] <= DEFINITION:
        forms[EAGER] = lambda: eager(query, key, value, scale)
    else:
        case.refused[EAGER] = f"it stores all scores; timed up to {DEFINITION} tokens"
    for entry in backends.implementations("attention"):
        name = f"ours {entry.name}"
        with torch.inference_mode():
            reason = entry.refusal((query, key, value), {"scale": scale})
        if reason is None and entry.name == "eager" and query.shape[1] > DEFINITION:
            reason = f"the definition stores all scores; timed up to {DEFINITION} tokens"
        if reason is None and entry.fn is not None:
            forms[name] = lambda run=entry.fn: run(query, key, value, scale=scale)
        else:
            case.refused[name] = reason or "it has no function"
    if only is not None:
        forms = {name: run for name, run in forms.items() if name in (SDPA, *only)}
        case.refused.clear()
    return forms


def _inference(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def inside() -> Tensor:
        with torch.inference_mode():
            return run()

    return inside
