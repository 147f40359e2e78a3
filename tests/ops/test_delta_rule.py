"""The gated delta rule: the recurrence by hand, and the chunked form against it at every gate and key that breaks it.

Judged by the recurrent form in float64 (a sum of T rank-one updates, nothing divided, nothing subtracted that is
large). Bounds of the numerical contract, relative: 2e-5 in float32 for outputs, states and gradients; 1e-4 for the
gradient of the decay beyond -20, where it is itself e^-20.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen35moe import backends, ops
from qwen35moe.ops.cpu import delta_chunks
from qwen35moe.ops.cpu.delta_rule import chunked_gated_delta_rule, chunked_gated_delta_rule_cpu
from tests.support.peer import assert_close, generator, relative_error

recurrent_gated_delta_rule = ops.gated_delta_rule.definition

FORMS = {"recurrent": recurrent_gated_delta_rule, "chunked": chunked_gated_delta_rule}
CUTS = [1, 3, 4, 63, 64, 65, 129]
B, G, H, K, V = 2, 3, 6, 5, 7
FP32, HARD_GATE, EXACT = 2e-5, 1e-4, 1e-12


def log_uniform(low: float, high: float, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    exponent = torch.rand(shape, generator=rng, dtype=torch.float64) * (math.log(high) - math.log(low)) + math.log(low)
    return -exponent.exp()


def _hard_then_soft(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    decay = log_uniform(1e-4, 1e-2, shape, rng)
    decay[:, : shape[1] // 2] = -80.0
    decay[:, ::17] = -25.0
    return decay


GATES: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    **{str(level): (lambda shape, _rng, level=level: torch.full(shape, level, dtype=torch.float64))
       for level in (-1e-4, -1e-2, -1.0, -9.7, -19.0, -21.0, -28.0, -80.0)},
    "none": lambda shape, _rng: torch.zeros(shape, dtype=torch.float64),
    "ordinary": lambda shape, rng: log_uniform(1e-3, 1.6, shape, rng),
    "any": lambda shape, rng: log_uniform(1e-4, 80.0, shape, rng),
    "hard then soft": _hard_then_soft,
    "alternating": lambda shape, _rng: torch.where(torch.arange(shape[1])[None, :, None] % 2 == 0, -80.0, -1e-4)
    .double().expand(shape).clone(),
}
BETAS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "any": lambda shape, rng: torch.rand(shape, generator=rng, dtype=torch.float64),
    "0": lambda shape, _rng: torch.zeros(shape, dtype=torch.float64),
    "1": lambda shape, _rng: torch.ones(shape, dtype=torch.float64),
}


def _correlated(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    common = torch.randn((shape[0], 1, *shape[2:]), generator=rng, dtype=torch.float64)
    return 0.9**0.5 * common + 0.1**0.5 * torch.randn(shape, generator=rng, dtype=torch.float64)


KEYS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "any": lambda shape, rng: torch.randn(shape, generator=rng, dtype=torch.float64),
    "zero": lambda shape, _rng: torch.zeros(shape, dtype=torch.float64),
    "equal": lambda shape, rng: torch.randn((shape[0], 1, *shape[2:]), generator=rng).double().expand(shape).clone(),
    "correlated": _correlated,
}


def inputs(
    length: int, *, batch: int = B, gates: str = "ordinary", betas: str = "any", keys: str = "any", seed: int = 0,
    state: bool = True, dtype: torch.dtype = torch.float32, heads: tuple[int, int, int, int] = (G, H, K, V),
) -> dict[str, Tensor]:
    """query, key, value, decay, beta (and state); every dtype sees numbers that float32 holds."""
    rng = generator(seed)
    groups, value_heads, key_width, value_width = heads
    drawn = {
        "query": torch.randn((batch, length, groups, key_width), generator=rng, dtype=torch.float64),
        "key": KEYS[keys]((batch, length, groups, key_width), rng),
        "value": torch.randn((batch, length, value_heads, value_width), generator=rng, dtype=torch.float64),
        "decay": GATES[gates]((batch, length, value_heads), rng),
        "beta": BETAS[betas]((batch, length, value_heads), rng),
    }
    if state:
        drawn["state"] = torch.randn((batch, value_heads, key_width, value_width), generator=rng, dtype=torch.float64)
    return {name: tensor.float().to(dtype) for name, tensor in drawn.items()}


def call(form: Callable[..., Any], values: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    named = {name: tensor for name, tensor in values.items() if name not in ("query", "key", "value")}
    return form(values["query"], values["key"], values["value"], **named, **options)


def with_gradients(form: Callable[..., Any], values: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input under random cotangents of both."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in values.items()}
    out, state = call(form, leaves, **options)
    rng = generator(99)
    loss = (out * torch.randn(out.shape, generator=rng).to(out)).sum()
    loss = loss + (state * torch.randn(state.shape, generator=rng).to(state)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), "final": state.detach()} | {
        f"d_{name}": gradient for name, gradient in zip(leaves, found, strict=True)
    }


def doubles(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in values.items()}


def judge(found: dict[str, Tensor], truth: dict[str, Tensor], gate: float, floor: float = 1e-13) -> None:
    """Every value within 2e-5 of the largest true one; the decay's gradient within 1e-4 beyond -20.

    What is smaller than e^-30 throughout (all gates at -80) counts as zero: `floor` is the smallest scale an error is
    measured by.
    """
    bad = {}
    for name, true in truth.items():
        bound = HARD_GATE if name == "d_decay" and gate <= -20 else FP32
        assert torch.isfinite(found[name]).all(), f"{name} is not finite"
        error = (found[name].double() - true).abs().max().item() / max(true.abs().max().item(), floor)
        if error > bound:
            bad[name] = f"{error:.1e} > {bound:.0e}"
    assert not bad, f"beyond the bound: {bad}"


# ---------------------------------------------------------------------------------------------------- the definition


def test_the_recurrence_by_hand():
    """S <- e^g S; S <- S + k (beta (v - S^T k))^T; o = S^T q / sqrt(K), head by head, q and k of unit length."""
    values = inputs(4, dtype=torch.float64)
    out, final = call(recurrent_gated_delta_rule, values)
    unit = {name: values[name] / (values[name].pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for name in ("query", "key")}
    for b, h in itertools.product(range(B), range(H)):
        memory, group = values["state"][b, h], h // (H // G)
        for t in range(4):
            q, k, v = unit["query"][b, t, group], unit["key"][b, t, group], values["value"][b, t, h]
            memory = memory * values["decay"][b, t, h].exp()
            memory = memory + torch.outer(k, values["beta"][b, t, h] * (v - memory.T @ k))
            assert_close(out[b, t, h], memory.T @ q / K**0.5, EXACT)
        assert_close(final[b, h], memory, EXACT)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(form):
    values = inputs(3, batch=1, dtype=torch.float64, heads=(1, 2, 2, 3))
    leaves = [tensor.requires_grad_() for tensor in values.values()]

    def flat(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return call(form, dict(zip(values, tensors, strict=True)))

    assert torch.autograd.gradcheck(flat, leaves)


@pytest.mark.parametrize("length", [7, 67])
def test_the_chunked_form_is_the_recurrence_in_float64(length):
    """To ten digits more than float32 has: no float32 hides inside, and the gradients are those of the definition."""
    values = inputs(length, dtype=torch.float64)
    truth, found = with_gradients(recurrent_gated_delta_rule, values), with_gradients(chunked_gated_delta_rule, values)
    for name in truth:
        assert_close(found[name], truth[name], 1e-11, name)


# --------------------------------------------------------------------------- chunked against recurrent, float32


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("gates", GATES)
def test_chunked_against_recurrent(gates, keys):
    values = inputs(130 if keys in ("any", "correlated") else 67, gates=gates, keys=keys)
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))
    judge(with_gradients(chunked_gated_delta_rule, values), truth, values["decay"].min().item())


@pytest.mark.parametrize("betas", ["0", "1"])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("gates", ["none", "-0.0001", "ordinary", "-21.0", "any", "hard then soft"])
def test_chunked_against_recurrent_at_beta_0_and_1(gates, keys, betas):
    """beta 1 and equal keys overwrite one slot again and again: the triangular system is at its worst.

    What was kept of that slot is then replaced whole, so the derivative by its gate is a sum of terms of order one that
    cancel. Behind gates of -80 nothing else is left in it (4e-6), and the recurrence itself has two correct digits in
    float32: that one case is judged by the size of the terms.
    """
    values = inputs(67, gates=gates, keys=keys, betas=betas)
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))
    found = with_gradients(chunked_gated_delta_rule, values)
    cancels = (gates, keys, betas) == ("hard then soft", "equal", "1")
    if cancels:
        assert truth["d_decay"].abs().max() < 1e-5
        assert_close(found.pop("d_decay") + 1.0, truth.pop("d_decay") + 1.0, FP32)
    judge(found, truth, values["decay"].min().item())


@pytest.mark.parametrize("length", CUTS)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_edge_lengths(length, state):
    values = inputs(length, state=state, seed=length)
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))
    judge(with_gradients(chunked_gated_delta_rule, values), truth, -1.0)
    judge(with_gradients(recurrent_gated_delta_rule, values), truth, -1.0)


@pytest.mark.parametrize("heads", [(1, 1, 3, 2), (1, 5, 4, 9), (4, 4, 9, 4), (2, 6, 16, 16)], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_head_ratios_and_widths(form, heads):
    values = inputs(66, heads=heads)
    judge(with_gradients(form, values), with_gradients(recurrent_gated_delta_rule, doubles(values)), -1.0)


def test_the_gate_gradient_of_the_diagonal_is_exact_at_hard_gates():
    """All gates at -28: the true gradient is about e^-28 throughout. Differentiating exp(c_i - c_i) would leave
    rounding errors of ordinary size in its place."""
    values = inputs(66, gates="-28.0", state=False)
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))["d_decay"]
    found = with_gradients(chunked_gated_delta_rule, values)["d_decay"]
    assert 0 < truth.abs().max() < 1e-10
    assert (found - truth).abs().max() < 1e-13


def subnormal(tensor: Tensor) -> int:
    size = tensor.detach().abs()
    return int(((size > 0) & (size < torch.finfo(torch.float32).tiny)).sum())


class _Subnormals(TorchDispatchMode):
    """Counts the subnormal numbers among all float32 results, the triangular inverse before it is masked aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Memory that was only reserved holds whatever was there.
        if func not in (torch.ops.aten.linalg_solve_triangular.default, *RESERVES):
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and not _is_view(func):
                    self.numbers[str(func)] += subnormal(tensor)
        return result


