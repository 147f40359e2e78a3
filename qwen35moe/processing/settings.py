"""Settings of images and videos among the keywords of a call: flat, or grouped as transformers groups them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..compat import short
from .pixels import PixelSettings

_FIELDS = frozenset(entry.name for entry in dataclasses.fields(PixelSettings))
VIDEO_ONLY = ("do_sample_frames", "fps", "num_frames", "min_frames", "max_frames")
SETTINGS = _FIELDS | {"size", "resample"}
_GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "processor_kwargs")


@dataclass(frozen=True)
class MediaSettings:
    """Changes of a call to the settings of images and to those of videos."""

    images: dict[str, Any] = field(default_factory=dict)
    videos: dict[str, Any] = field(default_factory=dict)


def media_settings(method: str, keywords: Mapping[str, Any]) -> tuple[MediaSettings, dict[str, Any]]:
    """(settings of images and videos, the other keywords). A setting that is not in a group is for both, as in transformers;
    fps, num_frames and the like are for videos. ValueError for a contradiction or a group that is no mapping."""
    rest: dict[str, Any] = {}
    flat: dict[str, Any] = {}
    images: dict[str, Any] = {}
    videos: dict[str, Any] = {}

    def put(target: dict[str, Any], name: str, value: Any) -> None:
        if target.get(name) is not None and target[name] is not value and target[name] != value:
            raise ValueError(f"{method}() got two values for {name}: {short(target[name])} and {short(value)}")
        target[name] = value

    def read(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name in _GROUPS:
                if value is None:
                    continue
                if not isinstance(value, Mapping):
                    raise ValueError(f"{method}({name}=...) must be a mapping of keywords, got {short(value)}")
                read_group(name, value)
            else:
                put(flat if name in SETTINGS else rest, name, value)

    def read_group(group: str, values: Mapping[str, Any]) -> None:
        if group == "processor_kwargs":
            read(values)
            return
        for name, value in values.items():
            if group == "text_kwargs" or name not in SETTINGS:
                put(rest, name, value)
            elif group == "images_kwargs" and name in VIDEO_ONLY:
                raise ValueError(f"{method}(images_kwargs=...): {name} is a setting of videos: give it in videos_kwargs")
            else:
                put(images if group == "images_kwargs" else videos, name, value)

    read(keywords)
    flat = {name: value for name, value in flat.items() if value is not None and value != []}
    return MediaSettings(
        {name: value for name, value in flat.items() if name not in VIDEO_ONLY} | images, flat | videos
    ), rest
