"""The 4.54B model on a CPU in bfloat16, beside transformers: load, prefill, decode, memory, cold start.

    python -m benchmarks synthetic /somewhere/4b                  # writes the checkpoint, 9 GB, outside the repository
    python -m benchmarks text_4b --checkpoint /somewhere/4b [--breakdown] [--packed] [--no-cold] [--json out.json]

Each library runs in a process of its own, in turns. First the answer: logits of the last 32 positions (24 from a prefill, 8
decoded) against transformers in float32, both with the routing of the float32 run. A library is not timed if its error
exceeds bfloat16's, or, for ours, 1.25 times transformers'. Then, with all weight files in the page cache: from_pretrained
("load"), a prefill that returns the last token's logits, one cached token at a time ("decode"). Last, with no weight file in
the page cache: load + first token. Times are minima over all rounds.

Memory is the high-water mark of the resident set (VmHWM) of the whole run, mapped pages of the weight files included,
against the bytes of the text weights; beside it RssAnon, the part that cannot be shared or dropped.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tools import synthetic
from benchmarks.tools.common import Report, Timing, arguments, fresh_process, in_turns, limit_dtypes
from benchmarks.tools.memory import stored_bytes, warm, weight_files

PEERS = ("transformers", "ours")
PACKED = "ours packed"
NOISE = 0.05  # rms error over rms of the logits: 32 layers of bfloat16 and these weights come to 0.02
WORSE = 1.25  # ours over transformers'
ROOM = {"ours": 1.10, PACKED: 1.12}  # peak memory over weights
COLD = 0.6  # ours over transformers', load + first token


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt")
    parser.add_argument("--decode", type=int, default=16, help="tokens decoded in each round")
    parser.add_argument("--prefills", type=int, default=2, help="prefills in each round after the first")
    parser.add_argument("--breakdown", action="store_true", help="only print the breakdown of the time")
    parser.add_argument("--packed", action="store_true", help="also ours with weights=\"packed\"")
    parser.add_argument("--no-cold", dest="cold", action="store_false", help="leave the page cache alone")
    parser.add_argument("--no-answer", dest="answer", action="store_false", help="do not check the answers, while tuning")
    parser.add_argument("--kernels", help="a module to import that registers implementations with our backends")
    parser.add_argument("--unforced", action="store_true", help="also compare with each library's own routing")
    options = parser.parse_args(None if argv is None else list(argv))
    report = Report("text_4b", rounds=options.rounds, dtypes=limit_dtypes(options, torch.bfloat16))
    peers = [*PEERS, PACKED] if options.packed and packs() else [*PEERS]
    files, weights = weight_files(options.checkpoint), text_bytes(options.checkpoint)
    print(f"text weights {weights / 1e9:.2f} GB, {warm(files):.0%} of the files in the page cache")
    if options.breakdown:
        for name in PEERS:
            print_breakdown(name, worker("profile", name, options))
        return 0
    answers = check(options, peers) if options.answer else {}
    refused = wrong(answers)
    timed = [name for name in peers if name not in refused]
    results = in_turns(timed, options.rounds, lambda name, number: worker("measure", name, options))
    plain = [name for name in timed if name != PACKED]
    colds = in_turns(plain if options.cold else [], options.rounds, lambda name, number: worker("cold", name, options))
    tabulate(report, options, answers, refused, results, colds)
    memory = memory_table(results, weights)
    report.extra = {"answers": answers, "memory": memory, "text_bytes": weights, "runs": results, "cold": colds}
    return report.finish(options)


def worker(task: str, peer: str, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The result of a task of `benchmarks.text_4b.worker` in a fresh process."""
    command = ["-m", "benchmarks.text_4b.worker", task, peer, "--checkpoint", str(options.checkpoint)]
    for name in ("tokens", "decode", "prefills"):
        command += [f"--{name}", str(getattr(options, name))]
    if options.kernels:
        command += ["--kernels", options.kernels]
    return fresh_process(*command, *more)


def text_bytes(folder: Path) -> int:
    """Bytes of the tensors that a text model reads."""
    return sum(nbytes for name, nbytes in stored_bytes(folder) if not name.startswith(("model.visual.", "mtp.")))


def packs() -> bool:
    """Whether this version of the library has packed weights."""
    from qwen35moe import Qwen3_5MoeForCausalLM

    return hasattr(Qwen3_5MoeForCausalLM, "pack_weights")


