"""`Routing`: from serving engines, over turns, packed and padded, on disk; and forwards that use it."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen35moe.ops.experts import router_choice as router_rule
from qwen35moe.routing import UNFORCED, RouterOutput, Routing, flips, imbalance, margins
from qwen35moe.routing.file import FORMAT, read_metadata
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape

LAYERS, E, TOP_K = 3, 8, 2
CASE = odd_shape(
    21, layer_types=[LINEAR, FULL, LINEAR], num_hidden_layers=LAYERS, num_experts=E, num_experts_per_tok=TOP_K,
    tie_word_embeddings=False,
)
LONG, SHORT, PROMPT = CASE.ids(1, 11), CASE.ids(1, 7, salt=1), 4


@pytest.fixture(scope="module")
def model() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 1)
    return model


@torch.no_grad()
def recorded(model: Any, ids: Tensor, **options: Any) -> Any:
    return model(ids, output_routing=True, **options)


def other_rows(tokens: int, salt: int = 0) -> Tensor:
    """[tokens, L, k]: random different experts per token, not the router's."""
    scores = torch.rand(tokens, LAYERS, E, generator=peer.generator(salt))
    return scores.topk(TOP_K, dim=-1).indices


# ---------------------------------------------------------------------------------------------------- from an engine


def test_rows_of_prompt_and_generated_tokens_are_forced(model):
    """As tensors, numpy arrays, lists and short integers; one routing of the whole sequence."""
    rows = other_rows(11)
    expected = recorded(model, LONG, routing=rows[None]).logits
    for kind in (lambda x: x, lambda x: x.to(torch.int16), lambda x: x.numpy(), lambda x: x.tolist()):
        routing = Routing.from_engine(kind(rows[:PROMPT]), kind(rows[PROMPT:]), num_experts=E, tokens=11)
        assert (routing.shape, routing.num_experts, routing.open_ended) == ((1, 11), E, False)
        assert torch.equal(routing.to_batch()[0], rows)
        assert torch.equal(recorded(model, LONG, routing=routing).logits, expected)
    alone = Routing.from_engine(rows, num_experts=E, tokens=11)
    assert torch.equal(alone.indices, routing.indices)


@pytest.mark.parametrize("tokens", [11, None], ids=["length known", "length open"])
def test_a_missing_last_row_is_unforced(model, tokens):
    rows = other_rows(10)
    routing = Routing.from_engine(rows[:PROMPT], rows[PROMPT:], num_experts=E, tokens=tokens)
    out = recorded(model, LONG, routing=routing).routing
    assert torch.equal(out.to_batch()[0, :10], rows)
    assert torch.equal(out.indices[:, 10], out.logits[:, 10].softmax(-1).topk(TOP_K, dim=-1).indices)
    if tokens is None:  # the same value also fits a sequence as long as the rows, and no other
        assert torch.equal(recorded(model, LONG[:, :10], routing=routing).routing.to_batch()[0], rows)
        for wrong in (LONG[:, :9], torch.cat([LONG, LONG[:, :1]], 1)):
            with pytest.raises(ValueError, match=f"10 tokens, the input .* has {wrong.shape[1]}"):
                recorded(model, wrong, routing=routing)


def test_rows_of_minus_one_are_unforced(model):
    """A prefix from the engine's cache, and a single layer of one token."""
    rows = other_rows(11)
    rows[:3] = UNFORCED
    rows[5, 1] = UNFORCED
    out = recorded(model, LONG, routing=Routing.from_engine(rows, num_experts=E, tokens=11)).routing
    live = out.logits.softmax(-1).topk(TOP_K, dim=-1).indices
    unforced = (rows < 0).any(-1).T
    assert torch.equal(out.indices[unforced], live[unforced])
    assert torch.equal(out.indices[~unforced], rows.transpose(0, 1)[~unforced])


