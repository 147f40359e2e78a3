"""models/arguments.py and inputs.py: the signature of each forward, and every call checked once."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import (
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeModel,
    Qwen3_5MoeTextModel,
)
from qwen35moe.models import checks
from tests.models.test_vision_language import model, row

TOKENS = ["input_ids", "attention_mask", "position_ids", "inputs_embeds", "cache", "cu_seqlens"]
RESULTS = {"routing", "output_router_logits", "output_routing", "output_hidden_states", "output_attentions"}
HEAD = {"output_logits", "logits_to_keep"}
THEIRS = {"past_key_values", "use_cache", "cache_position", "return_dict", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
          "max_length_k", "seq_idx", "token_type_ids", "mm_token_type_ids"}
VISION = {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "mm_token_type_ids", "mm_encoder_outputs"}
SIGNATURES = [
    (Qwen3_5MoeTextModel, TOKENS, RESULTS),
    (Qwen3_5MoeForCausalLM, [*TOKENS, "labels", "num_items_in_batch"], RESULTS | HEAD),
    (Qwen3_5ForCausalLM, [*TOKENS, "labels", "num_items_in_batch"], RESULTS | HEAD),
    (Qwen3_5MoeModel, TOKENS, RESULTS | VISION),
    (Qwen3_5MoeForConditionalGeneration, [*TOKENS, "labels", "num_items_in_batch"], RESULTS | HEAD | VISION),
    (Qwen3_5ForConditionalGeneration, [*TOKENS, "labels", "num_items_in_batch"], RESULTS | HEAD | VISION),
]


@pytest.mark.parametrize("cls,positional,keywords", SIGNATURES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_signature_is_that_of_the_arguments(cls: Any, positional: list[str], keywords: set[str]) -> None:
    """Trainer and peft read it; every argument is described, and none is a catch-all."""
    own, *parameters = inspect.signature(cls.forward).parameters.values()
    assert own.name == "self"
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == keywords | THEIRS
    assert len(parameters) == len(positional) + len(keywords | THEIRS)
    defaults = {p.name: p.default for p in parameters}
    assert {name for name, default in defaults.items() if default is not None} <= RESULTS | HEAD
    assert all(name in cls.forward.__doc__ for name in defaults if "video" not in name)


@pytest.mark.parametrize("arguments,keywords,message", [
    ((), {"input_idz": None}, "has no keyword 'input_idz': did you mean 'input_ids'?"),
    ((None,), {"input_ids": None}, "got multiple values for argument 'input_ids'"),
    ((None,) * 9, {}, "takes from 1 to 9 positional arguments but 10 were given"),
], ids=["unknown", "twice", "too many"])  # fmt: skip
def test_no_argument_is_swallowed(arguments: tuple[Any, ...], keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as error:
        model()(*arguments, **keywords)
    words = str(error.value)
    assert words == f"Qwen3_5MoeForConditionalGeneration.forward() {message}"


CALLS: dict[str, dict[str, Tensor]] = {
    "text": {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[0, 1, 1]])},
    "images and video": row(0),
    "one token": {"input_ids": torch.tensor([[1]])},
}


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_a_call_is_checked_once(arguments: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, images and single tokens on the multimodal class; each check of an argument runs once."""
    runs: Counter[str] = Counter()

    def counted(name: str) -> Any:
        function = getattr(checks, name)
        return lambda *args, **options: runs.update([name]) or function(*args, **options)

    names = ["check_tokens", "_check_head", "_check_cache", "_new_mask", "plan_layout"]
    for name in names:
        monkeypatch.setattr(checks, name, counted(name))
    with torch.no_grad():
        model()(**arguments, cache=model().new_cache(1))
    assert runs == Counter(name for name in names if name != "_new_mask" or "attention_mask" in arguments)


@pytest.mark.parametrize("cls", [Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration], ids=["text", "multimodal"])
def test_text_compiles_into_one_graph(cls: Any) -> None:
    torch._dynamo.reset()
    made = model() if cls is Qwen3_5MoeForConditionalGeneration else cls(model().config.text_only()).init_weights()
    ids = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids, labels=ids).loss, made(ids, labels=ids).loss)
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_is_exported(strict: bool) -> None:
    made = Qwen3_5MoeForCausalLM(model().config.text_only()).init_weights().eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = made

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).logits

    ids = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(Logits(), (ids,), strict=strict)
    with torch.no_grad():
        assert torch.equal(exported.module()(ids), made(ids).logits)
