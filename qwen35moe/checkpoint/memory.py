"""Bytes of a file as tensors: mapped, read into memory, or read onto a device; and read ahead of use.

Measured on 2 cores with a virtual disk of 1.3 to 1.6 GB/s: load and first forward (512 tokens) of an 8.4 GB checkpoint
that is not in the page cache take 10.9 to 13.8 s mapped with `ReadAhead`, 14.0 s without, 18.4 s in transformers; 8.9 s
where all of it is cached.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .block_fp8 import BLOCK, dequantise_rows
from .problems import CheckpointError

CHUNK = 32 * 2**20  # bytes a thread reads at once
FP8_CHUNK = 2 * 2**20  # of block-FP8: four times as many in float32 ought to stay in the processor's cache
_HUGE = 4 * 2**20  # from here on, memory of 2 MiB pages is asked for


# ---------------------------------------------------------------------------------------------------- mapping


def map_file(file: Path) -> mmap.mmap:
    """The whole file, copy on write: writing to it changes this process's copy of a page and never the file."""
    with file.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if os.name != "posix":
            return mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY)
        # The same as ACCESS_COPY, but a file larger than the memory may be mapped: nothing is reserved for writes.
        reserve_nothing = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)
        flags = mmap.MAP_PRIVATE | reserve_nothing
        return mmap.mmap(f.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def view_of(mapped: mmap.mmap, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is `mapped` from byte `offset` on; it keeps the mapping alive. Its storage is its own."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape)


def new_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for a parameter; on a CPU in huge pages where the system has them."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages
        pass
    return view_of(pages, 0, shape, dtype)


# ---------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Copy:
    """`count` numbers of `dtype` from byte `offset` of `file`, to be written to `target`, a flat tensor of that length.

    `through`: the numbers are rounded to this dtype on the way (dtype_policy="transformers").
    `scale`: they are block-FP8 [R, `columns`], and these, in float32 on the CPU, their factors; `name` is for messages.
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


def read_into(copies: Sequence[Copy], device: torch.device, threads: int | None = None) -> None:
    """Carry out `copies`, CHUNK bytes at a time, with two threads (four when the target is a GPU).

    Numbers that need no conversion are read from the file straight into a CPU target. Otherwise, and for a device, each
    thread has one staging buffer, so the extra memory is threads x CHUNK bytes whatever the size of the model.
    """
    threads = threads or (2 if device.type == "cpu" else 4)
    if not copies:
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the memory of `target` may still be in use by what it belonged to before
    pieces, turn = _pieces(copies), threading.Lock()
    with _opened({copy.file for copy in copies}) as descriptors, ThreadPoolExecutor(threads) as pool:

        def work() -> None:
            reader = _Reader(device)
            while True:
                with turn:
                    piece = next(pieces, None)
                if piece is None:
                    return
                try:
                    reader(descriptors[piece.file], piece)
                except BaseException:
                    with turn:
                        pieces.close()  # the others stop too
                    raise

        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()  # raises the error of a thread here


def _pieces(copies: Sequence[Copy]) -> Generator[Copy, None, None]:
    for copy in copies:
        if copy.scale is not None:
            yield from _rows_of_blocks(copy, copy.scale)
            continue
        step = CHUNK // copy.dtype.itemsize
        for at in range(0, copy.target.numel(), step):
            part, offset = copy.target[at : at + step], copy.offset + at * copy.dtype.itemsize
            yield Copy(copy.file, offset, copy.dtype, part, copy.through)


def _rows_of_blocks(copy: Copy, scale: Tensor) -> Iterator[Copy]:
    blocks = max(1, FP8_CHUNK // (BLOCK * copy.columns))
    for row in range(0, scale.shape[0], blocks):
        at = row * BLOCK * copy.columns
        part = copy.target[at : at + blocks * BLOCK * copy.columns]
        yield replace(copy, offset=copy.offset + at, target=part, scale=scale[row : row + blocks])


@contextmanager
def _opened(files: set[Path]) -> Iterator[dict[Path, int]]:
    descriptors: dict[Path, int] = {}
    try:
        for file in files:
            descriptors[file] = os.open(file, os.O_RDONLY)
        yield descriptors
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


class _Reader:
    """One thread's way from a file to a tensor: its staging buffer (pinned for a GPU) and its CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.staging: Tensor | None = None
        self.stream = torch.cuda.Stream(device) if self.cuda else None

    def __call__(self, descriptor: int, piece: Copy) -> None:
        nbytes = piece.nbytes
        direct = piece.target.device.type == "cpu" and piece.dtype == piece.target.dtype and piece.through is None
        if direct:
            _read_exactly(descriptor, piece.target.data_ptr(), nbytes, piece.offset)
            return
        if self.staging is None or len(self.staging) < nbytes:
            self.staging = torch.empty(max(CHUNK, nbytes), dtype=torch.uint8, pin_memory=self.cuda)
        _read_exactly(descriptor, self.staging.data_ptr(), nbytes, piece.offset)
        values = self.staging[:nbytes].view(piece.dtype)
        with torch.no_grad():
            if self.stream is None:
                _copy(piece, values)
                return
            with torch.cuda.stream(self.stream):
                _copy(piece, values.to(self.device, non_blocking=True))
            self.stream.synchronize()  # the staging buffer is free again


def _copy(piece: Copy, values: Tensor) -> None:
    if piece.scale is not None:
        values = _product(piece, values.view(-1, piece.columns), piece.scale.to(values.device)).view(-1)
    piece.target.copy_(values if piece.through is None else values.to(piece.through))


def _product(piece: Copy, values: Tensor, scale: Tensor) -> Tensor:
    """Block-FP8 in float32. A code that is no number, or a product beyond the target's range, is damage."""
    product = dequantise_rows(values, scale)
    low, high = (bound.item() for bound in torch.aminmax(product))
    most = torch.finfo(piece.target.dtype).max
    if not (-most <= low and high <= most):
        what = "holds NaN" if low != low or high != high else f"reaches {max(-low, high):.3g}"
        dtype = str(piece.target.dtype).removeprefix("torch.")
        raise CheckpointError(f"{piece.name} in {piece.file} {what}: no weights that {dtype} can hold (at most {most:.3g})")
    return product


def _read_exactly(descriptor: int, address: int, nbytes: int, offset: int) -> None:
    buffer = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
    at = 0
    while at < nbytes:
        got = os.preadv(descriptor, [buffer[at:]], offset + at)
        if got == 0:
            raise OSError(f"the file ended {nbytes - at} bytes early: it was changed while it was read")
        at += got


def read_scales(found: Sequence[tuple[Path, int, torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """Factors (file, first byte, dtype, shape) as float32, in the order given; for many of them, a few bytes each."""
    kinds = {dtype: torch.empty(sum(math.prod(f[3]) for f in found if f[2] == dtype), dtype=dtype) for _, _, dtype, _ in found}
    filled = dict.fromkeys(kinds, 0)
    places: list[tuple[torch.dtype, int]] = []
    with _opened({file for file, *_ in found}) as descriptors:
        for file, offset, dtype, shape in found:
            at, count = filled[dtype], math.prod(shape)
            _read_exactly(descriptors[file], kinds[dtype].data_ptr() + at * dtype.itemsize, count * dtype.itemsize, offset)
            places.append((dtype, at))
            filled[dtype] += count
    wide = {dtype: values.float() for dtype, values in kinds.items()}
    return [wide[dtype][at : at + math.prod(shape)].view(shape)
            for (dtype, at), (_, _, _, shape) in zip(places, found, strict=True)]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- reading ahead


class ReadAhead:
    """Brings parts of files into the page cache, in the given order, on a thread that ends by itself.

    What is there already is skipped, so a warm start costs some thousand system calls that read one byte each. A
    bounded window is requested ahead of the last byte that has arrived: the disk stays busy, and `stop` works at once.
    """

    BLOCK = 4 * 2**20
    WINDOW = 32  # blocks asked for and not waited for

    def __init__(self, ranges: Sequence[tuple[Path, int, int]]) -> None:
        """`ranges`: (file, first byte, one past the last byte), in the order in which they will be used."""
        self.ranges = _joined(ranges)
        self.fetched = 0  # bytes that were not in the page cache
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="qwen35moe-read-ahead", daemon=True)

    @staticmethod
    def possible() -> bool:
        return hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT") and hasattr(os, "preadv")

    def start(self) -> ReadAhead:
        self.thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        try:
            with _opened({file for file, _, _ in self.ranges}) as descriptors:
                waiting: deque[Callable[[], None]] = deque()
                for file, begin, end in self.ranges:
                    for at in range(begin, end, self.BLOCK):
                        if self._stop.is_set():
                            return
                        self._block(descriptors[file], at, min(at + self.BLOCK, end), waiting)
                while waiting and not self._stop.is_set():
                    waiting.popleft()()
        except OSError:
            pass  # only speed is lost: the pages come in when they are used

    def _block(self, descriptor: int, begin: int, end: int, waiting: deque[Callable[[], None]]) -> None:
        if all(_resident(descriptor, begin + (end - 1 - begin) * i // 4) for i in range(5)):
            return
        self.fetched += end - begin
        step = _largest_request(descriptor)
        for at in range(begin, end, step):
            os.posix_fadvise(descriptor, at, min(step, end - at), os.POSIX_FADV_WILLNEED)
        waiting.append(lambda: _touch(descriptor, end - 1))
        if len(waiting) > self.WINDOW:
            waiting.popleft()()


def _joined(ranges: Sequence[tuple[Path, int, int]]) -> list[tuple[Path, int, int]]:
    """Neighbours in a file become one range."""
    joined: list[tuple[Path, int, int]] = []
    for file, begin, end in ranges:
        if joined and joined[-1][0] == file and joined[-1][2] == begin:
            joined[-1] = (file, joined[-1][1], end)
        else:
            joined.append((file, begin, end))
    return joined


def _touch(descriptor: int, offset: int) -> None:
    os.preadv(descriptor, [bytearray(1)], offset)


def _resident(descriptor: int, offset: int) -> bool:
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
        return True
    except OSError:  # EAGAIN: not there; EOPNOTSUPP: this filesystem cannot tell
        return False


def _largest_request(descriptor: int) -> int:
    """Linux cuts one WILLNEED request to the read-ahead size of the device, 128 KiB where nobody changed it."""
    device = os.fstat(descriptor).st_dev
    try:
        setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text()
        return min(max(int(setting), 128), 8192) * 1024
    except (OSError, ValueError):
        return 128 * 1024


def available_memory() -> int:
    """Bytes that can be used without swapping, the page cache included."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
