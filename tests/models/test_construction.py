"""A model from its constructor: every parameter drawn, whatever torch's defaults and modes are; and modules drawn again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from qwen35moe import (
    Config,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeVisionModel,
)
from qwen35moe.checkpoint.tiny import tiny_config
from qwen35moe.modules.gated_deltanet import GatedDeltaNet
from qwen35moe.modules.moe import MLP, SparseMoeBlock
from tests.support.floors import ROOT

FP32 = ("A_log", "dt_bias", "linear_attn.norm.weight")
IDS = torch.randint(0, 200, (2, 19), generator=torch.Generator().manual_seed(0))


def config(**options):
    return tiny_config(**options, changes={"initializer_range": 0.03, "num_hidden_layers": 4, "full_attention_interval": 2})


def expected_std(name: str, model) -> float | None:
    """The standard deviation that the constructor promises for a parameter; None: not a normal distribution."""
    if name.endswith(("bias", "A_log", "conv1d.weight")) or "norm" in name:
        return None
    return model.config.vision_config.initializer_range if "visual." in name else 0.03


@pytest.mark.parametrize("cls, options", [
    (Qwen3_5MoeForCausalLM, {}), (Qwen3_5ForCausalLM, {"dense": True}), (Qwen3_5MoeForConditionalGeneration, {"vision": True}),
])  # fmt: skip
def test_the_constructor_draws_every_parameter_from_its_distribution(cls, options):
    model = cls(config(**options))
    for name, parameter in model.named_parameters():
        value, std = parameter.detach(), expected_std(name, model)
        if std is not None:  # of n normal numbers, the standard deviation is within 5 / sqrt(2 n), relative
            assert abs(value.std() / std - 1) < 5 / (2 * value.numel()) ** 0.5, name
            assert abs(value.mean()) < 5 * std / value.numel() ** 0.5, name
        elif name.endswith("conv1d.weight"):
            assert value.abs().max() <= 0.5 and value.std() > 0.2, name
        elif name.endswith("A_log"):
            assert value.exp().min() >= 1 and value.exp().max() <= 16 + 1e-4, name
        elif name.endswith("dt_bias"):
            step = nn.functional.softplus(value)
            assert step.min() >= 1e-3 * (1 - 1e-4) and step.max() <= 0.1 + 1e-6, name
        elif name.endswith("bias"):
            assert not value.any(), name
        else:  # RMSNorm multiplies by 1 + weight, the others by weight
            one = "visual." in name or name.endswith("linear_attn.norm.weight")
            assert torch.equal(value, torch.full_like(value, float(one))), name


def test_every_parameter_of_a_new_model_gets_a_gradient():
    model = Qwen3_5MoeForCausalLM(config(experts=4, top_k=3))
    model(IDS, labels=IDS, output_router_logits=True).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_model_is_a_function_of_the_global_seed():
    def made(seed):
        torch.manual_seed(seed)
        return Qwen3_5MoeForCausalLM(config()).state_dict()

    one, same, other = made(3), made(3), made(4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not [n for n in one if "norm" not in n and torch.equal(one[n], other[n])]


def test_a_tied_head_is_the_embedding():
    model = Qwen3_5MoeForCausalLM(config().replace(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert abs(model.lm_head.weight.std() / 0.03 - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_kept_in_float32_do_not_depend_on_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)  # conftest restores it
    model = Qwen3_5MoeForConditionalGeneration(config(vision=True))
    fp32 = torch.promote_types(torch.float32, dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (fp32 if name.endswith(FP32) and "visual." not in name else dtype), name
        assert parameter.isfinite().all(), name
    seeded = {name: value.clone() for name, value in model.init_weights(seed=5).state_dict().items()}
    torch.set_default_dtype(torch.float32)
    other = Qwen3_5MoeForConditionalGeneration(config(vision=True)).init_weights(seed=5).state_dict()
    assert all(torch.equal(seeded[name], other[name].to(seeded[name].dtype)) for name in seeded)


def test_a_default_device_or_a_device_context_is_where_the_parameters_are():
    with torch.device("meta"):
        inside = Qwen3_5MoeForCausalLM(config())
    torch.set_default_device("meta")
    try:
        default = Qwen3_5MoeForCausalLM(config())
        with torch.device("cpu"):
            on_cpu = Qwen3_5MoeForCausalLM(config())
        on_cpu.init_weights(seed=2)  # draws on the CPU, whatever the default device is
    finally:
        torch.set_default_device(None)
    assert all(p.is_meta for model in (inside, default) for p in model.parameters())
    wanted = Qwen3_5MoeForCausalLM(config()).init_weights(seed=2).state_dict()
    emptied = inside.to_empty(device="cpu").init_weights(seed=2).state_dict()
    assert all(torch.equal(emptied[name], wanted[name]) for name in wanted)
    assert all(torch.equal(on_cpu.state_dict()[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "autocast"])
def test_a_model_made_inside_a_mode_is_the_same_and_trains_outside(mode):
    torch.manual_seed(7)
    plain = Qwen3_5MoeForCausalLM(config())
    torch.manual_seed(7)
    modes = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}
    with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else modes[mode]():
        model = Qwen3_5MoeForCausalLM(config())
        tied = Qwen3_5MoeForCausalLM(config().replace(tie_word_embeddings=True))
        tower = Qwen3_5MoeVisionModel(config(vision=True))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    for parameter in (*model.parameters(), *tied.parameters(), *tower.parameters()):
        assert parameter.requires_grad and not parameter.is_inference() and parameter.dtype == torch.float32
    model(IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad.any()


def test_a_replaced_module_is_initialised_and_can_be_drawn_again():
    model, text = Qwen3_5MoeForCausalLM(config()), config().text_config
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mixer = model.model.layers[0].linear_attn = GatedDeltaNet(text)
    assert abs(mixer.in_proj_qkv.weight.std() / 0.03 - 1) < 0.1 and mixer.conv1d.weight.any() and mixer.A_log.all()
    block = SparseMoeBlock(text, 1)
    assert abs(block.shared_expert.up_proj.weight.std() / 0.03 - 1) < 0.1 and block.gate.weight.any()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(9)
    torch.manual_seed(1)
    mixer.reset_parameters()
    drawn = {name: value.clone() for name, value in mixer.state_dict().items()}
    assert not [name for name, value in drawn.items() if (value == 9).any()]
    assert abs(drawn["out_proj.weight"].std() / 0.03 - 1) < 0.1
    torch.manual_seed(1)
    mixer.reset_parameters()
    assert all(torch.equal(value, drawn[name]) for name, value in mixer.state_dict().items())
    rest = {name: value for name, value in model.state_dict().items() if "layers.0.linear_attn" not in name}
    assert all(torch.equal(value, before[name]) for name, value in rest.items())


def test_every_module_can_be_drawn_again_in_its_own_distribution():
    """Also the vision tower, blocks with norms of torch, and experts that are unfused."""
    model = Qwen3_5MoeForConditionalGeneration(config(vision=True))
    model.unfuse_experts()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9)
    for module in (model.model.language_model.layers, model.model.visual.blocks):
        for block in module:
            block.reset_parameters()
            assert not [name for name, p in block.named_parameters() if (p == 9).any()]
    expert = model.model.language_model.layers[1].mlp.experts[2].gate_proj.weight
    assert abs(expert.std() / 0.03 - 1) < 0.1
    model.reset_parameters()
    assert not [name for name, p in model.named_parameters() if (p == 9).any()]


class _Gain(MLP):
    """An MLP of a researcher with a parameter of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, inner)
        self.gain = nn.Parameter(torch.full((inner,), 3.0))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.uniform_(self.gain, 0.5, 1.5)


