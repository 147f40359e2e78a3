"""Pixels of images and video frames to the rows of pixel_values, and back: size, order of patches, values.

    value = (byte / 255 - mean) / std          row = one patch, its values in the order [3, f, p, p]

3 channels, f frames per patch, p the side of a patch in pixels. The rows of a frame come in groups of m x m neighbouring
patches, because the vision tower merges each group into one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compat import short
from .files import find_file, read_json, read_text

MAX_ASPECT = 200  # larger ratios of the sides are refused, as in transformers
MAX_PIXELS = 1 << 27  # of one image (134 million): larger files are treated as decompression bombs
MAX_VALUES = 3 << 29  # of pixel_values of one image or video (6.4 GB)
MAX_FACTOR = 4096  # pixels of a token's side
MAX_MIN_PIXELS = 1 << 24  # an image of one pixel is enlarged to min_pixels
LIMITS = {"patch_size": 512, "merge_size": 64, "temporal_patch_size": 64, "min_pixels": MAX_MIN_PIXELS}
BICUBIC = 3  # Pillow's number of the filter

# Keys of the config files that do not change the pixels, or whose effect is always on.
_INERT = {
    *("processor_class", "image_processor_type", "video_processor_type", "feature_extractor_type", "auto_map", "backend"),
    *("do_convert_rgb", "default_to_square", "data_format", "input_data_format", "device", "disable_grouping"),
    *("return_tensors", "return_metadata", "return_row_col_info", "max_image_size", "video_metadata", "_processor_class"),
    *("max_video_tokens", "max_duration"),
}


@dataclass(frozen=True)
class PixelSettings:
    """Settings of preprocessor_config.json and video_preprocessor_config.json. For a video, min_pixels and max_pixels
    count the pixels of all frames."""

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
                raise ValueError(f"{name} must be an integer of at least 1, got {short(value)}")
            if value > LIMITS.get(name, value):
                raise ValueError(f"{name} = {short(value)} is too large: at most {LIMITS[name]:,} is supported")
        if self.factor > MAX_FACTOR:
            raise ValueError(
                f"patch_size {self.patch_size} * merge_size {self.merge_size} is too large: tokens have at most "
                f"{MAX_FACTOR} x {MAX_FACTOR} pixels"
            )
        for name in ("do_resize", "do_rescale", "do_normalize", "do_sample_frames"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {short(getattr(self, name))}")
        frames = self.num_frames
        if frames is not None and (not isinstance(frames, int) or isinstance(frames, bool) or frames < 1):
            raise ValueError(f"num_frames must be an integer of at least 1 or None, got {short(self.num_frames)}")
        for name in ("rescale_factor", "fps", "image_std"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(number, (int, float)) and 1e-30 < number < 1e30 for number in numbers):
                raise ValueError(f"{name} must be positive, got {short(value)}")
        for name in ("image_mean", "image_std"):
            if not isinstance(value := getattr(self, name), tuple) or len(value) != 3:
                raise ValueError(f"{name} must have 3 values, for 3 channels, got {short(value)}")
        if not all(isinstance(number, (int, float)) and abs(number) < 1e30 for number in self.image_mean):
            raise ValueError(f"image_mean must hold numbers, got {short(self.image_mean)}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is larger than max_pixels {short(self.max_pixels)}")

    @property
    def factor(self) -> int:
        """The side of a token in pixels; image sides are multiples of it."""
        return self.patch_size * self.merge_size

    def with_values(self, values: dict[str, Any], source: str) -> PixelSettings:
        """These settings updated with the values of a config file. ValueError names `source` and a key that is not
        implemented."""
        updates, names = dict(values), {field.name for field in fields(self)}
        size = updates.pop("size", None) or {}
        if not isinstance(size, dict) or set(size) - {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}:
            raise ValueError(f"{source}: size must hold shortest_edge and longest_edge (numbers of pixels), got {short(size)}")
        for name, old_name in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            limits = [value for value in (updates.get(name), size.get(name), size.get(old_name)) if value is not None]
            value = limits[0] if limits else None
            if value is not None:
                updates[name] = value
        if updates.pop("resample", BICUBIC) not in (None, BICUBIC):
            raise ValueError(
                f"{source}: resample {short(values['resample'])} is not implemented, only bicubic ({BICUBIC}) is"
            )
        for name in [name for name in updates if name not in names]:
            value = updates.pop(name)
            if value and name not in _INERT:
                raise ValueError(f"{source}: {short(name)} = {short(value)} is not implemented")
        for name in ("image_mean", "image_std"):
            if isinstance(value := updates.get(name), (int, float)):
                updates[name] = (value,) * 3
            elif isinstance(value, (list, Tensor)):
                updates[name] = tuple(value.tolist() if isinstance(value, Tensor) else value)
        updates = {name: value for name, value in updates.items() if value is not None}
        try:
            return replace(self, **updates)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None


IMAGE_DEFAULTS = PixelSettings()
_NAMES = frozenset(entry.name for entry in fields(PixelSettings))
VIDEO_DEFAULTS = PixelSettings(min_pixels=4_096, max_pixels=25_165_824)


class SettingsAttributes:
    """`settings` as attributes under transformers' names, which can be set: processor.max_pixels, .size, .merge_size, ..."""

    settings: PixelSettings
    _file: tuple[str, PixelSettings] | None = None  # the text of the file of a checkpoint, and the settings that it holds

    def read_file(self, folder: Path, kind: str) -> None:
        """Keeps the text of the kind's own file, so that unchanged settings are saved as they were."""
        file = folder / _own_file(kind)
        if find_file(file):
            self._file = read_text(file), self.settings

    def __getattr__(self, name: str) -> Any:
        if name in _NAMES:
            return getattr(self.settings, name)
        if name == "size":
            return {"shortest_edge": self.settings.min_pixels, "longest_edge": self.settings.max_pixels}
        if name == "resample":
            return BICUBIC
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("settings", "_file"):
            super().__setattr__(name, value)
        elif name in _NAMES or name in ("size", "resample"):
            self.settings = self.settings.with_values({name: value}, type(self).__name__)
        else:
            raise ValueError(f"{type(self).__name__} has no setting {short(name)}: they are {', '.join(sorted(_NAMES))}")


