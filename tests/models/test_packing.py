"""models/packing.py: documents packed in one row are separated, in every arrangement of their positions and bounds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe.models.packing import document_starts
from tests.models.test_vision_language import model as multimodal
from tests.models.test_vision_language import row
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape

CASE = odd_shape(
    17, layer_types=[LINEAR, FULL], num_hidden_layers=2, num_experts=5, num_experts_per_tok=2,
    tie_word_embeddings=False,
)
BOUND = 1e-5
LENGTHS = [[5, 1, 8], [1, 1, 12], [14]]  # documents of one token, at the beginning and in the middle
T = 14


@pytest.fixture(scope="module")
def model() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 1)
    return model


def restarting(lengths: list[int], first: int = 0) -> Tensor:
    return torch.cat([first + torch.arange(n) for n in lengths])


def padded(rows: list[Tensor], side: str, value: int = 0) -> Tensor:
    pads = {"left": (3, 0), "right": (0, 3), "none": (0, 0)}[side]
    return torch.stack([torch.nn.functional.pad(row, pads, value=value) for row in rows])


def arrangement(name: str, rows: int, side: str) -> dict[str, Tensor]:
    """How a caller names the packed documents of the first `rows` rows of LENGTHS, padded on a side."""
    positions = padded([restarting(lengths) for lengths in LENGTHS[:rows]], side)
    numbers = padded([torch.repeat_interleave(torch.arange(1, len(n) + 1), torch.tensor(n)) for n in LENGTHS[:rows]], side)
    mask = (numbers > 0).long()
    running = (mask.cumsum(1) - 1).clamp(min=0)
    if name == "mask":
        return {"attention_mask": numbers}
    if name == "mask, running positions":
        return {"attention_mask": numbers.float(), "position_ids": running}
    if name == "four-dimensional mask":
        # padding is a document of its own
        return {"attention_mask": (numbers[:, :, None] == numbers[:, None]).tril()[:, None]}
    if name == "added mask":
        together = (numbers[:, :, None] == numbers[:, None]).tril()[:, None]
        return {"attention_mask": torch.zeros(together.shape).masked_fill(~together, torch.finfo(torch.float32).min)}
    chosen = {
        "[B, T]": positions, "[3, B, T]": positions.expand(3, -1, -1), "[4, B, T]": positions.expand(4, -1, -1),
        "[4, B, T], running axes": torch.cat([positions[None], running.expand(3, -1, -1)]),
        "not from zero": torch.where(mask > 0, positions + 7, 0), "int32": positions.int(), "int16": positions.to(torch.int16),
    }[name]
    return {"position_ids": chosen} if side == "none" else {"position_ids": chosen, "attention_mask": mask}


NAMES = [
    "[B, T]", "[3, B, T]", "[4, B, T]", "[4, B, T], running axes", "not from zero", "int32", "int16", "mask",
    "mask, running positions", "four-dimensional mask", "added mask",
]  # fmt: skip


@torch.no_grad()
def separate(model: Any, ids: Tensor, lengths: list[int]) -> Tensor:
    bounds = itertools.pairwise([0, *itertools.accumulate(lengths)])
    return torch.cat([model(ids[None, a:b]).logits[0] for a, b in bounds])


@pytest.mark.parametrize("rows,side", [(1, "none"), (3, "none"), (3, "left"), (3, "right")])
@pytest.mark.parametrize("name", NAMES)
def test_documents_are_apart_in_every_arrangement(model: Any, name: str, rows: int, side: str) -> None:
    """Logits are those of each document alone; the loss is the mean over labels inside documents."""
    ids = CASE.ids(3, T)[:rows]
    options = arrangement(name, rows, side)
    x, labels = padded(list(ids), side), padded(list(ids), side, value=-100)
    with torch.no_grad():
        out = model(x, labels=labels, **options)
    real = slice(3, None) if side == "left" else slice(0, T)
    losses, count = 0.0, 0
    for r, lengths in enumerate(LENGTHS[:rows]):
        expected = separate(model, ids[r], lengths)
        assert_close(out.logits[r, real], expected, BOUND, f"row {r}")
        ends = set(itertools.accumulate(lengths))
        keep = [t for t in range(T) if t + 1 not in ends]
        losses += torch.nn.functional.cross_entropy(
            expected[keep].double(), ids[r, [t + 1 for t in keep]], reduction="sum"
        )
        count += len(keep)
    assert_close(out.loss.double(), losses / count, BOUND)


def test_one_row_of_positions_holds_for_all_rows(model: Any) -> None:
    """[1, T], [3, 1, T] and [4, 1, T] beside several rows, as transformers makes them."""
    ids, one = CASE.ids(2, T), restarting([5, 1, 8])[None]
    with torch.no_grad():
        for position_ids in (one, one.expand(3, 1, -1), one.expand(4, 1, -1)):
            logits = model(ids, position_ids=position_ids).logits
            for r in range(2):
                assert_close(logits[r], separate(model, ids[r], [5, 1, 8]), BOUND)


def test_a_row_that_is_one_document_is_not_packed(model: Any) -> None:
    """Positions with gaps, padding in front, and four axes whose rows differ: the bits of a row of its own."""
    ids = CASE.ids(1, 6)
    gaps = torch.tensor([[0, 1, 5, 6, 9, 10]])
    with torch.no_grad():
        assert torch.equal(model(ids, position_ids=torch.arange(6)[None]).logits, model(ids).logits)
        assert torch.equal(model(ids, position_ids=gaps.expand(4, 1, -1)).logits, model(ids, position_ids=gaps).logits)
    image = torch.tensor([[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]])[:, None]
    for axes in (image, torch.cat([torch.arange(7)[None, None], image]), torch.cat([image[:1], image])):
        assert not document_starts(axes, None).any()  # rows of an image begin where one axis rises
    assert document_starts(torch.cat([image, image], 2), None).nonzero().tolist() == [[0, 7]]


# ---------------------------------------------------------------------------------------------------------- with a cache


def test_positions_that_start_again_in_a_cache_are_refused(model: Any) -> None:
    ids, cache = CASE.ids(2, T), model.new_cache(2)
    packed = restarting([5, 9])[None]
    with torch.no_grad():
        for position_ids in (packed, packed.expand(3, 1, -1), packed.expand(4, 1, -1)):
            with pytest.raises(ValueError, match="token 5 of row 0.*cu_seqlens"):
                model(ids, position_ids=position_ids, cache=cache)
            with pytest.raises(ValueError, match="cu_seqlens"):
                model(ids, position_ids=position_ids, use_cache=True)
        with pytest.raises(ValueError, match="a row of a cache holds one document"):
            model(ids, attention_mask=1 + (torch.arange(T) > 4).long().expand(2, -1), cache=cache)
        assert cache.lengths.tolist() == [0, 0]
        model(ids, cache=cache)
        again = torch.arange(3)[None]
        for position_ids in (again, again.expand(3, 1, -1), again.expand(4, 1, -1), torch.tensor([[T - 1, T, T + 1]])):
            with pytest.raises(ValueError, match="start again at .* in row 0, of which the cache holds 14 tokens"):
                model(ids[:, :3], position_ids=position_ids, cache=cache)
        assert cache.lengths.tolist() == [T, T]
        # from where the row ends, and further on
        expected = model(ids[:, :3], cache=cache.clone()).logits
        assert torch.equal(model(ids[:, :3], position_ids=T + again, cache=cache).logits, expected)
        model(ids[:, :3], position_ids=40 + again, cache=cache)


def test_documents_continue_rows_of_a_cache(model: Any) -> None:
    """cu_seqlens and a cache of as many rows; positions per document, restarting where its row is empty."""
    ids, bounds = CASE.ids(1, T), torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    with torch.no_grad():
        cache = model.new_cache(3)
        position_ids = restarting([5, 1, 8])[None]
        first = model(ids, cu_seqlens=bounds, cache=cache, position_ids=position_ids).logits
        assert_close(first[0], separate(model, ids[0], [5, 1, 8]), BOUND)
        with pytest.raises(ValueError, match="start again at 0 in row 0"):
            model(ids, cu_seqlens=bounds, cache=cache, position_ids=position_ids)
        model(ids, cu_seqlens=bounds, cache=cache)
        made = model(ids, cu_seqlens=bounds, use_cache=True).cache
        assert cache.lengths.tolist() == [10, 2, 16] and made.lengths.tolist() == [5, 1, 8]


# ----------------------------------------------------------------------------------------------------- what contradicts


def test_contradictions_are_refused(model: Any) -> None:
    ids, bounds = CASE.ids(1, T), torch.tensor([0, 5, 14])
    packed = restarting([4, 10])[None]
    for arguments, words in (
        (dict(cu_seqlens=bounds, position_ids=packed), r"token 4, where cu_seqlens \[0, 5, 14\]"),
        (dict(cu_seqlens=bounds, position_ids=packed.expand(3, 1, -1)), "token 4, where cu_seqlens"),
        (dict(cu_seqlens=bounds, position_ids=packed.expand(4, 1, -1)), "token 4, where cu_seqlens"),
        (dict(cu_seqlens=bounds, attention_mask=torch.tensor([[1] * 7 + [2] * 7])), "mask and cu_seqlens .* separate"),
        (dict(attention_mask=1 + (torch.arange(T) > 6).long()[None], position_ids=packed), "token 4, where attention_mask"),
        (dict(attention_mask=torch.tensor([[1] * 5 + [2] * 5 + [1] * 4])), "rising order"),
        (dict(attention_mask=torch.full((1, T), 2)), "holds 2: give ones"),
        (dict(attention_mask=torch.full((1, T), 1.5)), "holds 1.5: give ones"),
        (dict(attention_mask=torch.ones(1, 1, T, T)), "4 dimensions"),
        (dict(attention_mask=torch.zeros(1, 1, T, T)), "4 dimensions"),
    ):
        with pytest.raises(ValueError, match=words):
            model(ids, **arguments)


def test_a_compiled_graph_refuses_what_it_cannot_separate(model: Any, fresh_dynamo: None) -> None:
    """fullgraph: one document per row and explicit bounds compute the values of eager mode, everything else raises."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, bounds, position_ids = CASE.ids(1, T), torch.tensor([0, 5, 6, 14]), torch.arange(T)[None]
    with torch.no_grad():
        assert_close(compiled(ids, cu_seqlens=bounds).logits[0], separate(model, ids[0], [5, 1, 8]), BOUND)
        with pytest.raises(RuntimeError, match="rise from 0 to the number of tokens"):
            compiled(ids, cu_seqlens=torch.tensor([0, 5, 6, 13]))
        assert torch.equal(compiled(ids, position_ids=position_ids).logits, model(ids).logits)
        with pytest.raises(RuntimeError, match="position_ids pack documents.*cu_seqlens"):
            compiled(ids, position_ids=restarting([5, 9])[None])


