"""Experts for research: the activations of each one, and experts as modules of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from qwen35moe import backends, taps
from qwen35moe.models.expert_activations import ExpertActivations, expert_activations
from qwen35moe.models.text import Qwen3_5MoeForCausalLM
from qwen35moe.modules.moe import Experts
from qwen35moe.modules.unfused import UnfusedExperts
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_all_close, assert_close, odd_shape

L, E, S, B, T = 2, 7, 2, 2, 9
CASE = odd_shape(51, layer_types=[LINEAR, FULL], num_hidden_layers=L, num_experts=E, num_experts_per_tok=S)
IDS, MASK = CASE.ids(B, T), torch.tensor([[0] * 4 + [1] * 5, [1] * T])


@pytest.fixture
def model() -> Any:
    model = peer.ours(CASE, dtype=torch.float64)
    peer.draw(model, 3)
    return model


def mlp(experts: Experts, expert: int, rows: Tensor) -> Tensor:
    gate, up = F.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, experts.down_proj[expert])


# ---------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("unfused", [False, True], ids=["grouped", "unfused"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_activations_of_every_expert(model, padded, unfused):
    """An expert's output is its MLP of its input; weighted and summed by token the outputs are the routed sum; the load is
    that of the routing; no expert has a padded token."""
    experts = [layer.mlp.experts for layer in model.model.layers]
    if unfused:
        model.unfuse_experts()
    mask = MASK if padded else torch.ones_like(MASK)
    recording = taps.record(model, "layers.*.mlp.routed")
    with torch.no_grad(), backends.ran() as ran, recording as seen, expert_activations(model) as rows:
        routing = model(IDS, attention_mask=mask, output_routing=True).routing
    assert ran.counts.get(("experts", "tapped"), 0) == (0 if unfused else L)
    assert [(r.layer, r.expert) for r in rows] == sorted({(r.layer, r.expert) for r in rows})
    for layer in range(L):
        of_layer = [r for r in rows if r.layer == layer]
        total = torch.zeros_like(seen[f"layers.{layer}.mlp.routed"])
        for r in of_layer:
            assert isinstance(r, ExpertActivations) and r.tokens.shape == r.weights.shape == r.inputs.shape[:1]
            assert_close(r.outputs, mlp(experts[layer], r.expert, r.inputs), 1e-12)
            total.index_add_(0, r.tokens, r.weights[:, None] * r.outputs)
        valid = torch.arange(T) < mask.sum(1, keepdim=True)  # as the layers see rows: from the left
        assert_close(total[valid.flatten()], seen[f"layers.{layer}.mlp.routed"][valid.flatten()], 1e-12)
        assert not bool(total[~valid.flatten()].any())
        chosen = routing.indices[layer][mask.flatten().bool()].flatten()
        assert {r.expert: len(r.tokens) for r in of_layer} == {int(e): int((chosen == e).sum()) for e in chosen.unique()}


def test_a_function_gets_the_activations_of_some_layers(model):
    """Nothing is stored, nothing is recorded after the block, and patched values are recorded as patched."""
    received: list[ExpertActivations] = []
    with torch.no_grad():
        patch = taps.patch(model, {"layers.1.mlp.expert_out": torch.zeros_like})
        with patch, expert_activations(model, received.append, [1]) as none:
            model(IDS)
        model(IDS)
    assert len(none) == 0 and {r.layer for r in received} == {1} and sum(len(r.tokens) for r in received) == B * T * S
    assert not any(bool(r.outputs.any()) for r in received)
    for wrong in ([2], [-1]):
        with pytest.raises(ValueError, match=r"layer -?\d has none; layers with experts: \[0, 1\]"):
            expert_activations(model, layers=wrong)
    with pytest.raises(ValueError, match="no layer has any"):
        expert_activations(peer.ours(odd_shape(100, dense=True)))


@pytest.mark.parametrize("unfused", [False, True], ids=["grouped", "unfused"])
def test_activations_are_recorded_once_and_carry_gradients(model, unfused):
    """Also under gradient checkpointing: the recomputation is not recorded. The weights have a gradient to the router."""
    if unfused:
        model.unfuse_experts()
    counts = []
    for recompute in (False, True):
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        with expert_activations(model) as rows:
            loss = model(IDS, labels=IDS).loss
            loss.backward()
        counts.append(sum(len(r.tokens) for r in rows))
        assert all(r.weights.requires_grad for r in rows)
    assert counts == [L * B * T * S] * 2
    rows.clear()
    assert len(rows) == 0


# ---------------------------------------------------------------------------------------------------- unfused


def linears(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".experts." in name]


def test_unfused_experts_are_views_under_the_names_of_the_per_expert_layout(model):
    grouped = [layer.mlp.experts for layer in model.model.layers]
    before, numbers = set(model.state_dict()), model.num_parameters()
    model.unfuse_experts()
    assert model.num_parameters() == numbers
    added = set(model.state_dict()) - before
    assert added == {f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight"
                     for layer in range(L) for e in range(E) for p in ("gate", "up", "down")}  # fmt: skip
    assert before - set(model.state_dict()) == {f"model.layers.{layer}.mlp.experts.{p}_proj"
                                                for layer in range(L) for p in ("gate_up", "down")}  # fmt: skip
    assert len(linears(model)) == L * E * 3
    for layer, experts in zip(model.model.layers, grouped, strict=True):
        for e, one in enumerate(layer.mlp.experts):
            assert torch.equal(torch.cat([one.gate_proj.weight, one.up_proj.weight]), experts.gate_up_proj[e])
            assert one.gate_proj.weight.data_ptr() == experts.gate_up_proj[e].data_ptr()
            assert one.down_proj.weight.data_ptr() == experts.down_proj[e].data_ptr()
    parameters = [(e.gate_up_proj, e.down_proj) for e in grouped]
    model.unfuse_experts()  # a second call changes nothing
    model.fuse_experts()
    assert set(model.state_dict()) == before
    for layer, (gate_up, down) in zip(model.model.layers, parameters, strict=True):
        assert layer.mlp.experts.gate_up_proj is gate_up and layer.mlp.experts.down_proj is down
    model.fuse_experts()


def test_the_same_outputs_and_gradients(model):
    outs, gradients = [], []
    for unfuse in (False, True):
        model.zero_grad(set_to_none=True)
        if unfuse:
            model.unfuse_experts()
        out = model(IDS, attention_mask=MASK, labels=IDS, output_router_logits=True)
        out.loss.backward()
        outs.append(out.logits.detach())
        if unfuse:
            model.fuse_experts()  # brings the gradients back to the grouped parameters
        gradients.append(peer.gradients(model))
    assert_close(outs[1], outs[0], 1e-12)
    assert_all_close(gradients[1], gradients[0], 1e-10)
    model.unfuse_experts()  # and to the Linears again
    first = model.model.layers[0].mlp.experts[0].down_proj.weight
    assert torch.equal(first.grad, gradients[1]["model.layers.0.mlp.experts.down_proj"][0])


@torch.no_grad()
def test_hooks_fire_on_the_experts_that_were_hit(model):
    model.unfuse_experts()
    fired: dict[str, int] = {}
    for name in linears(model):
        def count(_module: nn.Module, args: Any, _output: Any, name: str = name) -> None:
            assert name not in fired
            fired[name] = args[0].shape[0]

        model.get_submodule(name).register_forward_hook(count)
    routing = model(IDS, output_routing=True).routing
    expected = {f"model.layers.{layer}.mlp.experts.{int(e)}.{p}_proj": int((routing.indices[layer] == e).sum())
                for layer in range(L) for e in routing.indices[layer].unique() for p in ("gate", "up", "down")}  # fmt: skip
    assert fired == expected
    fired.clear()
    with expert_activations(model):
        model(IDS)
    assert fired == expected


def run_all_kinds_of_hooks(model: Any, tapped: bool) -> tuple[dict[str, int], Tensor, dict[str, Tensor]]:
    """Calls of each kind of hook on expert 3 of layer 0, logits, gradients. Hooks replace inputs, outputs and gradients."""
    calls: dict[str, int] = {}
    expert = model.model.layers[0].mlp.experts[3]

    def counted(kind: str, result: Any = None) -> Any:
        def hook(module: nn.Module, *values: Any) -> Any:
            if module is expert:
                calls[kind] = calls.get(kind, 0) + 1
                return None if result is None else result(*values)

        return hook

    everywhere = torch.nn.modules.module
    handles = [
        expert.register_forward_pre_hook(counted("pre", lambda args: 1.5 * args[0])),
        expert.register_forward_pre_hook(counted("pre kwargs", lambda args, _: ((args[0] + 0.1,), {})), with_kwargs=True),
        expert.register_forward_hook(counted("forward", lambda args, out: out + 0.3 * args[0])),
        expert.register_forward_hook(counted("kwargs", lambda args, kwargs, out: 1.2 * out), with_kwargs=True),
        expert.register_full_backward_pre_hook(counted("backward pre", lambda grads: (2 * grads[0],))),
        expert.register_full_backward_hook(counted("backward", lambda grads, _: (3 * grads[0],))),
        everywhere.register_module_forward_pre_hook(counted("global pre", lambda args: (args[0] - 0.2,))),
        everywhere.register_module_forward_hook(counted("global", lambda args, out: out - 0.4)),
        everywhere.register_module_forward_hook(counted("global kwargs", lambda args, _, out: 1.1 * out), with_kwargs=True),
    ]
    try:
        model.zero_grad()
        with taps.record(model, "layers.*.mlp.expert_act" if tapped else "norm"):
            logits = model(IDS).logits
        logits.square().sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_hooks_on_an_expert_run_with_a_tap_as_without(model):
    """Each kind of hook once, in torch's order, with the same logits and gradients as by a call of the module."""
    model.unfuse_experts()
    calls, logits, gradients = run_all_kinds_of_hooks(model, tapped=False)
    assert len(calls) == 9 and set(calls.values()) == {1}
    tapped_calls, tapped_logits, tapped_gradients = run_all_kinds_of_hooks(model, tapped=True)
    assert tapped_calls == calls
    assert_close(tapped_logits, logits, 1e-12)
    assert_all_close(tapped_gradients, gradients, 1e-10)
    assert peer.relative_error(logits, model(IDS).logits) > 1e-3  # the hooks matter


