"""processing/messages.py: messages of programs and of other APIs; nothing of them is lost without an error."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35moe.processing import ChatTemplate, Processor, Video
from tests.support.chat import write_folder

Image = pytest.importorskip("PIL.Image")
PICTURE = Image.effect_noise((64, 48), 60).convert("RGB")
TEXT = {"type": "text", "text": "hi"}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.from_pretrained(write_folder(tmp_path_factory.mktemp("messages") / "it"))


def encoded(kind: str = "PNG") -> str:
    stream = io.BytesIO()
    PICTURE.save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


def user(*blocks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]


def same(actual: Any, expected: Any) -> None:
    assert set(actual) == set(expected) and all(torch.equal(actual[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------------------------- the last message stays open


@pytest.mark.parametrize(
    "content",
    ["Sure, the answer", "Sure,  ", [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}],
     "<think>\nhm\n</think>\n\nb", "ends in <|im_end|> and <"],
)  # fmt: skip
def test_the_final_message_is_continued(processor: Processor, content: Any) -> None:
    """As transformers' tokenizer renders it, and the ids are those of that text."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=processor.tokenizer.backend_tokenizer, chat_template=processor.chat_template
    )
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": content}]
    text = processor.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert text == theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert text == processor.render(chat, continue_final_message=True) and not text.endswith("<|im_end|>\n")
    ids = processor.apply_chat_template(chat, continue_final_message=True)["input_ids"][0].tolist()
    assert processor.tokenizer.decode(ids) == text
    assert processor.tokenizer.apply_chat_template(chat, continue_final_message=True).input_ids[0].tolist() == ids
    both = processor.apply_chat_template([chat, chat], tokenize=False, continue_final_message=True)
    assert both == [text, text]


def test_reasoning_is_continued(processor: Processor) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "reasoning_content": "First, I"}]
    text = processor.render(chat, continue_final_message="reasoning_content")
    assert text.endswith("<|im_start|>assistant\n<think>\nFirst, I")
    tagged = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a CONTINUE_FINAL_MESSAGE_TAG b"}]
    assert processor.render(tagged, continue_final_message=True).endswith("a CONTINUE_FINAL_MESSAGE_TAG b")


