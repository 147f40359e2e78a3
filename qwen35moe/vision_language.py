"""Text and pictures in one model: the tower's tokens take the places of placeholders, and the decoder goes on as with text.

    features = tower(pixels);  h = embed(tokens), features where the placeholders are;  logits = head(decoder(h))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen35moe.cache import Cache
from qwen35moe.config import Config, ConfigError, TextConfig
from qwen35moe.model import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextModel, Qwen3_5TextModel
from qwen35moe.modules.vision import Qwen3_5MoeVisionModel, VisionOutput
from qwen35moe.multimodal import (
    IMAGE,
    VIDEO,
    Pictures,
    as_features,
    check_counts,
    checked_types,
    positions,
    scattered,
    token_types,
)
from qwen35moe.output import ModelOutput
from qwen35moe.pretrained import PretrainedModel
from qwen35moe.routing import Decision, Routing


class Qwen3_5MoeModel(PretrainedModel):
    """The tower and the decoder without its head."""

    text_model: type[Qwen3_5MoeTextModel] = Qwen3_5MoeTextModel

    def __init__(self, config: Config | TextConfig) -> None:
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
    def merge(self) -> int:
        return self.visual.config.spatial_merge_size

    def features(self, pictures: Pictures, kind: int) -> Tensor | None:
        """[tokens, D] of all images (or videos), made now or before; None where there are none."""
        made, pixels, grid_thw = pictures.features(kind), pictures.pixels(kind), pictures.grid_thw(kind)
        if made is not None:
            return as_features(made)
        if pixels is None or grid_thw is None:
            return None
        return as_features(self.visual(pixels.to(self.visual.device), grid_thw))

    def embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor | None,
        attention_mask: Tensor | None, cache: Cache | None, cu_seqlens: Tensor | None, pictures: Pictures,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(embeddings [B, T, D] with the pictures in them, positions [3, B, T] or None for plain text, and the position
        that follows in each row [B], where positions are)."""
        batch, tokens = self.language_model._check_inputs(input_ids, inputs_embeds)
        embedded = inputs_embeds if inputs_embeds is not None else self.language_model.embed_tokens(input_ids)
        seeing = pictures.present(IMAGE) or pictures.present(VIDEO)
        step = tokens == 1 and embedded.device.type != "cpu"  # looking for placeholders would wait for the device
        if not seeing and (input_ids is None or step or torch.compiler.is_compiling()):
            return embedded, position_ids, None
        pictures.check()
        types = self._types(input_ids, embedded, pictures, position_ids)
        check_counts(types, pictures, self.merge)
        if not seeing:
            return embedded, position_ids, None
        for kind in (IMAGE, VIDEO):
            features = self.features(pictures, kind)
            if features is not None:
                embedded = scattered(embedded, types, kind, features)
        mask = None if attention_mask is None else attention_mask[:, -tokens:]
        if position_ids is not None:
            last = position_ids[-3:] if position_ids.dim() == 3 else position_ids[None]
            last = last.expand(-1, batch, -1) if mask is None else last.masked_fill(mask == 0, -1)
            return embedded, position_ids, last.amax((0, 2)) + 1
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        before = None
        if cache is not None:
            moved = 0 if cache.rope_delta is None else cache.rope_delta.to(cache.lengths.device)
            before = (cache.lengths + moved).tolist()
        return embedded, *positions(types, pictures, self.merge, mask=mask, before=before, bounds=bounds)

    def _types(
        self, input_ids: Tensor | None, embedded: Tensor, pictures: Pictures, position_ids: Tensor | None
    ) -> Tensor:
        types = checked_types(pictures.mm_token_type_ids, input_ids, self.config)
        if types is not None:
            return types
        if position_ids is None:
            raise ValueError(
                "inputs_embeds with images or videos: give mm_token_type_ids (0 text, 1 image, 2 video) as well, or input_ids "
                "instead: without them nobody can say where the pictures lie, nor the positions of what follows"
            )
        # With positions given, places are enough: those whose embedding is a placeholder's.
        table, found = self.language_model.embed_tokens.weight, torch.zeros(embedded.shape[:2], dtype=torch.long)
        found = found.to(embedded.device)
        for kind, token in ((IMAGE, self.config.image_token_id), (VIDEO, self.config.video_token_id)):
            if token is not None:
                found = found.masked_fill((embedded == table[token].to(embedded.dtype)).all(-1), kind)
        return found


class Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeForCausalLM):
    """The tower, the decoder and its head. Arguments are named as Hugging Face's processors name what they return."""

    body: type[Qwen3_5MoeModel] = Qwen3_5MoeModel

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

    def tie_weights(self) -> None:
        """Shares the embedding with the head where the whole configuration says tie_word_embeddings."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> VisionOutput:
        """What the tower makes of images; to be passed back as mm_encoder_outputs={"image": ...} as often as wanted."""
        return self.visual(pixel_values.to(self.visual.device), image_grid_thw)

    def get_video_features(self, pixel_values_videos: Tensor, video_grid_thw: Tensor) -> VisionOutput:
        """What the tower makes of videos; to be passed back as mm_encoder_outputs={"video": ...}."""
        return self.visual(pixel_values_videos.to(self.visual.device), video_grid_thw)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        routing: Routing | Tensor | Decision | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
    ) -> ModelOutput:
        """As `Qwen3_5MoeForCausalLM.forward`, with pictures.

        pixel_values [patches, values] and image_grid_thw [images, 3] (frames, rows, columns of patches), the same for
        videos; all images of the batch in the order of their placeholders, row by row. mm_token_type_ids [B, T] (or of the
        whole row, past included): needed with inputs_embeds, otherwise read from the ids. mm_encoder_outputs: features
        made before, instead of pixels. Positions have three axes; a cache keeps each row's offset, so conversations with
        images may take turns on one model, and a later turn may bring new images.
        """
        pictures = Pictures(
            pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, mm_token_type_ids, mm_encoder_outputs
        )
        embedded, places, after = self.model.embed(
            input_ids, inputs_embeds, position_ids, attention_mask, cache, cu_seqlens, pictures
        )
        output = super().forward(
            None, attention_mask, places, embedded, cache, cu_seqlens, labels, num_items_in_batch, routing,
            output_router_logits, output_routing, output_hidden_states, output_attentions, output_logits, logits_to_keep,
        )
        if cache is not None and after is not None:
            cache.moved_on(after)
        return output

    def generate(self, input_ids: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Prompt and continuation [B, T + new]; takes a processor's output whole. Options: see `qwen35moe.generation`."""
        return super().generate(input_ids, attention_mask, **_with_pictures(options))

    def stream(self, input_ids: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """The new tokens [B], step by step. Options as in `generate`."""
        return super().stream(input_ids, attention_mask, **_with_pictures(options))

    def see(self, pictures: Pictures, rows: list[Tensor], held: tuple[int, ...]) -> dict[str, Any]:
        """The vision arguments of a prefill whose cache holds the first `held` tokens of each of the `rows` of ids."""
        pictures.check()
        types = [token_types(row, self.config).cpu() for row in rows]
        left = pictures.after_cached(types, held, self.model.merge)
        return {name: value for name, value in vars(left).items() if value is not None}


def _with_pictures(options: dict[str, Any]) -> dict[str, Any]:
    given = {name: options.pop(name) for name in Pictures.__dataclass_fields__ if name in options}
    return {**options, "pictures": Pictures(**given)} if given else options


class Qwen3_5Model(Qwen3_5MoeModel):
    """The dense siblings' tower and decoder."""

    dense = True
    text_model = Qwen3_5TextModel


class Qwen3_5ForConditionalGeneration(Qwen3_5MoeForConditionalGeneration):
    """The dense siblings' tower, decoder and head."""

    dense = True
    body = Qwen3_5Model
