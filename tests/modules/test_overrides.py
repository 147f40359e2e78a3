"""Whatever replaces or watches a part of a layer is seen by every form: prefill, cached steps, static cache, packed, compiled.

Each case changes a model in one way. The definition is the whole sequence in one forward; token by token, by chunks, with a
growing and a static cache and packed with another document it must give the same logits, and others than the unchanged model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize

from qwen35moe import backends, ops
from qwen35moe.modules.gated_deltanet import GatedDeltaNet, ShortConvolution
from qwen35moe.modules.moe import MLP, Router
from qwen35moe.modules.norm import GatedRMSNorm, RMSNorm
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape, relative_error

CASE = odd_shape(
    8, layer_types=[LINEAR, FULL], num_hidden_layers=2, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=5,
    num_experts_per_tok=2,
)
EXACT = 1e-11  # of float64
B, T = 2, 7
IDS = CASE.ids(B, T)


@pytest.fixture(scope="module")
def plain() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 0)
    return model.double()


@pytest.fixture
def model(plain: Any) -> Any:
    return copy.deepcopy(plain)


def module(model: Any, name: str) -> Any:
    return model.model.get_submodule(name)


# The parts of the two layers that a forward calls.
PARTS = (
    "layers.0.linear_attn", "layers.0.linear_attn.in_proj_qkv", "layers.0.linear_attn.in_proj_z",
    "layers.0.linear_attn.in_proj_a", "layers.0.linear_attn.in_proj_b", "layers.0.linear_attn.conv1d",
    "layers.0.linear_attn.norm", "layers.0.linear_attn.out_proj", "layers.1.self_attn", "layers.1.self_attn.q_proj",
    "layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj", "layers.1.self_attn.o_proj", "layers.1.self_attn.q_norm",
    "layers.1.self_attn.k_norm", "layers.0.mlp", "layers.0.mlp.gate", "layers.0.mlp.experts", "layers.0.mlp.shared_expert",
    "layers.0.mlp.shared_expert.gate_proj", "layers.0.mlp.shared_expert.down_proj", "layers.0.mlp.shared_expert_gate",
    "layers.0.input_layernorm", "layers.1.post_attention_layernorm", "layers.0", "norm", "embed_tokens",
)


@torch.no_grad()
def forms(model: Any) -> dict[str, Tensor]:
    """Logits [B, T, vocabulary] of IDS in every form but the first, the whole forward."""

    def in_parts(parts: list[int], cache: Any) -> Tensor:
        return torch.cat([model(part, cache=cache).logits for part in IDS.split(parts, dim=1)], dim=1)

    packed = model(IDS.reshape(1, -1), cu_seqlens=torch.tensor([0, T, 2 * T])).logits.view(B, T, -1)
    padded, mask = torch.cat([IDS[:, :3], IDS], dim=1), torch.tensor([[0] * 3 + [1] * T] * B)
    return {
        "tokens, growing": in_parts([1] * T, model.new_cache(B)),
        "tokens, static": in_parts([1] * T, model.new_cache(B, T + 2)),
        "chunks, recording": in_parts([3, 1, 2, 1], model.new_cache(B, record=2)),
        "packed": packed,
        "left padding": model(padded, attention_mask=mask).logits[:, 3:],
    }


def assert_seen(model: Any, plain: Any) -> None:
    """The model differs from the unchanged one, equally in every form."""
    with torch.no_grad():
        whole, unchanged = model(IDS).logits, plain(IDS).logits
    assert relative_error(whole, unchanged) > 1e-3, "the change must matter"
    for form, logits in forms(model).items():
        assert_close(logits, whole, EXACT, form)


# ------------------------------------------------------------------------------------------------------------- hooks


def scaled(output: Any) -> Any:
    """The first tensor of a module's output, times 1.25 and shifted."""
    if isinstance(output, Tensor):
        return 1.25 * output + 0.2
    return (1.25 * output[0] + 0.2, *output[1:])


@pytest.mark.parametrize("name", PARTS)
def test_a_forward_hook(model, plain, name):
    if name == "layers.0.mlp.gate":  # (logits, weights, indices)
        module(model, name).register_forward_hook(lambda m, args, out: (out[0], out[1].flip(-1), out[2]))
    else:
        module(model, name).register_forward_hook(lambda m, args, out: scaled(out))
    assert_seen(model, plain)


