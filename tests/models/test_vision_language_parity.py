"""Images and videos in the decoder against transformers 5.23 with the same weights: attention and experts eager.

Forty-four random batches with images and videos of odd grids, several per row or none, padded left or right, and eight of
the dense siblings: tower, merged features, positions, offsets, logits, gradients into the pixels and the tower, greedy
tokens. Where transformers itself is wrong (a second turn with new images) its own single call is the truth.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends
from qwen35moe.models.vision_inputs import VisualInputs, token_types
from qwen35moe.models.vision_positions import positions
from tests.support import peer, peer_vision
from tests.support.peer import assert_all_close, assert_close, relative_error
from tests.support.peer_vision import Case, odd_visual
from tests.support.rounding import spread

BOUND = 1e-5
SPREADS = 8  # as in tests/models/test_parity.py
CASES = [odd_visual(seed) for seed in range(44)]
DENSE = [odd_visual(seed, dense=True) for seed in range(300, 308)]
EVERY = pytest.mark.parametrize("case", CASES + DENSE, ids=repr)
# transformers cannot generate without an attention layer, and goes wrong behind right padding
GREEDY = [case for case in [*CASES[:30], *DENSE[:3]]
          if case.side != "right" and peer.FULL in case.config["text_config"]["layer_types"]]


def test_the_cases_have_every_odd_shape():
    def grids(case: Case) -> list[tuple[int, int, int]]:
        return case.grids("image") + case.grids("video")

    wanted = {
        "left padding": lambda c: c.side == "left",
        "right padding": lambda c: c.side == "right",
        "rows of text beside others": lambda c: c.rows and any(len(r) == 1 for r in c.rows) and len(c.rows) > 1,
        "two images in a row": lambda c: any(sum(i[0] == "image" for i in r if isinstance(i, tuple)) > 1 for r in c.rows),
        "image and video in a row": lambda c: any({"image", "video"} <= {i[0] for i in r if isinstance(i, tuple)}
                                                  for r in c.rows),
        "rows with different numbers": lambda c: len({len(r) for r in c.rows}) > 1,
        "one row of squares": lambda c: any(h == c.vision["spatial_merge_size"] for _, h, _ in grids(c)),
        "merge size 1": lambda c: c.vision["spatial_merge_size"] == 1,
        "merge size 3": lambda c: c.vision["spatial_merge_size"] == 3,
        "frames, rows and columns differ": lambda c: any(len(set(g)) == 3 for g in c.grids("video")),
        "tied by the top-level value": lambda c: c.config["tie_word_embeddings"],
    }
    missing = {name: n for name, odd in wanted.items() if (n := sum(bool(odd(case)) for case in CASES)) < 2}
    assert not missing, missing


@functools.lru_cache(maxsize=4)
def pair(case: Case) -> tuple[Any, Any]:
    """The two models of a case with the same weights: not to be changed."""
    theirs = peer_vision.theirs(case)
    return peer_vision.ours(case, theirs), theirs


def offset(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Our positions [3, B, T] and the next position of each row."""
    config = pair(case)[0].config
    visual = VisualInputs(**{name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")})
    return positions(token_types(inputs["input_ids"], config), visual, case.vision["spatial_merge_size"],
                     mask=inputs.get("attention_mask"))


@EVERY
def test_features_positions_and_logits(case):
    ours, theirs = pair(case)
    inputs = case.inputs()
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.no_grad():
        for pixels, grid, features in (("pixel_values", "image_grid_thw", ours.get_image_features),
                                       ("pixel_values_videos", "video_grid_thw", ours.get_video_features)):
            if pixels not in inputs:
                continue
            expected = theirs.model.visual(inputs[pixels], grid_thw=inputs[grid])
            actual = features(inputs[pixels], inputs[grid])
            assert_close(actual.last_hidden_state, expected.last_hidden_state, BOUND, "tower")
            assert_close(torch.cat(actual.pooler_output), expected.pooler_output, BOUND, "features")
            counts = [t * h * w // case.vision["spatial_merge_size"] ** 2 for t, h, w in inputs[grid].tolist()]
            assert [len(part) for part in actual.pooler_output] == counts
        grids = {name: value for name, value in inputs.items() if name not in ("pixel_values", "pixel_values_videos")}
        places, deltas = theirs.model.get_rope_index(**grids)
        actual_places, after = offset(case, inputs)
        assert torch.equal(actual_places, places) and torch.equal(after - real.sum(1), deltas[:, 0])
        expected = theirs(**inputs, use_cache=False).logits
        cache = ours.new_cache(len(real))
        assert_close(ours(**inputs, cache=cache).logits[real], expected[real], BOUND, "logits")
    assert torch.equal(cache.rope_delta, deltas[:, 0])


def tower_gradients(model: Any, inputs: dict[str, Tensor], weights: Tensor, real: Tensor, **options: Any) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the logits into the pixels and every weight of the tower."""
    arguments = {name: value.detach().clone() for name, value in inputs.items()}
    pixels = {name: arguments[name].requires_grad_() for name in ("pixel_values", "pixel_values_videos") if name in arguments}
    model.zero_grad(set_to_none=True)
    logits = model(**arguments, **options).logits
    (logits[real] * weights.to(logits.dtype)).sum().backward()
    gradients = {name: gradient for name, gradient in peer.gradients(model).items() if "visual" in name}
    return gradients | {name: value.grad for name, value in pixels.items() if value.grad is not None}


@EVERY
def test_gradients_into_the_pixels_and_the_tower(case):
    """Within 1e-5 of theirs; where float32 has fewer digits, our float64 model judges: no further from it than 8 times as far
    as it moves when its operations are rounded to float32 (see tests/models/test_parity.py)."""
    ours, theirs = pair(case)
    inputs = case.inputs()
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    weights = torch.randn(int(real.sum()), case.config["text_config"]["vocab_size"], generator=peer.generator(3))
    expected = tower_gradients(theirs, inputs, weights, real, use_cache=False)
    with backends.use(attention="eager"):
        actual = tower_gradients(ours, inputs, weights, real)
    assert actual.keys() == expected.keys() and any("pixel" in name for name in actual)
    apart = {name: relative_error(actual[name], expected[name]) for name in actual}
    if max(apart.values()) > BOUND:
        wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        model = peer_vision.ours(case, theirs, torch.float64)
        with backends.use(attention="eager"):
            truth = tower_gradients(model, wide, weights, real)
            moved = spread(lambda: tower_gradients(model, wide, weights, real), truth)
        for name, error in apart.items():
            mine, explained = relative_error(actual[name], truth[name]), SPREADS * moved[name] / truth[name].abs().max().item()
            assert error <= BOUND or mine <= max(BOUND, explained), f"{name}: {mine:.1e}, float32 explains {explained:.1e}"


@pytest.mark.parametrize("case", GREEDY, ids=repr)
def test_greedy_tokens(case):
    ours, theirs = pair(case)
    inputs = case.inputs()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": []}
    expected = theirs.generate(**inputs, **options | {"eos_token_id": None}, pad_token_id=3)
    assert torch.equal(ours.generate(**inputs, **options), expected)


# --------------------------------------------------------------------------- where transformers is silently wrong


Turn = dict[str, Tensor]


def conversation(seed: int) -> tuple[Case, Any, Any, Turn, int, Turn, Turn]:
    """One row with images and videos in both turns: the models, the whole, the cut, and the two turns."""
    case = odd_visual(seed, rows=1)
    m = case.vision["spatial_merge_size"]
    first: tuple[Any, ...] = (3, ("image", (1, 2 * m, 3 * m)), 4, ("video", (2, 3 * m, m)), 2)
    second: tuple[Any, ...] = (2, ("image", (1, 4 * m, m)), 3, ("video", (3, m, 2 * m)), 3)
    case = Case(seed, case.config, (first + second,))
    whole = case.inputs()
    cut = len(case.row_ids(first, peer.generator(0)))
    turns = []
    for number in (0, 1):
        turn = {"input_ids": whole["input_ids"][:, :cut] if number == 0 else whole["input_ids"][:, cut:]}
        for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            turn[grid] = whole[grid][number : number + 1]
            sizes = whole[grid].prod(1).tolist()
            turn[pixels] = whole[pixels].split(sizes)[number]
        turns.append(turn)
    ours, theirs = pair(case)
    return case, ours, theirs, whole, cut, turns[0], turns[1]


@pytest.mark.parametrize("seed", [51, 52, 54, 57])
@pytest.mark.parametrize("max_length", [None, 160])
def test_a_second_turn_with_new_images_on_a_cache(seed, max_length):
    """Equal to one call with both turns, in a forward and in generate, with the new images and videos or all of them."""
    _, ours, theirs, whole, cut, first, second = conversation(seed)
    with torch.no_grad():
        expected = theirs(**whole, use_cache=False).logits
        cache = ours.new_cache(1, max_length=max_length)
        ours(**first, cache=cache)
        point, kept = cache.snapshot(), cache.clone()
        assert_close(ours(**second, cache=cache).logits, expected[:, cut:], BOUND, "second turn")
        options = {"max_new_tokens": 5, "eos_token_id": []}
        greedy = theirs.generate(**whole, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=3)
        cache.restore(point)
        news = {name: value for name, value in second.items() if name != "input_ids"}
        assert torch.equal(ours.generate(whole["input_ids"], cache=cache, **news, **options), greedy)
        assert torch.equal(ours.generate(**whole, cache=kept, **options), greedy)
        assert torch.equal(ours.generate(**whole, **options), greedy)
        assert torch.equal(cache.rope_delta, kept.rope_delta)


def test_conversations_take_turns_on_one_model():
    """Two conversations with images on one model, step by step, each as alone."""
    _, ours, theirs, whole, cut, first, second = conversation(55)
    other_ids = torch.cat([torch.tensor([[7, 1, 40, 2]]), first["input_ids"]], 1)
    other = first | {"input_ids": other_ids}
    alone = []
    for prompt in (whole, other):
        prompt = {name: value for name, value in prompt.items() if name != "mm_token_type_ids"}
        types = token_types(prompt["input_ids"], ours.config)
        theirs.model.rope_deltas = None
        ids = theirs.generate(**prompt, mm_token_type_ids=types, max_new_tokens=4, do_sample=False, eos_token_id=None)
        alone.append(ids[:, prompt["input_ids"].shape[1] :].tolist()[0])
    a = ours.stream(**whole, max_new_tokens=4, eos_token_id=[])
    b = ours.stream(**other, max_new_tokens=4, eos_token_id=[])
    taken: tuple[list[int], list[int]] = ([], [])
    for _ in range(4):
        taken[0].append(int(next(a)))
        taken[1].append(int(next(b)))
    assert [*taken] == alone


def test_embeddings_with_pixels():
    """Token types or positions with them give what the ids give; neither raises."""
    case, ours, theirs, whole, _, _, _ = conversation(56)
    embeds = ours.get_input_embeddings()(whole["input_ids"])
    rest = {name: value for name, value in whole.items() if name not in ("input_ids", "mm_token_type_ids")}
    with torch.no_grad():
        expected = theirs(**whole, use_cache=False).logits
        typed = ours(inputs_embeds=embeds, mm_token_type_ids=whole["mm_token_type_ids"], **rest).logits
        assert_close(typed, expected, BOUND, "with types")
        places, _ = offset(case, whole)
        placed = ours(inputs_embeds=embeds, position_ids=places, **rest).logits
        assert_close(placed, expected, BOUND, "with positions")
        four = torch.cat([torch.arange(places.shape[-1]).expand(1, 1, -1), places])  # transformers' form, text in front
        assert_all_close({"4": ours(whole["input_ids"], position_ids=four, **rest).logits}, {"4": expected}, BOUND)
        with pytest.raises(ValueError, match="give mm_token_type_ids"):
            ours(inputs_embeds=embeds, **rest)
