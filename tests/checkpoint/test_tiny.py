"""`qwen35moe tiny`: published names and dtypes, the same logits in both libraries; dropping any text tensor changes the
output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qwen35moe.checkpoint import names, read_headers
from qwen35moe.checkpoint.block_fp8 import dequantise
from qwen35moe.checkpoint.published import QWEN35, QWEN36, TRANSFORMERS, Layout, tensors
from qwen35moe.checkpoint.tiny import tiny_config, write_tiny
from qwen35moe.cli import main
from qwen35moe.config import Config, ConfigError
from qwen35moe.models.text import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM
from qwen35moe.processing.text import Tokenizer
from tests.support.peer import assert_close, generator, relative_error

LAYOUTS = {"3.5": QWEN35, "3.6": QWEN36, "transformers": TRANSFORMERS, "3.5 FP8": QWEN35.quantised(),
           "3.6 FP8": QWEN36.quantised()}  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick_disk")


def stored(path: Path) -> dict[str, torch.Tensor]:
    """All tensors, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return tensors


def ids(config: Config, rows: int = 2, length: int = 70) -> torch.Tensor:
    return torch.randint(0, config.text_config.vocab_size, (rows, length), generator=generator(5))


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_names_shapes_and_dtypes_equal_the_published_ones(name: str, vision: bool, tmp_path: Path) -> None:
    config, layout = tiny_config(vision=vision, mtp=True, changes={"hidden_size": 144}), LAYOUTS[name]
    nbytes = write_tiny(tmp_path, config, layout, max_shard_size="300KB")
    codes = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
    actual = {name: (tuple(value.shape), codes[value.dtype]) for name, value in stored(tmp_path).items()}
    expected = {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors(config, layout)}
    assert actual == expected and nbytes == read_headers(tmp_path).nbytes and len(read_headers(tmp_path).files) > 2
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == ("qwen3_5_moe" if vision else "qwen3_5_moe_text")
    assert written["architectures"] == ["Qwen3_5MoeFor" + ("ConditionalGeneration" if vision else "CausalLM")]
    assert ("vision_config" in written) is ("text_config" in written) is vision
    assert ("quantization_config" in written) is layout.fp8
    if layout.fp8:
        scales = [t.shape for t in tensors(config, layout) if t.name.endswith("scale_inv")]
        assert (3, 2) in scales  # several blocks, some incomplete


def test_layouts_of_one_seed_have_the_same_numbers(tmp_path: Path) -> None:
    """Grouped and single experts have the same numbers; FP8 has them with four binary digits."""
    config = tiny_config(mtp=True, vision=True, changes={"hidden_size": 144})
    for name in ("3.5", "3.6", "3.5 FP8"):
        write_tiny(tmp_path / name, config, LAYOUTS[name], seed=3)
    write_tiny(tmp_path / "other", config, seed=4)
    write_tiny(tmp_path / "again", config, seed=3)
    grouped, later, fp8, other = (stored(tmp_path / name) for name in ("3.5", "3.6", "3.5 FP8", "other"))
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "3.5" / "model.safetensors").read_bytes()
    assert not any(torch.equal(value, other[name]) for name, value in grouped.items())
    for name, value in later.items():
        if not name.startswith("mtp.layers.0.mlp.experts."):
            assert torch.equal(grouped[name].bfloat16(), value)
    compared = 0
    for name, value in fp8.items():
        if name.endswith("_scale_inv"):
            continue
        single = names.expert_of(names.canonical(name) or "")
        expected = grouped.get(name)
        if expected is None and single is not None:
            module, expert, projection = single
            weight = "down_proj" if projection == "down_proj" else "gate_up_proj"
            whole = grouped[f"model.language_model.{module}.{weight}"][expert]
            expected = whole if weight == "down_proj" else whole.chunk(2)[projection == "up_proj"]
        assert expected is not None, name
        if value.dtype is torch.float8_e4m3fn:
            close = (dequantise(value, fp8[name + "_scale_inv"]) - expected.float()).abs()
            assert (close <= torch.maximum(expected.float().abs() / 16, expected.float().abs().max() / 448 / 512)).all()
            compared += 1
        else:
            assert torch.equal(value, expected)
    assert compared == sum(name.endswith("_scale_inv") for name in fp8) > 100