# --------------------------------------------------------------------------------------------------- images in documents


@pytest.mark.parametrize("name", ["mask", "[3, B, T]", "[4, B, T]", "cu_seqlens"])
def test_documents_with_images(name: str) -> None:
    """Two documents with an image each, packed in one row of the multimodal model: as each alone."""
    whole = {key: value for key, value in row(0).items() if not key.endswith(("mask", "type_ids"))}
    length = whole["input_ids"].shape[1]
    packed = {key: torch.cat([value] * 2, 1 if key == "input_ids" else 0) for key, value in whole.items()}
    with torch.no_grad():
        expected = multimodal()(**whole).logits
        places = _places(whole)
        twice = torch.cat([places, places], 2)
        options = {
            "mask": {"attention_mask": torch.tensor([[1] * length + [2] * length])},
            "[3, B, T]": {"position_ids": twice},
            "[4, B, T]": {"position_ids": torch.cat([restarting([length, length])[None, None], twice])},
            "cu_seqlens": {"cu_seq_lens_q": torch.tensor([0, length, 2 * length], dtype=torch.int32)},
        }[name]
        actual = multimodal()(**packed, **options).logits
    assert_close(actual[:, :length], expected, BOUND)
    assert_close(actual[:, length:], expected, BOUND)


def _places(inputs: dict[str, Tensor]) -> Tensor:
    from qwen35moe.models.vision_inputs import VisualInputs, token_types
    from qwen35moe.models.vision_positions import positions

    visual = VisualInputs(image_grid_thw=inputs["image_grid_thw"], video_grid_thw=inputs.get("video_grid_thw"))
    return positions(token_types(inputs["input_ids"], multimodal().config), visual, 2)[0]
