"""Loading a checkpoint in bfloat16, beside transformers: seconds, bytes per second, anonymous memory; one layer alone.

    python -m benchmarks synthetic /somewhere/4b --layout per_expert     # 9 GB, outside the repository
    python -m benchmarks loading --checkpoint /somewhere/4b [--device cuda] [--json out.json]

Each measurement is a process of its own, in turns, with all weight files in the page cache. "load" is from_pretrained;
"load and touch" ends when every page of the weights was read once, since a load that maps files has not read them;
"copied" is ours with weights="copy". With --device cuda the weights end on the GPU (transformers loads them on the CPU and
moves them). The answer: the parameters of all must have the same digests (sums of all bits, and samples; first round), those
kept in float32 rounded to bfloat16 first, as transformers stores them. "layer" is one layer with weights="copy" beside
reading as many bytes from the same files into fresh memory (--layer -1: not measured). Memory is the growth of RssAnon
during the load, against the experts' bytes; on a GPU that is the size of the buffers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.text_4b.peers import peer
from benchmarks.tools.common import Case, Report, Timing, arguments, fresh_process, in_turns, limit_dtypes
from benchmarks.tools.memory import PeakSampler, stored_bytes, usage, warm, weight_files

IMPLEMENTATIONS = ("transformers", "ours", "copied")
FASTER = 4  # per-expert files: ours against transformers
ROOM = 0.3e9  # anonymous bytes beyond the experts'


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=3, help="the layer that is loaded alone")
    parser.add_argument("--digest", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=(*TASKS,), help=argparse.SUPPRESS)
    options = parser.parse_args(None if argv is None else list(argv))
    if options.worker:
        print(json.dumps(TASKS[options.worker](options)), flush=True)
        return 0
    dtypes = limit_dtypes(options, torch.bfloat16)
    report = Report("loading", rounds=options.rounds, dtypes=dtypes)  # timed by the workers, each in its own process
    files, experts = weight_files(options.checkpoint), expert_bytes(options.checkpoint)
    layout = "per_expert" if experts["per_expert"] else "grouped"
    place = "" if options.device == "cpu" else "/gpu"
    total = sum(experts.values()) / 1e9
    print(f"{layout}: experts {total:.2f} GB, {warm(files):.0%} of the files in the page cache", flush=True)
    runs = in_turns(IMPLEMENTATIONS, options.rounds, lambda task, number: worker(task, number, options))
    for name in ("load", "load_and_touch"):
        with report.case(f"loading/{layout}{place}/{name}/bf16") as case:
            compare(case, runs, name)
    layers: dict[str, list[dict[str, Any]]] = {}
    if options.layer >= 0:
        layers = in_turns(("read", "layer"), options.rounds, lambda task, number: worker(task, number, options))
        with report.case(f"loading/{layout}/one_layer/bf16") as case:
            case.baseline = "read"
            case.timings.update({name: Timing(tuple(run["load"] for run in rows)) for name, rows in layers.items()})
    memory = {name: max(run["anonymous"] for run in rows) for name, rows in runs.items()}
    for name, most in memory.items():
        print(f"  {name:<24} anonymous memory {most / 1e9:6.2f} GB, {(most - experts['per_expert']) / 1e9:+.2f} beside the "
              f"experts that are stacked (ours: at most {ROOM / 1e9})")  # fmt: skip
    report.extra = {"anonymous": memory, "experts": experts}
    if layers:
        report.extra["layer_bytes"] = layers["layer"][0]["nbytes"]
    return report.finish(options)


def compare(case: Case, runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Times of the implementations whose weights agree."""
    digests = {who: {run["digest"] for run in rows if run["digest"]} for who, rows in runs.items()}
    case.baseline = "transformers"
    for implementation, rows in runs.items():
        if digests[implementation] != digests["transformers"] or len(digests[implementation]) != 1:
            case.wrong[implementation] = "the digests of its weights differ from transformers'"
        case.figures[implementation] = {"GB/s": rows[0]["nbytes"] / min(run[name] for run in rows) / 1e9}
    right = {who: rows for who, rows in runs.items() if who not in case.wrong}
    case.timings.update({who: Timing(tuple(run[name] for run in rows)) for who, rows in right.items()})


