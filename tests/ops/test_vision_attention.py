"""Attention of the vision tower: all forms against the definition, and the rounding of the scores in `bf16_scores`."""

from __future__ import annotations

import functools
import itertools
import math
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import backends
from qwen35moe.ops.cpu.vision_attention import vision_attention_torch
from tests.support import peer
from tests.support.peer import assert_close


def test_vision_attention_is_bidirectional_within_a_frame():
    rng = peer.generator(0)
    query, key, value = (torch.randn((13, 3, 8), generator=rng, dtype=torch.float64) for _ in range(3))
    bounds = torch.tensor([0, 4, 5, 13])
    out = vision_attention_torch(query, key, value, cu_seqlens=bounds, scale=0.31)
    for start, end in itertools.pairwise(bounds.tolist()):
        q, k, v = (x[start:end] for x in (query, key, value))
        weights = F.softmax(torch.einsum("nhk,mhk->hnm", q, k) * 0.31, dim=-1)
        assert_close(out[start:end], torch.einsum("hnm,mhk->nhk", weights, v), 1e-13)


@functools.cache
def attention_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 900, 3, 20, generator=peer.generator(2), dtype=torch.float64).to(dtype)
    return q, k, v


BOUNDS = {"one frame": [0, 900], "equal frames": [*range(0, 901, 90)], "odd frames": [0, 7, 7, 300, 301, 900]}


def rounding_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """transformers' eager attention: softmax in float32 of scores in the dtype of the inputs."""
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import eager_attention_forward

    module: Any = types.SimpleNamespace(num_key_value_groups=1, training=False)
    return eager_attention_forward(module, q, k, v, None, scaling=scale)[0].transpose(1, 2)


@pytest.mark.parametrize("name", BOUNDS)
def test_every_form_of_vision_attention(name):
    """Against the definition in float64. In bf16 the errors are at most 1.25 times that of fused attention frame by frame; for
    `bf16_scores` 0.75 times that of transformers' eager attention, which rounds its scores too."""
    bounds = torch.tensor(BOUNDS[name], dtype=torch.int32)
    truth = backends.run("vision_attention", *attention_inputs(torch.float64), cu_seqlens=bounds, scale=0.3)
    frames = [[x[a:b].transpose(0, 1)[None] for x in attention_inputs(torch.bfloat16)]
              for a, b in zip(BOUNDS[name], BOUNDS[name][1:], strict=False) if b > a]
    plain = torch.cat([F.scaled_dot_product_attention(*x, scale=0.3)[0].transpose(0, 1) for x in frames])
    eager = torch.cat([rounding_attention(*x, 0.3)[0].transpose(0, 1) for x in frames])
    limits = {"bf16_scores": 0.75 * (eager.double() - truth).norm()}
    limit = (plain.double() - truth).norm()
    for form in [entry.name for entry in backends.implementations("vision_attention") if not entry.missing]:
        with torch.no_grad(), backends.use(vision_attention=form):
            for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
                run = functools.partial(backends.run, "vision_attention", cu_seqlens=bounds, scale=0.3)
                try:
                    out = run(*attention_inputs(dtype))
                except ValueError as error:
                    assert "cannot run" in str(error)
                    continue
                assert_close(out, truth, bound, form)
            out = run(*attention_inputs(torch.bfloat16))
            assert out.dtype == torch.bfloat16 and (out.double() - truth).norm() <= limits.get(form, 1.25 * limit), form


def test_bf16_scores_runs_where_it_is_fast_and_the_scores_are_small(monkeypatch):
    q, k, v = attention_inputs(torch.bfloat16)
    bounds = {"all": torch.tensor([0, 900]), "few": torch.tensor([*range(0, 901, 90)])}
    run = functools.partial(backends.run, "vision_attention", scale=0.3)

    def choice(query: Tensor, frames: str = "all") -> str:
        with torch.no_grad(), backends.ran() as ran:
            run(query, k, v, cu_seqlens=bounds[frames])
        return ran.calls[0].name

    for capabilities, name in (((), "torch"), (("avx512_bf16", "amx_bf16"), "torch"), (("avx512_bf16",), "bf16_scores")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda names=capabilities: dict.fromkeys(names, True), raising=False)
        assert choice(q) == name
    assert choice(100 * q) == choice(q * math.nan) == choice(q, "few") == "torch"
    unsupported = {
        "may reach [0-9]{4}, too large": 100 * q,
        "no backward": q.clone().requires_grad_(),
        "float32 on cpu": q.float(),
    }
    for message, query in unsupported.items():
        with backends.use(vision_attention="bf16_scores"), pytest.raises(ValueError, match=message):
            run(query, k.to(query.dtype), v.to(query.dtype), cu_seqlens=bounds["all"])


@pytest.mark.parametrize(("spread", "outliers"), [(1.4, False), (4, False), (12, False), (4, True)])
def test_the_error_of_bf16_scores_does_not_grow_with_the_scores(spread, outliers):
    """The scores are rounded after the approximate row maximum is subtracted. With large keys that the sample for the maximum
    misses (outliers), the error grows, and stays below that of transformers' eager attention."""
    q, k, v = attention_inputs(torch.float64)
    k[1::8] *= 4 if outliers else 1
    q = (q * spread / (q @ k.mT * 0.3).std()).bfloat16()
    k, v, bounds = k.bfloat16(), v.bfloat16(), torch.tensor([0, 900])
    run = functools.partial(backends.run, "vision_attention", cu_seqlens=bounds, scale=0.3)
    truth = run(q.double(), k.double(), v.double())
    with torch.no_grad(), backends.use(vision_attention="bf16_scores"):
        error = (run(q, k, v).double() - truth).norm() / truth.norm()
    eager = rounding_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), 0.3)[0].transpose(0, 1)
    theirs = (eager.double() - truth).norm() / truth.norm()
    assert error < (theirs if outliers else min(5e-3, 0.4 * theirs)), (error, theirs)
