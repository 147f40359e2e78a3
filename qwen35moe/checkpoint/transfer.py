"""Bytes of files into tensors, by a few threads: straight into memory, or through buffers and onto a device.

    file -> memory                                        numbers that are needed as they are stored, on a CPU
    file -> buffer -> conversion -> memory                other numbers, on a CPU
    file -> pinned buffer -> copy -> conversion on it     on a GPU

A thread has two buffers. On a GPU it has a stream of its own as well: while the contents of one buffer are on their way,
the other one is filled. Extra host memory is threads x 2 buffers whatever the size of the model.
"""

from __future__ import annotations

import math
import sys
import threading
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
from .memory import opened, read_exactly
from .problems import CheckpointError

CHUNK = 32 * 2**20  # bytes of one read straight into memory
STAGE = 16 * 2**20  # of a buffer on the way to a device
TILE = 2 * 2**20  # of what is converted on a CPU: with its float32 it ought to stay in the processor's cache
_ALIGNED = 64  # where tensors begin in a buffer: a multiple of every dtype's size


@dataclass(frozen=True)
class Copy:
    """`count` numbers of `dtype` from byte `offset` of `file`, to be written to `target`, a flat tensor of that length.

    `through`: the numbers are rounded to this dtype on the way (dtype_policy="transformers").
    `scale`: they are block-FP8 [R, `columns`], and these, in float32, their factors; `name` is for messages.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    target: Tensor
    through: torch.dtype | None = None
    scale: Tensor | None = None
    columns: int = 0
    name: str = ""

    @property
    def nbytes(self) -> int:
        return self.target.numel() * self.dtype.itemsize

    @property
    def is_plain(self) -> bool:
        """Whether the bytes in the file are those of the target."""
        return self.dtype == self.target.dtype and self.through is None and self.scale is None


def read_into(copies: Sequence[Copy], threads: int | None = None, staged: bool = False) -> None:
    """Carry out `copies` with two threads, or four when one of the targets is on a GPU.

    staged: a CPU's memory is filled through buffers as well, as a GPU's always is (the same way, for tests).
    """
    if not copies:
        return
    devices = {copy.target.device for copy in copies}
    copies = list(_beside_their_factors(copies))
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the memory of a target may be in use by what it belonged to before
    threads = threads or (2 if all(device.type == "cpu" for device in devices) else 4)
    batches, turn = _batches(copies, staged), threading.Lock()
    files, nbytes = {copy.file for copy in copies}, sum(copy.nbytes for copy in copies)
    with opened(files) as descriptors, _progress(nbytes) as advance, ThreadPoolExecutor(threads) as pool:

        def work() -> None:
            lane = _Lane(descriptors, staged)
            done = 0
            try:
                while True:
                    with turn:
                        advance(done)
                        batch = next(batches, None)
                    if batch is None:
                        return lane.finish()
                    lane.carry(batch)
                    done = sum(piece.nbytes for piece in batch)
            except BaseException:
                with turn:
                    batches.close()  # the others stop too
                raise

        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()  # raises the error of a thread here


@contextmanager
def _progress(nbytes: int) -> Iterator[Callable[[int], object]]:
    """A bar with bytes and rate, on a terminal and after a second; a function that is told of bytes that were read."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=nbytes, unit="B", unit_scale=True, desc="loading", leave=False, delay=1) as bar:
        yield bar.update


# ----------------------------------------------------------------------------------------------------- what is read


def _beside_their_factors(copies: Iterable[Copy]) -> Iterator[Copy]:
    """The same with all factors on the targets' devices, where they are moved together: there are thousands of them."""
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
    """What one buffer takes at once, for one device; into a CPU's memory piece after piece."""
    batch: list[Copy] = []
    held = 0
    for copy in copies:
        on_cpu = copy.target.device.type == "cpu" and not staged
        for piece in _pieces(copy, on_cpu):
            if batch and (on_cpu or held + piece.nbytes > STAGE or piece.target.device != batch[0].target.device):
                yield batch
                batch, held = [], 0
            batch.append(piece)
            held += _up(piece.nbytes)
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


def _up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


# --------------------------------------------------------------------------------------------------- how it is read


