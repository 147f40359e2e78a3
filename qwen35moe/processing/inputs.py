"""Prompts, images and videos to a model's inputs: placeholders repeated for every token, rows cut and padded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .batch import BatchEncoding, tensor_kind
from .images import flatten
from .media import Media
from .padding import truncation_limit
from .pieces import Pieces
from .settings import MediaSettings
from .video import SampledVideo

if TYPE_CHECKING:
    from .processor import Processor


def given_media(kind: str, items: Any) -> list[Media] | None:
    """images= or videos= of a call as a flat list; None for none. A list of frames is no video: its rate is missing."""
    if items is None:
        return None
    if isinstance(items, Mapping):
        raise ValueError(f"{kind}s must be a {kind} or a list of them, got a mapping")
    flat = [Media(kind, item) for item in flatten(items)]
    return flat or None


def model_inputs(
    processor: Processor, rows: list[Pieces], images: list[Media] | None, videos: list[Media] | None,
    settings: MediaSettings, layout: Mapping[str, Any], progress: bool,
) -> BatchEncoding:
    """The inputs of prompts, split at their control tokens. layout: keywords of a call about the form of input_ids.

    ValueError if the placeholders are not as many as the images and videos.
    """
    tokenizer = processor.tokenizer
    if layout.get("add_special_tokens") and tokenizer.backend_tokenizer.num_special_tokens_to_add(False):
        raise ValueError("add_special_tokens=True is not supported: the template writes every token of the prompt")
    _check_counts(processor, rows, processor.image_token, "images", images)
    _check_counts(processor, rows, processor.video_token, "videos", videos)
    kind = tensor_kind("pt" if layout.get("return_tensors", "auto") == "auto" else layout["return_tensors"])
    visual: dict[str, Tensor] = {}
    spans: dict[str, Iterator[Pieces]] = {}  # by placeholder: the pieces that replace each of its occurrences
    if images is not None:
        part = _required(processor.image_processor, "preprocessor_config.json", "images")
        visual |= part.process(images, settings.images, progress=progress)
        tokens = [int(patches) // part.settings.merge_size**2 for patches in visual["image_grid_thw"].prod(1)]
        spans[processor.image_token] = iter([[(True, processor.image_token)] * count for count in tokens])
    if videos is not None:
        part = _required(processor.video_processor, "video_preprocessor_config.json", "videos")
        inputs, sampled = part.process(videos, settings.videos)
        visual |= inputs
        spans[processor.video_token] = iter([_video_span(processor, one, part.settings.merge_size) for one in sampled])

    def expanded(row: Pieces) -> Pieces:
        parts = (next(spans[text]) if control and text in spans else [(control, text)] for control, text in row)
        return [piece for part in parts for piece in part]

    padding = layout.get("padding")
    out = tokenizer.pad(
        _cut(processor, [tokenizer.ids_of_pieces(expanded(row)) for row in rows], layout),
        padding=kind is not None if padding is None else padding, return_tensors="pt" if kind else None,
        **{name: layout.get(name) for name in ("padding_side", "max_length", "pad_to_multiple_of", "return_attention_mask")},
    )  # fmt: skip
    out["mm_token_type_ids"] = _token_types(processor, out["input_ids"])
    out.update(visual)
    return BatchEncoding({name: value.numpy() for name, value in out.items()}) if kind == "np" else out


def _token_types(processor: Processor, ids: Any) -> Any:
    """0 for text, 1 for images, 2 for videos: lists of lists, or a tensor of a tensor."""
    added = processor.tokenizer.added_tokens
    kinds = {added[token]: number for number, token in ((1, processor.image_token), (2, processor.video_token))
             if token in added}  # fmt: skip
    if not isinstance(ids, Tensor):
        return [[kinds.get(number, 0) for number in row] for row in ids]
    types = torch.zeros_like(ids)
    for number, kind in kinds.items():
        types[ids == number] = kind
    return types


def _cut(processor: Processor, rows: list[list[int]], layout: Mapping[str, Any]) -> list[list[int]]:
    """The rows, truncated. ValueError if placeholders of an image or a video would be lost."""
    tokenizer = processor.tokenizer
    limit = truncation_limit(layout.get("truncation"), layout.get("max_length"), layout.get("padding", True),
                             tokenizer.model_max_length)  # fmt: skip
    if limit is None:
        return rows
    left = tokenizer.truncation_side == "left"
    placeholders = {processor.image_token_id, processor.video_token_id}
    for row in rows:
        if not placeholders.isdisjoint(row[:-limit] if left else row[limit:]):
            raise ValueError(
                f"truncation to {limit} of {len(row)} tokens would cut an image or a video: raise max_length, or lower "
                "max_pixels"
            )
    return [row[-limit:] if left else row[:limit] for row in rows]


def _check_counts(
    processor: Processor, rows: list[Pieces], token: str, kind: str, items: Sequence[Any] | None
) -> None:
    placeholders = sum(control and piece == token for row in rows for control, piece in row)
    count = len(items or ())
    if placeholders != count:
        hint = "" if token in processor.tokenizer.added_tokens else f" (tokenizer.json has no {token}: text only)"
        raise ValueError(f"{placeholders} {token} in the text but {count} {kind}{hint}")


def _video_span(processor: Processor, video: SampledVideo, merge: int) -> Pieces:
    """The pieces of a video: each temporal patch preceded by its time. The template adds one more pair of vision tokens
    around them."""
    _, rows, columns = video.grid
    pads = [(True, processor.video_token)] * (rows * columns // merge**2)
    start, end = (True, processor.vision_start_token), (True, processor.vision_end_token)
    return [piece for second in video.seconds for piece in [(False, f"<{second:.1f} seconds>"), start, *pads, end]]


def _required(part: Any, file: str, kind: str) -> Any:
    if part is None:
        raise ValueError(f"this checkpoint has no {file}: the settings for {kind} are missing")
    return part
