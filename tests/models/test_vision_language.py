"""Images and videos in our decoder: positions against a count by hand, the cache, packing, files, names, errors."""

from __future__ import annotations

import re
from functools import cache as cached
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import (
    Cache,
    Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeModel,
    backends,
    taps,
)
from qwen35moe.config import ConfigError
from qwen35moe.models.inputs import check
from qwen35moe.models.vision_inputs import MultimodalInputs, VisualInputs
from qwen35moe.models.vision_positions import positions
from tests.support import peer, peer_vision
from tests.support.peer import assert_all_close, assert_close
from tests.support.peer_vision import END, IMAGE, START, VIDEO, Case, odd_visual

BOUND = 1e-5
TEXT = {
    "model_type": "qwen3_5_moe_text", "vocab_size": 61, "hidden_size": 26, "num_hidden_layers": 4, "head_dim": 16,
    "num_attention_heads": 6, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 9, "linear_value_head_dim": 12, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 10, "shared_expert_intermediate_size": 14, "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "mrope_section": [2, 2, 2],
                        "mrope_interleaved": True},
}
VISION = {"depth": 2, "hidden_size": 24, "num_heads": 3, "intermediate_size": 29, "patch_size": 3, "in_channels": 3,
          "temporal_patch_size": 2, "spatial_merge_size": 2,
          "num_position_embeddings": 25, "out_hidden_size": 26}
CONFIG = {"model_type": "qwen3_5_moe", "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
          "vision_end_token_id": END, "tie_word_embeddings": False, "text_config": TEXT, "vision_config": VISION}
ROWS = (
    (3, ("image", (1, 4, 6)), 2, ("video", (3, 2, 4)), 2),
    (4,),
    (1, ("image", (1, 4, 8)), 3, ("image", (1, 6, 2)), 1),
)


def config(**changes: Any) -> Config:
    return Config.from_dict(CONFIG | {"text_config": dict(TEXT), "vision_config": dict(VISION)} | changes)


def batch(side: str = "right", rows: tuple[Any, ...] = ROWS) -> dict[str, Tensor]:
    return Case(9, CONFIG, rows, side).inputs()


@cached
def model(dtype: torch.dtype = torch.float32) -> Any:
    """One model for all tests: not to be changed."""
    made = Qwen3_5MoeForConditionalGeneration(config()).eval()
    peer_vision.draw(made, 2)
    return made.to(dtype)


def row(number: int, side: str = "none") -> dict[str, Tensor]:
    """One row of the batch as a batch of its own, with its own images and videos."""
    whole, alone = batch(), batch(side, (ROWS[number],))
    before = [item for earlier in ROWS[:number] for item in earlier if isinstance(item, tuple)]
    mask = whole["attention_mask"][number].bool()
    inputs = {"input_ids": whole["input_ids"][number][mask][None]}
    for kind, pixels, grid in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
        if grid in alone:
            first = sum(item[0] == kind for item in before)
            count = len(alone[grid])
            sizes = whole[grid].prod(1).tolist()
            inputs[grid] = whole[grid][first : first + count]
            inputs[pixels] = torch.cat(whole[pixels].split(sizes)[first : first + count])
    return inputs


# ------------------------------------------------------------------------------------------------------------ positions


