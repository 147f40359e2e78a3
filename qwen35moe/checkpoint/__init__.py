"""Checkpoints: from disk to modules and back.

names.py        tensor names on disk and in a model
headers.py      the contents of the files, checked
selection.py    selected layers, experts and parts
blocks.py       names and shapes of block-FP8; block_fp8.py its meaning, quantise.py its inverse
unsupported.py  quantised formats that are refused
assemble.py     which stored bytes fill which parameter
fill.py         memory for every parameter, on its device
memory.py       mapped files, new pages, reading ahead; stitch.py one tensor from mapped pieces
transfer.py     the threads that read, and copies to a GPU
read.py         `load_model`; report.py counts what it did
write.py        `save_model`
published.py    the tensors of a published repository, from a configuration alone
convert.py      from one layout on disk to another
tiny.py         small checkpoints for tests
folder.py       replaces the checkpoint in a folder in one step
hub.py          checkpoints on the Hugging Face Hub
problems.py     `CheckpointError`, with all problems in one message
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
else:  # these import torch, which takes a second and is not needed to read headers
    _HOMES = {"load_model": "read", "LoadingReport": "report", "save_model": "write"}

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
