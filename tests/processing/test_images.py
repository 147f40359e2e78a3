"""processing/images.py: pixel values against transformers' Pillow-based processor, kinds of images, and refused inputs."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35moe.processing import ImageProcessor
from qwen35moe.processing.images import as_rgb, pixel_values
from qwen35moe.processing.pixels import (
    MAX_PIXELS,
    PixelSettings,
    images_from_values,
    patchify,
    read_settings,
    smart_resize,
    unpatchify,
    value_table,
)
from tests.conftest import count_calls

Image = pytest.importorskip("PIL.Image")
PUBLISHED = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "temporal_patch_size": 2,
             "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
ODD = {"size": {"shortest_edge": 5000, "longest_edge": 40_000}, "patch_size": 7, "temporal_patch_size": 3, "merge_size": 3,
       "image_mean": [0.48, 0.45, 0.40], "image_std": [0.26, 0.27, 0.28]}  # fmt: skip


def noise(height: int, width: int, mode: str = "RGB") -> Any:
    channels = len(Image.new(mode, (1, 1)).getbands())
    data = torch.randint(0, 256, (height * width * channels,), dtype=torch.uint8)
    return Image.frombytes(mode, (width, height), bytes(data.tolist()))


def theirs(settings: dict[str, Any]) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**settings)


def ours(settings: dict[str, Any]) -> ImageProcessor:
    return ImageProcessor(PixelSettings().with_values(settings, "test"))


@pytest.mark.parametrize("settings", [PUBLISHED, ODD], ids=["published", "odd"])
def test_pixel_values_equal_transformers_bit_for_bit(settings: dict[str, Any]) -> None:
    images = [noise(h, w) for h, w in [(31, 37), (300, 113), (64, 64), (257, 511), (5, 90), (21, 42), (640, 33)]]
    images += [noise(45, 67, mode) for mode in ("L", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "P", "1", "RGBX")]
    palette = noise(50, 70).convert("P", palette=Image.Palette.ADAPTIVE, colors=17)
    palette.info["transparency"] = 3
    expected = theirs(settings)([*images, palette], return_tensors="pt")
    inputs = ours(settings)([*images, palette])
    assert torch.equal(inputs["image_grid_thw"], expected["image_grid_thw"])
    assert inputs["image_grid_thw"].dtype == torch.int64 and inputs["pixel_values"].dtype == torch.float32
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("off", [{"do_rescale": False}, {"do_normalize": False}, {"do_resize": False}, {"max_pixels": 9000}])
def test_switches_and_arrays_equal_transformers(off: dict[str, Any]) -> None:
    array = torch.randint(0, 256, (42, 63, 3), dtype=torch.uint8)
    images = [array.numpy(), array.permute(2, 0, 1), array.numpy()[..., 0]]
    settings = ODD | off
    if "max_pixels" in off:
        settings = settings | {"size": {"shortest_edge": 5000, "longest_edge": 9000}}
        settings.pop("max_pixels")
    expected = theirs(settings)([*images[:2], Image.fromarray(images[2])], return_tensors="pt")
    assert torch.equal(ours(ODD | off)(images)["pixel_values"], expected["pixel_values"])


def test_patch_order_follows_the_definition() -> None:
    settings = PixelSettings().with_values(ODD | {"do_resize": False}, "test")
    image = torch.randint(0, 256, (42, 63, 3), dtype=torch.uint8)
    rows = patchify(image, settings)
    m, p, at = 3, 7, 0
    for group_row in range(42 // 21):
        for group_column in range(63 // 21):
            for row in range(m):
                for column in range(m):
                    y, x = (group_row * m + row) * p, (group_column * m + column) * p
                    assert torch.equal(rows[at], image[y : y + p, x : x + p].permute(2, 0, 1))
                    at += 1
    values = ImageProcessor(settings)(image)["pixel_values"]
    exact = (rows.double() / 255 - torch.tensor(ODD["image_mean"]).view(3, 1, 1)) / torch.tensor(ODD["image_std"]).view(3, 1, 1)
    expected = exact[:, :, None].expand(-1, -1, 3, -1, -1).reshape(len(rows), -1)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=5e-7)
    assert value_table(settings, fused=True).sub(value_table(settings, fused=False)).abs().max() < 5e-7


@pytest.mark.parametrize("m, p", [(1, 5), (2, 3), (3, 7)])
def test_unpatchify_inverts_patchify(m: int, p: int) -> None:
    settings = PixelSettings(patch_size=p, merge_size=m)
    for rows, columns in ((m, m), (2 * m, 3 * m), (5 * m, m)):
        image = torch.randint(0, 256, (rows * p, columns * p, 3), dtype=torch.uint8)
        assert torch.equal(unpatchify(patchify(image, settings), rows, columns, settings), image)
    with pytest.raises(ValueError, match=rf"\[{4 * m * m}, 3, {p}, {p}\], got \[{5 * m * m}, 3, {p}, {p}\]"):
        unpatchify(patchify(image, settings), 2 * m, 2 * m, settings)
    if m > 1:
        with pytest.raises(ValueError, match=f"{5 * m * m} x 1 patches, multiples of {m}"):
            unpatchify(patchify(image, settings), 5 * m * m, 1, settings)


@pytest.mark.parametrize("off", [{}, {"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}])
@pytest.mark.parametrize("fused", [False, True])
def test_images_from_values_recovers_the_bytes(off: dict[str, Any], fused: bool) -> None:
    """All 256 bytes in all channels, in six frames, with both roundings."""
    settings = PixelSettings().with_values(ODD | off, "test")
    frames = torch.arange(256, dtype=torch.uint8).repeat(250)[: 6 * 42 * 63 * 3].view(6, 42, 63, 3)[:, :, :, [2, 0, 1]]
    assert all(len(frames[..., channel].unique()) == 256 for channel in range(3))
    patches = [patchify(frame.contiguous(), settings) for frame in frames]
    values = pixel_values([patches[:3], patches[3:]], settings, fused=fused)
    assert torch.equal(images_from_values(values, (2, 6, 9), settings), frames)
    with pytest.raises(ValueError, match=r"1 x 6 x 9 patches has values \[54, 441\], got \[108, 441\]"):
        images_from_values(values, (1, 6, 9), settings)


@pytest.mark.parametrize("frames", [None, 2, 5, 60])
def test_sizes_equal_transformers(frames: int | None) -> None:
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as image_processing

    settings = PixelSettings(min_pixels=4000, max_pixels=900_000, patch_size=7, merge_size=3)
    for height in (1, 9, 20, 31, 32, 33, 170, 1000, 3001):
        for width in (10, 21, 47, 48, 100, 1999):
            if max(height, width) / min(height, width) > 200:
                continue
            if frames is None:
                expected = image_processing.smart_resize(height, width, 21, 4000, 900_000)
            else:
                expected = their_video_size(frames, height, width)
            assert smart_resize(height, width, settings, frames) == tuple(expected), (height, width)


def their_video_size(frames: int, height: int, width: int) -> tuple[int, int]:
    """transformers' rule for videos. Its module needs torchvision, so the function's source is executed."""
    import ast
    import importlib.util
    import math

    file = Path(importlib.util.find_spec("transformers").origin).parent / "models/qwen3_vl/video_processing_qwen3_vl.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "smart_resize")
    space: dict[str, Any] = {"math": math}
    exec(compile(ast.Module([function], []), str(file), "exec"), space)
    return space["smart_resize"](frames, height, width, temporal_factor=2, factor=21, min_pixels=4000, max_pixels=900_000)


# -------------------------------------------------------------------------------------------------------- kinds of images


def encoded(image: Any, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_sixteen_bit_and_float_images_equal_their_eight_bit_form(tmp_path: Path) -> None:
    """Pillow's own conversion of 16 bits clips values above 255 to white; ours maps 65535 to white."""
    deep = torch.randint(0, 65_536, (40, 52)).to(torch.int32)
    eight = ((deep.double() / 257).round()).to(torch.uint8)
    png = Image.frombytes("I;16", (52, 40), deep.to(torch.uint16).numpy().tobytes())
    png.save(tmp_path / "deep.png")
    expected = ours(ODD)(eight)["pixel_values"]
    same = [tmp_path / "deep.png", png, deep.to(torch.uint16), deep.to(torch.uint16).numpy(), Image.fromarray(deep.numpy())]
    same += [eight.float() / 255, Image.fromarray((eight.float() / 255).numpy()), eight[None], eight[..., None]]
    for image in same:
        assert torch.equal(ours(ODD)(image)["pixel_values"], expected)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = noise(30, 50)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    turned = as_rgb(encoded(image, "PNG", exif=exif))
    assert turned.size == (30, 50)
    assert turned.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_files_bytes_and_nested_lists(tmp_path: Path) -> None:
    image = noise(40, 60)
    expected = ours(ODD)(image)["pixel_values"]
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        file = tmp_path / f"a.{kind}"
        file.write_bytes(encoded(image, kind))
        inputs = ours(ODD)([[file, str(file)], [file.read_bytes()]])
        assert torch.equal(inputs["pixel_values"], expected.repeat(3, 1)), kind
    animated = encoded(image, "GIF", save_all=True, append_images=[noise(40, 60)])
    assert torch.equal(ours(ODD)(animated)["pixel_values"], ours(ODD)(encoded(image, "GIF"))["pixel_values"])


