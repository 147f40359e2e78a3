"""Base of the model classes: loading, saving, generation, devices, initialisation, and methods that other libraries call."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwen35moe import backends
from qwen35moe.cache import Cache
from qwen35moe.compat.generate import GENERATE
from qwen35moe.config import Config, ConfigError, GenerationConfig, TextConfig
from qwen35moe.models.arguments import takes
from qwen35moe.models.device_map import DeviceMap, Devices, plan_device_map
from qwen35moe.models.generation_inputs import GenerateInputs, StreamInputs, keywords
from qwen35moe.modules.gated_deltanet import GatedDeltaNet, ShortConvolution
from qwen35moe.modules.moe import Experts, Router, SparseMoeBlock
from qwen35moe.modules.norm import GatedRMSNorm, RMSNorm
from qwen35moe.modules.unfused import UnfusedExperts
from qwen35moe.modules.vision import init_vision

if TYPE_CHECKING:
    from typing_extensions import Self


class PretrainedModel(nn.Module):
    """Base of the model classes. dense: whether a class is for configurations without experts."""

    dense = False
    main_input_name = "input_ids"
    device_map: DeviceMap | None = None  # None: everything is on one device
    supports_gradient_checkpointing = True

    def __init__(self, config: Config | TextConfig) -> None:
        super().__init__()
        if isinstance(config, TextConfig):
            config = Config(text_config=config)
        if config.text_config.is_moe == self.dense:
            kind, other = ("dense", "Qwen3_5Moe") if self.dense else ("MoE", "Qwen3_5")
            raise ConfigError(
                f"{type(self).__name__} is for {kind} configurations, this one has num_experts="
                f"{config.text_config.num_experts}: use the {other}... class"
            )
        self.config = config

    # ---------------------------------------------------------------------------------- doors to the upper floors

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Reads a checkpoint folder, or a repository on the Hub (owner/name, revision=None). Options: dtype="auto",
        device="cpu" (or "auto", or several: see `place`), config=None, weights="map" | "copy", dtype_policy="native" |
        "transformers", and of the checkpoint only layers=, experts=, parts=; see `qwen35moe.checkpoint.load_model`."""
        from qwen35moe.checkpoint import load_model

        return load_model(cls, path, **options)

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Writes a checkpoint folder, atomically. Options: layout="grouped" | "per_expert", max_shard_size="5GB"."""
        from qwen35moe.checkpoint import save_model

        save_model(self, path, **options)

    @takes(GenerateInputs, GENERATE)
    def generate(self, inputs: GenerateInputs) -> Any:
        """Prompt and continuation [B, T + new], or a GenerateOutput. See `qwen35moe.generation.generate`."""
        from qwen35moe.generation import generate

        return generate(self, **keywords(inputs))

    @takes(StreamInputs, GENERATE)
    def stream(self, inputs: StreamInputs) -> Iterator[Tensor]:
        """The new tokens [B], step by step."""
        from qwen35moe.generation import stream

        return stream(self, **keywords(inputs))

    # ------------------------------------------------------------------------------------------------- state

    def new_cache(self, batch_size: int, max_length: int | None = None, record: int = 0) -> Cache:
        """An empty cache for this model's layers, in its dtype and on its device. See `Cache`."""
        devices = None if self.device_map is None else self.device_map.layers
        return Cache(
            self.config.text_config, batch_size, max_length=max_length, record=record, dtype=self.dtype, device=self.device,
            devices=devices,
        )

    def place(self, devices: Devices) -> Self:
        """Distributes whole layers, in order, over several devices ("auto": all GPUs); each layer's cache is on its device.

        The devices run one after the other in one process, without torchrun: for models that do not fit one device. See
        `qwen35moe.models.device_map`. `model.to(device)` moves everything to one device again.
        """
        device_map = plan_device_map(self, devices)
        for name, module in self.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.to(device_map.of(f"{name}.weight"))
        self.tie_weights()
        self.set_device_map(device_map)
        return self

    def set_device_map(self, device_map: DeviceMap | None) -> None:
        """Sets the device map of parameters that are already in place; None for one device."""
        several = device_map is not None and len({*device_map.layers, device_map.head}) > 1
        for module in self.modules():
            if isinstance(module, PretrainedModel):
                module.device_map = device_map if several else None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.device_map is not None and len({p.device for p in self.parameters()}) == 1:
            self.set_device_map(None)  # .to(device) has moved all layers to one device
        return self

    def use_backends(self, **choices: str) -> None:
        """Chooses implementations for this model only: use_backends(experts="loop"); "auto" removes a choice."""
        checked = backends.checked_choices(choices)
        for module in self.modules():
            own = {**module.__dict__.get("backend_choices", {}), **checked}
            module.__dict__["backend_choices"] = {op: name for op, name in own.items() if name != "auto"}

    def unfuse_experts(self) -> None:
        """Makes every expert an MLP of three nn.Linear, `mlp.experts.7.gate_proj` and so on, whose weights are views of the
        grouped parameters; the forward calls them. Create optimizers and adapters afterwards. See
        `qwen35moe.modules.unfused`."""
        for block in self.modules():
            if isinstance(block, SparseMoeBlock) and isinstance(block.experts, Experts):
                block.experts = UnfusedExperts(block.experts)
        self.name_parts()

    def fuse_experts(self) -> None:
        """Reverts `unfuse_experts`: the same grouped parameters, with the present values of the Linears. ValueError while an
        expert holds anything but plain nn.Linear (an adapter that was not merged)."""
        for block in self.modules():
            if isinstance(block, SparseMoeBlock) and isinstance(block.experts, UnfusedExperts):
                block.experts = block.experts.fuse()
        self.name_parts()

    def name_parts(self) -> None:
        """Stores in each module its path, by which `backends.ran()` names layers."""
        for name, module in self.named_modules():
            module.__dict__["path"] = name

    # --------------------------------------------------------------------------- for other libraries

    @property
    def generation_config(self) -> Any:
        """Defaults of `generate`: the checkpoint's, else the token ids of the configuration. A dict becomes a
        GenerationConfig; a transformers one stays as it is."""
        settings = self.__dict__.get("_generation_config")
        if settings is None:
            settings = self.__dict__["_generation_config"] = GenerationConfig.from_model_config(self.config)
        if isinstance(settings, GenerationConfig):
            settings.refresh(self.config)
        return settings

    @generation_config.setter
    def generation_config(self, settings: Any) -> None:
        self.__dict__["_generation_config"] = GenerationConfig.of(settings) if isinstance(settings, Mapping) else settings

    @property
    def device(self) -> torch.device:
        return self.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.get_input_embeddings().weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        raise NotImplementedError

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many parameters there are, a tied head counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Stores only each layer's inputs for the backward and recomputes the rest; routing is not recomputed."""
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True is not supported: gradient checkpointing here is non-reentrant")
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Stores all activations for the backward again."""
        self._set_checkpointing(False)

    def _set_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.__dict__["gradient_checkpointing"] = value

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def enable_input_require_grads(self) -> None:
        """Makes the embedding's output require a gradient, which adapters on frozen weights need."""
        self.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))

    def tie_weights(self) -> None:
        """Shares the embedding with the output head where the configuration has tie_word_embeddings."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **options: Any) -> dict[str, Any]:
        """The arguments of the next forward, for libraries that call it; our `generate` does not."""
        return {"input_ids": input_ids, **options}

    # ------------------------------------------------------------------------------------------ initialisation

    @torch.no_grad()
    def init_weights(self, seed: int = 0, gates: str = "ordinary") -> Self:
        """Draws all weights. Matrices: normal(0, initializer_range); norms: identity; convolution: uniform(+-W^-0.5).

        gates="ordinary" draws A in 1..16 and dt_bias as the inverse softplus of a log-uniform 1e-3..0.1, so that
        states decay over tens to thousands of tokens (Gu & Dao 2023); "transformers" draws A in 0.01..16 with dt_bias 1,
        as that library does: a median decay of e^-9.7 per token.
        """
        if gates not in ("ordinary", "transformers"):
            raise ValueError(f"gates={gates!r} is neither 'ordinary' nor 'transformers'")
        generator = torch.Generator().manual_seed(seed)
        std = 0.0

        def normal(parameter: Tensor) -> None:
            parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))

        vision, text = self.config.vision_config, self.config.text_config
        for name, module in self.named_modules():
            tower = vision is not None and "visual" in name.split(".")
            std = vision.initializer_range if vision is not None and tower else text.initializer_range
            if isinstance(module, nn.Linear | nn.Embedding | Router):
                normal(module.weight)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Experts):
                normal(module.gate_up_proj)
                normal(module.down_proj)
            elif isinstance(module, RMSNorm):
                module.weight.zero_()
            elif isinstance(module, GatedRMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, ShortConvolution):
                bound = module.weight.shape[-1] ** -0.5
                module.weight.copy_(torch.empty(module.weight.shape).uniform_(-bound, bound, generator=generator))
            elif isinstance(module, GatedDeltaNet):
                _init_gates(module, gates, generator)
            else:
                init_vision(module, normal)
        return self


def _init_gates(module: GatedDeltaNet, gates: str, generator: torch.Generator) -> None:
    heads = module.A_log.shape[0]
    low = 1.0 if gates == "ordinary" else 0.01
    module.A_log.copy_(torch.empty(heads).uniform_(low, 16, generator=generator).log())
    if gates == "transformers":
        module.dt_bias.fill_(1)
        return
    step = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp()
    module.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of this is `step`
