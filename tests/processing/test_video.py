"""processing/video.py: sampled frames, times and patches of files and of `Video`s; wrong headers and refused files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35moe.processing import Video, VideoProcessor
from qwen35moe.processing.pixels import PixelSettings, patchify, smart_resize, value_table
from qwen35moe.processing.video import sample_indices, timestamps

av = pytest.importorskip("av")
SETTINGS = PixelSettings(patch_size=8, min_pixels=512, max_pixels=40_000)


def write(target: Any, frames: torch.Tensor, rate: int = 10, codec: str = "mpeg4", form: str = "mp4") -> None:
    with av.open(target, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def clip(count: int = 23, height: int = 48, width: int = 80) -> torch.Tensor:
    """Frame n has the shade 10 * n, which identifies it."""
    return (torch.arange(count, dtype=torch.uint8) * 10)[:, None, None, None].expand(-1, height, width, 3).contiguous()


@pytest.mark.parametrize("codec, form", [("mpeg4", "mp4"), ("mpeg4", "matroska"), ("gif", "gif")])
def test_files_are_sampled(tmp_path: Path, codec: str, form: str) -> None:
    file = tmp_path / f"clip.{form}"
    write(str(file), clip(), codec=codec, form=form)
    inputs, (sampled,) = VideoProcessor(SETTINGS)(file, fps=3.0)
    indices = sample_indices(23, 10.0, SETTINGS.with_values({"fps": 3.0}, "test"))
    assert indices == [0, 4, 9, 13, 18, 22] and sampled.grid == (3, 6, 10)
    assert sampled.seconds == pytest.approx((0.2, 1.1, 2.0))
    shades = inputs["pixel_values_videos"].view(3, 60, 3, 2, 64).mean((1, 2, 4)) * 127.5 + 127.5
    assert (shades.flatten() - torch.tensor([10.0 * index for index in indices])).abs().max() < (20 if codec == "gif" else 4)


def test_patches_follow_the_definition() -> None:
    """Frames are resized one by one and paired along time, an odd last one is repeated, as in transformers."""
    frames = torch.randint(0, 256, (5, 51, 90, 3), dtype=torch.uint8)
    inputs, (sampled,) = VideoProcessor(SETTINGS)(Video(frames, fps=2.0))
    height, width = smart_resize(51, 90, SETTINGS, 5)
    planes = frames.permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    resized = torch.cat([resized, resized[-1:]])
    values = (resized.float() - torch.tensor([0.5]) * 255.0) / (torch.tensor([0.5]) * 255.0)
    t, rows, columns = 3, height // 8, width // 8
    split = values.view(t, 2, 3, rows // 2, 2, 8, columns // 2, 2, 8)
    expected = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * rows * columns, -1)
    assert torch.equal(inputs["pixel_values_videos"], expected)
    assert inputs["video_grid_thw"].tolist() == [[t, rows, columns]] and sampled.grid == (t, rows, columns)
    assert sampled.seconds == timestamps([0, 1, 2, 3, 4], 2.0, 2) == (0.25, 1.25, 2.0)
    assert torch.equal(value_table(SETTINGS, fused=True)[0], (torch.arange(256).float() - 127.5) / 127.5)
    channels_first = list(frames.permute(0, 3, 1, 2))
    again, _ = VideoProcessor(SETTINGS)(Video(channels_first, fps=2.0))
    assert torch.equal(again["pixel_values_videos"], expected)
    assert patchify(resized[0].permute(1, 2, 0).contiguous(), SETTINGS).shape == (rows * columns, 3, 8, 8)


def their_sample(total: int, fps: float, **options: Any) -> list[int]:
    """transformers' sampling. Its module needs torchvision, so the method's source is executed."""
    import ast
    import importlib.util
    from types import SimpleNamespace

    import numpy

    file = Path(importlib.util.find_spec("transformers").origin).parent / "models/qwen3_vl/video_processing_qwen3_vl.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    holder = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Qwen3VLVideoProcessor")
    method = next(node for node in holder.body if isinstance(node, ast.FunctionDef) and node.name == "sample_frames")
    method.args.args[1].annotation = None
    space: dict[str, Any] = {"np": numpy}
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, method], []), str(file), "exec"), space)
    metadata = SimpleNamespace(total_num_frames=total, fps=fps)
    return space["sample_frames"](SimpleNamespace(fps=2, min_frames=4, max_frames=768), metadata, **options).tolist()


def test_sampling_equals_transformers() -> None:
    for total in (1, 2, 3, 5, 7, 48, 301, 9000, 100_000):
        for fps in (1.0, 10.0, 23.976, 30.0, 0.5):
            assert sample_indices(total, fps, SETTINGS) == their_sample(total, fps), (total, fps)
        if total > 3:
            chosen = SETTINGS.with_values({"num_frames": 3}, "test")
            assert sample_indices(total, 10.0, chosen) == their_sample(total, 10.0, num_frames=3)
    assert sample_indices(5, 1.0, SETTINGS.with_values({"do_sample_frames": False}, "test")) == [0, 1, 2, 3, 4]


def test_a_single_frame_is_repeated() -> None:
    inputs, (sampled,) = VideoProcessor(SETTINGS)(Video(clip(1), fps=2.0))
    assert sampled.grid == (1, 6, 10) and sampled.seconds == (0.0,)
    pairs = inputs["pixel_values_videos"].view(60, 3, 2, 64)
    assert torch.equal(pairs[:, :, 0], pairs[:, :, 1])


def test_a_wrong_number_of_frames_in_the_header_is_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the header has too many frames or none, the frames are counted, and the result is the same."""
    from qwen35moe.processing import video as module

    file = tmp_path / "clip.mp4"
    write(str(file), clip())
    expected, _ = VideoProcessor(SETTINGS)(file)
    decode_container = module._decode_container

    class Stream:
        def __init__(self, stream: Any, frames: int) -> None:
            self.stream, self.frames = stream, frames
            self.average_rate, self.guessed_rate = stream.average_rate, stream.guessed_rate
            self.width, self.height = stream.width, stream.height

    for claimed in (0, 900, 1 << 40):
        def with_claimed_length(container: Any, *rest: Any, claimed: int = claimed) -> Any:
            class Container:
                class streams:
                    video = [Stream(container.streams.video[0], claimed)]

                seek = staticmethod(container.seek)
                decode = staticmethod(lambda stream: container.decode(stream.stream))
                demux = staticmethod(lambda stream: container.demux(stream.stream))

            return decode_container(Container, *rest)

        monkeypatch.setattr(module, "_decode_container", with_claimed_length)
        assert torch.equal(VideoProcessor(SETTINGS)(file)[0]["pixel_values_videos"], expected["pixel_values_videos"])


