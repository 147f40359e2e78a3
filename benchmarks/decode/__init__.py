"""One cached token: ms, GB/s of weights read and share of the read bandwidth, plain and packed, beside transformers' best.

    python -m benchmarks decode                                   # the 4.54B model, batches 1, 4, 8, bfloat16
    python -m benchmarks decode --layers 8 --dtype bf16,fp32 --context 512 --prefill 512 --json out.json --plot out.png

One process holds our model, a copy with packed weights where the library can pack, and transformers' model on the storage of
our weights. transformers' settings (experts grouped_mm, eager, batched_mm; attention sdpa, eager; cache dynamic, static) are
tried first, and the fastest one runs, in inference mode. The answer: logits after one cached token of every row, with the
routing of a float32 run, against transformers in float32. Rows of a batch continue one prompt with tokens of their own.

The weights that are read: those of every linear map once (of a tied embedding as the head), and of the experts the distinct
ones that the rows chose in the answer's run. Without --layers the model has as many layers as fit into memory twice; with fewer
layers than the preset the vocabulary is smaller in proportion, so that the ratios are those of the whole model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode.models import (
    EXPERTS,
    Ours,
    Setting,
    Theirs,
    best_setting,
    build,
    configuration,
    nbytes,
    packed,
)
from benchmarks.moe.cases import DTYPES
from benchmarks.text_4b.peers import head, widened
from benchmarks.tools.common import Case, Report, arguments, at_least_one, interleave, limit_dtypes, logit_errors
from benchmarks.tools.memory import free_memory

BOUND = {"bf16": 0.05, "fp16": 0.02, "fp32": 1e-4}  # rms error over rms of the logits
WORSE = 1.25  # ours over transformers' error, where that is more than SAME
SAME = 1e-5
ANSWERED = 17  # tokens of the answer, the last one decoded
SHARE = 0.75  # of free memory


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(None if argv is None else list(argv))
    dtypes = options.dtype.split(",")
    if unknown := [name for name in dtypes if name not in BOUND]:
        raise ValueError(f"--dtype {unknown[0]!r}: there are {', '.join(BOUND)}")
    batches = [at_least_one(text) for text in options.batches.split(",")] if options.batches else []
    limited = limit_dtypes(options, *(DTYPES[name] for name in dtypes))
    report = Report("decode", rounds=options.rounds, dtypes=limited)
    for dtype in dtypes:
        run(report, dtype, batches, options)
    return report.finish(options)


def parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__, rounds=15)
    parser.prog = "python -m benchmarks decode"
    parser.add_argument("--model", default="moe-4.54b", help="a preset")
    parser.add_argument("--layers", type=at_least_one, help="the first layers only; default as many as fit twice")
    parser.add_argument("--dtype", default="bf16", help=f"with commas: {', '.join(BOUND)}")
    parser.add_argument("--context", type=at_least_one, default=128, help="tokens in the cache before the first one timed")
    parser.add_argument("--batches", default="1,4,8", help="rows, with commas; empty: only --prefill")
    parser.add_argument("--prefill", type=at_least_one, help="also time a prefill of so many tokens")
    parser.add_argument("--no-packed", dest="packed", action="store_false", help="no copy with packed weights")
    parser.add_argument("--no-answer", dest="answer", action="store_false", help="do not check the answers, while tuning")
    return parser


def run(report: Report, dtype: str, batches: Sequence[int], options: argparse.Namespace) -> None:
    """All cases of a dtype."""
    layers = options.layers or fitting(options.model, DTYPES[dtype], 2 if options.packed else 1)
    config = configuration(options.model, layers)
    model = build(config, DTYPES[dtype])
    theirs = Theirs(model)
    peers: dict[str, Any] = {"transformers": theirs, "ours": Ours(model)}
    refused = {}
    if options.packed:
        try:
            peers["ours packed"] = Ours(packed(model))
        except (ValueError, NotImplementedError) as reason:
            refused["ours packed"] = str(reason).splitlines()[0]
    name = f"{options.model}/L{config.text_config.num_hidden_layers}"
    for batch in batches:
        with report.case(f"decode/{name}/past{options.context}/B{batch}/{dtype}") as case:
            case.limits, case.refused = report.limits_of(dtype), dict(refused)
            decode(case, peers, model, dtype, batch, options)
    if options.prefill:
        with report.case(f"prefill/{name}/T{options.prefill}/{dtype}") as case:
            case.limits, case.refused = report.limits_of(dtype), dict(refused)
            prefill(case, peers, model, options.prefill)


def fitting(preset: str, dtype: torch.dtype, copies: int) -> int:
    """The most layers of a preset, in whole periods of its layer types, whose weights fit into memory `copies` times."""
    full = configuration(preset, None)
    most, room = full.text_config.num_hidden_layers, SHARE * free_memory("cpu")
    period = next((n for n, kind in enumerate(full.text_config.layer_types, 1) if kind == "full_attention"), 1)
    for layers in range(most, 0, -period):
        if copies * nbytes(configuration(preset, layers), dtype) <= room:
            return layers
    raise ValueError(f"{preset} in {dtype} does not fit into memory with {period} layers: use --layers or --no-packed")


def prompt(tokens: int, vocabulary: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Random ids [batch, tokens]."""
    return torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def decode(
    case: Case, peers: dict[str, Any], model: Any, dtype: str, batch: int, options: argparse.Namespace
) -> None:
    """Check and time one cached token of each row."""
    text = model.config.text_config
    setting, tried = best_setting(peers["transformers"], prompt(4, text.vocab_size), batch)
    routing = check(case, peers, text.vocab_size, dtype, batch, skip=not options.answer)
    case.facts.update(
        model=options.model, layers=text.num_hidden_layers, vocabulary=text.vocab_size, context=options.context,
        batch=batch, dtype=dtype, transformers_setting=str(setting), transformers_seconds=tried,
    )
    case.needed.update(work(model, routing, batch))
    ids = prompt(options.context, text.vocab_size, seed=1)
    tokens = prompt(options.context, text.vocab_size, batch, seed=2)
    room = options.rounds + 4
    right = {name: peer for name, peer in peers.items() if name not in case.wrong}
    states = {name: peer.rows(peer.prefill(ids, room=room)[1], batch) for name, peer in right.items()}
    counts = dict.fromkeys(peers, 0)

    def step(name: str) -> Tensor:
        counts[name] += 1
        at = counts[name] % tokens.shape[1]
        return peers[name].step(tokens[:, at : at + 1], states[name])

    case.time({name: lambda name=name: step(name) for name in peers}, baseline="transformers")
    for name, timing in case.timings.items():
        case.figures.setdefault(name, {})["ms_per_token"] = 1e3 * timing.min / batch
    print(f"transformers' best setting of {len(tried)} tried: {setting}")