@pytest.mark.parametrize("name", ["layers.0.linear_attn.conv1d", "layers.0.linear_attn.norm", "layers.0.mlp.shared_expert"])
def test_a_forward_pre_hook_and_a_forward_of_the_instance(model, plain, name):
    part = module(model, name)
    handle = part.register_forward_pre_hook(lambda m, args: (1.0 + 1.5 * args[0], *args[1:]))
    assert_seen(model, plain)
    handle.remove()
    original = part.forward
    part.forward = lambda *args: scaled(original(*args))
    assert_seen(model, plain)


@torch.no_grad()
def test_global_hooks_see_every_module_in_every_form(model):
    """Each call of a form passes every module as often as the whole forward does."""

    def called(run: Callable[[], Any]) -> set[str]:
        names = {id(m): name for name, m in model.named_modules()}
        before: list[str] = []
        after: list[str] = []
        handles = [register_module_forward_pre_hook(lambda m, args: before.append(names.get(id(m), ""))),
                   register_module_forward_hook(lambda m, args, out: after.append(names.get(id(m), "")))]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        assert sorted(before) == sorted(after)
        return set(after)

    whole = called(lambda: model(IDS))
    assert {"model.layers.0.linear_attn.conv1d", "model.layers.0.linear_attn.norm", "lm_head"} <= whole
    for cache in (model.new_cache(B), model.new_cache(B, T + 1), model.new_cache(B, record=1)):
        model(IDS, cache=cache)
        assert called(lambda cache=cache: model(IDS[:, :1], cache=cache)) == whole


def test_hooks_of_the_backward_run_under_checkpointing_too(model):
    for checkpointing in (False, True):
        one = copy.deepcopy(model).train()
        if checkpointing:
            one.gradient_checkpointing_enable()
        seen: list[str] = []
        for name in PARTS:
            if name not in ("embed_tokens", "layers.0", "layers.1.self_attn", "layers.0.linear_attn"):
                module(one, name).register_full_backward_hook(lambda m, i, o, name=name, seen=seen: seen.append(name))
        one(IDS, labels=IDS).loss.backward()
        assert {name.rsplit(".", 1)[-1] for name in seen} >= {"conv1d", "norm", "q_proj", "shared_expert", "input_layernorm"}


# ------------------------------------------------------------------------------------------------- methods and replacements


class ScaledGates(GatedDeltaNet):
    def _gates(self, a: Tensor, b: Tensor, layout: Any) -> tuple[Tensor, Tensor]:
        decay, beta = super()._gates(a, b, layout)
        return 0.3 * decay, 0.5 * beta


class SwappedHeads(GatedDeltaNet):
    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super()._heads(mixed)
        return key, query, value


