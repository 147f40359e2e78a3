"""The Triton kernels that fuse neighbouring operations of a step: each against its definition, and a whole model with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import Config, Qwen3_5MoeForCausalLM, backends
from tests.modules.test_fused import CALLS, FUSED
from tests.support.configs import TWO_LAYERS
from tests.support.kernel_checks import DEVICE, DTYPES, ROUNDED, assert_close, draw, judged, refusal

pytest.importorskip("triton")
EPS = {"eps": 1e-6}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks in every loop, the last one incomplete."""
    from qwen35moe_kernels import linear, norm, sigmoid_gate

    for module, name, size in (
        (linear, "_DEPTH", 16), (linear, "_ELEMENTS", 16), (norm, "_ELEMENTS", 64), (sigmoid_gate, "_ELEMENTS", 64),
        (sigmoid_gate, "_WIDTH", 32),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, size)
    yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", FUSED)
def test_every_case_and_dtype(operation: str, dtype: torch.dtype) -> None:
    """In half precision a sum of products of numbers that were rounded is compared: the bound is relative to the largest."""
    for args, options in backends.cases(operation)[1](dtype, DEVICE, torch.Generator().manual_seed(5)):
        assert_close(operation, "triton", args, options, dtype, forward=ROUNDED[dtype])


@pytest.mark.parametrize("operation", FUSED)
def test_views_give_what_copies_give(operation: str) -> None:
    """Every tensor but the weights of products as a part of wider rows, as the queries beside their gates are."""
    for args, options in backends.cases(operation)[1](torch.float32, DEVICE, torch.Generator().manual_seed(6)):
        weights = operation in ("projections", "swiglu")
        wide = [x if weights and n else torch.stack([x, x], dim=-1)[..., 0] for n, x in enumerate(args)]
        heads = [x if x.dim() < 4 else torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in args]
        with backends.use(**{operation: "triton"}):
            expected = backends.run(operation, *args, **options)
            for views in (wide, heads):
                results = backends.run(operation, *views, **options)
                pairs = zip(results, expected, strict=True) if isinstance(expected, tuple) else [(results, expected)]
                assert all(torch.equal(a, b) for a, b in pairs)


def test_the_sum_before_the_norm_is_rounded_first() -> None:
    """The two launches that it replaces give the same bits, also where the change has another dtype."""
    for dtype in (torch.float32, torch.float16):
        residual, change, weight = draw(3, 5, 24, dtype=dtype), draw(3, 5, 24, seed=1), 0.3 * draw(24, seed=2)
        with backends.use(rms_norm="triton"):
            total = residual + change.to(dtype)
            normed = backends.run("rms_norm", total, weight, **EPS)
        with backends.use(add_rms_norm="triton"):
            assert all(map(torch.equal, backends.run("add_rms_norm", residual, change, weight, **EPS), (total, normed)))


def test_no_rows() -> None:
    x, weight = draw(0, 8), draw(5, 8)
    for operation, args, options in (
        ("add_rms_norm", (x, x, weight[0]), EPS), ("projections", (x, weight, weight, weight[:3]), {}),
        ("swiglu", (x, weight, weight), {}), ("add_shared_expert", (x, x, x, x, weight[:1]), {}), ("sigmoid_gate", (x, x), {}),
        ("norm_rotary", (draw(2, 0, 4, 8), draw(2, 0, 2, 8), draw(2, 0, 3), draw(2, 0, 3), weight[0], weight[1]), EPS),
    ):  # fmt: skip
        assert judged(operation, "triton", args, options, torch.float32).forward == 0.0


def test_unsupported_names_the_argument() -> None:
    x, weight = draw(2, 8), draw(5, 8)
    products = x, weight, weight, weight
    assert refusal("projections", "triton", *products) is None
    assert "second is not contiguous" in refusal("projections", "triton", x, weight, draw(8, 5).T, weight)
    assert "and third torch.float16" in refusal("projections", "triton", x, weight, weight, weight.half())
    assert "and up_weight torch.float64" in refusal("swiglu", "triton", x, weight, weight.double())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for operation, args in (
            ("projections", products), ("swiglu", products[:3]), ("add_shared_expert", (x, x, x, x, weight[:1])),
        ):  # fmt: skip
            assert refusal(operation, "triton", *args).startswith("autocast is enabled")
    assert "would be broadcast" in refusal("add_rms_norm", "triton", x, x[:1], weight[0], **EPS)
    assert "would be broadcast" in refusal("sigmoid_gate", "triton", x, x[:1])
    assert refusal("swiglu", "triton", x.to("meta"), weight, weight) == "x is on meta, not on CUDA"  # which has no autocast
    for operation in FUSED:  # under gradients the modules compose the operations that have a backward
        args, options = next(iter(backends.cases(operation)[1](torch.float32, DEVICE, torch.Generator())))
        assert "no backward" in refusal(operation, "triton", args[0].requires_grad_(), *args[1:], **options)
    with backends.use(projections="auto"):
        entry = next(entry for entry in backends.implementations("projections") if entry.name == "triton")
        assert entry.passed_over((draw(4, 8), *products[1:]), {}) is None
        assert "x has 5 rows" in entry.passed_over((draw(5, 8), *products[1:]), {})


OPERATORS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "add_rms_norm": lambda: (draw(3, 8), draw(3, 8), draw(8), 1e-6),
    "projections": lambda: (draw(3, 8), [draw(5, 8), draw(2, 8), draw(7, 8)]),
    "swiglu": lambda: (draw(3, 8), draw(5, 8), draw(5, 8)),
    "sigmoid_gate": lambda: (draw(3, 8), draw(3, 8)),
    "add_shared_expert": lambda: (*(draw(3, 8) for _ in range(4)), draw(1, 8)),
    "norm_rotary": lambda: (draw(2, 3, 4, 8), draw(2, 3, 2, 8), draw(2, 3, 3), draw(2, 3, 3), draw(8), draw(8), 1e-6),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_one_operator_in_a_compiled_graph(name: str) -> None:
    operator = getattr(torch.ops.qwen35moe_kernels, name).default
    torch.library.opcheck(operator, OPERATORS[name](), test_utils=("test_schema", "test_faketensor"))


# ------------------------------------------------------------------------------------------------------------ in a model


@torch.no_grad()
def test_a_decoded_token_of_a_model_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/modules/test_fused.py` tests where the modules step aside."""
    from qwen35moe_kernels import linear

    for name in ("_COLUMNS", "_COLUMNS_TWO", "_DEPTH"):
        monkeypatch.setattr(linear, name, 128)
    model = Qwen3_5MoeForCausalLM(Config.from_dict(TWO_LAYERS)).init_weights(seed=3).to(DEVICE)

    def logits(name: str) -> Tensor:
        with backends.use(**dict.fromkeys(FUSED, name)):
            return model(torch.tensor([[4]], device=DEVICE), cache=model.new_cache(1)).logits

    with backends.ran() as ran:
        fused, composed = logits("triton"), logits("torch")
    assert {name: ran.counts[name, "triton"] for name in FUSED} == CALLS
    assert (fused - composed).abs().max() <= 1e-5 * composed.abs().max()
