"""The catalogue: names, shapes, aliases; and the model computes every value of it."""

from __future__ import annotations

import re

import pytest
import torch

from qwen35moe import Config, Qwen3_5MoeForCausalLM, taps
from tests.taps.toy import B, T

LINEAR_ATTN = "qkv conv query key value decay beta gate state core scores normed output"
SELF_ATTN = "query key value gate scores output"
MLP = "router_logits indices weights expert_in expert_act expert_out routed shared output"


class TestCatalogue:
    def test_has_every_public_name_once(self) -> None:
        names = [entry.name for entry in taps.catalogue()]
        expected = ["embed", "norm", "layers.N.input", "layers.N.output"]
        for part, leaves in (("linear_attn", LINEAR_ATTN), ("self_attn", SELF_ATTN), ("mlp", MLP)):
            expected += [f"layers.N.{part}.{leaf}" for leaf in leaves.split()]
        tower = "embed output blocks.N.output blocks.N.mlp.output " + " ".join(
            f"blocks.N.attn.{leaf}" for leaf in "query key value output".split())
        expected += [f"visual.{name}" for name in tower.split()]
        assert sorted(names) == sorted(expected)

    def test_inputs_are_in_the_catalogue(self) -> None:
        names = {entry.name for entry in taps.catalogue()}
        for entry in taps.catalogue():
            assert set(entry.inputs) <= names, entry.name
            assert entry.name in ("embed", "visual.embed") or entry.inputs, entry.name

    def test_shapes_use_the_letters_and_every_entry_has_an_equation(self) -> None:
        for entry in taps.catalogue():
            assert set(entry.shape) <= set("B T P D H G K V C E F N k N*k patches visual_tokens".split()), entry.name
            assert entry.equation and entry.parent == ".".join(entry.name.split(".")[:-1])
            assert set(entry.aliases) <= {"transformers", "llama.cpp", "vllm"}

    def test_aliases_in_transformers_are_names_of_its_source(self) -> None:
        modeling = pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")
        with open(modeling.__file__, encoding="utf-8") as file:
            words = set(re.findall(r"\w+", file.read()))
        for entry in taps.catalogue():
            if alias := entry.aliases.get("transformers"):
                names = set(re.findall(r"\w+", alias)) - {"after", "before", "input", "output", "N"}
                assert names <= words, (entry.name, alias)

    def test_a_few_aliases(self) -> None:
        aliases = {entry.name: entry.aliases for entry in taps.catalogue()}
        assert aliases["layers.N.linear_attn.qkv"]["llama.cpp"] == "linear_attn_qkv_mixed"
        assert aliases["layers.N.mlp.router_logits"]["llama.cpp"] == "ffn_moe_logits"
        assert aliases["layers.N.linear_attn.decay"]["transformers"] == "g"


def test_the_model_computes_every_value_of_the_catalogue_in_its_shape() -> None:
    """A letter is one size within a module, and the sizes are pairwise different."""
    config = Config.preset("35b-a3b").replace(
        **{"num_hidden_layers": 4, "num_experts": 9, "num_experts_per_tok": 3, "hidden_size": 40, "vocab_size": 50},
        **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 6},
        **{"linear_key_head_dim": 12, "linear_value_head_dim": 8},
    )
    model = Qwen3_5MoeForCausalLM(config.text_config)
    model.init_weights(seed=0)
    with taps.record(model, "*") as seen:
        model(torch.randint(50, (B, T)))

    recorded = {re.sub(r"\d+", "N", name) for name in seen}
    assert recorded == {entry.name for entry in taps.catalogue() if not entry.name.startswith("visual.")}
    for name, value in seen.items():
        entry = next(entry for entry in taps.catalogue() if entry.name == re.sub(r"\d+", "N", name))
        linear = ".linear_attn." in name
        sizes = {"B": B, "T": T, "P": T, "D": 40, "E": 9, "k": 3, "F": 24, "N": B * T, "N*k": 3 * B * T}
        sizes |= {"H": 6, "G": 2, "K": 12, "V": 8, "C": 96} if linear else {"H": 4, "G": 2, "K": 16, "V": 16}
        assert list(value.shape) == [sizes[letter] for letter in entry.shape], name
    decay, beta = seen["layers.0.linear_attn.decay"], seen["layers.0.linear_attn.beta"]
    assert (decay <= 0).all() and (0 < beta).all() and (beta < 1).all()
    scores = seen["layers.3.self_attn.scores"]
    torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]))
    weights = seen["layers.0.mlp.weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))
