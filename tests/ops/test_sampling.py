"""Sampling: every function against its equation and against the LogitsProcessor of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as theirs

from qwen35moe.generation.streams import Uniforms, row_seed
from qwen35moe.ops import sampling

B, T, VOCABULARY = 3, 11, 97


def logits(seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(B, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def token_ids(seed: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(vocabulary, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_every_filter_equals_that_of_transformers(seed: int, dtype: torch.dtype) -> None:
    x, ids = logits(seed, dtype), token_ids(seed)
    seen = sampling.seen_tokens(ids, VOCABULARY)
    results = [
        (sampling.temperature(x, 0.7), theirs.TemperatureLogitsWarper(0.7)),
        (sampling.repetition_penalty(x, seen, 1.3), theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        (sampling.repetition_penalty(x, seen, 0.6), theirs.RepetitionPenaltyLogitsProcessor(0.6)),
        *((sampling.top_k(x, k), theirs.TopKLogitsWarper(k)) for k in (1, 5, VOCABULARY, VOCABULARY + 40)),
        *((sampling.top_p(x, p), theirs.TopPLogitsWarper(p)) for p in (1e-6, 0.3, 0.95, 1.0)),
        *((sampling.min_p(x, p), theirs.MinPLogitsWarper(p)) for p in (0.0, 0.05, 1.0)),
    ]
    for ours, processor in results:
        assert ours.dtype is dtype
        assert torch.equal(ours, processor(ids, x.clone())), type(processor).__name__


def test_the_chain_of_filters_equals_that_of_transformers() -> None:
    x, ids = logits(3), token_ids(3)
    ours = sampling.repetition_penalty(x, sampling.seen_tokens(ids, VOCABULARY), 1.2)
    ours = sampling.min_p(sampling.top_p(sampling.top_k(sampling.temperature(ours, 0.6), 20), 0.95), 0.02)
    chain = theirs.LogitsProcessorList(
        [
            theirs.RepetitionPenaltyLogitsProcessor(1.2),
            theirs.TemperatureLogitsWarper(0.6),
            theirs.TopKLogitsWarper(20),
            theirs.TopPLogitsWarper(0.95),
            theirs.MinPLogitsWarper(0.02),
        ]
    )
    assert torch.equal(ours, chain(ids, x.clone()))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 20, 5003, 6000])
def test_sampling_from_the_shortlist_equals_sampling_from_all_logits(k: int, dtype: torch.dtype) -> None:
    """In bfloat16 dozens of the 5003 logits are equal."""
    x = torch.randn(3, 5003, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, ids = sampling.shortlist(x, k)
    kept = sampling.top_k(x, k)
    assert values.shape[1] >= min(k, 5003)
    assert (ids.diff(dim=1) > 0).all()
    assert torch.equal(torch.full_like(x, -torch.inf).scatter(1, ids, values), kept)
    for p in (0.3, 0.95):
        expected = sampling.min_p(sampling.top_p(kept, p), 0.01)
        filtered = sampling.min_p(sampling.top_p(values, p), 0.01)
        assert (expected > -torch.inf).sum() == (filtered > -torch.inf).sum()
        if dtype is torch.bfloat16:
            continue  # which of several equal logits the nucleus keeps is unspecified
        for uniform in torch.linspace(0, 0.999, 50, dtype=torch.float64):
            token = sampling.sample(filtered, uniform.expand(3))
            assert torch.equal(ids.gather(1, token[:, None])[:, 0], sampling.sample(expected, uniform.expand(3)))


def test_the_shortlist_keeps_nan() -> None:
    x = logits()
    x[1, 5] = torch.nan
    assert sampling.shortlist(x, 4)[0].amax(-1).isnan().tolist() == [False, True, False]
    x[:] = torch.nan
    assert sampling.shortlist(x, 4)[0].isnan().all()


def test_logits_equal_to_the_kth_are_kept() -> None:
    x = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert (sampling.top_k(x, 2) > -torch.inf).tolist() == [[False, True, True, True, False]]


def test_the_presence_penalty_applies_once_and_seen_tokens_ignore_padding() -> None:
    ids = torch.tensor([[5, 5, 2], [4, 4, 4]])
    seen = sampling.seen_tokens(ids, 7, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert seen.nonzero().tolist() == [[0, 2], [0, 5], [1, 4]]
    seen = sampling.seen_tokens(ids, 7, torch.tensor([[0, 0, 1], [1, 1, 1]]))
    assert seen.nonzero().tolist() == [[0, 2], [1, 4]]
    out = sampling.presence_penalty(torch.zeros(2, 7), seen, 1.5)
    assert out.sum().item() == -3.0 and out[0, 2].item() == -1.5


@pytest.mark.parametrize(
    "call",
    [
        lambda x: sampling.temperature(x, 2.0),
        lambda x: sampling.top_k(x, 9),
        lambda x: sampling.top_p(x, 0.9),
        lambda x: sampling.min_p(x, 0.1),
        lambda x: sampling.presence_penalty(x, torch.zeros(B, VOCABULARY, dtype=torch.bool), 1.0),
        lambda x: sampling.repetition_penalty(x, torch.zeros(B, VOCABULARY, dtype=torch.bool), 1.1),
    ],
)
def test_float64_is_kept_and_bfloat16_is_computed_in_float32(call) -> None:
    x = logits(dtype=torch.float64)
    assert call(x).dtype is torch.float64
    # the arithmetic is float64, not float32
    assert not torch.equal(call(x / 3).double(), call((x / 3).float()).double())
    assert call(x.bfloat16()).dtype in (torch.float32, torch.bfloat16)
    assert torch.equal(call(x.bfloat16()).double(), call(x.bfloat16().float()).double())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: sampling.temperature(x, 0.0), "temperature must be greater than 0.*do_sample=False"),
        (lambda x: sampling.temperature(x, -1.0), "got -1.0"),
        (lambda x: sampling.top_k(x, 0), "top_k must be at least 1.*got 0"),
        (lambda x: sampling.top_p(x, 0.0), r"top_p must lie in \(0, 1\], got 0.0"),
        (lambda x: sampling.top_p(x, 1.5), "got 1.5"),
        (lambda x: sampling.min_p(x, -0.1), "min_p must lie in"),
        (lambda x: sampling.repetition_penalty(x, x > 0, 0.0), "repetition_penalty must be greater than 0"),
    ],
)
def test_values_out_of_range_are_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(logits())


def test_sample_inverts_the_cumulative_distribution() -> None:
    x = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0]).log()[None]
    for uniform, expected in [(0.0, 1), (0.1999, 1), (0.2001, 3), (0.6999, 3), (0.7001, 4), (1 - 2**-53, 4)]:
        assert sampling.sample(x, torch.tensor([uniform], dtype=torch.float64)).item() == expected


def test_sample_follows_the_probabilities() -> None:
    draws = 40_000
    x = logits(2, scale=1.0)[:1]
    uniform = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    counts = sampling.sample(x.expand(draws, VOCABULARY), uniform).bincount(minlength=VOCABULARY)
    expected = x.double().softmax(-1)[0] * draws
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert chi2 < VOCABULARY - 1 + 5 * (2 * (VOCABULARY - 1)) ** 0.5  # mean + 5 standard deviations


def test_sample_draws_all_kept_tokens_and_no_others() -> None:
    x = sampling.top_k(logits(4), 3)
    uniform = torch.linspace(0, 1, 1002, dtype=torch.float64)[:-1]
    for row in x:
        drawn = sampling.sample(row.expand(len(uniform), VOCABULARY), uniform).unique()
        assert set(drawn.tolist()) == set((row > -torch.inf).nonzero()[:, 0].tolist())


def test_the_uniforms_of_a_row_depend_on_its_seed_only() -> None:
    cpu = torch.device("cpu")
    rng_state = torch.random.get_rng_state()
    batch = Uniforms(7, 3, cpu)
    together = torch.stack([batch.next() for _ in range(600)], 1)
    assert torch.equal(torch.random.get_rng_state(), rng_state)
    for row in range(3):
        alone = Uniforms(row_seed(7, row), 1, cpu)
        assert torch.equal(together[row], torch.stack([alone.next() for _ in range(600)], 1)[0])
    assert row_seed(7, 0) == 7
    assert abs(torch.corrcoef(together)[0, 1].item()) < 0.15
    assert len({row_seed(s, r) for s in range(50) for r in range(50)}) == 50 * 50
    assert not torch.equal(Uniforms(None, 2, cpu).next(), Uniforms(None, 2, cpu).next())


def test_split_mix_64() -> None:
    """The published first outputs for seed 1234567."""
    assert [row_seed(1234567, row) for row in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_filters_take_logits_of_any_number_of_dimensions() -> None:
    """The last dimension is the vocabulary; also where a temperature near 0 overflows."""
    rows = logits(7)
    for function in (
        lambda x: sampling.temperature(x, 0.7), lambda x: sampling.temperature(x, 1e-39), lambda x: sampling.top_k(x, 4),
        lambda x: sampling.top_p(x, 0.6), lambda x: sampling.min_p(x, 0.1), sampling.greedy,
    ):  # fmt: skip
        expected = function(rows)
        assert torch.equal(function(rows[0]), expected[0])
        assert torch.equal(function(rows[None])[0], expected)


def stable_top_p(x: torch.Tensor, p: float) -> torch.Tensor:
    """`sampling.top_p`, of equal tokens those of the highest ids: its own sort leaves open which."""
    ascending, order = x.sort(dim=-1, stable=True)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -1] = False
    return x.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def test_top_k_top_p_is_both_after_each_other() -> None:
    """With ties at the k-th token and elsewhere, more than k of them, and tokens that are excluded."""
    generator = torch.Generator().manual_seed(11)
    tied = 0
    for number in range(400):
        size = int(torch.randint(1, 70, (), generator=generator))
        x = torch.randn(3, size, generator=generator) * (0.3, 1.0, 3.0, 50.0)[number % 4]
        if number % 3:
            x = (2 * x).round() / 2
        if number % 7 == 0:
            x[:, 1:] = x[:, 1:].masked_fill(torch.rand(3, size - 1, generator=generator) < 0.5, -torch.inf)
        k = int(torch.randint(1, size + 5, (), generator=generator))
        p = float(torch.rand((), generator=generator, dtype=torch.float64)) * 0.98 + 0.01
        if number % 11 == 0:  # all equal: k p times the probability of one would be a sum that rounding decides
            x, p = torch.full((3, size), 0.5), (int(p * size) + 0.5) / size
        actual, kept = sampling.top_k_top_p(x, k, p), sampling.top_k(x, k)
        assert torch.equal(actual, stable_top_p(kept, p)), (number, size, k, p)
        assert torch.equal(actual.sort(-1).values, sampling.top_p(kept, p).sort(-1).values)
        tied += int(((kept > -torch.inf).sum(-1) > min(k, size)).any())
    assert tied > 80


def test_top_k_top_p_keeps_nan_for_the_error() -> None:
    x = logits(2)
    x[0, 3], x[1] = torch.nan, -torch.inf
    best = sampling.top_k_top_p(x, 5, 0.9).amax(-1)
    assert best[0].isnan() and not best[1] > -torch.inf
    for k, p, words in ((0, 0.5, "top_k must be"), (3, 0.0, "top_p must")):
        with pytest.raises(ValueError, match=words):
            sampling.top_k_top_p(x, k, p)