def by_hand(row: tuple[Any, ...], merge: int) -> tuple[list[tuple[int, int, int]], int]:
    """(time, height, width) of every token of a row, counted one by one."""
    placed, p = [], 0

    def word() -> None:
        nonlocal p
        placed.append((p, p, p))
        p += 1

    for item in row:
        if isinstance(item, int):
            for _ in range(item):
                word()
            continue
        kind, (t, h, w) = item
        for _ in range(t):
            for _ in range(2 if kind == "video" else 0):
                word()  # the timestamp
            word()
            placed += [(p, p + i, p + j) for i in range(h // merge) for j in range(w // merge)]
            p += max(h, w) // merge
            word()
    return placed, p


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_counted_by_hand(side):
    for case in [Case(9, CONFIG, ROWS, side), *(odd_visual(seed, side=side) for seed in range(400, 420))]:
        inputs, merge = case.inputs(), case.vision.get("spatial_merge_size", 2)
        visual = VisualInputs(image_grid_thw=inputs.get("image_grid_thw"), video_grid_thw=inputs.get("video_grid_thw"))
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        actual, after = positions(inputs["mm_token_type_ids"], visual, merge, mask=mask)
        for r, items in enumerate(case.rows):
            expected, p = by_hand(items, merge)
            assert actual[:, r, mask[r].bool()].T.tolist() == [list(triple) for triple in expected] and after[r] == p
        assert (actual[:, mask == 0] == 0).all()


def test_frames_without_timestamps_and_images_side_by_side():
    """The grids separate placeholders between which there is no word."""
    types = torch.tensor([[1] * 6 + [1] * 2 + [2] * 2 + [2] * 2 + [0]])
    visual = VisualInputs(image_grid_thw=torch.tensor([[1, 4, 6], [1, 2, 4]]), video_grid_thw=torch.tensor([[2, 4, 2]]))
    actual, after = positions(types, visual, 2)
    assert actual[0, 0].tolist() == [0] * 6 + [3] * 2 + [5] * 2 + [7] * 2 + [9] and after.tolist() == [10]


# ----------------------------------------------------------------------------------------------------- rows and packing


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_batch_is_the_row_alone(side):
    inputs = batch(side)
    with torch.no_grad():
        whole = model()(**inputs).logits
        for number in range(len(ROWS)):
            alone = model()(**row(number)).logits[0]
            assert_close(whole[number, inputs["attention_mask"][number].bool()], alone, BOUND, f"row {number}")


def test_packed_rows_are_separate_rows():
    """cu_seqlens: documents with images and videos end to end; a second packed call continues them in a cache."""
    rows = [row(number) for number in range(len(ROWS))]
    lengths = [inputs["input_ids"].shape[1] for inputs in rows]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    visual = {name: value for name, value in batch().items() if "pixel" in name or "grid" in name}
    ids = torch.cat([inputs["input_ids"] for inputs in rows], 1)
    cache, more = model().new_cache(3), torch.randint(0, 48, (1, 7), generator=peer.generator(0))
    with torch.no_grad():
        packed = model()(ids, cu_seqlens=bounds, **visual).logits[0]
        again = model()(ids, cu_seqlens=bounds, cache=cache, **visual).logits[0]
        then = model()(more, cu_seqlens=torch.tensor([0, 2, 3, 7]), cache=cache).logits[0]
        for number, part in enumerate(packed.split(lengths)):
            alone = model().new_cache(1)
            assert_close(part, model()(**rows[number], cache=alone).logits[0], BOUND, f"document {number}")
            assert_close(again.split(lengths)[number], part, BOUND)
            fresh = more[:, [slice(0, 2), slice(2, 3), slice(3, 7)][number]]
            assert_close(then.split([2, 1, 4])[number], model()(fresh, cache=alone).logits[0], BOUND, f"continued {number}")
            assert cache.rope_delta[number] == alone.rope_delta[0] if alone.rope_delta is not None else True


def test_labels_and_a_batch_under_checkpointing():
    """A loss with images and videos; gradient checkpointing of tower and decoder changes no gradient."""
    inputs = batch()
    made = Qwen3_5MoeForConditionalGeneration(config())
    peer_vision.draw(made, 2)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def run() -> dict[str, Tensor]:
        made.zero_grad()
        made(**inputs, labels=labels).loss.backward()
        return peer.gradients(made)

    plain = run()
    made.gradient_checkpointing_enable()
    assert all(block.gradient_checkpointing for block in made.visual.blocks)
    with backends.ran() as ran:
        assert_all_close(run(), plain, BOUND)
    assert sum(n for key, n in ran.counts.items() if key[0] == "vision_attention") == 2 * 2 * 2  # blocks, kinds, twice
    assert plain["model.visual.patch_embed.proj.weight"].abs().max() > 0


# ------------------------------------------------------------------------------------------------------------ the cache


def test_the_offset_is_part_of_the_cache(tmp_path: Path):
    """Through snapshot, restore, clone, reorder, save and load; each continues as the original does."""
    inputs, words = batch(), torch.tensor([[5, 6], [7, 8], [9, 10]])
    with torch.no_grad():
        cache = model().new_cache(3)
        model()(**inputs, cache=cache)
        delta = cache.rope_delta.clone()
        assert (delta < 0).tolist() == [True, False, True]
        cache.save(tmp_path / "cache.safetensors")
        point, copy = cache.snapshot(), cache.clone()
        loaded = Cache.load(tmp_path / "cache.safetensors", model().config.text_config)
        expected = model()(words, cache=cache).logits
        for name, other in (("clone", copy), ("loaded", loaded)):
            assert torch.equal(other.rope_delta, delta)
            assert_close(model()(words, cache=other).logits, expected, 1e-6, name)
        cache.restore(point)
        assert torch.equal(cache.rope_delta, delta)
        cache.reorder([2, 0])
        assert cache.rope_delta.tolist() == delta[[2, 0]].tolist()
        assert_close(model()(words[[2, 0]], cache=cache).logits, expected[[2, 0]], BOUND, "reordered")


def test_a_rollback_over_images_is_refused_and_one_behind_them_is_not():
    with torch.no_grad():
        cache = model().new_cache(1, record=64)
        model()(**row(0), cache=cache)
        after = cache.clone()
        model()(torch.tensor([[1, 2, 3]]), cache=cache)
        cache.rollback(3)
        assert_close(model()(torch.tensor([[4]]), cache=cache).logits, model()(torch.tensor([[4]]), cache=after).logits, BOUND)
        with pytest.raises(ValueError, match="images or videos are among the first .* Keep a snapshot"):
            cache.rollback(2)
        text = model().new_cache(1, record=64)
        model()(**row(1), cache=text)
        text.rollback(2)  # the row has no image


@pytest.mark.parametrize("max_length", [None, 64])
def test_decoding_after_images_is_the_whole(max_length):
    """Token by token behind a prefill, on a growing and on a static cache."""
    inputs = row(0)
    words = torch.randint(0, 48, (1, 6), generator=peer.generator(1))
    ids = torch.cat([inputs["input_ids"], words], 1)
    with torch.no_grad():
        whole = model()(**inputs | {"input_ids": ids}).logits
        cache = model().new_cache(1, max_length=max_length)
        model()(**inputs, cache=cache)
        steps = torch.cat([model()(words[:, i : i + 1], cache=cache).logits for i in range(6)], 1)
    assert_close(steps, whole[:, -6:], BOUND)


def test_three_axis_positions_set_the_offset_of_the_cache():
    """With features already in the embeddings and the caller's positions, later tokens continue from these positions."""
    inputs = row(0)
    types = torch.where(inputs["input_ids"] == IMAGE, 1, torch.where(inputs["input_ids"] == VIDEO, 2, 0))
    visual = VisualInputs(image_grid_thw=inputs["image_grid_thw"], video_grid_thw=inputs["video_grid_thw"])
    places, after = positions(types, visual, 2)
    with torch.no_grad():
        call = MultimodalInputs(**inputs)
        embeds, *_ = model().model.embed(call, check(call, model().language_model))
        caches = [model().new_cache(1) for _ in range(4)]
        first = model()(**inputs, cache=caches[0]).logits
        grids = {name: value for name, value in inputs.items() if "grid" in name}
        for cache, arguments in zip(caches[1:], (
            {"position_ids": places}, {"position_ids": torch.cat([places[:1], places])}, {"mm_token_type_ids": types, **grids},
        ), strict=True):
            assert_close(model()(inputs_embeds=embeds, cache=cache, **arguments).logits, first, BOUND)
            assert cache.rope_delta.tolist() == (after - types.shape[1]).tolist()
        actual = [model()(torch.tensor([[3, 4]]), cache=cache).logits for cache in caches]
        assert all(torch.equal(other, actual[0]) for other in actual)


# ------------------------------------------------------------------------------------------------- features, processors


def test_features_are_computed_once_and_passed_back():
    inputs = batch()
    with torch.no_grad():
        expected = model()(**inputs).logits
        made = {"image": model().get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]),
                "video": model().get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])}
        rest = {name: value for name, value in inputs.items() if "pixel" not in name}
        with backends.ran() as ran:
            for form in (made, {k: v.pooler_output for k, v in made.items()},
                         {k: torch.cat(v.pooler_output) for k, v in made.items()}):
                assert torch.equal(model()(**rest, mm_encoder_outputs=form).logits, expected)
            mixed = rest | {"pixel_values_videos": inputs["pixel_values_videos"]}
            tokens = model().generate(**rest, mm_encoder_outputs=made, max_new_tokens=3, eos_token_id=[])
        assert not any(key[0] == "vision_attention" for key in ran.counts)
        assert torch.equal(model()(**mixed, mm_encoder_outputs={"image": made["image"]}).logits, expected)
        assert torch.equal(tokens, model().generate(**inputs, max_new_tokens=3, eos_token_id=[]))


