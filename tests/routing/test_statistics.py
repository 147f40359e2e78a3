"""Statistics against plain Python, the ready-made interventions, and figures."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qwen35moe import figures
from qwen35moe import routing as R
from qwen35moe.ops.experts import chosen_weights
from qwen35moe.routing import Routing, plots, statistics
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape

L, N, E, TOP_K = 3, 41, 7, 2


def drawn(seed: int = 0, mask: bool = True) -> Routing:
    """A skewed routing with padding and unforced rows, with its logits in float64."""
    rng = peer.generator(seed)
    logits = torch.randn(L, N, E, generator=rng, dtype=torch.float64) + torch.linspace(0, 3, E, dtype=torch.float64)
    indices = logits.topk(TOP_K, dim=-1).indices
    indices[1, 5:9] = R.UNFORCED
    present = torch.rand(N, generator=rng) < 0.8
    return Routing(indices, logits=logits, num_experts=E, mask=present if mask else None)


def choices(routing: Routing) -> list[list[list[int]]]:
    """The chosen experts per layer and token, without padding and unforced tokens."""
    mask = [True] * N if routing.mask is None else routing.mask.tolist()
    rows = routing.indices.tolist()
    return [[row for row, present in zip(layer, mask, strict=True) if present and row[0] >= 0] for layer in rows]


# ---------------------------------------------------------------------------------------------------- against plain Python


@pytest.mark.parametrize("mask", [False, True])
def test_load_entropy_imbalance_and_dead_experts(mask):
    routing = drawn(mask=mask)
    load = R.expert_load(routing)
    assert load.dtype == torch.float64 and load.shape == (L, E)
    for layer, tokens in enumerate(choices(routing)):
        counts = Counter(expert for row in tokens for expert in row)
        shares = [counts[e] / sum(counts.values()) for e in range(E)]
        assert load[layer].tolist() == pytest.approx(shares, rel=1e-14)
        entropy = -sum(share * math.log(share) for share in shares if share)
        assert R.entropy(routing)[layer].item() == pytest.approx(entropy, rel=1e-14)
        assert R.imbalance(routing)[layer].item() == pytest.approx(max(shares) / (sum(shares) / E), rel=1e-14)
        assert R.dead_experts(routing)[layer].tolist() == [share == 0 for share in shares]
        assert R.dead_experts(routing, below=0.5)[layer].tolist() == [share <= 0.5 / E for share in shares]
    assert bool(R.dead_experts(routing, below=0.5).any())


@pytest.mark.parametrize("at_once", [5, 16384])
def test_coactivation(at_once):
    routing = drawn()
    with mock.patch.object(statistics, "_TOKENS_AT_ONCE", at_once):
        together = R.coactivation(routing)
    for layer, tokens in enumerate(choices(routing)):
        for i, j in itertools.product(range(E), repeat=2):
            share = sum(i in row and j in row for row in tokens) / len(tokens)
            assert together[layer, i, j].item() == pytest.approx(share, rel=1e-14)


@pytest.mark.parametrize("expert", range(E))
def test_every_expert_is_counted(expert):
    """The first and the last one, too: each in turn is the most frequent, chosen with each of the others."""
    indices = torch.stack([torch.full((E - 1,), expert), torch.tensor([e for e in range(E) if e != expert])], -1)
    routing = Routing(torch.cat([indices, torch.full((3, 2), R.UNFORCED)])[None], num_experts=E)
    assert statistics.expert_counts(routing)[0].tolist() == [E - 1 if e == expert else 1 for e in range(E)]
    together = R.coactivation(routing)[0]
    expected = torch.eye(E, dtype=torch.float64) / (E - 1)
    expected[expert] = expected[:, expert] = 1 / (E - 1)
    expected[expert, expert] = 1
    assert_close(together, expected, 1e-14)
    assert R.imbalance(routing).item() == pytest.approx(E / 2) and not R.dead_experts(routing).any()


WRONG_NUMBERS: list[tuple[Any, str]] = [
    (lambda r: R.expert_load(replace(r, indices=r.indices + 1)), f"has expert {E}, the experts are 0 ... {E - 1}"),
    (lambda r: R.coactivation(replace(r, indices=r.indices + 1)), f"has expert {E}"),
    (lambda r: R.imbalance(replace(r, indices=r.indices - 3)), "has expert -"),
    (lambda r: R.dead_experts(r, below=-0.5), "below=-0.5"),
    (lambda r: R.dead_experts(r, below=math.nan), "below=nan"),
    (lambda r: R.agreement(r, replace(r, num_experts=E + 1, logits=None)), f"of {E} and of {E + 1} experts"),
    (lambda r: replace(r, num_experts=E + 1), f"are not of {E + 1} experts"),
    (lambda r: replace(r, mask=torch.ones(N, dtype=torch.long)), "the mask is bool, True for a token, got torch.int64"),
    (lambda r: plots.plot_coactivation(r, None, layer=3), r"has layers \(0, 1, 2\), not 3"),
]


@pytest.mark.parametrize("call,words", WRONG_NUMBERS, ids=[words[:20] for _, words in WRONG_NUMBERS])
def test_numbers_that_do_not_exist_are_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(drawn())


def test_margins():
    routing = drawn()
    margins = R.margins(routing)
    present = routing.mask.nonzero()[:, 0].tolist()
    assert margins.shape == (L, len(present))
    for layer, (column, token) in itertools.product(range(L), enumerate(present)):
        ordered = sorted(routing.logits[layer, token].tolist(), reverse=True)
        assert margins[layer, column].item() == ordered[TOP_K - 1] - ordered[TOP_K]
    half = replace(routing, logits=routing.logits.bfloat16())
    assert R.margins(half).dtype == torch.float32
    all_experts = Routing(torch.arange(E).expand(1, 2, E), logits=torch.zeros(1, 2, E), num_experts=E)
    assert bool(R.margins(all_experts).isinf().all())
    with pytest.raises(ValueError, match="output_routing=True"):
        R.margins(replace(routing, logits=None))


def test_agreement_and_flips():
    a, b = drawn(0), drawn(1)
    a = replace(a, indices=a.indices.clone())
    a.indices[2] = b.indices[2].flip(-1)  # the same sets in another order
    both = (a.mask & b.mask & (a.indices >= 0).all(-1).all(0) & (b.indices >= 0).all(-1).all(0)).tolist()
    common = [[set(x) & set(y) for x, y, t in zip(*rows, both, strict=True) if t]
              for rows in zip(a.indices.tolist(), b.indices.tolist(), strict=True)]
    expected = [sum(map(len, layer)) / (TOP_K * len(layer)) for layer in common]
    assert R.agreement(a, b).tolist() == pytest.approx(expected, rel=1e-14)
    assert R.flips(a, b).tolist() == [[len(c) < TOP_K for c in layer] for layer in common]
    assert expected[2] == 1.0 and 0.1 < expected[0] < 0.9
    with pytest.raises(ValueError, match="have different tokens, layers or k"):
        R.agreement(a, replace(b, indices=b.indices[:, 1:], logits=None, mask=None))


def test_an_even_and_a_collapsed_load():
    even = Routing(torch.stack([torch.arange(E), (torch.arange(E) + 1) % E], -1)[None], num_experts=E)
    assert R.entropy(even).item() == pytest.approx(math.log(E)) and R.imbalance(even).item() == pytest.approx(1)
    one = Routing(torch.zeros(1, 9, 1, dtype=torch.long), num_experts=E)
    assert R.entropy(one).item() == 0 and R.imbalance(one).item() == E and int(R.dead_experts(one).sum()) == E - 1
    empty = replace(one, mask=torch.zeros(9, dtype=torch.bool))
    assert R.expert_load(empty).tolist() == [[0.0] * E] and R.coactivation(empty).sum() == 0
    for statistic in (R.expert_load, R.coactivation):
        with pytest.raises(ValueError, match="num_experts"):
            statistic(replace(one, num_experts=0))


# ---------------------------------------------------------------------------------------------------- interventions

TOP = 3


def skewed(tokens: int = 200) -> Tensor:
    return torch.randn(tokens, E, generator=peer.generator(9), dtype=torch.float64) + torch.linspace(0, 4, E).double()


def different(indices: Tensor) -> bool:
    return bool((indices.sort(-1).values.diff(dim=-1) > 0).all())


def test_ablate():
    logits = skewed()
    for experts in ([6, 2], {1: [6, 2]}):
        indices, weights = R.ablate(experts, top_k=TOP)(1, logits)
        others = [e for e in range(E) if e not in (6, 2)]
        best = logits[:, others].topk(TOP, dim=-1).indices
        assert torch.equal(indices, torch.tensor(others)[best])
        assert_close(weights, chosen_weights(logits, indices), 1e-14)
    plain = logits.topk(TOP, dim=-1).indices
    assert torch.equal(R.ablate({1: [6]}, top_k=TOP)(0, logits)[0], plain)
    with pytest.raises(ValueError, match="layer 4: without 5 of 7 experts there are fewer than top_k=3"):
        R.ablate([0, 1, 2, 3, 4], top_k=TOP)(4, logits)
    with pytest.raises(ValueError, match="no expert 7"):
        R.ablate([7], top_k=TOP)(0, logits)
    assert torch.equal(R.ablate(torch.tensor([2, 6]), top_k=TOP)(0, logits)[0], indices)
    for wrong, words in ((5, "a list of numbers"), ("12", "a list of numbers"), ([1.5], "a whole number, got 1.5"),
                         ([True], "a whole number"), ({1: 5}, "a list of numbers"), ([-1], "no expert -1")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            R.ablate(wrong, top_k=TOP)(1, logits)  # type: ignore[arg-type]
    for top_k, words in ((0, "at least 1, got 0"), (2.0, "whole number"), (True, "whole number")):
        with pytest.raises(ValueError, match=words):
            R.ablate([1], top_k=top_k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ablate\(\) without top_k takes the model's"):
        R.ablate([1])(0, logits)
    with pytest.raises(ValueError, match="top_k=8 is more than the 7 experts"):
        R.force([1], top_k=8)(0, logits)


def test_force():
    logits = skewed()
    indices, weights = R.force([0, 1], top_k=TOP)(0, logits)
    assert bool((indices[:, :2] == torch.tensor([0, 1])).all()) and different(indices)
    assert torch.equal(indices[:, 2], 2 + logits[:, 2:].argmax(-1))
    assert_close(weights, chosen_weights(logits, indices), 1e-14)
    assert R.force([5, 0, 3], top_k=TOP)(0, logits)[0].tolist() == [[0, 3, 5]] * len(logits)  # every choice is forced
    assert not (R.ablate([0, 2, 4, 6], top_k=TOP)(0, logits)[0] % 2 == 0).any()  # exactly top_k experts are left
    with pytest.raises(ValueError, match="4 forced experts are more than top_k=3"):
        R.force([0, 1, 2, 3], top_k=TOP)(0, logits)


def test_bias_changes_the_choice_but_not_the_weights():
    logits = skewed()
    push = torch.zeros(E).index_fill(0, torch.tensor([0]), 100.0)
    indices, weights = R.bias(push, top_k=TOP)(0, logits)
    assert bool((indices[:, 0] == 0).all())
    assert_close(weights, chosen_weights(logits, indices), 1e-14)
    plain = logits.topk(TOP, dim=-1).indices
    assert torch.equal(R.bias({1: push}, top_k=TOP)(0, logits)[0], plain)
    assert torch.equal(R.bias(torch.full((E,), 5.0), top_k=TOP)(0, logits)[0], plain)
    with pytest.raises(ValueError, match=r"\[6\] does not fit 7"):
        R.bias(torch.zeros(6), top_k=TOP)(0, logits)


def test_sample_draws_without_replacement_in_proportion_to_p():
    """Ordered pairs (i, j) follow p_i p_j / (1 - p_i) with p = softmax(logits / temperature): chi-square of 30,000 draws."""
    logits, temperature, draws = torch.tensor([1.0, 0.0, -1.0, 0.5]), 1.5, 30_000
    p = (logits.double() / temperature).softmax(-1)
    indices, weights = R.sample(top_k=2, temperature=temperature, seed=3)(0, logits.expand(draws, -1))
    assert different(indices)
    expected = p[:, None] * p[None] / (1 - p[:, None])
    counts = torch.zeros(4, 4, dtype=torch.float64).index_put_(tuple(indices.T), torch.ones(draws).double(), accumulate=True)
    cells = ~torch.eye(4, dtype=torch.bool)
    chi = ((counts - draws * expected).square() / (draws * expected))[cells].sum()
    assert chi < 50  # 11 degrees of freedom: exceeded with probability 6e-7
    assert_close(weights, chosen_weights(logits.expand(draws, -1), indices), 1e-6)
    again = R.sample(top_k=2, temperature=temperature, seed=3)
    assert torch.equal(again(0, logits.expand(draws, -1))[0], indices)
    assert not torch.equal(again(0, logits.expand(draws, -1))[0], indices)
    cold = R.sample(top_k=2, temperature=1e-4)(0, skewed())[0]
    assert torch.equal(cold, skewed().topk(2, dim=-1).indices)
    with pytest.raises(ValueError, match="temperature=0"):
        R.sample(top_k=2, temperature=0)


def test_balance_evens_the_load_at_little_cost():
    logits = skewed(700)
    plain = Routing(logits.topk(TOP, dim=-1).indices[None], num_experts=E)
    indices, weights = R.balance(top_k=TOP)(0, logits)
    assert R.imbalance(plain).item() > 2 and different(indices)
    assert R.imbalance(Routing(indices[None], num_experts=E)).item() < 1.05
    assert_close(weights, chosen_weights(logits, indices), 1e-14)
    even = torch.eye(E, dtype=torch.float64).repeat(3, 1) + 0.5 * torch.eye(E, dtype=torch.float64).roll(1, 1).repeat(3, 1)
    assert torch.equal(R.balance(top_k=2)(0, even)[0], even.topk(2, dim=-1).indices)


def test_balance_is_the_best_even_choice():
    """Against all even assignments of 6 tokens to 3 experts, one expert per token."""
    for seed in range(20):
        logits = torch.randn(6, 3, generator=peer.generator(seed), dtype=torch.float64) + torch.tensor([2.0, 0.0, 0.0])
        scores = logits.log_softmax(-1)
        fair = [a for a in itertools.product(range(3), repeat=6) if all(a.count(e) == 2 for e in range(3))]
        best = max(float(scores[range(6), list(a)].sum()) for a in fair)
        indices = R.balance(top_k=1, rounds=200)(0, logits)[0][:, 0]
        counts = [int((indices == e).sum()) for e in range(3)]
        total = float(scores[range(6), indices].sum())
        # The prices solve the dual: an even choice is the best even one, an uneven choice is no worse.
        assert total >= best - 1e-9 and (counts != [2, 2, 2] or total == pytest.approx(best))


def test_settings_of_interventions_that_mean_nothing_are_errors():
    for make, words in (
        (lambda: R.sample(temperature=math.nan), "temperature=nan must be positive and finite"),
        (lambda: R.sample(temperature=math.inf), "temperature=inf"),
        (lambda: R.sample(seed=2**64), "seed must be a whole number of at most 64 bits"),
        (lambda: R.sample(seed=1.5), "seed must be a whole number"),  # type: ignore[arg-type]
        (lambda: R.balance(rounds=0), "rounds must be a whole number of at least 1, got 0"),
        (lambda: R.bias(torch.full((E,), math.nan)), "hold NaN"),
        (lambda: R.bias("b"), "values are a tensor"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=words):
            make()
    banned = torch.zeros(E).index_fill(0, torch.tensor([6]), -math.inf)
    assert not (R.bias(banned, top_k=TOP)(0, skewed())[0] == 6).any()


CASE = odd_shape(31, layer_types=[LINEAR, FULL], num_hidden_layers=2, num_experts=E, num_experts_per_tok=TOP)
INTERVENTIONS = {
    "ablate": lambda: R.ablate({0: [1], 1: [2, 3]}, top_k=TOP), "force": lambda: R.force([4], top_k=TOP),
    "bias": lambda: R.bias(torch.linspace(-2, 2, E), top_k=TOP), "sample": lambda: R.sample(top_k=TOP, temperature=3.0, seed=1),
    "balance": lambda: R.balance(top_k=TOP),
}  # fmt: skip


def test_top_k_is_the_model_s_and_another_one_is_said():
    model: Any = peer.ours(CASE)
    peer.draw(model, 2)
    ids = CASE.ids(1, 5)
    short = {"ablate": lambda k: R.ablate([1], top_k=k), "force": lambda k: R.force({1: [4]}, top_k=k),
             "bias": lambda k: R.bias({0: torch.zeros(E)}, top_k=k), "sample": lambda k: R.sample(top_k=k),
             "balance": lambda k: R.balance(top_k=k)}  # fmt: skip
    with torch.no_grad():
        for name, make in short.items():
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                out = model(ids, routing=make(None), output_routing=True)
            assert out.routing.indices.shape[-1] == TOP
            assert torch.equal(model(ids, routing=make(TOP)).logits, out.logits)
            with pytest.warns(UserWarning, match=rf"{name}\(top_k=2\): the model's tokens take 3 experts"):
                assert model(ids, routing=make(2), output_routing=True).routing.indices.shape[-1] == 2


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_an_intervention_in_a_model(name):
    """The model follows it, and forcing the recorded indices gives the same logits; the router gets gradients, the same ones
    under gradient checkpointing."""
    model: Any = peer.ours(CASE)
    peer.draw(model, 2)
    ids = CASE.ids(2, 9)
    with torch.no_grad():
        out = model(ids, routing=INTERVENTIONS[name](), output_routing=True)
        assert torch.equal(model(ids, routing=out.routing.indices_only()).logits, out.logits)
        assert bool((out.routing.indices != model(ids, output_routing=True).routing.indices).any())
    if name == "ablate":
        assert R.expert_load(out.routing)[0, 1] == 0 and R.expert_load(out.routing)[1, 2:4].sum() == 0
    backward = lambda: model(ids, labels=ids, routing=INTERVENTIONS[name]()).loss.backward()  # noqa: E731
    gradients = peer.gradients_with_and_without_checkpointing(model, backward)
    assert all(torch.equal(gradients[0][key], value) for key, value in gradients[1].items())
    assert all(gradients[0][f"model.layers.{layer}.mlp.gate.weight"].isfinite().all() for layer in range(2))
    assert all(gradients[0][f"model.layers.{layer}.mlp.gate.weight"].any() for layer in range(2))


# ---------------------------------------------------------------------------------------------------- figures


def test_figures(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    routing = drawn()
    plots.draw(routing, tmp_path / "all.png", title="drawn")
    plots.draw(replace(routing, logits=None), tmp_path / "no_margins.png")
    plots.draw(replace(routing, logits=None), tmp_path / "margins.png", margin=R.margins(routing))
    pages = sorted(tmp_path.iterdir())
    assert len(pages) == 3 and all(page.read_bytes().startswith(b"\x89PNG") for page in pages)
    figure = figures.new_figure(3, 3)
    axes = figure.add_subplot()
    plots.plot_load(routing, axes)
    drawn_load = torch.as_tensor(axes.images[0].get_array().data)
    assert_close(drawn_load.double(), R.expert_load(routing) * E, 1e-12)
    axes = figure.add_subplot()
    plots.plot_coactivation(routing, axes, layer=2)
    together = R.coactivation(routing)[2]
    shown = axes.images[0].get_array()
    chance = (TOP_K - 1) * E / (TOP_K * (E - 1))
    assert float(shown[5, 6]) == pytest.approx(math.log2(together[5, 6] / (together[5, 5] * together[6, 6] * chance)))
    with pytest.raises(ValueError, match="layers .*0, 1, 2.*not 9"):
        plots.plot_coactivation(routing, axes, layer=9)


def test_the_error_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"qwen35moe\[plot\]"):
        figures.new_figure(1, 1)