def test_what_cannot_be_continued(processor: Processor) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": []}]
    for words, call in {
        "give one of them": lambda: processor.render(user(TEXT), add_generation_prompt=True, continue_final_message=True),
        "has no 'content' to continue": lambda: processor.render(chat, continue_final_message=True),
        "has no 'reasoning' to": lambda: processor.render(user(TEXT), continue_final_message="reasoning"),
        "no text to continue": lambda: processor.render(user({"type": "image"}), continue_final_message=True),
        "leaves out or changes content": lambda: processor.render(
            user(TEXT), chat_template="{{ messages[0].role }}", continue_final_message=True),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()


# ------------------------------------------------------------------------------------------------------ variables and keys


def test_variables_that_the_template_does_not_read_raise(processor: Processor) -> None:
    for name, suggested in (("add_generation_prmpt", "add_generation_prompt"), ("enable_thinkng", "enable_thinking"),
                            ("document", "documents"), ("tokenise", "tokenize"), ("max_pixls", "max_pixels")):  # fmt: skip
        for method in (processor.apply_chat_template, processor.tokenizer.apply_chat_template):
            with pytest.raises(ValueError, match=f"does not read '{name}'.*did you mean '{suggested}'"):
                method(user(TEXT), **{name: True})
    with pytest.raises(ValueError, match="does not read 'documents'"):
        processor.render(user(TEXT), documents=[{"title": "a", "text": "b"}])
    plain = ChatTemplate("{{ messages[0].role }}")
    for options in ({"tools": [{"name": "f"}]}, {"add_generation_prompt": True}, {"anything": 0}):
        with pytest.raises(ValueError, match=f"does not read '{next(iter(options))}'"):
            plain.render(user(TEXT), **options)
    neutral = {"tools": None, "documents": None, "anything": None, "enable_thinking": False, "preserve_thinking": False}
    assert plain.render(user(TEXT), add_generation_prompt=False, **neutral) == "user"
    assert "<think>" in (thinking := ChatTemplate("{{ '<think>' }}")).source
    with pytest.raises(ValueError, match="does not read 'enable_thinking'"):
        thinking.render(user(TEXT), enable_thinking=False)
    assert thinking.render(user(TEXT), enable_thinking=True) == "<think>"


def test_documents_and_own_variables_reach_the_template(processor: Processor) -> None:
    source = "{{ documents[0].title }} {{ mood }} {{ messages[0].content[0].text }} {{ eos_token }}"
    for chat in (processor, processor.tokenizer):
        text = chat.apply_chat_template(
            user(TEXT), documents=[{"title": "A"}], mood="calm", chat_template=source, tokenize=False
        )
        assert text == "A calm hi <|im_end|>"


def test_null_keys_are_dropped(processor: Processor) -> None:
    rows = user({"type": "image", "image": PICTURE, "text": None, "video": None, "max_pixels": None},
                {"type": "text", "text": "hi", "image": None, "video": None})  # fmt: skip
    rows[0] |= {"tool_calls": None, "name": None, "reasoning_content": None}
    same(processor.apply_chat_template(rows), processor.apply_chat_template(user({"type": "image", "image": PICTURE}, TEXT)))
    seen = ChatTemplate("{{ messages[0] | length }}{{ messages[0].content[0] | length }}")
    row = {"role": "user", "name": None, "content": [TEXT | {"a": None}]}
    assert Processor(processor.tokenizer, seen).render([row]) == "22"


@pytest.mark.parametrize(
    "messages, words",
    [
        (user({"type": "text", "txt": "x"}), "message 0 .'user'.: .*does not read the key 'txt': did you mean 'text'"),
        (user({"type": "text", "text": "x", "ttl": 1}), "does not read the key 'ttl': leave it out"),
        (user({"type": "text"}), "needs the key 'text' with a str, got None"),
        (user({"type": "input_audio", "input_audio": {"data": "x"}}), "'input_audio' cannot be read.*takes no audio"),
        (user({"type": "file", "file": {}}), "a block of type 'file' cannot be read, only text, image and video"),
        (user({"type": "image", "image": PICTURE, "url": "x"}), "'image' and 'url' both name the image"),
        (user({"type": "image", "max_pixels": 4096}), "without a image"),
        (user(3), "a block of content is a mapping with a type, got 3"),
        ([{"role": "user", "content": TEXT}], "content must be a str or a list of blocks, got dict: put it into a list"),
        ([{"role": "user", "content": 3}], "content must be a str or a list of blocks, got int"),
        ([{"content": "x"}], "message 0: a message needs a role, such as 'user', got None"),
        ([{"role": 3, "content": "x"}], "a message needs a role"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
        ([{"role": "user", "contents": "x"}], "does not read the key 'contents': did you mean 'content'"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "tool_call": []}], "message 1 .*did you mean 'tool_calls'"),
        ("hi", "messages is a list of messages or of conversations, got str"),
        ([[{"role": "user", "content": "x"}], {"role": "user"}], "one of its entries is a single message"),
    ],
)
def test_keys_and_blocks_that_nothing_reads_raise(processor: Processor, messages: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        processor.apply_chat_template(messages)
    assert len(str(caught.value)) < 500


def test_keys_that_the_template_reads_pass(processor: Processor) -> None:
    source = "{{ messages[0].mood }}{{ messages[0].content[0].cache }}{{ messages[0].content[1].card.suit }}"
    message = {"role": "user", "mood": 1, "content": [TEXT | {"cache": 2}, {"type": "card", "card": {"suit": 3}}]}
    assert Processor(processor.tokenizer, ChatTemplate(source)).render([message]) == "123"


def test_tools_are_json(processor: Processor) -> None:
    schemas = [{"name": "f", "parameters": {"type": "object"}}]
    expected = processor.render(user(TEXT), tools=schemas)
    for tools in (tuple(schemas), iter(schemas), (schema for schema in schemas)):
        assert processor.render(user(TEXT), tools=tools) == expected
    for tools, words in (([{"name": {1, 2}}], "cannot hold {1, 2} .set."), ("f", "got str"), ({"name": "f"}, "got dict"),
                         ([len], "built-in function len>; transformers.utils.get_json_schema"), (3, "got int")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            processor.apply_chat_template(user(TEXT), tools=tools)


def test_cyclic_and_deep_messages_raise(processor: Processor) -> None:
    cycle: dict[str, Any] = {"role": "user", "content": []}
    cycle["content"].append(cycle)
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    for content in ([cycle], [{"role": "user", "content": deep}]):
        with pytest.raises(ValueError, match="messages are nested more than 64 levels deep"):
            processor.apply_chat_template(content)


# ------------------------------------------------------------------------------------------------------- images of other APIs


def test_forms_of_images(processor: Processor, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    address = f"data:image/png;base64,{encoded()}"
    expected = processor.apply_chat_template(user({"type": "image", "image": PICTURE}, TEXT))
    for block in (
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "image_url", "image_url": {"url": address, "detail": "auto"}},
        {"type": "image_url", "image_url": address}, {"type": "input_image", "image_url": address},
        {"type": "image", "image": address}, {"type": "image", "url": str(tmp_path / "a.png")},
        {"type": "image", "image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}},
        {"type": "image", "image": {"bytes": None, "path": str(tmp_path / "a.png")}},
        {"type": "image", "path": tmp_path / "a.png"}, {"type": "image", "base64": encoded()}, {"image": PICTURE},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded()}},
        {"type": "image", "image": f"data:image/png;base64,{encoded()[:40]}\n{encoded()[40:]}"},
        {"type": "image", "image": (tmp_path / "a.png").read_bytes()}, {"image_url": {"url": address}},
    ):  # fmt: skip
        for text in (TEXT, {"type": "input_text", "text": "hi"}, {"text": "hi"}):
            same(processor.apply_chat_template(user(block, text)), expected)
    same(processor.image_processor(address), {n: expected[n] for n in ("pixel_values", "image_grid_thw")})


@pytest.mark.parametrize(
    "address, words",
    [
        ("data:image/png;base64," + "A" * 300_000, "cannot be read: cannot identify"),
        ("data:image/png;base64,@@", "no base64"), ("data:text/plain;base64,aGk=", "a data: address of an image is"),
        ("data:image/png,raw", "a data: address of an image is"), ("data:", "a data: address of an image is"),
        ("http://host/a.png", "URLs are not downloaded"),
        ("https://" + "x" * 5000, "URLs are not downloaded"), ("file:///etc/passwd", "URLs are not downloaded"),
        ("ftp://a/b", "URLs are not downloaded"), ("x" * 5000, "no such file"), ("a\0b", "no such file"),
    ],
)  # fmt: skip
def test_addresses_are_refused_shortly(processor: Processor, address: str, words: str) -> None:
    for block in ({"type": "image", "image": address}, {"type": "image_url", "image_url": {"url": address}}):
        with pytest.raises(ValueError, match=words) as caught:
            processor.apply_chat_template(user(block))
        assert len(str(caught.value)) < 500
    with pytest.raises(ValueError, match="URLs are not|no such file") as caught:
        processor.apply_chat_template(user({"type": "video_url", "video_url": {"url": address}}))
    assert len(str(caught.value)) < 500


# ----------------------------------------------------------------------------------------------------------- frames of videos


def test_a_list_of_frames_is_a_video(processor: Processor, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), (9 * i, 0, 0)) for i in range(5)]
    files = [str(tmp_path / f"{i}.png") for i in range(5)]
    for frame, file in zip(frames, files, strict=True):
        frame.save(file)

    def go(video: Any, **block: Any) -> Any:
        return processor.apply_chat_template(user({"type": "video", "video": video, **block}, TEXT))

    expected = go(Video(frames, fps=1.0))
    assert expected["video_grid_thw"].tolist() == [[3, 8, 8]]
    array = torch.stack([processor_bytes(frame) for frame in frames])
    for video in (frames, tuple(frames), files, array, array.numpy()):
        same(go(video, fps=1.0), expected)
    same(go(frames, raw_fps=1), expected)
    sampled = go(frames, sample_fps=4.0)  # all are kept, at 4 per second
    same(sampled, go(Video(frames, fps=4.0, indices=range(5))))
    assert "<0.1 seconds>" in processor.tokenizer.decode(sampled["input_ids"][0])
    assert go(frames, fps=10.0)["video_grid_thw"][0, 0] == 2  # 4 of 5 frames: half a second at 2 per second, at least 4
    assert go(frames, fps=1.0, total_pixels=4096)["video_grid_thw"].tolist() == [[3, 2, 2]]
    assert go(frames, fps=1.0, resized_height=32, resized_width=48)["video_grid_thw"].tolist() == [[3, 4, 6]]


