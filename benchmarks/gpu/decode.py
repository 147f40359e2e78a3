"""The 35B's shape: one decoded token eager and captured, prefill, loading. Random weights, drawn on the device.

An H100 holds fewer than 40 layers in bfloat16. The step is then measured with fewer and scaled by the number of layers; the row
says so.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import targets
from benchmarks.gpu.model import build, configuration
from benchmarks.gpu.rows import MEASURED, MET, MISSED, NOT_RUN, RIGHT, WRONG, Rows, bounded, judged, said
from benchmarks.gpu.speed import gpu_name
from benchmarks.gpu.work import Work, rates
from benchmarks.tools.common import Timing, relative_error

LAYERS = 40
LAYER_BYTES = 1.72e9  # of a layer in bfloat16: 256 experts are 1.61 GB of it
STEP, PREFILL = 13e9, 20e9  # bytes for embedding and head, states and temporaries
ROOM = 2048  # positions of the static cache


class Subject:
    """The model of a step, built once."""

    def __init__(self, work: Work, kept: float = STEP, layers: int | None = None) -> None:
        self.layers = layers or fitting(work, kept)
        self.model = build(configuration(work.small, self.layers), work.device)
        self.scale = 1.0 if work.small else LAYERS / self.layers
        self.vocabulary = self.model.config.text_config.vocab_size
        self.nbytes = sum(parameter.nbytes for parameter in self.model.parameters())
        scaled = f", scaled to {LAYERS}" if self.scale != 1 else ""
        self.about = f"{self.layers} layers, {self.nbytes / 1e9:.3g} GB{scaled}"

    def ids(self, work: Work, T: int) -> Tensor:
        return torch.randint(1, self.vocabulary, (1, T), generator=torch.Generator().manual_seed(T)).to(work.device)


def fitting(work: Work, kept: float) -> int:
    """Layers that fit the device beside the bytes that are kept free, a multiple of four."""
    if work.small:
        return 4
    free = torch.cuda.mem_get_info()[0]
    return max(4, min(LAYERS, int((free - kept) / LAYER_BYTES) // 4 * 4))


def decode(rows: Rows, work: Work) -> None:
    if not rows.selects_any("decode"):
        return
    work.free()
    with work.own_kernels():
        decode_rows(rows, work)


def decode_rows(rows: Rows, work: Work) -> None:
    subject = Subject(work)
    model, prompt = subject.model, subject.ids(work, 7 if work.small else 512)
    room = prompt.shape[1] + 8 if work.small else ROOM
    with torch.no_grad():
        cache = model.new_cache(1, max_length=room)
        rows.measure("decode/equals_prefill", lambda: equals_prefill(model, prompt))
        model(prompt[:, :-2], cache=cache, logits_to_keep=1)

        def step() -> Tensor:
            return model(prompt[:, :1], cache=cache, logits_to_keep=1).logits

        rows.measure("decode/synchronisations", lambda: synchronisations(work, step))
        rows.measure("decode/eager", lambda: eager(work, subject, step))
    for name in ("captured", "uncaptured"):
        rows.measure(f"decode/{name}", lambda name=name: generated(work, subject, prompt, name == "captured"))


def equals_prefill(model: Any, prompt: Tensor) -> dict[str, Any]:
    """The last token's logits after a cached step and in a prefill. bfloat16 roundings of two forms: coarse."""
    whole = model(prompt, logits_to_keep=1).logits
    cache = model.new_cache(1, max_length=prompt.shape[1] + 1)
    model(prompt[:, :-1], cache=cache, logits_to_keep=1)
    step = model(prompt[:, -1:], cache=cache, logits_to_keep=1).logits
    if not bool(whole.isfinite().all()):
        return {"verdict": WRONG, "note": "the prefill's logits are not finite"}
    return bounded(relative_error(step, whole), 0.1)


def synchronisations(work: Work, step: Any) -> dict[str, Any]:
    """One step under torch's debug mode, which raises at a synchronisation."""
    step()
    try:
        with work.no_synchronisation():
            step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return {"verdict": MISSED, "measured": "at least 1", "target": "0", "note": said(error)}
    if work.small:
        return {"verdict": NOT_RUN, "note": "torch counts synchronisations on a GPU only"}
    return {"verdict": MET, "measured": 0, "target": "0"}


def eager(work: Work, subject: Subject, step: Any) -> dict[str, Any]:
    """Host time of a step that ends with the device idle."""
    work.sync()
    seconds = []
    for _ in range(2 if work.small else 20):
        start = time.perf_counter()
        step()
        work.sync()
        seconds.append(time.perf_counter() - start)
    profile = work.profile(step)
    launches, timing = profile["launches"] * subject.scale, Timing(tuple(seconds))
    host, device = timing.median * subject.scale * 1e3, profile["device_ms"] * subject.scale
    note = f"{host:.4g} ms, on the device {device:.4g} ms; {subject.about}"
    fields = judged(float(launches), "launches per token", None if work.small else targets.LAUNCHES, most=True, note=note)
    return {**fields, **profile, "implementations": {"ours": rates(timing)}, "peak_bytes": work.peak()}


