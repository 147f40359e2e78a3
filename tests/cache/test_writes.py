"""`write_rows`: no size depends on a value, and every token lands where a loop over the rows puts it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen35moe.cache.layout import TokenLayout, write_rows
from tests.support.peer import randn

ROWS, POSITIONS, HEADS, WIDTH = 4, 9, 2, 3
CASES = {
    "one token": (1, [3, 0, 8, 5], [1, 1, 1, 1]), "ended rows": (1, [3, 0, 9, 5], [1, 0, 0, 1]),
    "several": (4, [3, 0, 5, 2], [4, 1, 4, 2]), "full rows": (4, [9, 6, 0, 8], [0, 3, 0, 1]),
    "no padding": (3, [3, 0, 6, 5], None),
}  # fmt: skip


def by_row(buffer: Tensor, new: Tensor, starts: list[int], lengths: list[int]) -> Tensor:
    """Row by row, token by token; differentiable."""
    rows = []
    for row, start, length in zip(range(ROWS), starts, lengths, strict=True):
        rows.append(torch.cat([buffer[row, :start], new[row, :length], buffer[row, start + length :]]))
    return torch.stack(rows)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_written_and_padding_is_not(case: str, functional: bool) -> None:
    tokens, starts, lengths = CASES[case]
    layout = TokenLayout(
        (ROWS, tokens), ROWS, tokens, torch.zeros(3, ROWS, tokens, dtype=torch.long), torch.tensor(starts),
        None if lengths is None else torch.tensor(lengths),
    )  # fmt: skip
    room = POSITIONS + tokens * functional  # a growing cache always has room for padding
    buffer = randn(ROWS, room, HEADS, WIDTH, seed=1).requires_grad_(functional)
    new = randn(ROWS, tokens, HEADS, WIDTH, seed=2).requires_grad_(functional)
    count = lengths or [tokens] * ROWS
    expected = by_row(buffer, new, starts, count)
    with torch.no_grad():
        for row, length in enumerate(count):
            new[row, length:] = float("nan")
    actual = write_rows(buffer if functional else buffer.clone(), new, layout, functional)
    assert torch.equal(actual, expected)
    if functional:
        weights = randn(*actual.shape, seed=3)
        mine, theirs = (torch.autograd.grad((x * weights).sum(), [buffer, new]) for x in (actual, expected))
        held = torch.arange(room) < torch.tensor(starts)[:, None]  # what is behind a row's tokens is room to grow
        assert torch.equal(mine[0][held], theirs[0][held]) and torch.equal(mine[1], theirs[1])
    if lengths is not None:
        ids = write_rows(torch.zeros(ROWS, POSITIONS, dtype=torch.int32), -1, layout)
        assert (ids == -1).sum(1).tolist() == lengths


def test_int_starts_are_those_of_all_rows() -> None:
    layout = TokenLayout((2, 2), 2, 2, torch.zeros(3, 2, 2, dtype=torch.long), 1, torch.tensor([2, 1]))
    written = write_rows(torch.zeros(2, 4), torch.tensor([[5.0, 6.0], [7.0, float("nan")]]), layout)
    assert written.tolist() == [[0, 5, 6, 0], [0, 7, 0, 0]]
