"""Images to the inputs of the vision tower. Needs the extra [vision] (Pillow).

Files are untrusted: only common still-image formats are opened, sizes are checked before decoding, and every decoder error
becomes a ValueError.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..compat import short
from .batch import BatchEncoding
from .files import check_local_file, decoder_errors, item_errors
from .media import Media
from .optional import require
from .pixels import (
    IMAGE_DEFAULTS,
    MAX_PIXELS,
    PixelSettings,
    SettingsAttributes,
    patchify,
    read_settings,
    shown_settings,
    target_size,
    value_table,
    write_values,
)

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "MPO", "AVIF")
MAX_DATA = 1 << 27  # characters of a data: address
_PROGRESS_FROM = 8  # number of images from which a progress bar is shown


def pillow() -> Any:
    """The module PIL.Image. ModuleNotFoundError names the extra that installs it."""
    return require("PIL.Image", "images need the package Pillow", "vision")


class ImageProcessor(SettingsAttributes):
    """Images to pixel_values and image_grid_thw.

        processor = ImageProcessor.from_pretrained(folder)
        inputs = processor(["cat.png", array])        # pixel_values [patches, 3 * f * p * p] float32, image_grid_thw [n, 3]

    An image is a path, the bytes of a file, a data: address of an image in base64, a PIL image, or an array or tensor
    [height, width], [height, width, channels] or [channels, height, width] of uint8, 16-bit integers or floats in 0..1. EXIF
    orientation is applied, transparency is composited on white, 16 bits become 8 bits by rounding value / 257. Pixel values
    equal those of transformers' Pillow-based Qwen2VLImageProcessor bit for bit.
    """

    def __init__(self, settings: PixelSettings = IMAGE_DEFAULTS) -> None:
        self.settings = settings

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **changes: Any) -> ImageProcessor:
        """Settings from preprocessor_config.json or processor_config.json. ValueError if the folder has neither."""
        settings = read_settings(Path(folder), "image")
        if settings is None:
            raise ValueError(f"{folder} has no preprocessor_config.json: the settings for images are missing")
        return cls(settings.with_values(changes, "from_pretrained"))

    def __call__(
        self, images: Any, *, progress: bool = False, return_tensors: str | None = "pt", **changes: Any
    ) -> BatchEncoding:
        """{"pixel_values", "image_grid_thw"} of one image or of a list, which may be nested.

        progress: show a bar for 8 or more images if stderr is a terminal. changes: settings of this call (max_pixels=...).
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors must be 'pt', got {short(return_tensors)}")
        return BatchEncoding(self.process([Media("image", item) for item in flatten(images)], changes, progress=progress))

    def process(self, images: Sequence[Media], changes: dict[str, Any], *, progress: bool = False) -> dict[str, Tensor]:
        """The same of images with settings of their own; changes: settings of this call."""
        pillow()
        settings = self.settings.with_values(changes, "images")
        if not images:
            raise ValueError("no images")
        bar = tqdm(total=len(images), unit="image", leave=False,
                   disable=None if progress and len(images) >= _PROGRESS_FROM else True)  # fmt: skip
        processed: list[tuple[Tensor, tuple[int, int]]] = []
        pool = ThreadPoolExecutor(max(1, min(len(images), torch.get_num_threads())))
        try:
            with bar:
                for result in pool.map(lambda item: self._process(item[0], item[1], settings), enumerate(images)):
                    processed.append(result)
                    bar.update()
        finally:  # after an error, images that wait are not read any more; the call ends when no thread reads
            pool.shutdown(wait=True, cancel_futures=True)
        frames = [[patches] * settings.temporal_patch_size for patches, _ in processed]
        grids = torch.tensor([(1, *grid) for _, grid in processed], dtype=torch.int64, device="cpu")
        return {"pixel_values": pixel_values(frames, settings, fused=False), "image_grid_thw": grids}

    def _process(self, index: int, media: Media, settings: PixelSettings) -> tuple[Tensor, tuple[int, int]]:
        """(patches [n, 3, p, p] uint8, (rows, columns) of patches)."""
        with item_errors("image", index, media.item):
            own = {name: value for name, value in media.settings.items() if not name.startswith("resized")}
            settings = settings.with_values(own, "its block") if own else settings
            image = as_rgb(media.item)
            height, width = target_size(image.height, image.width, settings, media.settings)
            if settings.do_resize:
                image = image.resize((width, height), pillow().Resampling.BICUBIC)
        p = settings.patch_size
        return patchify(to_tensor(image), settings), (image.height // p, image.width // p)

    def __repr__(self) -> str:
        return f"ImageProcessor({shown_settings(self.settings)})"


def flatten(images: Any) -> Iterator[Any]:
    """The images of a nested list, in order; a single image as it is."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from flatten(image)
    else:
        yield images


def to_tensor(image: Any) -> Tensor:
    """[H, W, 3] uint8 of a PIL image of mode RGB."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def pixel_values(items: Sequence[Sequence[Tensor]], settings: PixelSettings, *, fused: bool) -> Tensor:
    """[patches, 3 * f * p * p] float32 of items, each f frames of patches [n, 3, p, p] uint8. fused: see `value_table`."""
    table = value_table(settings, fused=fused)
    width = 3 * settings.temporal_patch_size * settings.patch_size**2
    out, start = torch.empty(sum(len(frames[0]) for frames in items), width, dtype=torch.float32, device="cpu"), 0
    for frames in items:
        end = start + len(frames[0])
        write_values(frames, table, out[start:end])
        start = end
    return out


# ------------------------------------------------------------------------------------------------------------- decoding


def as_rgb(image: Any) -> Any:
    """A PIL image of mode RGB. ValueError if the image cannot be read or is too large."""
    library = pillow()
    if isinstance(image, str) and image.startswith("data:"):
        return as_rgb(image_of_data(image))
    if isinstance(image, (str, os.PathLike)):
        check_local_file(image)
        return _decode(lambda: library.open(image, formats=_formats(library)))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(lambda: library.open(io.BytesIO(image), formats=_formats(library)))
    if isinstance(image, library.Image):
        return _decode(lambda: image)
    if isinstance(image, Tensor) or hasattr(image, "__array_interface__"):
        return _from_tensor(image if isinstance(image, Tensor) else torch.as_tensor(image.copy(), device="cpu"))
    raise ValueError(f"an image is a path, bytes, a PIL image, an array or a tensor, got {type(image).__name__}")


def image_of_data(address: str) -> bytes:
    """The bytes of "data:image/png;base64,...". ValueError for any other address."""
    head, separator, content = address.partition(",")
    kind = head[len("data:") :].lower()
    if not separator or not kind.endswith(";base64") or not kind.startswith(("image/", "image;")):
        raise ValueError(f"a data: address of an image is data:image/png;base64,..., got {short(address)}")
    if len(content) > MAX_DATA:
        raise ValueError(f"a data: address of {len(content):,} characters; at most {MAX_DATA:,} are read")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"a data: address that is no base64: {str(error)[:100]}") from None


