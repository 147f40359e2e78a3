"""The laws of the model, at the cuts where chunks, convolutions and caches begin and end.

Each test states how its law holds: "bit for bit", or "within the bound", which is 1e-5, relative, in float32: the same
sums in another order (another chunk boundary, another batch in a matrix product), nothing else.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import peer
from tests.support.peer import FULL, LINEAR, Case, assert_all_close, assert_close, odd_shape, relative_error
from tests.support.rounding import spread

BOUND = 1e-5
SPREADS = 8  # as in test_parity.py
CUTS = [1, 3, 4, 63, 64, 65, 129]
AT_CUTS = pytest.mark.parametrize("cut", CUTS)
CACHES = pytest.mark.parametrize("max_length", [None, 160], ids=["growing", "static"])
CASE = odd_shape(
    7, layer_types=[LINEAR, FULL, LINEAR, LINEAR, FULL], num_hidden_layers=5, num_experts=7, num_experts_per_tok=3,
    linear_num_key_heads=2, linear_num_value_heads=6, num_attention_heads=6, num_key_value_heads=2,
    linear_conv_kernel_dim=4, tie_word_embeddings=False, linear_key_head_dim=14, linear_value_head_dim=10,
)


@pytest.fixture(scope="module")
def model() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 0)
    return model


def tokens(batch: int, length: int, salt: int = 0) -> Tensor:
    return CASE.ids(batch, length, salt)


def states(cache: Any, row: int | None = None) -> dict[str, Tensor]:
    """The states in a cache by name; of one row only the positions of its tokens."""
    tensors = {}
    for i, kind in enumerate(CASE.text["layer_types"]):
        names = ("conv_state", "recurrent_state") if kind == LINEAR else ("key", "value")
        for name in names:
            tensor = getattr(cache[i], name)
            if row is not None:
                tensor = tensor[row : row + 1]
                tensor = tensor if kind == LINEAR else tensor[:, : int(cache.lengths[row])]
            tensors[f"{i}.{name}"] = tensor
    return tensors


@torch.no_grad()
def prefilled(model: Any, ids: Tensor, max_length: int | None = None, record: int = 0, **options: Any) -> Any:
    cache = model.new_cache(ids.shape[0], max_length, record=record)
    return model(ids, cache=cache, **options)


# ---------------------------------------------------------------------------------------------- packed == separate


def _with_gradients(model: Any, logits: Tensor, seed: int = 3) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (logits * torch.randn(logits.shape, generator=peer.generator(seed))).sum().backward()
    return peer.gradients(model)


def assert_same_gradients(model: Any, one: Callable[[Any], Tensor], other: Callable[[Any], Tensor]) -> None:
    """The gradients of two ways to compute the same logits: in float64 to 1e-11; in float32 within the bound or, where float32
    has fewer digits, within 8 spreads of float64 (tests/support/rounding.py)."""
    wide = copy.deepcopy(model).double()
    exact = _with_gradients(wide, other(wide))
    assert_all_close(_with_gradients(wide, one(wide)), exact, 1e-11, "gradients in float64")
    actual, expected = (_with_gradients(model, way(model)) for way in (one, other))
    assert actual.keys() == expected.keys() == exact.keys()
    beyond = [name for name in actual if not relative_error(actual[name], expected[name]) <= BOUND]
    moved = spread(lambda: _with_gradients(wide, other(wide)), exact) if beyond else {}
    for name in beyond:
        error, allowed = (actual[name] - exact[name]).abs().max().item(), SPREADS * moved[name]
        assert error <= allowed, f"{name}: {error:.1e} from float64, float32 explains {allowed:.1e}"


@pytest.mark.parametrize("separator", ["cu_seqlens", "position_ids"])
@pytest.mark.parametrize("lengths", [[1, 3, 4], [63, 64, 65], [129, 1, 2], [5, 5]], ids=str)
def test_packed_documents_equal_separate_ones(model, lengths, separator):
    """Within the bound: logits, and the gradient of every parameter."""
    ids = tokens(1, sum(lengths))
    bounds = [0, *itertools.accumulate(lengths)]
    if separator == "cu_seqlens":
        options = {"cu_seqlens": torch.tensor(bounds)}
    else:
        options = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}

    def packed(model: Any) -> Tensor:
        return model(ids, **options).logits

    def separate(model: Any) -> Tensor:
        return torch.cat([model(ids[:, a:b]).logits for a, b in itertools.pairwise(bounds)], dim=1)

    assert_close(packed(model), separate(model), BOUND)
    assert_same_gradients(model, packed, separate)


def test_packed_rows_of_a_batch_and_their_losses(model):
    """Within the bound. Restarting positions in every row of a batch; no label crosses from one document to the next."""
    lengths = [[5, 9, 6], [3, 1, 16]]
    ids = tokens(2, 20)
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = model(ids, position_ids=position_ids, labels=ids, output_router_logits=True)
    logits, loss, labels = [], 0.0, 0
    for r, row in enumerate(lengths):
        for a, b in itertools.pairwise([0, *itertools.accumulate(row)]):
            out = model(ids[r : r + 1, a:b])
            logits.append(out.logits)
            if b - a > 1:
                loss = loss + peer.cross_entropy(out.logits, ids[r : r + 1, a:b]) * (b - a - 1)
            labels += b - a - 1
    assert_close(packed.logits.flatten(0, 1), torch.cat(logits, dim=1)[0], BOUND)
    expected = loss / labels + CASE.text["router_aux_loss_coef"] * packed.aux_loss
    assert_close(packed.loss, expected, BOUND)


@AT_CUTS
def test_packed_documents_continue_their_own_caches(model, cut):
    """Within the bound: document d of a packed row continues row d of the cache."""
    lengths = [cut, 5, 2]
    first, ids = tokens(3, 7), tokens(1, sum(lengths), salt=1)
    bounds = [0, *itertools.accumulate(lengths)]
    cache = prefilled(model, first).cache
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor(bounds), cache=cache).logits
        assert cache.lengths.tolist() == [7 + length for length in lengths]
        for r, (a, b) in enumerate(itertools.pairwise(bounds)):
            alone = prefilled(model, first[r : r + 1]).cache
            assert_close(packed[:, a:b], model(ids[:, a:b], cache=alone).logits, BOUND)
            assert_all_close(states(cache, r), states(alone), BOUND, f"states of row {r}")


# ---------------------------------------------------------------------------------------------- padded == unpadded


@pytest.mark.parametrize("side", ["left", "right"])
@CACHES
@AT_CUTS
def test_padded_rows_equal_unpadded_ones(model, cut, side, max_length):
    """Within the bound: logits, states, and three tokens decoded after. The padding's own logits are zero."""
    rows = [tokens(1, length, salt=length)[0] for length in (cut, 7, 2)]
    ids, mask = peer.padded(rows, side, pad=3)
    out = prefilled(model, ids, max_length, attention_mask=mask)
    cache, more = out.cache, tokens(3, 3, salt=5)
    assert cache.lengths.tolist() == [cut, 7, 2]
    with torch.no_grad():
        step_mask, decoded = mask, []
        for t in range(3):
            step_mask = torch.cat([step_mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            decoded.append(model(more[:, t : t + 1], attention_mask=step_mask, cache=cache).logits)
        for r, row in enumerate(rows):
            alone = prefilled(model, row[None], max_length)
            real = mask[r].bool()
            assert_close(out.logits[r][real], alone.logits[0], BOUND, f"logits of row {r}")
            assert (out.logits[r][~real] == 0).all()
            for t in range(3):
                single = model(more[r : r + 1, t : t + 1], cache=alone.cache).logits
                assert_close(decoded[t][r : r + 1], single, BOUND, f"row {r}, decoded token {t}")
            assert_all_close(states(cache, r), states(alone.cache, 0), BOUND, f"states of row {r}")


def test_padding_in_between_and_gradients(model):
    """Within the bound: a row whose padding lies anywhere equals the row without, in gradients too."""
    ids = tokens(2, 12)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0]])
    real = mask.bool()

    def padded(model: Any) -> Tensor:
        return torch.cat([model(ids, attention_mask=mask).logits[r][real[r]] for r in range(2)])

    def separate(model: Any) -> Tensor:
        return torch.cat([model(ids[r][real[r]][None]).logits[0] for r in range(2)])

    assert_close(padded(model), separate(model), BOUND)
    assert_same_gradients(model, padded, separate)


