"""Mixture-of-experts dispatch: every form and kernel at the published shapes, beside transformers' three.

    python -m benchmarks moe --preset 35b-a3b --tokens 1,64,2048 --json out.json --plot out.png
    python -m benchmarks moe --targets                      # table of target, measurement, verdict
    python -m benchmarks moe --impl my.module:experts       # your kernel: checked, then timed beside the others
    python -m benchmarks moe --trace routing.safetensors    # recorded routing; the bundled checkpoint's shape by default
    python -m benchmarks moe --device cuda --tokens 1,8,64,512,4096,8192,16384,32768 --train both
    python -m benchmarks compare A.json B.json  ·  python -m benchmarks rerun A.json

docs/guide/moe_benchmark.md explains the output. An implementation whose result differs from the definition in float64 by more
than the bound of its dtype is not timed, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.moe import report as pages
from benchmarks.moe import roofline, targets
from benchmarks.moe.cases import BUNDLED, DTYPES, SKEWS, TOKENS, Case, shapes
from benchmarks.moe.implementations import AUTO, implementations
from benchmarks.moe.measure import measure
from benchmarks.tools import limits
from benchmarks.tools.common import SCHEMA, arguments, output_path, warn_if_busy, write_report
from benchmarks.tools.load import OtherLoad
from benchmarks.tools.load import sentence as load_sentence
from benchmarks.tools.machine import environment, header
from benchmarks.tools.memory import free_memory
from qwen35moe.files import write_text

OUTPUTS = ("--json", "--plot", "--markdown", "--append", "--profile")  # paths of the results, which a rerun does not repeat


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    options = parser.parse_args(words)
    cases = list(choose(options, parser))
    head = {"schema": SCHEMA, "benchmark": "moe", "environment": environment(), "arguments": repeatable(words)}
    print(header(head["environment"]))
    load = OtherLoad()
    report = {**head, **run(cases, options), "load": load.as_dict()}
    print(load_sentence(report["load"]))
    warn_if_busy(report["cases"])
    if options.append and options.json and options.json.exists():
        report = merged(json.loads(options.json.read_text(encoding="utf-8")), report)
    if options.targets:
        print("\n" + targets.table(report))
    write_report(options, report)
    if options.markdown:
        write_text(options.markdown, pages.markdown(report))
    if options.plot:
        pages.plot(report, options.plot)
    return int(any(one.get("wrong") for row in report["cases"] for one in row["implementations"].values()))


def make_parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.prog = "python -m benchmarks moe"
    parser.add_argument("--preset", help="shapes, with commas, or all; default 35b-a3b, with --trace the bundled checkpoint")
    parser.add_argument("--tokens", help=f"with commas; default 1,8,64,512,2048; {TOKENS[0]} ... {TOKENS[-1]}")
    parser.add_argument("--skew", default="uniform", help=f"how tokens fall on experts: {', '.join(SKEWS)} (hot-k: any k)")
    parser.add_argument("--trace", help="a Routing file (qwen35moe routing DIR --text F --out FILE) instead of a skew")
    parser.add_argument("--layer", type=int, default=0, help="of the trace")
    parser.add_argument("--dtype", default="bf16", help=f"with commas: {', '.join(DTYPES)}")
    parser.add_argument("--train", choices=("no", "yes", "both"), default="no", help="forward + backward")
    parser.add_argument("--weights", choices=("cold", "warm"), default="cold", help="warm: the same weights every time")
    parser.add_argument("--cache", type=float, help="MB that cold weights exceed; default 4 times the last-level cache")
    parser.add_argument("--only", help="implementations, with commas, by name, by the first word of it, or =NAME")
    parser.add_argument("--impl", action="append", default=[], help="[NAME=]package.module:function, any number of times")
    parser.add_argument("--breakdown", action="store_true", help="also time each step of the sorted form by itself")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure the peak memory")
    parser.add_argument("--seconds", type=float, default=10.0, help="approximate limit of a case's rounds (3 at least)")
    parser.add_argument("--memory-limit", type=float, default=0.6, help="share of free memory for a case's weights")
    parser.add_argument("--targets", action="store_true", help="the cases of the table of targets, and the table")
    parser.add_argument("--markdown", type=output_path, help="write the tables here")
    parser.add_argument("--append", action="store_true", help="keep the other cases of the --json file")
    return parser


def choose(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterable[Case]:
    """The cases of the command line."""
    presets = (options.preset or (BUNDLED if options.trace else "35b-a3b")).split(",")
    presets = list(shapes()) if presets == ["all"] else presets
    if unknown := [name for name in presets if name not in shapes()]:
        parser.error(f"no preset {unknown[0]!r} with experts; there are {', '.join(shapes())}, all")
    tokens = [int(n) for n in (options.tokens or "1,8,64,512,2048").split(",")]
    directions = {"no": (False,), "yes": (True,), "both": (False, True)}[options.train]
    if options.targets:
        train = None if options.train in ("no", "both") and not options.tokens else options.train == "yes"
        presets = presets if options.preset else list(targets.PRESETS)
        return targets.cases(presets, tokens if options.tokens else None, train)
    if unknown := [name for name in options.dtype.split(",") if name not in DTYPES]:
        parser.error(f"no dtype {unknown[0]!r}; there are {', '.join(DTYPES)}")
    cold = options.weights == "cold"
    skews = [""] if options.trace else options.skew.split(",")
    return [
        Case(preset, n, skew, dtype, train, cold, trace=options.trace, layer=options.layer)
        for preset in presets for dtype in options.dtype.split(",") for train in directions for skew in skews for n in tokens
    ]


def repeatable(words: list[str]) -> list[str]:
    """The arguments without the paths of results: a rerun has its own."""
    arguments, skip = [], False
    for word in words:
        name = word.split("=")[0]
        if not skip and name not in OUTPUTS:
            arguments.append(word)
        skip = not skip and name in OUTPUTS and "=" not in word and name != "--append"
    return arguments


def run(cases: Iterable[Case], options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print the cases; {"roofline", "cases"} of the report."""
    forms = implementations(options.device, options.impl)
    if options.targets and not options.only:
        forms = {name: form for name, form in forms.items() if name == AUTO or name.startswith("transformers ")}
    elif options.only:
        only = options.only.split(",")
        exact = {word.removeprefix("=") for word in only if word.startswith("=")}
        forms = {name: form for name, form in forms.items() if name in only or name in exact or name.split()[0] in only}
    roofs: dict[str, limits.Limits] = {}
    rows = []
    cache_bytes = int(4 * limits.last_level_cache() if options.cache is None else options.cache * 1e6)
    for case in cases:
        room = free_memory(options.device) * options.memory_limit
        needed = max(case.weight_bytes * (2 if case.train else 1), cache_bytes if case.cold else 0)
        if needed > room:
            print(f"{case.id}: not run, weights need {needed / 1e9:.1f} GB, --memory-limit allows {room / 1e9:.1f} GB")
            continue
        if case.dtype not in roofs:
            roofs[case.dtype] = limits.measured(options.device, DTYPES[case.dtype])
            print(f"{case.dtype} {limits.sentence(roofs[case.dtype])}", flush=True)
        roof = roofs[case.dtype]
        row = measure(
            case, forms, roof, device=options.device, rounds=options.rounds, seconds=options.seconds,
            cache_bytes=cache_bytes, with_breakdown=options.breakdown, memory=options.memory,
        )
        row["roof_s"] = roofline.limit(row, roof)
        if fast := targets.best(row):
            row["transformers_best"] = fast[0]
        rows.append(row)
        print("\n".join(pages.table(row)), flush=True)
    return {"roofline": next(iter(roofs.values()), {}), "rooflines": roofs, "cases": rows}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new report with the further cases of an old one; both must have the same machine and schema."""
    for key in ("schema", "environment"):
        if old.get(key) != new[key]:
            raise ValueError(f"--append: the file's {key} differs ({old.get(key)!r}, now {new[key]!r}): write another file")
    ids = {row["id"] for row in new["cases"]}
    return {**new, "cases": [row for row in old["cases"] if row["id"] not in ids] + new["cases"]}
