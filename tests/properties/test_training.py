"""Compositions of training arguments against the formulas written out, in float64.

    loss = sum over labels of -log softmax(logits)[label] / n  +  coefficient * aux     n: num_items_in_batch, or their number
    aux  = E * sum_e f_e p_e      f_e: share of (token, layer, choice) that took expert e, p_e: mean probability, pads left out

Each document is run alone, one at a time, without padding, cache or packing; the gradients are autograd's of that formula.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tests.properties.tried import tried
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape, relative_error

BOUND = 1e-10
CASE = odd_shape(
    23, layer_types=[LINEAR, FULL], num_hidden_layers=2, num_experts=5, num_experts_per_tok=2, router_aux_loss_coef=0.3,
    linear_num_key_heads=2, linear_num_value_heads=4, num_attention_heads=4, num_key_value_heads=2, linear_conv_kernel_dim=3,
    attention_bias=False, tie_word_embeddings=True,
)
VOCABULARY = CASE.text["vocab_size"]
COMPARED = [
    "model.embed_tokens.weight", "model.layers.0.linear_attn.A_log", "model.layers.0.linear_attn.conv1d.weight",
    "model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.gate.weight",
]  # fmt: skip


@functools.lru_cache
def model() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 4)
    return model.double()


@dataclass
class Document:
    """Token ids, and the label of each (-100: nothing to learn)."""

    ids: list[int]
    labels: list[int]


@st.composite
def document(draw: st.DrawFn) -> Document:
    length = draw(st.integers(1, 12))
    ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=length, max_size=length))
    kept = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    return Document(ids, [token if keep else -100 for token, keep in zip(ids, kept, strict=True)])


def written_out(documents: list[Document], items: int | None, coefficient: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, aux) by the formulas at the top, and the size of the terms whose differences the loss is."""
    total, terms, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    probabilities, chosen = [], []
    for one in documents:
        out = model()(torch.tensor([one.ids]), output_router_logits=True)
        for label, logits in zip(one.labels[1:], out.logits[0, :-1], strict=True):
            if label != -100:
                total = total + torch.logsumexp(logits, 0) - logits[label]
                terms = terms + logits.detach().abs().max()
                count += 1
        for logits in out.router_logits:
            p = torch.softmax(logits, -1)
            probabilities.append(p)
            chosen.append(torch.nn.functional.one_hot(p.topk(2).indices, 5).double())
    f, p = torch.cat(chosen).mean(0), torch.cat(probabilities).mean(0)
    aux = 5 * (f * p).sum()
    divisor = count if items is None else items
    return total / divisor + coefficient * aux, aux, terms / divisor + aux.detach()


def padded(rows: list[list[int]], value: int, left: bool) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[value] * (longest - len(r)) + r if left else r + [value] * (longest - len(r)) for r in rows])


def arranged(documents: list[Document], how: str) -> Iterator[dict[str, Tensor]]:
    """The same documents as arguments of forward: padded rows, or packed into one."""
    ids, labels = [d.ids for d in documents], [d.labels for d in documents]
    if how in ("left", "right"):
        left = how == "left"
        yield {"input_ids": padded(ids, 3, left), "labels": padded(labels, -100, left),
               "attention_mask": padded([[1] * len(row) for row in ids], 0, left)}  # fmt: skip
        return
    row = {"input_ids": torch.tensor([sum(ids, [])]), "labels": torch.tensor([sum(labels, [])])}
    positions = torch.tensor([sum((list(range(len(d))) for d in ids), [])])
    if how == "cu_seqlens":
        lengths = torch.tensor([0] + [len(d) for d in ids])
        yield row | {"cu_seqlens": lengths.cumsum(0).to(torch.int32)}
    elif how == "positions":
        yield row | {"position_ids": positions}
    elif how == "three axes":
        yield row | {"position_ids": positions.expand(3, 1, -1)}
    else:
        yield row | {"position_ids": torch.cat([positions[None], positions.expand(3, 1, -1)])}


@example(documents=[Document([14, 14], [-100, 14])], how="left", router=False, logits=False, items=None, checkpointing=False)
@given(
    documents=st.lists(document(), min_size=1, max_size=4),
    how=st.sampled_from(["left", "right", "cu_seqlens", "positions", "three axes", "four axes"]),
    router=st.booleans(), logits=st.booleans(), items=st.sampled_from([None, 3, 17]), checkpointing=st.booleans(),
)
def test_losses_and_gradients_are_those_of_the_formulas(
    documents: list[Document], how: str, router: bool, logits: bool, items: int | None, checkpointing: bool
) -> None:
    ours = model()
    if not any(label != -100 for one in documents for label in one.labels[1:]):
        items = 3  # the mean of no label is 0/0
    loss, aux, terms = written_out(documents, items, 0.3 if router else 0.0)
    parameters = [ours.get_parameter(name) for name in COMPARED]
    expected = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    options: dict[str, Any] = {"output_router_logits": router, "output_logits": logits}
    if items is not None:
        options["num_items_in_batch"] = torch.tensor(items) if items == 17 else items
    if checkpointing:
        ours.train()
        ours.gradient_checkpointing_enable()
    try:
        for arguments in arranged(documents, how):
            out = ours(**arguments, **options)
            gradients = torch.autograd.grad(out.loss, parameters, allow_unused=True, materialize_grads=True)
    finally:
        ours.gradient_checkpointing_disable()
        ours.eval()
    assert relative_error(out.loss, loss, scale=terms) <= BOUND, "loss"
    if router:
        assert_close(out.aux_loss, aux, BOUND, "aux_loss")
    # Where the model is certain, gradients are differences such as 1 - p.
    scale = max(*(gradient.abs().max() for gradient in expected), torch.tensor(1e-4))
    for name, actual, gradient in zip(COMPARED, gradients, expected, strict=True):
        error = (actual - gradient).abs().max() / scale
        assert error <= BOUND, f"{name}: {error:.1e}"
    tried("training steps compared")
    tried("documents trained", len(documents))


@given(
    documents=st.lists(document(), min_size=2, max_size=5), cut=st.integers(1, 4), how=st.sampled_from(["left", "cu_seqlens"])
)
def test_accumulated_steps_are_one_step(documents: list[Document], cut: int, how: str) -> None:
    """The gradients of parts of a batch add up to those of the whole where the number of items is that of the whole."""
    ours = model()
    items = max(1, sum(label != -100 for one in documents for label in one.labels[1:]))
    parameters = [ours.get_parameter(name) for name in COMPARED]
    loss, _, _ = written_out(documents, items, 0.0)
    expected = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for part in (documents[:cut], documents[cut:]):
        for arguments in arranged(part, how) if part else ():
            out = ours(**arguments, num_items_in_batch=items)
            gradients = torch.autograd.grad(out.loss, parameters, allow_unused=True, materialize_grads=True)
            sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
    scale = max(*(gradient.abs().max() for gradient in expected), torch.tensor(1e-4))
    for name, actual, gradient in zip(COMPARED, sums, expected, strict=True):
        assert (actual - gradient).abs().max() / scale <= BOUND, name
    tried("accumulated steps compared")
