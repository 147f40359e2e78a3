"""The 4.54B model on a CPU in bfloat16, beside transformers: load, prefill, decode, memory, cold start.

    python -m benchmarks.synthetic /somewhere/4b                  # writes the checkpoint, 9 GB, outside the repository
    python -m benchmarks text_4b --checkpoint /somewhere/4b [--profile] [--no-cold] [--json out.json]

Each side runs in a process of its own, in turns, one at a time. First the answer: logits of the last 32 positions (24
from a prefill, 8 decoded) against transformers in float32, both sides with the routing that float32 chose; a side that is
further off than bfloat16 explains, or ours more than 1.25 times transformers', has no speed. Then, with all weight files
in the page cache: from_pretrained ("load"), a prefill that returns the last token's logits, one cached token at a time
("decode"). Last, with none of them there: load + first token. Times are minima over all rounds.

Memory is the high-water mark of the resident set (VmHWM) from start to end, mapped pages of the weight files included,
against the bytes of the text weights; RssAnon alone, which is what other processes cannot have, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Report, Timing, arguments
from benchmarks.text_4b.memory import warm, weight_files

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("transformers", "ours")
NOISE = 0.05  # rms error over rms of the logits: 32 layers of bfloat16 and these weights come to 0.02
WORSE = 1.25  # ours over transformers'
ROOM = 1.15  # peak memory over weights
COLD = 0.6  # ours over transformers', load + first token


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt")
    parser.add_argument("--decode", type=int, default=16, help="tokens decoded in each round")
    parser.add_argument("--prefills", type=int, default=2, help="prefills in each round after the first")
    parser.add_argument("--profile", action="store_true", help="only show where the time goes")
    parser.add_argument("--no-cold", dest="cold", action="store_false", help="leave the page cache alone")
    parser.add_argument("--no-answer", dest="answer", action="store_false", help="trust the answers, while tuning")
    parser.add_argument("--kernels", help="a module to import that registers implementations with our backends")
    parser.add_argument("--free", action="store_true", help="also compare with each side's own routing")
    options = parser.parse_args(None if argv is None else list(argv))
    report = Report("text_4b", rounds=options.rounds)
    files, weights = weight_files(options.checkpoint), text_bytes(options.checkpoint)
    print(f"text weights {weights / 1e9:.2f} GB, {warm(files):.0%} of the files in the page cache")
    if options.profile:
        for name in SIDES:
            show_parts(name, worker("profile", name, options))
        return 0
    answers = check(options) if options.answer else {}
    refused = wrong(answers)
    results = in_turns("measure", [name for name in SIDES if name not in refused], options)
    colds = in_turns("cold", [name for name in results if options.cold], options)
    tabulate(report, options, answers, refused, results, colds)
    memory = memory_table(results, weights)
    status = report.finish(options)
    if options.json:
        extra = {"answers": answers, "memory": memory, "text_bytes": weights, "runs": results, "cold": colds}
        options.json.write_text(json.dumps({**report.as_dict(), **extra}, indent=1) + "\n", encoding="utf-8")
    return status


def in_turns(task: str, names: list[str], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What each side's worker found in each round; the order turns every round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            found[name].append(worker(task, name, options))
    return found


def worker(task: str, side: str, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What `benchmarks.text_4b.worker` prints as JSON, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.text_4b.worker", task, side, "--checkpoint", str(options.checkpoint)]
    for name in ("tokens", "decode", "prefills"):
        command += [f"--{name}", str(getattr(options, name))]
    if options.kernels:
        command += ["--kernels", options.kernels]
    done = subprocess.run([*command, *more], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}, {task}: the process ended with {done.returncode}\n{done.stdout}")
    return json.loads(done.stdout.splitlines()[-1])


def text_bytes(folder: Path) -> int:
    """Bytes of the tensors that a text model reads, from the headers of the files."""
    total = 0
    for file in weight_files(folder):
        with file.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__" and not name.startswith(("model.visual.", "mtp.")):
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


def check(options: argparse.Namespace) -> dict[str, dict]:
    """The errors of both sides, each from its own process, against one that computes in float32."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        more = ["--scratch", scratch, *(["--free"] if options.free else [])]
        worker("answer", "truth", options, *more)
        for name in SIDES:
            found[name] = worker("answer", name, options, *more)
            for routing, row in found[name].items():
                print(
                    f"{name:<14} {routing} routing: relative error {row['max']:.1e} (rms {row['rms']:.1e}), "
                    f"same first word {row['top1']:.0%}",
                    flush=True,
                )
    return found


def wrong(answers: dict[str, dict]) -> dict[str, str]:
    """The sides that get no speed, with the reason."""
    if not answers:
        return {}
    rms = {name: answers[name]["replayed"]["rms"] for name in SIDES}
    said = {name: f"rms error {e:.1e}, bound {NOISE:.0e}" for name, e in rms.items() if not e <= NOISE}
    if "ours" not in said and not rms["ours"] <= WORSE * rms["transformers"]:
        said["ours"] = f"rms error {rms['ours']:.1e}, {WORSE} times transformers' is {WORSE * rms['transformers']:.1e}"
    return said


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
    for id, (found, pick) in cases.items():
        with report.case(f"text_4b/{id}/bf16") as case:
            case.baseline = "transformers"
            case.wrong.update(refused)
            for name in SIDES:
                if name in answers:
                    case.errors[name] = answers[name]["replayed"]["rms"]
                if name in found:
                    case.timings[name] = Timing(tuple(seconds for run in found[name] for seconds in pick(run)))
    ratio = case.ratio("ours")
    if options.cold and ratio is not None:
        print(f"  cold start: {ratio:.2f} of transformers' time, asked for at most {COLD}")


def memory_table(results: dict[str, list], weights: int) -> dict[str, dict[str, float]]:
    """The largest of all rounds; printed."""
    table = {}
    print(f"text_4b/memory: text weights {weights / 1e9:.2f} GB, bound {ROOM} of them")
    for name, runs in results.items():
        row = {key: max(run["memory"][key] for run in runs) for key in runs[0]["memory"]}
        table[name] = {**row, "peak_over_weights": row["peak"] / weights}
        verdict = "" if name != "ours" else "  within the bound" if row["peak"] <= ROOM * weights else "  TOO MUCH"
        print(
            f"  {name:<24} peak {row['peak'] / 1e9:6.2f} GB = {row['peak'] / weights:.3f} of the weights; "
            f"anonymous {row['anonymous'] / 1e9:5.2f} GB; before loading {row['before_loading'] / 1e9:.2f} GB{verdict}"
        )
    return table


def show_parts(name: str, found: dict[str, dict]) -> None:
    for phase, parts in found.items():
        print(f"\n{name}, {phase}: milliseconds (calls)")
        for part, row in parts.items():
            print(f"  {part:<28} {row['ms']:9.2f}  ({row['calls']:.0f})")
