"""Large pages for large memory that is about to be written whole.

Memory of this size comes from the system untouched, and every page of it costs a fault at the first write. Measured on 2
cores of Zen 4, 400 MB: 118 ms in pages of 4 KB, 34 ms in pages of 2 MB, 17 ms when written again.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_LARGE = 32 << 20  # bytes; smaller pieces the C library hands out again without returning them to the system
_HUGE = 2 << 20


def in_large_pages(tensor: Tensor) -> Tensor:
    """The same tensor. On Linux the system is advised to back its memory, where it is large and on a CPU, by 2 MB pages.

    Advice only: where transparent huge pages are switched off nothing happens.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if sys.platform == "linux" and advice is not None and tensor.device.type == "cpu" and tensor.nbytes >= _LARGE:
        start = -(-tensor.data_ptr() // _HUGE) * _HUGE
        size = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE * _HUGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
    return tensor