def _formats(library: Any) -> list[str]:
    library.init()
    return [name for name in FORMATS if name in library.OPEN]


def _decode(open_image: Any) -> Any:
    """Open, check the size, decode, apply the EXIF orientation, convert to RGB."""
    from PIL import ImageOps

    with decoder_errors():
        image = open_image()
        width, height = image.size
        if width < 1 or height < 1 or width * height > MAX_PIXELS:
            raise ValueError(f"{height} x {width} pixels; 1 to {MAX_PIXELS:,} pixels are supported")
        return _to_rgb(ImageOps.exif_transpose(image), image.format)


def _to_rgb(image: Any, form: str | None = None) -> Any:
    """form: the format of the file, None for an image made in memory."""
    library = pillow()
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
        # Files of 16 bits are white at 65,535. Pillow makes these modes of 8-bit images too, with their values, up to 255.
        eight = form in (None, "TIFF") and bool(((values >= 0) & (values <= 255)).all())
        eight = eight and not (form and image.mode != "I")
        values = values.view(image.height, image.width)
        return _from_tensor(values.to(torch.uint8)) if eight else _from_tensor(values, bits=16)
    if image.mode == "F":
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32)
        return _from_tensor(values.view(image.height, image.width))
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return library.alpha_composite(library.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def _from_tensor(image: Tensor, bits: int | None = None) -> Any:
    """A PIL image of [height, width], [height, width, channels] or [channels, height, width]; 1, 3 or 4 (RGBA) channels."""
    library, shape = pillow(), tuple(image.shape)
    if image.dim() == 2:
        image = image[..., None]
    elif image.dim() != 3 or (shape[0] in (1, 3, 4)) == (shape[-1] in (1, 3, 4)):
        raise ValueError(f"an image is [height, width] or has 1, 3 or 4 channels as its first or last axis, got {list(shape)}")
    elif shape[0] in (1, 3, 4):
        image = image.permute(1, 2, 0)
    height, width, channels = image.shape
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels; 1 to {MAX_PIXELS:,} pixels are supported")
    data = bytearray(image.numel())
    torch.frombuffer(data, dtype=torch.uint8).copy_(_to_uint8(image.detach().cpu(), bits).reshape(-1))
    return _to_rgb(library.frombytes({1: "L", 3: "RGB", 4: "RGBA"}[channels], (width, height), bytes(data)))


def _to_uint8(image: Tensor, bits: int | None) -> Tensor:
    """uint8 of integers of 8 or 16 bits, or of floats in 0..1."""
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.uint16 or bits == 16:
        image = image.to(torch.int32)
        if bool(((image < 0) | (image > 65_535)).any()):
            raise ValueError(f"values {int(image.min())}..{int(image.max())} do not fit in 16 bits")
        return ((image + 128) // 257).to(torch.uint8)  # value / 257 rounded: 65535 gives exactly 255
    if not image.is_floating_point():
        raise ValueError(f"pixels are uint8, uint16 or floats in 0..1, got {image.dtype}")
    if not bool(((image >= 0) & (image <= 1)).all()):
        low, high = float(image.min()), float(image.max())
        raise ValueError(f"float pixels must lie in 0..1, got {low:.4g}..{high:.4g}: divide by 255, or pass uint8")
    return (image.float() * 255).round().to(torch.uint8)
