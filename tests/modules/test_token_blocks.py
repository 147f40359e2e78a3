"""A Gated DeltaNet layer computes a long prompt in blocks of tokens: the same results as at once, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import Config, backends, ops, taps
from qwen35moe.cache import DeltaNetState, DeltaNetUpdate
from qwen35moe.models.plan import plan_layout
from qwen35moe.models.text import Qwen3_5MoeTextModel
from qwen35moe.modules import gated_deltanet
from qwen35moe.modules.context import LayerContext
from tests.support.peer import randn

SIZE = 64  # tokens per block in these tests


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Qwen3_5MoeTextModel:
    text = dict(
        model_type="qwen3_5_moe_text", vocab_size=61, hidden_size=24, num_hidden_layers=1, head_dim=16,
        layer_types=["linear_attention"], num_attention_heads=6, num_key_value_heads=2, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12, num_experts=5, num_experts_per_tok=2,
        moe_intermediate_size=10, shared_expert_intermediate_size=14,
    )
    model = Qwen3_5MoeTextModel(Config.from_dict(text)).init_weights(seed=3).double()
    channels = 2 * 2 * 8 + 4 * 12
    monkeypatch.setattr(gated_deltanet, "_BLOCK", 3 * channels * (SIZE + 5))  # rows of the batch: 3
    return model


def run(layer: Any, x: Tensor, state: DeltaNetState | None) -> tuple[Tensor, DeltaNetUpdate, int]:
    """The output, the state after the last token, and the number of calls of the delta rule."""
    layout = plan_layout(x.shape[0], x.shape[1], x.device)
    with backends.ran() as ran:
        out, after, _ = layer(x, LayerContext(layout, (torch.empty(0), torch.empty(0))), state)
    return out, after, sum(call.operation == "gated_delta_rule" for call in ran.calls)


@pytest.mark.parametrize("tokens", [63, 64, 65, 128, 131])
@pytest.mark.parametrize("with_state", [False, True], ids=["start", "continued"])
def test_blocks_of_tokens_agree_with_all_tokens_at_once(model: Any, tokens: int, with_state: bool) -> None:
    layer, x = model.layers[0].linear_attn, randn(3, tokens, 24)
    before = DeltaNetState(randn(3, 80, 3, seed=1), randn(3, 4, 8, 12, seed=2)) if with_state else None
    copies = None if before is None else [value.clone() for value in before.read()]
    whole, after, calls = run(layer, x, before)  # a gradient is recorded: at once
    assert calls == 1
    with torch.no_grad():
        blocks, after_blocks, calls = run(layer, x, before)
    assert calls == -(-tokens // SIZE)
    for ours, expected in zip((blocks, *after_blocks[:2]), (whole, *after[:2]), strict=True):
        assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert before is None or all(torch.equal(x, y) for x, y in zip(before.read(), copies or (), strict=True))


@torch.no_grad()
def test_a_tap_gets_every_inner_value_once(model: Any) -> None:
    layer, x = model.layers[0].linear_attn, randn(3, 131, 24)
    for name in ("conv", "query", "core", "state", "decay"):
        with taps.record(model, f"layers.0.linear_attn.{name}") as recorded:
            assert run(layer, x, None)[2] == 1
        assert len(recorded) == 1
    with taps.record(model, "layers.0.linear_attn.normed") as recorded:
        assert run(layer, x, None)[2] == 3
    assert [value.shape for value in recorded.values()] == [(3, 131, 4, 12)]


@torch.no_grad()
def test_hooks_and_subclasses_get_all_tokens(model: Any) -> None:
    layer, x = model.layers[0].linear_attn, randn(3, 131, 24)
    expected = run(layer, x, None)[0]
    for part in (layer.conv1d, layer.norm):
        seen: list[torch.Size] = []
        handle = part.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))  # noqa: B023
        assert torch.allclose(run(layer, x, None)[0], expected, rtol=0, atol=1e-12)
        handle.remove()
        assert [shape[1] for shape in seen] == [131]
    layer._heads = lambda mixed: type(layer)._heads(layer, mixed)
    out, _, calls = run(layer, x, None)
    assert calls == 1 and torch.allclose(out, expected, rtol=0, atol=1e-12)
    assert isinstance(layer, nn.Module)


@torch.no_grad()
def test_an_implementation_of_others_gets_all_tokens(model: Any) -> None:
    layer, x = model.layers[0].linear_attn, randn(3, 131, 24)
    expected, tokens = run(layer, x, None)[0], []

    def mine(query: Tensor, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        tokens.append(query.shape[1])
        return ops.gated_delta_rule.definition(query, *args, **kwargs)

    backends.register("gated_delta_rule", "mine", mine, before="chunked_cpu")
    try:
        out = run(layer, x, None)[0]
    finally:
        backends.unregister("gated_delta_rule", "mine")
    assert tokens == [131] and torch.allclose(out, expected, rtol=0, atol=1e-12)
