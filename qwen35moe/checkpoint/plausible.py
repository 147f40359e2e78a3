"""Weights of the right names and shapes and of another meaning: a few small vectors tell the known cases.

Programs store some parameters in another form, and not every conversion back restores it (llama.cpp issue 23758):

    decoder norms (1 + w)     stored as 1 + w by llama.cpp and MLX      all means are near 1, where w is centred at 0
    A_log                     stored as A = -exp(A_log) by llama.cpp    negative everywhere, where A is mostly above 1
                              or as exp(A_log)                          beyond 6, where exp(6) forgets within a token
    dt_bias                   stored as softplus(dt_bias)               all within 0 ... 0.25, where steps of 0.001 ... 0.1
                                                                        need -7 ... -2
    linear_attn.norm (w)      stored as w - 1                           all means are near 0, where the identity is 1
    weight_scale_inv          stored as its inverse                     above 1, where the largest weight would be above 448

These are warnings, not errors: a model may be trained to such values. At most three layers of each kind are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .convert import stored_numbers
from .dtypes import FLOATS
from .headers import StoredTensor

_NORMS = (".input_layernorm.weight", ".post_attention_layernorm.weight")
_LONGEST = 2**20  # numbers; no vector of a model is longer


def implausible(stored: Mapping[str, StoredTensor], scales: Iterable[Tensor] = ()) -> list[str]:
    """A sentence for each parameter that looks as if it had another meaning. stored: tensors by canonical name; scales: of
    block-FP8 weights."""
    sentences: list[str] = []
    for part, prefix in (("decoder", "layers."), ("MTP", "mtp.layers.")):
        norms = _sampled(stored, prefix, *_NORMS)
        if norms and all(abs(w.mean() - 1) < 0.5 and w.std() < 0.5 and (w > 0.2).float().mean() > 0.95 for w in norms):
            sentences.append(
                f"the {part}'s norm weights are near 1 (mean {_mean(norms):.2f}): it looks as if 1 + w is stored, as llama.cpp "
                "and MLX do, and 1 is added again; subtract 1 from every norm weight but linear_attn.norm"
            )
    gates = _sampled(stored, "layers.", ".linear_attn.A_log")
    if gates and max(a.max() for a in gates) < 0:
        sentences.append(
            f"A_log is negative everywhere ({_range(gates)}): it looks as if A = -exp(A_log) is stored, as llama.cpp does; "
            "store log(-A)"
        )
    elif gates and max(a.max() for a in gates) > 6 and min(a.min() for a in gates) > 0:
        sentences.append(
            f"A_log is positive and reaches {_range(gates)}: it looks as if exp(A_log) is stored; store its logarithm"
        )
    steps = _sampled(stored, "layers.", ".linear_attn.dt_bias")
    if steps and min(b.min() for b in steps) > 0 and max(b.max() for b in steps) < 0.25:
        sentences.append(
            f"dt_bias is within {_range(steps)}: it looks as if softplus(dt_bias) is stored; store its inverse softplus"
        )
    outputs = _sampled(stored, "layers.", ".linear_attn.norm.weight")
    if outputs and all(abs(w.mean()) < 0.3 for w in outputs):
        sentences.append(
            f"the weights of linear_attn.norm are near 0 (mean {_mean(outputs):.2f}): this norm multiplies by w, not by 1 + w; "
            "add 1 to them"
        )
    scales = [scale for scale in scales if scale.numel()]
    if scales and torch.cat([scale.flatten()[:64].abs() for scale in scales[:64]]).median() > 1:
        sentences.append(
            "most *_scale_inv are above 1, for weights of up to 448: it looks as if the inverse is stored; despite its name "
            "the scale is a factor"
        )
    return sentences


def _sampled(stored: Mapping[str, StoredTensor], prefix: str, *ends: str) -> list[Tensor]:
    """The vectors of these names in the first, a middle and the last layer that has them."""
    vectors: list[Tensor] = []
    for end in ends:
        having = [t for name, t in stored.items() if name.startswith(prefix) and name.endswith(end) and _is_vector(t)]
        chosen = {id(t): t for t in (having[:1] + having[len(having) // 2 : len(having) // 2 + 1] + having[-1:])}
        vectors += [torch.cat(list(stored_numbers(tensor))).float() for tensor in chosen.values()]
    return [vector for vector in vectors if torch.isfinite(vector).all()]


def _is_vector(tensor: StoredTensor) -> bool:
    return tensor.dtype in FLOATS and len(tensor.shape) == 1 and 1 < tensor.numel <= _LONGEST


def _mean(vectors: Iterable[Tensor]) -> float:
    return torch.cat(list(vectors)).mean().item()


def _range(vectors: Iterable[Tensor]) -> str:
    joined = torch.cat(list(vectors))
    return f"{joined.min().item():.3g} ... {joined.max().item():.3g}"
