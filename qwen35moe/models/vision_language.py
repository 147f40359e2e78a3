"""Text, images and videos in one model: the tower's features take the places of placeholder tokens, and the decoder runs.

    features = tower(pixels);  h = embed(tokens), features at the placeholders;  logits = head(decoder(h))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qwen35moe.backends.values import send, unbatched
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.compat.forward import FORWARD
from qwen35moe.compat.generate import GENERATE
from qwen35moe.config import ConfigError
from qwen35moe.models.arguments import takes
from qwen35moe.models.base import PretrainedModel
from qwen35moe.models.generation_inputs import MultimodalGenerateInputs, MultimodalStreamInputs, StreamInputs, keywords
from qwen35moe.models.inputs import TextInputs, body_arguments, prepared
from qwen35moe.models.outputs import ModelOutput, returned
from qwen35moe.models.plan import with_positions
from qwen35moe.models.text import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextModel, Qwen3_5TextModel
from qwen35moe.models.vision_inputs import (
    IMAGE,
    TEXT,
    VIDEO,
    ConditionalGenerationInputs,
    MultimodalInputs,
    VisualInputs,
    as_features,
    check_counts,
    checked_types,
    insert_features,
    token_types,
)
from qwen35moe.models.vision_positions import next_positions, positions
from qwen35moe.modules.vision import Qwen3_5MoeVisionModel, VisionOutput
from qwen35moe.ops.vision_grid import Grids, tokens_of


class Qwen3_5MoeModel(PretrainedModel):
    """The tower and the decoder without its head."""

    text_model: type[Qwen3_5MoeTextModel] = Qwen3_5MoeTextModel

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.config.vision_config is None:
            raise ConfigError(f"{type(self).__name__} needs a vision_config; for text alone take the ...ForCausalLM class")
        self.visual = Qwen3_5MoeVisionModel(self.config.vision_config)
        self.language_model = self.text_model(self.config)
        self.name_parts()

    def get_input_embeddings(self) -> torch.nn.Embedding:
        """The token embedding."""
        return self.language_model.embed_tokens

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.dtype

    def get_decoder(self) -> Qwen3_5MoeTextModel:
        """The decoder."""
        return self.language_model

    @takes(MultimodalInputs, FORWARD)
    def forward(self, inputs: MultimodalInputs) -> ModelOutput:
        """Hidden states [B, T, D] of a batch of token rows."""
        decoder = self.language_model
        inputs, layout = prepared(inputs, decoder)
        embeds, layout, position_ids, following = self.embed(inputs, layout)
        names = TextInputs.__dataclass_fields__.keys() & vars(inputs)
        text = TextInputs(**{name: getattr(inputs, name) for name in names - {"input_ids", "mm_token_type_ids"}})
        text = replace(text, inputs_embeds=embeds, position_ids=position_ids, planned=None)
        output = decoder(**body_arguments(TextInputs, text, layout))
        if inputs.cache is not None and following is not None:
            inputs.cache.set_next_positions(following)
        return returned(output, inputs)

    def embed(
        self, inputs: MultimodalInputs, layout: TokenLayout
    ) -> tuple[Tensor, TokenLayout, Tensor | None, Tensor | None]:
        """(embeddings [B, T, D] with the features in them; the layout and the position_ids, with three axes; the position
        after the last token of each row [B], None where it is the number of tokens)."""
        embeds, cache, position_ids = self.language_model.embed(inputs), inputs.cache, inputs.position_ids
        visual = inputs.any_visual
        if visual:
            inputs = inputs.with_host_grids(self._merge)
        three_axes = position_ids is not None and position_ids.dim() == 3
        # A prompt with placeholders needs images or videos. A single token is one that was just generated: a word.
        ids = inputs.input_ids
        is_prompt = ids is not None and embeds.shape[1] > 1 and not ids.is_meta
        if visual or is_prompt:
            mask = None if inputs.attention_mask is None else inputs.attention_mask[:, -embeds.shape[1] :].bool()
            if mask is not None:
                mask = send(mask, embeds.device if ids is None else ids.device)
            types = self._types(inputs, embeds, mask)
            embeds = self._with_features(inputs, embeds, types)
            if visual and position_ids is None:
                return embeds, *self._placed(inputs, types, mask, layout)
        if cache is None or not (visual or three_axes):
            return embeds, layout, position_ids, None
        return embeds, layout, position_ids, next_positions(layout, cache.next_positions)

    def _placed(
        self, inputs: MultimodalInputs, types: Tensor, mask: Tensor | None, layout: TokenLayout
    ) -> tuple[TokenLayout, Tensor, Tensor]:
        """The layout with the positions that the images and videos give, these [3, B, T], and the next ones of each row."""
        before = None if inputs.cache is None else inputs.cache.next_positions
        if inputs.cu_seqlens is None and layout.cu_seqlens is not None:  # packed documents in rows of their own
            placed, following = positions(layout.arrange(types), inputs, self._merge, bounds=layout.cu_seqlens)
            return replace(layout, position_ids=placed), torch.stack([layout.restore(axis) for axis in placed]), following
        placed, following = positions(types, inputs, self._merge, mask=mask, before=before, bounds=inputs.cu_seqlens)
        return with_positions(layout, placed), placed, following

    @property
    def _merge(self) -> int:
        return self.visual.config.spatial_merge_size

    def _with_features(self, inputs: MultimodalInputs, embeds: Tensor, types: Tensor) -> Tensor:
        """The embeddings with the features of images and videos, computed now or given, at their placeholders."""
        if inputs.any_visual and unbatched(types) is not types:
            raise ValueError("images and videos cannot be placed under torch.vmap: pass a batch")
        check_counts(types, inputs, self._merge)
        for kind in (IMAGE, VIDEO):
            features, pixels, grids = inputs.features(kind), inputs.pixels(kind), inputs.grids(kind, self._merge)
            if features is None and pixels is not None:
                features = self.visual(pixels.to(self.visual.device, non_blocking=True), grids)
            if features is not None:
                count = sum(tokens_of(grids, self._merge))
                embeds = insert_features(embeds, types, kind, as_features(features), count)
        return embeds

    def _types(self, inputs: MultimodalInputs, embeds: Tensor, mask: Tensor | None) -> Tensor:
        """The types [B, T] of the tokens; padding counts as text."""
        inputs.check_visual(ids=inputs.input_ids is not None)
        if inputs.input_ids is not None:
            types = checked_types(inputs.mm_token_type_ids, inputs.input_ids, self.config)
        else:
            types = self._types_of_embeddings(inputs, embeds)
        return types if mask is None else types.masked_fill(~mask, TEXT)

    def _types_of_embeddings(self, inputs: MultimodalInputs, embeds: Tensor) -> Tensor:
        """From mm_token_type_ids; with positions given, from the embeddings that are a placeholder's."""
        types = inputs.mm_token_type_ids
        if types is not None:
            types = types[:, -embeds.shape[1] :]  # of the whole row, as with the mask, or of the new tokens
            if types.shape != embeds.shape[:2]:
                raise ValueError(f"mm_token_type_ids {list(types.shape)} do not fit inputs_embeds {list(embeds.shape)}")
            return types.to(embeds.device)
        if inputs.position_ids is None:
            raise ValueError(
                "inputs_embeds with images or videos: give mm_token_type_ids (0 text, 1 image, 2 video) as well, or input_ids "
                "instead: embeddings alone do not tell where the placeholders are, nor the positions of what follows"
            )
        table = self.language_model.embed_tokens.weight
        types = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        for kind, token in ((IMAGE, self.config.image_token_id), (VIDEO, self.config.video_token_id)):
            if 0 <= token < table.shape[0]:
                types = types.masked_fill((embeds == table[token].to(embeds)).all(-1), kind)
        return types


class Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeForCausalLM):
    """The tower, the decoder and its head. Arguments are named as Hugging Face's processors name what they return."""

    body: type[Qwen3_5MoeModel] = Qwen3_5MoeModel
    body_inputs = MultimodalInputs
    input_modalities = ("text", "image", "video")
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _no_split_modules = ["DecoderLayer", "VisionBlock"]

    def _build(self) -> PretrainedModel:
        return self.body(self.config)

    @property
    def decoder(self) -> Qwen3_5MoeTextModel:
        return self.model.language_model

    @property
    def visual(self) -> Qwen3_5MoeVisionModel:
        """The vision tower."""
        return self.model.visual

    @property
    def language_model(self) -> Qwen3_5MoeTextModel:
        """The decoder."""
        return self.model.language_model

    def tie_weights(self, missing_keys: Any = None, recompute_mapping: bool = True) -> None:
        """Shares the embedding with the head where the whole configuration has tie_word_embeddings."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | Grids) -> VisionOutput:
        """The tower's features of images, to pass as mm_encoder_outputs={"image": ...} in any number of calls."""
        return self.visual(pixel_values.to(self.visual.device, non_blocking=True), image_grid_thw)

    def get_video_features(self, pixel_values_videos: Tensor, video_grid_thw: Tensor | Grids) -> VisionOutput:
        """The tower's features of videos, to pass as mm_encoder_outputs={"video": ...}."""
        return self.visual(pixel_values_videos.to(self.visual.device, non_blocking=True), video_grid_thw)

    @takes(ConditionalGenerationInputs, FORWARD)
    def forward(self, inputs: ConditionalGenerationInputs) -> ModelOutput:
        """As `Qwen3_5MoeForCausalLM.forward`, with images and videos."""
        return self.run(inputs)

    @takes(MultimodalGenerateInputs, GENERATE)
    def generate(self, inputs: MultimodalGenerateInputs) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Prompt and continuation [B, T + new], or a GenerateOutput; takes all that a processor returns."""
        return super().generate(**self._checked(inputs))

    @takes(MultimodalStreamInputs, GENERATE)
    def stream(self, inputs: MultimodalStreamInputs) -> Iterator[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The new tokens [B], step by step."""
        return super().stream(**self._checked(inputs))

    def visual_arguments(self, visual: VisualInputs, rows: list[Tensor], cached: tuple[int, ...]) -> dict[str, Any]:
        """The vision arguments of a prefill whose cache holds the first cached[r] tokens of row r of the ids `rows`."""
        visual.check_visual(ids=True)
        new = replace(visual, mm_token_type_ids=None)
        if any(cached):
            types = token_types(torch.cat(rows), self.config).cpu().split([row.shape[0] for row in rows])
            merge = self.visual.config.spatial_merge_size
            new = new.with_host_grids(merge).after_cached(types, cached, merge)
        return {name: value for name, value in vars(new).items() if value is not None}

    def _checked(self, inputs: StreamInputs) -> dict[str, Any]:
        """The arguments of `generate` by name; ValueError where the token types contradict the ids."""
        values = keywords(inputs)
        ids, visual = inputs.input_ids, values["visual_inputs"]
        if visual is not None and visual.mm_token_type_ids is not None and isinstance(ids, Tensor) and ids.dim() == 2:
            checked_types(visual.mm_token_type_ids, ids, self.config)
        return values


class Qwen3_5Model(Qwen3_5MoeModel):
    """The dense siblings' tower and decoder."""

    dense = True
    text_model = Qwen3_5TextModel


class Qwen3_5ForConditionalGeneration(Qwen3_5MoeForConditionalGeneration):
    """The dense siblings' tower, decoder and head."""

    dense = True
    body = Qwen3_5Model
