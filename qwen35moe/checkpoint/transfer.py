"""Reads bytes of files into tensors with a few threads: straight into memory, or through buffers to a device.

    file -> memory                                        numbers that keep their stored form, on a CPU
    file -> buffer -> conversion -> memory                other numbers, on a CPU
    file -> pinned buffer -> copy -> conversion on it     on a GPU

A thread has two buffers, and for a GPU its own stream: while the contents of one buffer are copied, the other is filled.
The extra host memory is 2 buffers per thread, whatever the size of the model.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .block_fp8 import dequantise_rows
from .blocks import BLOCK
from .dtypes import name_of
from .memory import opened, read_exactly
from .problems import CheckpointError

CHUNK = 32 * 2**20  # bytes of one read straight into memory
STAGE = 16 * 2**20  # bytes of a buffer for a device
TILE = 2 * 2**20  # bytes converted at once on a CPU, so that they and their float32 stay in the processor's cache
_ALIGNED = 64  # tensors in a buffer begin at multiples of this, a multiple of every dtype's size


@dataclass(frozen=True)
class Copy:
    """Copy numbers of `dtype` from byte `offset` of `file` to all of `target`, a flat tensor.

    round_to: the numbers are first rounded to this dtype (dtype_policy="transformers").
    scale: the numbers are block-FP8 [rows, `columns`] with this scale in float32; `name` is for messages.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    target: Tensor
    round_to: torch.dtype | None = None
    scale: Tensor | None = None
    columns: int = 0
    name: str = ""

    @property
    def nbytes(self) -> int:
        return self.target.numel() * self.dtype.itemsize

    @property
    def is_plain(self) -> bool:
        """Whether the target has the same bytes as the file."""
        return self.dtype == self.target.dtype and self.round_to is None and self.scale is None


def read_into(copies: Sequence[Copy], threads: int | None = None, staged: bool = False) -> None:
    """Carry out `copies` with two threads, or four if one of the targets is on a GPU.

    staged: also fill a CPU's memory through buffers, as for a GPU (for tests).
    """
    if not copies:
        return
    devices = {copy.target.device for copy in copies}
    copies = list(_with_scales_on_device(copies))
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels may still use the memory that a target reuses
    threads = threads or (2 if all(device.type == "cpu" for device in devices) else 4)
    batches, turn = _batches(copies, staged), threading.Lock()
    files, nbytes = {copy.file for copy in copies}, sum(copy.nbytes for copy in copies)
    with opened(files) as descriptors, _progress(nbytes) as advance, ThreadPoolExecutor(threads) as pool:

        def work() -> None:
            worker = _Worker(descriptors, staged)
            done = 0
            try:
                while True:
                    with turn:
                        advance(done)
                        batch = next(batches, None)
                    if batch is None:
                        return worker.finish()
                    worker.copy(batch)
                    done = sum(piece.nbytes for piece in batch)
            except BaseException:
                with turn:
                    batches.close()  # stops the other threads
                raise

        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()  # raises a thread's error
    if any(device.type == "cuda" for device in devices) and not all(copy.is_plain for copy in copies):
        torch.cuda.empty_cache()  # conversions leave memory that is kept for the threads' streams, which are gone


