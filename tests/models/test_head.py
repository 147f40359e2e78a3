"""models/head.py: logits and loss go through the head, whatever is attached to it and whatever its dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qwen35moe import Qwen3_5MoeForCausalLM
from qwen35moe.models.head import _TOKENS_AT_ONCE, is_plain_linear
from tests.models.test_model import small
from tests.support.peer import assert_close

IDS = torch.randint(0, 59, (2, 17), generator=torch.Generator().manual_seed(0))


def build() -> Any:
    return Qwen3_5MoeForCausalLM(small()).init_weights(seed=3).eval()


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def with_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, output: 1.5 * output + 0.1 * output.square())


def with_pre_hook(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def with_parametrization(model: Any) -> None:
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())


def with_bias(model: Any) -> None:
    head = nn.Linear(24, 59)
    head.weight.data.copy_(model.lm_head.weight)
    model.lm_head = head


def with_subclass(model: Any) -> None:
    head = Scaled(24, 59, bias=False)
    head.weight.data.copy_(model.lm_head.weight)
    model.lm_head = head


def with_wrapper(model: Any) -> None:
    """As FSDP and torch.compile wrap a module."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return (3 * self.inner(x)).tanh()

    model.lm_head = Wrapper(model.lm_head)


def with_own_forward(model: Any) -> None:
    """As accelerate's hooks replace the forward of an instance."""
    old = model.lm_head.forward
    model.lm_head.forward = lambda x: (3 * old(x)).tanh()


def with_lora(model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False), model)