def generated(work: Work, subject: Subject, prompt: Tensor, captured: bool) -> dict[str, Any]:
    """Tokens per second of `generate` without its prompt: the difference of a long and a short answer."""
    why = not_captured(subject.model) if captured else None
    if why:
        return {"verdict": NOT_RUN if work.small else MISSED, "note": f"no CUDA graph: {why}"}
    short, long = (2, 4) if work.small else (16, 144)

    def run(count: int) -> float:
        work.sync()
        start = time.perf_counter()
        out = answer(subject.model, prompt, count, captured)
        work.sync()
        if out.shape[1] not in (count, prompt.shape[1] + count):
            raise ValueError(f"{tuple(out.shape)} tokens of {count} new ones")
        return time.perf_counter() - start

    with logged() as text:
        run(short)  # compiles, and captures
        seconds = [(run(long) - run(short)) / (long - short) for _ in range(1 if work.small else 3)]
        profile = work.profile(lambda: answer(subject.model, prompt, short, captured))
    per_token = max(min(seconds), 1e-9) * subject.scale
    target = targets.memory_bound(targets.DECODE, gpu_name(work)) if captured else None
    note = f"{per_token * 1e3:.4g} ms per token; {subject.about}{'; ' + text[0] if text else ''}"
    fields = judged(1 / per_token, "tokens/s", target, note=note)
    if captured and any("could not be captured" in line for line in text):
        fields["verdict"] = MISSED
    times = rates(Timing(tuple(max(s, 1e-9) for s in seconds)))
    return {**fields, "top": profile["top"], "peak_bytes": work.peak(), "implementations": {"ours": times}}


RECORDING = "qwen35moe.generation.capturable"  # decides which steps are recorded as a CUDA graph


def not_captured(model: Any) -> str | None:
    """Why the steps of `generate` are not captured as a CUDA graph, or None."""
    if not importlib.util.find_spec(RECORDING):
        return "this version records no steps"
    return importlib.import_module(RECORDING).reason(model)


def answer(model: Any, prompt: Tensor, count: int, captured: bool) -> Tensor:
    """Greedy, without stop tokens, from a static cache."""
    options = {"capture": captured} if importlib.util.find_spec(RECORDING) else {}
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=count, eos_token_id=(), cache="static", **options)


class logged(logging.Handler):
    """The warnings and logged warnings inside the block, as strings: why a step was not captured is among them."""

    def __enter__(self) -> list[str]:
        self.text: list[str] = []
        self.caught = warnings.catch_warnings(record=True)
        self.records: Any = self.caught.__enter__()
        warnings.simplefilter("always")
        self.setLevel(logging.WARNING)
        logging.getLogger("qwen35moe").addHandler(self)
        return self.text

    def emit(self, record: logging.LogRecord) -> None:
        self.text.append(" ".join(record.getMessage().split())[:200])

    def __exit__(self, *exc: Any) -> None:
        logging.getLogger("qwen35moe").removeHandler(self)
        self.text += [" ".join(str(one.message).split())[:200] for one in self.records or ()]
        self.caught.__exit__(*exc)


def prefill(rows: Rows, work: Work) -> None:
    lengths = (11,) if work.small else (8192, 32768)
    if not any(rows.selects(f"prefill/T{T}") for T in lengths):
        return
    work.free()
    with work.own_kernels():
        subject = Subject(work, PREFILL)
        for T in lengths:
            rows.measure(f"prefill/T{T}", lambda T=T: prefill_row(work, subject, T))


def prefill_row(work: Work, subject: Subject, T: int) -> dict[str, Any]:
    ids = subject.ids(work, T)
    work.free()
    with torch.no_grad():
        timing = work.time({"ours": lambda: subject.model(ids, logits_to_keep=1)}, rounds=3, warmup=1)["ours"]
        profile = work.profile(lambda: subject.model(ids, logits_to_keep=1))
    rate = T / timing.min / subject.scale
    note = f"{timing.min * subject.scale * 1e3:.4g} ms; peak {work.peak() / 1e9:.3g} GB; {subject.about}"
    return {"verdict": MEASURED, "measured": rate, "unit": "tokens/s", "note": note, **profile,
            "implementations": {"ours": rates(timing)}, "peak_bytes": work.peak()}  # fmt: skip


def loading(rows: Rows, work: Work) -> None:
    rows.measure("loading/page_cache", lambda: load_row(work))


def load_row(work: Work) -> dict[str, Any]:
    """Save a model of four layers, then load it to the device: the files are in the page cache then."""
    work.free()
    subject = Subject(work, layers=4)
    folder = work.out / "checkpoint"
    if (free := shutil.disk_usage(work.out).free) < 2 * subject.nbytes:
        note = f"{free / 1e9:.3g} GB of disk are free, the checkpoint has {subject.nbytes / 1e9:.3g} GB"
        return {"verdict": NOT_RUN, "note": note}
    try:
        subject.model.save_pretrained(folder)
        expected = {name: value.flatten()[:64].cpu() for name, value in subject.model.state_dict().items()}
        kind, nbytes = type(subject.model), subject.nbytes
        del subject
        work.free()
        seconds, wrong = [], []
        for _ in range(1 if work.small else 3):
            start = time.perf_counter()
            model = kind.from_pretrained(folder, device=work.device)
            work.sync()
            seconds.append(time.perf_counter() - start)
            loaded = model.state_dict()
            wrong = [name for name, value in expected.items() if not torch.equal(loaded[name].flatten()[:64].cpu(), value)]
            del model, loaded
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if wrong:
        return {"verdict": WRONG, "note": f"{len(wrong)} tensors differ, first {wrong[0]}"}
    timing = Timing(tuple(seconds))
    fields = judged(nbytes / timing.min / 1e9, "GB/s", None if work.small else targets.LOADING,
                    note=f"{nbytes / 1e9:.3g} GB in {timing.min:.3g} s; the first in {seconds[0]:.3g} s")  # fmt: skip
    return {"verdict": RIGHT, **fields, "implementations": {"ours": rates(timing)}}