def test_hooks_of_an_expert_see_patched_activations(model):
    """Of expert_act = 0 an expert's output is 0, and its forward hook sees that; the legacy backward hook runs."""
    model.unfuse_experts()
    expert, seen = model.model.layers[1].mlp.experts[0], []
    expert.register_forward_hook(lambda _module, _args, out: seen.append(out.detach()))
    expert.register_backward_hook(lambda _module, _inputs, grads: seen.append(grads[0]))
    with taps.patch(model, {"layers.1.mlp.expert_act": torch.zeros_like}):
        model(IDS).logits.sum().backward()
    assert len(seen) == 2 and not seen[0].any() and seen[1].shape == seen[0].shape


@torch.no_grad()
def test_taps_on_experts_that_are_no_plain_mlps(model):
    """Experts in a dtype of their own run in it; a forward of one's own, which a tap cannot look into, is refused."""
    model.unfuse_experts()
    experts = model.model.layers[0].mlp.experts
    experts[1].float()
    plain = model(IDS).logits
    with expert_activations(model):
        assert_close(model(IDS).logits, plain, 1e-12)

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    for broken in (Own(), copy.deepcopy(experts[1])):
        if not isinstance(broken, Own):
            broken.forward = lambda x: 2 * x
        for expert in range(E):
            experts[expert] = broken
        assert model(IDS).logits.isfinite().all()
        with pytest.raises(ValueError, match="in place of an expert has a forward of its own.*tap mlp.routed"):
            with expert_activations(model):
                model(IDS)


