"""Images and videos of a prompt, as the commands pass them to a model."""

from __future__ import annotations

from typing import Any

NAMES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def check_vision(model: Any) -> None:
    """ValueError if the model has no vision tower."""
    if not hasattr(model, "visual"):
        raise ValueError(f"{type(model).__name__} has no vision tower: images and videos need a multimodal checkpoint")


def visual_inputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The images and videos in a processor's output, as a keyword of `generate` and `stream`."""
    from ..models.vision_inputs import VisualInputs

    visual = {name: inputs[name] for name in NAMES if name in inputs}
    if not visual:
        return {}
    check_vision(model)
    return {"visual_inputs": VisualInputs(**visual)}