@pytest.mark.parametrize(
    "video, words",
    [
        (Video(clip(0), fps=1.0), "no frames"),
        (Video(clip(2), fps=0.0), "fps must be positive"),
        (Video(clip(2), fps=1.0, indices=[0]), "2 frames but 1 indices"),
        (Video([clip(1)[0], clip(1, 50, 60)[0]], fps=1.0), "change size"),
        (clip(2), r"a path or Video\(frames, fps"),
        ("no/such.mp4", "no such file"),
        ("http://somewhere/a.mp4", "URLs are not downloaded"),
    ],
)
def test_refused_videos(video: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"video 0.*{words}"):
        VideoProcessor(SETTINGS)(video)


def test_playlists_and_audio_files_are_refused(tmp_path: Path) -> None:
    """ffmpeg would open the files that a playlist names: only containers are read."""
    write(str(tmp_path / "clip.mp4"), clip())
    lists = {"a.m3u8": "#EXTM3U\n#EXTINF:1,\nclip.mp4\n", "b.txt": f"ffconcat version 1.0\nfile '{tmp_path}/clip.mp4'\n"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="cannot be read"):
            VideoProcessor(SETTINGS)(tmp_path / name)
    sound = io.BytesIO()
    with av.open(sound, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame(format="s16", layout="mono", samples=1024)
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    (tmp_path / "sound.mkv").write_bytes(sound.getvalue())
    with pytest.raises(ValueError, match="no video stream"):
        VideoProcessor(SETTINGS)(tmp_path / "sound.mkv")
