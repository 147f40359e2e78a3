"""processing/video.py: frames, times and patches of files and of frames in hand; files that lie."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35moe.processing import Video, VideoProcessor
from qwen35moe.processing.pixels import PixelSettings, fitted_size, into_patches, value_table
from qwen35moe.processing.video import sample, timestamps

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
    """Frame n has the shade 10 * n: what came out says which frame it was."""
    return (torch.arange(count, dtype=torch.uint8) * 10)[:, None, None, None].expand(-1, height, width, 3).contiguous()


@pytest.mark.parametrize("codec, form", [("mpeg4", "mp4"), ("mpeg4", "matroska"), ("gif", "gif")])
def test_a_file_gives_the_frames_that_were_asked_for(tmp_path: Path, codec: str, form: str) -> None:
    file = tmp_path / f"clip.{form}"
    write(str(file), clip(), codec=codec, form=form)
    inputs, (found,) = VideoProcessor(SETTINGS)(file, fps=3.0)
    indices = sample(23, 10.0, SETTINGS.with_values({"fps": 3.0}, "test"))
    assert indices == [0, 4, 9, 13, 18, 22] and found.grid == (3, 6, 10)
    assert found.seconds == pytest.approx((0.2, 1.1, 2.0))
    shades = inputs["pixel_values_videos"].view(3, 60, 3, 2, 64).mean((1, 2, 4)) * 127.5 + 127.5
    assert (shades.flatten() - torch.tensor([10.0 * each for each in indices])).abs().max() < (20 if codec == "gif" else 4)


def test_patches_are_the_definition() -> None:
    """Each frame resized on its own, in pairs along time, an odd one doubled, as transformers does with torchvision's calls."""
    frames = torch.randint(0, 256, (5, 51, 90, 3), dtype=torch.uint8)
    inputs, (found,) = VideoProcessor(SETTINGS)(Video(frames, fps=2.0))
    height, width = fitted_size(51, 90, SETTINGS, 5)
    planes = frames.permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    resized = torch.cat([resized, resized[-1:]])
    values = (resized.float() - torch.tensor([0.5]) * 255.0) / (torch.tensor([0.5]) * 255.0)
    t, rows, columns = 3, height // 8, width // 8
    split = values.view(t, 2, 3, rows // 2, 2, 8, columns // 2, 2, 8)
    expected = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * rows * columns, -1)
    assert torch.equal(inputs["pixel_values_videos"], expected)
    assert inputs["video_grid_thw"].tolist() == [[t, rows, columns]] and found.grid == (t, rows, columns)
    assert found.seconds == timestamps([0, 1, 2, 3, 4], 2.0, 2) == (0.25, 1.25, 2.0)
    assert torch.equal(value_table(SETTINGS, fused=True)[0], (torch.arange(256).float() - 127.5) / 127.5)
    pictures = list(frames.permute(0, 3, 1, 2))  # channels first, as a list
    again, _ = VideoProcessor(SETTINGS)(Video(pictures, fps=2.0))
    assert torch.equal(again["pixel_values_videos"], expected)
    assert into_patches(resized[0].permute(1, 2, 0).contiguous(), SETTINGS).shape == (rows * columns, 3, 8, 8)


def their_sample(total: int, fps: float, **options: Any) -> list[int]:
    """transformers' sampling; its module cannot be imported without torchvision, the method's source can be run."""
    import ast
    import importlib.util
    from types import SimpleNamespace

    import numpy

    file = Path(importlib.util.find_spec("transformers").origin).parent / "models/qwen3_vl/video_processing_qwen3_vl.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    holder = next(each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == "Qwen3VLVideoProcessor")
    method = next(each for each in holder.body if isinstance(each, ast.FunctionDef) and each.name == "sample_frames")
    method.args.args[1].annotation = None
    space: dict[str, Any] = {"np": numpy}
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, method], []), str(file), "exec"), space)
    metadata = SimpleNamespace(total_num_frames=total, fps=fps)
    return space["sample_frames"](SimpleNamespace(fps=2, min_frames=4, max_frames=768), metadata, **options).tolist()


def test_sampling_is_transformers() -> None:
    for total in (1, 2, 3, 5, 7, 48, 301, 9000, 100_000):
        for fps in (1.0, 10.0, 23.976, 30.0, 0.5):
            assert sample(total, fps, SETTINGS) == their_sample(total, fps), (total, fps)
        if total > 3:
            chosen = SETTINGS.with_values({"num_frames": 3}, "test")
            assert sample(total, 10.0, chosen) == their_sample(total, 10.0, num_frames=3)
    assert sample(5, 1.0, SETTINGS.with_values({"do_sample_frames": False}, "test")) == [0, 1, 2, 3, 4]


def test_a_single_frame_is_shown_twice() -> None:
    inputs, (found,) = VideoProcessor(SETTINGS)(Video(clip(1), fps=2.0))
    assert found.grid == (1, 6, 10) and found.seconds == (0.0,)
    pairs = inputs["pixel_values_videos"].view(60, 3, 2, 64)
    assert torch.equal(pairs[:, :, 0], pairs[:, :, 1])


def test_a_file_that_lies_about_its_length_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that says more frames than there are costs a second look, not the answer; as does one that says none."""
    from qwen35moe.processing import video as module

    file = tmp_path / "clip.mp4"
    write(str(file), clip())
    honest, _ = VideoProcessor(SETTINGS)(file)
    real = module._chosen

    class Claims:
        def __init__(self, stream: Any, frames: int) -> None:
            self.stream, self.frames = stream, frames
            self.average_rate, self.guessed_rate = stream.average_rate, stream.guessed_rate

    for claimed in (0, 900, 1 << 40):
        def lying(container: Any, settings: Any, claimed: int = claimed) -> Any:
            class Container:
                class streams:
                    video = [Claims(container.streams.video[0], claimed)]

                seek = staticmethod(container.seek)
                decode = staticmethod(lambda stream: container.decode(stream.stream))

            return real(Container, settings)

        monkeypatch.setattr(module, "_chosen", lying)
        assert torch.equal(VideoProcessor(SETTINGS)(file)[0]["pixel_values_videos"], honest["pixel_values_videos"])


@pytest.mark.parametrize(
    "video, words",
    [
        (Video(clip(0), fps=1.0), "no frames"),
        (Video(clip(2), fps=0.0), "fps must be positive"),
        (Video(clip(2), fps=1.0, indices=[0]), "2 frames come with 1 indices"),
        (Video([clip(1)[0], clip(1, 50, 60)[0]], fps=1.0), "change size"),
        (clip(2), r"a path or Video\(frames, fps"),
        ("no/such.mp4", "no such file"),
        ("http://somewhere/a.mp4", "not fetched"),
    ],
)
def test_what_is_refused(video: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"video 0.*{words}"):
        VideoProcessor(SETTINGS)(video)


def test_a_playlist_leads_nowhere(tmp_path: Path) -> None:
    """ffmpeg's playlist formats open what they name: here only containers are read."""
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
    with pytest.raises(ValueError, match="holds no pictures"):
        VideoProcessor(SETTINGS)(tmp_path / "sound.mkv")