def needed(phase: str, options: argparse.Namespace) -> dict[str, float]:
    """Bytes of weights that a decoded token reads, operations of the products of a prefill, without the head's."""
    if phase not in ("decode", "prefill", "first_prefill"):
        return {}
    experts, chosen = synthetic.TEXT["num_experts"], synthetic.TEXT["num_experts_per_tok"]
    nbytes = numbers = 0.0
    for name, size in stored_bytes(options.checkpoint):
        if not name.startswith(("model.visual.", "mtp.")):
            used = chosen / experts if ".mlp.experts." in name else 1.0
            nbytes += used * size
            numbers += used * size / 2 * ("embed_tokens" not in name)
    return {"nbytes": nbytes, "flops": 2 * numbers * (1 if phase == "decode" else options.tokens)}


def check(options: argparse.Namespace, peers: Sequence[str] = PEERS) -> dict[str, dict]:
    """The errors of the libraries, each from its own process, against a float32 run."""
    errors = {}
    with tempfile.TemporaryDirectory() as scratch:
        more = ["--scratch", scratch, *(["--unforced"] if options.unforced else [])]
        worker("answer", "truth", options, *more)
        for name in peers:
            errors[name] = worker("answer", name, options, *more)
            for routing, row in errors[name].items():
                print(
                    f"{name:<14} {routing} routing: relative error {row['max']:.1e} (rms {row['rms']:.1e}), "
                    f"same first token {row['top1']:.0%}",
                    flush=True,
                )
    return errors


def wrong(answers: dict[str, dict]) -> dict[str, str]:
    """The libraries that are not timed, with the reason."""
    if not answers:
        return {}
    rms = {name: row["replayed"]["rms"] for name, row in answers.items()}
    reasons = {name: f"rms error {e:.1e}, bound {NOISE:.0e}" for name, e in rms.items() if not e <= NOISE}
    for name in rms:
        if name not in reasons and not rms[name] <= WORSE * rms["transformers"]:
            reasons[name] = f"rms error {rms[name]:.1e}, {WORSE} times transformers' is {WORSE * rms['transformers']:.1e}"
    return reasons


def tabulate(
    report: Report, options: argparse.Namespace, answers: dict[str, dict], refused: dict[str, str],
    results: dict[str, list[dict]], colds: dict[str, list[dict]],
) -> None:
    """One case per measured time, into the report."""
    size = f"T{options.tokens}"
    cases = {
        "load": (results, lambda run: [run["load"][0]]),
        f"first_prefill/{size}": (results, lambda run: [run["first_prefill"][0]]),
        f"prefill/{size}": (results, lambda run: [wall for wall, _ in run["prefill"]]),
        "decode": (results, lambda run: [wall for wall, _ in run["decode"]]),
    }
    if options.cold:
        cases[f"cold_first_token/{size}"] = (colds, lambda run: [run["first_token"]])
    for id, (runs, pick) in cases.items():
        with report.case(f"text_4b/{id}/bf16") as case:
            case.baseline = "transformers"
            case.wrong.update(refused)
            case.limits, case.needed = report.limits_of("bf16"), needed(id.partition("/")[0], options)
            for name in {**dict.fromkeys(answers), **runs}:
                if name in answers:
                    case.errors[name] = answers[name]["replayed"]["rms"]
                if name in runs:
                    case.timings[name] = Timing(tuple(seconds for run in runs[name] for seconds in pick(run)))
    ratio = case.ratio("ours")
    if options.cold and ratio is not None:
        print(f"  cold start: {ratio:.2f} of transformers' time, target at most {COLD}")


def memory_table(results: dict[str, list], weights: int) -> dict[str, dict[str, float]]:
    """The largest of all rounds; printed."""
    table = {}
    print(f"text_4b/memory: text weights {weights / 1e9:.2f} GB")
    for name, runs in results.items():
        row = {key: max(run["memory"][key] for run in runs) for key in runs[0]["memory"]}
        table[name] = {**row, "peak_over_weights": row["peak"] / weights}
        bound = ROOM.get(name)
        verdict = "" if bound is None else f"  {'within' if row['peak'] <= bound * weights else 'ABOVE'} the bound {bound}"
        print(
            f"  {name:<24} peak {row['peak'] / 1e9:6.2f} GB = {row['peak'] / weights:.3f} of the weights; "
            f"anonymous {row['anonymous'] / 1e9:5.2f} GB; before loading {row['before_loading'] / 1e9:.2f} GB{verdict}"
        )
    return table


def print_breakdown(name: str, phases: dict[str, dict]) -> None:
    for phase, parts in phases.items():
        print(f"\n{name}, {phase}: milliseconds (calls)")
        for part, row in parts.items():
            print(f"  {part:<28} {row['ms']:9.2f}  ({row['calls']:.0f})")