def test_an_engine_may_return_some_layers(model):
    rows = other_rows(11)[:, [0]]
    routing = Routing.from_engine(rows, num_experts=E, tokens=11, layers=[2])
    out = recorded(model, LONG, routing=routing).routing
    assert torch.equal(out.indices[2], rows[:, 0])
    assert torch.equal(out.indices[0], recorded(model, LONG).routing.indices[0])


@pytest.mark.parametrize("change,words", [
    (lambda r: r.index_fill_(0, torch.tensor([3]), E), [f"expert {E}", f"0 ... {E - 1}"]),
    (lambda r: r.index_fill_(0, torch.tensor([3]), -2), ["expert -2"]),
    (lambda r: r[3, 1].__setitem__(0, UNFORCED), ["token 3, layer 1", "unforced in part"]),
    (lambda r: r.resize_(5, LAYERS * TOP_K), ["prompt", f"[5, {LAYERS * TOP_K}]"]),
], ids=["too high", "too low", "unforced in part", "two dimensions"])  # fmt: skip
def test_wrong_rows_of_an_engine_raise(change, words):
    rows = other_rows(5)
    change(rows)
    with pytest.raises(ValueError) as error:
        Routing.from_engine(rows, num_experts=E)
    assert all(word in str(error.value) for word in words), error.value


def test_without_num_experts_the_forward_checks_the_indices(model):
    rows = other_rows(10)
    routing = Routing.from_engine(prompt=rows[:4], generated=rows[4:])
    assert torch.equal(recorded(model, LONG, routing=routing).routing.to_batch()[0, :10], rows)
    with pytest.raises(ValueError, match=f"expert {E}, the experts are 0 ... {E - 1}"):
        recorded(model, LONG, routing=Routing.from_engine(prompt=torch.where(rows == 2, E, rows)))
    with pytest.raises(ValueError, match="expert -2"):
        Routing.from_engine(prompt=rows - 2)


def test_wrong_lengths_of_an_engine_raise():
    rows = other_rows(5)
    for tokens in (4, 7):
        with pytest.raises(ValueError, match=f"5 rows .* {tokens} tokens"):
            Routing.from_engine(rows, num_experts=E, tokens=tokens)
    with pytest.raises(ValueError, match=r"\[5, 3, 2\] and generated \[5, 3, 1\]"):
        Routing.from_engine(rows, rows[..., :1], num_experts=E)
    with pytest.raises(ValueError, match="float32"):
        Routing.from_engine(rows.float(), num_experts=E)


# ---------------------------------------------------------------------------------------------------- turns


@pytest.mark.parametrize("known", [True, False], ids=["length known", "length open"])
def test_a_turn_begins_at_the_last_token_of_the_turn_before(known):
    """Turn 1 has 5 tokens, the last sampled and never run. Turn 2 runs it, then 6 more, the last of them sampled."""
    rows = other_rows(10)
    first = Routing.from_engine(rows[:4], num_experts=E, tokens=5 if known else None)
    second = Routing.from_engine(rows[4:], num_experts=E, tokens=7 if known else None)
    whole = Routing.cat([first, second])
    assert torch.equal(whole.to_batch()[0, :10], rows) and whole.open_ended == (not known)
    assert whole.tokens == (11 if known else 10)
    assert not known or bool(whole.unforced[:, 10].all())


def test_turns_that_return_the_whole_conversation():
    """Later turns fill the unforced rows of earlier turns and change no other row."""
    rows, other = other_rows(9), other_rows(9, salt=1)
    first = Routing.from_engine(rows[:4], num_experts=E, tokens=5)
    later = other.clone()
    later[:2] = UNFORCED
    whole = Routing.cat([first, Routing.from_engine(later, num_experts=E, tokens=10)], starts=[0, 0])
    assert torch.equal(whole.to_batch()[0, :4], rows[:4]) and torch.equal(whole.to_batch()[0, 4:9], other[4:])
    assert whole.tokens == 10 and bool(whole.unforced[:, 9].all()) and not bool(whole.unforced[:, :9].any())
    partial = Routing.from_engine(torch.cat([rows[:1], torch.full_like(rows[:1], UNFORCED)]), num_experts=E, tokens=2)
    filled = Routing.cat([partial, Routing.from_engine(rows[1:3], num_experts=E, tokens=2)], starts=[0, 1])
    assert torch.equal(filled.to_batch()[0], rows[:3])


