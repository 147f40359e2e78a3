"""The implementation of every operation that runs on a CPU, chosen automatically and by name."""

from __future__ import annotations

import pytest
import torch

from qwen35moe import Config, Qwen3_5MoeForConditionalGeneration, backends
from qwen35moe.backends import OPERATIONS

# operation -> the implementations that run on a CPU without gradients and with them
ON_A_CPU = {
    "rms_norm": ("cpu", "torch"),
    "gated_rms_norm": ("cpu", "cpu"),
    "linear": ("torch", "torch"),  # the others are for large weights
    "rotary": ("torch", "torch"),  # `cpu` is for more than 64 tokens
    "attention": ("torch", "torch"),
    "vision_attention": ("torch", "torch"),
    "gelu_linear": ("torch", "torch"),
    "short_convolution": ("cpu", "cpu"),
    "gated_delta_rule": ("chunked_cpu", "torch"),
    "router": ("torch", "torch"),
    "experts": ("gathered", "gathered"),  # few small experts, whose weights are cheap to copy
    "linear_cross_entropy": ("torch", "torch"),
}

# The modules compose these on a CPU.
FUSED = ("add_rms_norm", "projections", "norm_rotary", "sigmoid_gate", "swiglu", "add_shared_expert")


def model() -> Qwen3_5MoeForConditionalGeneration:
    text = dict(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], head_dim=16,
        num_attention_heads=6, num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=12, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=10,
        shared_expert_intermediate_size=14, model_type="qwen3_5_moe_text",
    )
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=20, num_heads=2, patch_size=2, out_hidden_size=24, num_position_embeddings=9
    )
    config = Config.from_dict(
        dict(
            model_type="qwen3_5_moe", text_config=text, vision_config=vision, image_token_id=57, video_token_id=58,
            vision_start_token_id=55, vision_end_token_id=56, tie_word_embeddings=False,
        )
    )
    return Qwen3_5MoeForConditionalGeneration(config).init_weights(seed=3)


@pytest.mark.parametrize("training", [False, True])
def test_the_automatic_choice_in_every_layer(training: bool) -> None:
    """All operations of a forward with an image; `delta_net_step` runs for cached tokens only, FUSED on a GPU."""
    ids = torch.tensor([[1, 55, 57, 57, 56, *range(2, 40)]])
    with backends.ran() as ran, torch.set_grad_enabled(training):
        model()(
            ids, pixel_values=torch.randn(8, 24), image_grid_thw=torch.tensor([[1, 2, 4]]), labels=ids, output_logits=False
        )
    ran_on: dict[str, set[str]] = {}
    for operation, name in ran.counts:
        ran_on.setdefault(operation, set()).add(name)
    assert ran_on == {operation: {names[training]} for operation, names in ON_A_CPU.items()}
    assert set(OPERATIONS) - set(ran_on) == {"delta_net_step", *FUSED}


def test_a_cached_token_runs_the_decode_step() -> None:
    network = model()
    cache = network.new_cache(1)
    with torch.no_grad():
        network(torch.tensor([[1, 2, 3]]), cache=cache)
        with backends.ran() as ran:
            network(torch.tensor([[4]]), cache=cache)
    assert ran.counts["delta_net_step", "fused_cpu"] == 1
    assert not {"gated_delta_rule", "short_convolution", "gated_rms_norm"} & {operation for operation, _ in ran.counts}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_chosen_implementation_runs_or_is_an_error_with_the_reason(operation: str) -> None:
    _, cases = backends.cases(operation)
    args, options = next(iter(cases(torch.float32, "cpu", torch.Generator().manual_seed(0))))
    for entry in backends.implementations(operation):
        with backends.use(**{operation: entry.name}), backends.ran() as ran, torch.no_grad():
            reason = entry.refusal(args, options)
            if reason is None:
                backends.run(operation, *args, **options)
                assert ran.counts[operation, entry.name] == 1 and {name for name, _ in ran.counts} <= {operation, "linear"}
            else:
                with pytest.raises(ValueError, match="cannot run") as error:
                    backends.run(operation, *args, **options)
                assert reason in str(error.value) and not ran.counts
