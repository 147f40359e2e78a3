# pyright: strict
"""The public surface in pyright's strict mode (`make check`): no name, argument or result of it is of unknown type."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import qwen35moe
from qwen35moe import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Cache,
    Config,
    GenerationConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeVisionModel,
    Routing,
    TextConfig,
    VisionConfig,
    backends,
    taps,
)


def test_loading_and_generation() -> None:
    model, tokenizer = qwen35moe.load("tiny", dtype=torch.float32, device="cpu", layers=range(4))
    ids: Tensor = tokenizer("And God said")["input_ids"]
    text: str = tokenizer.decode(model.generate(ids, max_new_tokens=3)[0])
    assert text.startswith("And God said")
    for token in model.stream(ids, max_new_tokens=2):
        assert token.shape == (1,)
    loaded: Qwen3_5MoeForCausalLM = Qwen3_5MoeForCausalLM.from_pretrained("tiny", torch_dtype=torch.bfloat16, device_map="auto")
    same: Qwen3_5MoeForCausalLM = AutoModelForCausalLM.from_pretrained("tiny", trust_remote_code=True)
    assert same.dtype == loaded.dtype == torch.bfloat16 and same.device.type == "cpu"
    assert same.num_parameters() == loaded.num_parameters(only_trainable=True)
    multimodal = AutoModelForImageTextToText.from_pretrained("tiny")
    assert multimodal.visual.dtype == torch.bfloat16 and AutoModel.from_pretrained("tiny").config.hidden_size > 0
    assert AutoTokenizer.from_pretrained("tiny", padding_side="left").padding_side == "left"
    messages = [{"role": "user", "content": "Hello"}]
    assert AutoProcessor.from_pretrained("tiny").apply_chat_template(messages)["input_ids"].shape[0] == 1
    pipe = qwen35moe.pipeline("text-generation", model="tiny")
    assert pipe("And God said", max_new_tokens=2)[0]["generated_text"].startswith("And God said")


def test_configurations() -> None:
    config: Config = Config.preset("35b-a3b").replace(num_hidden_layers=4, num_experts=8, hidden_size=64)
    text: TextConfig = config.text_config
    vision: VisionConfig | None = config.vision_config
    sizes: tuple[int, float, tuple[str, ...]] = (config.hidden_size, text.rms_norm_eps, config.layer_types)
    assert sizes[0] == 64 and vision is not None and vision.depth == 27
    config.use_cache = False
    config.pad_token_id = 0
    assert Config.from_dict(config.to_dict()) == config and AutoConfig.from_pretrained("tiny").vocab_size == 2048
    names: list[str] = [tensor.name for tensor in config.tensor_shapes(vision=False)]
    assert names[0].endswith("embed_tokens.weight") and GenerationConfig(max_new_tokens=3).max_new_tokens == 3


def test_models_and_state(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained("tiny")
    model = Qwen3_5MoeForCausalLM(config).init_weights(seed=0).eval()
    cache: Cache = model.new_cache(1, max_length=8, record=2)
    with torch.no_grad():
        out = model(torch.tensor([[3, 4, 5]]), cache=cache, output_routing=True)
    routing: Routing = out.routing
    assert cache.lengths[0] == 3 and len(cache) == config.num_hidden_layers and routing is not None
    cache.rollback(1)
    cache.save(tmp_path / "cache.safetensors")
    assert Cache.load(tmp_path / "cache.safetensors", config).batch_size == 1
    model.save_pretrained(tmp_path / "model", layout="per_expert", max_shard_size="1MB")
    vision = Qwen3_5MoeVisionModel(config)
    assert vision.config.depth > 0 and vision.blocks[0] is not None
    with backends.ran() as ran, taps.record(model, "layers.*.mlp.indices") as values, torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    assert len(list(values)) == config.num_hidden_layers and ran.calls
    with backends.use(experts="loop"):
        assert isinstance(str(backends.describe()), str)
