"""Files of a checkpoint and media that are hostile: links, sizes, products of settings, long work in small files; and ambient
state and threads, which must not change a result."""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35moe.processing import TRANSFORMERS, ImageProcessor, Processor, Tokenizer, Video, VideoProcessor
from qwen35moe.processing import images as images_module
from qwen35moe.processing.pixels import PixelSettings
from tests.support.chat import write_folder

Image = pytest.importorskip("PIL.Image")
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
         "video_preprocessor_config.json", "processor_config.json", "generation_config.json", "config.json")  # fmt: skip
CHAT = [{"role": "user", "content": "hi"}]


# ---------------------------------------------------------------------------------------------------------- links and sizes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "it")


@pytest.mark.parametrize("name", FILES)
def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    if (folder / name).exists():
        shutil.move(folder / name, secret)
    else:
        secret.write_text("{}")
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{name}: outside the folder: it is a link to .*secret; copy the file"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("name", FILES)
def test_pipes_and_folders_are_refused(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name}: not a file"):
        Processor.from_pretrained(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: not a file"):
        Processor.from_pretrained(folder)


def test_links_of_the_hub_s_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/name -> ../../blobs/HASH; and a link inside the folder."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(folder.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert Processor.from_pretrained(snapshot).render(CHAT) == Processor.from_pretrained(folder).render(CHAT)
    (folder / "chat_template.jinja").rename(folder / "other")
    (folder / "chat_template.jinja").symlink_to("other")
    assert "hi" in Processor.from_pretrained(folder).render(CHAT)
    copied = folder.parent / "copied"
    Processor.from_pretrained(snapshot).save_pretrained(copied)
    assert not any(file.is_symlink() for file in copied.iterdir())


def test_large_and_deep_files_are_refused(folder: Path) -> None:
    with (folder / "chat_template.jinja").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match="chat_template.jinja cannot be read: it has 1099511627776 bytes; at most"):
        Processor.from_pretrained(folder)
    (folder / "chat_template.jinja").write_text("x")
    for name in ("tokenizer_config.json", "preprocessor_config.json", "tokenizer.json"):
        kept = (folder / name).read_bytes()
        for content in ("[" * 200_000, '{"a":' * 200_000, '{"a": [' + "[]," * 3_000_000 + "[]]}", '{"a": NaN}', "1" * 9999):
            (folder / name).write_text(content)
            with pytest.raises(ValueError, match=f"{name}( is not valid JSON)?: ") as caught:
                Processor.from_pretrained(folder)
            assert len(str(caught.value)) < 1000
        (folder / name).write_bytes(kept)


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens": [{"id": "x", "content": "a"}]}, {"added_tokens": [3]}, {"added_tokens": 7}, {"model": None},
        {"model": {}},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, {"model": {"type": "BPE", "vocab": {"a": 0},
        "merges": [["a", "b"]]}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {"added_tokens": [{"id": 1 << 40, "content": "a", "single_word": False, "lstrip": False, "rstrip": False,
                           "normalized": False, "special": False}]},
    ],
)  # fmt: skip
def test_damaged_tokenizers_raise(folder: Path, change: dict[str, Any]) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match="invalid tokenizer.json") as caught:
        Tokenizer.from_pretrained(folder)
    assert len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "change",
    [
        {"min_pixels": 10**10, "max_pixels": 10**11}, {"patch_size": 10**5}, {"merge_size": 10**5},
        {"temporal_patch_size": 10**6},
        {"patch_size": 512, "merge_size": 64}, {"patch_size": True},
        {"size": {"shortest_edge": 10**30, "longest_edge": 10**31}}, {"size": [3]}, {"image_mean": [0.5] * 5}, {"image_std": 0},
        {"image_mean": ["a", 1, 2]}, {"rescale_factor": 1e300}, {"min_pixels": 0}, {"do_resize": "no"}, {"patch_size": 8.0},
        {"patch_size": 4096, "merge_size": 1}, {"image_std": [1, 2]}, {"resample": 10**100}, {"image_mean": "x" * 10**6},
    ],
)  # fmt: skip
def test_settings_of_absurd_size_raise(tmp_path: Path, change: dict[str, Any]) -> None:
    """Each alone, and their products: a picture of one pixel must not ask for gigabytes."""
    for name, cls in (("preprocessor_config.json", ImageProcessor), ("video_preprocessor_config.json", VideoProcessor)):
        (tmp_path / name).write_text(json.dumps(change))
        with pytest.raises(ValueError) as caught:
            processor = cls.from_pretrained(tmp_path)
            pixel = Image.new("RGB", (1, 1))
            processor(pixel if cls is ImageProcessor else Video([pixel], fps=1.0))
        assert len(str(caught.value)) < 500