RESERVES = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default)


def _is_view(func: Any) -> bool:
    return any(returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns)


@pytest.mark.parametrize("gates", GATES)
def test_every_value_is_an_ordinary_number_or_zero(gates):
    """A CPU works on subnormal numbers in microcode. Below e^-30 a decay is zero, and with it all that it multiplies:
    no operation of the forward gives a subnormal number, and no gradient holds one."""
    values = inputs(130, gates=gates)
    with _Subnormals() as seen, torch.no_grad():
        call(chunked_gated_delta_rule_cpu, values)
    assert len(seen.numbers) > 10 and seen.numbers.total() == 0, +seen.numbers
    gradients = with_gradients(chunked_gated_delta_rule, values)
    assert {name: subnormal(gradient) for name, gradient in gradients.items()} == dict.fromkeys(gradients, 0)


# ------------------------------------------------------------------------------------------------ the explicit backward


@pytest.mark.parametrize("bounds", [None, [0, 1, 3, 130, 131, 300], [0, 0, 128, 128, 300, 300]], ids=str)
def test_the_backward_through_many_blocks(bounds, monkeypatch):
    """Three blocks of four chunks; packed documents begin and end inside them, at their edges, and may be empty."""
    monkeypatch.setitem(delta_chunks._BLOCK_BYTES, "cpu", 1)
    values = inputs(300, batch=1, dtype=torch.float64, state=False)
    documents = 1 if bounds is None else len(bounds) - 1
    values["state"] = torch.randn(documents, H, K, V, generator=generator(5), dtype=torch.float64)
    options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}

    def definition(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
        """Document by document; an empty one leaves its state alone."""
        state, outs, finals = named.pop("state"), [], []
        for d, (start, end) in enumerate(itertools.pairwise(bounds or [0, 300])):
            rows = slice(start, end)
            final = state[d : d + 1]
            if end > start:
                gates = {name: gate[:, rows] for name, gate in named.items()}
                out, final = recurrent_gated_delta_rule(query[:, rows], key[:, rows], value[:, rows], **gates, state=final)
                outs.append(out)
            finals.append(final)
        return torch.cat(outs, dim=1), torch.cat(finals)

    truth = with_gradients(definition, values)
    found = with_gradients(lambda *args, **named: chunked_gated_delta_rule(*args, **named, **options), values)
    for name in truth:
        assert_close(found[name], truth[name], 1e-11, name)
    out, final = call(chunked_gated_delta_rule_cpu, values, **options)
    assert torch.equal(out, found["out"]) and torch.equal(final, found["final"])


@pytest.mark.parametrize("part", ["output", "memory"])
def test_one_of_the_two_results_may_have_no_gradient(part):
    values = {name: tensor.requires_grad_() for name, tensor in inputs(40, dtype=torch.float64).items()}
    results = []
    for form in FORMS.values():
        result = call(form, values)[part == "memory"]
        cotangent = torch.randn(result.shape, generator=generator(3), dtype=result.dtype)
        wanted = [tensor for name, tensor in values.items() if part == "output" or name != "query"]
        results.append(torch.autograd.grad(result, wanted, cotangent))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-11)


