"""Operations that a user calls directly: wrong shapes, dtypes and bounds are a ValueError, not a broadcast."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import Qwen3_5MoeForCausalLM, backends, ops
from qwen35moe.backends.cases import CASES
from qwen35moe.backends.operation import TABLE
from qwen35moe.ops.arguments import AXES
from tests.models.test_model import small
from tests.support.peer import generator, randn

B, T, H, G, K, V = 2, 5, 4, 2, 6, 7
RULE = {
    "query": randn(B, T, G, K), "key": randn(B, T, G, K), "value": randn(B, T, H, V), "decay": -torch.rand(B, T, H).double(),
    "beta": torch.rand(B, T, H).double(),
}  # fmt: skip
ROW = {name: x[:1] for name, x in RULE.items()}
HEADS = {"query": randn(B, T, H, K), "key": randn(B, T, G, K), "value": randn(B, T, G, V), "scale": 0.3}
TURN = {"query": randn(B, T, H, K), "key": randn(B, T, G, K), "cos": randn(B, T, 2), "sin": randn(B, T, 2)}
CONV = {"x": randn(B, T, 8), "weight": randn(8, 4)}
MOE = {
    "hidden": randn(6, 8), "gate_up": randn(5, 14, 8), "down": randn(5, 8, 7), "indices": torch.tensor([[0, 4]] * 6),
    "weights": randn(6, 2),
}  # fmt: skip
LOSS = {"hidden": randn(6, 8), "weight": randn(9, 8), "labels": torch.tensor([0, 8, -100, 3, 3, 1])}
bounds = torch.tensor

rule, attention, rotary, conv, moe = ops.gated_delta_rule, ops.attention, ops.rotary, ops.short_convolution, ops.experts
WRONG: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any], str]] = {
    "a decay that broadcasts": (rule, RULE, {"decay": RULE["decay"][..., :1]}, r"decay \[2, 5, 1\] .*H = 4"),
    "a shorter query": (rule, RULE, {"query": RULE["query"][:, :3]}, r"key .*T = 3"),
    "heads before tokens": (rule, RULE, {"value": RULE["value"].mT}, "V|T|H"),
    "integers": (rule, RULE, {"query": RULE["query"].long()}, "floating-point numbers, got torch.int64"),
    "a transposed state": (rule, RULE, {"state": randn(B, H, V, K)}, r"state .*K = 6"),
    "one state for two rows": (rule, RULE, {"state": randn(1, H, K, V)}, "one state for each row, 2"),
    "one state for two documents": (rule, ROW, {"state": randn(1, H, K, V), "cu_seqlens": bounds([0, 2, 5])},
                                    "one state for each document, 2"),
    "heads that are no multiple": (rule, RULE, {"query": randn(B, T, 3, K), "key": randn(B, T, 3, K)}, "4 heads"),
    "bounds that end early": (rule, ROW, {"cu_seqlens": bounds([0, 2, 4])}, r"\[0, 2, 4\] must rise from 0 to"),
    "bounds that fall": (rule, ROW, {"cu_seqlens": bounds([0, 4, 2, 5])}, "must rise"),
    "bounds of two rows": (rule, RULE, {"cu_seqlens": bounds([0, 2, 5])}, "one row, got 2"),
    "bounds as a list": (rule, ROW, {"cu_seqlens": [0, 2, 5]}, "got list"),
    "bounds as floats": (rule, ROW, {"cu_seqlens": bounds([0.0, 5.0])}, "holds integers"),
    "fewer keys than queries": (attention, HEADS, {"key": HEADS["key"][:, :3], "value": HEADS["value"][:, :3]}, "5 queries"),
    "keys of one row": (attention, HEADS, {"key": HEADS["key"][:1]}, r"key .*B = 2"),
    "two dtypes": (attention, HEADS, {"key": HEADS["key"].float()}, "query is torch.float64, key is torch.float32"),
    "a wrong start": (attention, HEADS, {"starts": 1}, "from position 1"),
    "a sine that broadcasts": (rotary, TURN, {"sin": TURN["sin"][..., :1]}, r"sin .*R/2\], with R = 4"),
    "angles of one row": (rotary, TURN, {"cos": TURN["cos"][:1]}, r"cos .*B = 2"),
    "angles of both halves": (rotary, TURN, {"cos": randn(B, T, 6), "sin": randn(B, T, 6)}, "rotate 12 entries, a head has 6"),
    "a weight of one number": (ops.rms_norm, {"x": randn(3, 6), "eps": 1e-6}, {"weight": randn(1)}, r"weight \[1\] .*D = 6"),
    "a gate that broadcasts": (ops.gated_rms_norm, {"x": randn(3, 6), "weight": randn(6), "eps": 1e-6}, {"gate": randn(1, 6)},
                               r"gate \[1, 6\] must be \[\.\.\., V\]"),
    "channels first": (conv, CONV, {"x": CONV["x"].mT}, r"weight .*C = 5"),
    "a weight of nn.Conv1d": (conv, CONV, {"weight": randn(8, 1, 4)}, r"must be \[C, W\]"),
    "a state of W inputs": (conv, CONV, {"state": randn(B, 8, 4)}, r"W-1\], with W = 4"),
    "lengths beyond the row": (conv, CONV, {"lengths": torch.tensor([9, 2])}, r"\[9, 2\] must be 0 ... 5"),
    "negative experts": (moe, MOE, {"indices": MOE["indices"] - 5}, "must be 0 ... 4, got -5 ... -1"),
    "experts that do not exist": (moe, MOE, {"indices": MOE["indices"] + 1}, "got 1 ... 5"),
    "experts as uint8": (moe, MOE, {"indices": MOE["indices"].byte()}, "got torch.uint8"),
    "weights that broadcast": (moe, MOE, {"weights": MOE["weights"][:, :1]}, r"weights .*k = 2"),
    "more than the experts": (ops.router, {"hidden": randn(6, 8), "weight": randn(5, 8)}, {"top_k": 9}, "1 ... 5"),
    "no expert": (ops.router, {"hidden": randn(6, 8), "weight": randn(5, 8)}, {"top_k": 0}, "1 ... 5"),
    "labels as floats": (ops.linear_cross_entropy, LOSS, {"labels": LOSS["labels"].double()}, "holds integers"),
    "labels beyond the vocabulary": (ops.linear_cross_entropy, LOSS, {"labels": LOSS["labels"] + 1}, "must be 0 ... 8"),
    "a column of labels": (ops.linear_cross_entropy, LOSS, {"labels": LOSS["labels"][:, None]}, r"must be \[N\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name: str) -> None:
    operation, right, change, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        operation(**(right | change))


def test_every_operation_is_checked_and_its_own_cases_pass() -> None:
    assert set(AXES) == set(backends.OPERATIONS)
    for name in backends.OPERATIONS:
        for args, kwargs in CASES[name](torch.float64, "cpu", generator(0)):
            TABLE[name].check(name, args, kwargs)  # type: ignore[misc]


def test_a_module_s_call_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are right by construction; a decoding step has no time for the checks."""
    calls: list[str] = []
    for name in AXES:
        monkeypatch.setattr(TABLE[name], "check", lambda name, args, kwargs: calls.append(name))
    model = Qwen3_5MoeForCausalLM(small()).eval()
    cache = model.new_cache(1)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), cache=cache)
        model(torch.tensor([[4]]), cache=cache)
    assert calls == []
    ops.rms_norm(randn(3, 6), randn(6), eps=1e-6)
    assert calls == ["rms_norm"]


def test_checks_under_transforms_and_in_a_graph() -> None:
    """vmap hides the values, and the axis; torch.compile traces no check."""
    indices = torch.stack([MOE["indices"], MOE["indices"].flip(1)])

    def of(indices: Tensor) -> Tensor:
        return ops.experts(MOE["hidden"], MOE["gate_up"], MOE["down"], indices, MOE["weights"])

    assert torch.allclose(torch.vmap(of)(indices), torch.stack([of(indices[0]), of(indices[1])]), rtol=1e-12)


@pytest.mark.parametrize("operation", backends.OPERATIONS)
def test_every_argument_may_be_passed_by_name(operation: str) -> None:
    args, options = next(iter(backends.cases(operation)[1](torch.float32, "cpu", torch.Generator().manual_seed(0))))
    named = dict(zip(inspect.signature(TABLE[operation].definition).parameters, args, strict=False))
    expected, actual = TABLE[operation](*args, **options), TABLE[operation](**named, **options)
    pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    assert all(torch.equal(a, b) for a, b in pairs)