def test_turns_that_do_not_fit_raise():
    turn = Routing.from_engine(other_rows(4), num_experts=E, tokens=4)
    with pytest.raises(ValueError, match="turn 1 starts at 5, the rows before it end at 4"):
        Routing.cat([turn, turn], starts=[0, 5])
    with pytest.raises(ValueError, match="1 starts for 2"):
        Routing.cat([turn, turn], starts=[0])
    with pytest.raises(ValueError, match="routing 1 has experts 9, the first one 8"):
        Routing.cat([turn, replace(turn, num_experts=9)])
    with pytest.raises(ValueError, match=r"turn 0 is a batch \[2, 2\]"):
        Routing.cat([replace(turn, shape=(2, 2)), turn])
    with pytest.raises(ValueError, match="no routing"):
        Routing.cat([])


# ---------------------------------------------------------------------------------------------------- several sequences


def engine_pair(missing: bool) -> tuple[list[Routing], list[Tensor]]:
    rows = [other_rows(11), other_rows(7, salt=1)]
    cut = -1 if missing else None
    return [Routing.from_engine(r[:cut], num_experts=E, tokens=len(r)) for r in rows], rows


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "last row missing"])
@pytest.mark.parametrize("how", ["packed", "left", "right"])
def test_sequences_of_an_engine_packed_and_padded(model, how, missing):
    """Logits and indices of each sequence are those of the sequence alone."""
    routings, _ = engine_pair(missing)
    separate = [recorded(model, ids, routing=r) for ids, r in zip((LONG, SHORT), routings, strict=True)]
    if how == "packed":
        ids, options = torch.cat([LONG, SHORT], 1), {"cu_seqlens": torch.tensor([0, 11, 18])}
        out = recorded(model, ids, routing=Routing.pack(routings), **options)
        logits = out.logits[0].split([11, 7])
        batch = out.routing.to_batch()[0].split([11, 7])
    else:
        ids, mask = peer.padded([LONG[0], SHORT[0]], how)
        routing = Routing.pad(routings, how)
        assert routing.mask is not None and torch.equal(routing.mask.view(2, -1), mask.bool())
        assert bool(routing.unforced[:, ~routing.mask].all())
        out = recorded(model, ids, attention_mask=mask, routing=routing)
        logits = [out.logits[r][mask[r].bool()] for r in range(2)]
        batch = [out.routing.to_batch()[r][mask[r].bool()] for r in range(2)]
    for r, alone in enumerate(separate):
        assert_close(logits[r], alone.logits[0], 1e-5)
        assert torch.equal(batch[r], alone.routing.to_batch()[0])


def test_an_open_ended_routing_cannot_be_packed():
    turn = Routing.from_engine(other_rows(4), num_experts=E)
    with pytest.raises(ValueError, match="routing 0 has 4 rows and perhaps one more token: pass tokens="):
        Routing.pack([turn, turn])
    with pytest.raises(ValueError, match="middle.*right.*left"):
        Routing.pad([turn], "middle")


def test_an_engine_s_rows_with_a_cache_and_under_gradient_checkpointing(model):
    (routing, _), _ = engine_pair(False)
    whole = recorded(model, LONG, routing=routing)
    cache = model.new_cache(1)
    parts = [recorded(model, part, cache=cache, routing=rows).logits
              for part, rows in zip(LONG.split([4, 1, 6], 1), routing.to_batch().split([4, 1, 6], 1), strict=True)]
    assert_close(torch.cat(parts, 1), whole.logits, 1e-5)
    gradients = []
    for recompute in (False, True):
        model.zero_grad(set_to_none=True)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        out = model(LONG, labels=LONG, routing=routing, output_routing=True)
        assert torch.equal(out.routing.indices, routing.indices)
        out.loss.backward()
        model.gradient_checkpointing_disable()
        model.eval()
        gradients.append(peer.gradients(model))
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())
    assert all(gradients[0][f"model.layers.{layer}.mlp.gate.weight"].any() for layer in range(LAYERS))


