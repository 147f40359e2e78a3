"""From pictures of any size to the patches that the vision tower takes: how large, in which order, with which values.

    value = (byte / 255 - mean) / std          row = one patch, its values in the order [C, T, p, p]

C channels, T frames that a patch covers, p its side in pixels. The rows of a frame come in groups of m x m neighbours,
because the tower merges each such group into one token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_ASPECT = 200  # a longer side more than so many times the shorter one is refused, as in transformers
MAX_PIXELS = 1 << 27  # of one picture in a file (134 million): more is taken for a decompression bomb
BICUBIC = 3  # as Pillow numbers its filters

# Keys of the files that say nothing about the pixels, or what the code below does anyway.
_INERT = {
    *("processor_class", "image_processor_type", "video_processor_type", "feature_extractor_type", "auto_map", "backend"),
    *("do_convert_rgb", "default_to_square", "data_format", "input_data_format", "device", "disable_grouping"),
    *("return_tensors", "return_metadata", "return_row_col_info", "max_image_size", "video_metadata", "_processor_class"),
    *("max_video_tokens", "max_duration"),
}


@dataclass(frozen=True)
class PixelSettings:
    """What preprocessor_config.json and video_preprocessor_config.json say. Pixels of a video count over all frames."""

    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_sample_frames: bool = True
    fps: float = 2.0
    num_frames: int | None = None  # a fixed number of frames instead of fps
    min_frames: int = 4
    max_frames: int = 768

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels", "min_frames", "max_frames"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.num_frames is not None and (not isinstance(self.num_frames, int) or self.num_frames < 1):
            raise ValueError(f"num_frames must be a whole number of at least 1 or absent, got {self.num_frames!r}")
        for name in ("rescale_factor", "fps", "image_std"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(each, (int, float)) and 0 < each < math.inf for each in numbers):
                raise ValueError(f"{name} must be positive, got {value!r}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ValueError(f"image_mean {self.image_mean} and image_std {self.image_std} must have 3 values, for 3 channels")
        if not all(isinstance(each, (int, float)) and abs(each) < math.inf for each in self.image_mean):
            raise ValueError(f"image_mean must hold numbers, got {self.image_mean!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")

    @property
    def factor(self) -> int:
        """Sides are multiples of this: a token is so many pixels wide."""
        return self.patch_size * self.merge_size

    def with_values(self, given: dict[str, Any], where: str) -> PixelSettings:
        """These settings with what a file (or a caller) says. ValueError names a key that is not implemented."""
        values, known = dict(given), {each.name for each in fields(self)}
        size = values.pop("size", None) or {}
        if not isinstance(size, dict) or set(size) - {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}:
            raise ValueError(f"{where}: size must hold shortest_edge and longest_edge (numbers of pixels), got {size!r}")
        for name, old in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            found = values.get(name) or size.get(name) or size.get(old)
            if found is not None:
                values[name] = found
        if values.pop("resample", BICUBIC) not in (None, BICUBIC):
            raise ValueError(f"{where}: resample {given['resample']!r} is not implemented; bicubic ({BICUBIC}) is")
        for name in [name for name in values if name not in known]:
            if name in _INERT or not values[name]:
                values.pop(name)
                continue
            raise ValueError(f"{where}: {name} = {values[name]!r} is not implemented")
        for name in ("image_mean", "image_std"):
            if isinstance(found := values.get(name), (int, float)):
                values[name] = (found,) * 3
            elif isinstance(found, list):
                values[name] = tuple(found)
        values = {name: value for name, value in values.items() if value is not None}
        try:
            return replace(self, **values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


IMAGE_DEFAULTS = PixelSettings()
VIDEO_DEFAULTS = PixelSettings(min_pixels=4_096, max_pixels=25_165_824)


def read_settings(folder: Path, kind: str) -> PixelSettings | None:
    """The settings for kind "image" or "video" in a checkpoint's folder; None where no file has any.

    A part of processor_config.json (as transformers 5 saves it) comes before the published file of its own.
    """
    defaults = VIDEO_DEFAULTS if kind == "video" else IMAGE_DEFAULTS
    own = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}[kind]
    for name in ("processor_config.json", own):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no JSON: {error}") from error
        if name != own:
            values = values.get(f"{kind}_processor") if isinstance(values, dict) else None
            if values is None:
                continue
        if not isinstance(values, dict):
            raise ValueError(f"{file} must hold an object, got {type(values).__name__}")
        return defaults.with_values(values, str(file))
    return None


def fitted_size(height: int, width: int, settings: PixelSettings, frames: int | None = None) -> tuple[int, int]:
    """The size [height, width] that a picture is brought to: multiples of patch * merge, nearly its own shape, with
    min_pixels <= pixels <= max_pixels. For a video of `frames` frames the pixels of all frames count.

    Qwen's rule: round both sides; if that is too much or too little, scale both by the same factor first.
    """
    factor, count = settings.factor, frames or 1
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height} x {width} pixels has nothing to show")
    if frames is not None and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(f"a picture of {height} x {width} pixels is more than {MAX_ASPECT} times as long as wide: crop it")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    counted = 1 if frames is None else round(frames / settings.temporal_patch_size) * settings.temporal_patch_size
    if counted * rows * columns > settings.max_pixels:
        shrink = math.sqrt(count * height * width / settings.max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif counted * rows * columns < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (count * height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return max(rows, factor), max(columns, factor)


def check_divides(height: int, width: int, settings: PixelSettings) -> None:
    """ValueError unless the sides are whole tokens, for pictures that are not resized."""
    if height % settings.factor or width % settings.factor or not height * width:
        raise ValueError(
            f"a picture of {height} x {width} pixels does not divide into tokens of {settings.factor} x {settings.factor}: "
            "resize it, or leave do_resize on"
        )


def value_table(settings: PixelSettings, *, fused: bool) -> Tensor:
    """[3, 256] float32: what each byte becomes in each channel.

    transformers rounds differently in its two ways of doing this, and a table holds either exactly: images through
    Pillow are scaled in float64 and normalised in float32; videos have the scale folded into mean and deviation (`fused`).
    """
    byte = torch.arange(256)
    mean, std = (torch.tensor(each, dtype=torch.float32)[:, None] for each in (settings.image_mean, settings.image_std))
    if fused and settings.do_rescale and settings.do_normalize:
        undo = 1.0 / settings.rescale_factor
        return (byte.float() - mean * undo) / (std * undo)
    if fused and settings.do_rescale:
        values = byte * settings.rescale_factor
    else:
        values = (byte.double() * settings.rescale_factor).float() if settings.do_rescale else byte.float()
    return (values - mean) / std if settings.do_normalize else values.expand(3, -1)


def into_patches(picture: Tensor, settings: PixelSettings) -> Tensor:
    """[patches, 3, p, p] bytes of a picture [H, W, 3], in the tower's order: groups of m x m neighbours, row by row."""
    height, width, _ = picture.shape
    p, m = settings.patch_size, settings.merge_size
    split = picture.view(height // (p * m), m, p, width // (p * m), m, p, 3)
    return split.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, p, p)


