"""`taps.patch`: replaced values and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen35moe import taps
from tests.taps.toy import CausalLM


class TestPatch:
    def test_replaces_a_value_and_those_computed_from_it(self, model: CausalLM, ids: Tensor) -> None:
        before = model(ids)
        with taps.patch(model, {"layers.0.mlp.routed": torch.zeros_like}), taps.record(model, "*") as seen:
            assert not torch.equal(model(ids), before)
        assert seen["layers.0.mlp.routed"].abs().max() == 0
        assert seen["layers.0.mlp.output"].abs().max() == 0
        assert torch.equal(model(ids), before)

    def test_patches_apply_in_the_order_of_opening_and_before_recordings(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "embed") as early, taps.patch(model, {"embed": lambda x: x + 1}):
            with taps.patch(model, {"embed": lambda x: x * 10}), taps.record(model, "embed") as late:
                model(ids)
        expected = (model.model.embed_tokens(ids) + 1) * 10
        assert torch.equal(early["embed"], expected) and torch.equal(late["embed"], expected)

    def test_one_function_for_many_values(self, model: CausalLM, ids: Tensor) -> None:
        with taps.patch(model, {"*.decay": torch.zeros_like, "layers.2.*.decay": lambda g: g - 1}):
            with taps.record(model, "*.decay") as seen:
                model(ids)
        assert (seen["layers.0.linear_attn.decay"] == 0).all() and (seen["layers.2.linear_attn.decay"] == -1).all()

    def test_gradients_flow_through_it(self, model: CausalLM, ids: Tensor) -> None:
        scale = torch.tensor(2.0, requires_grad=True)
        with taps.patch(model, {"layers.0.output": lambda x: x * scale}):
            model(ids).square().sum().backward()
        assert scale.grad is not None and scale.grad != 0

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda x: x[:, 1:], r"embed returned \[2, 4, 12\], the value has \[2, 5, 12\]"),
            (lambda x: x.double(), r"embed returned torch.float64 on cpu, the value is torch.float32 on cpu: use .to"),
            (lambda x: None, "embed returned NoneType, not a tensor"),
        ],
    )
    def test_checks_what_the_function_returns(self, model: CausalLM, ids: Tensor, function, message: str) -> None:
        with pytest.raises(ValueError, match=message), taps.patch(model, {"embed": function}):
            model(ids)

    def test_a_tensor_or_an_unknown_name_raises(self, model: CausalLM) -> None:
        with pytest.raises(ValueError, match="expected a function of the value, got Tensor"):
            taps.patch(model, {"embed": torch.zeros(1)})  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="matches no named value"):
            taps.patch(model, {"layers.0.embed": torch.zeros_like})

    def test_only_its_own_model(self, ids: Tensor) -> None:
        one, two = CausalLM(), CausalLM()
        before = two(ids)
        with taps.patch(one, {"embed": torch.zeros_like}):
            assert torch.equal(two(ids), before)
