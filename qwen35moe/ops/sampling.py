"""From logits to a token: the penalties, the filters, and the draw.

Each function maps logits [B, V] (V here: the vocabulary) to logits [B, V]; what a filter removes becomes -inf. They are
applied in transformers' order: repetition penalty, presence penalty, temperature, top-k, top-p, min-p. Then `greedy` or
`sample` picks. Arithmetic is in promote_types(float32, dtype): logits may come in bfloat16, float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# setting: (whether a value is in its range, the range in words, a remark)
_RANGES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "repetition_penalty": (lambda x: x > 0, "be greater than 0", " (1 is none)"),
    "temperature": (lambda x: 0 < x < torch.inf, "be greater than 0 and finite", ": for greedy decoding leave do_sample=False"),
    "top_k": (lambda x: x >= 1 and x == int(x), "be at least 1 and a whole number", " (None or 0 in generate() is none)"),
    "top_p": (lambda x: 0 < x <= 1, "lie in (0, 1]", " (1 is none)"),
    "min_p": (lambda x: 0 <= x <= 1, "lie in [0, 1]", " (0 is none)"),
}


def check_range(setting: str, value: float) -> None:
    """ValueError unless the value is in the range of `setting`, a function below: the one place that defines these ranges."""
    in_range, words, remark = _RANGES[setting]
    if not in_range(value):
        raise ValueError(f"{setting} must {words}, got {value}{remark}")


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(torch.float32, logits.dtype))


def seen_tokens(ids: Tensor, vocabulary: int, mask: Tensor | None = None) -> Tensor:
    """Which tokens occur in each row: [B, vocabulary] bool.

    ids [B, T] int64; mask [B, T], 0 where a position is padding and does not count. transformers counts padding as
    seen, so that there a row's answer depends on its neighbours' lengths.
    """
    counts = torch.zeros(ids.shape[0], vocabulary, dtype=torch.int32, device=ids.device)
    ones = torch.ones_like(ids, dtype=torch.int32) if mask is None else mask.to(torch.int32)
    return counts.scatter_add_(1, ids, ones) > 0  # integers: the sum does not depend on the order


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Seen tokens: x / penalty where x >= 0, x * penalty where x < 0 (arXiv 1909.05858, and transformers).

    seen [B, V] bool: tokens of the prompt and of the answer so far. penalty > 1 discourages repetition; must be > 0.
    """
    check_range("repetition_penalty", penalty)
    x = _wide(logits)
    return torch.where(seen, torch.where(x < 0, x * penalty, x / penalty), x)


def presence_penalty(logits: Tensor, generated: Tensor, penalty: float) -> Tensor:
    """x - penalty * [token has been generated], as in OpenAI's API and vLLM; the prompt does not count.

    generated [B, V] bool.
    """
    return _wide(logits) - penalty * generated


def temperature(logits: Tensor, value: float) -> Tensor:
    """x / value: below 1 sharpens, above 1 flattens. value must be > 0."""
    check_range("temperature", value)
    return _wide(logits) / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits, and whatever equals the k-th (ties are common in bfloat16). k >= 1."""
    check_range("top_k", k)
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def shortlist(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `top_k` keeps, cut out: logits [B, n] and their token ids [B, n], in the order of the vocabulary.

    n >= k where there are ties; rows with fewer are filled up with tokens at -inf. The filters and `sample` work on
    the cut as on the whole, and draw the same token: on a CPU, where sorting 248,320 floats takes 23 ms, this takes
    1. On a GPU n would be a synchronisation.
    """
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    left = max(int((logits >= kth).sum(-1).max()), 1)  # 0 with NaN, which stays visible: it counts as the largest
    ids = logits.topk(left).indices.sort(-1).values
    values = logits.gather(-1, ids)
    return values.masked_fill(values < kth, -torch.inf), ids


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least p, the nucleus (arXiv
    1904.09751).

    As in transformers: in ascending order of probability, what has a cumulative probability <= 1 - p is removed; the
    most likely token always stays. 0 < p <= 1.
    """
    check_range("top_p", p)
    x = _wide(logits)
    ascending, order = x.sort(-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -1] = False
    return x.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens with probability >= p * (probability of the most likely token), arXiv 2407.01082. 0 <= p <= 1."""
    check_range("min_p", p)
    x = _wide(logits)
    probability = x.softmax(-1)
    return x.masked_fill(probability < p * probability.amax(-1, keepdim=True), -torch.inf)


def greedy(logits: Tensor) -> Tensor:
    """argmax: [..., V] -> [...] int64."""
    return logits.argmax(-1)


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution: the first i with  sum_{j <= i} p_j > u * sum_j
    p_j.

    logits [B, V], uniform [B] in [0, 1), float64. A token of probability zero is never drawn. One number per row and
    step decides, so a row's draw depends neither on the other rows nor on how large the vocabulary's filtered part
    is. The sum runs in float64: in float32 it would be off by 1e-5 over 248,320 tokens.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]
    # u * total may round up to total itself; below it, some cumulative sum is always larger.
    threshold = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    picked = torch.searchsorted(cumulative, threshold, right=True)[..., 0]
    return picked.clamp_(max=logits.shape[-1] - 1)  # NaN logits: the caller reports them; a bad index would kill a GPU