def worker(task: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """The result of a task in a fresh process, in round `number`."""
    command = ["-m", "benchmarks.loading", "--worker", task, "--checkpoint", str(options.checkpoint)]
    command += ["--layer", str(options.layer), "--device", options.device, *(["--digest"] if number == 0 else [])]
    warm(weight_files(options.checkpoint))  # every time: a system may drop cached pages within seconds
    return fresh_process(*command)


def load(options: argparse.Namespace) -> dict[str, Any]:
    """from_pretrained, then the first read of all weights."""
    runner = peer("transformers" if options.worker == "transformers" else "ours")
    if options.device != "cpu":
        torch.zeros(1, device=options.device)  # starts the device
    base, sampler = usage()["RssAnon"], PeakSampler()
    start = time.perf_counter()
    if options.worker == "transformers":
        runner.load(options.checkpoint)
        model = runner.model.to(options.device)
    else:
        how = "copy" if options.worker == "copied" else "map"
        model = runner.cls.from_pretrained(options.checkpoint, weights=how, device=options.device)
    wait(options.device)
    loaded = time.perf_counter()
    for parameter in model.parameters():
        parameter.detach().view(-1).view(torch.uint8)[::4096].sum()
    wait(options.device)
    touched = time.perf_counter()
    anonymous = sampler.stop() - base
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    times = {"load": loaded - start, "load_and_touch": touched - start}
    return {**times, "anonymous": anonymous, "nbytes": nbytes, "digest": digest(model) if options.digest else None}


def wait(device: str) -> None:
    """Wait until the device is idle."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def digest(model: nn.Module) -> str:
    """A digest of all parameters in bfloat16, by name."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().to(torch.bfloat16).contiguous().view(-1).view(torch.int16)
        whole = flat.numel() // 4 * 4
        bits = int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())  # modulo 2^64
        total.update(f"{name} {list(value.shape)} {bits}".encode())
        total.update(bytes(_bytes(flat[:: 1 + flat.numel() // 1009])))
    return total.hexdigest()


def _bytes(values: Tensor) -> list[int]:
    return values.contiguous().view(torch.uint8).tolist()


def layer(options: argparse.Namespace) -> dict[str, Any]:
    """Load one layer, with the embedding and the norm of every model, into memory."""
    from qwen35moe import Qwen3_5MoeForCausalLM

    start = time.perf_counter()
    model = Qwen3_5MoeForCausalLM.from_pretrained(options.checkpoint, layers=[options.layer], weights="copy")
    taken = time.perf_counter() - start
    return {"load": taken, "nbytes": model.loading_report.nbytes}


def read(options: argparse.Namespace) -> dict[str, Any]:
    """Read as many bytes from the beginning of the files with two threads."""
    from concurrent.futures import ThreadPoolExecutor

    from qwen35moe import Qwen3_5MoeForCausalLM
    from qwen35moe.checkpoint.memory import new_memory, read_exactly
    from qwen35moe.checkpoint.transfer import CHUNK

    sizes = Qwen3_5MoeForCausalLM.from_pretrained(options.checkpoint, layers=[options.layer], device="meta")
    nbytes = sum(parameter.nbytes for parameter in sizes.parameters())
    jobs: list[tuple[Path, int, int, int]] = []
    at = 0
    for file in weight_files(options.checkpoint):
        count = min(nbytes - at, file.stat().st_size)
        jobs += [(file, at + begin, min(CHUNK, count - begin), begin) for begin in range(0, count, CHUNK)]
        at += count
    start = time.perf_counter()
    target = new_memory((nbytes,), torch.uint8, torch.device("cpu"))

    def fetch(job: tuple[Path, int, int, int]) -> None:
        file, at, count, begin = job
        descriptor = os.open(file, os.O_RDONLY)
        read_exactly(descriptor, target.data_ptr() + at, count, begin)
        os.close(descriptor)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fetch, jobs))
    return {"load": time.perf_counter() - start, "nbytes": nbytes}


def expert_bytes(folder: Path) -> dict[str, int]:
    """Bytes of routed experts in the files, by layout."""
    total = {"grouped": 0, "per_expert": 0}
    for name, nbytes in stored_bytes(folder):
        if ".mlp.experts." in name and not name.startswith("mtp."):
            total["per_expert" if name.endswith(".weight") else "grouped"] += nbytes
    return total


TASKS = {"transformers": load, "ours": load, "copied": load, "layer": layer, "read": read}


if __name__ == "__main__":
    sys.exit(main())
