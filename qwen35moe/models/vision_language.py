"""Text and pictures in one model: the tower's tokens take the places of placeholders, and the decoder goes on as with text.

    features = tower(pixels);  h = embed(tokens), features where the placeholders are;  logits = head(decoder(h))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen35moe.cache import Cache
from qwen35moe.config import Config, ConfigError, TextConfig
from qwen35moe.models.base import PretrainedModel
from qwen35moe.models.inputs import checked_positions, new_mask
from qwen35moe.models.outputs import ModelOutput
from qwen35moe.models.text import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextModel, Qwen3_5TextModel, check_cache, check_tensors
from qwen35moe.models.vision_inputs import (
    IMAGE,
    TEXT,
    VIDEO,
    VisualInputs,
    as_features,
    check_counts,
    checked_types,
    following,
    positions,
    scattered,
    token_types,
)
from qwen35moe.modules.vision import Qwen3_5MoeVisionModel, VisionOutput
from qwen35moe.routing import Intervention, Routing


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

    def features(self, pictures: VisualInputs, kind: int) -> Tensor | None:
        """[tokens, D] of all images (or videos), made now or before; None where there are none."""
        made, pixels, grid_thw = pictures.features(kind), pictures.pixels(kind), pictures.grid_thw(kind)
        if made is not None:
            return as_features(made)
        if pixels is None or grid_thw is None:
            return None
        return as_features(self.visual(pixels.to(self.visual.device), grid_thw))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        routing: Routing | Tensor | Intervention | None = None,
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
    ) -> ModelOutput:
        """Hidden states; arguments as in `Qwen3_5MoeForConditionalGeneration.forward`."""
        pictures = VisualInputs(
            pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, mm_token_type_ids, mm_encoder_outputs
        )
        embedded, places, after = self.embed(
            input_ids, inputs_embeds, position_ids, attention_mask, cache, cu_seqlens, pictures
        )
        output = self.language_model(
            None, attention_mask, places, embedded, cache, cu_seqlens, routing,
            output_router_logits, output_routing, output_hidden_states, output_attentions,
        )
        if cache is not None and after is not None:
            cache.set_next_positions(after)
        return output

    def embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor | None,
        attention_mask: Tensor | None, cache: Cache | None, cu_seqlens: Tensor | None, pictures: VisualInputs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(embeddings [B, T, D] with the pictures in them; positions, None for those of plain text; and the position
        that follows in each row [B], where it may not be the number of tokens)."""
        given = {name: value for name, value in vars(pictures).items() if name != "mm_encoder_outputs"}
        check_tensors(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                      inputs_embeds=inputs_embeds, cu_seqlens=cu_seqlens, **given)
        batch, tokens = self.language_model._check_inputs(input_ids, inputs_embeds)
        check_cache(cache, batch)
        position_ids = checked_positions(position_ids, batch, tokens)
        embedded = inputs_embeds if inputs_embeds is not None else self.language_model.embed_tokens(input_ids)
        seeing = pictures.present(IMAGE) or pictures.present(VIDEO)
        three_axes = position_ids is not None and position_ids.dim() == 3
        # A single token is one that was just chosen; if it is a placeholder, then as a word like others.
        forgotten = input_ids is not None and tokens > 1 and not torch.compiler.is_compiling()
        if not (seeing or forgotten or (three_axes and cache is not None)):
            return embedded, position_ids, None
        mask = new_mask(attention_mask, batch, tokens, cache)
        if seeing or forgotten:
            embedded, types = self._seen(input_ids, embedded, position_ids, mask, pictures)
        if not (seeing or three_axes):
            return embedded, position_ids, None
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        rows = batch if bounds is None else len(bounds) - 1
        if cache is not None and cache.batch_size != rows:
            raise ValueError(f"the cache holds {cache.batch_size} rows, the input has {rows}: make one with new_cache({rows})")
        if position_ids is None:
            before = None if cache is None else cache.next_positions.tolist()
            return embedded, *positions(types, pictures, self.merge, mask=mask, before=before, bounds=bounds)
        after = None if cache is None else following(position_ids, cache.next_positions, mask=mask, bounds=bounds)
        return embedded, position_ids, after

    def _seen(
        self, input_ids: Tensor | None, embedded: Tensor, position_ids: Tensor | None, mask: Tensor | None,
        pictures: VisualInputs,
    ) -> tuple[Tensor, Tensor]:
        """The embeddings with the features in their places, and the types [B, T] of the tokens, padding being text."""
        pictures.check(ids=input_ids is not None)
        types = self._types(input_ids, embedded, pictures, position_ids)
        if mask is not None:
            types = types.masked_fill(~mask, TEXT)
        check_counts(types, pictures, self.merge)
        for kind in (IMAGE, VIDEO):
            features = self.features(pictures, kind)
            if features is not None:
                embedded = scattered(embedded, types, kind, features)
        return embedded, types

    def _types(
        self, input_ids: Tensor | None, embedded: Tensor, pictures: VisualInputs, position_ids: Tensor | None
    ) -> Tensor:
        given, tokens = pictures.mm_token_type_ids, embedded.shape[1]
        if input_ids is not None:
            return checked_types(given, input_ids, self.config)
        if given is not None:
            given = given[:, -tokens:]  # of the whole row, as with the mask, or of the new tokens
            if given.shape != embedded.shape[:2]:
                raise ValueError(f"mm_token_type_ids {list(given.shape)} do not fit inputs_embeds {list(embedded.shape)}")
            return given.to(embedded.device)
        if position_ids is None:
            raise ValueError(
                "inputs_embeds with images or videos: give mm_token_type_ids (0 text, 1 image, 2 video) as well, or input_ids "
                "instead: without them nobody can say where the pictures lie, nor the positions of what follows"
            )
        # With positions given, places are enough: those whose embedding is a placeholder's.
        table = self.language_model.embed_tokens.weight
        found = torch.zeros(embedded.shape[:2], dtype=torch.long, device=embedded.device)
        for kind, token in ((IMAGE, self.config.image_token_id), (VIDEO, self.config.video_token_id)):
            if 0 <= token < table.shape[0]:
                found = found.masked_fill((embedded == table[token].to(embedded)).all(-1), kind)
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
        routing: Routing | Tensor | Intervention | None = None,
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
        pictures = VisualInputs(
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
            cache.set_next_positions(after)
        return output

    def generate(self, input_ids: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Prompt and continuation [B, T + new]; takes a processor's output whole. Options: see `qwen35moe.generation`."""
        return super().generate(input_ids, attention_mask, **self._with_pictures(input_ids, options))

    def stream(self, input_ids: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """The new tokens [B], step by step. Options as in `generate`."""
        return super().stream(input_ids, attention_mask, **self._with_pictures(input_ids, options))

    def see(self, pictures: VisualInputs, rows: list[Tensor], held: tuple[int, ...]) -> dict[str, Any]:
        """The vision arguments of a prefill whose cache holds the first `held` tokens of each of the `rows` of ids."""
        pictures.check(ids=True)
        types = [token_types(row, self.config).cpu() for row in rows]
        left = pictures.after_cached(types, held, self.model.merge)
        return {name: value for name, value in vars(left).items() if value is not None}

    def _with_pictures(self, input_ids: Any, options: dict[str, Any]) -> dict[str, Any]:
        """The options of `generate` with the vision arguments among them as one."""
        given = VisualInputs(**{name: options.pop(name) for name in VisualInputs.__dataclass_fields__ if name in options})
        if given.mm_token_type_ids is not None and isinstance(input_ids, Tensor) and input_ids.dim() == 2:
            checked_types(given.mm_token_type_ids, input_ids, self.config)
        return {**options, "pictures": given} if any(value is not None for value in vars(given).values()) else options


class Qwen3_5Model(Qwen3_5MoeModel):
    """The dense siblings' tower and decoder."""

    dense = True
    text_model = Qwen3_5TextModel


class Qwen3_5ForConditionalGeneration(Qwen3_5MoeForConditionalGeneration):
    """The dense siblings' tower, decoder and head."""

    dense = True
    body = Qwen3_5Model