def test_images_processed_in_parallel_keep_their_order() -> None:
    images = [torch.full((42, 42, 3), shade, dtype=torch.uint8) for shade in range(40)]
    with count_calls(ImageProcessor, "_process") as done:
        values = ours(ODD | {"do_normalize": False})(images, progress=True)["pixel_values"]
    assert done.count == 40
    assert (values.view(40, -1)[:, 0] * 255).round().tolist() == list(range(40))


# ---------------------------------------------------------------------------------------------------------------- refused


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "image, words",
    [
        (png_header(60_000, 60_000), "cannot be read"),
        (png_header(MAX_PIXELS // 1024 + 1, 1024), f"1024 x {MAX_PIXELS // 1024 + 1} pixels"),
        (png_header(0, 5), "cannot be read"),
        (b"", "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),  # Pillow would start Ghostscript
        (torch.zeros(3, 0, 7), "0 x 7 pixels"),
        (torch.zeros(401, 2, dtype=torch.uint8), "the aspect ratio is above 200"),
        (torch.zeros(3, 9, 3), r"got \[3, 9, 3\]"),
        (torch.zeros(2, 9, 9), r"got \[2, 9, 9\]"),
        (torch.full((9, 9), 200.0), "float pixels must lie in 0..1, got 200..200"),
        (torch.full((9, 9), float("nan")), "float pixels must lie in 0..1"),
        (torch.zeros(9, 9, dtype=torch.int64), "got torch.int64"),
        (7, "got int"),
        ("no/such.png", "no such file"),
        ("https://somewhere/cat.png", "URLs are not downloaded"),
    ],
)
def test_refused_images(image: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)image 1.*{words}"):
        ours(ODD)([torch.zeros(9, 9), image])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_from_its_header() -> None:
    """Nothing is decoded, so no memory of the claimed size is allocated."""
    with count_calls(Image.Image, "load") as loads, pytest.raises(ValueError, match="pixels"):
        as_rgb(png_header(MAX_PIXELS // 1024 + 1, 1024))
    # Other images may be loaded by threads that an earlier test left running.
    assert not [image.size for (image, *_), _ in loads.arguments if image.width * image.height > MAX_PIXELS]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch_size": 0}, "patch_size must be"),
        ({"resample": 2}, "resample 2"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must be positive"),
        ({"image_mean": [0.5]}, "3 values"),
        ({"size": {"height": 3}}, "size must hold"),
        ({"size": {"shortest_edge": 9, "longest_edge": 8}}, "min_pixels 9"),
        ({"cap_pixels_per_frame": True}, "cap_pixels_per_frame"),
        ({"merge_size": "2"}, "merge_size must be"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED | changes))
    with pytest.raises(ValueError, match=words):
        ImageProcessor.from_pretrained(tmp_path)


def test_sources_of_the_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no preprocessor_config.json"):
        ImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED | {"image_processor_type": "x"}))
    published = read_settings(tmp_path, "image")
    assert published == PixelSettings()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": ODD, "processor_class": "y"}))
    assert read_settings(tmp_path, "image").patch_size == 7
    assert read_settings(tmp_path, "video") is None
    (tmp_path / "preprocessor_config.json").write_text("[]")
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="must hold an object, got list"):
        read_settings(tmp_path, "image")
