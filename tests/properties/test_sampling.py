"""Sampling against distributions that are computed here, in plain Python, from the definition of each setting.

With u = (i + 1/2) / N for i < N, inverse-CDF sampling gives token t exactly N p_t times, within one: no chance is involved.
The numbers that `generate` draws from are tested for uniformity by a chi-square whose tail is 1e-9.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from qwen35moe.generation import generate
from qwen35moe.ops import sampling
from tests.properties.tried import tried
from tests.support.fakes import FakeModel

TAIL = 1e-9
# Multiples of 1/8: equal logits are common, and a sum of them does not depend on the order.
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=17)


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def kept(logits: list[float], keep: list[bool]) -> list[float]:
    return [x if k else -math.inf for x, k in zip(logits, keep, strict=True)]


def nucleus(logits: list[float], p: float) -> list[float] | None:
    """top_p by its definition; None where the sum of the others comes too near to 1 - p to say which side it is on, or equal
    probabilities straddle the border (which of them stay is not defined)."""
    ps = probabilities(logits)
    order = sorted(range(len(ps)), key=ps.__getitem__)
    keep, below = [True] * len(ps), 0.0
    for place, t in enumerate(order[:-1]):
        below += ps[t]
        if abs(below - (1 - p)) < 1e-5:
            return None
        keep[t] = below > 1 - p
        if place and keep[t] != keep[order[place - 1]] and ps[t] == ps[order[place - 1]]:
            return None
    if not keep[order[-2]] and ps[order[-2]] == ps[order[-1]]:
        return None
    return kept(logits, keep)


@given(
    logits=LOGITS, temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]), k=st.integers(1, 20),
    p=st.floats(0.05, 1.0), least=st.floats(0.0, 1.0), count=st.sampled_from([512, 1023]),
)
def test_filters_and_draws_give_the_distribution_of_their_definitions(
    logits: list[float], temperature: float, k: int, p: float, least: float, count: int
) -> None:
    expected = [x / temperature for x in logits]
    kth = sorted(expected, reverse=True)[min(k, len(expected)) - 1]
    expected = kept(expected, [x >= kth for x in expected])
    ranked = nucleus(expected, p)
    if ranked is None:
        return
    ps = probabilities(ranked)
    if any(0 < abs(q - least * max(ps)) < 1e-6 for q in ps):
        return  # on the border of min_p
    ranked = kept(ranked, [q >= least * max(ps) for q in ps])
    ps = probabilities(ranked)

    x = torch.tensor([logits])
    x = sampling.top_k(sampling.temperature(x, temperature), k)
    x = sampling.min_p(sampling.top_p(x, p), least)
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = sampling.sample(x.expand(count, -1), uniform)
    counts = torch.bincount(tokens, minlength=len(logits)).tolist()
    for t, (actual, q) in enumerate(zip(counts, ps, strict=True)):
        assert abs(actual - count * q) <= 1 + 1e-5 * count, f"token {t}: {actual} of {count}, probability {q}"
        assert actual == 0 or q > 0
    tried("distributions compared")


@given(
    logits=LOGITS, prompt=st.lists(st.integers(0, 16), min_size=1, max_size=4), penalty=st.sampled_from([0.5, 1.5, 2.0]),
    presence=st.sampled_from([-0.5, 0.75]), drawn=st.lists(st.integers(0, 16), max_size=4),
)
def test_penalties(logits: list[float], prompt: list[int], penalty: float, presence: float, drawn: list[int]) -> None:
    size = len(logits)
    prompt, drawn = [t % size for t in prompt], [t % size for t in drawn]
    expected = []
    for t, x in enumerate(logits):
        if t in prompt + drawn:
            x = x * penalty if x < 0 else x / penalty
        expected.append(x - presence * (t in drawn))
    ids, new = torch.tensor([prompt + drawn]), torch.tensor([drawn], dtype=torch.long)
    x = sampling.repetition_penalty(torch.tensor([logits]), sampling.seen_tokens(ids, size), penalty)
    x = sampling.presence_penalty(x, sampling.seen_tokens(new, size), presence)
    assert (x[0] - torch.tensor(expected)).abs().max() <= 1e-6 * (1 + max(map(abs, expected)))
    tried("penalties compared")


class Memoryless(FakeModel):
    """The same logits after every history."""

    def __init__(self, row: list[float]) -> None:
        super().__init__(vocabulary=len(row))
        self.row = torch.tensor(row)

    def logits(self, history: list[int]) -> torch.Tensor:
        return self.row


@settings(max_examples=30)
@given(logits=st.lists(st.integers(-16, 16).map(lambda n: n / 8), min_size=2, max_size=6), seed=st.integers(0, 2**64 - 1),
       options=st.sampled_from([{}, {"temperature": 0.5}, {"top_k": 2}, {"top_k": 3, "temperature": 2.0}]))  # fmt: skip
def test_tokens_of_generate_follow_the_distribution(logits: list[float], seed: int, options: dict[str, Any]) -> None:
    """All rows and steps together: chi-square of the counts; and neighbouring steps are independent (of pairs)."""
    expected = [x / options.get("temperature", 1.0) for x in logits]
    if "top_k" in options:
        kth = sorted(expected, reverse=True)[min(options["top_k"], len(expected)) - 1]
        expected = kept(expected, [x >= kth for x in expected])
    ps = probabilities(expected)
    rows, steps = 5, 90
    options = options | {"max_new_tokens": steps, "eos_token_id": []}
    ids = generate(Memoryless(logits), [[0]] * rows, do_sample=True, seed=seed, **options)
    new = ids[:, 1:]
    support = [t for t, q in enumerate(ps) if q > 0]
    assert set(new.flatten().tolist()) <= set(support)
    if len(support) < 2:
        return
    assert p_value(torch.bincount(new.flatten(), minlength=len(ps)).double(), rows * steps * torch.tensor(ps).double()) > TAIL
    size = len(ps)
    pairs = torch.bincount((new[:, :-1] * size + new[:, 1:]).flatten(), minlength=size**2).double()
    both = rows * (steps - 1) * torch.outer(torch.tensor(ps).double(), torch.tensor(ps).double()).flatten()
    assert p_value(pairs, both) > TAIL
    tried("tokens drawn", rows * steps)


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Of Pearson's chi-square; cells with fewer than 5 expected are joined into one."""
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 1], expected[expected > 1]
    if counts.numel() < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return float(chi2.sf(statistic, counts.numel() - 1))
