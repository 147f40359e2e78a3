"""`tap` and `tapped` with and without an active tap, and under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import taps
from qwen35moe.taps import active, tap
from tests.taps.toy import B, CausalLM, H, T


def test_without_an_active_tap_the_value_itself_is_returned(model: CausalLM) -> None:
    value = torch.ones(3)
    assert tap(model, "embed", value) is value


def test_active_is_one_list_of_the_open_taps(model: CausalLM) -> None:
    """Dispatch reads the list itself, so it is never rebound."""
    taps_now = active.ACTIVE
    with taps.record(model, "embed") as recording, taps.patch(model, {"embed": torch.zeros_like}) as patch:
        assert active.ACTIVE is taps_now and taps_now == [recording, patch]
    assert active.ACTIVE is taps_now and taps_now == []


def test_tapped_looks_at_the_module_and_the_names(model: CausalLM) -> None:
    mixer = model.model.layers[0].get_submodule("linear_attn")
    assert not taps.tapped(mixer, ("decay", "core"))
    with taps.record(model, "layers.0.*.decay"):
        assert taps.tapped(mixer, ("decay", "core")) and not taps.tapped(mixer, ("core",))
        assert not taps.tapped(model.model.layers[2].get_submodule("linear_attn"), ("decay",))
    with taps.patch(model, {"*.core": torch.zeros_like}):
        assert taps.tapped(mixer, ("core",)) and not taps.tapped(model, ("core",))


@pytest.mark.usefixtures("fresh_dynamo")
class TestCompile:
    def test_one_graph_without_an_active_tap(self, model: CausalLM, ids: Tensor) -> None:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(ids), model(ids))

    def test_a_tap_opened_after_compilation_works(self, model: CausalLM, ids: Tensor) -> None:
        compiled = torch.compile(model, backend="eager")
        before = compiled(ids)
        assert isinstance(compiled, nn.Module)
        with taps.record(compiled, "layers.0.*.decay") as seen:
            compiled(ids)
        assert seen["layers.0.linear_attn.decay"].shape == (B, T, H)
        with taps.patch(model, {"layers.0.output": torch.zeros_like}):
            patched = model(ids)
            assert torch.equal(compiled(ids), patched) and not torch.equal(patched, before)
        assert torch.equal(compiled(ids), before)
