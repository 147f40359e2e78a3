"""ops/cpu/packed_weight.py: a packed weight multiplies as the plain one, gives its bits back, and refuses what it cannot do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen35moe import backends, ops
from qwen35moe.ops.cpu.packed_weight import DTYPES, PackedExperts, PackedMatrix, pack, refusal
from tests.support.peer import assert_close, relative_error

SUPPORTED = [dtype for dtype in DTYPES if refusal(dtype) is None]
pytestmark = pytest.mark.skipif(torch.float32 not in SUPPORTED, reason=str(refusal(torch.float32)))

FEATURES, WIDTH, EXPERTS = 37, 29, 5


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view({4: torch.int32, 2: torch.int16}[x.element_size()])


@pytest.mark.parametrize("dtype", SUPPORTED)
@pytest.mark.parametrize("shape", [(FEATURES, WIDTH), (700, 512), (1, 300), (EXPERTS, 26, 31)])
def test_unpacking_gives_the_bits_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = draw(*shape, dtype=dtype)
    weight.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -0.0, torch.finfo(dtype).smallest_normal / 8], dtype=dtype)
    packed = pack(weight)
    assert (packed.shape, packed.dtype, packed.numel(), packed.nbytes) == (weight.shape, dtype, weight.numel(), weight.nbytes)
    for again in (packed, packed.clone(), packed.detach(), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert type(again) is (PackedExperts if len(shape) == 3 else PackedMatrix) and isinstance(again, nn.Parameter)
        assert torch.equal(bits(again.to_dense()), bits(weight))


@pytest.mark.parametrize("dtype", SUPPORTED)
@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 3), (0,), (2, 65), (2, -1, 3), (4, -1, 2, 3)])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_product_is_that_of_the_plain_weight(grad: Any, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    """-1 in rows: x is a part of a larger tensor, no view of rows."""
    x = draw(*(abs(n) + 1 if -1 in rows else n for n in rows), WIDTH, dtype=dtype)
    if -1 in rows:
        x = x[:, -1:, ..., 1:, :] if len(rows) > 3 else x[:, -1:]
    weight, bias = draw(FEATURES, WIDTH, dtype=dtype), draw(FEATURES, dtype=dtype)
    expected, packed = F.linear(x.double(), weight.double()), pack(weight)
    with grad():
        for y in (F.linear(x, packed), ops.linear(x, packed), F.linear(x, packed, bias) - bias):
            assert y.dtype == dtype and y.shape == expected.shape
            assert y.numel() == 0 or relative_error(y, expected) <= (2e-6 if dtype == torch.float32 else 2e-2)


def test_which_form_runs() -> None:
    x, packed = draw(3, WIDTH), pack(draw(FEATURES, WIDTH))
    with backends.ran() as ran:
        ops.linear(x, packed)
        with backends.use(linear="torch"):
            ops.linear(x, packed)
        ops.linear(x.clone().requires_grad_(), packed)
    assert ran.counts == {("linear", "packed"): 1, ("linear", "torch"): 2}
    with backends.use(linear="onednn"), pytest.raises(ValueError, match="the weight is packed"):
        ops.linear(x, packed)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="cannot be converted to torch.bfloat16"):
        ops.linear(x, packed)


@pytest.mark.parametrize("choice", ["auto", "sorted", "loop", "tapped"])
@pytest.mark.parametrize("tokens", [1, 11])
def test_experts_of_packed_weights(tokens: int, choice: str) -> None:
    gate_up, down = draw(EXPERTS, 26, WIDTH), draw(EXPERTS, WIDTH, 13)
    indices = torch.arange(2 * tokens).remainder(EXPERTS).view(tokens, 2)
    hidden, weights = draw(tokens, WIDTH), draw(tokens, 2)
    plain = [x.double() for x in (hidden, gate_up, down)]
    expected = ops.experts(*plain, indices, weights.double())
    with backends.use(experts=choice), backends.ran() as ran:
        y = ops.experts(hidden, pack(gate_up), pack(down), indices, weights)
    assert_close(y, expected, 2e-6)
    assert ran.counts["experts", "sorted" if choice == "auto" else choice] == 1
    for name in ("gathered", "grouped"):
        with backends.use(experts=name), pytest.raises(ValueError, match=r"the experts are packed|multiple of 16 bytes"):
            ops.experts(hidden, pack(gate_up), pack(down), indices, weights)


def test_a_tap_reads_the_values_of_packed_experts() -> None:
    gate_up, down = draw(EXPERTS, 26, WIDTH), draw(EXPERTS, WIDTH, 13)
    indices, weights, hidden = torch.tensor([[4, 1], [0, 4], [1, 0]]), draw(3, 2), draw(3, WIDTH)
    values: list[dict[str, Tensor]] = [{}, {}]
    for numbers, expert_weights in zip(values, [(gate_up, down), (pack(gate_up), pack(down))], strict=True):
        ops.experts(hidden, *expert_weights, indices, weights, tap=lambda name, x, numbers=numbers: numbers.setdefault(name, x))
    assert list(values[1]) == ["expert_in", "expert_act", "expert_out"]
    for name, value in values[0].items():
        assert_close(values[1][name], value, 2e-6)


def test_a_backward_through_packed_weights_is_refused() -> None:
    x, packed = draw(3, WIDTH).requires_grad_(), pack(draw(FEATURES, WIDTH))
    parts = draw(3, 4, WIDTH).requires_grad_()
    for y in (F.linear(x, packed), ops.linear(x, packed), F.linear(x, packed, draw(FEATURES)), F.linear(parts[:, 1:3], packed)):
        with pytest.raises(ValueError, match=r"unpack_weights\(\) first"):
            y.sum().backward()
    indices, weights = torch.tensor([[4, 1], [0, 4], [1, 0]]), draw(3, 2)
    y = ops.experts(x, pack(draw(EXPERTS, 26, WIDTH)), pack(draw(EXPERTS, WIDTH, 13)), indices, weights)
    with pytest.raises(ValueError, match="no gradient through packed weights"):
        y.sum().backward()


READS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda w: w.norm(),
    "sum": lambda w: w.sum(0),
    "compared": lambda w: w == w.abs(),
    "stacked": lambda w: torch.stack([w, w]),
    "copied from": lambda w: torch.zeros(w.shape).copy_(w),
    "singular values": torch.linalg.svdvals,
    "isnan": lambda w: w.isnan(),
    "matrix product": lambda w: w @ torch.ones(w.shape[-1], 3),
    "like": torch.zeros_like,
}


@pytest.mark.parametrize("name", READS)
def test_other_operators_read_a_plain_copy(name: str) -> None:
    weight = draw(FEATURES, WIDTH)
    y, expected = READS[name](pack(weight)), READS[name](weight)
    assert type(y) is Tensor
    if y.dtype != torch.float32 or not expected.any():
        return torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert_close(y, expected, 2e-6)


REFUSED: dict[str, dict[str, Callable[[Any], Any]]] = {
    "changed in place": {
        "mul_": lambda w: w.mul_(2),
        "copy_": lambda w: w.copy_(torch.zeros(w.shape)),
        "data.add_": lambda w: w.data.add_(1),
        "foreach": lambda w: torch._foreach_mul_([w], 2),
        "init": nn.init.zeros_,
        "out": lambda w: torch.add(torch.ones(w.shape), 1, out=w),
    },
    "viewed": {"view": lambda w: w.view(-1), "rows": lambda w: w[1:], "mT": lambda w: w.mT},
    "cannot be replaced": {"data": lambda w: setattr(w, "data", torch.zeros(2))},
    "cannot be converted to": {"double": lambda w: w.double(), "meta": lambda w: w.to("meta")},
    "no plain memory": {
        "data_ptr": lambda w: w.data_ptr(),
        "storage": lambda w: w.untyped_storage(),
        "share": lambda w: w.share_memory_(),
        "numpy": lambda w: w.numpy(),
    },
    "have no gradient": {
        "requires_grad_": lambda w: w.requires_grad_(),
        "requires_grad": lambda w: setattr(w, "requires_grad", True),
    },
}


@pytest.mark.parametrize(("message", "name"), [(message, name) for message, calls in REFUSED.items() for name in calls])
@pytest.mark.parametrize("shape", [(FEATURES, WIDTH), (EXPERTS, 26, 31)])
def test_what_a_packed_weight_refuses(shape: tuple[int, ...], message: str, name: str) -> None:
    weight = draw(*shape)
    packed = pack(weight)
    with torch.no_grad(), pytest.raises(ValueError, match=message) as error:
        REFUSED[message][name](packed)
    assert "unpack_weights()" in str(error.value)
    assert torch.equal(packed.to_dense(), weight)


def test_compiling_and_exporting_are_refused() -> None:
    linear = nn.Linear(WIDTH, FEATURES, bias=False)
    linear._parameters["weight"] = pack(draw(FEATURES, WIDTH))  # pyright: ignore[reportArgumentType]
    x = draw(3, WIDTH)
    for run in (torch.compile(linear, backend="eager"), lambda x: torch.export.export(linear, (x,))):
        with pytest.raises(Exception, match=r"cannot trace packed weights: call model.unpack_weights\(\) first"):
            run(x)


def test_a_dtype_that_cannot_be_packed() -> None:
    assert refusal(torch.float32) is None
    assert "oneDNN packs float32" in str(refusal(torch.float64))
    for dtype in set(DTYPES) - set(SUPPORTED):
        assert "dtype=torch.float32" in str(refusal(dtype))