def check(
    case: Case, peers: dict[str, Any], vocabulary: int, dtype: str, batch: int, skip: bool = False
) -> Tensor | None:
    """Compare the logits after one cached token of each row; returns the routing [layers, B, T, top_k] of the float32 run."""
    if skip:
        return None
    theirs = peers["transformers"]
    ids = prompt(ANSWERED, vocabulary).repeat(batch, 1)
    ids[:, -1] = prompt(batch, vocabulary, seed=3)[0]
    fast = theirs.setting
    theirs.set(Setting(experts="eager", attention="eager"))
    hidden, chosen = widened(theirs.model, ids)
    truth = head(theirs.model, hidden[:, -1])
    theirs.set(fast)
    routing = chosen.unflatten(1, ids.shape) if chosen.numel() else None
    for name, peer in peers.items():
        logits = answer(peer, ids, routing)
        case.errors[name] = logit_errors(logits.float(), truth)["rms"]
        if not case.errors[name] <= BOUND[dtype]:
            case.wrong[name] = f"rms error {case.errors[name]:.1e}, bound {BOUND[dtype]:.0e}"
        elif case.errors[name] > max(SAME, WORSE * case.errors["transformers"]):
            case.wrong[name] = f"rms error {case.errors[name]:.1e}, {WORSE} times transformers' is the bound"
    return routing


def answer(peer: Any, ids: Tensor, routing: Tensor | None) -> Tensor:
    """Logits [B, V] after the last token of each row; the tokens before it are the same in all rows."""

    def run() -> Tensor:
        state = peer.rows(peer.prefill(ids[:1, :-1], room=1)[1], len(ids))
        return peer.step(ids[:, -1:], state)

    if routing is None:
        return run()
    with peer.replaying(routing):
        return run()


def work(model: Any, routing: Tensor | None, rows: int) -> dict[str, float]:
    """Bytes of weights that a step of `rows` tokens has to read, and operations of its products."""
    text = model.config.text_config
    share = read_share(routing, text.num_experts, text.num_experts_per_tok, rows) if text.num_experts else 1.0
    used = text.num_experts_per_tok / text.num_experts if text.num_experts else 1.0
    tied = model.config.tie_word_embeddings
    weights = flops = 0.0
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name and not tied:
            continue  # one row of it is read
        expert = ".experts." in name
        weights += parameter.nbytes * (share if expert else 1.0)
        flops += 2.0 * rows * parameter.numel() * (used if expert else 1.0) * (parameter.dim() > 1)
    return {"nbytes": weights, "flops": flops}


def read_share(routing: Tensor | None, experts: int, top_k: int, rows: int) -> float:
    """The share of the experts that a step reads: the last tokens' of a routing [layers, B, T, top_k], or the expected one."""
    if routing is None:
        return 1 - (1 - top_k / experts) ** rows
    distinct = [len(layer[:, -1].unique()) for layer in routing]
    return sum(distinct) / len(distinct) / experts


def prefill(case: Case, peers: dict[str, Any], model: Any, tokens: int) -> None:
    """Time a prefill without a cache of its own before it; the answer of the same models was checked by `decode`."""
    text = model.config.text_config
    ids = prompt(tokens, text.vocab_size, seed=1)
    theirs = peers["transformers"]
    kinds = EXPERTS[:2] if text.num_experts else EXPERTS[:1]
    runs: dict[str, Callable[[], object]] = {kind: lambda kind=kind: _with(theirs, kind, ids) for kind in kinds}
    tried = {kind: timing.min for kind, timing in interleave(runs, rounds=1, warmup=0).items()}
    setting = Setting(experts=min(tried, key=tried.__getitem__))
    theirs.set(setting)
    case.facts.update(tokens=tokens, transformers_setting=str(setting), transformers_seconds=tried)
    case.needed.update(work(model, None, tokens))
    case.needed["flops"] -= 2.0 * (tokens - 1) * model.get_input_embeddings().weight.numel()  # the head sees one token
    case.rounds = min(case.rounds, 3)
    calls = {name: lambda peer=peer: peer.prefill(ids) for name, peer in peers.items()}
    case.time(calls, baseline="transformers", warmup=1)


def _with(theirs: Theirs, kind: str, ids: Tensor) -> Tensor:
    theirs.set(Setting(experts=kind))
    return theirs.prefill(ids)[0]
