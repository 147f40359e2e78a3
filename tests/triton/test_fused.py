"""The Triton kernels that fuse neighbouring operations of a step: each against its definition, and a whole model with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import Config, Qwen3_5MoeForCausalLM, backends, taps
from tests.support.kernel_checks import DEVICE, DTYPES, ROUNDED, assert_close, draw, judged, refusal

pytest.importorskip("triton")
FUSED = ("add_rms_norm", "projections", "norm_rotary", "swiglu", "add_shared_expert")
EPS = {"eps": 1e-6}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks in every loop, the last one incomplete."""
    from qwen35moe_kernels import linear, norm

    for module, name, size in (
        (linear, "_DEPTH", 8), (linear, "_DEPTH_TWO", 16), (linear, "_ELEMENTS", 16), (norm, "_ELEMENTS", 64),
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
        ("swiglu", (x, weight, weight), {}), ("add_shared_expert", (x, x, x, x, weight[:1]), {}),
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
    "add_shared_expert": lambda: (*(draw(3, 8) for _ in range(4)), draw(1, 8)),
    "norm_rotary": lambda: (draw(2, 3, 4, 8), draw(2, 3, 2, 8), draw(2, 3, 3), draw(2, 3, 3), draw(8), draw(8), 1e-6),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_one_operator_in_a_compiled_graph(name: str) -> None:
    operator = getattr(torch.ops.qwen35moe_kernels, name).default
    torch.library.opcheck(operator, OPERATORS[name](), test_utils=("test_schema", "test_faketensor"))


# ------------------------------------------------------------------------------------------------------------ in a model


@pytest.fixture
def model() -> Qwen3_5MoeForCausalLM:
    text = dict(
        model_type="qwen3_5_moe_text", vocab_size=61, hidden_size=24, num_hidden_layers=2, head_dim=16,
        layer_types=["linear_attention", "full_attention"], num_attention_heads=6, num_key_value_heads=2,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12, num_experts=5,
        num_experts_per_tok=2, moe_intermediate_size=10, shared_expert_intermediate_size=14,
    )
    return Qwen3_5MoeForCausalLM(Config.from_dict(text)).init_weights(seed=3).to(DEVICE)


@torch.no_grad()
def logits(model: nn.Module, implementation: str) -> tuple[Tensor, dict[str, int]]:
    """Those of three tokens and then of one, and how often each of FUSED ran in Triton."""
    choices = {"choice": backends.use(**dict.fromkeys(FUSED, implementation))}
    with choices["choice"], backends.ran() as ran:
        cache = model.new_cache(1)
        first = model(torch.tensor([[5, 9, 7]], device=DEVICE), cache=cache).logits
        second = model(torch.tensor([[4]], device=DEVICE), cache=cache).logits
    return torch.cat([first, second], dim=1), {name: ran.counts[name, "triton"] for name in FUSED}


EVERY = {"add_rms_norm": 4, "projections": 4, "norm_rotary": 2, "swiglu": 4, "add_shared_expert": 4}  # 2 layers, 2 calls


def test_a_model_with_all_of_them(model: Qwen3_5MoeForCausalLM) -> None:
    fused, counts = logits(model, "triton")
    composed, none = logits(model, "torch")
    assert counts == EVERY and not any(none.values())
    assert (fused - composed).abs().max() <= 1e-5 * composed.abs().max()


PARTS = {  # a module of layer 1 -> the operations that read or replace it, and so step aside
    "post_attention_layernorm": ["add_rms_norm"], "self_attn.k_norm": ["norm_rotary"], "self_attn.v_proj": ["projections"],
    "mlp.shared_expert.up_proj": ["swiglu"], "mlp.shared_expert_gate": ["add_shared_expert"], "mlp": ["add_shared_expert"],
    "mlp.shared_expert": [], "self_attn": [], "mlp.gate": [],
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_hook_on_a_module_that_is_read_without_a_call(model: Qwen3_5MoeForCausalLM, name: str) -> None:
    def scaled(module: nn.Module, args: object, output: Any) -> Any:
        return (1.25 * output[0] + 0.2, *output[1:]) if isinstance(output, tuple) else 1.25 * output + 0.2

    plain, _ = logits(model, "triton")
    model.model.layers[1].get_submodule(name).register_forward_hook(scaled)
    fused, counts = logits(model, "triton")
    composed, _ = logits(model, "torch")
    assert (fused - composed).abs().max() <= 1e-5 * composed.abs().max()
    assert name == "mlp.gate" or (fused - plain).abs().max() > 1e-3 * plain.abs().max()
    calls = {operation: EVERY[operation] - (2 if operation in PARTS[name] else 0) for operation in FUSED}
    assert counts == calls


@pytest.mark.parametrize("value", ["shared", "output", "routed"])
def test_a_tap_on_a_value_that_is_not_materialised(model: Qwen3_5MoeForCausalLM, value: str) -> None:
    def tapped(implementation: str) -> tuple[Tensor, dict[str, int], dict[str, Tensor]]:
        with taps.patch(model, {f"layers.1.mlp.{value}": lambda x: 1.5 * x}), taps.record(model, f"layers.*.mlp.{value}") as seen:
            return *logits(model, implementation), dict(seen)

    fused, counts, values = tapped("triton")
    composed, _, expected = tapped("torch")
    assert (fused - composed).abs().max() <= 1e-5 * composed.abs().max()
    assert values.keys() == expected.keys()
    assert all((values[key] - expected[key]).abs().max() <= 1e-5 * expected[key].abs().max() for key in expected)
    assert counts["add_shared_expert"] == (4 if value == "routed" else 0) and counts["add_rms_norm"] == 4