def test_the_processor_output_is_taken_whole():
    """Every key that transformers' Qwen3VLProcessor returns, for images, for videos and for text alone."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    names = {"input_ids", "attention_mask", "mm_token_type_ids", *Qwen2VLImageProcessorPil.model_input_names,
             *Qwen3VLVideoProcessor.model_input_names}
    assert set(batch()) == names
    text = {name: value for name, value in batch("left", ((4,), (2,))).items() if name in names}
    assert set(text) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    with torch.no_grad():
        plain = model()(text["input_ids"], text["attention_mask"]).logits
        assert torch.equal(model()(**text).logits, plain)
        model().generate(**text, max_new_tokens=2, eos_token_id=[])
        model().generate(**batch("left"), max_new_tokens=2, eos_token_id=[])


def test_a_generated_placeholder_is_a_word():
    """Generated placeholders stand for no image: the next step takes them as tokens."""
    cache = model().new_cache(1)
    with torch.no_grad():
        model()(**row(1), cache=cache)
        assert model()(torch.tensor([[IMAGE]]), cache=cache).logits.shape == (1, 1, 61)


def test_contradicting_inputs_are_refused():
    inputs, refuse = row(0), pytest.raises
    grids = {name: value for name, value in inputs.items() if "grid" in name}
    with refuse(ValueError, match="holds 6 image placeholders, the 0 images given make 0 tokens: pass the images too"):
        model()(inputs["input_ids"])
    with refuse(ValueError, match="holds 5 image placeholders, the 1 images given make 6 tokens: was the text cut off"):
        model()(**inputs | {"input_ids": inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) == 5, 1)})
    with refuse(ValueError, match="holds 0 image placeholders, .* make 6 tokens: the text has no image"):
        model()(**inputs | {"input_ids": torch.ones_like(inputs["input_ids"])})
    with refuse(ValueError, match="image_grid_thw comes without pixel_values"):
        model()(inputs["input_ids"], **grids)
    with refuse(ValueError, match="pixel_values or features come without image_grid_thw"):
        model()(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    with refuse(ValueError, match="mm_token_type_ids .* contradict input_ids"):
        model()(**inputs, mm_token_type_ids=torch.zeros_like(inputs["input_ids"]))
    with refuse(ValueError, match="mm_token_type_ids .* contradict input_ids"):
        model().generate(**inputs, mm_token_type_ids=torch.zeros_like(inputs["input_ids"]))
    with refuse(ValueError, match=re.escape("image features are [5, 26], the grids call for [6, 26]")):
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        model()(**rest, mm_encoder_outputs={"image": torch.zeros(5, 26)})
    with refuse(ValueError, match=r"holds \['audio'\]"):
        model()(**inputs, mm_encoder_outputs={"audio": torch.zeros(5, 26)})
    with refuse(ValueError, match="exclude each other: give one of them"):
        model()(**inputs, mm_encoder_outputs={"image": torch.zeros(6, 26)})
    with refuse(ValueError, match="pixel_values is a list: give a tensor"):
        model()(**inputs | {"pixel_values": [1.0]})
    swapped = batch()
    swapped["image_grid_thw"] = swapped["image_grid_thw"].flip(0)
    with refuse(ValueError, match="are the images and videos in the order of their rows"):
        model()(**swapped)
    masked = batch()
    masked["attention_mask"][0, 4:7] = 0  # masked placeholders do not count
    with refuse(ValueError, match="the 3 images given make"):
        model()(**masked)
    placeholders = (inputs["input_ids"][0] == model().config.image_token_id).nonzero()[:6, 0].tolist()  # of image 0
    for length in range(placeholders[0] + 1, placeholders[-1] + 1):
        cache = model().new_cache(1)
        model()(torch.ones(1, length, dtype=torch.long), cache=cache)
        with refuse(ValueError, match="the cache ends inside image 0"):
            model().generate(**inputs, cache=cache, max_new_tokens=1)
    with refuse(ValueError, match="the cache is a dict, this model needs its own"):
        model()(**inputs, cache={})
    with refuse(ValueError, match="the cache holds 2 rows, the input has 1"):
        model()(**inputs, cache=model().new_cache(2))
    with refuse(ValueError, match="position_ids .* do not fit the input"):
        model()(**inputs, position_ids=torch.zeros(3, 1, 4, dtype=torch.long), cache=model().new_cache(1))
    with refuse(ConfigError, match="needs a vision_config; for text alone take the ...ForCausalLM class"):
        Qwen3_5MoeForConditionalGeneration(config().text_only())
    with refuse(ConfigError, match="is for dense configurations"):
        Qwen3_5ForConditionalGeneration(config())


# -------------------------------------------------------------------------------------------------------- names and files


def test_the_model_without_its_head_returns_the_hidden_states():
    inputs = batch()
    body = Qwen3_5MoeModel(config()).eval()
    body.load_state_dict(model().model.state_dict())
    with torch.no_grad():
        expected = model()(**inputs, output_hidden_states=True)
        cache, other = body.new_cache(3), model().new_cache(3)
        actual = body(**inputs, cache=cache, output_hidden_states=True, output_routing=True)
        model()(**inputs, cache=other)
    assert_close(actual.last_hidden_state, expected.hidden_states[-1], 1e-6)
    assert torch.equal(cache.rope_delta, other.rope_delta) and actual.routing.layers == (0, 1, 2, 3)


def test_the_tower_has_named_values_and_the_text_model_keeps_its_own():
    """Every name of the catalogue, in its shape; the text model's names are those without a tower."""
    inputs = row(0)
    with torch.no_grad(), taps.record(model(), "*") as seen:
        model()(**inputs | {"pixel_values_videos": inputs["pixel_values_videos"]})
    names = {re.sub(r"\d+", "N", name) for name in seen}
    assert names == {entry.name for entry in taps.catalogue()}
    patches, tokens = 24, 6
    for entry in taps.catalogue():
        if entry.name.startswith("visual."):
            value = seen.all(re.sub("N", "0", entry.name))[0]  # of the image; the video is the second
            width = 26 if "visual_tokens" in entry.shape else 24
            sizes = {"patches": patches, "visual_tokens": tokens, "D": width, "H": 3, "K": 8}
            assert list(value.shape) == [sizes[letter] for letter in entry.shape], entry.name
    text = Qwen3_5MoeForCausalLM(config().text_only())
    with torch.no_grad(), taps.record(text, "*") as plain:
        text(torch.tensor([[1, 2, 3]]))
    assert set(plain) == {name for name in seen if not name.startswith("visual.")}
    with torch.no_grad(), taps.record(model().visual, "*attn.query") as bare:
        model().get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert torch.equal(bare["blocks.1.attn.query"], seen.all("visual.blocks.1.attn.query")[0])
    with torch.no_grad(), taps.record(model().visual.blocks[0], "*") as block:
        model().get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert set(block) == {"output", "mlp.output", *(f"attn.{leaf}" for leaf in ("query", "key", "value", "output"))}
    with torch.no_grad(), taps.patch(model(), {"visual.output": torch.zeros_like}):
        blind = model()(**inputs).logits
    assert not torch.equal(blind, model()(**inputs).logits)


