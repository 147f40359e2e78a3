"""The readable chunked form against the recurrence and the fast CPU form, and each of its numbered steps on its own.

docs/reference/delta_rule.md numbers the steps. Inputs and bounds are those of `tests.support.delta_rule`; in float64 outputs
and states equal those of the recurrence to 1e-12.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe.ops.attention_map import attention_map
from qwen35moe.ops.cpu.delta_gradient import chunked_operator
from qwen35moe.ops.delta_chunked import Chunk, across_chunk, chunked_gated_delta_rule, within_chunks
from tests.support.delta_rule import (
    CUTS,
    EXACT,
    FP32,
    GATES,
    KEYS,
    B,
    G,
    H,
    K,
    V,
    assert_within_bounds,
    call,
    doubles,
    inputs,
    recurrent_gated_delta_rule,
    with_gradients,
)
from tests.support.peer import assert_close, generator, relative_error

CHUNKS = [16, 32, 64]
EXACT_GRADIENT = 1e-11


def fast(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The fast CPU form with a chosen chunk length."""
    return chunked_operator(query, key, value, decay, beta, state, cu_seqlens, chunk_size)


# ------------------------------------------------------------------------------------ against the recurrence and the fast form


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("length", CUTS)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_lengths_and_chunk_lengths(length, chunk_size, state):
    """Outputs, final states and gradients, in float64 and float32."""
    values = inputs(length, state=state, seed=length)
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))
    readable = with_gradients(chunked_gated_delta_rule, doubles(values), chunk_size=chunk_size)
    fast_results = with_gradients(fast, doubles(values), chunk_size=chunk_size)
    for name, true in truth.items():
        bound = EXACT if name in ("out", "final") else EXACT_GRADIENT
        assert_close(readable[name], true, bound, name)
        assert_close(fast_results[name], readable[name], bound, name)
    readable = with_gradients(chunked_gated_delta_rule, values, chunk_size=chunk_size)
    assert_within_bounds(readable, truth, -1.0)
    assert_within_bounds(with_gradients(fast, values, chunk_size=chunk_size), doubles(readable), -1.0)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("gates", GATES)
def test_gates_and_keys(gates, keys):
    values = inputs(67, gates=gates, keys=keys)
    check_forms(values)


@pytest.mark.parametrize("betas", ["0", "1"])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("gates", ["none", "-0.0001", "ordinary", "-21.0", "any", "hard then soft"])
def test_gates_and_keys_at_beta_0_and_1(gates, keys, betas):
    values = inputs(67, gates=gates, keys=keys, betas=betas)
    check_forms(values, cancels=(gates, keys, betas) == ("hard then soft", "equal", "1"))


def check_forms(values: dict[str, Tensor], cancels: bool = False) -> None:
    """Float64 to 1e-12, float32 within the bounds. cancels: the error of the decay's gradient is relative to the size of its
    terms (see `test_delta_rule.test_chunked_against_recurrent_at_beta_0_and_1`)."""
    gate = values["decay"].min().item()
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))
    out, final = call(chunked_gated_delta_rule, doubles(values), chunk_size=32)
    assert_close(out, truth["out"], EXACT, "out")
    assert_close(final, truth["final"], EXACT, "final")
    readable = with_gradients(chunked_gated_delta_rule, values, chunk_size=32)
    fast_results = with_gradients(fast, values, chunk_size=32)
    if cancels:
        for results in (truth, readable, fast_results):
            results["d_decay"] = results["d_decay"] + 1.0
    assert_within_bounds(readable, truth, gate)
    assert_within_bounds(fast_results, doubles(readable), gate)


@pytest.mark.parametrize("lengths", [[1, 3, 4], [63, 64, 65], [129, 1, 2], [5], [64, 64]], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_packed_documents(state, lengths):
    values = inputs(sum(lengths), batch=1, state=False)
    if state:
        values["state"] = torch.randn(len(lengths), H, K, V, generator=generator(5))
    packed: dict[str, Any] = {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)])}
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values), **packed)
    readable = with_gradients(chunked_gated_delta_rule, doubles(values), **packed, chunk_size=32)
    assert readable["final"].shape == (len(lengths), H, K, V)
    for name, true in truth.items():
        assert_close(readable[name], true, EXACT if name in ("out", "final") else EXACT_GRADIENT, name)
    readable = with_gradients(chunked_gated_delta_rule, values, **packed, chunk_size=32)
    assert_within_bounds(readable, truth, -1.0)
    assert_within_bounds(with_gradients(fast, values, **packed, chunk_size=32), doubles(readable), -1.0)


# ------------------------------------------------------------------------------------------------------------- derivatives


