"""One task of text_4b with one library in a process of its own; the last line that it prints is JSON.

    python -m benchmarks.text_4b.worker TASK PEER --checkpoint DIR --tokens 512 --decode 16 --scratch DIR
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.text_4b.peers import peer, seconds, truth
from benchmarks.tools.common import logit_errors
from benchmarks.tools.memory import PeakSampler, evict, usage, weight_files

KEPT = 32  # logits compared: the last of the prompt, 8 of them decoded one by one
STEPS = 8
VOCABULARY = 248_000  # prompts are drawn from it: the last ids of the vocabulary are special tokens


def prompt(tokens: int, seed: int = 0) -> Tensor:
    """[1, tokens] random ids."""
    return torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, prefill and decode with the files in the page cache; memory over all of it."""
    imported, _, runner = seconds(peer, options.peer)
    base, sampler = usage(), PeakSampler()
    load, load_cpu, _ = seconds(runner.load, options.checkpoint)
    ids = prompt(options.tokens + options.decode)
    prefills, state = [], None
    for _ in range(1 + options.prefills):  # the first maps the pages of the weights
        state = None
        wall, cpu, (_, state) = seconds(runner.prefill, ids[:, : options.tokens])
        prefills.append((wall, cpu))
    steps = []
    for t in range(options.tokens, options.tokens + options.decode):
        wall, cpu, logits = seconds(runner.decode, ids[:, t : t + 1], state)
        logits.argmax(-1)
        steps.append((wall, cpu))
    anonymous, after = sampler.stop(), usage()
    return {
        "import": imported,
        "load": [load, load_cpu],
        "first_prefill": prefills[0],
        "prefill": prefills[1:],
        "decode": steps,
        "memory": {"peak": after["VmHWM"], "anonymous": anonymous, "before_loading": base["VmRSS"]},
    }


def cold(options: argparse.Namespace) -> dict[str, Any]:
    """Load and first token with no weight file in the page cache. Imports come before and do not count."""
    runner = peer(options.peer)
    left = evict(weight_files(options.checkpoint))
    if left > 0.01:
        raise SystemExit(f"{left:.0%} of the weight files stay in the page cache: another process has them mapped")
    ids, start = prompt(options.tokens), time.perf_counter()
    load, _, _ = seconds(runner.load, options.checkpoint)
    logits, _ = runner.prefill(ids)
    logits.argmax(-1)
    return {"load": load, "first_token": time.perf_counter() - start, "cached_before": left}


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """Errors of the last KEPT positions' logits, the last STEPS decoded: with the truth's routing, and unforced."""
    ids = prompt(options.tokens)
    if options.peer == "truth":
        logits, indices = truth(options.checkpoint, ids, KEPT)
        torch.save({"logits": logits, "indices": indices}, options.scratch / "truth.pt")
        return {}
    expected = torch.load(options.scratch / "truth.pt")
    runner = peer(options.peer)
    runner.load(options.checkpoint)
    with runner.replaying(expected["indices"]):
        replayed = last_logits(runner, ids)
    errors = {"replayed": logit_errors(replayed, expected["logits"])}
    if options.unforced:
        errors["unforced"] = logit_errors(last_logits(runner, ids), expected["logits"])
    return errors


def last_logits(runner: Any, ids: Tensor) -> Tensor:
    before = ids.shape[1] - STEPS
    logits, state = runner.prefill(ids[:, :before], KEPT - STEPS)
    rows = [logits[0]]
    for t in range(before, ids.shape[1]):
        rows.append(runner.decode(ids[:, t : t + 1], state)[0, -1:])
    return torch.cat(rows).float()


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """Breakdown of the time of one prefill and of the decoded tokens."""
    from benchmarks.text_4b.breakdown import Breakdown

    runner = peer(options.peer)
    runner.load(options.checkpoint)
    ids = prompt(options.tokens + options.decode)
    _, state = runner.prefill(ids[:, : options.tokens])
    breakdown, phases = Breakdown(runner.model, options.peer), {}
    with breakdown:
        breakdown.clear()
        wall, _, (_, state) = seconds(runner.prefill, ids[:, : options.tokens])
        phases["prefill"] = breakdown.table(wall)
        runner.decode(ids[:, options.tokens : options.tokens + 1], state)
        breakdown.clear()
        wall = 0.0
        for t in range(options.tokens + 1, options.tokens + options.decode):
            wall += seconds(runner.decode, ids[:, t : t + 1], state)[0]
        phases["decode"] = breakdown.table(wall, options.decode - 1)
    return phases


TASKS = {"measure": measure, "cold": cold, "answer": answer, "profile": profile}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text_4b.worker")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("peer", choices=("ours", "ours packed", "transformers", "truth"))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--prefills", type=int, default=2)
    parser.add_argument("--unforced", action="store_true")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--kernels", help="a module to import that registers implementations with our backends")
    options = parser.parse_args(argv)
    if options.kernels and options.peer.startswith("ours"):
        importlib.import_module(options.kernels)
    print(json.dumps(TASKS[options.task](options)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