def test_what_the_backward_keeps():
    """The inputs, and a memory for every block of four chunks at least: 32 KiB per token at 35B shapes."""
    values = {name: tensor.requires_grad_() for name, tensor in inputs(512, batch=1, dtype=torch.bfloat16).items()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(chunked_gated_delta_rule, values)
    given = sum(tensor.nbytes for tensor in values.values())
    assert given < sum(kept.values()) <= given + 512 // 128 * 4 * H * K * V


def test_a_second_derivative_is_refused_by_name():
    values = {name: tensor.requires_grad_() for name, tensor in inputs(9, dtype=torch.float64).items()}
    (first,) = torch.autograd.grad(call(chunked_gated_delta_rule, values)[0].sum(), values["value"], create_graph=True)
    with pytest.raises(ValueError, match='gated_delta_rule="recurrent"'):
        first.sum().backward()


def test_which_form_runs():
    """Nobody wants a gradient: in place, packed rows too. Somebody does: the form with the backward."""
    values, bounds = inputs(20, batch=1, state=False), torch.tensor([0, 7, 20])
    args, gates = [values[name] for name in ("query", "key", "value")], {n: values[n] for n in ("decay", "beta")}
    with backends.ran() as ran:
        backends.run("gated_delta_rule", *args, **gates, cu_seqlens=bounds)
        backends.run("gated_delta_rule", args[0].requires_grad_(), *args[1:], **gates, cu_seqlens=bounds)
    assert [seen.name for seen in ran.calls] == ["chunked_cpu", "torch"]


# ---------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("first,second", list(itertools.product(FORMS, FORMS)))
def test_a_prefix_and_the_rest_equal_the_whole(first, second, cut):
    """Whichever form runs each part. The recurrent form: bit for bit."""
    values = inputs(cut + 5, seed=cut)
    whole, final = call(FORMS[second], values)
    head, carried = call(FORMS[first], {n: t if n == "state" else t[:, :cut] for n, t in values.items()})
    rest, end = call(FORMS[second], {n: carried if n == "state" else t[:, cut:] for n, t in values.items()})
    bound = 0.0 if (first, second) == ("recurrent", "recurrent") else FP32
    assert_close(torch.cat([head, rest], dim=1), whole, bound)
    assert_close(end, final, bound)


@pytest.mark.parametrize("lengths", [[1, 3, 4], [63, 64, 65], [129, 1, 2], [5], [64, 64]], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_packed_documents_equal_separate_ones(form, state, lengths):
    """Outputs, final states, and every gradient, an initial state per document included."""
    values = inputs(sum(lengths), batch=1, state=False, gates="ordinary")
    states = torch.randn(len(lengths), H, K, V, generator=generator(5))
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    packed_values = values | ({"state": states} if state else {})
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in packed_values.items()}
    out, final = call(form, leaves, cu_seqlens=bounds)
    assert final.shape == (len(lengths), H, K, V)
    cotangent = torch.randn(out.shape, generator=generator(6)), torch.randn(final.shape, generator=generator(7))
    packed = torch.autograd.grad([out, final], list(leaves.values()), cotangent)

    alone = {name: tensor.clone().requires_grad_() for name, tensor in packed_values.items()}
    outs, finals = [], []
    for d, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        part = {n: t[d : d + 1] if n == "state" else t[:, start:end] for n, t in alone.items()}
        o, f = call(form, part)
        outs.append(o)
        finals.append(f)
    separate = torch.autograd.grad([torch.cat(outs, 1), torch.cat(finals)], list(alone.values()), cotangent)
    assert_close(out, torch.cat(outs, 1), FP32, "out")
    assert_close(final, torch.cat(finals), FP32, "final state")
    for name, found, expected in zip(leaves, packed, separate, strict=True):
        assert_close(found, expected, FP32, f"gradient of {name}")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_of_a_batch_equals_the_row_alone(form):
    values = inputs(66)
    out, final = call(form, values)
    for r in range(B):
        alone, end = call(form, {name: tensor[r : r + 1] for name, tensor in values.items()})
        assert_close(alone, out[r : r + 1], FP32)
        assert_close(end, final[r : r + 1], FP32)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_token_that_does_nothing_leaves_the_state_bit_for_bit(form):
    """decay 0 and beta 0: what padding is turned into."""
    values = inputs(9)
    values["decay"][:, 4:] = 0.0
    values["beta"][:, 4:] = 0.0
    _, through = call(form, values)
    _, before = call(form, {name: t if name == "state" else t[:, :4] for name, t in values.items()})
    assert_close(through, before, 0.0 if form is recurrent_gated_delta_rule else FP32)


# ---------------------------------------------------------------------------------------------------- dtypes and memory


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_dtypes(form):
    """The output has the first input's dtype; the state is float32 at least; float64 stays float64 throughout."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        values = inputs(66, dtype=dtype)
        values["decay"], values["state"] = values["decay"].to(wide), values["state"].to(wide)
        out, state = call(form, values)
        assert (out.dtype, state.dtype) == (dtype, wide)
        truth, end = call(recurrent_gated_delta_rule, doubles(values))
        assert relative_error(out, truth) < {torch.bfloat16: 5e-3, torch.float32: FP32, torch.float64: EXACT}[dtype]
        assert relative_error(state, end) < {torch.float64: EXACT}.get(dtype, FP32)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_inputs_are_left_as_they_were(form):
    values = inputs(66)
    kept = {name: tensor.clone() for name, tensor in values.items()}
    call(form, values)
    for name, tensor in values.items():
        assert torch.equal(tensor, kept[name]), f"{name} was written to"


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_against_transformers(form):
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as peer

    values = inputs(66)
    out, state = call(form, values)
    for rule in (peer.torch_chunk_gated_delta_rule, peer.torch_recurrent_gated_delta_rule):
        their_out, their_state = rule(
            values["query"], values["key"], values["value"], g=values["decay"], beta=values["beta"],
            initial_state=values["state"], output_final_state=True, use_qk_l2norm_in_kernel=True,
        )
        assert_close(out, their_out, 1e-5)
        assert_close(state, their_state, 1e-5)
