"""accelerate: prepared, offloaded, distributed over devices, compiled by regions; the logits are those of the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen35moe import taps
from qwen35moe.config import Config
from qwen35moe.models.vision_language import Qwen3_5MoeForConditionalGeneration
from tests.integrations.common import KINDS, SIZES, cached_logits, next_token_sum, tiny, tokens
from tests.support.configs import TINY, nested
from tests.support.peer import assert_close, relative_error

accelerate: Any = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps the precision of the first Accelerator of a process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def devices(model: Any, *, layer: str = "disk") -> dict[str, str]:
    """A device map that keeps the second layer elsewhere."""
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    return {name: layer if name == "model.layers.1" else "cpu" for name in names}


@torch.no_grad()
def assert_alike(model: Any, kind: str = "experts") -> None:
    """One call, cached calls, generation and both forms of the loss."""
    own = tiny(kind, eos_token_id=None)
    expected = own(tokens(), labels=tokens())
    actual = model(tokens(), labels=tokens())
    assert_close(actual.logits, expected.logits, 1e-6)
    assert_close(actual.loss, expected.loss, 1e-6)
    assert_close(model(tokens(), labels=tokens(), output_logits=False).loss, expected.loss, 1e-5)
    assert_close(cached_logits(model, model.new_cache(2)), expected.logits, 2e-5)
    assert torch.equal(model.generate(tokens(), max_new_tokens=3), own.generate(tokens(), max_new_tokens=3))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_the_cpu_or_disk_until_they_are_used(kind: str, tmp_path: Path) -> None:
    for offload in ("cpu", "disk"):
        model = tiny(kind, eos_token_id=None)
        if offload == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert model.device == torch.device("cpu")
        assert_alike(model, kind)


def test_offloaded_unfused_experts_and_vision_tower() -> None:
    model = tiny(eos_token_id=None)
    model.unfuse_experts()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert_close(model(tokens()).logits, tiny()(tokens()).logits, 2e-5)
    with taps.record(model, "layers.*.mlp.expert_act") as seen:
        assert_close(model(tokens()).logits, tiny()(tokens()).logits, 2e-5)
    assert len(seen) == len(model.model.layers)

    def picture(offload: bool) -> Tensor:
        whole = Qwen3_5MoeForConditionalGeneration(Config.from_dict(nested(TINY | SIZES))).init_weights(seed=3).eval()
        if offload:
            accelerate.cpu_offload(whole, execution_device=torch.device("cpu"))
        vision = whole.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(16, width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return whole.get_image_features(pixels, torch.tensor([[1, 4, 4]])).pooler_output[0]

    assert_close(picture(True), picture(False), 1e-6)


def test_whole_layers_are_distributed(tmp_path: Path) -> None:
    model = tiny(eos_token_id=None)
    placed = accelerate.dispatch_model(model, devices(model), main_device="cpu", offload_dir=str(tmp_path))
    assert placed.hf_device_map == devices(model)
    assert_alike(placed)
    tied = tiny("tied", num_hidden_layers=5, layer_types=None)
    size = sum(p.nbytes for p in tied.parameters())
    planned = accelerate.infer_auto_device_map(
        tied, max_memory={"cpu": int(0.7 * size), "disk": 10 * size}, no_split_module_classes=tied._no_split_modules
    )
    assert set(planned.values()) == {"cpu", "disk"}
    whole = [name for name, module in tied.named_modules() if type(module).__name__ == "DecoderLayer"]
    for layer in whole:  # a layer is named, or is part of something that is
        assert any(layer == name or layer.startswith(f"{name}.") for name in planned), layer


@pytest.mark.parametrize("kind", KINDS)
def test_empty_weights_are_loaded(kind: str, tmp_path: Path) -> None:
    model = tiny(kind, eos_token_id=None)
    model.save_pretrained(tmp_path / "model")
    with accelerate.init_empty_weights():
        empty = type(model)(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.tie_weights()
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model"), device_map={"": "cpu"}).eval()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (kind == "tied")
    assert_alike(loaded, kind)
    if kind == "experts":
        with accelerate.init_empty_weights():
            empty = type(model)(model.config)
        map_ = devices(model)
        offloaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model"), map_, offload_folder=str(tmp_path))
        assert_alike(offloaded.eval())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_training_loop(precision: str, tmp_path: Path) -> None:
    """prepare, accumulate, backward and clip: the weights are those of the same steps written out, and they are saved."""
    made = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model, own, rate = tiny("tied").train(), tiny("tied").train(), 0.1
    prepared, optimizer = made.prepare(model, torch.optim.SGD(model.parameters(), lr=rate))
    ids = tokens()
    for step in range(4):
        with made.accumulate(prepared):
            output = prepared(ids[step % 2 :][:1], labels=ids[step % 2 :][:1])
            made.backward(output.loss)
            if made.sync_gradients:
                norm = made.clip_grad_norm_(prepared.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    for _ in range(2):
        for row in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = own(ids[row : row + 1]).logits
            (next_token_sum(logits.float(), ids[row : row + 1]) / 8 / 2).backward()
        expected = torch.nn.utils.clip_grad_norm_(own.parameters(), 0.5)
        with torch.no_grad():
            for parameter in own.parameters():
                parameter -= rate * (0 if parameter.grad is None else parameter.grad)
        own.zero_grad()
    bound = 1e-4 if precision == "no" else 3e-2
    assert relative_error(norm, expected) < bound
    for (name, losses), wanted in zip(model.named_parameters(), own.parameters(), strict=True):
        assert_close(losses, wanted, bound, name)
    made.save_model(prepared, str(tmp_path / "bare"))
    assert set(load_file(tmp_path / "bare" / "model.safetensors")) == set(model.state_dict()) - {"lm_head.weight"}
    made.unwrap_model(prepared).save_pretrained(tmp_path / "whole")
    loaded = type(model).from_pretrained(tmp_path / "whole")
    for (name, losses), wanted in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(losses, wanted), name


@pytest.mark.slow
@pytest.mark.parametrize("unfused", [False, True], ids=["experts", "unfused"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_regions(unfused: bool, tmp_path: Path) -> None:
    from accelerate.utils import compile_regions

    model = tiny(eos_token_id=None)
    if unfused:
        model.unfuse_experts()
    compiled = compile_regions(model, backend="eager")
    assert type(compiled.model.layers[0]).__name__ == "OptimizedModule"
    assert_close(compiled(tokens()).logits, tiny()(tokens()).logits, 2e-5)
    unwrapped = accelerate.Accelerator(cpu=True).unwrap_model(compiled, keep_torch_compile=False)
    unwrapped.save_pretrained(tmp_path)
    assert_close(type(model).from_pretrained(tmp_path)(tokens()).logits, tiny()(tokens()).logits, 1e-6)