class _WithHead(Qwen3_5MoeForCausalLM):
    """A model of a researcher: what it adds after super().__init__ keeps the values given there."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.value_head = nn.Linear(config.text_config.hidden_size, 1)
        nn.init.constant_(self.value_head.weight, 0.25)
        self.model.layers[0].mlp.shared_expert = _Gain(config.text_config.hidden_size, 56)


def test_a_subclass_keeps_what_it_sets_and_its_reset_parameters_is_used():
    model = _WithHead(config())
    assert torch.equal(model.value_head.weight, torch.full((1, 64), 0.25))
    gain = model.model.layers[0].mlp.shared_expert.gain
    assert torch.equal(gain, torch.full((56,), 3.0))
    state = torch.get_rng_state()
    one = {name: value.clone() for name, value in model.init_weights(seed=4).state_dict().items()}
    assert torch.equal(torch.get_rng_state(), state), "init_weights(seed) leaves torch's generator alone"
    assert 0.5 <= gain.min() < gain.max() <= 1.5
    torch.manual_seed(11)
    two = _WithHead(config()).init_weights(seed=4).state_dict()
    assert all(torch.equal(value, one[name]) for name, value in two.items())


def test_building_on_the_meta_device_for_the_loader_imports_nothing_slow():
    """torch.nn.init on meta tensors, and even zero_(), import sympy: seconds."""
    program = (
        "import sys; from qwen35moe import Qwen3_5MoeForConditionalGeneration as C; "
        "from qwen35moe.loading import find; "
        "C.from_pretrained(find('tiny'), device='meta'); C.from_pretrained(find('tiny')); "
        "print([m for m in ('sympy', 'torch._dynamo', 'torch._inductor') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "[]"


def test_print_shows_the_sizes_of_every_module_with_parameters():
    model = Qwen3_5MoeForConditionalGeneration(config(vision=True))
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            assert module.extra_repr(), name
    text = repr(model)
    assert "Experts(num_experts=8, hidden_size=64, intermediate_size=48)" in text
    assert "Router(num_experts=8, hidden_size=64, top_k=2)" in text
    assert "ShortConvolution(channels=176, taps=4)" in text
    assert "key_heads=2 of 16, value_heads=4 of 28" in text and "heads=4, key_value_heads=2, head_dim=40" in text
    assert "RMSNorm(64, eps=1e-06)" in text
