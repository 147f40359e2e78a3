"""Videos to what the vision tower takes: which frames, when they were shown, and their patches in temporal pairs.

Files need the extra [video] (PyAV) and are untrusted: playlists and addresses inside them are not followed, sizes are
looked at before frames are decoded, frames are made smaller as they come, and what a decoder raises becomes a ValueError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import as_rgb, values_of
from .pixels import MAX_PIXELS, VIDEO_DEFAULTS, PixelSettings, check_divides, fitted_size, into_patches, read_settings

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg"
MAX_FRAMES = 1 << 20  # in a file (four days at 3 a second, ten hours at 30): counting stops there


@dataclass(frozen=True)
class Video:
    """Frames in hand: [F, H, W, C] or [F, C, H, W] bytes, or a list of images, at `fps` frames a second.

    indices: where the frames stood in the video they were taken from (fps is then that video's), when they have been
    chosen already. Without it they are the whole video, and are sampled.
    """

    frames: Any
    fps: float
    indices: Sequence[int] | None = None


@dataclass(frozen=True)
class Sampled:
    """What became of one video: a second for each temporal patch, and its grid of patches (t, rows, columns)."""

    seconds: tuple[float, ...]
    grid: tuple[int, int, int]


class VideoProcessor:
    """Videos to pixel_values_videos and video_grid_thw.

        processor = VideoProcessor.from_pretrained(folder)
        inputs, sampled = processor(["clip.mp4"])        # sampled[0].seconds: when each pair of frames was shown

    A video is a path or a `Video`. Frames are spread evenly, `fps` of them a second, between min_frames and max_frames;
    each is resized by torch's bicubic filter for bytes, which is what transformers' video processor calls.
    """

    def __init__(self, settings: PixelSettings = VIDEO_DEFAULTS) -> None:
        self.settings = settings

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> VideoProcessor:
        """Settings from video_preprocessor_config.json (or processor_config.json). ValueError where there is neither."""
        settings = read_settings(Path(folder), "video")
        if settings is None:
            raise ValueError(f"{folder} holds no video_preprocessor_config.json: it does not say how videos are seen")
        return cls(settings)

    def __call__(self, videos: Any, **changes: Any) -> tuple[dict[str, Tensor], list[Sampled]]:
        """({"pixel_values_videos", "video_grid_thw"}, what was sampled) of one video or a list. changes: settings (fps=1)."""
        settings = replace(self.settings, **changes)
        given = list(videos) if isinstance(videos, (list, tuple)) else [videos]
        if not given:
            raise ValueError("no video was given")
        items, sampled = [], []
        for number, video in enumerate(given):
            try:
                frames, indices, fps = _frames(video, settings)
            except ValueError as error:
                what = f" ({os.fspath(video)})" if isinstance(video, (str, os.PathLike)) else ""
                raise ValueError(f"video {number}{what}: {error}") from error
            height, width, _ = frames[0].shape
            each = settings.temporal_patch_size
            frames = [into_patches(frame, settings) for frame in frames]
            frames += [frames[-1]] * (-len(frames) % each)
            items += [frames[start : start + each] for start in range(0, len(frames), each)]
            seconds = timestamps(indices, fps, each)
            sampled.append(Sampled(seconds, (len(seconds), height // settings.patch_size, width // settings.patch_size)))
        values = values_of(items, settings, fused=True)
        return {"pixel_values_videos": values, "video_grid_thw": torch.tensor([each.grid for each in sampled])}, sampled


def sample(total: int, fps: float, settings: PixelSettings) -> list[int]:
    """Which of `total` frames are looked at: evenly from the first to the last, settings.fps of them a second."""
    if not settings.do_sample_frames:
        return list(range(total))
    count = settings.num_frames
    if count is None:
        count = min(max(int(total / fps * settings.fps), settings.min_frames), settings.max_frames, total)
    if count > total:
        raise ValueError(f"num_frames = {count}, and the video has {total}")
    step = (total - 1) / (count - 1) if count > 1 else 0.0
    return [round(number * step) for number in range(count - 1)] + [total - 1 if count > 1 else 0]


def timestamps(indices: Sequence[int], fps: float, each: int) -> tuple[float, ...]:
    """The second of each temporal patch: between its first and its last frame (the last frame of all fills up)."""
    times = [index / fps for index in indices]
    times += [times[-1]] * (-len(times) % each)
    return tuple((times[start] + times[start + each - 1]) / 2 for start in range(0, len(times), each))


def _frames(video: Any, settings: PixelSettings) -> tuple[list[Tensor], list[int], float]:
    """(the chosen frames, resized, [H, W, 3] bytes; their numbers; frames a second)."""
    if isinstance(video, (str, os.PathLike)):
        return _decoded(video, settings)
    if not isinstance(video, Video):
        raise ValueError(f"a video is a path or Video(frames, fps=...), got {type(video).__name__}")
    if not 0 < video.fps < float("inf"):
        raise ValueError(f"fps must be positive, got {video.fps!r}")
    total = len(video.frames)
    if not total:
        raise ValueError("it has no frames")
    if video.indices is not None:
        indices, chosen = [int(each) for each in video.indices], range(total)
        if len(indices) != total:
            raise ValueError(f"{total} frames come with {len(indices)} indices")
    else:
        indices = sample(total, video.fps, settings)
        chosen = indices
    resized = _Resizer(settings, len(chosen))
    return [resized(_pixels(video.frames[number])) for number in chosen], indices, float(video.fps)


def _pixels(frame: Any) -> Tensor:
    """[H, W, 3] bytes of an image in hand."""
    if isinstance(frame, Tensor) and frame.dtype == torch.uint8 and frame.dim() == 3 and frame.shape[0] != frame.shape[-1] == 3:
        return frame
    picture = as_rgb(frame)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)


class _Resizer:
    """Brings frames to the size that the first one of `count` asks for."""

    def __init__(self, settings: PixelSettings, count: int) -> None:
        self.settings, self.count = settings, count
        self.shape: tuple[int, ...] | None = None
        self.size = (0, 0)

    def __call__(self, frame: Tensor) -> Tensor:
        if self.shape is None:
            self.shape, (height, width) = tuple(frame.shape), frame.shape[:2]
            self.size = (height, width)
            if self.settings.do_resize:
                self.size = fitted_size(height, width, self.settings, max(self.count, self.settings.temporal_patch_size))
            check_divides(*self.size, self.settings)
            if self.count * self.size[0] * self.size[1] > 4 * MAX_PIXELS:
                height, width = self.size
                raise ValueError(f"{self.count} frames of {height} x {width} pixels: take fewer (fps=, max_frames=)")
        elif tuple(frame.shape) != self.shape:
            raise ValueError(f"its frames change size, from {list(self.shape)} to {list(frame.shape)}")
        if tuple(frame.shape[:2]) == self.size:
            return frame
        planes = frame.permute(2, 0, 1)[None]
        return F.interpolate(planes, size=self.size, mode="bicubic", align_corners=False, antialias=True)[0].permute(1, 2, 0)


# ------------------------------------------------------------------------------------------------------------- decoding


def pyav() -> Any:
    """The module av. ModuleNotFoundError says how to get it."""
    try:
        import av
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise ModuleNotFoundError("videos need the package PyAV: pip install 'qwen35moe[video]'", name="av") from None
    return av


def _decoded(path: str | os.PathLike[str], settings: PixelSettings) -> tuple[list[Tensor], list[int], float]:
    av = pyav()
    if str(path).startswith(("http://", "https://")):
        raise ValueError("addresses are not fetched: download the file and give its path")
    if not Path(path).is_file():
        raise ValueError("there is no such file")
    try:
        with Path(path).open("rb") as file:  # a file in hand: names inside it lead nowhere
            options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "", "max_pixels": str(MAX_PIXELS)}
            with av.open(file, options=options) as container:
                return _chosen(container, settings)
    except Exception as error:  # decoders raise anything on damaged files
        said = str(error) if isinstance(error, (ValueError, OSError)) and str(error) else f"{type(error).__name__}: {error}"
        raise ValueError(f"it cannot be read: {said}") from error


def _chosen(container: Any, settings: PixelSettings) -> tuple[list[Tensor], list[int], float]:
    """Decode from the start, keeping the chosen frames. What the file says of its length is believed only if it is true."""
    if not container.streams.video:
        raise ValueError("it holds no pictures")
    stream = container.streams.video[0]
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    if not 0 < fps < float("inf"):
        raise ValueError("it does not say how many frames a second it has")
    total = stream.frames
    for attempt in range(2):
        if attempt or not 0 < total <= MAX_FRAMES:
            container.seek(0)
            total = sum(1 for _ in _limited(container.decode(stream)))
        if not total:
            raise ValueError("it holds no frames")
        indices = sample(total, fps, settings)
        wanted, resized, found = set(indices), _Resizer(settings, len(indices)), {}
        container.seek(0)
        for number, frame in enumerate(_limited(container.decode(stream))):
            if number in wanted:
                found[number] = resized(_rgb(frame))
            if number == indices[-1]:
                return [found[each] for each in indices], indices, fps
    raise ValueError(f"it says that it has {total} frames, and has fewer")


def _limited(frames: Iterator[Any]) -> Iterator[Any]:
    for number, frame in enumerate(frames):
        if number == MAX_FRAMES:
            raise ValueError(f"it has more than {MAX_FRAMES:,} frames")
        yield frame


def _rgb(frame: Any) -> Tensor:
    """[H, W, 3] bytes of a decoded frame, upright."""
    if not 0 < frame.width * frame.height <= MAX_PIXELS:
        raise ValueError(f"it has frames of {frame.height} x {frame.width} pixels; up to {MAX_PIXELS:,} in all are accepted")
    plane = frame.reformat(format="rgb24").planes[0]
    rows = torch.frombuffer(bytearray(plane), dtype=torch.uint8).view(-1, plane.line_size)  # lines are padded
    pixels = rows[: frame.height, : 3 * frame.width].reshape(frame.height, frame.width, 3)
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counter-clockwise, as telephones note it
    return pixels.rot90(turns).contiguous() if turns else pixels