# ------------------------------------------------------------------------------------ prefix + rest, decode == prefill


@CACHES
@AT_CUTS
def test_a_prefix_and_the_rest_equal_the_whole(model, cut, max_length):
    """Within the bound: logits and states."""
    ids = tokens(2, cut + 6)
    whole = prefilled(model, ids, max_length)
    head = prefilled(model, ids[:, :cut], max_length)
    with torch.no_grad():
        rest = model(ids[:, cut:], cache=head.cache)
    assert_close(torch.cat([head.logits, rest.logits], dim=1), whole.logits, BOUND)
    assert_all_close(states(rest.cache), states(whole.cache), BOUND, "states")


@CACHES
def test_decoding_equals_prefill(model, max_length):
    """Within the bound: 131 tokens one by one, from an empty cache, through every cut."""
    ids = tokens(2, 131)
    whole = prefilled(model, ids, max_length)
    cache, logits = model.new_cache(2, max_length), []
    with torch.no_grad():
        for t in range(131):
            logits.append(model(ids[:, t : t + 1], cache=cache).logits)
            if t + 1 in CUTS:
                assert_all_close(states(cache), states(prefilled(model, ids[:, : t + 1]).cache), BOUND, f"after {t + 1}")
    assert_close(torch.cat(logits, dim=1), whole.logits, BOUND)


