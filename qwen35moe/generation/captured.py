"""Decode steps that are captured as a CUDA graph and replayed: with a static cache, on a GPU.

    first step of a bucket     runs from Python, on a side stream: it compiles kernels and makes workspaces
    second step                is captured, which runs nothing, and replayed
    further steps              are replayed: one call of the driver instead of hundreds of launches

There are two captures: the model's step, kept with the cache for later calls, one for each bucket of positions
(`qwen35moe.cache.static.bucket`); and that from logits to the next tokens, of one call. `capturable.reason` says why a call has
none.
"""

from __future__ import annotations

import gc
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..cache import Cache
from ..cache.modes import ordinary_tensors
from ..cache.static import advance
from ..models.static_step import StaticStep, StepMemory
from .capturable import of_process, reason, signature

__all__ = ["CapturedSteps", "CapturedFunction", "captured_steps", "prefers_static", "reason"]

_SHORT = 4  # new tokens of which none is replayed often enough to pay for a capture
_SHARE = 10  # a cache that `generate` makes takes at most this part of a GPU's memory

log = logging.getLogger("qwen35moe.generation")
Function = Callable[[], None]


class GraphCapture:
    """Captures the kernels that a function launches, on a stream of its own: `torch.cuda.CUDAGraph`."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.lock = threading.Lock()  # kernels of another thread on this stream would be captured too
        # The allocator accepts no capture into a pool whose last graph was released: this one stays.
        self.first = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(), self._on_stream():
            warnings.simplefilter("ignore")  # it is empty
            self.first.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            self.first.capture_end()

    def warm(self, function: Function) -> None:
        """Runs it on the stream of the capture."""
        with self.lock, self._on_stream():
            function()

    def capture(self, function: Function) -> Function:
        """A function that launches the same kernels on the same memory; `function` itself computes nothing here."""
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        with self.lock, self._on_stream():
            gc.disable()  # it might release another graph, which is not permitted while capturing
            try:
                # thread_local: another thread may allocate or copy meanwhile.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
            finally:
                if collects:
                    gc.enable()
        return lambda: self._replay(graph)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """On the stream of the captures: two graphs, whose temporary tensors share the pool, never run at the same time."""
        with self.lock, self._on_stream():
            graph.replay()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Inside, the current stream is that of the captures, in order with the current one outside."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)


_captures: dict[torch.device, Any] = {}
_lock = threading.Lock()


def capture_of(device: torch.device) -> Any:
    """One for each device, whose captures share one stream and one pool of memory."""
    with _lock:
        if device not in _captures:
            _captures[device] = GraphCapture(device)
        return _captures[device]


class CapturedFunction:
    """A function without arguments and results, which reads and writes the same memory at every call: run at the first call,
    captured at the second, replayed since. Where it cannot be captured, a warning says why and it runs from Python."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.replay: Function | None = None
        self.warm = self.failed = False

    def __call__(self, function: Function) -> None:
        """Runs `function`, or replays the calls before. It is no part of the capture, so that it may hold a cache."""
        if self.replay is None and self.warm and not self.failed:
            self._capture(function)
        if self.replay is not None:
            self.replay()
        elif self.failed:
            function()
        else:
            capture_of(self.device).warm(function)
            self.warm = True

    def _capture(self, function: Function) -> None:
        try:
            self.replay = capture_of(self.device).capture(function)
        except RuntimeError as error:
            self.failed = True
            log.warning("a decode step could not be captured as a CUDA graph and runs from Python: %s", error)


class CapturedModel:
    """The captured steps of a model over one static cache, one for each bucket of positions, and their memory."""

    def __init__(self, model: Any, cache: Cache, now: Hashable) -> None:
        self.model, self.signature = weakref.ref(model), now
        self.memory = StepMemory(cache)
        self.buckets: dict[int, CapturedFunction] = {}
        self.logits: Tensor | None = None  # [B, vocabulary] of the last step, in memory that stays where it is
        self.zero = torch.zeros(())  # in their dtype


_kept: weakref.WeakKeyDictionary[Cache, CapturedModel] = weakref.WeakKeyDictionary()


class CapturedSteps:
    """The decode steps of one call of `generate`, for a model and a static cache for which `reason` is None.

    The model's captures are those of an earlier call with this cache if nothing has changed that they depend on.
    """

    def __init__(self, model: Any, cache: Cache) -> None:
        now, kept = signature(model, cache), _kept.get(cache)
        if kept is None or kept.model() is not model or kept.signature != now:
            kept = _kept[cache] = CapturedModel(model, cache, now)
        self.captures, self.step = kept, StaticStep(model, cache, kept.memory)
        self.picks: CapturedFunction | None = None
        self.picked: Tensor | None = None  # the logits that `picks` reads

    @torch.no_grad()
    def feed(self, token: Tensor, done: Tensor, *, frozen: bool = True) -> Tensor:
        """Runs one token [B] of each row; rows where `done` [B] stay as they are. The logits [B, vocabulary], 0 in those rows,
        which the next call overwrites. frozen: False where the host has read that no row is done."""
        step, kept = self.step, self.captures
        positions, changed = step.prepare()
        if changed and (now := signature(step.model, step.cache)) != kept.signature:  # by an operation between two steps
            kept.signature, kept.buckets, kept.logits = now, {}, None
        step.token.copy_(token.masked_fill(done, 0))
        torch.logical_not(done, out=step.active)
        if positions not in kept.buckets:
            kept.buckets[positions] = CapturedFunction(token.device)
        if of_process(step.model) is None:
            kept.buckets[positions](lambda: self._run(positions))
        else:  # a tap, for instance, that has begun since
            self._run(positions)
        advance(step.cache, frozen=frozen)
        assert kept.logits is not None
        return kept.logits

    def _run(self, positions: int) -> None:
        logits, kept = self.step.run(positions), self.captures
        if kept.logits is None:
            with ordinary_tensors():
                kept.logits, kept.zero = torch.empty_like(logits), torch.zeros_like(logits[0, 0])
        torch.where(self.step.active[:, None], logits, kept.zero, out=kept.logits)  # as of padding in the ordinary step

    @torch.no_grad()
    def pick(self, pick: Callable[[Tensor], None], logits: Tensor, *, replaced: bool) -> None:
        """pick(logits), a function that reads and writes the same memory at every call. replaced: whether that is other memory
        than before."""
        if self.picks is None or replaced or logits is not self.picked:
            self.picks, self.picked = CapturedFunction(logits.device), logits
        self.picks(lambda: pick(logits))


def captured_steps(model: Any, cache: Any, wanted: bool) -> CapturedSteps | None:
    """The captured steps of a call; None, and on a GPU a line in the log that says why, where it runs from Python."""
    why = reason(model, cache) if wanted else "capture=False"
    if why is None:
        return CapturedSteps(model, cache)
    if model.device.type == "cuda":
        log.info("decode steps are not captured: %s", why)
    return None


def prefers_static(model: Any, rows: int, prompt: int, new: int) -> bool:
    """Whether `generate` makes a static cache for a call that brings none and keeps none, so that its steps can be captured: it
    has more than a few new tokens, and keys and values of the longest answer take a small part of the GPU's free memory."""
    if new <= _SHORT or reason(model) is not None:
        return False
    text = model.config.text_config
    layers = text.layer_types.count("full_attention")
    position = 2 * layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
    return rows * (prompt + new) * position <= memory_of(model.device) // _SHARE


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory in which torch has no tensor."""
    return torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)
