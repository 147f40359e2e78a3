"""The vision arguments of a call, and the features of images and videos in the places of their placeholder tokens.

A prompt holds one placeholder token (<|image_pad|> or <|video_pad|>) for every token that the vision tower computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen35moe.backends.values import on_host, unbatched, values_known
from qwen35moe.config import Config
from qwen35moe.models.inputs import CausalLMInputs, TextInputs
from qwen35moe.models.packing import require
from qwen35moe.ops.vision_grid import Grids, as_grids, check_form, tokens_of

if TYPE_CHECKING:
    from typing_extensions import Self

TEXT, IMAGE, VIDEO = 0, 1, 2  # mm_token_type_ids
NAMES = {IMAGE: "image", VIDEO: "video"}


@dataclass(frozen=True, eq=False)
class VisualInputs:
    """pixel_values [patches, values] and image_grid_thw [images, 3] (frames, rows and columns of patches), the same for
    videos: all images of the batch in the order of their placeholders, row by row. The sizes of many tensors depend on the
    grids, so that the host reads them: leave them on the CPU (or give triples, which torch.compile takes as constants).
    mm_token_type_ids [B, T] (or of the whole row, past included): 0 text, 1 image, 2 video. Needed with inputs_embeds,
    otherwise read from the ids.
    mm_encoder_outputs: features computed before, instead of pixels: {"image": ..., "video": ...}, each the result of
    `get_image_features` or `get_video_features`, or a tensor [tokens, D].
    Without position_ids, positions have three axes (time, height, width), and the cache keeps each row's rotary offset: so
    conversations with images may take turns on one model, and a later turn may bring new images.
    """

    _: KW_ONLY
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | Grids | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | Grids | None = None
    mm_token_type_ids: Tensor | None = None
    mm_encoder_outputs: dict[str, Any] | None = None

    @property
    def any_visual(self) -> bool:
        """Whether there is an image or a video: pixels, a grid or features."""
        if self.mm_encoder_outputs and any(features is not None for features in self.mm_encoder_outputs.values()):
            return True
        pixels, videos = self.pixel_values is not None, self.pixel_values_videos is not None
        return pixels or videos or self.image_grid_thw is not None or self.video_grid_thw is not None

    def pixels(self, kind: int) -> Tensor | None:
        return self.pixel_values if kind == IMAGE else self.pixel_values_videos

    def grid_thw(self, kind: int) -> Tensor | Grids | None:
        return self.image_grid_thw if kind == IMAGE else self.video_grid_thw

    def with_host_grids(self, merge: int) -> Self:
        """With the grids as triples, so that nothing after it waits for a GPU. Grids on a GPU take one transfer together."""
        tensors = {kind: thw for kind in NAMES if isinstance(thw := self.grid_thw(kind), Tensor)}
        for kind, thw in tensors.items():
            check_form(thw, f"{NAMES[kind]}_grid_thw")
        host: dict[int, Any] = {}
        if any(not thw.is_cpu for thw in tensors.values()):
            host = dict(zip(tensors, on_host(list(tensors.values())), strict=True))
        grids = {
            f"{name}_grid_thw": tuple(as_grids(host.get(kind, thw), merge, f"{name}_grid_thw"))
            for kind, name in NAMES.items() if (thw := self.grid_thw(kind)) is not None
        }
        return replace(self, **grids) if grids else self

    def features(self, kind: int) -> Any:
        return (self.mm_encoder_outputs or {}).get(NAMES[kind])

    def present(self, kind: int) -> bool:
        return self.pixels(kind) is not None or self.features(kind) is not None or self.grid_thw(kind) is not None

    def check_visual(self, *, ids: bool) -> None:
        """ValueError where arguments contradict each other. With token ids (`ids`) every grid needs pixels or features;
        embeddings may hold the features already, and then the grids alone give positions."""
        unknown = set(self.mm_encoder_outputs or {}) - set(NAMES.values())
        if unknown:
            raise ValueError(f"mm_encoder_outputs holds {sorted(unknown)}; it may hold 'image' and 'video'")
        for kind, name in NAMES.items():
            argument = "pixel_values" if kind == IMAGE else "pixel_values_videos"
            pixels, features, grid_thw = self.pixels(kind), self.features(kind), self.grid_thw(kind)
            if pixels is not None and features is not None:
                raise ValueError(f"{argument} and mm_encoder_outputs[{name!r}] exclude each other: give one of them")
            if (pixels is not None or features is not None) and grid_thw is None:
                raise ValueError(f"{argument} or features come without {name}_grid_thw, the rows and columns of the patches")
            if ids and grid_thw is not None and pixels is None and features is None:
                raise ValueError(f"{name}_grid_thw comes without {argument}: its placeholders would have no features")

    def grids(self, kind: int, merge: int) -> Grids:
        thw = self.grid_thw(kind)
        return [] if thw is None else as_grids(thw, merge, f"{NAMES[kind]}_grid_thw")

    def only(self, kind: int, keep: Sequence[int], merge: int) -> VisualInputs:
        """With the images (or videos) of these numbers only."""
        thw = self.grid_thw(kind)
        if thw is None or len(keep) == len(thw):
            return self
        grids, name = self.grids(kind, merge), NAMES[kind]
        pixels, features = self.pixels(kind), self.features(kind)
        changes: dict[str, Any] = {f"{name}_grid_thw": [grids[i] for i in keep] if keep else None}
        if pixels is not None:
            parts = pixels.split([t * h * w for t, h, w in grids])
            key = "pixel_values" if kind == IMAGE else "pixel_values_videos"
            changes[key] = torch.cat([parts[i] for i in keep]) if keep else None
        if features is not None:
            parts = as_features(features).split(tokens_of(grids, merge))
            rest = {name: torch.cat([parts[i] for i in keep])} if keep else {}
            changes["mm_encoder_outputs"] = {k: v for k, v in (self.mm_encoder_outputs or {}).items() if k != name} | rest
        return replace(self, **changes)

    def after_cached(self, rows: Sequence[Tensor], cached: Sequence[int], merge: int) -> VisualInputs:
        """The images and videos of the new tokens, when the cache holds the first cached[r] tokens of row r.

        rows: the token types of whole rows, one [tokens] each, on the CPU. The images and videos are those of whole rows, or
        already those of the new tokens.
        """
        new = self
        for kind in NAMES:
            sizes = tokens_of(self.grids(kind, merge), merge)
            placeholders = sum(int((types[n:] == kind).sum()) for types, n in zip(rows, cached, strict=True))
            if sizes and sum(sizes) != placeholders and sum(sizes) == sum(int((types == kind).sum()) for types in rows):
                new = new.only(kind, _new_items(rows, cached, sizes, kind), merge)
        return new


@dataclass(frozen=True, eq=False)
class MultimodalInputs(VisualInputs, TextInputs):
    """The arguments of a multimodal model without its head."""


@dataclass(frozen=True, eq=False)
class ConditionalGenerationInputs(MultimodalInputs, CausalLMInputs):
    """The arguments of a multimodal model with its head."""


def _new_items(rows: Sequence[Tensor], cached: Sequence[int], sizes: Sequence[int], kind: int) -> list[int]:
    """The numbers of the items whose placeholders lie behind the cached tokens."""
    keep, item = [], 0
    for types, length in zip(rows, cached, strict=True):
        places, at = (types == kind).nonzero()[:, 0].tolist(), 0
        while at < len(places) and item < len(sizes):
            if places[at] >= length:
                keep.append(item)
            elif places[min(at + sizes[item], len(places)) - 1] >= length:
                raise ValueError(f"the cache ends inside {NAMES[kind]} {item}: it holds {length} tokens of its row")
            at, item = at + sizes[item], item + 1
    return keep


def as_features(output: Any) -> Tensor:
    """Features [tokens, D] from a tensor, a sequence of tensors, or the tower's output."""
    features = getattr(output, "pooler_output", output)
    return features if isinstance(features, Tensor) else torch.cat(list(features))