# ------------------------------------------------------------------------------------------------ going back


@CACHES
@AT_CUTS
def test_a_draft_rolled_back_was_never_drafted(model, cut, max_length):
    """Keys, values and convolution states bit for bit; recurrent states and later logits within the bound (recomputed)."""
    ids, draft, rest = tokens(2, cut), tokens(2, 5, salt=1), tokens(2, 4, salt=2)
    cache = prefilled(model, ids, max_length, record=5).cache
    never = prefilled(model, ids, max_length).cache
    with torch.no_grad():
        model(draft, cache=cache)
        cache.rollback(5)
        assert cache.lengths.tolist() == never.lengths.tolist()
        actual, expected = states(cache), states(never)
        recurrent = {name for name in actual if name.endswith("recurrent_state")}
        assert_all_close({n: actual[n] for n in recurrent}, {n: expected[n] for n in recurrent}, BOUND)
        for name in actual.keys() - recurrent:
            assert torch.equal(actual[name], expected[name]), name
        assert_close(model(rest, cache=cache).logits, model(rest, cache=never).logits, BOUND)
        assert_all_close(states(cache), states(never), BOUND)


@CACHES
@AT_CUTS
def test_each_row_rolls_back_by_its_own_number(model, cut, max_length):
    """Within the bound: drafted token by token, then two rollbacks of 0 to 5 tokens per row."""
    ids, draft, rest = tokens(3, cut), tokens(3, 5, salt=1), tokens(3, 4, salt=2)
    cache = prefilled(model, ids, max_length, record=6).cache
    with torch.no_grad():
        for t in range(5):
            model(draft[:, t : t + 1], cache=cache)
        cache.rollback(torch.tensor([5, 0, 2]))
        cache.rollback(torch.tensor([0, 1, 2]))
        kept = [0, 4, 1]
        assert cache.lengths.tolist() == [cut + n for n in kept]
        logits = model(rest, cache=cache).logits
        for r, n in enumerate(kept):
            alone = prefilled(model, torch.cat([ids[r], draft[r, :n]])[None]).cache
            assert_close(logits[r : r + 1], model(rest[r : r + 1], cache=alone).logits, BOUND, f"row {r}")
            assert_all_close(states(cache, r), states(alone), BOUND, f"states of row {r}")


