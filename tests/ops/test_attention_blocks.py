"""The CPU forms of attention in blocks against the definition in float64: lengths at the blocks' borders, starts, packed
documents, and their error next to that of transformers' eager attention."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, ops
from qwen35moe.ops.cpu import attention_blocks as module
from qwen35moe.ops.cpu.attention_blocks import attention_bf16_blocks, attention_blocks
from tests.support.peer import assert_close, generator

definition = ops.attention.definition
H, G, K, V = 6, 3, 16, 24
SCALE = 0.31
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
FORMS = {
    "float32": (attention_blocks, torch.float32), "bfloat16": (attention_blocks, torch.bfloat16),
    "float16": (attention_blocks, torch.float16), "bf16_blocks": (attention_bf16_blocks, torch.bfloat16),
}
every_form = pytest.mark.parametrize("form,dtype", FORMS.values(), ids=FORMS)


def draw(tokens: int, positions: int, dtype: torch.dtype, *, batch: int = 1) -> list[Tensor]:
    rng = generator(1000 * tokens + positions)
    shapes = ((tokens, H, K), (positions, G, K), (positions, G, V))
    return [torch.randn((batch, *shape), generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


def compare(form, inputs: list[Tensor], **options) -> None:
    copies = [x.clone() for x in inputs]
    actual = form(*inputs, scale=SCALE, **options)
    expected = definition(*(x.double() for x in inputs), scale=SCALE, **options)
    assert actual.dtype == inputs[0].dtype
    bound = BOUNDS[actual.dtype] * (2 if form is attention_bf16_blocks else 1)  # rounds scores and weights as well
    assert_close(actual, expected, bound)
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True)), "an input was modified"


@pytest.fixture(params=["one block", "many blocks"])
def sizes(request, monkeypatch):
    """The blocks of the module, or smaller ones: 8 queries and 48 keys, 2 of 3 key heads."""
    if request.param == "many blocks":
        for name, value in {"_ROWS": 16, "_KEYS": 48, "_GROUPS": 2}.items():
            monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("tokens", [1, 3, 63, 64, 65, 129, 257, 300])
@every_form
def test_every_length(form, dtype, tokens, sizes):
    compare(form, draw(tokens, tokens, dtype))
    compare(form, draw(tokens, tokens + 70, dtype, batch=2), starts=70)


@every_form
def test_rows_with_different_starts(form, dtype, sizes):
    """Keys behind a row's last query hold nan: a cache may keep anything there. Row 2's last queries are padding."""
    query, key, value = draw(65, 200, dtype, batch=3)
    starts = torch.tensor([0, 97, 150])
    for r, start in enumerate(starts.tolist()):
        key[r, start + 65 :] = value[r, start + 65 :] = math.nan
    out = form(query, key, value, scale=SCALE, starts=starts)
    for r, start in enumerate(starts.tolist()):
        positions = min(200, start + 65)
        row = [x[r : r + 1].double() for x in (query, key[:, :positions], value[:, :positions])]
        bound = BOUNDS[dtype] * (2 if form is attention_bf16_blocks else 1)
        assert_close(out[r : r + 1], definition(*row, scale=SCALE, starts=start), bound)


@pytest.mark.parametrize("lengths", [[1, 3, 64], [63, 0, 65, 129], [5]], ids=str)
@every_form
def test_packed_documents(form, dtype, lengths, sizes):
    compare(form, draw(sum(lengths), sum(lengths), dtype), cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]))


@every_form
def test_large_scores(form, dtype, sizes):
    """A key that is not in the sample of the row's maximum has a score of several hundred."""
    query, key, value = draw(129, 129, dtype)
    key[:, 37] = 40 * query[:, 100, ::2]
    compare(form, [query, key, value])


