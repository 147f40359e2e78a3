"""The router losses: load balancing over a whole batch and in parts, and the z-loss."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe.ops import balancing
from qwen35moe.ops.balancing import LoadBalance, load_balancing_loss, router_z_loss, sequence_numbers
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_all_close, assert_close, generator, odd_shape

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 7, 2, 20


def routed(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], Tensor]:
    rng = generator(0)
    logits = [torch.randn((TOKENS, EXPERTS), generator=rng, dtype=torch.float64).to(dtype) for _ in range(LAYERS)]
    indices = [layer.topk(TOP_K, dim=-1).indices for layer in logits]
    return logits, indices, (torch.rand(TOKENS, generator=rng) < 0.7).long()


def by_hand(logits: list[Tensor], indices: list[Tensor], mask: Tensor) -> Tensor:
    """E sum_e f_e p_e with f_e the assignments to expert e per token and layer, and p_e its mean probability."""
    assigned, probability, rows = torch.zeros(EXPERTS).double(), torch.zeros(EXPERTS), 0
    for layer, experts in zip(logits, indices, strict=True):
        for n in range(TOKENS):
            if mask[n]:
                rows += 1
                probability = probability + layer[n].softmax(-1)
                for expert in experts[n].tolist():
                    assigned[expert] += 1
    return EXPERTS * (assigned / rows * probability / rows).sum()


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_by_hand_whole_and_per_layer(masked):
    logits, indices, mask = routed()
    mask_argument = mask if masked else None
    mask = mask if masked else torch.ones(TOKENS)
    assert_close(load_balancing_loss(logits, indices, mask=mask_argument), by_hand(logits, indices, mask), 1e-12)
    layers = load_balancing_loss(logits, indices, mask=mask_argument, per_layer=True)
    assert layers.shape == (LAYERS,)
    for layer in range(LAYERS):
        assert_close(layers[layer], by_hand(logits[layer : layer + 1], indices[layer : layer + 1], mask), 1e-12)


def test_the_loss_of_an_even_load_is_top_k_or_one():
    logits = [torch.zeros(EXPERTS, EXPERTS)]
    indices = [torch.stack([torch.arange(EXPERTS), (torch.arange(EXPERTS) + 1) % EXPERTS], dim=1)]
    assert load_balancing_loss(logits, indices).item() == pytest.approx(TOP_K)
    assert load_balancing_loss(logits, indices, normalize="top_k").item() == pytest.approx(1)
    with pytest.raises(ValueError, match="mean.*transformers.*top_k"):
        load_balancing_loss(logits, indices, normalize="mean")


def test_the_given_indices_are_counted():
    logits, indices, _ = routed()
    forced = [torch.zeros_like(layer) + torch.arange(TOP_K) for layer in indices]
    used, recounted = load_balancing_loss(logits, forced), load_balancing_loss(logits, indices)
    assert_close(used, by_hand(logits, forced, torch.ones(TOKENS)), 1e-12)
    assert abs(used - recounted) > 0.05


def test_load_balancing_gradcheck_and_dtypes():
    logits, indices, mask = routed()
    leaves = [layer.requires_grad_() for layer in logits]
    assert torch.autograd.gradcheck(lambda *layers: load_balancing_loss(layers, indices, mask=mask), leaves)
    wide_dtypes = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    for dtype, wide in wide_dtypes.items():
        logits, indices, _ = routed(dtype)
        assert load_balancing_loss(logits, indices).dtype == wide


@pytest.mark.parametrize("masked", [False, True])
def test_equal_to_transformers_in_float32(masked):
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func

    logits, indices, mask = routed(torch.float32)
    mask_argument = mask if masked else None
    theirs = load_balancing_loss_func(tuple(logits), EXPERTS, TOP_K, mask_argument)
    assert isinstance(theirs, Tensor)
    assert_close(load_balancing_loss(logits, indices, mask=mask_argument), theirs, 1e-6)


def test_different_numbers_of_layers_are_an_error():
    logits, indices, _ = routed()
    for few, many in itertools.permutations([2, 3], 2):
        with pytest.raises(ValueError, match=f"{few} and {many}"):
            load_balancing_loss(logits[:few], indices[:many])
    with pytest.raises(ValueError, match="0 and 0"):
        load_balancing_loss([], [])


# ---------------------------------------------------------------------------------------------------- by sequence


def test_the_loss_by_sequence_is_the_mean_over_sequences():
    """The mean of the losses of the sequences; the shares of micro-batches add up to it, values and gradients."""
    logits, indices, mask = routed()
    sequences = torch.tensor([0] * 6 + [1] * 3 + [2] * 11)
    mask[6:9] = 0  # a sequence whose tokens are all masked
    leaves = [layer.requires_grad_() for layer in logits]
    for options in ({}, {"per_layer": True}, {"normalize": "top_k"}):
        whole = load_balancing_loss(leaves, indices, mask=mask, scope="sequence", sequences=sequences, **options)
        separate = []
        for number in (0, 2):
            rows = sequences == number
            part = [layer[rows] for layer in leaves], [layer[rows] for layer in indices]
            separate.append(load_balancing_loss(*part, mask=mask[rows], **options))
        assert_close(whole, torch.stack(separate).mean(0), 1e-12)
        total = torch.zeros_like(whole)
        for rows in (slice(0, 9), slice(9, 20)):
            part = [layer[rows] for layer in leaves], [layer[rows] for layer in indices]
            numbers = sequences[rows] - sequences[rows][0]
            total = total + load_balancing_loss(
                *part, mask=mask[rows], scope="sequence", sequences=numbers, num_sequences=2, **options
            )
        assert_close(total, whole, 1e-12)
        gradients = (torch.autograd.grad(loss.sum(), leaves, retain_graph=True) for loss in (total, whole))
        for a, b in zip(*gradients, strict=True):
            assert_close(a, b, 1e-12)
    batch = load_balancing_loss(leaves, indices, mask=mask)
    assert abs(batch - load_balancing_loss(leaves, indices, mask=mask, scope="sequence", sequences=sequences)) > 1e-3


def test_sequence_numbers_and_scopes():
    assert sequence_numbers((2, 3)).tolist() == [0, 0, 0, 1, 1, 1]
    assert sequence_numbers((1, 6), torch.tensor([0, 1, 4, 6])).tolist() == [0, 1, 1, 1, 2, 2]
    logits, indices, _ = routed()
    with pytest.raises(ValueError, match="'global' is neither 'batch' nor 'sequence'"):
        load_balancing_loss(logits, indices, scope="global")
    for options in ({"scope": "sequence"}, {"sequences": torch.zeros(TOKENS)}):
        with pytest.raises(ValueError, match="needs sequences="):
            load_balancing_loss(logits, indices, **options)


# ---------------------------------------------------------------------------------------------------- in parts

SPLITS = {"two": [13, 7], "uneven, one empty": [1, 12, 0, 7], "one": [20]}
OPTIONS = [{}, {"per_layer": True}, {"normalize": "top_k"}, {"per_layer": True, "normalize": "top_k"}]


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
def test_shares_of_parts_add_up_to_the_whole_batch(splits, masked, dtype, bound):
    """Values and gradients, and the value for logging. The mean of the losses of the parts differs."""
    logits, indices, mask = routed(dtype)
    mask_argument = mask if masked else None
    leaves = [layer.requires_grad_() for layer in logits]
    stacked = torch.stack(leaves), torch.stack(indices)
    parts = list(zip(*(x.split(splits, 1) for x in stacked), mask.split(splits), strict=True))
    for options in OPTIONS:
        balance = LoadBalance(EXPERTS, **options)
        for _, chosen, part_mask in parts:
            balance.count(chosen, part_mask if masked else None)
        shares = [balance.share(part, part_mask if masked else None) for part, _, part_mask in parts]
        whole = load_balancing_loss(leaves, indices, mask=mask_argument, **options)
        total = torch.stack(shares).sum(0)
        assert total.dtype == whole.dtype
        assert_close(total, whole, bound)
        assert_close(balance.value(), whole, bound)
        gradients = [torch.autograd.grad(loss.sum(), leaves, retain_graph=True) for loss in (total, whole)]
        for a, b in zip(*gradients, strict=True):
            assert_close(a, b, bound)
    if splits == SPLITS["two"]:
        losses = [load_balancing_loss(list(p), list(c), mask=m if masked else None) for p, c, m in parts]
        assert abs(torch.stack(losses).mean() - load_balancing_loss(leaves, indices, mask=mask_argument)) > 1e-3


def test_merged_accumulators():
    """Ranks by hand: every rank counts its part, all counts are merged, and every rank computes its share with them."""
    logits, indices, mask = routed()
    whole = torch.stack(logits), torch.stack(indices)
    parts = [(whole[0][:, rows], whole[1][:, rows], mask[rows]) for rows in (slice(0, 13), slice(13, 20))]
    total = LoadBalance(EXPERTS)
    total.count(parts[0][1], parts[0][2])
    other = LoadBalance(EXPERTS)
    other.count(parts[1][1], parts[1][2])
    total.merge(other)
    shares = [total.share(part, part_mask) for part, _, part_mask in parts]
    assert_close(torch.stack(shares).sum(), load_balancing_loss(logits, indices, mask=mask), 1e-12)
    smaller = LoadBalance(EXPERTS)
    smaller.count(parts[0][1][:2])
    with pytest.raises(ValueError, match=r"\(3, 7, 2\) and \(2, 7, 2\)"):
        total.merge(smaller)


def test_steps_in_the_wrong_order_are_errors():
    logits, indices, _ = routed()
    balance = LoadBalance(EXPERTS)
    for step, message in ((lambda: balance.share(logits), "count"), (balance.value, "one share"), (balance.all_reduce, "count"),
                        (lambda: balance.merge(balance), "counts in both")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            step()
    balance.count(torch.stack(indices))
    with pytest.raises(ValueError, match="3 experts per token, the parts before it have 2"):
        balance.count(torch.zeros(LAYERS, 4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="logits have 2 layers, the counted parts have 3"):
        balance.share(logits[:2])
    balance.share(logits)
    with pytest.raises(ValueError, match="between"):
        balance.all_reduce()
    with pytest.raises(ValueError, match="neither 'transformers' nor 'top_k'"):
        LoadBalance(EXPERTS, normalize="mean")


def _rank(rank: int, ranks: int, folder: str) -> None:
    """One process of a data-parallel run: its part of the batch, with the counts of all processes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    logits, indices, mask = routed()
    rows = slice(0, 13) if rank == 0 else slice(13, 20)
    leaves = torch.stack(logits)[:, rows].clone().requires_grad_()
    balance = LoadBalance(EXPERTS)
    balance.count(torch.stack(indices)[:, rows], mask[rows])
    balance.all_reduce()
    share = balance.share(leaves, mask[rows])
    share.backward()
    assert leaves.grad is not None
    total = share.detach().clone()
    dist.all_reduce(total)
    torch.save((total, leaves.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked, so that they need not import torch again")
def test_data_parallel_ranks_on_gloo(tmp_path: Path):
    from torch.multiprocessing.spawn import start_processes

    start_processes(_rank, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    logits, indices, mask = routed()
    leaves = torch.stack(logits).requires_grad_()
    whole = load_balancing_loss(leaves, indices, mask=mask)
    whole.backward()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for total, _ in results:
        assert_close(total, whole, 1e-12)
    assert_close(torch.cat([gradient for _, gradient in results], 1), leaves.grad, 1e-12)


# ---------------------------------------------------------------------------------------------------- z-loss


@pytest.mark.parametrize("masked", [False, True])
def test_the_z_loss_by_hand(masked):
    logits, _, mask = routed()
    mask = mask if masked else torch.ones(TOKENS, dtype=torch.long)
    squares = [[float(row.exp().sum().log()) ** 2 for row, m in zip(layer, mask, strict=True) if m] for layer in logits]
    layers = torch.tensor([sum(layer) / len(layer) for layer in squares], dtype=torch.float64)
    mask_argument = mask if masked else None
    assert_close(router_z_loss(logits, mask=mask_argument), layers.mean(), 1e-12)
    assert_close(router_z_loss(logits, mask=mask_argument, per_layer=True), layers, 1e-12)
    parts = [router_z_loss([layer[rows] for layer in logits], mask=mask[rows], num_tokens=mask.sum())
             for rows in (slice(0, 13), slice(13, 20))]
    assert_close(parts[0] + parts[1], layers.mean(), 1e-12)
    leaves = [layer.requires_grad_() for layer in logits]
    assert torch.autograd.gradcheck(lambda *ls: router_z_loss(ls, mask=mask_argument), leaves)
    assert router_z_loss(routed(torch.bfloat16)[0]).dtype == torch.float32
    assert router_z_loss([torch.full((2, 3), -50.0)]).item() == pytest.approx((-50 + torch.tensor(3.0).log().item()) ** 2)
    with pytest.raises(ValueError, match="at least one layer"):
        router_z_loss([])


# ---------------------------------------------------------------------------------------------------- through a model

CASE = odd_shape(
    41, layer_types=[LINEAR, FULL, LINEAR], num_hidden_layers=3, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
    tie_word_embeddings=False,
)
ROWS = [CASE.ids(1, length, salt=length)[0] for length in (11, 4, 9, 6)]


@pytest.fixture(scope="module")
def model() -> Any:
    model = peer.ours(CASE, dtype=torch.float64)
    peer.draw(model, 1)
    return model


def batch(rows: list[Tensor]) -> dict[str, Tensor]:
    ids, mask = peer.padded(rows, "left")
    return {"input_ids": ids, "attention_mask": mask}


def packed(rows: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": torch.cat(rows)[None], "cu_seqlens": torch.tensor([0, *itertools.accumulate(map(len, rows))])}


BATCHES: dict[str, list[dict[str, Tensor]]] = {
    "micro-batches": [batch(ROWS[:1]), batch(ROWS[1:])],
    "packed rows": [packed(ROWS[:3]), packed(ROWS[3:])],
    "padded and packed": [batch(ROWS[:2]), packed(ROWS[2:])],
}


def losses_of(model: Any, inputs: dict[str, Tensor], balance: LoadBalance) -> Tensor:
    out = model(**inputs, output_routing=True, logits_to_keep=1)
    z = router_z_loss(list(out.routing.logits), mask=out.routing.mask, num_tokens=sum(map(len, ROWS)))
    return balance.share(out.routing.logits, out.routing.mask) + 0.1 * z


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("batches", BATCHES)
def test_the_losses_of_a_model_in_parts_equal_those_of_the_whole_batch(model, batches, recompute):
    """aux_loss, z-loss and all gradients against one padded batch. Gradient checkpointing does not count tokens twice."""
    model.zero_grad(set_to_none=True)
    out = model(**batch(ROWS), output_router_logits=True, output_routing=True)
    z = router_z_loss(out.router_logits, mask=out.routing.mask)
    (out.aux_loss + 0.1 * z).backward()
    expected = peer.gradients(model)
    balance = LoadBalance(EXPERTS)
    with torch.no_grad():
        for inputs in BATCHES[batches]:
            routing = model(**inputs, output_routing=True, logits_to_keep=1).routing
            balance.count(routing.indices, routing.mask)
    model.zero_grad(set_to_none=True)
    model.train()
    if recompute:
        model.gradient_checkpointing_enable()
    try:
        for inputs in BATCHES[batches]:
            losses_of(model, inputs, balance).backward()
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    assert balance.tokens == sum(map(len, ROWS))
    assert_close(balance.value(), out.aux_loss, 1e-10)
    assert_all_close(peer.gradients(model), expected, 1e-8)
    assert any(gradient.any() for gradient in expected.values())


@torch.no_grad()
def test_with_a_cache_and_its_full_mask(model):
    """Pieces of a padded batch: the mask covers all cached tokens, the loss the new ones; the shares add up to the whole."""
    inputs = batch(ROWS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(**inputs, output_router_logits=True).aux_loss
    cache, balance, parts, length = model.new_cache(len(ROWS)), LoadBalance(EXPERTS), [], 0
    for piece in ids.split([5, 1, 5], 1):
        length += piece.shape[1]
        out = model(piece, attention_mask=mask[:, :length], cache=cache, output_routing=True, output_router_logits=True)
        new_mask = mask[:, length - piece.shape[1] : length].flatten()
        routing_mask = new_mask if out.routing.mask is None else out.routing.mask
        assert torch.equal(routing_mask.long(), new_mask)
        assert_close(out.aux_loss, load_balancing_loss(out.router_logits, list(out.routing.indices), mask=new_mask), 1e-12)
        balance.count(out.routing.indices, out.routing.mask)
        parts.append(out.routing)
    for routing in parts:
        balance.share(routing.logits, routing.mask)
    assert_close(balance.value(), whole, 1e-10)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_of_masked_tokens_reach_neither_a_loss_nor_a_gradient(value):
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    indices, mask = logits.topk(2).indices, torch.tensor([1, 1, 0, 1, 0, 1])
    dirty = logits.clone()
    dirty[:, mask == 0] = value
    sequences = sequence_numbers((2, 3))

    def share(x):
        balance = LoadBalance(5)
        balance.count(indices, mask)
        return balance.share(x, mask)

    for loss in (
        lambda x: load_balancing_loss(x, indices, mask=mask),
        lambda x: load_balancing_loss(x, indices, mask=mask.bool(), per_layer=True).sum(),
        lambda x: load_balancing_loss(x, indices, mask=mask, scope="sequence", sequences=sequences),
        lambda x: router_z_loss(x, mask=mask),
        share,
    ):
        clean, soiled = logits.clone().requires_grad_(), dirty.clone().requires_grad_()
        expected, actual = loss(clean), loss(soiled)
        assert torch.equal(actual, expected)
        (wanted,), (gradient,) = torch.autograd.grad(expected, clean), torch.autograd.grad(actual, soiled)
        assert torch.equal(gradient, wanted) and not gradient[:, mask == 0].any() and gradient.any()


def test_all_tokens_masked():
    logits = torch.full((2, 6, 5), float("nan")).requires_grad_()
    indices, mask = torch.zeros(2, 6, 2, dtype=torch.long), torch.zeros(6)
    for loss in (load_balancing_loss(logits, indices, mask=mask), router_z_loss(logits, mask=mask)):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0 and not gradient.any()


def test_the_imbalance_of_a_layer_leaves_masked_tokens_out():
    indices = torch.tensor([[[0, 1], [0, 2], [0, 1], [3, 4]], [[0, 1], [2, 3], [4, 5], [-1, 7]]])
    mask = torch.tensor([1, 1, 1, 0])
    assert balancing.load_imbalance(indices, 6, mask=mask).tolist() == [6 * 3 / 6, 1]
    assert balancing.load_imbalance(indices[:1], 5).tolist() == [5 * 3 / 8]
    assert balancing.load_imbalance(indices, 6, mask=mask * 0).tolist() == [0, 0]
