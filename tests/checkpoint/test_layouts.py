"""Every published layout, at small size, loads exactly; unsupported quantised formats are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen35moe.checkpoint import CheckpointError, block_fp8, blocks, fill, read, transfer
from qwen35moe.config import Config
from qwen35moe.models.text import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM
from tests.support import peer
from tests.support.checkpoints import (
    FP32_PARAMETERS,
    LAYOUTS,
    TEXT,
    Layout,
    Tensors,
    Whole,
    WholeDense,
    block_by_block,
    parts_of,
    publish,
    random_fp8,
    write,
)

MODEL = Qwen3_5MoeForCausalLM
FP8 = "3.5 MoE, FP8"


def canonical(model: torch.nn.Module) -> Tensors:
    return {name.removeprefix("model."): value for name, value in model.state_dict().items()}


def assert_equal(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


@pytest.mark.parametrize("row", LAYOUTS)
def test_a_published_layout_is_read_completely(row: str, tmp_path: Path) -> None:
    """Text, vision and MTP, with a class that has all parts."""
    layout = LAYOUTS[row]
    folder, expected = publish(tmp_path, layout)
    model = (WholeDense if layout.dense else Whole).from_pretrained(folder, parts=parts_of(layout))
    actual = canonical(model)
    if layout.tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        del actual["lm_head.weight"]
    assert_equal(actual, expected)
    assert not model.loading_report.left_out and not model.loading_report.converted
    assert (model.loading_report.dequantised > 0) == layout.fp8
    assert model.config.quantization_config is None and model.dtype == torch.bfloat16


@pytest.mark.parametrize("row", LAYOUTS)
def test_the_text_class_reads_its_part(row: str, tmp_path: Path) -> None:
    layout = LAYOUTS[row]
    folder, expected = publish(tmp_path, layout)
    model = (Qwen3_5ForCausalLM if layout.dense else MODEL).from_pretrained(folder)
    actual = canonical(model)
    if layout.tied:
        del actual["lm_head.weight"]
    assert_equal(actual, {name: value for name, value in expected.items() if not name.startswith(("visual.", "mtp."))})
    stored = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = {"model.visual.*": layout.visual, "mtp.*": "mtp."}
    counted = {what: sum(name.startswith(prefix) for name in stored) for what, prefix in other.items()}
    assert model.loading_report.left_out == {what: count for what, count in counted.items() if count}
    with torch.no_grad():
        assert model(torch.tensor([[3, 1, 4]])).logits.isfinite().all()


@pytest.mark.parametrize("row", [name for name, layout in LAYOUTS.items() if "fine-tune" not in name and "saved" not in name])
def test_names_equal_the_published_ones(row: str, tmp_path: Path) -> None:
    """The test checkpoints have the names, shapes and dtypes that the configuration predicts for full size."""
    layout = LAYOUTS[row]
    folder, _ = publish(tmp_path, layout, shards=1)
    config = Config.from_dict(layout.config())
    stored_as = "F32" if layout.fp32_stored_as == torch.float32 else "BF16"
    mtp = layout.mtp or "grouped"
    predicted = {tensor.name: tensor for tensor in config.tensor_shapes(
        mtp=layout.mtp is not None, experts=layout.experts, mtp_experts=mtp, fp32_stored_as=stored_as)}  # fmt: skip
    header = read.read_headers(folder)
    weights = {name: tensor for name, tensor in header.tensors.items() if not name.endswith("_scale_inv")}
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in predicted.items()}
    scaled = {name for name in weights if f"{name}_scale_inv" in header.tensors}
    assert scaled == {name for name, tensor in weights.items() if tensor.dtype == "F8_E4M3"}
    assert {weights[name].dtype for name in weights.keys() - scaled if name.endswith("A_log")} <= {stored_as}
    if layout.fp8 and layout.experts == "per_expert":  # 3E + 3 per layer; 4 or 3 in the mixer, 4 in the MTP head's
        experts = 3 * TEXT["num_experts"]
        assert len(scaled) == (3 + 4 + 2 * (experts + 3)) + (4 + 3 + experts)
        assert {header.tensors[f"{name}_scale_inv"].dtype for name in scaled} == {"BF16"}


# ---------------------------------------------------------------------------------------------------------- tying


@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("inner", [True, False, None])
def test_text_config_decides_whether_the_text_class_is_tied(top: bool | None, inner: bool | None, tmp_path: Path) -> None:
    """As in transformers: the outer value is for the multimodal class, and the default is false."""
    layout = Layout(mtp=None)
    folder, expected = publish(tmp_path, layout)
    config = layout.config()
    for where, value in ((config, top), (config["text_config"], inner)):
        where.pop("tie_word_embeddings")
        if value is not None:
            where["tie_word_embeddings"] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert Config.from_pretrained(folder).tie_word_embeddings is bool(top)
    if inner:  # the stored head differs from the embedding
        with pytest.raises(CheckpointError, match="tied but different"):
            MODEL.from_pretrained(folder)
    else:
        assert torch.equal(MODEL.from_pretrained(folder).lm_head.weight, expected["lm_head.weight"])


# ------------------------------------------------------------------------------------------------------------ FP8


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (300, 257), (3, 130, 140)])
def test_the_definition_multiplies_per_block(shape: tuple[int, ...]) -> None:
    values, scale = random_fp8(shape, peer.generator(3))
    assert scale.shape == blocks.scale_shape(shape)
    expected = block_by_block(values, scale)
    assert torch.equal(block_fp8.dequantise(values, scale).double(), expected)
    if len(shape) == 2:
        assert torch.equal(block_fp8.dequantise_rows(values, scale.float()).double(), expected)


def test_every_code_is_widened_to_its_value() -> None:
    codes = torch.arange(256).to(torch.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    assert torch.equal(block_fp8.widened(numbers), numbers.float()) and numbers.numel() == 254
    assert torch.equal(block_fp8.widened(numbers).signbit(), numbers.float().signbit())
    everything = codes.view(torch.float8_e4m3fn)
    assert torch.equal(block_fp8.widened(everything).isnan().nonzero().flatten(), torch.tensor([127, 255]))
    assert block_fp8.widened(numbers[:0]).shape == (0,)


@pytest.mark.parametrize("chunk", [1000, 128 * 200 + 1, 2**21])
@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.float16, torch.float64])
def test_fp8_is_rounded_once_into_any_dtype_in_pieces_of_any_size(
    dtype: Any, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TILE", chunk)
    folder, expected = publish(tmp_path, LAYOUTS[FP8], shards=1)
    stored = load_file(folder / "model.safetensors")
    model = MODEL.from_pretrained(folder, dtype=dtype)
    wanted = torch.bfloat16 if dtype == "auto" else dtype
    for layer, name in ((0, "linear_attn.in_proj_qkv"), (1, "self_attn.o_proj"), (1, "mlp.shared_expert.up_proj")):
        key = f"model.language_model.layers.{layer}.{name}.weight"
        exact = block_by_block(stored[key], stored[f"{key}_scale_inv"])
        actual = model.get_parameter(f"model.layers.{layer}.{name}.weight")
        assert actual.dtype == wanted and torch.equal(actual, exact.to(wanted))
    assert model.model.layers[0].linear_attn.A_log.dtype == torch.promote_types(torch.float32, wanted)
    if dtype == "auto":
        assert_equal(canonical(model), {k: v for k, v in expected.items() if not k.startswith(("visual.", "mtp."))})


def changed(folder: Path, name: str, value: Tensor | None, also: str | None = None) -> Path:
    """Replace, add or remove a tensor of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if value is not None:
        tensors[also or name] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


