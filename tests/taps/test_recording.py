"""`taps.record`: names and patterns, values, positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import taps
from qwen35moe.taps import tap
from tests.taps.toy import TOP_K, B, CausalLM, D, E, H, Layer, LinearAttn, Multimodal, SparseMlp, T, TextModel, V


class TestRecord:
    def test_a_value_by_name(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "layers.2.linear_attn.decay") as seen:
            assert len(seen) == 0
            model(ids)
        value = seen["layers.2.linear_attn.decay"]
        assert isinstance(value, Tensor) and value.shape == (B, T, H) and (value < 0).all()
        assert list(seen) == ["layers.2.linear_attn.decay"]

    def test_patterns(self, model: CausalLM, ids: Tensor) -> None:
        cases = {
            "layers.*.linear_attn.decay": ["layers.0.linear_attn.decay", "layers.2.linear_attn.decay"],
            "layers.N.linear_attn.decay": ["layers.0.linear_attn.decay", "layers.2.linear_attn.decay"],
            "layers.1.*": [f"layers.1.{x}" for x in ("input", "mlp.expert_in", "mlp.indices", "mlp.output")]
            + [f"layers.1.{x}" for x in ("mlp.routed", "mlp.router_logits", "output")]
            + ["layers.1.self_attn.output", "layers.1.self_attn.scores"],
            "*.decay": ["layers.0.linear_attn.decay", "layers.2.linear_attn.decay"],
            "embed": ["embed"],
            "norm": ["norm"],
            "layers.[01].output": ["layers.0.output", "layers.1.output"],
            "model.layers.0.output": ["layers.0.output"],
            "model.language_model.layers.0.output": ["layers.0.output"],
        }
        for pattern, names in cases.items():
            with taps.record(model, pattern) as seen:
                model(ids)
            assert sorted(seen) == sorted(names), pattern
        with taps.record(model, ["embed", "*.scores"]) as seen:
            model(ids)
        assert sorted(seen) == ["embed", "layers.1.self_attn.scores"]
        assert seen["model.embed"] is seen["embed"]

    def test_names_are_relative_to_the_text_model(self, ids: Tensor) -> None:
        text, outer = TextModel(), Multimodal()
        wrapped = nn.Module()
        wrapped.base_model = nn.Module()
        wrapped.base_model.model = CausalLM()
        for model in (text, wrapped):
            with taps.record(model, "layers.0.output") as seen:
                (model if model is text else wrapped.base_model.get_submodule("model"))(ids)
            assert list(seen) == ["layers.0.output"]
        with taps.record(outer, ["layers.0.output", "mtp.layers.0.self_attn.scores"]) as seen:
            outer(ids)
        assert sorted(seen) == ["layers.0.output", "mtp.layers.0.self_attn.scores"]

    def test_a_layer_or_a_mixer_alone(self) -> None:
        layer, x = Layer(0, dense=False), torch.randn(B, T, D)
        with taps.record(layer, ["linear_attn.decay", "output"]) as seen:
            layer(x)
        assert sorted(seen) == ["linear_attn.decay", "output"]
        with taps.record(layer.linear_attn, "decay", positions=-1) as seen:
            layer(x)
        assert [(name, value.shape) for name, value in seen.items()] == [("decay", (B, 1, H))]

    def test_several_forwards_give_a_list(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "layers.0.output") as seen:
            model(ids)
            model(ids[:, :1])
            assert [value.shape[1] for value in seen["layers.0.output"]] == [T, 1]
            seen.clear()
            model(ids)
        assert isinstance(seen["layers.0.output"], Tensor)
        assert len(seen.all("layers.0.output")) == 1

    def test_stays_on_the_graph(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, ["layers.0.output", "layers.0.mlp.indices"]) as seen:
            loss = model(ids).square().sum()
        (grad,) = torch.autograd.grad(loss, seen["layers.0.output"])
        assert grad.shape == (B, T, D) and grad.abs().min() > 0
        with torch.no_grad(), taps.record(model, "layers.0.output") as seen:
            model(ids)
        assert not seen["layers.0.output"].requires_grad

    def test_recorded_values_do_not_change_later(self) -> None:
        """A static cache is one buffer, written in place at every step."""
        mixer, buffer = LinearAttn(), torch.zeros(B, H, V)
        with taps.record(mixer, "state") as seen:
            for step in range(3):
                tap(mixer, "state", buffer.fill_(step))
        assert [value.max().item() for value in seen["state"]] == [0, 1, 2]

    def test_recording_changes_no_value(self, model: CausalLM, ids: Tensor) -> None:
        without = model(ids)
        with taps.record(model, "*"):
            assert torch.equal(model(ids), without)

    def test_unknown_names_raise_with_the_closest_names(self, model: CausalLM) -> None:
        with pytest.raises(ValueError, match=r"matches no named value of this CausalLM; closest: .*linear_attn\.decay"):
            taps.record(model, "layers.0.linear_attn.decays")
        with pytest.raises(ValueError, match="layers.0.linear_attn.decay"):
            taps.record(model, "layers.9.linear_attn.decay")
        with pytest.raises(ValueError, match="matches no named value"):
            taps.record(model, ["embed", "layers.1.linear_attn.decay"])  # layer 1 is an attention layer
        with pytest.raises(ValueError, match="matches no named value"):
            taps.record(CausalLM(dense=True), "*.router_logits")
        with pytest.raises(ValueError, match="matches no named value"):
            taps.record(model, "decay")

    def test_a_value_that_was_not_recorded_raises(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "*.output") as seen:
            model(ids)
        with pytest.raises(KeyError, match=r"layers\.0\.outputs was not recorded; closest recorded names: .*layers\.0\.output"):
            seen["layers.0.outputs"]

    def test_a_name_outside_the_catalogue_fails_an_assertion(self, model: CausalLM) -> None:
        tap(model, "nonsense", torch.ones(1))  # not checked while no tap is active
        with taps.record(model, "embed"), pytest.raises(AssertionError, match="'nonsense' is not in the catalogue"):
            tap(model, "nonsense", torch.ones(1))

    def test_a_recording_reads_its_own_model_and_recordings_nest(self, ids: Tensor) -> None:
        one, two = CausalLM(), CausalLM()
        with taps.record(one, "layers.0.output") as first, taps.record(one, "*") as all_of_one:
            with taps.record(two, "layers.0.output") as second:
                two(ids)
            assert not first and len(second) == 1
            one(ids)
            two(ids)
        assert torch.equal(first["layers.0.output"], all_of_one["layers.0.output"])
        assert len(second.all("layers.0.output")) == len(first.all("layers.0.output")) == 1

    def test_an_error_ends_the_block(self, model: CausalLM) -> None:
        with pytest.raises(RuntimeError), taps.record(model, "embed"):
            raise RuntimeError


class TestPositions:
    @pytest.mark.parametrize(
        ("positions", "kept"),
        [(-1, [4]), (0, [0]), ([0, 3, -2], [0, 3, 3]), (slice(1, None, 2), [1, 3]), (slice(9, None), []), ([], [])],
    )
    def test_selects_tokens(self, model: CausalLM, ids: Tensor, positions: taps.Positions, kept: list[int]) -> None:
        names = ["layers.1.output", "layers.1.self_attn.scores", "layers.1.mlp.router_logits", "layers.0.mlp.indices"]
        with taps.record(model, names) as whole, taps.record(model, names, positions=positions) as some:
            model(ids)
        assert torch.equal(some["layers.1.output"], whole["layers.1.output"][:, kept])
        assert torch.equal(some["layers.1.self_attn.scores"], whole["layers.1.self_attn.scores"][:, :, kept])
        logits = whole["layers.1.mlp.router_logits"].view(B, T, E)
        assert torch.equal(some["layers.1.mlp.router_logits"], logits[:, kept])
        assert some["layers.0.mlp.indices"].shape == (B, len(kept), TOP_K)

    def test_gradients_flow_through_the_selection(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "layers.0.output", positions=[1]) as seen:
            model(ids)
        seen["layers.0.output"].sum().backward()
        assert model.model.embed_tokens.weight.grad is not None

    def test_values_without_a_token_axis(self, model: CausalLM, ids: Tensor) -> None:
        with taps.record(model, "layers.0.*", positions=-1) as seen:
            model(ids)
        assert seen["layers.0.linear_attn.state"].shape == (B, H, V + 1, V)
        assert seen["layers.0.mlp.expert_in"].shape == (B * T * TOP_K, D)
        assert seen["layers.0.linear_attn.core"].shape == (B, 1, H, V)
        with pytest.raises(ValueError, match=r"layers.0.linear_attn.state \[B, H, K, V\] has no token axis"):
            taps.record(model, "layers.0.linear_attn.state", positions=-1)

    def test_positions_outside_the_sequence_raise(self, model: CausalLM, ids: Tensor) -> None:
        with pytest.raises(ValueError, match=r"positions=\[5\] reaches outside the 5 tokens of layers.0.output"):
            with taps.record(model, "layers.0.output", positions=5):
                model(ids)

    def test_an_unknown_batch_size_raises(self) -> None:
        mlp = SparseMlp()
        with pytest.raises(ValueError, match="cannot tell the tokens of router_logits"):
            with taps.record(mlp, "router_logits", positions=0):
                mlp(torch.randn(B, T, D))

    def test_wrong_positions_raise(self, model: CausalLM) -> None:
        with pytest.raises(ValueError, match="a slice, an int or a list of ints"):
            taps.record(model, "embed", positions=[0.5])  # pyright: ignore[reportArgumentType]
