"""From logits to a token: penalties, filters, and the draw.

Penalties and filters map logits [B, vocabulary] to logits [B, vocabulary]; a filter sets what it removes to -inf. Generation
applies them in transformers' order: repetition penalty, presence penalty, temperature, top-k, top-p, min-p. Then `greedy` or
`sample` chooses the token. Arithmetic is float32 at least; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen35moe.compat import short

_NORMAL = torch.finfo(torch.float32)
# setting: (test of a value, its range in words, a remark)
_RANGES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "repetition_penalty": (lambda x: x > 0, "be greater than 0", " (1 is none)"),
    "temperature": (lambda x: 0 < x < torch.inf, "be greater than 0 and finite", ": for greedy decoding leave do_sample=False"),
    "top_k": (lambda x: x >= 1 and x % 1 == 0, "be at least 1 and a whole number", " (None or 0 in generate() is none)"),
    "top_p": (lambda x: 0 < x <= 1, "lie in (0, 1]", " (1 is none)"),
    "min_p": (lambda x: 0 <= x <= 1, "lie in [0, 1]", " (0 is none)"),
}


def check_range(setting: str, value: float) -> None:
    """ValueError unless `value` is in the range of `setting`, the name of a function below."""
    in_range, words, remark = _RANGES[setting]
    try:
        valid = in_range(value)
    except (TypeError, ValueError, OverflowError):  # a string, a tensor of several numbers, 10**400
        valid = False
    if not valid:
        raise ValueError(f"{setting} must {words}, got {short(value)}{remark}")


def _wide(logits: Tensor, factor: float = 1.0) -> Tensor:
    """In float32 at least; in float64 for a factor that is no normal float32 number, such as 1e-40."""
    normal = _NORMAL.tiny <= factor <= _NORMAL.max
    return logits.to(torch.promote_types(torch.float32 if normal else torch.float64, logits.dtype))


def seen_tokens(ids: Tensor, vocabulary: int, mask: Tensor | None = None) -> Tensor:
    """Which tokens occur in each row: [B, vocabulary] bool.

    ids [B, T] int64; mask [B, T], 0 at padding, which is left out. transformers counts padding as seen, which makes the output
    of a row depend on the lengths of the other rows.
    """
    counts = torch.zeros(ids.shape[0], vocabulary, dtype=torch.int32, device=ids.device)
    ones = torch.ones_like(ids, dtype=torch.int32) if mask is None else mask.to(torch.int32)
    return counts.scatter_add_(1, ids, ones) > 0  # integers: the sum does not depend on the order


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Seen tokens: x / penalty where x >= 0, x * penalty where x < 0 (arXiv 1909.05858, and transformers).

    seen [B, vocabulary] bool: tokens of the prompt and those generated so far. penalty > 0; above 1 it discourages repetition.
    """
    check_range("repetition_penalty", penalty)
    x = _wide(logits, penalty)
    return torch.where(seen, torch.where(x < 0, x * penalty, x / penalty), x)


def presence_penalty(logits: Tensor, generated: Tensor, penalty: float) -> Tensor:
    """x - penalty * [token has been generated], as in OpenAI's API and vLLM.

    generated [B, vocabulary] bool: without the tokens of the prompt.
    """
    x = _wide(logits)
    return torch.where(generated, x - penalty, x)


