"""Random numbers of a row: the same seed gives the same tokens, whatever the other rows of the batch are.

Row r of a batch with seed s draws from the stream `row_seed(s, r)`; row 0 from s itself. So

    generate([a, b, c], seed=7)   row 2   ==   generate([c], seed=row_seed(7, 2))

and equal prompts in one batch still get different answers. The numbers are drawn on the CPU, so they are the same on every
device. With a seed they neither read nor advance PyTorch's global generator; without one, that generator draws the seed, so
torch.manual_seed decides, as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.values import send

_MASK = (1 << 64) - 1
_BLOCK = 256  # numbers drawn at a time for each row, one transfer to the device for each block


def row_seed(seed: int, row: int) -> int:
    """The seed of a row: output `row` of SplitMix64 started at `seed` (Steele, Lea, Flood 2014); row 0 has `seed` itself."""
    seed &= _MASK
    if row == 0:
        return seed
    z = (seed + row * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Uniforms:
    """One uniform number in [0, 1) for each row and step, float64.

    seed: None (from PyTorch's global generator), one number for the batch, or one for each row.
    """

    def __init__(self, seed: int | Sequence[int] | None, rows: int, device: torch.device) -> None:
        if isinstance(seed, Sequence):
            if len(seed) != rows:
                raise ValueError(f"seed has {len(seed)} numbers for {rows} rows: pass one number, or one for each row")
            seeds = [number & _MASK for number in seed]
        else:
            first = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else seed
            seeds = [row_seed(first, row) for row in range(rows)]
        self._generators = [torch.Generator("cpu").manual_seed(number) for number in seeds]
        self._block = torch.empty(rows, _BLOCK, dtype=torch.float64, device=device)
        self._index = torch.zeros(1, dtype=torch.int64, device=device)  # of the next number in the block
        self._left = 0  # numbers of the block that the host has not reserved

    def reserve(self) -> None:
        """Before every `take`, on the host: draws a new block into the old one's place where that is used up."""
        if not self._left:
            drawn = [torch.rand(_BLOCK, generator=one, dtype=torch.float64, device="cpu") for one in self._generators]
            self._block.copy_(send(torch.stack(drawn), self._block.device))
            self._index.zero_()
            self._left = _BLOCK
        self._left -= 1

    def take(self) -> Tensor:
        """The next number of every row: [B]. The position in the block is counted on the device."""
        numbers = self._block.index_select(1, self._index)[:, 0]
        self._index += 1
        return numbers

    def next(self) -> Tensor:
        """`reserve` and `take`."""
        self.reserve()
        return self.take()