class _Buffer:
    """Memory between a file and a target; pinned where a GPU copies from it."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self.arrived: Any = None  # an event of the stream that copies from it
        self.products: list[tuple[Copy, tuple[Tensor, Tensor]]] = []  # of block-FP8, with their bounds

    def make_room(self, nbytes: int, pinned: bool) -> None:
        if len(self.bytes) < nbytes or self.bytes.is_pinned() < pinned:
            self.bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)

    def wait(self) -> None:
        """Until everything in it has arrived. Only now bounds are looked at: a GPU would be waited for."""
        if self.arrived is not None:
            self.arrived.synchronize()
        products, self.products = self.products, []
        for piece, bounds in products:
            _check(piece, *(bound.item() for bound in bounds))


class _Lane:
    """What one thread has."""

    def __init__(self, descriptors: Mapping[Path, int], staged: bool) -> None:
        self.descriptors = descriptors
        self.staged = staged
        self.buffers = [_Buffer(), _Buffer()]
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    @torch.no_grad()
    def carry(self, batch: Sequence[Copy]) -> None:
        device = batch[0].target.device
        if device.type == "cpu" and not self.staged and batch[0].is_plain:
            for piece in batch:
                read_exactly(self.descriptors[piece.file], piece.target.data_ptr(), piece.nbytes, piece.offset)
            return
        self.buffers.reverse()
        buffer = self.buffers[0]
        buffer.wait()
        room = sum(_up(piece.nbytes) for piece in batch)
        buffer.make_room(max(room, TILE if device.type == "cpu" and not self.staged else STAGE), device.type == "cuda")
        at, staged = 0, []
        for piece in batch:
            read_exactly(self.descriptors[piece.file], buffer.bytes.data_ptr() + at, piece.nbytes, piece.offset)
            staged.append(buffer.bytes[at : at + piece.nbytes].view(piece.dtype))
            at += _up(piece.nbytes)
        if device.type == "cuda" and device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        stream = self.streams.get(device)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for piece, values in zip(batch, staged, strict=True):
                _write(piece, values, buffer)
            buffer.arrived = None if stream is None else stream.record_event()

    def finish(self) -> None:
        for buffer in self.buffers:
            buffer.wait()


def _write(piece: Copy, values: Tensor, buffer: _Buffer) -> None:
    """Numbers in a buffer to their target, converted where the target lies."""
    if not piece.is_plain:
        values = values.to(piece.target.device, non_blocking=True)
    if piece.scale is not None:
        values = dequantise_rows(values.view(-1, piece.columns), piece.scale).view(-1)
        buffer.products.append((piece, torch.aminmax(values)))
    piece.target.copy_(values if piece.through is None else values.to(piece.through), non_blocking=True)


def _check(piece: Copy, low: float, high: float) -> None:
    """Of a product of block-FP8: a code that is no number, or a number beyond the target's range, is damage."""
    most = torch.finfo(piece.target.dtype).max
    if not (-most <= low and high <= most):
        what = "holds NaN" if low != low or high != high else f"reaches {max(-low, high):.3g}"
        dtype = str(piece.target.dtype).removeprefix("torch.")
        raise CheckpointError(f"{piece.name} in {piece.file} {what}: no weights that {dtype} can hold (at most {most:.3g})")


def read_scales(found: Sequence[tuple[Path, int, torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """Factors (file, first byte, dtype, shape) as float32, in the order given; for many of them, a few bytes each."""
    kinds = {dtype: torch.empty(sum(math.prod(f[3]) for f in found if f[2] == dtype), dtype=dtype) for _, _, dtype, _ in found}
    filled = dict.fromkeys(kinds, 0)
    places: list[tuple[torch.dtype, int]] = []
    with opened({file for file, *_ in found}) as descriptors:
        for file, offset, dtype, shape in found:
            at, count = filled[dtype], math.prod(shape)
            read_exactly(descriptors[file], kinds[dtype].data_ptr() + at * dtype.itemsize, count * dtype.itemsize, offset)
            places.append((dtype, at))
            filled[dtype] += count
    wide = {dtype: values.float() for dtype, values in kinds.items()}
    return [wide[dtype][at : at + math.prod(shape)].view(shape)
            for (dtype, at), (_, _, _, shape) in zip(places, found, strict=True)]  # fmt: skip