class ForgetfulRule(GatedDeltaNet):
    """A rule of its own: plain linear attention with a decay, without the correction."""

    def delta_rule(self, query, key, value, decay, beta, state, cu_seqlens):
        if cu_seqlens is not None:
            bounds = cu_seqlens.tolist()
            parts = [self.delta_rule(*(x[:, s:e] for x in (query, key, value, decay, beta)),
                                     None if state is None else state[i : i + 1], None)
                     for i, (s, e) in enumerate(zip(bounds, bounds[1:], strict=False))]
            return torch.cat([out for out, _ in parts], 1), torch.cat([state for _, state in parts])
        repeats = value.shape[2] // key.shape[2]
        q, k = (F.normalize(x, dim=-1).repeat_interleave(repeats, 2) for x in (query, key))
        state = value.new_zeros(*value.shape[:1], value.shape[2], key.shape[3], value.shape[3]) if state is None else state
        out = []
        for t in range(value.shape[1]):
            state = state * decay[:, t].exp()[..., None, None] + torch.einsum(
                "bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * value[:, t])
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(out, 1), state


class OwnForward(GatedDeltaNet):
    def forward(self, x, context, state=None):
        out, after, weights = super().forward(x, context, state)
        return 1.5 * out, after, weights


@pytest.mark.parametrize("kind", [ScaledGates, SwappedHeads, ForgetfulRule, OwnForward])
def test_a_subclass_of_the_mixer(model, plain, kind):
    module(model, "layers.0.linear_attn").__class__ = kind
    assert_seen(model, plain)


@pytest.mark.parametrize("method", ["gates", "_gates", "_heads", "delta_rule"])
def test_a_method_of_the_instance(model, plain, method):
    mixer = module(model, "layers.0.linear_attn")
    original = getattr(mixer, method)
    mixer.__dict__[method] = lambda *args: (0.7 * (values := original(*args))[0] - 0.1, *values[1:])
    assert_seen(model, plain)


def test_gates_of_a_subclass_need_not_know_padding(model, plain):
    """A shorter row keeps the state of its last token."""

    class Gates(GatedDeltaNet):
        def _gates(self, a, b, layout):
            return -F.softplus(a.double()), b.double().sigmoid()

    module(model, "layers.0.linear_attn").__class__ = Gates
    assert_seen(model, plain)
    ids, mask = peer.padded([IDS[0], IDS[1, :4]], "right")
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, cache=model.new_cache(2)).cache
        alone = model(IDS[1:, :4], cache=model.new_cache(1)).cache
    assert_close(cache[0].recurrent_state[1:], alone[0].recurrent_state, EXACT)


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(1)
        self.A = nn.Parameter(torch.randn(2, base.in_features, generator=generator, dtype=torch.float64))
        self.B = nn.Parameter(0.3 * torch.randn(base.out_features, 2, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


class OddLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


LINEARS = [name for name in PARTS if name.endswith(("proj", "proj_qkv", "proj_z", "proj_a", "expert_gate"))]


@pytest.mark.parametrize("name", LINEARS)
def test_a_wrapper_around_a_projection(model, plain, name):
    parent, _, leaf = name.rpartition(".")
    setattr(module(model, parent), leaf, LoRA(module(model, name)))
    assert_seen(model, plain)


@pytest.mark.parametrize("name", ["layers.0.linear_attn.in_proj_z", "layers.1.self_attn.v_proj"])
def test_a_subclass_of_linear(model, plain, name):
    module(model, name).__class__ = OddLinear
    assert_seen(model, plain)


class OtherNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], 1 + self.weight, None, self.eps)