def test_pack_drops_padding_and_keeps_weights_and_logits_that_all_have(model):
    ids, mask = peer.padded([LONG[0], SHORT[0]], "left")
    out = recorded(model, ids, attention_mask=mask).routing
    packed = Routing.pack([out, out])
    kept = out.indices[:, out.mask]
    assert packed.tokens == 2 * 18 and torch.equal(packed.indices, torch.cat([kept, kept], 1))
    assert torch.equal(packed.weights[:, :18], out.weights[:, out.mask]) and packed.logits.shape == (LAYERS, 36, E)
    assert Routing.pack([out, out.indices_only()]).weights is None


# ---------------------------------------------------------------------------------------------------- same form, same bits


def test_routing_in_float32_is_the_same_in_every_run(model):
    first = recorded(model, LONG)
    for _ in range(3):
        again = recorded(model, LONG)
        assert torch.equal(again.routing.indices, first.routing.indices)
        assert torch.equal(again.routing.logits, first.routing.logits)
        assert torch.equal(recorded(model, LONG, routing=first.routing).logits, first.logits)


def test_routing_in_float32_is_the_same_between_batch_sizes_beyond_a_margin_of_1e_5(model):
    """A row alone, in batches of three sizes, and in parts with a cache; most tokens are beyond the margin."""
    alone = recorded(model, LONG)
    sure = margins(alone.routing) > 1e-5
    assert sure.double().mean() > 0.99
    routings = []
    for rows in (2, 5, 17):
        batch = torch.cat([LONG, CASE.ids(rows - 1, 11, salt=rows)])
        out = recorded(model, batch).routing
        routings.append(replace(out, indices=out.indices[:, :11], weights=None, logits=None, shape=(1, 11)))
    cache = model.new_cache(1)
    routings.append(Routing.pack([recorded(model, part, cache=cache).routing for part in LONG.split([5, 1, 1, 4], 1)]))
    for routing in routings:
        assert not bool((flips(alone.routing, routing) & sure).any())


def test_all_negative_equal_and_nearly_tied_logits():
    """A shift below zero changes neither indices nor weights; equal logits give different experts of equal weight, the same in
    every run; of nearly tied logits no expert is left out that has a higher probability than a chosen one."""
    logits = torch.randn(40, E, generator=peer.generator(3), dtype=torch.float64)
    indices, weights = router_rule(logits, TOP_K)
    for shift in (-100.0, -1000.0):
        low = (logits + shift).float()
        assert bool((low < 0).all())
        again, weights_again = router_rule(low, TOP_K)
        assert torch.equal(again, low.double().softmax(-1).topk(TOP_K, dim=-1).indices)
        gaps = (logits.sort(-1, descending=True).values[:, :-1] - logits.sort(-1, descending=True).values[:, 1:]).amin(-1)
        clear = gaps > 1e-3
        assert torch.equal(again[clear], indices[clear])
        assert_close(weights_again[clear], weights[clear], 2e-4)  # float32 next to 1000 has steps of 6e-5
    for level in (-7.5, 0.0, 30.0):
        equal = torch.full((6, E), level)
        again, weights_again = router_rule(equal, TOP_K)
        assert bool((again.sort(-1).values.diff(dim=-1) > 0).all()) and bool((weights_again == 1 / TOP_K).all())
        assert all(torch.equal(router_rule(equal, TOP_K)[0], again) for _ in range(3))
    tied = torch.randn(200, 1, generator=peer.generator(4)) + 1e-7 * torch.randn(200, E, generator=peer.generator(5))
    chosen, chosen_weights = router_rule(tied, TOP_K)
    p = tied.softmax(-1)
    left = p.scatter(-1, chosen, -1.0).amax(-1)
    assert bool((p.gather(-1, chosen).amin(-1) >= left).all())
    assert_close(chosen_weights, torch.full((200, TOP_K), 1 / TOP_K), 1e-5)