WEIGHT = "model.language_model.layers.0.mlp.experts.2.up_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"
SCALES = {
    "missing": (SCALE, None, "scale missing: .*experts.2.up_proj.weight: F8_E4M3 needs weight_scale_inv"),
    "alone": (WEIGHT, None, "missing: layers.0.mlp.experts.2.up_proj.weight"),
    "of another shape": (SCALE, torch.ones(2, 1).bfloat16(), r"wrong shape: .*_scale_inv: on disk \[2, 1\].* need \[2, 2\]"),
    "per tensor": (SCALE, torch.ones(()).bfloat16(), r"wrong shape: .*_scale_inv: on disk \[\]"),
    "integer": (SCALE, torch.ones(2, 2, dtype=torch.int16), "wrong dtype: .*_scale_inv: I16"),
    "NaN": (SCALE, torch.tensor([[1, 2], [float("nan"), 3]]).bfloat16(), r"scale not finite: .*: nan for block \[1, 0\]"),
    "infinite": (SCALE, torch.tensor([[1, float("inf")], [1, 3]]).bfloat16(), r"scale not finite: .*: inf for block \[0, 1\]"),
    "beside bf16": (WEIGHT, torch.ones(136, 200).bfloat16(), "wrong dtype: .*up_proj.weight: BF16; .*_scale_inv is stored too"),
    "of E5M2": (WEIGHT, torch.ones(136, 200).to(torch.float8_e5m2), "wrong dtype: .*up_proj.weight: F8_E5M2"),
}


