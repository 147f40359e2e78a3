"""One side of text_4b in a process of its own; the last line it prints is JSON.

    python -m benchmarks.text_4b.worker TASK SIDE --checkpoint DIR --tokens 512 --decode 16 --scratch DIR
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

from benchmarks.text_4b.memory import Watch, evict, usage, weight_files
from benchmarks.text_4b.sides import seconds, side, truth

KEPT = 32  # logits compared: the last of the prompt, 8 of them decoded one by one
STEPS = 8
WORDS = 248_000  # prompts are drawn from the vocabulary without its last, special words


def prompt(tokens: int, seed: int = 0) -> Tensor:
    """[1, tokens] random ids."""
    return torch.randint(0, WORDS, (1, tokens), generator=torch.Generator().manual_seed(seed))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, prefill and decode with the files in the page cache; memory over all of it."""
    imported, _, runner = seconds(side, options.side)
    base, watch = usage(), Watch()
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
    anonymous, after = watch.stop(), usage()
    return {
        "import": imported,
        "load": [load, load_cpu],
        "first_prefill": prefills[0],
        "prefill": prefills[1:],
        "decode": steps,
        "memory": {"peak": after["VmHWM"], "anonymous": anonymous, "before_loading": base["VmRSS"]},
    }


def cold(options: argparse.Namespace) -> dict[str, Any]:
    """Load and first token with nothing of the weights in the page cache. Imports come before and do not count."""
    runner = side(options.side)
    left = evict(weight_files(options.checkpoint))
    if left > 0.01:
        raise SystemExit(f"{left:.0%} of the weight files stay in the page cache: another process has them mapped")
    ids, start = prompt(options.tokens), time.perf_counter()
    load, _, _ = seconds(runner.load, options.checkpoint)
    logits, _ = runner.prefill(ids)
    logits.argmax(-1)
    return {"load": load, "first_token": time.perf_counter() - start, "cached_before": left}


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """Logits of the last KEPT positions, the last STEPS of them decoded: with the truth's routing, and free."""
    ids = prompt(options.tokens)
    if options.side == "truth":
        logits, indices = truth(options.checkpoint, ids, KEPT)
        torch.save({"logits": logits, "indices": indices}, options.scratch / "truth.pt")
        return {}
    expected = torch.load(options.scratch / "truth.pt")
    runner = side(options.side)
    runner.load(options.checkpoint)
    with runner.replaying(expected["indices"]):
        replayed = last_logits(runner, ids)
    found = {"replayed": compare(replayed, expected["logits"])}
    if options.free:
        found["free"] = compare(last_logits(runner, ids), expected["logits"])
    torch.save(replayed, options.scratch / f"{options.side}.pt")
    return found


def last_logits(runner: Any, ids: Tensor) -> Tensor:
    before = ids.shape[1] - STEPS
    logits, state = runner.prefill(ids[:, :before], KEPT - STEPS)
    rows = [logits[0]]
    for t in range(before, ids.shape[1]):
        rows.append(runner.decode(ids[:, t : t + 1], state)[0, -1:])
    return torch.cat(rows).float()


def compare(found: Tensor, expected: Tensor) -> dict[str, float]:
    difference = found - expected
    return {
        "max": (difference.abs().max() / expected.abs().max()).item(),
        "rms": (difference.square().mean() / expected.square().mean()).sqrt().item(),
        "top1": (found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """Where the time of one prefill and of the decoded tokens goes."""
    from benchmarks.text_4b.parts import Parts

    runner = side(options.side)
    runner.load(options.checkpoint)
    ids = prompt(options.tokens + options.decode)
    _, state = runner.prefill(ids[:, : options.tokens])
    parts, found = Parts(runner.model, options.side), {}
    with parts:
        parts.clear()
        wall, _, (_, state) = seconds(runner.prefill, ids[:, : options.tokens])
        found["prefill"] = parts.table(wall)
        runner.decode(ids[:, options.tokens : options.tokens + 1], state)
        parts.clear()
        wall = 0.0
        for t in range(options.tokens + 1, options.tokens + options.decode):
            wall += seconds(runner.decode, ids[:, t : t + 1], state)[0]
        found["decode"] = parts.table(wall, options.decode - 1)
    return found


TASKS = {"measure": measure, "cold": cold, "answer": answer, "profile": profile}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text_4b.worker")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("side", choices=("ours", "transformers", "truth"))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--prefills", type=int, default=2)
    parser.add_argument("--free", action="store_true")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--kernels", help="a module to import that registers implementations with our backends")
    options = parser.parse_args(argv)
    if options.kernels and options.side == "ours":
        importlib.import_module(options.kernels)
    print(json.dumps(TASKS[options.task](options)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