def test_first_and_second_derivatives():
    values = inputs(5, batch=1, dtype=torch.float64, heads=(1, 2, 2, 3))
    leaves = [tensor.requires_grad_() for tensor in values.values()]

    def flat(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return call(chunked_gated_delta_rule, dict(zip(values, tensors, strict=True)), chunk_size=3)

    assert torch.autograd.gradcheck(flat, leaves)
    assert torch.autograd.gradgradcheck(flat, leaves)


def test_the_gate_gradient_is_exact_at_hard_gates():
    """All gates at -28: the gradient is about e^-28 throughout, far below the rounding error of a difference of exponents."""
    values = inputs(66, gates="-28.0", state=False)
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))["d_decay"]
    gradient = with_gradients(chunked_gated_delta_rule, values, chunk_size=32)["d_decay"]
    assert 0 < truth.abs().max() < 1e-10
    assert (gradient - truth).abs().max() < 1e-13


# -------------------------------------------------------------------------------------------------------- the numbered steps

M, LENGTH = 4, 11  # three chunks, of which the last has one token less


def chunks(gates: str = "ordinary", dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Chunk]:
    values = inputs(LENGTH, gates=gates, dtype=dtype)
    return values, within_chunks(*(values[name] for name in ("query", "key", "value", "decay", "beta")), M)


def token(x: Tensor, n: int, i: int) -> Tensor:
    """Token i of chunk n of x [B, T, ...]; zero after the last token."""
    t = n * M + i
    return x[:, t] if t < LENGTH else torch.zeros_like(x[:, 0])


CHUNK_TOKENS = list(itertools.product(range(3), range(M)))