def shown_settings(settings: PixelSettings) -> str:
    """The settings that say how images become patches, for a repr."""
    names = ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size")
    return ", ".join(f"{name}={getattr(settings, name)}" for name in names)


def read_settings(folder: Path, kind: str) -> PixelSettings | None:
    """The settings for kind "image" or "video" in a checkpoint folder; None if no file has any.

    A section of processor_config.json, which transformers 5 writes, takes precedence over the kind's own file.
    """
    defaults = VIDEO_DEFAULTS if kind == "video" else IMAGE_DEFAULTS
    joint, own = folder / "processor_config.json", folder / _own_file(kind)
    section = read_json(joint).get(f"{kind}_processor")
    if section is not None:
        if not isinstance(section, dict):
            raise ValueError(f"{joint}: {kind}_processor must hold an object, got {type(section).__name__}")
        return defaults.with_values(section, str(joint))
    return defaults.with_values(read_json(own), str(own)) if find_file(own) else None


def _own_file(kind: str) -> str:
    return "video_preprocessor_config.json" if kind == "video" else "preprocessor_config.json"


def smart_resize(height: int, width: int, settings: PixelSettings, frames: int | None = None) -> tuple[int, int]:
    """The size (height, width) to resize to: multiples of patch * merge, nearly the same aspect ratio, and
    min_pixels <= pixels <= max_pixels. For a video of `frames` frames the pixels of all frames count.

    Qwen's rule: round both sides; if the result has too many or too few pixels, scale both sides by the same factor first.
    """
    factor, count = settings.factor, frames or 1
    if height < 1 or width < 1:
        raise ValueError(f"{height} x {width} pixels: both sides must be at least 1")
    if frames is not None and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(f"{height} x {width} pixels: the aspect ratio is above {MAX_ASPECT}, crop it")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    counted = 1 if frames is None else round(frames / settings.temporal_patch_size) * settings.temporal_patch_size
    if counted * rows * columns > settings.max_pixels:
        shrink = math.sqrt(count * height * width / settings.max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif counted * rows * columns < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (count * height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return max(rows, factor), max(columns, factor)


def target_size(
    height: int, width: int, settings: PixelSettings, item: dict[str, Any], frames: int | None = None
) -> tuple[int, int]:
    """The size (height, width) that an image or a video's frames are resized to, checked: `smart_resize` of resized_height and
    resized_width of the item's own settings, else of its own size. ValueError if pixel_values would be too large."""
    sides = [item.get(name) for name in ("resized_height", "resized_width")]
    if sides != [None, None]:
        if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
            raise ValueError(
                f"resized_height and resized_width are two positive integers, got {short(sides[0])} and {short(sides[1])}"
            )
        if not settings.do_resize:
            raise ValueError("resized_height and resized_width have no effect with do_resize=False: give one of them")
        height, width = sides  # type: ignore[assignment]
    if settings.do_resize:
        height, width = smart_resize(height, width, settings, frames)
    check_divisible(height, width, settings)
    f = settings.temporal_patch_size
    count = f if frames is None else -(-frames // f) * f
    if count * height * width * 3 > MAX_VALUES:
        hint = "lower max_pixels" if frames is None else "sample fewer (fps=, max_frames=) or lower max_pixels"
        raise ValueError(
            f"{frames or 1} x {height} x {width} pixels give {count * height * width * 3:,} values; at most {MAX_VALUES:,} are "
            f"supported: {hint}"
        )
    return height, width


def check_divisible(height: int, width: int, settings: PixelSettings) -> None:
    """ValueError unless the sides are multiples of a token's side."""
    if height % settings.factor or width % settings.factor or not height * width:
        raise ValueError(
            f"{height} x {width} pixels do not divide into tokens of {settings.factor} x {settings.factor} pixels: "
            "resize, or leave do_resize on"
        )


def value_table(settings: PixelSettings, *, fused: bool) -> Tensor:
    """[3, 256] float32: the value of each byte in each channel.

    transformers rounds differently in its two code paths, and the table reproduces both exactly: its Pillow path for images
    rescales in float64 and normalises in float32; its video path folds the rescaling into mean and std (`fused`).
    """
    byte = torch.arange(256, dtype=torch.int64, device="cpu")
    mean, std = (torch.tensor(values, dtype=torch.float32, device="cpu")[:, None]
                 for values in (settings.image_mean, settings.image_std))  # fmt: skip
    if fused and settings.do_rescale and settings.do_normalize:
        scale = 1.0 / settings.rescale_factor
        return (byte.float() - mean * scale) / (std * scale)
    if fused and settings.do_rescale:
        values = byte.float() * settings.rescale_factor
    else:
        values = (byte.double() * settings.rescale_factor).float() if settings.do_rescale else byte.float()
    return (values - mean) / std if settings.do_normalize else values.expand(3, -1)


def patchify(image: Tensor, settings: PixelSettings) -> Tensor:
    """[patches, 3, p, p] of an image [H, W, 3], in the order of the vision tower: groups of m x m patches, row by row."""
    height, width, _ = image.shape
    p, m = settings.patch_size, settings.merge_size
    groups = image.view(height // (p * m), m, p, width // (p * m), m, p, 3)
    return groups.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, p, p)


def unpatchify(patches: Tensor, rows: int, columns: int, settings: PixelSettings) -> Tensor:
    """The inverse of `patchify`: the image [rows * p, columns * p, 3] of patches [rows * columns, 3, p, p], in any dtype.
    ValueError if the number or the size of the patches does not fit."""
    p, m = settings.patch_size, settings.merge_size
    if rows % m or columns % m or list(patches.shape) != [rows * columns, 3, p, p]:
        raise ValueError(
            f"{rows} x {columns} patches, multiples of {m}, are [{rows * columns}, 3, {p}, {p}], got {list(patches.shape)}: "
            "pass the settings that the patches were made with"
        )
    groups = patches.reshape(rows // m, columns // m, m, m, 3, p, p)
    return groups.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * p, columns * p, 3)


def images_from_values(values: Tensor, grid: tuple[int, int, int], settings: PixelSettings) -> Tensor:
    """The frames [t * f, rows * p, columns * p, 3] uint8 of one item of pixel_values, exactly as the processor resized them.

    values [t * rows * columns, 3 * f * p * p], grid (t, rows, columns) as in image_grid_thw or video_grid_thw;
    byte = 255 (value std + mean), rounded. ValueError if the shapes do not fit.
    """
    t, rows, columns = grid
    p, f = settings.patch_size, settings.temporal_patch_size
    if list(values.shape) != (expected := [t * rows * columns, 3 * f * p * p]):
        raise ValueError(f"a grid of {t} x {rows} x {columns} patches has values {expected}, got {list(values.shape)}")
    pixels = values.double().view(t, rows * columns, 3, f, p, p)
    if settings.do_normalize:
        mean, std = (torch.tensor(numbers, dtype=torch.float64, device=values.device).view(3, 1, 1, 1)
                     for numbers in (settings.image_mean, settings.image_std))  # fmt: skip
        pixels = pixels * std + mean
    if settings.do_rescale:
        pixels = pixels / settings.rescale_factor
    frames = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
    return torch.stack([unpatchify(patches, rows, columns, settings) for patches in frames])


def write_values(frames: Sequence[Tensor], table: Tensor, out: Tensor) -> None:
    """Write the values of f frames, patches [patches, 3, p, p] uint8 each, into out [patches, 3 * f * p * p] float32."""
    patches, channels, p, _ = frames[0].shape
    values = out.view(patches, channels, len(frames), p * p)
    offsets = 256 * torch.arange(channels, dtype=torch.int32, device="cpu")[:, None]
    previous = None
    for t, frame in enumerate(frames):
        if frame is previous:  # an image is repeated f times
            values[:, :, t] = values[:, :, t - 1]
            continue
        index = frame.flatten(2).to(torch.int32).add_(offsets)
        values[:, :, t] = table.flatten().index_select(0, index.flatten()).view(index.shape)
        previous = frame
