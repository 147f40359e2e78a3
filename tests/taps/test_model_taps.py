"""Taps of a real model: positions in padded rows, patches in every form, and what is reported."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import backends, ops, taps
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape, relative_error

CASE = odd_shape(
    8, layer_types=[LINEAR, FULL, LINEAR], num_hidden_layers=3, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=5,
    num_experts_per_tok=2,
)
EXACT = 1e-11
ROWS = [CASE.ids(1, n, salt=n)[0] for n in (6, 3, 4)]
VALUES = (
    "embed", "layers.0.input", "layers.0.linear_attn.decay", "layers.0.linear_attn.key", "layers.1.self_attn.query",
    "layers.1.self_attn.scores", "layers.2.mlp.router_logits", "layers.2.mlp.routed", "layers.2.output", "norm",
)


@pytest.fixture(scope="module")
def plain() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 0)
    return model.double()


@pytest.fixture
def model(plain: Any) -> Any:
    return copy.deepcopy(plain)


def token(name: str, value: Tensor, row: int, position: int) -> Tensor:
    """The value of one token, from a recording of one whole row."""
    if name.endswith("scores"):
        return value[0, :, position, : position + 1]
    return (value if value.dim() == 2 else value[0])[position].flatten()


# ------------------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_positions_are_counted_in_each_row_without_its_padding(plain, side):
    """From the end, from the start, and in both orders: the values of each row alone."""
    ids, mask = peer.padded(ROWS, side)
    for positions in (-1, 0, [-1, 0], [1, -2], slice(-2, None), slice(0, 3, 2)):
        with taps.record(plain, VALUES, positions=positions) as seen:
            plain(ids, attention_mask=mask)
        for r, row in enumerate(ROWS):
            with taps.record(plain, VALUES) as alone:
                plain(row[None])
            picked = list(range(len(row)))[positions] if isinstance(positions, slice) else [
                p % len(row) for p in ([positions] if isinstance(positions, int) else positions)]
            for name in VALUES:
                for i, position in enumerate(picked):
                    actual = seen[name][r, :, i, : position + 1] if name.endswith("scores") else seen[name][r, i].flatten()
                    assert_close(actual, token(name, alone[name], r, position), EXACT, f"{name} {positions} row {r}")


@torch.no_grad()
def test_positions_in_cached_steps_and_continued_rows(plain):
    """The end of a row is that of the new tokens, also where rows have other numbers of them."""
    ids, mask = peer.padded(ROWS, "left")
    cache = plain.new_cache(3)
    with taps.record(plain, "norm", positions=-1) as seen:
        plain(ids, attention_mask=mask, cache=cache)
        plain(ids[:, -1:], cache=cache)
    first, second = seen.all("norm")
    assert first.shape == second.shape == (3, 1, CASE.text["hidden_size"])
    with taps.record(plain, "norm") as whole:
        plain(torch.cat([ROWS[1], ROWS[1][-1:]])[None])
    assert_close(torch.cat([first[1], second[1]]), whole["norm"][0, -2:], EXACT)


@torch.no_grad()
def test_positions_that_rows_do_not_have_are_refused(plain):
    ids, mask = peer.padded(ROWS, "left")
    for positions, words in ((4, "3 tokens of norm, row 1"), (-4, "3 tokens of norm, row 1"), (slice(1, None), r"\[5, 2, 3\]")):
        with pytest.raises(ValueError, match=words), taps.record(plain, "norm", positions=positions):
            plain(ids, attention_mask=mask)
    with taps.record(plain, "norm", positions=slice(None)) as seen:
        plain(ids, attention_mask=mask)
    assert seen["norm"].shape[:2] == (3, 6)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_patch_of_positions(plain, side):
    """It replaces the same tokens as a patch of each row alone; values by token (N) too. A gradient flows through it."""
    ids, mask = peer.padded(ROWS, side)
    for name in ("layers.1.input", "layers.2.mlp.routed", "layers.0.linear_attn.value", "layers.0.linear_attn.beta"):
        with taps.patch(plain, {name: lambda value: 0.5 * value}, positions=[-1, 0]):
            logits = plain(ids, attention_mask=mask).logits
        for r, row in enumerate(ROWS):
            def by_hand(value: Tensor, n: int = len(row)) -> Tensor:
                rows = value.view(1, n, -1).clone()
                rows[:, [0, n - 1]] *= 0.5
                return rows.view(value.shape)

            with taps.patch(plain, {name: by_hand}):
                alone = plain(row[None]).logits[0]
            assert_close(logits[r][mask[r].bool()], alone, EXACT, f"{name} row {r}")
    with pytest.raises(ValueError, match="no token axis"):
        taps.patch(plain, {"layers.0.linear_attn.state": torch.zeros_like}, positions=-1)
    with pytest.raises(ValueError, match=r"returned \[3, 2, .*has \[3, 1"), taps.patch(
            plain, {"norm": lambda v: torch.cat([v, v], 1)}, positions=-1):
        plain(ids, attention_mask=mask)


@torch.no_grad()
def test_a_patch_function_may_take_the_layer(plain):
    layers: list[Any] = []

    def scaled(value: Tensor, layer: int | None) -> Tensor:
        layers.append(layer)
        return value * (1.0 if layer is None else layer)

    with taps.patch(plain, {"layers.[012].output": scaled, "norm": scaled}):
        actual = plain(ROWS[0][None]).logits
    with taps.patch(plain, {f"layers.{i}.output": (lambda v, i=i: v * i) for i in range(3)}):
        assert torch.equal(actual, plain(ROWS[0][None]).logits)
    assert layers == [0, 1, 2, None]
    with pytest.raises(ValueError, match="requires 3 arguments"):
        taps.patch(plain, {"norm": lambda a, b, c: a})


# ---------------------------------------------------------------------------------------------- patches in every form

PATCHED = [entry.name.replace("layers.N.self", "layers.1.self").replace("layers.N", "layers.0") for entry in taps.catalogue()
           if entry.leaf not in ("indices", "scores") and not entry.name.startswith("visual")]


def changed(value: Tensor) -> Tensor:
    return 0.7 * value - 0.01


def changed_in_place(value: Tensor) -> Tensor:
    return value.mul_(0.7).sub_(0.01)


def changed_view(value: Tensor) -> Tensor:
    return torch.stack([changed(value), value], -1)[..., 0]


@pytest.mark.parametrize("name", PATCHED)
@torch.no_grad()
def test_a_patch_means_the_same_however_it_is_written_and_in_every_form(plain, name):
    """Out of place, in place, as a view; with a cache (the last token), static, under checkpointing."""
    ids = CASE.ids(2, 5)
    with taps.record(plain, ["layers.0.linear_attn.conv", "layers.0.input"]) as unchanged:
        reference = plain(ids).logits
    results = []
    for function in (changed, changed_in_place, changed_view):
        values = taps.record(plain, ["layers.0.linear_attn.conv", "layers.0.input"])
        with taps.patch(plain, {name: function}), values:
            results.append(plain(ids, output_hidden_states=True))
        if name.endswith((".query", ".key", ".value", ".output")) and "linear_attn" in name:
            assert torch.equal(values["layers.0.linear_attn.conv"], unchanged["layers.0.linear_attn.conv"])
    if not name.endswith("linear_attn.state"):
        assert relative_error(results[0].logits, reference) > 1e-6
    for other in results[1:]:
        for a, b in zip((other.logits, *other.hidden_states), (results[0].logits, *results[0].hidden_states), strict=True):
            assert_close(a, b, EXACT)
    if not name.endswith("state"):  # patched after every call
        for max_length in (None, 9):
            cache = plain.new_cache(2, max_length)
            with taps.patch(plain, {name: changed_in_place}):
                parts = [plain(part, cache=cache).logits for part in ids.split([3, 1, 1], dim=1)]
            assert_close(torch.cat(parts, 1), results[0].logits, EXACT)
    if name.startswith("layers.0"):
        with torch.enable_grad():
            for checkpointing in (False, True):
                one = copy.deepcopy(plain).train()
                if checkpointing:
                    one.gradient_checkpointing_enable()
                with taps.patch(one, {name: changed_in_place}):
                    loss = one(ids, output_router_logits=True).logits.square().sum()
                loss.backward()  # after the block
                if not checkpointing:
                    expected = peer.gradients(one)
            peer.assert_all_close(peer.gradients(one), expected, 1e-9)


@torch.no_grad()
def test_a_patched_attention_map_in_place(plain):
    ids = CASE.ids(2, 5)
    for layer, name in ((0, "linear_attn"), (1, "self_attn")):
        results = []
        for function in (lambda w: 0.5 * w, lambda w: w.mul_(0.5)):
            with taps.patch(plain, {f"layers.{layer}.{name}.scores": function}):
                results.append(plain(ids).logits)
        assert torch.equal(*results) and relative_error(results[0], plain(ids).logits) > 1e-3


@torch.no_grad()
def test_the_order_of_nested_taps_and_entering_twice(plain):
    ids = CASE.ids(1, 4)
    first, second = taps.patch(plain, {"norm": lambda v: v + 1}), taps.patch(plain, {"norm": lambda v: 2 * v})
    outer = taps.record(plain, "norm")
    with taps.record(plain, "norm") as unpatched:
        plain(ids)
    with outer, first, second, taps.record(plain, "norm") as inner:
        plain(ids)
    assert torch.equal(outer["norm"], inner["norm"]) and torch.equal(inner["norm"], 2 * (unpatched["norm"] + 1))
    once = taps.record(plain, "norm")
    with once:
        with once:
            pass
        plain(ids)
    assert torch.equal(once["norm"], unpatched["norm"])


def test_an_error_inside_a_patch_leaves_no_tap(plain):
    def fail(value: Tensor) -> Tensor:
        raise KeyError("inside")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="inside"), taps.record(plain, "norm"), taps.patch(plain, {"layers.1.input": fail}):
            plain(ROWS[0][None])
        with pytest.raises(ValueError, match="returned NoneType.*return the value"):
            with taps.patch(plain, {"layers.1.input": lambda v: None}):
                plain(ROWS[0][None])
    with torch.no_grad(), taps.record(plain, "norm") as seen:
        plain(ROWS[0][None])
    assert len(seen) == 1


def test_a_patched_tensor_of_ones_own_is_never_written(plain):
    """A steering vector as the state, an expanded mean: the cache and later calls do not write into them."""
    own = torch.ones(1, 4, CASE.text["linear_key_head_dim"], CASE.text["linear_value_head_dim"], dtype=torch.float64)
    with torch.no_grad():
        for max_length in (None, 9):
            cache = plain.new_cache(1, max_length)
            with taps.patch(plain, {"layers.0.linear_attn.state": lambda s: own}):
                plain(ROWS[0][None], cache=cache)
            cache[0].recurrent_state.mul_(3)
            assert (own == 1).all()
            cache = plain.new_cache(1, max_length)
            with taps.patch(plain, {"layers.0.linear_attn.state": lambda s: s.mean(1, keepdim=True).expand_as(s)}):
                plain(ROWS[0][None], cache=cache)
            cache[0].recurrent_state.mul_(3)


def test_threads_select_tokens_of_their_own_rows(plain):
    """Two forwards at a time, of other lengths, with one recording each of its own model."""
    models = [copy.deepcopy(plain) for _ in range(2)]
    results: list[Any] = [None, None]

    def run(i: int) -> None:
        ids, mask = peer.padded(ROWS[i:], "left")
        for _ in range(5):
            with torch.no_grad(), taps.record(models[i], "norm", positions=-1) as seen:
                models[i](ids, attention_mask=mask)
            results[i] = seen["norm"]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(results[0][1:], results[1], EXACT)


# ---------------------------------------------------------------------------------------------------- what is reported


def ignores_its_tap(hidden, gate_up, down, indices, weights, *, tap=None):
    return ops.experts.definition(hidden, gate_up, down, indices, weights)


@torch.no_grad()
def test_taps_that_nothing_reaches_are_reported(model):
    ids = ROWS[0][None]
    backends.register("experts", "mine", ignores_its_tap)
    try:
        with backends.use(experts="mine"):
            with pytest.warns(UserWarning, match=r"this patch of layers\.\*\.mlp\.expert_out: it had no effect"):
                with taps.patch(model, {"layers.*.mlp.expert_out": torch.zeros_like}):
                    model(ids)
            with pytest.warns(UserWarning, match=r"recording of layers\.0\.mlp\.expert_in"):
                with taps.record(model, ["layers.0.mlp.expert_in", "norm"]):
                    model(ids)
    finally:
        backends.unregister("experts", "mine")
    class Own(nn.Module):
        def forward(self, hidden, indices, weights, tap=None):
            return hidden

    model.model.layers[1].mlp.experts = Own()
    with pytest.warns(UserWarning, match=r"patch of layers\.1\.mlp\.expert_out: it"):  # the other layers were reached
        with taps.patch(model, {"layers.*.mlp.expert_out": torch.zeros_like}):
            model(ids)
    with pytest.warns(UserWarning, match="patch of norm"):
        with taps.patch(model, {"norm": torch.zeros_like}):
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with taps.patch(model, {"layers.*.mlp.routed": torch.zeros_like}), taps.record(model, "layers.*.linear_attn.state"):
            model(ids)


def test_a_tap_on_experts_that_take_none_is_refused(model):
    class Own(nn.Module):
        def forward(self, hidden, indices, weights):
            return hidden

    model.model.layers[1].mlp.experts = Own()
    with torch.no_grad():
        model(ROWS[0][None])
        with pytest.raises(ValueError, match=r"expert_out, which Own does not materialise.*tap\(name, value\)"):
            with taps.patch(model, {"layers.1.mlp.expert_out": torch.zeros_like}):
                model(ROWS[0][None])


@torch.no_grad()
def test_logits_of_a_router_with_a_rule_of_its_own(model):
    """A recording changes nothing; a patch needs the rule."""
    ids, gate = ROWS[0][None], model.model.layers[0].mlp.gate

    class Reversed(type(gate)):
        def forward(self, hidden):
            logits = hidden @ self.weight.T
            weights, indices = logits.neg().softmax(-1).topk(self.top_k)
            return logits, weights, indices

    class WithRule(Reversed):
        def choose(self, logits):
            weights, indices = logits.neg().softmax(-1).topk(self.top_k)
            return indices, weights

    gate.__class__ = Reversed
    expected = model(ids).logits
    with taps.record(model, "layers.0.mlp.router_logits") as seen:
        assert torch.equal(model(ids).logits, expected)
    assert seen["layers.0.mlp.router_logits"].shape == (6, 5)
    with pytest.raises(ValueError, match=r"Reversed chooses.*choose\(logits\)"), taps.patch(
            model, {"layers.0.mlp.router_logits": lambda v: v}):
        model(ids)
    gate.__class__ = WithRule
    with taps.patch(model, {"layers.0.mlp.router_logits": lambda v: v}):
        assert_close(model(ids).logits, expected, EXACT)
    gate.__class__ = Reversed.__mro__[1]
    handle = gate.register_forward_hook(lambda m, args, out: (out[0], out[1].flip(-1), out[2]))
    with pytest.raises(ValueError, match="Router chooses"), taps.patch(model, {"layers.0.mlp.router_logits": lambda v: v}):
        model(ids)
    handle.remove()


def test_names_of_the_other_kind_of_layer(plain):
    for name, words in {
        "layers.1.linear_attn.decay": "layer 1 is a full_attention layer, its mixer is self_attn",
        "layers.0.self_attn.query": "layer 0 is a linear_attention layer, its mixer is linear_attn",
        "layers.7.output": r"the model has the layers \[0, 1, 2\]",
        "layers.0.linear_attn.decays": "closest: .*linear_attn.decay",
    }.items():
        for make in (taps.record, lambda m, n: taps.patch(m, {n: torch.zeros_like})):
            with pytest.raises(ValueError, match=words):
                make(plain, name)
    dense = peer.ours(odd_shape(9, dense=True))
    with pytest.raises(ValueError, match="layer 0 is dense"):
        taps.record(dense, "layers.0.mlp.routed")
    with pytest.raises(ValueError, match="a string, not int"):
        taps.record(plain, [3])


@torch.no_grad()
def test_maps_that_nobody_named_are_announced(plain):
    with pytest.warns(UserWarning, match=r"also records 2 attention maps.*scores"):
        taps.record(plain, "layers.*.linear_attn.*")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taps.record(plain, "layers.*.scores")
        taps.record(plain, ["layers.0.linear_attn.scores", "layers.*.linear_attn.decay"])


@torch.no_grad()
def test_the_repr_of_a_recording_fits_one_screen(plain):
    with taps.record(plain, ["layers.*.linear_attn.decay", "norm"]) as seen:
        plain(ROWS[0][None])
        plain(ROWS[0][None])
    text = repr(seen)
    assert "3 values" in text and "layers.2.linear_attn.decay [1, 6, 4] float64, 2 times" in text and len(text) < 400
    with pytest.warns(UserWarning):
        everything = taps.record(plain, "*")
    with everything:
        plain(ROWS[0][None])
    assert len(repr(everything).splitlines()) <= 32 and "and" in repr(everything)
    assert "norm" in repr(taps.patch(plain, {"norm": torch.zeros_like}))