def test_no_tensor_has_its_identity_value(tmp_path: Path) -> None:
    write_tiny(tmp_path, tiny_config(mtp=True, vision=True, changes={"attention_bias": True}))
    for name, value in stored(tmp_path).items():
        value = value.double()
        if name.endswith("A_log"):
            assert value.min() > 0.2 and value.std() > 0.2
        elif name.endswith("dt_bias"):
            assert value.max() < -2 and value.std() > 0.3
        elif value.dim() == 1:
            plain = name.endswith("linear_attn.norm.weight") or (".visual." in name and name.endswith("weight"))
            away = (value - float(plain)).abs()  # from 1 for norms that multiply by w; from 0 for 1 + w and for biases
            assert away.min() > 0.09 and away.std() > 0.05 and value.std() > 0.1, name
        else:
            assert value.flatten(1).std(dim=1).min() > 1e-3 and value.mean().abs() < value.std() * 2, name


@pytest.mark.parametrize(
    ("layers", "changes"), [(4, {}), (3, {"tie_word_embeddings": True}), (12, {"hidden_size": 18}), (40, {"head_dim": 16})]
)
def test_all_router_logits_are_negative(layers: int, changes: dict[str, Any], tmp_path: Path) -> None:
    if "head_dim" in changes:
        changes = changes | {"rope_parameters": {"mrope_section": [1, 1, 0]}}
    config = tiny_config(layers=layers, changes=changes)
    write_tiny(tmp_path, config)
    model = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(ids(config), output_router_logits=True).router_logits
    assert len(logits) == layers
    assert max(layer.max().item() for layer in logits) < 0
    assert min(layer.std(dim=-1).mean().item() for layer in logits) > 0.5  # and differ between experts


def test_dropping_any_text_tensor_changes_the_output(tmp_path: Path) -> None:
    """Set each parameter to its identity or zero in turn: the logits change by far more than rounding errors."""
    config = tiny_config(changes={"attention_bias": True})
    write_tiny(tmp_path, config)
    model = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, weights="copy")
    inputs = ids(config, 1, 40)
    with torch.no_grad():
        expected = model(inputs).logits
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.fill_(float(name.endswith("linear_attn.norm.weight")))
            error = relative_error(model(inputs).logits, expected)
            if name.endswith("mlp.gate.weight"):
                assert error > 1e-3, name
            elif name.endswith("k_proj.bias"):
                assert error > 1e-5, name  # softmax is shift-invariant: only the rotation makes a bias of all keys count
            else:
                assert error > 3e-3, f"{name}: {error:.1e}"
            parameter.copy_(kept)
        assert torch.equal(model(inputs).logits, expected)


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("name", ["3.5", "3.6", "transformers"])
def test_transformers_reads_it_and_gives_the_same_logits(name: str, vision: bool, tmp_path: Path) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    config = tiny_config(vision=vision, mtp=True)
    write_tiny(tmp_path, config, LAYOUTS[name])
    cls = getattr(transformers, config.architectures[0])
    theirs, info = cls.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager",
                                       experts_implementation="eager", output_loading_info=True)  # fmt: skip
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ours = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert_close(ours(ids(config)).logits, theirs(ids(config)).logits, 1e-5)


def test_transformers_reads_a_dense_checkpoint(tmp_path: Path) -> None:
    import transformers

    config = tiny_config(dense=True, vision=True)
    write_tiny(tmp_path, config)
    theirs = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    ours = Qwen3_5ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert_close(ours(ids(config)).logits, theirs(ids(config)).logits, 1e-5)