@pytest.mark.parametrize("how", SCALES)
def test_a_wrong_scale_is_reported(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value, message = SCALES[how]
    folder = changed(publish(tmp_path, LAYOUTS[FP8], shards=1)[0], name, value)
    for function in ("map_file", "new_memory", "read_into", "view_of"):
        monkeypatch.setattr(fill, function, lambda *_, **__: pytest.fail("memory was allocated"))
    with pytest.raises(CheckpointError, match=message) as caught:
        MODEL.from_pretrained(folder)
    assert len(caught.value.problems) == (2 if how == "alone" else 1)


def test_a_scale_without_a_weight_is_reported(tmp_path: Path) -> None:
    folder, _ = publish(tmp_path, LAYOUTS[FP8], shards=1)
    name = "model.language_model.layers.0.mlp.gated.weight_scale_inv"
    with pytest.raises(CheckpointError, match="scale without its weight: .*there is no layers.0.mlp.gated.weight"):
        MODEL.from_pretrained(changed(folder, name, torch.ones(1, 2)))


def test_fp8_nan_codes_and_too_large_products_are_reported(tmp_path: Path) -> None:
    folder, _ = publish(tmp_path, LAYOUTS[FP8], shards=1)
    weight = load_file(folder / "model.safetensors")[WEIGHT]
    codes = weight.view(torch.uint8).clone()
    codes[135, 199] = 0x7F
    with pytest.raises(CheckpointError, match=r"experts.2.up_proj.weight in .* contains NaN"):
        MODEL.from_pretrained(changed(folder, WEIGHT, codes.view(torch.float8_e4m3fn)))
    changed(folder, WEIGHT, weight)
    changed(folder, SCALE, torch.full((2, 2), 3e4).bfloat16())
    assert MODEL.from_pretrained(folder) is not None
    with pytest.raises(CheckpointError, match=r"up_proj.weight in .* reaches 1.34e\+07: float16 weights are at most"):
        MODEL.from_pretrained(folder, dtype="float16")


def test_tensors_and_not_the_configuration_decide_about_fp8(tmp_path: Path) -> None:
    """FP8 without quantization_config, and bf16 with one."""
    folder, expected = publish(tmp_path / "fp8", LAYOUTS[FP8])
    config = LAYOUTS[FP8].config()
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert MODEL.from_pretrained(folder).loading_report.dequantised > 0
    plain, _ = publish(tmp_path / "bf16", LAYOUTS["3.5 MoE, bf16"])
    (plain / "config.json").write_text(json.dumps(LAYOUTS[FP8].config()))
    assert MODEL.from_pretrained(plain).loading_report.dequantised == 0


def test_fp8_is_read_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging buffers do not grow with the tensor, and products are written straight to the parameter's memory."""
    largest: list[int] = []
    original = transfer.dequantise_rows
    monkeypatch.setattr(transfer, "TILE", 128 * 200)
    monkeypatch.setattr(transfer, "dequantise_rows", lambda values, scale: largest.append(values.numel()) or original(
        values, scale))  # fmt: skip
    folder, _ = publish(tmp_path, LAYOUTS["FP8, experts grouped"])
    MODEL.from_pretrained(folder)
    assert max(largest) == 128 * 200 and len(largest) > 60


UNSUPPORTED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "NVFP4 of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {}, "quant_method='modelopt', quant_algo=NVFP4"),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, {}, "quant_method='gptq', bits=4"),
    "AWQ": ({"quant_method": "awq"}, {}, "quant_method='awq'"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, {}, "format=pack-quantized"),
    "unknown": ({"quant_method": "magic"}, {}, "quant_method='magic'"),
    "without a method": ({"bits": 4}, {}, "quant_method=None, bits=4"),
    "a method that is not a string": ({"quant_method": [1]}, {}, r"quant_method=\[1\]"),
    "FP8 in other blocks": ({"quant_method": "fp8", "weight_block_size": [64, 64]}, {}, r"weight_block_size=\[64, 64\]"),
    "GPTQ without config": ({}, {"qweight": torch.ones(3, 2, dtype=torch.int32)}, r"1 tensors \*.qweight \(GPTQ or AWQ\)"),
    "NVFP4 without config": ({}, {"weight_scale_2": torch.ones(())}, r"\*.weight_scale_2 \(ModelOpt"),
    "packed without config": ({}, {"weight_packed": torch.ones(3, dtype=torch.uint8)}, r"\*.weight_packed \(compressed"),
    "MLX": ({}, {"scales": torch.ones(3), "biases": torch.ones(3)}, r"\*.biases \(MLX\).*\*.scales"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_other_quantisations_are_refused_in_one_message(kind: str, tmp_path: Path) -> None:
    quantised, tensors, message = UNSUPPORTED[kind]
    folder, _ = publish(tmp_path, LAYOUTS["4.54B community"], shards=1)
    config = LAYOUTS["4.54B community"].config() | ({"quantization_config": quantised} if quantised else {})
    stored = load_file(folder / "model.safetensors")
    stored |= {f"model.language_model.layers.0.mlp.gate.{leaf}": value for leaf, value in tensors.items()}
    write(folder, stored, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        MODEL.from_pretrained(folder)
    assert "Supported are weights stored as F64, F32, F16, BF16, and block-FP8" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_parameters_kept_in_fp32_are_float32_in_every_layout(tmp_path: Path) -> None:
    for number, layout in enumerate(LAYOUTS.values()):
        if layout.fp32_stored_as == torch.bfloat16:
            folder, expected = publish(tmp_path / str(number), layout)
            tensors = canonical((Qwen3_5ForCausalLM if layout.dense else MODEL).from_pretrained(folder))
            kept = [name for name in tensors if name.endswith(FP32_PARAMETERS)]
            assert len(kept) == 3 and all(torch.equal(tensors[name], expected[name]) for name in kept)