def test_weights_are_drawn_everywhere_and_meta_models_hold_nothing():
    vision = VISION | {"initializer_range": 0.5}
    made = Qwen3_5MoeForConditionalGeneration(config(vision_config=vision, tie_word_embeddings=True)).init_weights(seed=3)
    assert made.lm_head.weight is made.language_model.embed_tokens.weight
    tower = dict(made.visual.named_parameters())
    for name, parameter in tower.items():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.4 < parameter.std() < 0.6, name  # the tower's own range, not the text model's 0.02
    assert made.language_model.layers[0].mlp.gate.weight.std() < 0.03
    with torch.device("meta"):
        empty = Qwen3_5MoeForConditionalGeneration(config())
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_files_pass_between_the_libraries(tmp_path: Path, dense: bool, tied: bool):
    """Saved by either library and read by the other: names, values, the tied head, and the logits."""
    import transformers

    case = odd_visual(77 + dense, dense=dense)
    case = Case(case.seed, case.config | {"tie_word_embeddings": tied}, case.rows, case.side)
    theirs = peer_vision.theirs(case)
    inputs = case.inputs()
    theirs.save_pretrained(tmp_path / "theirs")
    cls = Qwen3_5ForConditionalGeneration if dense else Qwen3_5MoeForConditionalGeneration
    ours = cls.from_pretrained(tmp_path / "theirs")
    assert (ours.lm_head.weight is ours.language_model.embed_tokens.weight) == tied
    ours.save_pretrained(tmp_path / "ours")
    names = set(theirs.state_dict())
    assert set(ours.state_dict()) == names
    assert {name.split(".")[1] for name in names if name.startswith("model.")} == {"visual", "language_model"}
    back = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager",
                                        **{} if dense else {"experts_implementation": "eager"}).eval()
    again = cls.from_pretrained(tmp_path / "ours", device="cpu")
    for other in (ours, back, again):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in other.state_dict().items())
    with torch.no_grad():
        expected = theirs(**inputs, use_cache=False).logits
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        assert_close(back(**inputs, use_cache=False).logits, expected, 1e-6)  # a mapped file has another alignment
        assert_close(ours(**inputs).logits[real], expected[real], BOUND)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").architectures == [cls.__name__]