def test_the_tokenizer_and_its_control_tokens(tmp_path: Path) -> None:
    config = tiny_config(vision=True)
    write_tiny(tmp_path, config)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.token_to_id("<|image_pad|>") == Config.from_pretrained(tmp_path).image_token_id
    assert tokenizer.token_to_id("<|video_pad|>") == config.video_token_id
    assert tokenizer.token_to_id("<|vision_start|>") == config.vision_start_token_id
    assert tokenizer.eos_token_ids == (tokenizer.token_to_id("<|im_end|>"), 0) and tokenizer.pad_token_id == 0
    assert tokenizer.vocab_size <= config.text_config.vocab_size
    text = "In the beginning<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode("<|im_end|>", special=True)) == 1
    with pytest.raises(ConfigError, match="vocab_size = 300 is less than the 2055 tokens"):
        write_tiny(tmp_path / "small", tiny_config(changes={"vocab_size": 300}))
    assert not (tmp_path / "small").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--layers", "5", "--experts", "6", "--top-k", "3", "--vision", "--mtp", "--fp8", "--tied"]
    more += ["--fp32-stored-as", "BF16"]
    assert main(["tiny", str(tmp_path / "a"), *more, "--set", "hidden_size=80", "--seed", "7"]) == 0
    assert "Qwen3_5MoeForConditionalGeneration" in capsys.readouterr().out
    config = Config.from_pretrained(tmp_path / "a")
    text = config.text_config
    assert (text.num_hidden_layers, text.num_experts, text.num_experts_per_tok, text.hidden_size) == (5, 6, 3, 80)
    assert config.tie_word_embeddings and text.tie_word_embeddings and config.quantization_config["quant_method"] == "fp8"
    expected = {(t.name, t.dtype) for t in tensors(config, QWEN36.quantised())}
    assert {(t.name, t.dtype) for t in read_headers(tmp_path / "a").tensors.values()} == expected
    assert main(["tiny", str(tmp_path / "b"), "--dense"]) == 0
    assert Config.from_pretrained(tmp_path / "b").model_type == "qwen3_5_text"
    assert main(["tiny", str(tmp_path / "c"), "--mtp", "--layout", "per_expert", "--mtp-layout", "grouped"]) == 0
    actual = {t.name for t in read_headers(tmp_path / "c").tensors.values()}
    layout = Layout(experts="per_expert", mtp_experts="grouped")
    assert actual == {t.name for t in tensors(Config.from_pretrained(tmp_path / "c"), layout)}
    capsys.readouterr()
    for wrong, message in (
        (["--fp8", "--layout", "grouped"], "per_expert, not grouped"),
        (["--top-k", "9"], "num_experts_per_tok = 9 is more than num_experts = 8"),
        (["--set", "hiden_size=3"], "hiden_size"),
        (["--layers", "0"], "num_hidden_layers = 0"),
        (["--dense", "--layout", "per_expert"], "--layout: no effect, because a dense model (--dense) has no experts: omit it"),
        (["--dense", "--experts", "4", "--top-k", "3"], "--experts, --top-k: no effect"),
        (["--dense", "--mtp", "--mtp-layout", "grouped"], "--mtp-layout: no effect"),
        (["--mtp-layout", "grouped"], "there is no MTP head without --mtp"),
        (["--set", "num_experts=4", "--experts", "5"], "--set num_experts and --experts set the same"),
        (["--set", "num_hidden_layers=4", "--layers", "5"], "--set num_hidden_layers and --layers set the same"),
        (["--set", "tie_word_embeddings=false", "--tied"], "--set tie_word_embeddings and --tied set the same"),
        (["--set", "hidden_size=48", "--set", "hidden_size=64"], "--set hidden_size is given twice"),
        (["--set", 'layer_types=["full_attention"]', "--fp32-stored-as", "F32"], "no layer is a Gated DeltaNet"),
        (["--max-shard-size", "x"], "max_shard_size"),
    ):
        assert main(["tiny", str(tmp_path / "d"), *wrong]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "d").exists()
    with pytest.raises(SystemExit):
        main(["tiny", str(tmp_path / "d"), "--set", "hidden_size"])