@contextmanager
def _progress(nbytes: int) -> Iterator[Callable[[int], object]]:
    """A function to call with the number of bytes that were read; on a terminal it moves a progress bar, after a second."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=nbytes, unit="B", unit_scale=True, desc="loading", leave=False, delay=1) as bar:
        yield bar.update


# ------------------------------------------------------------------------------------------------------------- batches


def _with_scales_on_device(copies: Iterable[Copy]) -> Iterator[Copy]:
    """The same copies with their scales on the targets' devices, moved together because there are thousands."""
    moved: dict[tuple[int, torch.device], Tensor] = {}
    for copy in copies:
        scale, device = copy.scale, copy.target.device
        if scale is None or scale.device == device:
            yield copy
            continue
        storage = scale.untyped_storage()
        key = (storage.data_ptr(), device)
        if key not in moved:
            moved[key] = scale.as_strided((storage.nbytes() // scale.itemsize,), (1,), 0).to(device)
        yield replace(copy, scale=moved[key].as_strided(scale.shape, scale.stride(), scale.storage_offset()))


def _batches(copies: Iterable[Copy], staged: bool) -> Generator[list[Copy], None, None]:
    """Pieces that fit into one buffer, for one device; single pieces for a CPU."""
    batch: list[Copy] = []
    nbytes = 0
    for copy in copies:
        on_cpu = copy.target.device.type == "cpu" and not staged
        for piece in _pieces(copy, on_cpu):
            if batch and (on_cpu or nbytes + piece.nbytes > STAGE or piece.target.device != batch[0].target.device):
                yield batch
                batch, nbytes = [], 0
            batch.append(piece)
            nbytes += _rounded_up(piece.nbytes)
    if batch:
        yield batch


def _pieces(copy: Copy, on_cpu: bool) -> Iterator[Copy]:
    if copy.scale is not None:
        yield from _rows_of_blocks(copy, copy.scale, TILE)
        return
    most = CHUNK if on_cpu and copy.is_plain else min(TILE if on_cpu else STAGE, CHUNK)
    step = max(1, most // copy.dtype.itemsize)
    for at in range(0, copy.target.numel(), step):
        part = copy.target[at : at + step]
        yield replace(copy, offset=copy.offset + at * copy.dtype.itemsize, target=part)


def _rows_of_blocks(copy: Copy, scale: Tensor, most: int) -> Iterator[Copy]:
    blocks = max(1, most // (BLOCK * copy.columns))
    for row in range(0, scale.shape[0], blocks):
        at = row * BLOCK * copy.columns
        part = copy.target[at : at + blocks * BLOCK * copy.columns]
        yield replace(copy, offset=copy.offset + at, target=part, scale=scale[row : row + blocks])


def _rounded_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


# -------------------------------------------------------------------------------------------------------------- threads


class _Buffer:
    """Memory between a file and a target; pinned if a GPU copies from it."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.copied: Any = None  # an event of the stream that copies from the buffer
        self.bounds: list[tuple[Copy, tuple[Tensor, Tensor]]] = []  # least and largest numbers after dequantisation
        self.on_host = torch.empty(0, device="cpu")  # the bounds [pieces, 2], copied behind the contents

    def make_room(self, nbytes: int, pinned: bool) -> None:
        if len(self.bytes) < nbytes or self.bytes.is_pinned() < pinned:
            self.bytes = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)

    def wait(self) -> None:
        """Wait until all contents have been copied, and the bounds with them; then check these."""
        if self.copied is not None:
            self.copied.synchronize()
        waiting, self.bounds = self.bounds, []
        if waiting:
            for (piece, _), (low, high) in zip(waiting, self.on_host.tolist(), strict=True):
                _check(piece, low, high)


class _Worker:
    """One thread's buffers and streams."""

    def __init__(self, descriptors: Mapping[Path, int], staged: bool) -> None:
        self.descriptors = descriptors
        self.staged = staged
        self.buffers = [_Buffer(), _Buffer()]
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    @torch.no_grad()
    def copy(self, batch: Sequence[Copy]) -> None:
        device = batch[0].target.device
        if device.type == "cpu" and not self.staged and batch[0].is_plain:
            for piece in batch:
                read_exactly(self.descriptors[piece.file], piece.target.data_ptr(), piece.nbytes, piece.offset)
            return
        self.buffers.reverse()
        buffer = self.buffers[0]
        buffer.wait()
        room = sum(_rounded_up(piece.nbytes) for piece in batch)
        buffer.make_room(max(room, TILE if device.type == "cpu" and not self.staged else STAGE), device.type == "cuda")
        at, staged = 0, []
        for piece in batch:
            read_exactly(self.descriptors[piece.file], buffer.bytes.data_ptr() + at, piece.nbytes, piece.offset)
            staged.append(buffer.bytes[at : at + piece.nbytes].view(piece.dtype))
            at += _rounded_up(piece.nbytes)
        if device.type == "cuda" and device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        stream = self.streams.get(device)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for piece, values in zip(batch, staged, strict=True):
                _write(piece, values, buffer)
            if buffer.bounds:  # into pinned memory, if from a GPU
                bounds = torch.stack([bound for _, pair in buffer.bounds for bound in pair]).view(-1, 2)
                buffer.on_host = bounds.to("cpu", non_blocking=True)
            buffer.copied = None if stream is None else stream.record_event()

    def finish(self) -> None:
        for buffer in self.buffers:
            buffer.wait()


def _write(piece: Copy, values: Tensor, buffer: _Buffer) -> None:
    """Copy numbers from a buffer to their target; conversions run on the target's device."""
    if not piece.is_plain:
        values = values.to(piece.target.device, non_blocking=True)
    if piece.scale is not None:
        values = dequantise_rows(values.view(-1, piece.columns), piece.scale).view(-1)
        buffer.bounds.append((piece, torch.aminmax(values)))
    piece.target.copy_(values if piece.round_to is None else values.to(piece.round_to), non_blocking=True)


def _check(piece: Copy, low: float, high: float) -> None:
    """CheckpointError if a dequantised block contains NaN, or a number beyond the range of the target's dtype."""
    most = torch.finfo(piece.target.dtype).max
    if not (-most <= low and high <= most):
        contents = "contains NaN" if low != low or high != high else f"reaches {max(-low, high):.3g}"
        dtype = name_of(piece.target.dtype)
        raise CheckpointError(f"{piece.name} in {piece.file} {contents}: {dtype} weights are at most {most:.3g}")


# -------------------------------------------------------------------------------------------------------------- scales


def read_scales(stored: Sequence[tuple[Path, int, torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """Scales (file, first byte, dtype, shape) as float32, in this order; made for thousands of a few bytes each."""
    totals: Counter[torch.dtype] = Counter()
    for _, _, dtype, shape in stored:
        totals[dtype] += math.prod(shape)
    flat = {dtype: torch.empty(total, dtype=dtype, device="cpu") for dtype, total in totals.items()}
    filled = dict.fromkeys(flat, 0)
    starts: list[tuple[torch.dtype, int]] = []
    with opened({file for file, *_ in stored}) as descriptors:
        for file, offset, dtype, shape in stored:
            at, count = filled[dtype], math.prod(shape)
            read_exactly(descriptors[file], flat[dtype].data_ptr() + at * dtype.itemsize, count * dtype.itemsize, offset)
            starts.append((dtype, at))
            filled[dtype] += count
    wide = {dtype: values.float() for dtype, values in flat.items()}
    return [wide[dtype][at : at + math.prod(shape)].view(shape)
            for (dtype, at), (_, _, _, shape) in zip(starts, stored, strict=True)]  # fmt: skip