def with_modules_to_save(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.mul_(2)


ATTACHED = [
    with_hook, with_pre_hook, with_parametrization, with_bias, with_subclass, with_wrapper, with_own_forward, with_lora,
    with_modules_to_save,
]


@pytest.mark.parametrize("attach", ATTACHED, ids=lambda function: function.__name__)
def test_the_loss_is_that_of_the_logits(attach: Callable[[Any], None]) -> None:
    """With output_logits=False and logits_to_keep too; all parameters of the head get the gradient of the logits' loss."""
    model = build()
    plain = F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()
    attach(model)
    expected = F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert abs(expected.item() - plain) > 1e-4
    head = [parameter for parameter in model.lm_head.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(expected, head)
    for options in ({}, {"output_logits": False}, {"logits_to_keep": 1}, {"logits_to_keep": torch.tensor([2])}):
        loss = model(IDS, labels=IDS, **options).loss
        assert_close(loss, expected, 1e-6)
        for actual, wanted in zip(torch.autograd.grad(loss, head), gradients, strict=True):
            assert_close(actual, wanted, 1e-5)
    count = 5.0
    for options in ({}, {"output_logits": False}):
        assert_close(model(IDS, labels=IDS, num_items_in_batch=count, **options).loss, expected * 32 / count, 1e-6)


def test_a_plain_head_keeps_the_fast_form(calls: Any) -> None:
    from qwen35moe import ops

    model = build()
    assert is_plain_linear(model.lm_head)
    with calls(ops.linear_cross_entropy, "choose") as chosen, torch.no_grad():
        model(IDS, labels=IDS, output_logits=False)
    assert chosen.count == 1
    with_hook(model)
    with calls(ops.linear_cross_entropy, "choose") as chosen, torch.no_grad():
        model(IDS, labels=IDS, output_logits=False)
    assert chosen.count == 0 and not is_plain_linear(model.lm_head)


def test_blocks_of_tokens_add_up() -> None:
    """More tokens than one block; the mean counts the labels of all blocks, and dropout of an adapter is recomputed."""
    model, ids = build(), torch.randint(0, 59, (1, _TOKENS_AT_ONCE + 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 5:100] = -100
    with_bias(model)
    one, other = (model(ids, labels=labels, output_logits=value).loss for value in (True, False))
    assert_close(other, one, 1e-6)
    for value, wanted in zip(*(torch.autograd.grad(x, list(model.lm_head.parameters())) for x in (other, one)), strict=True):
        assert_close(value, wanted, 1e-5)


@pytest.mark.parametrize("part", ["head", "embedding", "both", "tied"])
def test_a_float32_head_or_embedding_over_a_bfloat16_body(part: str) -> None:
    """The head computes in float32 from the body's bfloat16 states; the embedding is rounded to the body's dtype."""
    model = Qwen3_5MoeForCausalLM(small(tie_word_embeddings=part == "tied")).init_weights(seed=3).eval().bfloat16()
    reference = copy.deepcopy(model)
    if part in ("head", "both"):
        model.lm_head.float()
    if part in ("embedding", "both", "tied"):
        model.model.embed_tokens.float()
        model.tie_weights()
    assert model.dtype == model.model.dtype == torch.bfloat16
    with torch.no_grad():
        out = model(IDS, labels=IDS, output_hidden_states=True)
        expected = reference(IDS, output_hidden_states=True)
        assert torch.equal(out.hidden_states[-1], expected.hidden_states[-1])  # float32 copies of bfloat16 weights
        wide = part in ("head", "both", "tied")
        assert out.logits.dtype == (torch.float32 if wide else torch.bfloat16)
        if wide:
            assert torch.equal(out.logits, F.linear(out.hidden_states[-1].float(), reference.lm_head.weight.float()))
        for options in ({"output_logits": False}, {"logits_to_keep": 2}):
            assert_close(model(IDS, labels=IDS, **options).loss, out.loss, 1e-5 if wide else 1e-3)
        assert model.generate(IDS, max_new_tokens=2, pad_token_id=0).shape == (2, 19)
        cached = model(IDS[:, -1:], cache=model(IDS[:, :-1], use_cache=True).cache).logits[:, -1]
        assert_close(cached.float(), out.logits[:, -1].float(), 3e-2)


def test_a_bfloat16_head_over_a_float32_body() -> None:
    model = build()
    model.lm_head.bfloat16()
    with torch.no_grad():
        out = model(IDS, labels=IDS, output_hidden_states=True)
        assert_close(out.logits, F.linear(out.hidden_states[-1], model.lm_head.weight.float()), 1e-6)
        assert_close(model(IDS, labels=IDS, output_logits=False).loss, out.loss, 1e-6)


# ------------------------------------------------------------------------------------------------------------------ hooks


def test_hooks_run_in_every_form_of_a_call() -> None:
    """Hooks of every module see each call: with labels, without logits, cached, of the text and of the multimodal class."""
    from tests.models.test_vision_language import model as multimodal
    from tests.models.test_vision_language import row

    text, whole = build(), copy.deepcopy(multimodal())
    for model, inputs, names in (
        (text, {"input_ids": IDS}, ("model", "model.embed_tokens", "lm_head", "model.norm")),
        (whole, row(0), ("model", "model.language_model", "model.visual", "model.language_model.embed_tokens", "lm_head")),
    ):
        seen: list[str] = []
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda *_, name=name, seen=seen: seen.append(name))
        ids = inputs["input_ids"]
        cache = model.new_cache(len(ids))
        with torch.no_grad():
            for options in ({}, {"labels": ids, "output_logits": False}, {"logits_to_keep": 1}, {"cache": cache}):
                seen.clear()
                model(**inputs, **options)
                assert set(seen) == set(names), options
            seen.clear()
            model(ids[:, -1:], cache=cache)
            assert set(seen) == set(names) - {"model.visual"}


def test_a_hook_changes_the_arguments_and_the_output_of_the_model_inside() -> None:
    """By name, as in transformers: another mask is planned anew, embeddings replace ids, and the head reads a new output."""
    model, mask = build(), torch.tensor([[0] * 3 + [1] * 14, [1] * 17])
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
        handle = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
        )
        assert torch.equal(model(IDS).logits, expected)
        handle.remove()
        embeds = model.get_input_embeddings()(IDS)
        handle = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {"inputs_embeds": 2 * embeds}), with_kwargs=True
        )
        assert torch.equal(model(IDS).logits, build()(inputs_embeds=2 * embeds).logits)
        handle.remove()

        def zeros(module: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = torch.zeros_like(output.last_hidden_state)
            return output

        model.model.register_forward_hook(zeros)
        assert not model(IDS).logits.any() and model(IDS, labels=IDS, output_logits=False).loss.item() > 4
        model.model.register_forward_hook(lambda module, args, output: (output[0] + 1,))
        assert model(IDS).logits.any()


def test_an_assigned_loss_function_is_called() -> None:
    """As in transformers, with logits, labels and vocab_size; of packed documents also with the labels shifted within them."""
    model, seen = build(), {}

    def doubled(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
        seen.update(options, labels=labels)
        targets = options.get("shift_labels", F.pad(labels[:, 1:], (0, 1), value=-100))
        return 2 * F.cross_entropy(logits.view(-1, vocab_size), targets.view(-1))

    with torch.no_grad():
        expected = model(IDS, labels=IDS).loss
        packed = model(IDS[:1], labels=IDS[:1], cu_seqlens=torch.tensor([0, 5, 17])).loss
        model.loss_function = doubled
        for options in ({}, {"output_logits": False}, {"logits_to_keep": 3}):
            assert_close(model(IDS, labels=IDS, num_items_in_batch=7, **options).loss, 2 * expected, 1e-6)
        assert seen["num_items_in_batch"] == 7 and torch.equal(seen["labels"], IDS) and "shift_labels" not in seen
        assert_close(model(IDS[:1], labels=IDS[:1], cu_seqlens=torch.tensor([0, 5, 17])).loss, 2 * packed, 1e-6)


@pytest.mark.parametrize("number", [-3, float("nan"), True, "16", torch.tensor([8, 8]), torch.tensor(-1.0)], ids=repr)
def test_a_wrong_number_of_labels_is_refused(number: Any) -> None:
    with pytest.raises(ValueError, match="must be one number of labels >= 0"):
        build()(IDS, labels=IDS, num_items_in_batch=number)


@pytest.mark.parametrize("number", [32, 32.0, torch.tensor(32), torch.tensor([32.0])], ids=repr)
def test_a_number_of_labels_divides_their_sum(number: Any) -> None:
    model = build()
    assert_close(model(IDS, labels=IDS, num_items_in_batch=number).loss.squeeze(), model(IDS, labels=IDS).loss, 1e-6)
