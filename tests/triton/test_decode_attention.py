"""Attention of one query token per row: against its definition, over rows of any lengths, and in a static step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends
from qwen35moe.models.static_step import StaticStep
from tests.support import peer
from tests.support.kernel_checks import DEVICE, DTYPES, ROUNDED, assert_close, draw, refusal
from tests.support.peer import FULL, LINEAR, odd_shape

pytest.importorskip("triton")
# rows, positions, query heads, key heads, K, V; and the position of each row
CASES = [
    (3, 150, 6, 2, 12, 20, (149, 0, 70)), (2, 300, 3, 3, 24, 8, (31, 299)), (1, 40, 20, 1, 16, 16, (32,)),
]  # fmt: skip


def arguments(case: tuple[Any, ...], dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    rows, positions, heads, groups, width, out, starts = case
    key, value = draw(rows, positions + 5, groups, width, seed=1, dtype=dtype), draw(rows, positions + 5, groups, out, seed=2)
    args = draw(rows, 1, heads, width, dtype=dtype), key[:, :positions], value[:, :positions].to(dtype)
    return args, {"scale": 0.3, "starts": torch.tensor(starts, device=DEVICE)}


@pytest.mark.parametrize("parts", [1, 2, 64])
@pytest.mark.parametrize("case,dtype", [*((c, torch.float32) for c in CASES), *((CASES[0], d) for d in DTYPES[1:])], ids=str)
def test_against_the_definition(case: Any, dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 32 positions and more: some of them behind a row's tokens."""
    from qwen35moe_kernels import decode_attention

    monkeypatch.setattr(decode_attention, "_SMALLEST", 32)
    monkeypatch.setattr(decode_attention, "_PARTS", parts)
    args, options = arguments(case, dtype)
    assert_close("attention", "triton", args, options, dtype, forward=max(4e-6, ROUNDED[dtype]))


def test_positions_behind_a_row_are_not_read() -> None:
    args, options = arguments(CASES[0], torch.float32)
    with backends.use(attention="triton"):
        expected = backends.run("attention", *args, **options)
        for row, start in enumerate(CASES[0][-1]):
            args[1][row, start + 1 :], args[2][row, start + 1 :] = torch.nan, torch.inf
        assert torch.equal(backends.run("attention", *args, **options), expected)


def test_unsupported_names_the_argument() -> None:
    args, options = arguments(CASES[0], torch.float32)
    assert refusal("attention", "triton", *args, **options) is None
    for change in ({"starts": 149}, {"cu_seqlens": torch.tensor([0, 1])}):
        assert refusal("attention", "triton", *args, **options | change).startswith("it is for one token per row")
    assert refusal("attention", "triton", *args, **options, dropout=0.5) == "dropout 0.5"
    two = torch.cat([args[0]] * 2, 1)
    assert refusal("attention", "triton", two, *args[1:], **options).startswith("it is for one token per row")
    assert refusal("attention", "triton", args[0], args[1].half(), args[2], **options).startswith("query is torch.float32")


@torch.no_grad()
def test_a_static_step_runs_it() -> None:
    case = odd_shape(7, layer_types=[LINEAR, FULL], num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = peer.ours(case).to(DEVICE).eval()
    peer.draw(model, 0)
    logits = []
    for name in ("triton", "eager"):
        cache = model.new_cache(2, 40)
        model(case.ids(2, 6).to(DEVICE), cache=cache)
        step = StaticStep(model, cache)
        with backends.use(attention=name), backends.ran() as ran:
            logits.append(step())
        assert ran.counts["attention", name] == 1
    peer.assert_close(logits[0], logits[1], 1e-5)
