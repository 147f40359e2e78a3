"""Videos to the inputs of the vision tower: sampled frames, their times, and their patches in temporal pairs.

Files need the extra [video] (PyAV) and are untrusted: playlists and URLs inside them are not followed, sizes are checked
before frames are decoded, each frame is resized as soon as it is decoded, and every decoder error becomes a ValueError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import short
from .batch import BatchEncoding
from .files import check_local_file, decoder_errors, item_errors
from .images import as_rgb, pixel_values, to_tensor
from .media import Media
from .optional import require
from .pixels import (
    VIDEO_DEFAULTS,
    PixelSettings,
    SettingsAttributes,
    patchify,
    read_settings,
    shown_settings,
    target_size,
)

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg"
MAX_FRAMES = 1 << 20  # of a file (four days at 3 fps, ten hours at 30 fps)
MAX_FRAME_PIXELS = 1 << 25  # of a frame of a file; 8K has 33,177,600
# Pixels that are decoded: a second of work for any file, and 20 times as many for each byte as low-rate screen recordings have.
MAX_DECODED, DECODED_PER_BYTE = 1 << 30, 20_000

Frames = tuple[list[Tensor], list[int], float]  # sampled frames [H, W, 3] uint8, resized; their indices; fps of the video


@dataclass(frozen=True)
class Video:
    """Decoded frames: uint8 [frames, height, width, channels] or [frames, channels, height, width], or a list of images, at
    `fps` frames per second.

    indices: for frames that are already sampled, their indices in the original video (fps is then that of the original).
    Without it the frames are the whole video and are sampled.
    """

    frames: Any
    fps: float
    indices: Sequence[int] | None = None


@dataclass(frozen=True)
class SampledVideo:
    """The time in seconds of each temporal patch of a video, and its grid of patches (t, rows, columns)."""

    seconds: tuple[float, ...]
    grid: tuple[int, int, int]


class VideoProcessor(SettingsAttributes):
    """Videos to pixel_values_videos and video_grid_thw.

        processor = VideoProcessor.from_pretrained(folder)
        inputs, sampled = processor(["clip.mp4"])        # sampled[0].seconds: the time of each pair of frames

    A video is a path or a `Video`. Frames are sampled evenly at `fps` frames per second, between min_frames and max_frames
    in number; each is resized with torch's bicubic filter for uint8, the one that transformers' video processor calls.
    """

    def __init__(self, settings: PixelSettings = VIDEO_DEFAULTS) -> None:
        self.settings = settings

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **changes: Any) -> VideoProcessor:
        """Settings from video_preprocessor_config.json or processor_config.json. ValueError if the folder has neither."""
        settings = read_settings(Path(folder), "video")
        if settings is None:
            raise ValueError(f"{folder} has no video_preprocessor_config.json: the settings for videos are missing")
        return cls(settings.with_values(changes, "from_pretrained"))

    def __call__(self, videos: Any, **changes: Any) -> tuple[BatchEncoding, list[SampledVideo]]:
        """({"pixel_values_videos", "video_grid_thw"}, times and grids) of one video or a list. changes: settings (fps=1)."""
        videos = list(videos) if isinstance(videos, (list, tuple)) else [videos]
        values, sampled = self.process([Media("video", video) for video in videos], changes)
        return BatchEncoding(values), sampled

    def process(self, videos: Sequence[Media], changes: dict[str, Any]) -> tuple[dict[str, Tensor], list[SampledVideo]]:
        """The same of videos with settings of their own; changes: settings of this call."""
        changes = dict(changes)
        rates = changes.get("fps")  # one for each video, as other programs give them
        if isinstance(rates, (list, tuple)):
            if len(rates) != len(videos):
                raise ValueError(f"fps has {len(rates)} rates for {len(videos)} videos")
            del changes["fps"]
            videos = [Media(v.kind, v.item, {"fps": rate, **v.settings}) for v, rate in zip(videos, rates, strict=True)]
        common = self.settings.with_values(changes, "videos")
        if not videos:
            raise ValueError("no videos")
        p, f = common.patch_size, common.temporal_patch_size
        items, sampled = [], []
        for number, video in enumerate(videos):
            with item_errors("video", number, video.item):
                own = {name: value for name, value in video.settings.items() if not name.startswith("resized")}
                settings = common.with_values(own, "its block") if own else common
                frames, indices, fps = _sampled_frames(video.item, settings, video.settings)
            height, width, _ = frames[0].shape
            patches = [patchify(frame, settings) for frame in frames]
            patches += [patches[-1]] * (-len(patches) % f)
            items += [patches[start : start + f] for start in range(0, len(patches), f)]
            seconds = timestamps(indices, fps, f)
            sampled.append(SampledVideo(seconds, (len(seconds), height // p, width // p)))
        values = pixel_values(items, common, fused=True)
        grids = torch.tensor([video.grid for video in sampled], dtype=torch.int64, device="cpu")
        return {"pixel_values_videos": values, "video_grid_thw": grids}, sampled

    def __repr__(self) -> str:
        return f"VideoProcessor({shown_settings(self.settings)}, fps={self.fps})"


def sample_indices(total: int, fps: float, settings: PixelSettings) -> list[int]:
    """The indices of the frames to keep: evenly from the first to the last, settings.fps per second."""
    if not settings.do_sample_frames:
        return list(range(total))
    count = settings.num_frames
    if count is None:
        count = min(max(int(min(total / fps * settings.fps, total)), settings.min_frames), settings.max_frames, total)
    if count > total:
        raise ValueError(f"num_frames = {count} is more than the {total} frames of the video")
    step = (total - 1) / (count - 1) if count > 1 else 0.0
    return [round(number * step) for number in range(count - 1)] + [total - 1 if count > 1 else 0]


def timestamps(indices: Sequence[int], fps: float, frames_per_patch: int) -> tuple[float, ...]:
    """The time in seconds of each temporal patch, the mean of its first and last frame; the last frame is repeated to fill
    the last patch."""
    n, times = frames_per_patch, [index / fps for index in indices]
    times += [times[-1]] * (-len(times) % n)
    return tuple((times[start] + times[start + n - 1]) / 2 for start in range(0, len(times), n))


def _sampled_frames(video: Any, settings: PixelSettings, item: dict[str, Any]) -> Frames:
    if isinstance(video, (str, os.PathLike)):
        return _decode(video, settings, item)
    if not isinstance(video, Video):
        raise ValueError(f"a video is a path or Video(frames, fps=...), got {type(video).__name__}")
    if isinstance(video.fps, bool) or not isinstance(video.fps, (int, float)) or not 0 < video.fps < float("inf"):
        raise ValueError(f"fps must be positive, got {short(video.fps)}")
    try:
        total = len(video.frames)
    except TypeError:  # None, a scalar
        total = 0
    if not total:
        raise ValueError("no frames")
    if video.indices is not None:
        indices, kept = [int(index) for index in video.indices], range(total)
        if len(indices) != total:
            raise ValueError(f"{total} frames but {len(indices)} indices")
        if indices[0] < 0 or any(later < index for index, later in zip(indices, indices[1:], strict=False)):
            raise ValueError(f"indices must not be negative and must not fall, got {short(indices)}")
    else:
        indices = kept = sample_indices(total, video.fps, settings)
    resize = _Resizer(settings, len(kept), item)
    return [resize(_pixels(video.frames[index])) for index in kept], indices, float(video.fps)


def _pixels(frame: Any) -> Tensor:
    """[H, W, 3] uint8 of a frame of a `Video`."""
    if isinstance(frame, Tensor) and frame.dtype == torch.uint8 and frame.dim() == 3 and frame.shape[0] != frame.shape[-1] == 3:
        return frame
    return to_tensor(as_rgb(frame))


class _Resizer:
    """Resizes frames to the size computed from the first of `count` frames."""

    def __init__(self, settings: PixelSettings, count: int, item: dict[str, Any]) -> None:
        self.settings, self.count, self.item = settings, count, item
        self.shape: tuple[int, ...] | None = None
        self.size = (0, 0)

    def __call__(self, frame: Tensor) -> Tensor:
        if self.shape is None:
            self.shape = tuple(frame.shape)
            self.size = self._target_size(*self.shape[:2])
        elif tuple(frame.shape) != self.shape:
            raise ValueError(f"frames change size, from {list(self.shape)} to {list(frame.shape)}")
        if tuple(frame.shape[:2]) == self.size:
            return frame
        planes = frame.permute(2, 0, 1)[None]
        return F.interpolate(planes, size=self.size, mode="bicubic", align_corners=False, antialias=True)[0].permute(1, 2, 0)

    def _target_size(self, height: int, width: int) -> tuple[int, int]:
        return target_size(height, width, self.settings, self.item, max(self.count, self.settings.temporal_patch_size))


# ------------------------------------------------------------------------------------------------------------- decoding


def pyav() -> Any:
    """The module av. ModuleNotFoundError names the extra that installs it."""
    return require("av", "videos need the package PyAV", "video")


def _decode(path: str | os.PathLike[str], settings: PixelSettings, item: dict[str, Any]) -> Frames:
    av = pyav()
    check_local_file(path)
    with decoder_errors(), Path(path).open("rb") as file:  # an open file: names inside it cannot be resolved
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "", "max_pixels": str(MAX_FRAME_PIXELS)}
        work = MAX_DECODED + DECODED_PER_BYTE * os.fstat(file.fileno()).st_size
        with av.open(file, options=options) as container:
            return _decode_container(container, settings, item, work)


def _decode_container(container: Any, settings: PixelSettings, item: dict[str, Any], work: int) -> Frames:
    """Decode from the start and keep the sampled frames. If the number of frames in the header is wrong, count them.

    work: the number of pixels that may be decoded in all. Before frames are counted by decoding, their packets are.
    """
    if not container.streams.video:
        raise ValueError("no video stream")
    stream = container.streams.video[0]
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    if not 0 < fps < float("inf"):
        raise ValueError("no frame rate")
    area = max(1, stream.width * stream.height)
    if area > MAX_FRAME_PIXELS:
        raise ValueError(f"frames of {stream.height} x {stream.width} pixels; at most {MAX_FRAME_PIXELS:,} are supported")
    total = stream.frames
    for attempt in range(2):
        if attempt or not 0 < total <= MAX_FRAMES:
            container.seek(0)
            packets = 0
            for packet in container.demux(stream):
                packets += packet.size > 0
                _check_work(packets * area, work, packets, stream)
            container.seek(0)
            total = sum(1 for _ in _limited(container.decode(stream), work))
        if not total:
            raise ValueError("no frames")
        indices = sample_indices(total, fps, settings)
        wanted, resize, frames = set(indices), _Resizer(settings, len(indices), item), {}
        container.seek(0)
        for number, frame in enumerate(_limited(container.decode(stream), work)):
            if number in wanted:
                frames[number] = resize(_rgb(frame))
            if number == indices[-1]:
                return [frames[index] for index in indices], indices, fps
    raise ValueError(f"fewer frames than the {total} counted")


def _check_work(pixels: int, work: int, frames: int, size: Any) -> None:
    if pixels > work:
        raise ValueError(
            f"{frames:,} and more frames of {size.height} x {size.width} pixels are too many for a file of this size: at most "
            f"{work:,} pixels are decoded; cut the video, or pass Video(frames, fps=...)"
        )


def _limited(frames: Iterator[Any], work: int) -> Iterator[Any]:
    pixels = 0
    for number, frame in enumerate(frames):
        if number == MAX_FRAMES:
            raise ValueError(f"more than {MAX_FRAMES:,} frames")
        pixels += frame.width * frame.height
        _check_work(pixels, work, number + 1, frame)
        yield frame


def _rgb(frame: Any) -> Tensor:
    """[H, W, 3] uint8 of a decoded frame, upright."""
    if not 0 < frame.width * frame.height <= MAX_FRAME_PIXELS:
        raise ValueError(f"frames of {frame.height} x {frame.width} pixels; 1 to {MAX_FRAME_PIXELS:,} pixels are supported")
    plane = frame.reformat(format="rgb24").planes[0]
    rows = torch.frombuffer(bytearray(plane), dtype=torch.uint8).view(-1, plane.line_size)  # lines are padded
    pixels = rows[: frame.height, : 3 * frame.width].reshape(frame.height, frame.width, 3)
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # rotation is counter-clockwise, in degrees
    return pixels.rot90(turns).contiguous() if turns else pixels
