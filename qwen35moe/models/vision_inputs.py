"""Placeholder tokens <-> features, and where the tokens of pictures lie: three positions each, in time, height and width.

A prompt holds one placeholder token (<|image_pad|> or <|video_pad|>) for every token that the vision tower makes. Text
advances all three positions by one. The h x w tokens of an image, or of one frame of a video, share the time p at which
they begin and count rows and columns from there; what follows begins at p + max(h, w). So positions run behind slots
after pictures, by a number that belongs to the conversation: `Cache.rope_delta`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.config import Config
from qwen35moe.ops.vision_grid import Grids, as_grids, tokens_of

TEXT, IMAGE, VIDEO = 0, 1, 2  # mm_token_type_ids
_NAMES = {IMAGE: "image", VIDEO: "video"}


@dataclass(frozen=True)
class VisualInputs:
    """The vision arguments of a forward call, named as processors name them; `mm_encoder_outputs` are features made before:
    {"image": ..., "video": ...}, each what `get_image_features` or `get_video_features` gave, or a tensor [tokens, D]."""

    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    mm_token_type_ids: Tensor | None = None
    mm_encoder_outputs: dict[str, Any] | None = None

    def pixels(self, kind: int) -> Tensor | None:
        return self.pixel_values if kind == IMAGE else self.pixel_values_videos

    def grid_thw(self, kind: int) -> Tensor | None:
        return self.image_grid_thw if kind == IMAGE else self.video_grid_thw

    def features(self, kind: int) -> Any:
        return (self.mm_encoder_outputs or {}).get(_NAMES[kind])

    def present(self, kind: int) -> bool:
        return self.pixels(kind) is not None or self.features(kind) is not None or self.grid_thw(kind) is not None

    def check(self, *, ids: bool) -> None:
        """ValueError where arguments contradict each other; `ids` says whether they come with token ids, which need the
        features (embeddings may hold them already, and then the grids alone give positions)."""
        unknown = set(self.mm_encoder_outputs or {}) - set(_NAMES.values())
        if unknown:
            raise ValueError(f"mm_encoder_outputs holds {sorted(unknown)}; it may hold 'image' and 'video'")
        for kind, name in _NAMES.items():
            given = "pixel_values" if kind == IMAGE else "pixel_values_videos"
            if self.pixels(kind) is not None and self.features(kind) is not None:
                raise ValueError(f"{given} and mm_encoder_outputs[{name!r}] are both given: one is made of the other")
            if (self.pixels(kind) is not None or self.features(kind) is not None) and self.grid_thw(kind) is None:
                raise ValueError(f"{given} or features come without {name}_grid_thw, which says how the patches lie")
            if ids and self.grid_thw(kind) is not None and self.pixels(kind) is None and self.features(kind) is None:
                raise ValueError(f"{name}_grid_thw comes without {given}: nothing would be seen at its placeholders")

    def grids(self, kind: int, merge: int) -> Grids:
        thw = self.grid_thw(kind)
        return [] if thw is None else as_grids(thw, merge, f"{_NAMES[kind]}_grid_thw")

    def only(self, kind: int, keep: Sequence[int], merge: int) -> VisualInputs:
        """With the images (or videos) of these numbers alone: the others are in the cache already."""
        thw = self.grid_thw(kind)
        if thw is None or len(keep) == len(thw):
            return self
        grids, name = self.grids(kind, merge), _NAMES[kind]
        pixels, features = self.pixels(kind), self.features(kind)
        changes: dict[str, Any] = {f"{name}_grid_thw": thw[list(keep)] if keep else None}
        if pixels is not None:
            parts = pixels.split([t * h * w for t, h, w in grids])
            key = "pixel_values" if kind == IMAGE else "pixel_values_videos"
            changes[key] = torch.cat([parts[i] for i in keep]) if keep else None
        if features is not None:
            parts = as_features(features).split(tokens_of(grids, merge))
            rest = {name: torch.cat([parts[i] for i in keep])} if keep else {}
            changes["mm_encoder_outputs"] = {k: v for k, v in (self.mm_encoder_outputs or {}).items() if k != name} | rest
        return replace(self, **changes)

    def after_cached(self, rows: Sequence[Tensor], held: Sequence[int], merge: int) -> VisualInputs:
        """What is still to be seen when the cache holds the first `held` tokens of each row (its types, [tokens]).

        Given are the pictures of whole rows, or those of the new tokens alone.
        """
        found = replace(self, mm_token_type_ids=None)
        for kind in _NAMES:
            sizes = tokens_of(self.grids(kind, merge), merge)
            fresh = sum(int((types[n:] == kind).sum()) for types, n in zip(rows, held, strict=True))
            if sizes and sum(sizes) != fresh and sum(sizes) == sum(int((types == kind).sum()) for types in rows):
                found = found.only(kind, _fresh_items(rows, held, sizes, kind), merge)
        return found


def _fresh_items(rows: Sequence[Tensor], held: Sequence[int], sizes: Sequence[int], kind: int) -> list[int]:
    """The numbers of the items whose placeholders lie behind what is held."""
    keep, item = [], 0
    for types, cached in zip(rows, held, strict=True):
        places, at = (types == kind).nonzero()[:, 0].tolist(), 0
        while at < len(places) and item < len(sizes):
            if places[at] >= cached:
                keep.append(item)
            elif places[min(at + sizes[item], len(places)) - 1] >= cached:
                raise ValueError(f"the cache ends inside {_NAMES[kind]} {item}: it holds {cached} tokens of its row")
            at, item = at + sizes[item], item + 1
    return keep


def as_features(given: Any) -> Tensor:
    """Features [tokens, D] from a tensor, a sequence of tensors, or what the tower returns."""
    found = getattr(given, "pooler_output", given)
    return found if isinstance(found, Tensor) else torch.cat(list(found))


def token_types(input_ids: Tensor, config: Config) -> Tensor:
    """[B, T]: 0 text, 1 a placeholder of an image, 2 of a video."""
    types = torch.zeros_like(input_ids)
    for kind, token in ((IMAGE, config.image_token_id), (VIDEO, config.video_token_id)):
        if token is not None:
            types = torch.where(input_ids == token, kind, types)
    return types


def checked_types(given: Tensor | None, input_ids: Tensor, config: Config) -> Tensor:
    """The types [B, T] of the new tokens, from the ids; `given` may not contradict them."""
    found = token_types(input_ids, config)
    if given is None:
        return found
    given = given[:, -input_ids.shape[1] :].to(found.device)  # processors give them for the whole row, as they do the mask
    if given.shape != found.shape or bool((given != found).any()):
        raise ValueError(
            f"mm_token_type_ids {list(given.shape)} contradict input_ids {list(input_ids.shape)}: 1 stands for image tokens "
            f"({config.image_token_id}), 2 for video tokens ({config.video_token_id}), 0 for all others"
        )
    return found


def check_counts(types: Tensor, pictures: VisualInputs, merge: int) -> None:
    """ValueError unless there are as many placeholders as the images and videos make tokens."""
    for kind, name in _NAMES.items():
        placeholders = int((types == kind).sum())
        grids = pictures.grids(kind, merge)
        expected = sum(tokens_of(grids, merge))
        if placeholders != expected:
            cause = (
                "was the text cut off, or made for a different size of picture?" if placeholders and expected
                else f"pass the {name}s too" if placeholders else f"the text has no {name} in it: use the processor's input_ids"
            )
            raise ValueError(
                f"the input holds {placeholders} {name} placeholders, the {len(grids)} {name}s given make {expected} tokens: "
                f"{cause}"
            )


def scattered(embedded: Tensor, types: Tensor, kind: int, features: Tensor) -> Tensor:
    """embedded [B, T, D] with the features [n, D] at the n placeholders of that kind, in order."""
    where = (types == kind).nonzero(as_tuple=True)
    wanted = [where[0].shape[0], embedded.shape[-1]]
    if list(features.shape) != wanted:
        raise ValueError(f"the {_NAMES[kind]} features are {list(features.shape)}, the grids call for {wanted}")
    return embedded.index_put(where, features.to(embedded.device, embedded.dtype))


def positions(
    types: Tensor, pictures: VisualInputs, merge: int, *, mask: Tensor | None = None, before: Sequence[int] | None = None,
    bounds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """([3, B, T] positions of the new tokens, [B] the position after the last one of each row).

    types [B, T], mask [B, T] (padding counts as nothing, its positions are 0), before: the first position of each row,
    bounds: where packed documents of one row begin and end; each counts for itself, as a row does.
    """
    if bounds is not None:
        cut = [types[:, start:end] for start, end in pairwise(bounds)]
        longest = max(part.shape[1] for part in cut)
        rows = torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in cut])
        lengths = torch.tensor([part.shape[1] for part in cut], device=types.device)
        there = torch.arange(longest, device=types.device) < lengths[:, None]
        found, after = positions(rows, pictures, merge, mask=there, before=before)
        return found[:, there][:, None], after
    frames = [(1, h, w) for t, h, w in pictures.grids(VIDEO, merge) for _ in range(t)]  # timestamps stand between them
    items = {IMAGE: _pieces(pictures.grids(IMAGE, merge), merge), VIDEO: _pieces(frames, merge)}
    present = torch.ones_like(types, dtype=torch.bool) if mask is None else mask.bool()
    found = torch.zeros(3, *types.shape, dtype=torch.long)
    after = []
    for row in range(types.shape[0]):
        here = present[row].cpu()
        placed, at = _row(types[row].cpu()[here].tolist(), items, 0 if before is None else before[row])
        found[:, row, here] = placed
        after.append(at)
    return found.to(types.device), torch.tensor(after, device=types.device)


def following(position_ids: Tensor, before: Tensor, *, mask: Tensor | None, bounds: Sequence[int] | None) -> Tensor:
    """[B] the position after the last one of each row (of each document, with bounds), where positions are given.

    position_ids [B, T] or [3, B, T], mask [B, T]. A row without a new token stays at `before` [B].
    """
    largest = position_ids.amax(0) if position_ids.dim() == 3 else position_ids
    if mask is not None:
        largest = largest.masked_fill(~mask, -1)
    if bounds is None:
        last = largest.amax(1)
    else:
        last = torch.stack([F.pad(largest[0, start:end], (1, 0), value=-1).amax() for start, end in pairwise(bounds)])
    return torch.where(last < 0, before, last + 1)


def _pieces(grids: Grids, merge: int) -> Iterator[tuple[int, int, int]]:
    """What is placed at once, in tokens (t, h, w): images, and the single frames of videos."""
    for t, h, w in grids:
        yield t, h // merge, w // merge


def _row(types: list[int], items: dict[int, Iterator[tuple[int, int, int]]], at: int) -> tuple[Tensor, int]:
    """Positions [3, tokens] of one row's tokens, and the next position."""
    parts, i = [torch.zeros(3, 0, dtype=torch.long)], 0
    while i < len(types):
        if types[i] == TEXT:
            end = next((j for j in range(i, len(types)) if types[j] != TEXT), len(types))
            parts.append((at + torch.arange(end - i)).expand(3, -1))
            at, i = at + end - i, end
            continue
        t, h, w = next(items[types[i]])
        if len(set(types[i : i + t * h * w])) > 1 or i + t * h * w > len(types):
            raise ValueError(
                f"the next {_NAMES[types[i]]} (or frame) makes {t * h * w} tokens ({t} x {h} x {w}) and does not fit the "
                f"placeholders from token {i} of its row: are the pictures in the order of their rows?"
            )
        grid = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        parts.append(at + torch.stack(grid).flatten(1))
        at, i = at + max(h, w), i + t * h * w
    return torch.cat(parts, dim=1), at