def test_products_of_settings_raise(tmp_path: Path) -> None:
    """Each is allowed alone; together they ask for 13 GB for a picture of one pixel."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 1 << 24, "temporal_patch_size": 64}))
    with pytest.raises(ValueError, match="3,221,225,472 values; at most 1,610,612,736 are supported: lower max_pixels"):
        ImageProcessor.from_pretrained(tmp_path)(Image.new("RGB", (1, 1)))


def test_zero_and_null_settings_of_a_call_are_not_ignored() -> None:
    with pytest.raises(ValueError, match="max_pixels must be an integer of at least 1, got 0"):
        ImageProcessor()(torch.zeros(64, 64, 3, dtype=torch.uint8), max_pixels=0)
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    assert torch.equal(ImageProcessor()(image, max_pixels=None).pixel_values, ImageProcessor()(image).pixel_values)
    with pytest.raises(ValueError, match="'max_pixel' = 3 is not implemented"):
        ImageProcessor()(image, max_pixel=3)


# -------------------------------------------------------------------------------------------------- long work in small files


def gif(side: int, frames: int) -> bytes:
    """Frames of side x side pixels, each of which changes one: 22 bytes for each."""
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    one = b"\x21\xf9\x04\x04\x03\x00\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + one * frames + b"\x3b"


def test_small_videos_with_much_to_decode_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    from qwen35moe.processing import video as module

    (tmp_path / "wide.gif").write_bytes(gif(11_000, 3))
    with pytest.raises(ValueError, match="frames of 11000 x 11000 pixels"):
        VideoProcessor()(tmp_path / "wide.gif")
    monkeypatch.setattr(module, "MAX_DECODED", 100 * 200 * 200)
    monkeypatch.setattr(module, "DECODED_PER_BYTE", 20)
    (tmp_path / "long.gif").write_bytes(gif(200, 2000))
    with pytest.raises(ValueError, match="frames of 200 x 200 pixels are too many for a file of this size"):
        VideoProcessor()(tmp_path / "long.gif")
    (tmp_path / "fine.gif").write_bytes(gif(200, 40))
    assert VideoProcessor()(tmp_path / "fine.gif")[0]["video_grid_thw"][0, 0] >= 2


def test_after_an_error_no_thread_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of 40 images is broken: most of the others are not read, and none after the call has ended."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    read: list[Any] = []
    as_rgb = images_module.as_rgb

    def slow(item: Any) -> Any:
        read.append(threading.current_thread().name)
        if isinstance(item, bytes):
            raise ValueError("broken")
        threading.Event().wait(0.005)
        return as_rgb(item)

    monkeypatch.setattr(images_module, "as_rgb", slow)
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="image 0: broken"):
        ImageProcessor()([b"x", *[image] * 40])
    count = len(read)
    assert count < 30 and not any(thread.name in read for thread in threading.enumerate())


# ------------------------------------------------------------------------------------------------------- modes of PIL images


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "LA", "PA", "RGBX", "I;16",
                                  "I;16L", "I;16B"])  # fmt: skip
def test_every_mode_of_an_8_bit_image_is_that_image(mode: str) -> None:
    """The pixels that Pillow shows for it. Its modes I and I;16 keep the values 0..255 of the image that they are made of."""
    grey = mode.startswith("I")
    image = Image.effect_noise((64, 48), 80) if grey else Image.effect_noise((64, 48), 80).convert("RGB")
    converted = image
    for step in {"PA": ["P", "PA"], "I;16": ["I", "I;16"]}.get(mode, ["I", mode] if mode.startswith("I;16") else [mode]):
        converted = converted.convert(step)
    expected = ImageProcessor()(image if grey else converted.convert("RGB"))["pixel_values"]
    assert torch.equal(ImageProcessor()(converted)["pixel_values"], expected)
    assert expected.max() - expected.min() > 1  # not black


def test_values_outside_a_mode_s_range_raise(tmp_path: Path) -> None:
    def values(*numbers: int) -> Any:
        return Image.fromarray(torch.tensor(numbers, dtype=torch.int32).repeat(40, 20).numpy())

    for image, words in ((values(-1, 5), "do not fit in 16 bits"), (values(0, 70_000), "do not fit in 16 bits"),
                         (Image.effect_noise((40, 40), 60).convert("F"), "float pixels must lie in 0..1")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            ImageProcessor()(image)
    dark = Image.frombytes("I;16", (40, 40), torch.full((40, 40), 200, dtype=torch.uint16).numpy().tobytes())
    dark.save(tmp_path / "dark.png")  # a file of 16 bits: 200 of 65,535 is black
    assert ImageProcessor()(tmp_path / "dark.png")["pixel_values"].max() < -0.99


@pytest.mark.parametrize("transparency", [0, (1, 2, 3), b"\x00\x80"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_odd_transparency_is_composited_or_refused(mode: str, transparency: Any) -> None:
    image = Image.effect_noise((64, 48), 80).convert("RGB").convert(mode)
    image.info["transparency"] = transparency
    try:
        values = ImageProcessor()(image)["pixel_values"]
    except ValueError as error:
        assert "cannot be read" in str(error)
    else:
        assert bool((values.abs() <= 1).all()) and values.max() - values.min() > 1


# ------------------------------------------------------------------------------------------------------- ambient state, threads


@pytest.mark.parametrize("setting", ["float64", "bfloat16", "meta"])
def test_ambient_dtype_and_device_change_nothing(folder: Path, setting: str) -> None:
    processor = Processor.from_pretrained(folder)
    content = [{"type": "image", "image": Image.effect_noise((80, 60), 60).convert("RGB")}, {"type": "text", "text": "x"},
               {"type": "video", "video": Video(torch.arange(7 * 40 * 40 * 3).to(torch.uint8).view(7, 40, 40, 3), fps=2.0)},
               {"type": "image", "image": torch.rand(3, 40, 50)}]  # fmt: skip
    chat = [{"role": "user", "content": content}]
    expected = processor.apply_chat_template([chat, chat])
    features = [{"input_ids": [1, 2], "score": 0.5}, {"input_ids": [3], "score": 0.25}]
    scores = processor.tokenizer.pad(features)["score"]
    try:
        torch.set_default_device("meta") if setting == "meta" else torch.set_default_dtype(getattr(torch, setting))
        inputs = Processor.from_pretrained(folder).apply_chat_template([chat, chat])
        again = processor.tokenizer.pad(features)["score"]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert set(inputs) == set(expected) and again.dtype is scores.dtype is torch.float32
    for name, value in expected.items():
        assert inputs[name].dtype is value.dtype and torch.equal(inputs[name], value), name


def test_eight_threads_on_one_processor(folder: Path) -> None:
    """Different values of special=, templates and images at the same time."""
    processor = Processor.from_pretrained(folder, defaults=TRANSFORMERS)
    image = Image.effect_noise((80, 60), 60).convert("RGB")
    text = "say <|im_end|> and <think>"
    jobs: list[Callable[[], Any]] = [
        lambda: processor.tokenizer.encode(text, special=True), lambda: processor.tokenizer.encode(text, special=False),
        lambda: processor.apply_chat_template([{"role": "user", "content": text}])["input_ids"].tolist(),
        lambda: processor.apply_chat_template(CHAT, chat_template="{{ messages[0].content ~ 'a' }}", tokenize=False),
        lambda: processor.image_processor(image)["pixel_values"].sum().item(),
        lambda: processor.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
        lambda: processor.tokenizer.apply_chat_template(CHAT).input_ids, lambda: processor.tokenizer([text, "x"]).input_ids,
    ]  # fmt: skip
    expected = [job() for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for number, result in enumerate(pool.map(lambda n: jobs[n % 8](), range(160))):
            assert result == expected[number % 8]


def test_a_processor_works_in_spawned_workers(folder: Path) -> None:
    """As in a DataLoader with multiprocessing_context="spawn"."""
    import multiprocessing

    processor = Processor.from_pretrained(folder)
    # A method: the worker would import all of this file for a function of it.
    call = methodcaller("apply_chat_template", CHAT, return_tensors=None)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(call, (processor,)) == call(processor)


def test_limits_let_large_ordinary_settings_pass() -> None:
    """The published settings, and images of 100 million pixels."""
    assert PixelSettings(min_pixels=65_536, max_pixels=16_777_216).factor == 32
    large = PixelSettings(max_pixels=1 << 27)
    assert images_module.target_size(8000, 12_000, large, {}) == (8000, 12_000)
