"""(I + a)^-1 for strictly lower triangular a [..., M, M]: by substitution on a CPU; by blocks on a GPU, where substitution
would be many small dependent steps."""

from __future__ import annotations

import torch
from torch import Tensor

_BASE = 8


def by_substitution(system: Tensor) -> Tensor:
    """torch's triangular solve with the identity as right side. Entries on and above the diagonal of a are ignored.

    As the solution of x^T (I + a)^T = I, which MKL finds in half the time of (I + a) x = I.
    """
    eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    transposed = torch.linalg.solve_triangular(system.mT, eye.expand_as(system), upper=True, left=False, unitriangular=True)
    return transposed.mT


def by_blocks(system: Tensor) -> Tensor:
    """For M = 8, 16, 32, ...: blocks of 8 on the diagonal by their finite Neumann product, then pairs of neighbouring blocks
    merged, [[b, 0], [l, c]]^-1 = [[b^-1, 0], [-c^-1 l b^-1, c^-1]], in log2(M/8) + 3 rounds of batched products.

    A Neumann product of the whole chunk is equal in exact arithmetic only: with correlated keys its powers of a lose all digits
    of float32 (relative error 5e3 at correlation 0.9 and M = 64, against 2e-7 for blocks of 8).
    """
    size = system.shape[-1]
    if size % _BASE or size // _BASE & (size // _BASE - 1):
        raise ValueError(f"a chunk has 8, 16, 32, ... tokens, not {size}")
    flat = system.reshape(-1, size, size)
    inverse = torch.zeros_like(flat)
    diagonal = _diagonal(flat, _BASE)  # [batch, M/8, 8, 8]
    square = diagonal @ diagonal
    eye = torch.eye(_BASE, dtype=flat.dtype, device=flat.device)
    _diagonal(inverse, _BASE).copy_((eye - diagonal) @ (eye + square) @ (eye + square @ square))
    block = _BASE
    while block < size:
        merged, merged_inverse = _diagonal(flat, 2 * block), _diagonal(inverse, 2 * block)
        upper, lower = merged_inverse[..., :block, :block], merged_inverse[..., block:, block:]
        merged_inverse[..., block:, :block] = -(lower @ merged[..., block:, :block] @ upper)
        block *= 2
    return inverse.view_as(system)


def _diagonal(matrices: Tensor, block: int) -> Tensor:
    """[batch, M, M] -> [batch, M/block, block, block]: a view of the blocks on the diagonal."""
    count, size, _ = matrices.shape
    return matrices.as_strided(
        (count, size // block, block, block), (size * size, block * (size + 1), size, 1), matrices.storage_offset()
    )
