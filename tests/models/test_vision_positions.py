"""Positions of tokens beside images: the arithmetic on tensors against a count token by token, over random rows; the messages
for tokens that do not stand together; features placed by the same counts; a prefill with images as one compiled graph."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe.models.vision_inputs import IMAGE, TEXT, VIDEO, VisualInputs, insert_features
from qwen35moe.models.vision_positions import positions
from tests.models.test_vision_language import model, row
from tests.support import peer


def counted(types: list[int], items: dict[int, Iterator[tuple[int, int]]], start: int) -> tuple[list[list[int]], int]:
    """The definition: (time, height, width) of one row's tokens, one by one, and the next position."""
    placed, i, p = [], 0, start
    while i < len(types):
        if types[i] == TEXT:
            placed.append([p, p, p])
            i, p = i + 1, p + 1
            continue
        h, w = next(items[types[i]])
        if len(set(types[i : i + h * w])) > 1 or i + h * w > len(types):
            where = f"does not fit the placeholders from token {i} of its row"
            raise ValueError(f"makes {h * w} tokens (1 x {h} x {w}) and {where}")
        placed += [[p, p + r, p + c] for r in range(h) for c in range(w)]
        i, p = i + h * w, p + max(h, w)
    return placed, p


def drawn(rng: random.Random) -> tuple[Tensor, dict[int, list[tuple[int, int, int]]]]:
    """Token types [B, T] with images and frames side by side, and their grids in patches (merge 2); some out of order."""
    rows, tokens = rng.randint(1, 3), rng.randint(5, 20)
    types, grids = torch.zeros(rows, tokens, dtype=torch.long), {IMAGE: [], VIDEO: []}
    for r in range(rows):
        i = 0
        while i < tokens:
            kind, h, w = rng.choice([TEXT, TEXT, IMAGE, VIDEO]), rng.randint(1, 3), rng.randint(1, 3)
            if kind == TEXT or i + h * w > tokens:
                i += 1
                continue
            types[r, i : i + h * w] = kind
            grids[kind].append((1, 2 * h, 2 * w))
            i += h * w
    if rng.random() < 0.4:
        for items in grids.values():
            rng.shuffle(items)
    return types, grids


def test_positions_of_random_rows_are_those_counted_token_by_token() -> None:
    refused = 0
    for seed in range(150):
        rng = random.Random(seed)
        types, grids = drawn(rng)
        rows, tokens = types.shape
        mask = (torch.rand(types.shape, generator=peer.generator(seed)) > 0.3) | (types != TEXT)
        bounds = None
        if rows == 1 and rng.random() < 0.5:
            bounds, mask = torch.tensor([0, *sorted(rng.randint(0, tokens) for _ in range(2)), tokens]), torch.ones_like(mask)
            lists = [types[0, a:b].tolist() for a, b in pairwise(bounds.tolist())]
        else:
            lists = [types[r][mask[r]].tolist() for r in range(rows)]
        before = [rng.randint(0, 5) for _ in lists]
        visual = VisualInputs(image_grid_thw=grids[IMAGE] or None, video_grid_thw=grids[VIDEO] or None)
        items = {kind: iter([(h // 2, w // 2) for _, h, w in sizes]) for kind, sizes in grids.items()}
        call: Any = dict(mask=None if bounds is not None else mask, before=torch.tensor(before), bounds=bounds)
        try:
            expected = [counted(part, items, start) for part, start in zip(lists, before, strict=True)]
        except ValueError as error:
            refused += 1
            with pytest.raises(ValueError) as actual:
                positions(types, visual, 2, **call)
            assert str(error) in str(actual.value), seed
            continue
        placed, after = positions(types, visual, 2, **call)
        assert placed[:, mask].T.tolist() == [place for part, _ in expected for place in part], seed
        assert after.tolist() == [p for _, p in expected] and not placed[:, ~mask].any()
    assert 10 < refused < 75


def test_features_and_their_gradients_take_the_places_of_the_placeholders() -> None:
    types = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    embeds, features = peer.randn(2, 4, 3, seed=1), peer.randn(4, 3, seed=2).requires_grad_()
    out = insert_features(embeds.requires_grad_(), types, IMAGE, features, 4)
    weight = peer.randn(2, 4, 3, seed=3)
    (out * weight).sum().backward()
    assert torch.equal(out[types == IMAGE], features) and torch.equal(out[types != IMAGE], embeds[types != IMAGE])
    assert features.grad is not None and embeds.grad is not None
    assert torch.equal(features.grad, weight[types == IMAGE]) and torch.equal(embeds.grad, weight * (types != IMAGE)[..., None])


def triples(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The same arguments with their grids as triples."""
    return {name: [tuple(grid) for grid in value.tolist()] if "grid" in name else value for name, value in inputs.items()}


def test_grids_may_be_triples() -> None:
    inputs = row(0)
    with torch.no_grad():
        assert torch.equal(model()(**triples(inputs)).logits, model()(**inputs).logits)
        for wrong in ((), [[1, 4]], [[1, 4, 6.0]], 7):
            with pytest.raises(ValueError, match=r"image_grid_thw must be integers \[items, 3\]"):
                model()(**inputs | {"image_grid_thw": wrong})


def test_a_prefill_with_images_compiles_into_one_graph(fresh_dynamo: None) -> None:
    """With grids as triples, constants of the graph; and a step behind the images. A tensor of grids ends the graph, with the
    reason. Too few placeholders are an assertion of the graph."""
    inputs, word = row(0), torch.tensor([[5]])
    compiled = torch.compile(model(), fullgraph=True, backend="eager")
    caches = [model().new_cache(1) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model()(**inputs, cache=cache)
        for arguments in ({**triples(inputs), "cache": None}, {"input_ids": word}):
            actual, expected = (m(**{"cache": c, **arguments}).logits for m, c in zip((compiled, model()), caches, strict=True))
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        with pytest.raises(Exception, match=r"image_grid_thw is a tensor, .*give triples"):
            compiled(**inputs)
        short = triples(inputs) | {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 48, 1)}
        with pytest.raises(RuntimeError, match="the input does not hold 6 image placeholders"):
            compiled(**short)


def test_images_in_inference_mode_and_on_fake_tensors() -> None:
    """Bounds and grids are values of the host, which inference tensors and fake tensors keep beside them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = row(0)
    with torch.no_grad():
        expected = model()(**inputs).logits
    with torch.inference_mode():
        copies = {name: value.clone() for name, value in inputs.items()}
        assert torch.equal(model()(**copies).logits, expected)
        ids, bounds = torch.randint(0, 48, (1, 9), generator=peer.generator(0)), torch.tensor([0, 4, 9])
        assert model()(ids, cu_seqlens=bounds).logits.isfinite().all()
    with torch.no_grad(), FakeTensorMode():
        fake = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in inputs.items() if "grid" not in name}
        made = type(model())(model().config)
        assert made(**triples(inputs) | fake).logits.shape == expected.shape