def token_types(input_ids: Tensor, config: Config) -> Tensor:
    """[B, T]: 0 text, 1 a placeholder of an image, 2 of a video."""
    types = torch.zeros_like(input_ids)
    for kind, token in ((IMAGE, config.image_token_id), (VIDEO, config.video_token_id)):
        if token is not None:
            types = torch.where(input_ids == token, kind, types)
    return types


def checked_types(type_ids: Tensor | None, input_ids: Tensor, config: Config) -> Tensor:
    """The types [B, T] of the new tokens, from the ids; ValueError where type_ids contradict them."""
    types = token_types(input_ids, config)
    if type_ids is None:
        return types
    new = type_ids[:, -input_ids.shape[1] :].to(types.device)  # processors give the types of whole rows, as they do the mask
    message = (
        f"mm_token_type_ids {list(new.shape)} contradict input_ids {list(input_ids.shape)}: 1 stands for image tokens "
        f"({config.image_token_id}), 2 for video tokens ({config.video_token_id}), 0 for all others"
    )
    if new.shape != types.shape:
        raise ValueError(message)
    require((new == types).all(), message)
    return types


def check_counts(types: Tensor, visual: VisualInputs, merge: int) -> None:
    """ValueError unless there are as many placeholders as images and videos have tokens; on a GPU and in a compiled graph an
    assertion that the host does not wait for."""
    types = unbatched(types)
    for kind, name in NAMES.items():
        grids = visual.grids(kind, merge)
        expected, count = sum(tokens_of(grids, merge)), (types == kind).sum()
        made = f"{name} placeholders, the {len(grids)} {name}s given make {expected} tokens"
        if not (values_known(count) and count.is_cpu):
            require(count == expected, f"the input does not hold {expected} {made}")
        elif (placeholders := int(count)) != expected:
            cause = (
                f"was the text cut off, or made for {name}s of another size?" if placeholders and expected
                else f"pass the {name}s too" if placeholders else f"the text has no {name} in it: use the processor's input_ids"
            )
            raise ValueError(f"the input holds {placeholders} {made}: {cause}")


def placeholders(types: Tensor, kind: int, count: int) -> Tensor:
    """[count]: the places of that kind's placeholders in the flattened rows, in order. `check_counts` checks `count`, so that
    the host does not wait for a GPU to count them."""
    return torch.nonzero_static((types == kind).flatten(), size=count, fill_value=0)[:, 0]


def insert_features(embeds: Tensor, types: Tensor, kind: int, features: Tensor, count: int) -> Tensor:
    """embeds [B, T, D] with the features [count, D] at the placeholders of that kind, in order."""
    expected = [count, embeds.shape[-1]]
    if list(features.shape) != expected:
        raise ValueError(f"the {NAMES[kind]} features are {list(features.shape)}, the grids call for {expected}")
    where = (placeholders(types, kind, count),)
    return embeds.flatten(0, 1).index_put(where, features.to(embeds.device, embeds.dtype)).view(embeds.shape)
