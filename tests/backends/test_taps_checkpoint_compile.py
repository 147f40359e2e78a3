"""The choice of an implementation under taps, gradient checkpointing and torch.compile."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import backends, taps
from qwen35moe.backends.operation import recomputing
from tests.backends.rms_norms import doubled, not_on_cuda


class Mixer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = taps.tap(self, "decay", x)
        return backends.run("rms_norm", x, x.new_ones(x.shape[-1]), eps=1.0, caller=self)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.Module()
        layer.linear_attn = Mixer()
        self.layers = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0].get_submodule("linear_attn")(x)


@pytest.mark.usefixtures("own_table")
class TestTapsAndCheckpoints:
    def test_an_implementation_that_skips_a_tapped_value_does_not_run(self) -> None:
        backends.register("rms_norm", "fused", doubled, before="torch", skips=("decay", "core"))
        model, x = Model(), torch.ones(2, 4)
        assert model(x).max() == 2.0
        with taps.record(model, "layers.0.linear_attn.decay"):
            assert model(x).max() == 1.0
            assert Model()(x).max() == 2.0  # no tap is active on this model
            with backends.use(rms_norm="fused"), pytest.raises(ValueError, match="a tap reads decay, which this"):
                model(x)
        assert model(x).max() == 2.0

    def test_the_recomputation_repeats_the_choices_of_the_forward(self) -> None:
        backends.register("rms_norm", "fast", doubled)
        x = torch.ones(2, 4, requires_grad=True)
        with backends.ran() as ran:
            with backends.use(rms_norm="fast"):
                y = backends.checkpoint(Mixer(), x)
            backends.use(rms_norm="torch")
            y.sum().backward()
            z = backends.checkpoint(Mixer(), x)
            backends.use(rms_norm="fast")
            z.sum().backward()
        assert [call.name for call in ran.calls] == ["fast", "fast", "torch", "torch"]
        assert not recomputing

    def test_the_recomputation_of_nested_checkpoints_repeats_the_automatic_choice(self) -> None:
        backends.register("rms_norm", "fast", doubled)
        x = torch.ones(2, 4, requires_grad=True)
        inner, outer = Mixer(), Mixer()
        with backends.ran() as ran:
            y = backends.checkpoint(lambda t: outer(backends.checkpoint(inner, t)), x)
            with backends.use(rms_norm="fast"):
                y.sum().backward()
        assert {call.name for call in ran.calls} == {"torch"}
        assert len(ran.calls) >= 4

    def test_the_recomputation_repeats_the_active_taps_of_the_forward(self) -> None:
        """Otherwise the recomputation would run the fused implementation and save other tensors than the forward."""
        backends.register("rms_norm", "fused", doubled, before="torch", skips=("decay",))
        model, x = Model(), torch.ones(2, 4, requires_grad=True)
        with backends.ran() as ran:
            with taps.record(model, "*.decay"):
                y = backends.checkpoint(model, x)
            y.sum().backward()
            z = backends.checkpoint(model, x)
            with taps.record(model, "*.decay") as recomputed:
                z.sum().backward()
        assert [call.name for call in ran.calls] == ["torch", "torch", "fused", "fused"]
        assert not recomputed


@pytest.mark.usefixtures("own_table", "fresh_dynamo")
class TestCompile:
    def test_one_graph_without_records_and_logs(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="qwen35moe.backends")
        backends.register("rms_norm", "fast", doubled, not_on_cuda, before="torch", skips=("decay",))
        model, x = Model(), torch.ones(2, 4)
        model.layers[0].get_submodule("linear_attn").__dict__["path"] = "layers.0.linear_attn"
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with backends.ran() as ran:
            assert compiled(x).max() == 1.0
        assert not ran.calls and not caplog.records
        assert compiled(x).max() == 1.0

    def test_a_new_choice_recompiles(self) -> None:
        backends.register("rms_norm", "fast", doubled)
        model, x = Model(), torch.ones(2, 4)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert compiled(x).max() == 1.0
        with backends.use(rms_norm="fast"):
            assert compiled(x).max() == 2.0
        assert compiled(x).max() == 1.0
        backends.register("rms_norm", "faster", doubled, before="torch")
        assert compiled(x).max() == 2.0

    def test_gradient_checkpointing_compiles(self) -> None:
        model, x = Model(), torch.ones(2, 4, requires_grad=True)
        compiled = torch.compile(lambda t: backends.checkpoint(model, t), fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(2, 4))