def test_training_one_trains_the_other(model):
    grouped = model.model.layers[0].mlp.experts.gate_up_proj
    before = grouped.detach().clone()
    model.unfuse_experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    gradient = model.model.layers[0].mlp.experts[2].up_proj.weight.grad
    optimizer.step()
    inner = before.shape[1] // 2
    assert gradient.any()
    assert_close(grouped[2, inner:] - before[2, inner:], -0.1 * gradient, 1e-12)
    with torch.no_grad():
        grouped.zero_()
    assert not model.model.layers[0].mlp.experts[2].up_proj.weight.any()


@pytest.mark.parametrize("layout", ["grouped", "per_expert"])
def test_saving_unfused_experts_writes_the_same_checkpoint(model, tmp_path: Path, layout):
    model.save_pretrained(tmp_path / "fused", layout=layout)
    model.unfuse_experts()
    model.save_pretrained(tmp_path / "unfused", layout=layout)
    assert isinstance(model.model.layers[0].mlp.experts, UnfusedExperts)
    a, b = (load_file(tmp_path / which / "model.safetensors") for which in ("fused", "unfused"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    config = [(tmp_path / which / "config.json").read_text() for which in ("fused", "unfused")]
    assert config[0] == config[1]
    again = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "unfused")
    with torch.no_grad():
        assert_close(again(IDS).logits, model(IDS).logits, 1e-12)


@torch.no_grad()
def test_moving_and_copying_the_weights(model):
    """.to(dtype) keeps the views; deepcopy and load_state_dict(assign=True) separate them, and fusing takes the new values."""
    model.unfuse_experts()
    twin = copy.deepcopy(model)
    model.to(torch.float32)
    one = model.model.layers[1].mlp.experts
    fused = one.grouped()
    assert fused.down_proj.dtype == torch.float32
    assert all(e.down_proj.weight.data_ptr() == fused.down_proj[i].data_ptr() for i, e in enumerate(one))
    state = {name: value + 0.25 if ".experts." in name else value for name, value in twin.state_dict().items()}
    expected = twin.model.layers[1].mlp.experts[3].up_proj.weight + 0.25
    twin.load_state_dict(state, assign=True)
    logits = twin(IDS).logits
    twin.fuse_experts()
    assert torch.equal(twin.model.layers[1].mlp.experts.gate_up_proj[3].chunk(2)[1], expected)
    assert_close(twin(IDS).logits, logits, 1e-12)


class Adapted(nn.Module):
    """A Linear with an adapter, as adapter libraries make it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features, dtype=base.weight.dtype) * 0.1)
        self.b = nn.Parameter(torch.randn(base.out_features, rank, dtype=base.weight.dtype) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.a.T @ self.b.T


def test_an_adapter_on_every_linear_of_an_expert(model, tmp_path: Path):
    """The adapter gets gradients, the base does not; fusing and saving raise until the adapter is merged."""
    plain = model(IDS).logits.detach()
    model.unfuse_experts()
    names = [name for name in linears(model) if name.endswith("down_proj")]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Adapted(model.get_submodule(name)))
    out = model(IDS, labels=IDS)
    out.loss.backward()
    assert not torch.allclose(out.logits, plain)
    assert any(model.get_submodule(name).b.grad is not None for name in names)
    assert all(model.get_submodule(name).base_layer.weight.grad is None for name in names)
    for refused in (model.fuse_experts, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="Adapted: merge or remove"):
            refused()
    for name in names:
        adapted = model.get_submodule(name)
        with torch.no_grad():
            adapted.base_layer.weight += adapted.b @ adapted.a
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapted.base_layer)
    model.fuse_experts()
    assert isinstance(model.model.layers[0].mlp.experts, Experts)
    assert_close(model(IDS).logits, out.logits, 1e-12)
    assert not model.model.layers[0].mlp.experts.down_proj.requires_grad


@torch.no_grad()
def test_a_forced_form_is_not_silently_ignored(model):
    model.unfuse_experts()
    model.use_backends(experts="loop")
    with pytest.raises(ValueError, match="'loop' cannot run experts: they are unfused.*fuse_experts"):
        model(IDS)
    model.fuse_experts()
    with backends.ran() as ran:
        model(IDS)
    assert ran.counts["experts", "loop"] == L


@torch.no_grad()
def test_unfused_experts_generate_and_recompute(model):
    model.to(torch.float32)
    expected = model.generate(IDS[:1], max_new_tokens=6, eos_token_id=[])
    model.unfuse_experts()
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=6, eos_token_id=[]), expected)
    with torch.enable_grad():
        gradients = peer.gradients_with_and_without_checkpointing(model, lambda: model(IDS, labels=IDS).loss.backward())
    assert all(torch.equal(gradients[0][name], value) for name, value in gradients[1].items())