def processor_bytes(frame: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8).view(frame.height, frame.width, 3)


def test_frames_without_a_rate_and_odd_rates_raise(processor: Processor) -> None:
    frames = [Image.new("RGB", (64, 64))] * 5
    for block, words in (
        ({}, "a list of 5 frames needs its rate: give fps="), ({"fps": "x"}, "fps must be positive, got 'x'"),
        ({"fps": -1}, "fps must be positive"), ({"fps": 1, "sample_fps": 2}, "one rate, got fps=1 and sample_fps=2"),
        ({"fps": 1, "frames_per_second": 1}, "does not read the key 'frames_per_second'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            processor.apply_chat_template(user({"type": "video", "video": frames, **block}))
    with pytest.raises(ValueError, match="sample_fps is the rate of a list of frames"):
        processor.apply_chat_template(user({"type": "video", "video": "a.mp4", "sample_fps": 1}))
    with pytest.raises(ValueError, match="no frames"):
        processor.apply_chat_template(user({"type": "video", "video": [], "fps": 1}))
    with pytest.raises(ValueError, match="must not be negative and must not fall"):
        processor.video_processor(Video(frames, fps=1.0, indices=[4, 3, 2, 1, 0]))


# ---------------------------------------------------------------------------------------------------------------- tool calls


def call(arguments: Any, **function: Any) -> list[dict[str, Any]]:
    functions = [{"type": "function", "function": {"name": "f", "arguments": arguments, **function}}]
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": functions}]


def test_arguments_as_json_text_are_parsed(processor: Processor) -> None:
    arguments = {"a": 1, "b": "two\nlines", "c": [True, None]}
    expected = processor.render(call(arguments))
    assert expected == processor.render(call(json.dumps(arguments))) and "<parameter=b>\ntwo\nlines\n" in expected
    assert processor.render(call("")) == processor.render(call({})) == processor.render(call("{}"))
    messages = call(json.dumps(arguments), parameters=None)
    processor.render(messages)
    assert messages == call(json.dumps(arguments), parameters=None)  # the caller's objects stay as they are
    text = ChatTemplate("{% for c in messages[1].tool_calls %}{% if c.function.arguments is string %}"
                        "{{ c.function.arguments }}{% endif %}{% endfor %}")  # fmt: skip
    assert Processor(processor.tokenizer, text).render(call('{"a":1}')) == '{"a":1}'


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("{'a': 1}", r"message 1 \('assistant'\): tool_calls\[0\].function.arguments \('f'\) is no JSON"),
        ("[1]", r"tool_calls\[0\].function.arguments .* must be a JSON object, got \[1\]"),
        ([1], "must be a mapping or the text of a JSON object, got list"), ("{" * 100_000, "is no JSON"),
    ],
)  # fmt: skip
def test_other_arguments_raise(processor: Processor, arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        processor.render(call(arguments))
    assert len(str(caught.value)) < 500
    with pytest.raises(ValueError, match="needs a function with a name"):
        processor.render([{"role": "assistant", "tool_calls": [{"type": "function"}]}])


def test_objects_of_a_client_library(processor: Processor) -> None:
    @dataclasses.dataclass
    class Model:  # as pydantic's: model_dump gives a mapping
        fields: dict[str, Any]

        def model_dump(self) -> dict[str, Any]:
            return self.fields

    function = Model({"name": "f", "arguments": '{"a": 1}', "parsed": None})
    reply = Model({"role": "assistant", "content": None, "refusal": None, "annotations": [],
                   "tool_calls": [Model({"id": "1", "type": "function", "function": function})]})  # fmt: skip
    rendered = processor.render([{"role": "user", "content": "x"}, reply])
    assert "<function=f>\n<parameter=a>\n1\n</parameter>" in rendered


def test_an_error_in_the_template_names_the_message_and_the_line(processor: Processor) -> None:
    template = ChatTemplate("{% for m in messages %}\n{{ m.role }}\n{{ m.content + 1 }}{% endfor %}")
    with pytest.raises(ValueError, match=r"TypeError.* \(at message 1 \('tool'\); line 3, '{{ m.content \+ 1 }}"):
        template.render([{"role": "user", "content": 1}, {"role": "tool", "content": "x"}])