@CACHES
@AT_CUTS
def test_a_restored_snapshot_is_the_original_bit_for_bit(model, cut, max_length):
    ids, other, rest = tokens(2, cut), tokens(2, 9, salt=1), tokens(2, 4, salt=2)
    cache = prefilled(model, ids, max_length).cache
    before = {name: tensor.clone() for name, tensor in states(cache).items()}
    point = cache.snapshot()
    with torch.no_grad():
        expected = model(rest, cache=cache.clone()).logits
        for _ in range(2):
            model(other, cache=cache)
            cache.restore(point)
            assert cache.lengths.tolist() == [cut, cut]
            for name, tensor in states(cache).items():
                assert torch.equal(tensor, before[name]), name
        assert torch.equal(model(rest, cache=cache).logits, expected)


# ------------------------------------------------------------------------------------- alone, permuted, saved


@AT_CUTS
def test_a_row_of_a_batch_equals_the_row_alone(model, cut):
    """Within the bound."""
    ids = tokens(3, cut)
    together = prefilled(model, ids)
    for r in range(3):
        alone = prefilled(model, ids[r : r + 1])
        assert_close(together.logits[r : r + 1], alone.logits, BOUND)
        assert_all_close(states(together.cache, r), states(alone.cache), BOUND)


def test_rows_of_a_batch_can_be_permuted(model):
    """Within the bound."""
    ids, order = tokens(4, 65), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        assert_close(model(ids[order]).logits, model(ids).logits[order], BOUND)


@pytest.mark.parametrize("per_layer", [True, False])
def test_permuted_experts_change_nothing(model, per_layer):
    """Within the bound: a token's experts are added in their order. The balancing loss pools expert e of all layers, so
    it only stays when all layers are permuted alike."""
    ids = tokens(2, 65)
    twin = peer.ours(CASE, source=model)
    orders = [torch.randperm(7, generator=peer.generator(i if per_layer else 0)) for i in range(5)]
    with torch.no_grad():
        for layer, order in zip(twin.model.layers, orders, strict=True):
            for weight in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                weight.copy_(weight[order].clone())
        actual = twin(ids, output_routing=True, output_router_logits=True)
        expected = model(ids, output_routing=True, output_router_logits=True)
    assert_close(actual.logits, expected.logits, BOUND)
    if not per_layer:
        assert_close(actual.aux_loss, expected.aux_loss, BOUND)
    for i, order in enumerate(orders):
        assert torch.equal(order[actual.routing.indices[i]], expected.routing.indices[i])


def test_a_saved_and_loaded_model_is_the_original_bit_for_bit(model, tmp_path):
    """The weights always. The logits too when torch allocated the weights; those of a mapped file have another alignment, on
    which the order of summation in the CPU library's matrix products depends."""
    ids = tokens(2, 65)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    saved = model.state_dict()
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in saved.items()}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        assert_close(loaded(ids).logits, model(ids).logits, BOUND)
        loaded.load_state_dict({name: tensor.clone() for name, tensor in loaded.state_dict().items()}, assign=True)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("max_length", [None, 80], ids=["growing", "static"])
@pytest.mark.parametrize("cut", [1, 3, 64])
def test_a_saved_and_loaded_cache_is_the_original_bit_for_bit(model, tmp_path, cut, max_length):
    rows = [tokens(1, length, salt=length)[0] for length in (cut, 7)]
    ids, mask = peer.padded(rows, "left")
    cache, rest = prefilled(model, ids, max_length, attention_mask=mask).cache, tokens(2, 4, salt=2)
    cache.save(tmp_path / "cache.safetensors")
    loaded = type(cache).load(tmp_path / "cache.safetensors", model.config.text_config)
    assert loaded.lengths.tolist() == cache.lengths.tolist() and loaded.max_length == cache.max_length
    for name, tensor in states(cache).items():
        assert torch.equal(states(loaded)[name], tensor), name
    with torch.no_grad():
        assert torch.equal(model(rest, cache=loaded).logits, model(rest, cache=cache).logits)


def test_the_case_has_every_kind_of_layer_and_no_two_sizes_alike():
    case: Case = CASE
    sizes = [case.text[name] for name in ("hidden_size", "vocab_size", "head_dim", "linear_key_head_dim",
                                          "linear_value_head_dim", "moe_intermediate_size",
                                          "shared_expert_intermediate_size", "num_experts")]
    assert {LINEAR, FULL} == set(case.text["layer_types"]) and len(set(sizes)) == len(sizes), sizes