# ---------------------------------------------------------------------------------------------------- on disk


def test_a_saved_routing_is_loaded_unchanged(model, tmp_path: Path):
    ids, mask = peer.padded([LONG[0], SHORT[0]], "left")
    for routing in (
        recorded(model, ids, attention_mask=mask).routing,
        Routing.from_engine(other_rows(5), num_experts=E),
        Routing(other_rows(4).permute(1, 0, 2), layers=(0, 2, 5)),
        Routing(torch.tensor([[[300, 7]]]), num_experts=512),
    ):
        routing.save(tmp_path / "r.safetensors", {"text": "a title"})
        loaded = Routing.load(tmp_path / "r.safetensors")
        assert read_metadata(tmp_path / "r.safetensors") == {"text": "a title"}
        for name in ("indices", "weights", "logits", "mask"):
            a, b = getattr(loaded, name), getattr(routing, name)
            assert (a is None) == (b is None) and (a is None or (torch.equal(a, b) and a.dtype == b.dtype)), name
        assert [getattr(loaded, n) for n in ("layers", "num_experts", "shape", "open_ended")] == [
            getattr(routing, n) for n in ("layers", "num_experts", "shape", "open_ended")
        ]
    assert load_file(tmp_path / "r.safetensors")["indices"].dtype == torch.int16
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]
    with pytest.raises(ValueError, match="'format' is a key of the format"):
        routing.save(tmp_path / "r.safetensors", {"format": "mine"})


def test_a_saved_routing_replays_bit_for_bit(model, tmp_path: Path):
    out = recorded(model, LONG)
    out.routing.save(tmp_path / "r.safetensors")
    assert torch.equal(recorded(model, LONG, routing=Routing.load(tmp_path / "r.safetensors")).logits, out.logits)


GOOD = {"layers": [0, 1], "num_experts": 5, "shape": [1, 3], "open_ended": False}
ROWS = torch.tensor([[[0, 1], [2, 3], [4, -1]]]).expand(2, -1, -1).contiguous()


@pytest.mark.parametrize("tensors,facts,words", [
    ({"indices": ROWS + 3}, {}, "expert 7"),
    ({"indices": ROWS - 1}, {}, "expert -2"),
    ({"indices": ROWS.float()}, {}, "torch.float32"),
    ({"indices": ROWS[0]}, {}, r"\[3, 2\]"),
    ({}, {}, "no indices"),
    ({"indices": ROWS, "code": ROWS.clone()}, {}, "unknown tensor 'code'"),
    ({"indices": ROWS, "weights": torch.ones(2, 3, 1)}, {}, r"weights \[2, 3, 1\]"),
    ({"indices": ROWS, "weights": torch.full((2, 3, 2), torch.nan)}, {}, "not finite"),
    ({"indices": ROWS, "logits": torch.ones(2, 3, 4)}, {}, "5 experts"),
    ({"indices": ROWS, "logits": torch.ones(2, 4, 5)}, {}, r"logits \[2, 4, 5\]"),
    ({"indices": ROWS, "mask": torch.ones(3)}, {}, "mask is stored as torch.float32"),
    ({"indices": ROWS, "mask": torch.ones(4, dtype=torch.bool)}, {}, r"mask \[4\]"),
    ({"indices": ROWS}, {"layers": [0]}, "1 layer numbers"),
    ({"indices": ROWS}, {"layers": [0, 0]}, "twice"),
    ({"indices": ROWS}, {"layers": []}, "not numbers"),
    ({"indices": ROWS}, {"layers": [0, True]}, "not numbers"),
    ({"indices": ROWS}, {"num_experts": -5}, "not numbers"),
    ({"indices": ROWS}, {"shape": [1, 4]}, r"shape \[1, 4\]"),
    ({"indices": ROWS}, {"shape": "3"}, "not numbers"),
    ({"indices": ROWS}, {"more": 1}, "must have exactly"),
])
def test_a_file_with_wrong_contents_raises(tmp_path: Path, tensors, facts, words):
    path = tmp_path / "r.safetensors"
    save_file(tensors, path, metadata={"format": FORMAT, "routing": json.dumps(GOOD | facts)})
    with pytest.raises(ValueError, match=words):
        Routing.load(path)