def temperature(logits: Tensor, value: float) -> Tensor:
    """x / value, value > 0: below 1 it sharpens the distribution, above 1 it flattens it; the limit at 0 is `greedy`.

    In rows where x / value would overflow it is (x - max x) / value, which gives the same probabilities.
    """
    check_range("temperature", value)
    x = _wide(logits, value)
    scaled = x / value
    if value >= 1:
        return scaled
    overflow = torch.isposinf(scaled.amax(-1, keepdim=True))
    if overflow.device.type == "cpu" and not bool(overflow.any()):
        return scaled
    largest = x.amax(-1, keepdim=True)
    return torch.where(overflow & largest.isfinite(), (x - largest) / value, scaled)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits and those equal to the k-th (ties are common in bfloat16). k >= 1."""
    check_range("top_k", k)
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def shortlist(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The logits [B, kept] that `top_k` keeps and their token ids [B, kept], in the order of the vocabulary.

    `kept` is the largest number over the rows, k or more with ties; in the other rows the rest is -inf. The filters and
    `sample` give the same token for these logits as for all. On a CPU this takes 1 ms, sorting 248,320 floats 23 ms. On a GPU
    `kept` would need a synchronisation.
    """
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    kept = max(int((logits >= kth).sum(-1).max()), 1)  # 0 where the k-th is NaN; topk orders NaN first and keeps it
    ids = logits.topk(kept).indices.sort(-1).values
    values = logits.gather(-1, ids)
    return values.masked_fill(values < kth, -torch.inf), ids


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the nucleus, the smallest set of most likely tokens whose probabilities sum to at least p (arXiv 1904.09751).

    As in transformers: in ascending order of probability, tokens with a cumulative probability <= 1 - p are removed, except
    the most likely one. 0 < p <= 1.
    """
    check_range("top_p", p)
    x = _wide(logits)
    ascending, order = x.sort(-1)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -1].fill_(False)
    return x.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def top_k_top_p(logits: Tensor, k: int, p: float) -> Tensor:
    """`top_p(top_k(logits, k), p)` without sorting the vocabulary and without a synchronisation, for a GPU.

    Tokens that are equal to the k-th may be many, but all have its probability: those that `topk` left out are counted. In a
    row of equal tokens, as in a stable sort, the nucleus has those of the highest ids.
    """
    check_range("top_k", k)
    check_range("top_p", p)
    x = _wide(logits)
    ascending = x.topk(min(k, x.shape[-1])).values.flip(-1)  # [..., k]
    kth = ascending[..., :1]
    ties = (x == kth).sum(-1, keepdim=True)
    left_out = ties - (ascending == kth).sum(-1, keepdim=True)
    weights = (ascending.double() - ascending[..., -1:].double()).exp()
    tie = weights[..., :1]
    limit = (1 - p) * (weights.sum(-1, keepdim=True) + left_out * tie)
    removed = left_out * tie + weights.cumsum(-1) <= limit
    removed[..., -1].fill_(False)
    smallest = ascending.gather(-1, removed.sum(-1, keepdim=True))  # kept
    kept = ((ascending == smallest) & ~removed).sum(-1, keepdim=True)
    kept = torch.where(smallest == kth, (ties - (limit / tie).floor()).clamp(min=1), kept)
    equal = x == smallest
    number = equal.cumsum(-1, dtype=torch.int32)  # of each equal token, in the order of the vocabulary
    return x.masked_fill((x < smallest) | (equal & (number <= number[..., -1:] - kept)), -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens with probability >= p * (probability of the most likely token), arXiv 2407.01082. 0 <= p <= 1."""
    check_range("min_p", p)
    x = _wide(logits)
    probability = x.softmax(-1)
    return x.masked_fill(probability < p * probability.amax(-1, keepdim=True), -torch.inf)


def greedy(logits: Tensor) -> Tensor:
    """argmax: [..., vocabulary] -> [...] int64."""
    return logits.argmax(-1)


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token per row from the inverse of the cumulative distribution: the first i with sum_{j <= i} p_j > u sum_j p_j.

    logits [B, vocabulary], uniform u [B] in [0, 1), float64. A token of probability zero is never drawn. One number per row
    and step is used, so that a draw depends neither on the other rows nor on how many tokens the filters removed. The sum is in
    float64: in float32 it would be off by 1e-5 over 248,320 tokens.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]
    # u * total may be rounded up to total, which no cumulative sum exceeds: at most the next number below it.
    threshold = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, threshold, right=True)[..., 0]
    # With NaN logits, which the caller reports, the index is out of range: a device-side assertion would end a CUDA process.
    return tokens.clamp_(max=logits.shape[-1] - 1)
