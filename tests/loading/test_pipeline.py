"""pipeline(): its own rules; tests/test_published_snippets.py compares it with transformers'."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import qwen35moe

CHAT = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return qwen35moe.pipeline("text-generation", model="tiny", torch_dtype=torch.float32, device_map="auto", max_new_tokens=7)


def test_prompts_in_texts_out(pipe: Any) -> None:
    model, tokenizer = pipe.model, pipe.tokenizer
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM" and model.dtype == torch.float32
    ids = tokenizer("And God said", return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=7)[0, 3:], skip_special_tokens=True)
    assert pipe("And God said") == [{"generated_text": "And God said" + expected}]
    assert pipe("And God said", return_full_text=False) == [{"generated_text": expected}]
    assert pipe("And God said", return_tensors=True) == [
        {"generated_token_ids": model.generate(ids, max_new_tokens=7)[0].tolist()}
    ]
    assert pipe(["And God said"]) == [pipe("And God said")] and pipe([]) == []
    longer = pipe("And God said", max_new_tokens=9, return_full_text=False)[0]["generated_text"]
    assert longer.startswith(expected) and longer != expected
    assert pipe("God said", prefix="And ", return_full_text=False) == [{"generated_text": expected}]
    stop = expected.strip().split()[1]
    assert pipe("And God said", stop_sequence=stop, return_full_text=False)[0]["generated_text"].endswith(stop)


def test_batches_give_what_single_prompts_give(pipe: Any) -> None:
    prompts = ["And God said", "Now", "In the beginning was the word of the LORD", "Who are"]
    single = [pipe(prompt) for prompt in prompts]
    for size in (1, 2, 3, 9):
        assert pipe(prompts, batch_size=size) == single
    tensors = pipe(prompts, batch_size=4, return_tensors=True)
    assert [t[0]["generated_token_ids"] for t in tensors] == [
        pipe(p, return_tensors=True)[0]["generated_token_ids"] for p in prompts
    ]


def test_conversations(pipe: Any) -> None:
    answer = pipe(CHAT)[0]["generated_text"]
    assert answer[:1] == CHAT and answer[1]["role"] == "assistant" and isinstance(answer[1]["content"], str)
    assert pipe([CHAT, CHAT], batch_size=2) == [pipe(CHAT)] * 2
    assert pipe(CHAT, return_full_text=False) == [{"generated_text": answer[1]["content"]}]
    opened = [*CHAT, {"role": "assistant", "content": "I am"}]
    continued = pipe(opened)[0]["generated_text"]
    assert len(continued) == 2 and continued[1]["content"].startswith("I am") and opened[1]["content"] == "I am"
    assert len(pipe(opened, continue_final_message=False)[0]["generated_text"]) == 3


def test_several_answers_of_one_prompt(pipe: Any) -> None:
    torch.manual_seed(0)
    answers = pipe("And God said", do_sample=True, num_return_sequences=3)
    assert len(answers) == 3 and len({answer["generated_text"] for answer in answers}) > 1
    both = pipe(["Now", "And God said"], do_sample=True, num_return_sequences=2, batch_size=2)
    assert [len(row) for row in both] == [2, 2] and all(a["generated_text"].startswith("Now") for a in both[0])
    returned = pipe("And God said", return_dict_in_generate=True)
    assert returned == pipe("And God said")


def test_images_in_messages() -> None:
    from qwen35moe.checkpoint.hub import BUNDLED

    pipe = qwen35moe.pipeline("image-text-to-text", model="tiny")
    picture = {"type": "image", "image": str(BUNDLED / "example.png")}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "Describe this image."}]}]
    (answer,) = pipe(text=messages, max_new_tokens=8)
    assert answer["input_text"] == messages and answer["generated_text"][:1] == messages
    inputs = pipe.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                                return_tensors="pt")  # fmt: skip
    new = pipe.model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"][1]["content"] == pipe.processor.decode(new, skip_special_tokens=True)
    assert (
        pipe(messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"] == answer["generated_text"][1]["content"]
    )
    with pytest.raises(ValueError, match="put .*image.* into the messages"):
        pipe(text="x", images=[picture])


def test_a_model_and_a_tokenizer_given_as_objects_or_names() -> None:
    model, tokenizer = qwen35moe.load("tiny")
    for reader in (tokenizer, qwen35moe.AutoTokenizer.from_pretrained("tiny"), "tiny"):
        pipe = qwen35moe.pipeline(model=model, tokenizer=reader, device=-1)
        assert pipe("And God said", max_new_tokens=3)[0]["generated_text"].startswith("And God said")
    assert pipe.device == torch.device("cpu") and "text-generation" in repr(pipe) and len(repr(pipe)) < 200
    half = qwen35moe.pipeline(
        "text-generation", "tiny", model_kwargs={"attn_implementation": "eager"}, dtype="float32", device="cpu"
    )
    assert half.model.dtype == torch.float32


def test_without_a_length_there_are_256_tokens_as_in_transformers(pipe: Any) -> None:
    plain = qwen35moe.pipeline(model=pipe.model, tokenizer=pipe.tokenizer)
    with mock.patch.object(type(pipe.model), "generate", return_value=torch.tensor([[303, 402, 388, 310]])) as generate:
        plain("And God said")
        assert generate.call_args.kwargs["max_new_tokens"] == 256
        plain("And God said", max_length=9)
        assert "max_new_tokens" not in generate.call_args.kwargs
        pipe("And God said")
        assert generate.call_args.kwargs["max_new_tokens"] == 7


def test_what_cannot_be_honoured_is_refused(pipe: Any) -> None:
    model = pipe.model
    for call, words in (
        (lambda: qwen35moe.pipeline("summarization", model="tiny"), "text-generation"),
        (lambda: qwen35moe.pipeline(), "task=None"), (lambda: qwen35moe.pipeline("text-generation"), "needs a model"),
        (lambda: qwen35moe.pipeline(model=model), "give its tokenizer"),
        (lambda: qwen35moe.pipeline("image-text-to-text", model=model), "give its processor"),
        (lambda: qwen35moe.pipeline(model=model, tokenizer="tiny", dtype="float32"), "dtype=.*is for loading"),
        (lambda: qwen35moe.pipeline(model="tiny", pipeline_class=object), "pipeline_class"),
        (lambda: pipe(3), "a prompt is"), (lambda: pipe([3, "x"]), "a prompt is"),
        (lambda: pipe([{"content": "x"}]), "a prompt"),
        (lambda: pipe("x", return_full_text=True, return_tensors=True), "exclude"),
        (lambda: pipe("x", batch_size=0), "batch_size=0"), (lambda: pipe("x", handle_long_generation="hole"), "handle_long"),
        (lambda: pipe("x", max_new_token=3), "max_new_token"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=words) as error:
            call()
        assert len(str(error.value)) < 500
