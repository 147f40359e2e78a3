"""Writers against their readers: whatever is edited in memory either comes back equal or is refused before a byte is written;
whatever is edited in a file is read to the same value or refused with a ValueError, in memory and time bounded by the file."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qwen35moe.cache import Cache
from qwen35moe.routing import Routing
from qwen35moe.routing.statistics import expert_load
from tests.properties.tried import tried
from tests.support import peer
from tests.support.peer import FULL, LINEAR, odd_shape, relative_error

CASE = odd_shape(
    31, layer_types=[LINEAR, FULL, LINEAR], num_hidden_layers=3, num_experts=4, num_experts_per_tok=2,
    linear_num_key_heads=2, linear_num_value_heads=2, num_attention_heads=4, num_key_value_heads=2, linear_conv_kernel_dim=3,
    attention_bias=False, tie_word_embeddings=False,
)
IDS = CASE.ids(2, 7)


def model() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 5)
    return model


@functools.lru_cache
def shared() -> Any:
    return model()


# ------------------------------------------------------------------------------------------------------- edited models


def fewer_layers(model: Any) -> None:
    del model.model.layers[-1]


def layer_used_twice(model: Any) -> None:
    model.model.layers[-1] = model.model.layers[0]


def shared_weight(model: Any) -> None:
    model.model.layers[-1].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj


def tied_by_hand(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def other_vocabulary(model: Any) -> None:
    model.model.embed_tokens = nn.Embedding(CASE.text["vocab_size"] + 3, CASE.text["hidden_size"])


def added_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.zeros(CASE.text["vocab_size"]))


def added_parameter(model: Any) -> None:
    model.model.layers[1].mlp.extra = nn.Parameter(torch.ones(3))


def added_buffer(model: Any) -> None:
    model.model.register_buffer("steps", torch.zeros(5))


def wrapped_module(model: Any) -> None:
    model.lm_head = nn.Sequential(model.lm_head)


def parametrized(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].linear_attn.out_proj)


def meta_weight(model: Any) -> None:
    model.model.norm.to("meta")


def other_dtype(model: Any) -> None:
    model.lm_head.to(torch.float64)


def transposed(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.transpose(1, 2).contiguous())


def not_contiguous(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().transpose(1, 2).contiguous().transpose(1, 2))


def missing_module(model: Any) -> None:
    model.model.layers[1].mlp.shared_expert_gate = nn.Identity()


def changed_weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.5)


def unfused(model: Any) -> None:
    model.unfuse_experts()


EDITS: list[Callable[[Any], None]] = [
    fewer_layers, layer_used_twice, shared_weight, tied_by_hand, other_vocabulary, added_bias, added_parameter, added_buffer,
    wrapped_module, parametrized, meta_weight, other_dtype, transposed, not_contiguous, missing_module, changed_weight, unfused,
]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(
    edits=st.lists(st.sampled_from(EDITS), max_size=2, unique=True), layout=st.sampled_from(["grouped", "per_expert"]),
    shard=st.sampled_from(["5GB", "20KB"]),
)
def test_an_edited_model_comes_back_equal_or_is_refused_before_anything_is_written(
    edits: list[Callable[[Any], None]], layout: str, shard: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared().save_pretrained(folder)
        before, edited = contents(folder), model()
        for edit in sorted(edits, key=EDITS.index):  # `unfused` last: it takes away what others edit
            edit(edited)
        try:
            edited.save_pretrained(folder, layout=layout, max_shard_size=shard)
        except ValueError as error:
            assert edits and len(str(error)) < 2_000
            assert contents(folder) == before, "something was written"
            tried("edited models refused")
            return
        loaded = type(edited).from_pretrained(folder)
        with torch.no_grad():
            # Weights in a file have other alignments than in memory: a BLAS may round differently.
            assert relative_error(loaded(IDS).logits, edited.eval()(IDS).logits) <= 1e-5, edits
        tried("edited models saved and loaded")


# ------------------------------------------------------------------------------------------------------ damaged files


@functools.lru_cache
@torch.no_grad()
def saved_cache(record: int, static: bool) -> bytes:
    cache = shared()(IDS, cache=shared().new_cache(2, 9 if static else None, record=record)).cache
    return written(cache.save)


@functools.lru_cache
@torch.no_grad()
def saved_routing() -> bytes:
    return written(shared()(IDS, output_routing=True).routing.save)


def written(save: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


@st.composite
def damage(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes of a file after one to three edits, in the header more often than in the data."""
    data = bytearray(whole)
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["flip", "digit", "cut", "repeat", "length", "insert"]))
        at = draw(st.integers(0, max(0, (header if draw(st.booleans()) else len(data)) - 1)))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "digit":
            digits = [i for i in range(8, min(header, len(data))) if chr(data[i]).isdigit()]
            if digits:
                data[draw(st.sampled_from(digits))] = ord(draw(st.sampled_from("0123456789")))
        elif kind == "cut":
            del data[at:]
        elif kind == "repeat":
            data += data[at : at + 40]
        elif kind == "length" and len(data) >= 8:
            data[:8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
    return bytes(data)


def read_damaged(data: bytes, whole: bytes, read: Callable[[Path], Any]) -> Any:
    """The value, or None where the file is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        try:
            value = read(path)
        except ValueError as error:
            assert len(str(error)) < 2_000
            tried("damaged files refused")
            return None
    tried("damaged files read")
    return value


@given(data=st.data(), record=st.sampled_from([0, 3]), static=st.booleans())
def test_a_damaged_cache_file_is_refused_or_gives_a_cache_that_works(data: st.DataObject, record: int, static: bool) -> None:
    whole = saved_cache(record, static)
    config = shared().config.text_config
    cache = read_damaged(data.draw(damage(whole)), whole, lambda path: Cache.load(path, config))
    if cache is None:
        return
    assert cache.nbytes <= 64 * len(whole), "more memory than the file can account for"
    assert all(0 <= length <= 2**31 for length in cache.lengths.tolist())
    written(cache.clone().save)  # what was read can be written


@given(data=st.data())
def test_a_damaged_routing_file_is_refused_or_gives_a_routing_that_works(data: st.DataObject) -> None:
    whole = saved_routing()
    routing = read_damaged(data.draw(damage(whole)), whole, Routing.load)
    if routing is None:
        return
    again = written(routing.save)
    assert isinstance(read_damaged(again, again, Routing.load), Routing)
    if not routing.num_experts:  # a routing may be saved without their number
        with pytest.raises(ValueError, match="no number of experts"):
            expert_load(routing)
        return
    assert int(routing.indices.max()) < routing.num_experts
    assert bool(torch.isfinite(expert_load(routing)).all())