def test_other_files_raise(tmp_path: Path):
    path = tmp_path / "r.safetensors"
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Routing.load(path)
    save_file({"indices": ROWS}, path)
    with pytest.raises(ValueError, match="None, expected 'qwen35moe.routing.2'"):
        Routing.load(path)
    for text in ("", "[", "[1]", "{}"):
        save_file({"indices": ROWS}, path, metadata={"format": FORMAT, "routing": text})
        with pytest.raises(ValueError, match="must have exactly"):
            Routing.load(path)


# ---------------------------------------------------------------------------------------------------- a value


def test_routings_are_compared_by_value(model):
    a, b = recorded(model, LONG).routing, recorded(model, LONG).routing
    assert a == b and hash(a) == hash(b) and a in [b] and len({a, b}) == 1
    changed = {
        "indices": (a.indices + 1) % E, "weights": a.weights * 2, "logits": None, "layers": (0, 1, 3), "shape": None,
        "mask": torch.ones(11).bool(), "open_ended": True,
    }  # fmt: skip
    for name, value in changed.items():
        assert a != replace(a, **{name: value}), name
    assert a != replace(a, num_experts=0) and a != "routing" and a.indices_only() != a
    assert a.indices_only() == replace(a.indices_only(), indices=a.indices.to(torch.int8))  # as an engine sends them
    assert a != replace(a, weights=a.weights.double())
    one = replace(a, indices=a.indices[:, :1], weights=None, logits=None, shape=(1, 1))
    assert one != replace(one, indices=one.indices.expand(-1, 2, -1), shape=(1, 2))
    assert replace(a, layers=[0, 1, 2], shape=[1, 11]) == a  # type: ignore[arg-type]
    out = RouterOutput(a.logits[0], a.indices[0], a.weights[0])
    assert out == RouterOutput(b.logits[0], b.indices[0], b.weights[0]) and hash(out) == hash(replace(out))
    assert out != RouterOutput(a.logits[1], a.indices[1], a.weights[1])


def test_routings_are_copied_and_pickled_without_a_graph(model):
    """Also one whose weights belong to a graph, as after a training forward."""
    routing = model(LONG, output_routing=True).routing
    assert routing.weights.grad_fn is not None
    for again in (copy.deepcopy(routing), pickle.loads(pickle.dumps(routing)), copy.copy(routing)):
        assert again == routing
    again = copy.deepcopy(routing)
    again.indices.zero_()
    assert again != routing and again.weights.grad_fn is None


def test_a_routing_is_shown_in_one_screen(model):
    routing = recorded(model, LONG).routing
    expected = (
        "Routing(layers [0, 1, 2]; 8 experts, top-2; 11 tokens, batch [1, 11]; indices [3, 11, 2] int64, "
        "weights [3, 11, 2] float32, logits [3, 11, 8] float32)"
    )
    assert repr(routing) == expected
    long = Routing(torch.zeros(90, 5, 1).long(), mask=torch.arange(5) < 3, open_ended=True)
    assert len(repr(long)) < 200 and "? experts" in repr(long) and "5 tokens, 2 of them padding, perhaps one more" in repr(long)
    page = routing._repr_html_()
    assert page.count("<tr>") == 1 + LAYERS and f"{float(imbalance(routing)[1]):.2f}" in page
    assert "<table>" not in long._repr_html_() and len(replace(long, num_experts=3)._repr_html_()) < 9000
