"""Small tensors on the host: one transfer for several, and values beside a tensor."""

from __future__ import annotations

import torch

from qwen35moe.backends.values import host_values, on_host, with_host_values


class Elsewhere(torch.Tensor):
    """Says that it is not on the CPU."""

    is_cpu = False  # type: ignore[assignment]


def test_tensors_of_any_dtype_come_back_bit_for_bit() -> None:
    here = torch.arange(3)
    tensors = [
        torch.tensor([[True, False, True]]), torch.arange(10).view(2, 5).T, torch.tensor([0.5, float("nan")]), torch.tensor(7),
        torch.zeros(0, 4, dtype=torch.int32), torch.tensor([-1], dtype=torch.int16),
    ]  # fmt: skip
    copies = on_host([here, *(x.as_subclass(Elsewhere) for x in tensors)])
    assert copies[0] is here
    for copy, x in zip(copies[1:], tensors, strict=True):
        assert copy.dtype == x.dtype and copy.shape == x.shape
        assert torch.equal(copy.contiguous().view(torch.uint8), x.contiguous().view(torch.uint8)) if x.dim() else copy == x


def test_values_beside_a_tensor_hold_until_it_is_written() -> None:
    bounds = with_host_values(torch.tensor([0, 3, 5]), [0, 3, 5])
    assert host_values(bounds) == [0, 3, 5] and host_values(bounds[1:]) == [3, 5]
    bounds[1] = 4
    assert host_values(bounds) == [0, 4, 5]
