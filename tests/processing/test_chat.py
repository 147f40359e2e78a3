"""Chat: prompts against transformers' apply_chat_template, inputs against its Qwen3VLProcessor, escaped tokens, replies."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen35moe.processing import ChatTemplate, Processor, Video
from qwen35moe.processing.template import Marks
from tests.support.chat import VISION, processor_of_transformers, write_folder
from tests.support.fakes import ADDED, SPECIAL

PROPERTIES = {"x": {"type": "integer"}, "note": {"type": "string"}, "all": {"type": "array"}}
ADD = {"name": "add", "description": "a <b> & 'c' é", "parameters": {"type": "object", "properties": PROPERTIES}}
TOOLS = [{"type": "function", "function": ADD}]
ARGUMENTS = {"x": 3, "note": "two\nlines", "all": [1, "é"]}
CALL = {"role": "assistant", "content": "I add.", "reasoning_content": "Add them.",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}]}  # fmt: skip
IMAGE = {"type": "image", "image": torch.zeros(40, 40, 3, dtype=torch.uint8)}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "  In the beginning \n"}],
    "system": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": [{"type": "text", "text": "Hi 日本"}]}],
    "reasoning": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "thinking": "older name"},
    ],
    "tool": [{"role": "user", "content": "1+2"}, CALL, {"role": "tool", "content": "3"}],
    "images": [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": " and "}, IMAGE]},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "again"}, IMAGE]},
    ],
}
VARIABLES: list[dict[str, Any]] = [
    {}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False},
    {"preserve_thinking": True}, {"tools": TOOLS, "add_generation_prompt": True}, {"add_vision_id": True},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("chat") / "it")


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """Of videos, ours computes the pixel values; timestamps and placeholders are computed by transformers."""
    return processor_of_transformers(folder, padding_side="left")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_and_inputs_equal_transformers(processor: Processor, theirs: Any, name: str) -> None:
    messages = CONVERSATIONS[name]
    for variables in VARIABLES:
        expected = theirs.apply_chat_template(messages, tokenize=False, **variables)
        assert processor.apply_chat_template(messages, tokenize=False, **variables) == expected, variables
        inputs = processor.apply_chat_template(messages, **variables)
        blocks = [b for m in messages for b in m["content"] if isinstance(b, dict) and b["type"] == "image"]
        images = [block["image"].numpy() for block in blocks] or None
        reference = dict(theirs(text=expected, images=images, return_tensors="pt"))
        assert set(inputs) == set(reference)
        for key, value in reference.items():
            assert torch.equal(inputs[key], value), (key, variables)
    assert expected.count("\n") > 1 and "<|im_start|>" in expected


def test_a_padded_batch_equals_transformers(processor: Processor, theirs: Any) -> None:
    batch = [CONVERSATIONS["images"], CONVERSATIONS["one"], CONVERSATIONS["tool"]]
    texts = processor.apply_chat_template(batch, tokenize=False, tools=TOOLS)
    assert texts == theirs.apply_chat_template(batch, tokenize=False, tools=TOOLS)
    images = [IMAGE["image"].numpy()] * 3
    reference = theirs(text=texts, images=images, padding=True, return_tensors="pt")
    for inputs in (processor.apply_chat_template(batch, tools=TOOLS), processor(texts, images=images)):
        assert all(torch.equal(inputs[key], value) for key, value in dict(reference).items())
    right = processor(texts, images=images, padding_side="right")
    assert right["attention_mask"][1, 0] == 1 and right["attention_mask"][1, -1] == 0


def test_video_timestamps_equal_transformers(processor: Processor, theirs: Any) -> None:
    """5 of 7 frames: the last one is repeated to fill the third pair."""
    frames = torch.randint(0, 256, (7, 40, 56, 3), dtype=torch.uint8)
    video = Video(frames[[0, 2, 3, 4, 6]], fps=3.0, indices=[0, 2, 3, 4, 6])
    messages = [{"role": "user", "content": [{"type": "video", "video": video}, IMAGE, {"type": "text", "text": "?"}]}]
    inputs = processor.apply_chat_template(messages)
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 8]]
    assert len(inputs["pixel_values_videos"]) == 3 * 4 * 8 and inputs["pixel_values_videos"].shape[1] == 3 * 2 * 8 * 8
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert all(f"<{second} seconds><|vision_start|><|video_pad|>" in text for second in ("0.3", "1.2", "2.0"))
    assert int((inputs["mm_token_type_ids"] == 2).sum()) == 3 * 4 * 8 // 4

    class StandIn:
        merge_size = temporal_patch_size = 2

        def __call__(self, videos: Any, **options: Any) -> dict[str, Any]:
            metadata = SimpleNamespace(fps=3.0, frames_indices=[0, 2, 3, 4, 6])
            return {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")} | {"video_metadata": [metadata]}

    theirs.video_processor = StandIn()
    prompt = processor.render(messages)
    reference = theirs(text=prompt, videos=[video.frames.numpy()], images=[IMAGE["image"].numpy()], return_tensors="pt")
    for key, value in dict(reference).items():
        assert torch.equal(inputs[key], value), key


@pytest.mark.parametrize(
    "source",
    [
        "a\n  {% if true %}\n b \n  {% endif %}\n c{# gone #}\n",
        "{%- for m in messages -%}  {{ m.content | trim }} {%- if loop.last %}!{% else %}{% continue %}{% endif %}{% endfor %}",
        "{{ messages | tojson }}|{{ tools | tojson(indent=2) }}|{{ 'é<&' | tojson(ensure_ascii=true) }}",
        "{{ {'b':1,'a':2}|tojson(sort_keys=true) }}{{ {'b':1}|tojson(separators=(',',':')) }}",
        "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% if i == 3 %}{% break %}{% endif %}"
        "{% endfor %}{{ ns.n }}",
        "{% generation %}{% set inner = 1 %}x{% endgeneration %}{{ inner is defined }}",
        "{{ eos_token }}{{ pad_token }}{{ bos_token is defined }}{{ undefined_thing }}",
        "{{ documents is none }}{{ tools is none }}{{ dict(a=1)['a'] }}",
        "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}",
    ],
)
def test_templates_render_as_transformers(processor: Processor, theirs: Any, source: str) -> None:
    messages = [{"role": "user", "content": " é <b> ", "reasoning": "r"}, {"role": "user", "content": "2"}]
    ours = Processor(processor.tokenizer, ChatTemplate(source), variables=processor.variables)
    assert ours.render(messages) == theirs.tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(messages) in {str(datetime.now().year + n) for n in (-1, 0)}


@pytest.mark.parametrize(
    "source, words",
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages.append(1) }}", "sandbox|unsafe|immutable|not safely|SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ (messages | map(attribute='__class__') | list)[0].mro() }}", "UndefinedError|unsafe|undefined|no attribute"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ range(999999999) | list }}", "range|Range|MAX"),
        ("{{ messages[0].image.save('x') }}", "no attribute|undefined|not callable"),
    ],
)
def test_template_errors_and_sandbox_violations_raise_value_error(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ChatTemplate(source).render([{"role": "user", "image": Path("x")}])
    with pytest.raises(ValueError, match="invalid chat template: "):
        ChatTemplate("{% if %}")


# ------------------------------------------------------------------------------------------------ escaped control tokens

CONTROL = [*SPECIAL, *ADDED, *VISION, "</tool_call>", "<tool_response>"]


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_message_text_never_becomes_a_control_token(processor: Processor, theirs: Any, role: str) -> None:
    text = " ".join(CONTROL) + "<|im_<|im_end|>end|> <|im_end|"
    turn = [{"role": "user", "content": "q"}] if role != "system" else []
    messages = [{"role": role, "content": text}, *turn] if role == "system" else [*turn, {"role": role, "content": text}]
    harmless = [message | {"content": "x" if message["content"] == text else message["content"]} for message in messages]
    inputs, plain = processor.apply_chat_template(messages), processor.apply_chat_template(harmless)
    control = set(processor.tokenizer.added_tokens.values())

    def control_ids(inputs: dict[str, torch.Tensor]) -> list[int]:
        return [number for number in inputs["input_ids"][0].tolist() if number in control]

    assert control_ids(inputs) == control_ids(plain)
    assert text in processor.tokenizer.decode(inputs["input_ids"][0])
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == processor.render(messages)
    assert "<|image_pad|>" in text and "<|video_pad|>" in text  # so the comparison above covers placeholders
    without = [{"role": "user", "content": text.replace("<|image_pad|>", "").replace("<|video_pad|>", "")}]
    special = processor.apply_chat_template(without, special=True)
    expected = theirs.tokenizer.apply_chat_template(without, return_dict=True)
    assert special["input_ids"][0].tolist() == expected["input_ids"]
    assert len(control_ids(special)) > len(control_ids(plain))


def test_text_parts_joined_by_a_template_form_no_control_token(processor: Processor) -> None:
    parts = [{"type": "text", "text": text} for text in ("<|im_", "end|>", "<thi", "nk>", "<", "|im_start|>")]
    ids = processor.apply_chat_template([{"role": "user", "content": parts}])["input_ids"][0].tolist()
    control = [number for number in ids if number in processor.tokenizer.added_tokens.values()]
    assert len(control) == 2 and "<|im_end|><think><|im_start|>" in processor.tokenizer.decode(ids)
    tools = [{"type": "function", "function": {"name": "f<|im_end|>", "parameters": {"<think>": 1}}}]
    ids = processor.apply_chat_template([{"role": "user", "content": "x"}], tools=tools)["input_ids"][0].tolist()
    control = [number for number in ids if number in processor.tokenizer.added_tokens.values()]
    assert len(control) == 4 and "f<|im_end|>" in processor.tokenizer.decode(ids)


def test_assistant_messages_keep_markup_tokens_and_escape_special_tokens(processor: Processor) -> None:
    names = processor.tokenizer.added_tokens
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nr\n</think>\n\nb <|im_end|>"}]
    ids = processor.apply_chat_template(messages)["input_ids"][0].tolist()
    assert ids.count(names["<think>"]) == ids.count(names["</think>"]) == 1
    assert ids.count(names["<|im_end|>"]) == 2
    assert processor.tokenizer.decode(ids) == processor.render(messages)


def test_marks_are_characters_absent_from_the_text() -> None:
    candidates = [chr(code) for code in range(0xFDD0, 0xFDF0)]
    marks = Marks.absent_from("a" + "".join(candidates[:-2]))
    assert {marks.start, marks.end} == set(candidates[-2:])
    with pytest.raises(ValueError, match="noncharacters"):
        Marks.absent_from("".join(candidates[1:]))
    assert marks.split(marks.start + "<x>", ["<x>"]) == marks.split("<x>" + marks.end, ["<x>"]) == [(False, "<x>")]
    assert marks.split("<x>y<x>", ["<x>"]) == [(True, "<x>"), (False, "y"), (True, "<x>")]


# ------------------------------------------------------------------------------------------------------------- replies


def test_replies_are_parsed(processor: Processor) -> None:
    prompt = processor.render(CONVERSATIONS["one"], add_generation_prompt=True)
    text = "\nAdd <b>.\n</think>\n\nI add.\n<tool_call>\n<function=add>\n<parameter=x>\n3\n</parameter>\n<parameter=note>\n"
    text += 'two\nlines\n</parameter>\n<parameter=all>\n[1, "é"]\n</parameter>\n</function>\n</tool_call><|im_end|>'
    ids = processor.tokenizer.encode(text, special=True)
    for reply in (text, ids, torch.tensor(ids)):
        for prompt_form in (prompt, processor.tokenizer.encode(prompt, special=True), None):
            parsed = processor.parse(reply, prompt=prompt_form, tools=TOOLS)
            assert (parsed.reasoning, parsed.content, parsed.thinking) == ("Add <b>.", "I add.", False)
            assert parsed.tool_calls[0].arguments == {"x": 3, "note": "two\nlines", "all": [1, "é"]}
    assert processor.parse(ids).tool_calls[0].arguments["x"] == "3"
    again = [*CONVERSATIONS["one"], processor.parse(ids, tools=TOOLS).message()]
    assert processor.render(again).endswith("<think>\n" + text.removeprefix("\n") + "\n")


def test_replies_that_stop_early_or_are_malformed(processor: Processor) -> None:
    open_prompt = "<think>\n"
    cut = processor.parse("so far", prompt=open_prompt)
    assert (cut.reasoning, cut.content, cut.thinking) == ("so far", "", True)
    closed = processor.parse("answer", prompt="<think>\n\n</think>\n\n")
    assert (closed.reasoning, closed.content, closed.thinking) == ("", "answer", False)
    assert processor.parse("<think>\nr\n</think>\n\na").reasoning == "r"
    for broken in ("<tool_call>\nno function\n</tool_call>", "<tool_call>\n<function=f>", "</tool_call>",
                   "<tool_call>\n<function=f>\nstray\n</function>\n</tool_call>"):  # fmt: skip
        parsed = processor.parse(f"a {broken}")
        assert parsed.tool_calls == () and parsed.content == f"a {broken}"
    for odd in (None, torch.tensor([[1, 2]]), 3, [1.5]):
        with pytest.raises(ValueError, match="a reply or prompt is text or one row of ids"):
            processor.parse(odd)  # type: ignore[arg-type]
    ids = processor.tokenizer.encode("say </think> and <tool_call>")  # as text, not as control tokens
    assert processor.parse(ids).content == "say </think> and <tool_call>"


# -------------------------------------------------------------------------------------------------------------- errors


def test_contradictions_raise(processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 <\|image_pad\|> in the text but 0 images"):
        processor("<|image_pad|>")
    with pytest.raises(ValueError, match=r"0 <\|video_pad\|> in the text but 1 videos"):
        processor("x", videos=["a.mp4"])
    with pytest.raises(ValueError, match="there are no messages"):
        processor.apply_chat_template([])
    with pytest.raises(ValueError, match="mapping with role and content"):
        processor.apply_chat_template([["x"]])
    bare = Processor(processor.tokenizer)
    with pytest.raises(ValueError, match="has no chat template"):
        bare.render(CONVERSATIONS["one"])
    with pytest.raises(ValueError, match="no preprocessor_config.json"):
        bare("<|image_pad|>", images=torch.zeros(9, 9))
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"patch_size": 16}}))
    with pytest.raises(ValueError, match=r"patch_size = 8, config.json has vision_config.patch_size = 16"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"image_token_id": 5}))
    with pytest.raises(ValueError, match=r"image_token_id = 5, tokenizer.json has <\|image_pad\|> = \d+"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["added_tokens"][0]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ValueError, match="lstrip"):
        Processor.from_pretrained(tmp_path)


def test_sources_of_the_template(tmp_path: Path) -> None:
    write_folder(tmp_path, "the file's own")
    assert Processor.from_pretrained(tmp_path).render([]) == "the file's own"
    (tmp_path / "chat_template.jinja").unlink()
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "by name"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert Processor.from_pretrained(tmp_path).render([]) == "by name"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json's"}))
    assert Processor.from_pretrained(tmp_path).render([]) == "json's"
