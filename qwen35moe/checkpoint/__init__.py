"""Checkpoints: from disk to modules and back.

names.py      what tensors are called, on disk and in a model
headers.py    what the files say they contain, checked
selection.py  which of it is asked for
block_fp8.py  the quantised form that is read (blocks.py: how it is told); foreign.py those that are not
assemble.py   which bytes make which parameter
fill.py       memory for each parameter, on its device
memory.py     a mapped file, fresh pages, reading ahead; splice.py pieces of mapped files as one tensor
transfer.py   the threads that read, and the way to a GPU
read.py       `load_model`; report.py what it did
write.py      `save_model`
published.py  what the files of a published repository hold, from a configuration alone
quantise.py   matrices as 8-bit numbers with a scale per block
convert.py    from one layout on disk to another
tiny.py       small checkpoints for tests
folder.py     how a new checkpoint replaces an old one
hub.py        the same from the Hugging Face Hub
problems.py   `CheckpointError`, with everything that is wrong in one message
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .headers import Header, StoredTensor, read_headers
from .problems import CheckpointError, Problem

__all__ = [
    "CheckpointError",
    "Header",
    "LoadingReport",
    "Problem",
    "StoredTensor",
    "load_model",
    "read_headers",
    "save_model",
]

if TYPE_CHECKING:
    from .read import load_model
    from .report import LoadingReport
    from .write import save_model
else:  # these import torch, which takes a second, and headers are read without it
    _HOMES = {"load_model": "read", "LoadingReport": "report", "save_model": "write"}

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
