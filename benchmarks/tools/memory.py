"""Memory of a process and of a function; the files of a checkpoint, and the page cache's share of them. Linux only."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors: python -m benchmarks synthetic {folder} writes them")
    return files


def stored_bytes(folder: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every tensor of a checkpoint, from the headers of the files."""
    for file in weight_files(folder):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, entry["data_offsets"][1] - entry["data_offsets"][0]


def cached(files: list[Path]) -> float:
    """The share of the files' pages that the page cache holds, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    present = total = 0
    for file in files:
        with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            pages = -(-len(mapped) // PAGE)
            resident = (ctypes.c_ubyte * pages)()
            first = ctypes.c_char.from_buffer(mapped)
            address = ctypes.c_void_p(ctypes.addressof(first))
            failed = libc.mincore(address, ctypes.c_size_t(len(mapped)), resident)
            del first
            if failed:
                raise OSError(ctypes.get_errno(), f"mincore of {file.name}")
            present += sum(byte & 1 for byte in bytes(resident))
            total += pages
    return present / total


def warm(files: list[Path]) -> float:
    """Read the files into the page cache; returns the share that it then holds."""
    for file in files:
        with open(file, "rb", buffering=0) as f:
            while f.read(1 << 24):
                pass
    return cached(files)


def evict(files: list[Path]) -> float:
    """Drop the files from the page cache; returns the remaining share. No process may have them mapped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not on disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return cached(files)


def usage() -> dict[str, int]:
    """Bytes of this process: VmHWM (peak resident set, mapped files included), VmRSS, RssAnon, RssFile."""
    fields = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words and words[0][:-1] in fields}


class PeakSampler:
    """Samples RssAnon every 50 ms until `stop`: the kernel keeps no high-water mark of it."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.anonymous = 0
        self._stopped = threading.Event()
        self._seconds = seconds
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            self.anonymous = max(self.anonymous, usage()["RssAnon"])

    def stop(self) -> int:
        """The peak of anonymous memory, in bytes."""
        self._stopped.set()
        self._thread.join()
        return max(self.anonymous, usage()["RssAnon"])


def saved_bytes(function: Callable[[], object], besides: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `function()`: each storage once, without those of `besides` (weights)."""
    excluded = {tensor.untyped_storage().data_ptr() for tensor in besides}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()  # keeps the saved tensors alive, so that no address is used twice
    del output
    return sum(saved.values())


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """The most memory that `function()` allocates at once on a CUDA device, beyond what was allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def free_memory(device: str) -> float:
    """Bytes."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return float(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