def test_step_1_unit_queries_and_keys_in_chunks():
    values, chunk = chunks()
    assert chunk.q.shape == chunk.k.shape == (B, 3, H, M, K)
    for (n, i), h in itertools.product(CHUNK_TOKENS, range(H)):
        q, k = (token(values[name], n, i)[:, h // (H // G)] for name in ("query", "key"))
        assert_close(chunk.q[:, n, h, i], q / (q.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() / K**0.5, EXACT)
        assert_close(chunk.k[:, n, h, i], k / (k.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt(), EXACT)


@pytest.mark.parametrize("gates", ["ordinary", "any", "hard then soft", "alternating"])
def test_step_2_decay_is_summed_between_two_tokens(gates):
    """In float32, every entry within a few roundings, relative to its own exact value."""
    values, chunk = chunks(gates, torch.float32)
    for n, b, h in itertools.product(range(3), range(B), range(H)):
        logs = [token(values["decay"], n, i)[b, h].item() for i in range(M)]
        for i in range(M):
            sums = [math.fsum(logs[j + 1 : i + 1]) for j in range(i + 1)]
            row = chunk.decay_between[b, n, h, i]
            assert (row[i + 1 :] == 0).all() and row[i] == 1
            decays = [*row[: i + 1].tolist(), chunk.decay_since_start[b, n, h, i].item()]
            for decay, exponent in zip(decays, [*sums, math.fsum(logs[: i + 1])], strict=True):
                assert decay == pytest.approx(math.exp(exponent), rel=4e-7 * (2 - exponent), abs=1e-38)


def test_step_3_the_transform_solves_the_triangular_system():
    """(I + a) x = diag(beta), by the definition of a and by substitution, row by row."""
    values, chunk = chunks()
    for n, i in CHUNK_TOKENS:
        beta = token(values["beta"], n, i)
        row = torch.eye(M, dtype=torch.float64)[i] * beta[..., None]
        for j in range(i):
            a = beta * chunk.decay_between[:, n, :, i, j] * (chunk.k[:, n, :, i] * chunk.k[:, n, :, j]).sum(-1)
            row = row - a[..., None] * chunk.transform[:, n, :, j]
        assert_close(chunk.transform[:, n, :, i], row, EXACT)
    assert (chunk.transform.triu(1) == 0).all()


def test_step_4_the_wy_form():
    values, chunk = chunks()
    for n, i in CHUNK_TOKENS:
        x = chunk.transform[:, n, :, i]
        u = sum(x[..., j, None] * token(values["value"], n, j) for j in range(M))
        y = sum((x[..., j] * chunk.decay_since_start[:, n, :, j])[..., None] * chunk.k[:, n, :, j] for j in range(M))
        assert_close(chunk.u[:, n, :, i], u, EXACT)
        assert_close(chunk.y[:, n, :, i], y, EXACT)


def test_step_5_scores_are_weighted_by_the_decay():
    _, chunk = chunks()
    for (n, i), j in itertools.product(CHUNK_TOKENS, range(M)):
        product = (chunk.q[:, n, :, i] * chunk.k[:, n, :, j]).sum(-1)
        assert_close(chunk.scores[:, n, :, i, j], chunk.decay_between[:, n, :, i, j] * product, EXACT)


def test_step_6_the_writes_are_those_of_the_recurrence():
    """w_i = u_i - S_0^T y_i: token i adds k_i (x) w_i to the decayed state in the recurrence; a padded token adds zero."""
    values, chunk = chunks()
    state = values["state"]
    for n in range(3):
        start = state
        for i in range(M):
            write = chunk.u[:, n, :, i] - torch.einsum("bhk,bhkv->bhv", chunk.y[:, n, :, i], start)
            t = n * M + i
            if t == LENGTH:
                assert (write == 0).all()
                continue
            one_token = {name: state if name == "state" else x[:, t : t + 1] for name, x in values.items()}
            _, after = call(recurrent_gated_delta_rule, one_token)
            added = after - state * values["decay"][:, t].exp()[..., None, None]
            assert_close(torch.einsum("bhk,bhv->bhkv", chunk.k[:, n, :, i], write), added, EXACT)
            state = after


def test_steps_7_and_8_output_and_state_from_the_writes():
    """Direct sums over the chunk's tokens, and the recurrence's outputs and states at the end of each chunk."""
    values, all_chunks = chunks()
    truth, _ = call(recurrent_gated_delta_rule, values)
    state = values["state"]
    for n in range(3):
        chunk = Chunk(*(x[:, n] for x in all_chunks))
        w = chunk.u - chunk.y @ state
        output, after = across_chunk(chunk, state)
        total = chunk.decay_since_start[..., -1, None, None] * state
        for i in range(M):
            o = chunk.decay_since_start[..., i, None] * (chunk.q[..., i, None, :] @ state)[..., 0, :]
            o = o + sum(chunk.scores[..., i, j, None] * w[..., j, :] for j in range(i + 1))
            assert_close(output[..., i, :], o, EXACT)
            if n * M + i < LENGTH:
                assert_close(output[..., i, :], truth[:, n * M + i], EXACT)
            outer = chunk.k[..., i, :, None] * w[..., i, None, :]
            total = total + chunk.decay_between[..., -1, i, None, None] * outer
        assert_close(after, total, EXACT)
        end = min(LENGTH, n * M + M)
        _, final = call(recurrent_gated_delta_rule, {name: x if name == "state" else x[:, :end] for name, x in values.items()})
        assert_close(after, final, EXACT)
        state = after


# ---------------------------------------------------------------------------------------------------------------------- laws


def test_one_token_per_chunk_and_one_chunk_per_row():
    values = inputs(37, dtype=torch.float64)
    truth = call(recurrent_gated_delta_rule, values)
    for chunk_size in (1, 5, 37, 40):
        for result, true in zip(call(chunked_gated_delta_rule, values, chunk_size=chunk_size), truth, strict=True):
            assert_close(result, true, EXACT, f"chunks of {chunk_size}")


def test_one_chunk_is_the_attention_map():
    """p x of the whole row is the map that `ops.attention_map` computes."""
    values = inputs(37, dtype=torch.float64)
    chunk = within_chunks(*(values[name] for name in ("query", "key", "value", "decay", "beta")), 37)
    expected = attention_map(values["query"], values["key"], decay=values["decay"], beta=values["beta"])
    assert_close((chunk.scores @ chunk.transform)[:, 0], expected, EXACT)


@pytest.mark.parametrize("cut", CUTS)
def test_a_prefix_and_the_rest_equal_the_whole(cut):
    values = inputs(cut + 5, seed=cut, dtype=torch.float64)
    whole, final = call(chunked_gated_delta_rule, values, chunk_size=32)
    head, carried = call(
        chunked_gated_delta_rule, {n: t if n == "state" else t[:, :cut] for n, t in values.items()}, chunk_size=32
    )
    rest, end = call(
        chunked_gated_delta_rule, {n: carried if n == "state" else t[:, cut:] for n, t in values.items()}, chunk_size=32
    )
    assert_close(torch.cat([head, rest], dim=1), whole, EXACT)
    assert_close(end, final, EXACT)


def test_dtypes_and_inputs_are_not_modified():
    """The output has the dtype of the value; the state is float32 at least; float64 is float64 throughout."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        values = inputs(66, dtype=dtype)
        values["decay"], values["state"] = values["decay"].to(wide), values["state"].to(wide)
        copies = {name: tensor.clone() for name, tensor in values.items()}
        out, state = call(chunked_gated_delta_rule, values)
        assert (out.dtype, state.dtype) == (dtype, wide)
        truth, end = call(recurrent_gated_delta_rule, doubles(values))
        assert relative_error(out, truth) < {torch.bfloat16: 5e-3, torch.float32: FP32, torch.float64: EXACT}[dtype]
        assert relative_error(state, end) < {torch.float64: EXACT}.get(dtype, FP32)
        for name, tensor in values.items():
            assert torch.equal(tensor, copies[name]), f"{name} was modified"


def test_a_chunk_of_no_token_is_an_error():
    with pytest.raises(ValueError, match="chunk_size is 0; it must be at least 1"):
        call(chunked_gated_delta_rule, inputs(3), chunk_size=0)