def from_patches(patches: Tensor, rows: int, columns: int, settings: PixelSettings) -> Tensor:
    """The picture [rows * p, columns * p, 3] of patches [rows * columns, 3, p, p] in the tower's order, of any dtype:
    the inverse of `into_patches`. rows and columns count patches. ValueError where that is not their number."""
    p, m = settings.patch_size, settings.merge_size
    if rows % m or columns % m or list(patches.shape) != [rows * columns, 3, p, p]:
        raise ValueError(
            f"{rows} x {columns} patches, multiples of {m}, are [{rows * columns}, 3, {p}, {p}], got {list(patches.shape)}: "
            "these are other settings than the picture was cut with"
        )
    groups = patches.reshape(rows // m, columns // m, m, m, 3, p, p)
    return groups.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * p, columns * p, 3)


def pictures_of(values: Tensor, grid: tuple[int, int, int], settings: PixelSettings) -> Tensor:
    """The pictures [t * T, rows * p, columns * p, 3] in bytes that became the rows of pixel_values of one item.

    values [t * rows * columns, 3 * T * p * p], grid (t, rows, columns) as in image_grid_thw or video_grid_thw:
    byte = 255 (value std + mean), rounded. What a processor made comes back bit for bit. ValueError where shapes differ.
    """
    t, rows, columns = grid
    p, pictures = settings.patch_size, settings.temporal_patch_size
    if list(values.shape) != (wanted := [t * rows * columns, 3 * pictures * p * p]):
        raise ValueError(f"a grid of {t} x {rows} x {columns} patches has values {wanted}, got {list(values.shape)}")
    found = values.double().view(t, rows * columns, 3, pictures, p, p)
    if settings.do_normalize:
        mean, std = (torch.tensor(each, dtype=torch.float64, device=values.device).view(3, 1, 1, 1)
                     for each in (settings.image_mean, settings.image_std))  # fmt: skip
        found = found * std + mean
    if settings.do_rescale:
        found = found / settings.rescale_factor
    frames = found.round().clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
    return torch.stack([from_patches(patches, rows, columns, settings) for patches in frames])


def write_values(frames: Sequence[Tensor], table: Tensor, out: Tensor) -> None:
    """The values of T frames' patches, each [patches, 3, p, p] bytes, into out [patches, 3 * T * p * p] float32."""
    patches, channels, p, _ = frames[0].shape
    places = out.view(patches, channels, len(frames), p * p)
    offsets = 256 * torch.arange(channels, dtype=torch.int32)[:, None]
    previous = None
    for number, frame in enumerate(frames):
        if frame is previous:  # a still image is shown T times
            places[:, :, number] = places[:, :, number - 1]
            continue
        index = frame.flatten(2).to(torch.int32).add_(offsets)
        places[:, :, number] = table.flatten().index_select(0, index.flatten()).view(index.shape)
        previous = frame