class SigmoidGate(GatedRMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * gate.sigmoid()


class OtherConvolution(ShortConvolution):
    def forward(self, x, state, lengths, cu_seqlens):
        mixed, state = super().forward(x, state, lengths, cu_seqlens)
        return mixed.tanh(), state


class SigmoidRouter(Router):
    def forward(self, hidden):
        logits = F.linear(hidden, self.weight)
        indices, weights = self.choose(logits)
        return logits, weights, indices

    def choose(self, logits):
        scores, indices = logits.sigmoid().topk(self.top_k, dim=-1)
        return indices, scores


class OtherMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class OwnExperts(nn.Module):
    """Three arguments: no tap."""

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return hidden * (indices * weights).sum(-1, keepdim=True)


@pytest.mark.parametrize("name,kind", [
    ("layers.0.input_layernorm", OtherNorm), ("layers.1.self_attn.q_norm", OtherNorm), ("norm", OtherNorm),
    ("layers.0.linear_attn.norm", SigmoidGate), ("layers.0.linear_attn.conv1d", OtherConvolution),
    ("layers.0.mlp.gate", SigmoidRouter), ("layers.0.mlp.shared_expert", OtherMLP),
], ids=lambda value: getattr(value, "__name__", value))
def test_a_subclass_of_a_part(model, plain, name, kind):
    module(model, name).__class__ = kind
    assert_seen(model, plain)


@pytest.mark.parametrize("name,new", [
    ("layers.0.mlp.experts", OwnExperts()), ("layers.0.mlp", nn.Identity()), ("layers.0.input_layernorm", nn.Identity()),
    ("layers.1.self_attn.k_norm", nn.Identity()), ("layers.0.mlp.shared_expert", nn.Identity()),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_another_module_in_a_place(model, plain, name, new):
    parent, _, leaf = name.rpartition(".")
    setattr(module(model, parent), leaf, new)
    assert_seen(model, plain)


# --------------------------------------------------------------------------------------------------- parametrizations


class Damped(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.6 * weight


@pytest.mark.parametrize("name,tensor", [
    ("layers.0.linear_attn", "A_log"), ("layers.0.linear_attn", "dt_bias"), ("layers.0.linear_attn.conv1d", "weight"),
    ("layers.0.linear_attn.norm", "weight"), ("layers.0.mlp.gate", "weight"), ("layers.0.mlp.experts", "gate_up_proj"),
    ("layers.1.self_attn.q_norm", "weight"), ("layers.1.self_attn.q_proj", "weight"), ("embed_tokens", "weight"),
], ids=str)
def test_a_parametrization(model, plain, name, tensor):
    parametrize.register_parametrization(module(model, name), tensor, Damped())
    assert_seen(model, plain)
    assert_seen(model.float().double(), plain)  # _apply of a parametrized module


@pytest.mark.parametrize("kind,method", [
    (ShortConvolution, "forward"), (GatedRMSNorm, "forward"), (RMSNorm, "forward"), (MLP, "forward"),
    (GatedDeltaNet, "gates"), (GatedDeltaNet, "_heads"), (torch.nn.Linear, "forward"),
], ids=lambda value: getattr(value, "__name__", value))  # fmt: skip
def test_a_method_assigned_to_the_class(plain, model, monkeypatch, kind, method):
    """As kernel libraries patch the classes of transformers: seen by all forms, and by the loss without logits."""
    with torch.no_grad():
        unchanged = model(IDS).logits
    written = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda *args, **options: scaled(written(*args, **options)))
    with torch.no_grad():
        whole = plain(IDS, labels=IDS)
        assert_close(plain(IDS, labels=IDS, output_logits=False).loss, whole.loss, EXACT, "loss")
    assert relative_error(whole.logits, unchanged) > 1e-3
    for form, logits in forms(plain).items():
        assert_close(logits, whole.logits, EXACT, form)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_in_both_of_its_forms(model, plain):
    for wrap in (torch.nn.utils.weight_norm, parametrizations.weight_norm):
        one = copy.deepcopy(model)
        for name in ("layers.0.linear_attn.in_proj_qkv", "layers.1.self_attn.o_proj"):
            part = wrap(module(one, name))
            with torch.no_grad():
                (part.weight_g if hasattr(part, "weight_g") else part.parametrizations.weight.original0).mul_(1.5)
        assert_seen(one, plain)


# ---------------------------------------------------------------------------------------------------------- operations

OWN = {
    "gated_delta_rule": lambda query, key, value, *, decay, beta, state=None, cu_seqlens=None: ops.gated_delta_rule.definition(
        query, key, value, decay=0.3 * decay, beta=beta, state=state, cu_seqlens=cu_seqlens),
    "short_convolution": lambda x, weight, *, state=None, lengths=None, cu_seqlens=None: ops.short_convolution.definition(
        x, 1.5 * weight, state=state, lengths=lengths, cu_seqlens=cu_seqlens),
    "gated_rms_norm": lambda x, gate, weight, *, eps: ops.gated_rms_norm.definition(x, gate.tanh(), weight, eps=eps),
    "rms_norm": lambda x, weight, *, eps: F.layer_norm(x, x.shape[-1:], 1 + weight, None, eps),
    "rotary": lambda query, key, cos, sin: (query, key),
    "router": lambda hidden, weight, *, top_k: ops.router.definition(-hidden, weight, top_k=top_k),
    "experts": lambda hidden, gate_up, down, indices, weights, *, tap=None: hidden * weights.sum(-1, keepdim=True),
}


@pytest.mark.parametrize("how", ["before", "use", "use_backends"])
@pytest.mark.parametrize("operation", OWN)
def test_a_registered_operation(model, plain, operation, how):
    """Taken by "auto", and chosen by name for the process or the model."""
    with torch.no_grad():
        unchanged = plain(IDS).logits
    first = backends.implementations(operation)[0].name if how == "before" else None
    backends.register(operation, "mine", OWN[operation], before=first)
    choice = backends.use(**{operation: "mine"}) if how == "use" else None
    try:
        if how == "use_backends":
            model.use_backends(**{operation: "mine"})
        with torch.no_grad():
            whole = model(IDS).logits
            assert relative_error(whole, unchanged) > 1e-3
            for form, logits in forms(model).items():
                assert_close(logits, whole, EXACT, form)
    finally:
        if choice is not None:
            choice.__exit__()
        backends.unregister(operation, "mine")
