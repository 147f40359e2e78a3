"""The arguments of torch's attention on a GPU compute the definition; which kernel takes them is in tests/triton."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from qwen35moe.ops.attention import attention, causal_mask
from qwen35moe.ops.cuda import attention as cuda
from tests.support.peer import assert_close, randn

B, H, G, K, POSITIONS = 3, 6, 2, 8, 13
STARTS = {"start": 0, "behind": 5, "rows": torch.tensor([7, 0, 3])}


def inputs(tokens: int, positions: int) -> list[Tensor]:
    shapes = (B, tokens, H, K), (B, positions, G, K), (B, positions, G, K)
    return [randn(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("starts", "tokens"), [("start", 4), ("behind", 1), ("behind", 4), ("rows", 1), ("rows", 4), ("start", POSITIONS)]
)
def test_it_is_the_definition(starts: str, tokens: int) -> None:
    first = STARTS[starts]
    args = [x.requires_grad_() for x in inputs(tokens, POSITIONS)]
    outputs = [fn(*args, scale=0.3, starts=first) for fn in (cuda.cuda_attention, attention.definition)]
    gradients = [torch.autograd.grad(out.square().sum(), args) for out in outputs]
    for ours, theirs in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert_close(ours, theirs, 1e-12)


def test_the_flash_kernel_gets_the_keys_up_to_the_last_query() -> None:
    """Its causal mask is aligned to the last key: keys beyond are cut off; grouped heads stay."""
    query, key, value = (x.bfloat16() for x in inputs(4, POSITIONS))
    calls: list[tuple[torch.Size, ...]] = []

    def flash(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, **options: object) -> tuple[Tensor]:
        calls.append((q.shape, k.shape, v.shape))
        assert causal and dropout == 0.0 and options == {"return_debug_mask": False, "scale": 0.3}
        return (q,)

    with mock.patch.object(cuda, "_flash_runs", lambda *_: True), mock.patch.object(
        torch.ops.aten, "_scaled_dot_product_flash_attention", flash
    ):
        cuda.cuda_attention(query, key, value, scale=0.3, starts=5)
    assert calls == [((B, H, 4, K), (B, G, 9, K), (B, G, 9, K))]


@pytest.mark.parametrize("starts", ["behind", "rows"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_mask_is_aligned_and_that_of_the_definition(tokens: int, starts: str) -> None:
    mask = cuda.additive_mask(tokens, POSITIONS, STARTS[starts], randn(1, dtype=torch.bfloat16))
    assert mask.dtype == torch.bfloat16 and mask.stride(-1) == 1 and not any(n % 8 for n in mask.stride()[:-1])
    assert torch.equal(mask == 0, causal_mask(tokens, POSITIONS, mask.device, STARTS[starts]))
    assert torch.equal(mask != 0, mask == -torch.inf)
