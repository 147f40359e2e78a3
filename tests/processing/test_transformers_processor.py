"""The processor under transformers' habits: calls beside those of transformers' Qwen3VLProcessor on the same files."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35moe.compat import PROCESSOR
from qwen35moe.processing import TRANSFORMERS, ImageProcessor, Processor, Video, VideoProcessor
from tests.support.chat import processor_of_transformers, write_folder

Image = pytest.importorskip("PIL.Image")
PICTURE = Image.effect_noise((200, 120), 60).convert("RGB")
CHAT = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is it?"}]}]
FILM = Video(torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 64, 48, 3).contiguous(), fps=10.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("habits") / "it")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Processor:
    return Processor.from_pretrained(folder, defaults=TRANSFORMERS)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return processor_of_transformers(folder)


def same(actual: Any, expected: Any) -> None:
    assert set(actual) == set(expected)
    for name, value in dict(expected).items():
        assert torch.equal(torch.as_tensor(actual[name]), torch.as_tensor(value)), name


def test_the_model_documentation_s_steps(ours: Processor, theirs: Any) -> None:
    """apply_chat_template(tokenize=True, ...).to(device), trimmed rows, batch_decode."""
    options = dict(tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    inputs = ours.apply_chat_template(CHAT, **options).to("cpu")
    same(inputs, theirs.apply_chat_template(CHAT, **options))
    generated = torch.cat([inputs["input_ids"], ours.tokenizer("It is noise.", return_tensors="pt").input_ids], 1)
    trimmed = [out[len(row) :] for row, out in zip(inputs.input_ids, generated, strict=True)]
    for decode in (ours.batch_decode, ours.tokenizer.batch_decode, theirs.batch_decode):
        assert decode(trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False) == ["It is noise."]
    assert ours.post_process_image_text_to_text(trimmed) == theirs.post_process_image_text_to_text(trimmed)
    assert ours.decode(trimmed[0]) == "It is noise."


def test_two_steps_equal_one(ours: Processor, theirs: Any) -> None:
    text = ours.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    inputs = ours(text=[text], images=[PICTURE], videos=None, padding=True, return_tensors="pt")
    same(inputs, theirs(text=[str(text)], images=[PICTURE], videos=None, padding=True, return_tensors="pt"))
    same(inputs, ours.apply_chat_template(CHAT, add_generation_prompt=True))
    lists = ours(text=[text], images=[PICTURE], return_tensors=None)
    assert lists.input_ids == inputs.input_ids.tolist() and lists.mm_token_type_ids == inputs.mm_token_type_ids.tolist()
    arrays = ours(text=[text], images=[PICTURE], return_tensors="np")
    assert type(arrays.input_ids).__name__ == "ndarray" and (arrays.pixel_values == inputs.pixel_values.numpy()).all()


def grid(ours: Processor, chat: Any = CHAT, **options: Any) -> list[int]:
    inputs = ours.apply_chat_template(chat, **options)
    return inputs["image_grid_thw" if "image_grid_thw" in inputs else "video_grid_thw"][0].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"max_pixels": 2048}, {"size": {"shortest_edge": 1024, "longest_edge": 2048}},
        {"processor_kwargs": {"max_pixels": 2048}}, {"images_kwargs": {"max_pixels": 2048}},
        {"processor_kwargs": {"images_kwargs": {"max_pixels": 2048}}},
    ],
)  # fmt: skip
def test_sizes_of_a_call(ours: Processor, folder: Path, options: dict[str, Any]) -> None:
    """120 x 200 pixels in whole tokens of 16: 96 x 160 are at most 16,384 pixels, 32 x 48 at most 2,048."""
    assert grid(ours) == [1, 12, 20] and grid(ours, **options) == [1, 4, 6]
    flat = options.get("processor_kwargs", options)
    called = ours(ours.render(CHAT), [PICTURE], **flat)
    assert called["image_grid_thw"].tolist() == [[1, 4, 6]]
    if "size" in options or "max_pixels" in options:
        assert ours.image_processor(PICTURE, **options)["image_grid_thw"].tolist() == [[1, 4, 6]]
    loaded = Processor.from_pretrained(folder, **flat)
    assert grid(loaded) == [1, 4, 6]
    assert grid(ours) == [1, 12, 20]  # the processor's own settings are as before


def test_sizes_in_a_message(ours: Processor) -> None:
    def chat(**block: Any) -> Any:
        blocks = [{"type": "image", "image": PICTURE, **block}, {"type": "image", "image": PICTURE}]
        return [{"role": "user", "content": blocks}]

    for block, expected in (({"max_pixels": 2048}, [1, 4, 6]), ({"min_pixels": 16_000, "max_pixels": 16_384}, [1, 12, 20]),
                            ({"resized_height": 48, "resized_width": 64}, [1, 6, 8])):  # fmt: skip
        grids = ours.apply_chat_template(chat(**block))["image_grid_thw"].tolist()
        assert grids == [expected, [1, 12, 20]], block
    values = ours.apply_chat_template(chat(max_pixels=2048))["pixel_values"]
    assert torch.equal(values[: 4 * 6], ours.image_processor(PICTURE, max_pixels=2048)["pixel_values"])
    for block, words in (({"max_pixel": 2048}, "message 0 .'user'.: block of type 'image': the processor does not read the key "
                          "'max_pixel': did you mean 'max_pixels'"),
                         ({"resized_height": 48}, "two positive integers, got 48 and None"),
                         ({"detail": "low"}, "detail='low' is not supported: give max_pixels")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            ours.apply_chat_template(chat(**block))


def test_sampling_of_videos(ours: Processor) -> None:
    film = [{"role": "user", "content": [{"type": "video", "video": FILM}]}]
    small = {"max_pixels": 4096}
    for options, frames in (({}, 8), ({"fps": 5}, 20), ({"fps": [5]}, 20), ({"num_frames": 6}, 6), ({"max_frames": 4}, 4),
                            ({"do_sample_frames": False}, 40), ({"videos_kwargs": {"fps": 5}}, 20)):  # fmt: skip
        assert grid(ours, film, **options)[0] == frames // 2, options
    assert grid(ours, film, **small)[1:] < grid(ours, film)[1:]
    for block, frames in (({"fps": 5}, None), ({"nframes": 6}, 6), ({"num_frames": 6}, 6), ({"max_frames": 4}, 4)):
        content = [{"type": "video", "video": FILM, **block}]
        if frames is not None:
            assert grid(ours, [{"role": "user", "content": content}])[0] == frames // 2, block
    with pytest.raises(ValueError, match="block of type 'video': max_pixels is ambiguous.*total_pixels"):
        ours.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": FILM, "max_pixels": 4096}]}])
    text = ours.apply_chat_template([{"role": "user", "content": "x"}], fps=5, do_sample_frames=False)  # no video to sample
    assert "video_grid_thw" not in text


def test_attributes_that_scripts_read(ours: Processor, theirs: Any) -> None:
    for name in ("patch_size", "merge_size", "temporal_patch_size", "do_resize", "do_normalize", "rescale_factor"):
        assert getattr(ours.image_processor, name) == getattr(theirs.image_processor, name), name
    assert list(ours.image_processor.image_mean) == list(theirs.image_processor.image_mean)
    for name in ("image_token", "video_token", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.chat_template == theirs.chat_template and set(ours.model_input_names) >= {"input_ids", "pixel_values"}
    changed = copy.deepcopy(ours)
    changed.image_processor.max_pixels = 2048
    assert grid(changed) == [1, 4, 6] and grid(ours) == [1, 12, 20]
    changed.image_processor.size = {"shortest_edge": 1024, "longest_edge": 4096}
    assert changed.image_processor.max_pixels == 4096 and changed.image_processor.size["shortest_edge"] == 1024
    with pytest.raises(ValueError, match="has no setting 'max_pixel'"):
        changed.image_processor.max_pixel = 3
    changed.chat_template = "{{ messages[0].role }}"
    assert changed.render(CHAT) == "user" == changed.tokenizer.apply_chat_template([{"role": "user"}], tokenize=False)


REFUSED: dict[str, Any] = {
    "video_metadata": [{"fps": 2}], "audio": [1.0], "audio_kwargs": {"a": 1}, "load_audio_from_video": True,
    "common_kwargs": {"return_tensors": "pt"},
    "do_convert_rgb": False, "do_center_crop": True, "crop_size": {"height": 3}, "do_pad": True,
    "data_format": "channels_last", "input_data_format": "channels_last", "device": "cuda",
    "return_offsets_mapping": True, "stride": 3,
}  # fmt: skip


def test_keywords_are_refused_with_the_way_out(ours: Processor) -> None:
    for name, value in REFUSED.items():
        way_out = next(keyword.instead for keyword in PROCESSOR if keyword.name == name)
        for call in (lambda keywords: ours("x", **keywords), lambda keywords: ours.apply_chat_template(CHAT, **keywords)):
            with pytest.raises(ValueError) as caught:
                call({name: value})
            assert name in str(caught.value) and way_out in str(caught.value) and len(way_out) > 10
    for words, call in {
        "processor.. has no keyword 'max_pixel': did you mean 'max_pixels'": lambda: ours("x", max_pixel=3),
        "does not read 'max_pixel', so max_pixel=3 would have no effect: did you mean 'max_pixels'":
            lambda: ours.apply_chat_template(CHAT, max_pixel=3),
        "give images as images=": lambda: ours(PICTURE),
        "two values for max_pixels": lambda: ours("x", max_pixels=2048, processor_kwargs={"max_pixels": 4096}),
        "fps is a setting of videos": lambda: ours("x", images_kwargs={"fps": 3}),
        "must be a mapping of keywords": lambda: ours("x", images_kwargs=3),
        "truncation to 9 of .* tokens would cut an image":
            lambda: ours.apply_chat_template(CHAT, truncation=True, max_length=9),
        "the messages hold images and images= is given": lambda: ours.apply_chat_template(CHAT, images=[PICTURE]),
    }.items():  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=words):
            call()


NEUTRAL: dict[str, Any] = {
    "return_mm_token_type_ids": True, "return_metadata": True, "default_to_square": False, "disable_grouping": True,
    "do_convert_rgb": True, "device": "cpu", "verbose": False, "audio": None, "return_token_type_ids": False,
}  # fmt: skip


def test_neutral_keywords_change_nothing(ours: Processor) -> None:
    for name, value in NEUTRAL.items():
        same(ours.apply_chat_template(CHAT, **{name: value}), ours.apply_chat_template(CHAT))


def test_saved_files_load_here_and_in_transformers(folder: Path, ours: Processor, tmp_path: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    ours.save_pretrained(tmp_path / "same")
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()
    changed = copy.deepcopy(ours)
    changed.image_processor.max_pixels, changed.image_processor.image_mean = 2048, (0.25, 0.5, 0.75)
    changed.video_processor.fps = 3.0
    changed.save_pretrained(tmp_path / "changed")
    again = Processor.from_pretrained(tmp_path / "changed")
    assert again.image_processor.settings == changed.image_processor.settings
    assert again.video_processor.settings == changed.video_processor.settings
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "changed")
    expected = theirs(images=[PICTURE], return_tensors="pt")
    same(again.image_processor(PICTURE), expected)
    assert json.loads((tmp_path / "changed" / "video_preprocessor_config.json").read_text())["fps"] == 3.0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"])
def test_copies_are_equal(ours: Processor, copied: Any) -> None:
    same(copied(ours).apply_chat_template(CHAT), ours.apply_chat_template(CHAT))
    for part in (ours.image_processor, ours.video_processor, ours.template, ours.tokenizer):
        again = copied(part)
        if isinstance(part, ImageProcessor):
            same(again(PICTURE), part(PICTURE))
        elif isinstance(part, VideoProcessor):
            same(again(FILM)[0], part(FILM)[0])
        else:
            assert again.__dict__.keys() >= {"source"} or again.definition == part.definition
    reply = ours.parse("<think>\nx\n</think>\n\ny")
    assert copied(reply) == reply and copied(FILM).fps == FILM.fps
