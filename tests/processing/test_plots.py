"""processing/plots.py: the figure's contents equal those of the processor and the model; the figure in the docs."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qwen35moe.figures import new_figure
from qwen35moe.models.vision_inputs import IMAGE, TEXT, VIDEO, VisualInputs
from qwen35moe.models.vision_positions import positions
from qwen35moe.processing import ImageProcessor, Video, VideoProcessor, plots
from qwen35moe.processing.pixels import VIDEO_DEFAULTS, PixelSettings
from tests.support.floors import ROOT

pytest.importorskip("matplotlib", reason="plots need matplotlib")
Image = pytest.importorskip("PIL.Image", reason="images need Pillow")

STILL = PixelSettings(patch_size=7, merge_size=3, min_pixels=1, max_pixels=10_000, image_std=(0.26, 0.27, 0.28))
MOVING = PixelSettings(patch_size=5, merge_size=3, min_pixels=1, max_pixels=100_000, min_frames=5, image_mean=(0.1, 0.2, 0.3))


def random_image(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)


def batch() -> tuple[dict[str, Tensor], list[Tensor]]:
    """Two rows, padded on the left and on the right, and the images that the panels should show."""
    images, clip = [random_image(40, 65), random_image(84, 21)], random_image(5 * 45, 30).view(5, 45, 30, 3)
    still, (moving, _) = ImageProcessor(STILL)(images), VideoProcessor(MOVING)([Video(clip, fps=2.0)])
    assert still["image_grid_thw"].tolist() == [[1, 6, 9], [1, 12, 3]] and moving["video_grid_thw"].tolist() == [[3, 9, 6]]
    rows = [
        [TEXT] * 4 + [IMAGE] * 6 + [TEXT] * 2 + ([TEXT] * 2 + [VIDEO] * 6 + [TEXT]) * 3,
        [TEXT] * 3 + [IMAGE] * 4 + [TEXT] * 5,
    ]
    longest = max(map(len, rows)) + 2
    types, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
    types[0, 2:], mask[0, 2:] = torch.tensor(rows[0]), 1
    types[1, : len(rows[1])], mask[1, : len(rows[1])] = torch.tensor(rows[1]), 1
    resized = Image.fromarray(images[0].numpy()).resize((63, 42), Image.Resampling.BICUBIC)
    panels = [torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(42, 63, 3), images[1], clip[0]]
    return {"mm_token_type_ids": types, "attention_mask": mask, **still, **moving}, panels


def drawn(inputs: dict[str, Any], **options: Any) -> Any:
    """The figure that draw_vision writes."""
    with mock.patch.object(plots, "save_figure") as saved:
        plots.draw_vision(inputs, "page.png", **options)
    assert saved.call_count == 1
    return saved.call_args.args[0]


def lines(axes: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_page_shows_the_images_and_the_positions_of_the_model() -> None:
    inputs, images = batch()
    figure = drawn(inputs, settings=STILL, video_settings=MOVING, title="batch")
    panels, strips = figure.axes[:3], figure.axes[3:]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "row 0, image 0: tokens 4 to 9", "row 1, image 1: tokens 3 to 6", "row 0, video 0, frame 0 of 3: tokens 14 to 19",
        "row 0: 39 tokens in 27 positions", "row 1: 12 tokens in 12 positions",
    ]  # fmt: skip
    for axes, expected in zip(panels, images, strict=True):
        assert torch.equal(torch.as_tensor(axes.images[0].get_array().data), expected)

    visual = VisualInputs(**{name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")})
    mask = inputs["attention_mask"].bool()
    position_ids, next_positions = positions(inputs["mm_token_type_ids"], visual, 3, mask=mask)
    assert next_positions.tolist() == [27, 12]
    for row, axes in enumerate(strips):
        values = lines(axes)
        for axis, name in enumerate(("time", "height", "width")):
            assert values[name] == position_ids[axis, row, mask[row]].tolist()
    assert "next 27\nrope_delta\n= 27 - 39\n= -12" in texts(strips[0])
    assert "image\ntime 3\nheight 3 to 6\nwidth 3" in texts(strips[1])
    assert [text for text in texts(strips[1]) if text.startswith("text")] == ["text\n0 to 2", "text\n7 to 11"]
    # The labels of rows and columns are the positions of the tokens.
    for axes, row, first, count in zip(panels, (0, 1, 0), (4, 3, 14), (6, 4, 6), strict=True):
        own = position_ids[:, row, mask[row]][:, first : first + count]
        for axis, labels in ((1, axes.get_yticklabels()), (2, axes.get_xticklabels())):
            assert [int(label.get_text()) for label in labels] == own[axis].unique().tolist()
        assert texts(axes) == [str(number) for number in range(first, first + count)]


def test_token_numbers_lie_on_their_pixels() -> None:
    """An image in which the shade of a token is its index in pixel_values."""
    settings = PixelSettings(patch_size=5, merge_size=3, do_resize=False)
    shades = torch.arange(8, dtype=torch.uint8).view(2, 4).repeat_interleave(15, 0).repeat_interleave(15, 1)
    image = shades[..., None].expand(-1, -1, 3).contiguous()
    values = ImageProcessor(settings)(image)["pixel_values"]
    assert values.view(8, -1).unique(dim=1).shape == (8, 1)
    axes = new_figure(3, 3).add_subplot()
    plots.plot_tokens(image, settings, axes)
    assert texts(axes) == [str(number) for number in range(8)]
    for text in axes.texts:
        x, y = text.get_position()
        assert int(image[int(y), int(x), 0]) == int(text.get_text()) and (x % 15, y % 15) == (7.5, 7.5)
    ends = [{tuple(map(tuple, segment)) for segment in lines.get_segments()} for lines in axes.collections]
    assert ends[0] == {((0, y), (60, y)) for y in range(0, 31, 5)} and ends[1] == {((x, 0), (x, 30)) for x in range(0, 61, 5)}
    assert ends[2] == {((0, y), (60, y)) for y in range(0, 31, 15)} and ends[3] == {((x, 0), (x, 30)) for x in range(0, 61, 15)}
    assert axes.collections[0].get_linewidth() < axes.collections[2].get_linewidth()
    large = new_figure(3, 3).add_subplot()
    plots.plot_tokens(random_image(15 * 20, 15 * 33), settings, large, first=100)
    assert len(large.texts) == 4 * 7 and texts(large)[:2] == ["100", "105"] and texts(large)[7] == str(100 + 5 * 33)


def test_positions_of_text_are_equal_on_all_axes() -> None:
    figure = drawn({"mm_token_type_ids": torch.zeros(1, 5, dtype=torch.long)})
    assert len(figure.axes) == 1
    assert [lines(figure.axes[0])[name] for name in ("time", "height", "width")] == [[0, 1, 2, 3, 4]] * 3
    assert "next 5\nrope_delta\n= 5 - 5\n= 0" in texts(figure.axes[0])


def test_settings_matter_only_for_the_kinds_in_the_prompt() -> None:
    """m = 3, and the default m = 2 for the kind that is absent."""
    inputs, _ = batch()
    types, videos = inputs["mm_token_type_ids"], ("pixel_values_videos", "video_grid_thw")
    still = {name: value for name, value in inputs.items() if name not in videos}
    assert len(drawn(still | {"mm_token_type_ids": types * (types == IMAGE)}, settings=STILL).axes) == 4
    moving = {name: inputs[name] for name in videos} | {"mm_token_type_ids": types * (types == VIDEO)}
    assert len(drawn(moving, video_settings=MOVING).axes) == 3


def without(inputs: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != name}


def test_errors_name_both_numbers() -> None:
    inputs, _ = batch()
    both = {"settings": STILL, "video_settings": MOVING}
    cut = inputs["mm_token_type_ids"].clone()
    cut[1, 3] = TEXT
    for changed, options, words in (
        (without(inputs, "mm_token_type_ids"), both, r"'attention_mask'.* but no mm_token_type_ids"),
        (inputs | {"mm_token_type_ids": cut}, both, "9 image placeholders, the 2 images given make 10 tokens"),
        (without(inputs, "video_grid_thw"), both, "video_grid_thw"),
        (inputs | {"pixel_values": inputs["pixel_values"][:-1]}, both, "images: 89 rows of values, but 90 patches"),
        (inputs | {"pixel_values": inputs["pixel_values"][:, 1:]}, both, r"\[54, 294\], got \[54, 293\]"),
        (inputs | {"attention_mask": inputs["attention_mask"][:, 1:]}, both, r"got \[2, 41\] and \[2, 40\]"),
        (inputs, {"settings": STILL, "video_settings": VIDEO_DEFAULTS}, "got 3 for images and 2 for videos"),
    ):
        with pytest.raises(ValueError, match=words):
            plots.draw_vision(changed, "page.png", **options)
    axes = new_figure(3, 3).add_subplot()
    with pytest.raises(ValueError, match=r"2 x 3 tokens have positions \[3, 6\], got \[3, 7\]"):
        plots.plot_tokens(random_image(42, 63), STILL, axes, position_ids=torch.zeros(3, 7))
    with pytest.raises(ValueError, match="42 x 64 pixels do not divide"):
        plots.plot_tokens(random_image(42, 64), STILL, axes)
    with pytest.raises(ValueError, match=r"got \[3, 7\] and \[6\]"):
        plots.plot_positions(torch.zeros(3, 7), torch.zeros(6), axes)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"qwen35moe\[plot\]"):
        plots.draw_vision({}, "page.png")


# ---------------------------------------------------------------------------------------------------------- the docs


def test_the_figure_of_the_docs_is_drawn_without_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "docs/figures/vision_positions.py"
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    monkeypatch.delattr("matplotlib.pyplot", raising=False)
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path / "p.png")])
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert script.with_suffix(".png").stat().st_size < 200_000


def test_numbers_in_the_figure_of_the_docs() -> None:
    inputs = runpy.run_path(str(ROOT / "docs/figures/vision_positions.py"))["prompt"]()
    figure = drawn(inputs)
    first, second, strip = figure.axes
    assert first.get_title() == "image 0: tokens 7 to 54" and second.get_title() == "image 1: tokens 62 to 73"
    assert strip.get_title() == "81 tokens in 33 positions"
    labels = texts(strip)
    assert labels[1] == "image\ntime 7\nheight 7 to 12\nwidth 7 to 14" and labels[2] == "text\n15 to 21"
    assert labels[4] == "text\n26 to 32" and labels[5].endswith("= -48")


def test_the_table_of_the_docs_equals_the_computed_positions() -> None:
    page = (ROOT / "docs/guide/vision_positions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (\d+) \| (\d+) \| (\d+) \|$", page, flags=re.MULTILINE)
    assert [int(index) for index, *_ in rows] == list(range(13))
    types = torch.tensor([[IMAGE if "image_pad" in token else TEXT for _, token, *_ in rows]])
    position_ids, next_positions = positions(types, VisualInputs(image_grid_thw=torch.tensor([[1, 4, 6]])), 2)
    assert position_ids[:, 0].T.tolist() == [[int(number) for number in numbers] for _, _, *numbers in rows]
    end = int(next_positions)
    assert f"the next position is {end}, and the offset is {end} - 13 = {end - 13}" in page
