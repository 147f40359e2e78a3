"""Checkpoints: from disk to modules and back.

names.py      what tensors are called, on disk and in a model
headers.py    what the files say they contain, checked
selection.py  which of it is asked for
block_fp8.py  the quantised form that is read; foreign.py those that are not
assemble.py   which bytes make which parameter
memory.py     bytes as tensors: mapped, read, read ahead
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

from .headers import Header, StoredTensor, read_headers
from .problems import CheckpointError, Problem
from .read import load_model
from .report import LoadingReport
from .write import save_model

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