@torch.no_grad()
def test_the_error_is_that_of_transformers_eager_attention():
    """Geometric mean of the error over 102 heads, at ordinary scores and at large ones: at most transformers' times 1.25."""
    from types import SimpleNamespace

    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import eager_attention_forward

    tokens, layer = 90, SimpleNamespace(num_key_value_groups=H // G, training=False)
    mask = torch.full((tokens, tokens), float("-inf")).triu(1)
    forms = {
        "float32": (attention_blocks, torch.float32), "bfloat16": (attention_blocks, torch.bfloat16),
        "bf16_blocks": (attention_bf16_blocks, torch.bfloat16),
    }
    logs: dict[tuple[str, float], list[float]] = {}
    for number, (name, (form, dtype)), size in itertools.product(range(17), forms.items(), (0.5, 3.0)):
        rng = generator(number)
        query, key, value = (
            (torch.randn(1, tokens, heads, K, generator=rng) * factor).to(dtype)
            for heads, factor in ((H, size), (G, 1.0), (G, 1.0))
        )
        exact = definition(query.double(), key.double(), value.double(), scale=K**-0.5)
        theirs, _ = eager_attention_forward(
            layer, *(x.transpose(1, 2) for x in (query, key, value)), mask.to(dtype), scaling=K**-0.5  # pyright: ignore
        )
        ours = form(query, key, value, scale=K**-0.5)
        ratios = (ours - exact).square().mean((0, 1, 3)) / (theirs - exact).square().mean((0, 1, 3))
        logs.setdefault((name, size), []).extend((0.5 * ratios.log()).tolist())
    for case, values in logs.items():
        assert math.exp(sum(values) / len(values)) < 1.25, (case, math.exp(sum(values) / len(values)))


def test_what_it_cannot_run():
    query, key, value = draw(5, 5, torch.float32)
    leaf = query.clone().requires_grad_()
    with backends.use(attention="blocks"):
        with pytest.raises(ValueError, match="no backward"):
            ops.attention(leaf, key, value, scale=SCALE)
        with pytest.raises(ValueError, match="dropout"):
            ops.attention(query, key, value, scale=SCALE, dropout=0.5)
        with pytest.raises(ValueError, match="float64"):
            ops.attention(query.double(), key.double(), value.double(), scale=SCALE)
        with torch.no_grad():
            assert_close(ops.attention(leaf, key, value, scale=SCALE), definition(query, key, value, scale=SCALE), 1e-6)
    with backends.use(attention="bf16_blocks"), pytest.raises(ValueError, match="not bfloat16"):
        ops.attention(query, key, value, scale=SCALE)


@torch.no_grad()
def test_the_choice(monkeypatch):
    """Long calls run what was measured as the fastest, short ones and short documents SDPA."""
    monkeypatch.setattr(module, "fastest", lambda dtype, width, tokens: "blocks")
    monkeypatch.setattr(module, "_SMALL", 1 << 16)

    def ran(inputs: list[Tensor], **options) -> str:
        with backends.ran() as recorded:
            ops.attention(*inputs, scale=SCALE, **options)
        return recorded.calls[0].name

    inputs = draw(200, 200, torch.float32)
    assert ran(inputs) == "blocks"
    assert ran(draw(100, 100, torch.float32)) == ran(draw(1, 200, torch.float32), starts=199) == "torch"
    assert ran(inputs, cu_seqlens=torch.tensor([0, 70, 200])) == "torch"
    monkeypatch.setattr(module, "fastest", lambda dtype, width, tokens: "torch")
    assert ran(inputs) == "torch"


def test_the_measurement(monkeypatch):
    """One measurement for each dtype, width and range of queries; none in deterministic mode, as the suite runs."""
    monkeypatch.setattr(module, "_CHOSEN", {})
    monkeypatch.setattr(module, "_LONG", 64)
    monkeypatch.setattr(module.measured, "MEASURED", {})
    assert module.fastest(torch.bfloat16, 20, 10) == "torch" and not module.measured.MEASURED
    monkeypatch.setattr(module.measured, "allowed", lambda: True)
    names = {module.fastest(torch.bfloat16, 20, tokens) for tokens in (10, 20, 64, 80)}
    assert names <= {"torch", "blocks", "bf16_blocks"}
    assert len(module.measured.MEASURED["attention"]) == 2
