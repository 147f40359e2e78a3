"""What a process keeps in memory, and what of a checkpoint lies in the page cache. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

PAGE = mmap.PAGESIZE


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors: python -m benchmarks.synthetic {folder} writes them")
    return files


def cached(files: list[Path]) -> float:
    """The share of the files' pages that the page cache holds, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    present = total = 0
    for file in files:
        with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            pages = -(-len(mapped) // PAGE)
            found = (ctypes.c_ubyte * pages)()
            first = ctypes.c_char.from_buffer(mapped)
            address = ctypes.c_void_p(ctypes.addressof(first))
            failed = libc.mincore(address, ctypes.c_size_t(len(mapped)), found)
            del first
            if failed:
                raise OSError(ctypes.get_errno(), f"mincore of {file.name}")
            present += sum(byte & 1 for byte in bytes(found))
            total += pages
    return present / total


def warm(files: list[Path]) -> float:
    """Read the files once, so that the page cache holds them; returns the share it then holds."""
    for file in files:
        with open(file, "rb", buffering=0) as f:
            while f.read(1 << 24):
                pass
    return cached(files)


def evict(files: list[Path]) -> float:
    """Drop the files from the page cache; returns the share still there. No process may have them mapped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not on disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return cached(files)


def usage() -> dict[str, int]:
    """Bytes of this process: VmHWM (most ever resident, mapped files included), VmRSS, RssAnon, RssFile."""
    wanted = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words and words[0][:-1] in wanted}


class Watch:
    """Samples RssAnon, which has no high-water mark of its own, every 50 ms until `stop`."""

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
        """The most anonymous memory seen, in bytes."""
        self._stopped.set()
        self._thread.join()
        return max(self.anonymous, usage()["RssAnon"])
