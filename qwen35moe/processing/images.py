"""Images to what the vision tower takes. Needs the extra [vision] (Pillow).

Files are untrusted: only common still formats are opened, sizes are looked at before anything is decoded, and whatever a
decoder raises becomes a ValueError.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .pixels import (
    IMAGE_DEFAULTS,
    MAX_PIXELS,
    PixelSettings,
    check_divides,
    fitted_size,
    into_patches,
    read_settings,
    value_table,
    write_values,
)

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "MPO", "AVIF")
_MANY = 8  # from so many images on, progress is worth showing


def pillow() -> Any:
    """The module PIL.Image. ModuleNotFoundError says how to get it."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        raise ModuleNotFoundError("images need the package Pillow: pip install 'qwen35moe[vision]'", name="PIL") from None
    return Image


class ImageProcessor:
    """Images, of whatever kind, to pixel_values and image_grid_thw.

        processor = ImageProcessor.from_pretrained(folder)
        inputs = processor(["cat.png", array])        # pixel_values [patches, 3 * T * p * p] float32, image_grid_thw [n, 3]

    An image is a path, bytes of a file, a PIL image, or an array or tensor [H, W], [H, W, C] or [C, H, W] of bytes,
    16-bit integers or floats in 0..1. Orientation in EXIF is obeyed, transparency laid on white, 16 bits reduced to 8 by
    rounding value / 257. Pixel values are those of transformers' Pillow-based Qwen2VLImageProcessor, bit for bit.
    """

    def __init__(self, settings: PixelSettings = IMAGE_DEFAULTS) -> None:
        self.settings = settings

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> ImageProcessor:
        """Settings from preprocessor_config.json (or processor_config.json). ValueError where the folder has neither."""
        settings = read_settings(Path(folder), "image")
        if settings is None:
            raise ValueError(f"{folder} holds no preprocessor_config.json: this checkpoint does not say how it sees images")
        return cls(settings)

    def __call__(self, images: Any, *, progress: bool = False, **changes: Any) -> dict[str, Tensor]:
        """{"pixel_values", "image_grid_thw"} of one image or of a list (which may be nested).

        progress: show a bar where there are many and stderr is a terminal. changes: settings for this call (max_pixels=...).
        """
        pillow()
        settings = replace(self.settings, **changes)
        given = list(flat(images))
        if not given:
            raise ValueError("no image was given")
        bar = tqdm(total=len(given), unit="image", leave=False, disable=None if progress and len(given) >= _MANY else True)
        with bar, ThreadPoolExecutor(max(1, min(len(given), torch.get_num_threads()))) as pool:
            found: list[tuple[Tensor, tuple[int, int]]] = []
            for each in pool.map(lambda numbered: self._one(numbered[0], numbered[1], settings), enumerate(given)):
                found.append(each)
                bar.update()
        still = [[patches] * settings.temporal_patch_size for patches, _ in found]
        grids = torch.tensor([(1, *grid) for _, grid in found])
        return {"pixel_values": values_of(still, settings, fused=False), "image_grid_thw": grids}

    def _one(self, number: int, image: Any, settings: PixelSettings) -> tuple[Tensor, tuple[int, int]]:
        """(patches [n, 3, p, p] of bytes, (rows, columns) of patches)."""
        try:
            picture = as_rgb(image)
            if settings.do_resize:
                rows, columns = fitted_size(picture.height, picture.width, settings)
                picture = picture.resize((columns, rows), pillow().Resampling.BICUBIC)
            check_divides(picture.height, picture.width, settings)
        except ValueError as error:
            what = f" ({os.fspath(image)})" if isinstance(image, (str, os.PathLike)) else ""
            raise ValueError(f"image {number}{what}: {error}") from error
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
        p = settings.patch_size
        return into_patches(pixels, settings), (picture.height // p, picture.width // p)


def flat(images: Any) -> Iterator[Any]:
    """One picture, or those of a list, in order."""
    if isinstance(images, (list, tuple)):
        for each in images:
            yield from flat(each)
    else:
        yield images


def values_of(items: Sequence[Sequence[Tensor]], settings: PixelSettings, *, fused: bool) -> Tensor:
    """[patches, 3 * T * p * p] float32 of items, each T frames of patches [n, 3, p, p] of bytes."""
    table = value_table(settings, fused=fused)
    width = 3 * settings.temporal_patch_size * settings.patch_size**2
    out, at = torch.empty(sum(len(frames[0]) for frames in items), width), 0
    for frames in items:
        write_values(frames, table, out[at : at + len(frames[0])])
        at += len(frames[0])
    return out


# ------------------------------------------------------------------------------------------------------------- opening


def as_rgb(image: Any) -> Any:
    """A PIL image of mode RGB from anything that may be given. ValueError when it cannot be read or is too large."""
    library = pillow()
    if isinstance(image, (str, os.PathLike)):
        if str(image).startswith(("http://", "https://", "data:")):
            raise ValueError("addresses are not fetched: download the file and give its path")
        if not Path(image).is_file():
            raise ValueError("there is no such file")
        return _upright(lambda: library.open(image, formats=_formats(library)))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _upright(lambda: library.open(io.BytesIO(image), formats=_formats(library)))
    if isinstance(image, library.Image):
        return _upright(lambda: image)
    if isinstance(image, Tensor) or hasattr(image, "__array_interface__"):
        return _from_tensor(image if isinstance(image, Tensor) else torch.as_tensor(image.copy()))
    raise ValueError(f"an image is a path, bytes, a PIL image, an array or a tensor, got {type(image).__name__}")


def _formats(library: Any) -> list[str]:
    library.init()
    return [each for each in FORMATS if each in library.OPEN]


def _upright(opened: Any) -> Any:
    """Decode, turn as EXIF says, and bring to RGB."""
    from PIL import ImageOps

    try:
        image = opened()
        width, height = image.size
        if width < 1 or height < 1 or width * height > MAX_PIXELS:
            raise ValueError(f"it has {height} x {width} pixels; 1 to {MAX_PIXELS:,} in all are accepted")
        return _colours(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise anything on damaged files
        said = str(error) if isinstance(error, (ValueError, OSError)) and str(error) else f"{type(error).__name__}: {error}"
        raise ValueError(f"it cannot be read: {said}") from error


def _colours(image: Any) -> Any:
    library = pillow()
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
        return _from_tensor(values.view(image.height, image.width), bits=16)
    if image.mode == "F":
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32)
        return _from_tensor(values.view(image.height, image.width))
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return library.alpha_composite(library.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def _from_tensor(image: Tensor, bits: int | None = None) -> Any:
    """A PIL image of [H, W], [H, W, C] or [C, H, W] with C = 1, 3 or 4 (the fourth is opacity)."""
    library, shape = pillow(), tuple(image.shape)
    if image.dim() == 2:
        image = image[..., None]
    elif image.dim() != 3 or (shape[0] in (1, 3, 4)) == (shape[-1] in (1, 3, 4)):
        raise ValueError(f"an image is [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, got {list(shape)}")
    elif shape[0] in (1, 3, 4):
        image = image.permute(1, 2, 0)
    height, width, channels = image.shape
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"it has {height} x {width} pixels; 1 to {MAX_PIXELS:,} in all are accepted")
    data = bytearray(image.numel())
    torch.frombuffer(data, dtype=torch.uint8).copy_(_bytes(image.detach().cpu(), bits).reshape(-1))
    return _colours(library.frombytes({1: "L", 3: "RGB", 4: "RGBA"}[channels], (width, height), bytes(data)))


def _bytes(image: Tensor, bits: int | None) -> Tensor:
    """uint8 of integers of 8 or 16 bits, or of floats in 0..1."""
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.uint16 or bits == 16:
        image = image.to(torch.int32)
        if bool(((image < 0) | (image > 65_535)).any()):
            raise ValueError(f"its values {int(image.min())}..{int(image.max())} are not those of 16 bits")
        return ((image + 128) // 257).to(torch.uint8)  # value / 257 rounded: 65535 is 255 exactly
    if not image.is_floating_point():
        raise ValueError(f"pixels are uint8, uint16 or floats in 0..1, got {image.dtype}")
    if not bool(((image >= 0) & (image <= 1)).all()):
        low, high = float(image.min()), float(image.max())
        raise ValueError(f"floating pixels lie in 0..1, got {low:.4g}..{high:.4g}: divide by 255, or give uint8")
    return (image.float() * 255).round().to(torch.uint8)

