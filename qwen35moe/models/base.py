"""Base of the model classes: loading, saving, generation, devices and initialisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen35moe import backends
from qwen35moe.cache import Cache
from qwen35moe.compat.generate import GENERATE
from qwen35moe.config import Config, ConfigError, GenerationConfig
from qwen35moe.models.arguments import takes
from qwen35moe.models.device_map import DeviceMap, Devices, plan_device_map
from qwen35moe.models.generation_inputs import GenerateInputs, StreamInputs, keywords
from qwen35moe.models.packed_weights import (
    WeightPacking,
    pack_weights,
    packed_weights,
    refuse_conversion,
    refuse_packed,
    unpack_weights,
)
from qwen35moe.models.pretrained import FromPretrained
from qwen35moe.modules.initialise import Draws, Initialised, draw_module, resets_itself
from qwen35moe.modules.moe import Experts, SparseMoeBlock
from qwen35moe.modules.unfused import UnfusedExperts

if TYPE_CHECKING:
    from typing_extensions import Self


class PretrainedModel(FromPretrained, Initialised):
    """Base of the model classes. dense: whether a class is for configurations without experts."""

    dense = False

    def __init__(self, config: Any) -> None:
        """config: a Config or TextConfig, a dict with the contents of config.json, or a configuration of transformers."""
        super().__init__()
        config = Config.of(config)
        if config.text_config.is_moe == self.dense:
            kind, other = ("dense", "Qwen3_5Moe") if self.dense else ("MoE", "Qwen3_5")
            raise ConfigError(
                f"{type(self).__name__} is for {kind} configurations, this one has num_experts="
                f"{config.text_config.num_experts}: use the {other}... class"
            )
        self.config = config

    # --------------------------------------------------------------------------------------------- generation

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

    def compute_transition_scores(
        self, sequences: Tensor, scores: Sequence[Tensor], beam_indices: None = None, normalize_logits: bool = False
    ) -> Tensor:
        """The scores [B, new] of the new tokens, from the `sequences` and `scores` of a GenerateOutput; with
        normalize_logits=True their log-probabilities. -inf for an id outside the vocabulary, which padding may have."""
        if beam_indices is not None:
            raise ValueError("beam_indices: there is no beam search here; leave it out")
        table = torch.stack(tuple(scores), 1)
        table = table.log_softmax(-1) if normalize_logits else table
        new = sequences[:, sequences.shape[1] - table.shape[1] :].to(table.device)
        exists = (new >= 0) & (new < table.shape[-1])
        return table.gather(-1, new.where(exists, 0)[..., None])[..., 0].masked_fill(~exists, -torch.inf)

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
        refuse_packed(self, "place()")
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
                module.__dict__.pop("hf_device_map", None)  # libraries ask whether there is one
                if several and device_map is not None:
                    module.__dict__["hf_device_map"] = device_map.by_module(module)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        refuse_conversion(self, fn)
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
        refuse_packed(self, "unfuse_experts()")
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

    def pack_weights(self) -> WeightPacking:
        """Packs every nn.Linear and all experts for products of a few rows on a CPU, for inference, in place; returns what it
        did.

        One weight after the other: its plain memory is released once it is packed. Weights that cannot be packed or would gain
        nothing stay plain, and the result counts them: small ones, those of subclasses of nn.Linear, a head that shares the
        embedding, unfused experts. Saving and `state_dict` give plain weights. `.to()` to another dtype or device,
        `load_state_dict`, `unfuse_experts`, a backward, torch.compile and torch.export raise ValueError: `unpack_weights`
        first. Optimizers keep plain copies alive: create them afterwards.

        ValueError, before anything is packed: oneDNN cannot pack the dtype on this processor, or a weight has a gradient.
        """
        return pack_weights(self)

    def unpack_weights(self) -> WeightPacking:
        """Reverts `pack_weights`, weight by weight: the same bits, in new parameters. Does nothing to plain weights."""
        return unpack_weights(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        refuse_packed(self, "load_state_dict()")
        return super().load_state_dict(state_dict, strict, assign)

    def extra_repr(self) -> str:
        packed = packed_weights(self)
        return f"packed weights: {len(packed)}" if packed else super().extra_repr()

    def name_parts(self) -> None:
        """Stores in each module its path, by which `backends.ran()` names layers."""
        for name, module in self.named_modules():
            module.__dict__["path"] = name

    # ------------------------------------------------------------------------------------- defaults of generate

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

    def prepare_inputs_for_generation(self, input_ids: Tensor, **options: Any) -> dict[str, Any]:
        """The arguments of the next forward: input_ids and the options, unchanged. `generate` calls this method only where a
        subclass or a library (peft's prompt tuning) has replaced it."""
        return {"input_ids": input_ids, **options}

    # ------------------------------------------------------------------------------------------ initialisation

    @torch.no_grad()
    def init_weights(self, seed: int = 0, gates: str = "ordinary") -> Self:
        """Draws all weights from a seed. Matrices: normal(0, initializer_range); norms: identity; convolution:
        uniform(+-W^-0.5). The values depend on the seed and the shapes only, not on dtype or device.

        gates="ordinary" draws A in 1..16 and dt_bias as the inverse softplus of a log-uniform 1e-3..0.1, so that
        states decay over tens to thousands of tokens (Gu & Dao 2023); "transformers" draws A in 0.01..16 with dt_bias 1,
        as that library does: a median decay of e^-9.7 per token.

        A constructor draws from the same distributions, from torch's global generator (`torch.manual_seed`). Modules whose
        class is neither of this library nor of torch keep their values, unless that class defines `reset_parameters`.
        """
        draws = Draws(torch.Generator("cpu").manual_seed(seed), gates)
        vision, text = self.config.vision_config, self.config.text_config
        for name, module in self.named_modules():
            tower = vision is not None and "visual" in name.split(".")
            std = vision.initializer_range if vision is not None and tower else text.initializer_range
            draw_module(module, draws, std)
        foreign: list[Any] = [module for module in self.modules() if resets_itself(module)]
        if foreign:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                for module in foreign:
                    module.reset_parameters()
        return self
