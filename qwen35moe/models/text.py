"""The text model: embedding, decoder layers, final norm; and the same with a language-model head.

    h = embed(tokens);  h = layer(h) for each layer;  logits = W_head rms_norm(h)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qwen35moe import ops
from qwen35moe.cache import Cache
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.config import Config, TextConfig
from qwen35moe.models.base import PretrainedModel
from qwen35moe.models.device_map import moved
from qwen35moe.models.inputs import plan_layout
from qwen35moe.models.outputs import LossOutput, ModelOutput
from qwen35moe.modules.decoder import DecoderLayer, LayerContext, LayerOutput
from qwen35moe.modules.norm import RMSNorm
from qwen35moe.ops.balancing import load_balancing_loss
from qwen35moe.ops.losses import IGNORE, cross_entropy, shift_labels
from qwen35moe.ops.mrope import rotary_tables
from qwen35moe.ops.precision import wide_dtype
from qwen35moe.ops.rope import inverse_frequencies
from qwen35moe.routing import ForcedRouting, Intervention, Routing
from qwen35moe.taps import tap


class Qwen3_5MoeTextModel(PretrainedModel):
    """The decoder without its head. See `forward`."""

    def __init__(self, config: Config | TextConfig) -> None:
        super().__init__(config)
        text = self.config.text_config
        pad = text.pad_token_id if isinstance(text.pad_token_id, int) else None  # its row learns nothing, as there
        if pad is not None and not -text.vocab_size <= pad < text.vocab_size:
            pad = None  # an id that never occurs has no row
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size, padding_idx=pad)
        self.layers = nn.ModuleList(DecoderLayer(text, index) for index in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        # What routing and named values call the layers: the checkpoint's numbers in a model of some of its layers.
        self.source_layers: tuple[int, ...] = tuple(range(text.num_hidden_layers))
        self.name_parts()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        routing: Routing | Tensor | Intervention | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Hidden states of a batch of token rows.

        input_ids [B, T] or inputs_embeds [B, T, D]. attention_mask [B, past + T]: ones for tokens, zeros for padding,
        covering what the cache has seen and the new tokens. position_ids [B, T] or [3, B, T]. cu_seqlens [documents+1]:
        packed documents in one row. cache: continued and updated. routing: what the routers are to choose.
        """
        output, _, _ = self.run(
            input_ids, attention_mask, position_ids, inputs_embeds, cache, cu_seqlens, routing,
            output_router_logits, output_routing, output_hidden_states, output_attentions,
        )
        return output

    def run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
        routing: Routing | Tensor | Intervention | None,
        output_router_logits: bool | None,
        output_routing: bool,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> tuple[ModelOutput, TokenLayout, list[LayerOutput]]:
        """`forward`, and for the head the layout of the tokens and what the layers left."""
        check_tensors(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
        )
        batch, tokens = self._check_inputs(input_ids, inputs_embeds)
        with_router_logits = self._wants_router_logits(output_router_logits)
        if output_routing and not self.config.text_config.is_moe:
            raise ValueError("output_routing=True: this configuration is dense and has no routers")
        check_cache(cache, batch)
        layout = plan_layout(
            batch, tokens, self.device, attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens,
            cache=cache,
        )
        self._check_cache(cache, layout)
        replay = None if routing is None else self._replay(routing, layout)
        embedded = inputs_embeds if inputs_embeds is not None else self.embed_tokens(input_ids)
        hidden = tap(self, "embed", layout.arrange(embedded))
        record = cache is not None and cache.record > 0
        step = LayerContext(layout, self._rotation(layout.position_ids, hidden), replay, record, output_attentions)
        states: list[Tensor] = []
        passed: list[LayerOutput] = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(hidden)
            if self.placement is not None and self.placement.layers[index] != hidden.device:
                step = step.to(self.placement.layers[index])
                hidden = hidden.to(self.placement.layers[index])
            hidden, left = layer(hidden, step, None if cache is None else cache[index])
            passed.append(left)
        hidden = tap(self, "norm", self.norm(hidden))
        if cache is not None:
            cache.commit(layout, [left.state for left in passed if left.state is not None])
        if self.placement is not None:
            layout, states = step.layout, [state.to(hidden.device) for state in states]
            passed = [left.to(hidden.device) for left in passed]
        output = ModelOutput(last_hidden_state=layout.restore(hidden), cache=cache)
        if output_hidden_states:
            output.hidden_states = tuple(layout.restore(state) for state in [*states, hidden])
        if output_attentions:
            output.attentions = tuple(_restored_weights(p.attention, layout) for p in passed if p.attention is not None)
        if with_router_logits:
            output.router_logits = tuple(_in_order(p.router.logits, layout) for p in passed if p.router is not None)
        if output_routing:
            output.routing = self._routing(passed, layout)
        return output, layout, passed

    def _wants_router_logits(self, asked: bool | None) -> bool:
        if asked and not self.config.text_config.is_moe:
            raise ValueError("output_router_logits=True: this configuration is dense and has no routers")
        return self.config.text_config.is_moe and (self.config.output_router_logits if asked is None else asked)

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"give either input_ids or inputs_embeds, got {given}")
        text = self.config.text_config
        if inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != text.hidden_size:
                raise ValueError(f"inputs_embeds {list(inputs_embeds.shape)} must be [B, T, {text.hidden_size}]")
            if inputs_embeds.dtype != self.dtype:
                raise ValueError(f"inputs_embeds are {inputs_embeds.dtype}, the model is {self.dtype}: convert one of them")
            shape = inputs_embeds.shape[:2]
        else:
            assert input_ids is not None
            if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
                raise ValueError(f"input_ids are integers [B, T], got {list(input_ids.shape)} {input_ids.dtype}")
            shape = input_ids.shape
        if shape[0] < 1 or shape[1] < 1:
            raise ValueError(f"the input {list(shape)} holds no token: a prompt needs at least one")
        if input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= text.vocab_size:
                raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary 0 ... {text.vocab_size - 1}")
        return int(shape[0]), int(shape[1])

    def _check_cache(self, cache: Cache | None, layout: TokenLayout) -> None:
        if cache is None:
            return
        if len(cache) != len(self.layers):
            raise ValueError(f"the cache holds {len(cache)} layers, the model has {len(self.layers)}: use model.new_cache")
        if cache.dtype != self.dtype:
            raise ValueError(f"the cache holds {cache.dtype}, the model is {self.dtype}: make one with model.new_cache")
        cache.check_room(layout)
        if cache.max_length is not None and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise ValueError("a static cache is written in place and carries no gradient: use no_grad(), or a growing one")

    def _replay(self, routing: Routing | Tensor | Intervention, layout: TokenLayout) -> ForcedRouting:
        text = self.config.text_config
        if not text.is_moe:
            raise ValueError("routing= needs routers, this configuration is dense")
        return ForcedRouting(
            _by_position(routing, self.source_layers),
            layers=text.num_hidden_layers, num_experts=text.num_experts, top_k=text.num_experts_per_tok,
            shape=layout.shape, arrange=layout.arrange,
        )

    def _rotation(self, position_ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        text, dtype = self.config.text_config, wide_dtype(hidden)
        inv_freq, scale = inverse_frequencies(
            text.rope, text.rotary_dim, text.max_position_embeddings, dtype=dtype, device=hidden.device
        )
        return rotary_tables(position_ids.to(hidden.device), inv_freq, text.rope.mrope_section, scale)

    def _routing(self, passed: Sequence[LayerOutput], layout: TokenLayout) -> Routing:
        chosen = [(index, p.router) for index, p in enumerate(passed) if p.router is not None]
        indices, weights, logits = (
            torch.stack([_in_order(getattr(choice, name), layout) for _, choice in chosen])
            for name in ("indices", "weights", "logits")
        )
        layers = tuple(self.source_layers[index] for index, _ in chosen)
        return Routing(indices, weights, logits, layers, self.config.text_config.num_experts, layout.shape, layout.mask())


def _by_position(routing: Routing | Tensor | Intervention, layers: tuple[int, ...]) -> Routing | Tensor | Intervention:
    """Routing that names layers as the checkpoint does, for a model that has some of them at other places."""
    if layers == tuple(range(len(layers))) or isinstance(routing, Tensor):
        return routing
    if not isinstance(routing, Routing):
        decide = routing
        return (lambda layer, logits: decide(layers[layer], logits)) if callable(decide) else decide
    if beyond := [layer for layer in routing.layers if layer not in layers]:
        raise ValueError(f"the routing holds layer {beyond[-1]}, the model has the layers {list(layers)}")
    return replace(routing, layers=tuple(layers.index(layer) for layer in routing.layers))


def _in_order(rows: Tensor, layout: TokenLayout) -> Tensor:
    """[rows * tokens, ...] of the layers to [B * T, ...] of the caller."""
    return layout.restore(rows.unflatten(0, (layout.rows, layout.tokens))).flatten(0, 1)


def _restored_weights(weights: Tensor, layout: TokenLayout) -> Tensor:
    """Attention weights [rows, H, tokens, slots] to the caller's [B, H, T, slots], slots too where they are the tokens."""
    if layout.source is None:
        return weights
    if weights.shape[-1] != layout.tokens:
        return layout.restore(weights.transpose(1, 2)).transpose(1, 2)
    row, place = layout.source // layout.shape[1], layout.source % layout.shape[1]
    valid = torch.ones_like(row, dtype=torch.bool) if layout.valid is None else layout.valid
    together = valid[:, :, None] & valid[:, None] & (row[:, :, None] == row[:, None])
    r, i, j = together.nonzero(as_tuple=True)
    whole = weights.new_zeros(layout.shape[0], *[layout.shape[1]] * 2, weights.shape[1])
    where = (row[r, i], place[r, i], place[r, j])
    return whole.index_put(where, weights.permute(0, 2, 3, 1)[r, i, j]).permute(0, 3, 1, 2)


class Qwen3_5MoeForCausalLM(PretrainedModel):
    """The decoder with its head, and the training loss."""

    text_model: type[Qwen3_5MoeTextModel] = Qwen3_5MoeTextModel

    def __init__(self, config: Config | TextConfig) -> None:
        super().__init__(config)
        text = self.config.text_config
        self.model: Any = self._build()
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.tie_weights()

    def _build(self) -> PretrainedModel:
        return self.text_model(self.config)

    @property
    def decoder(self) -> Qwen3_5MoeTextModel:
        """The model without its head (and, in the multimodal class, without its tower)."""
        return self.model

    def tie_weights(self) -> None:
        """Shares the embedding with the head where the configuration says tie_word_embeddings."""
        if self.config.text_config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.decoder.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def forward(
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
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
    ) -> ModelOutput:
        """Logits, and with labels the loss; see `Qwen3_5MoeTextModel.forward` for the inputs.

        labels [B, T] are token ids, -100 where nothing is to be learnt; position t is trained on label t + 1, never
        across packed documents or padding. The loss is the mean over labels, or the sum over num_items_in_batch, plus
        router_aux_loss_coef times the load-balancing loss when router logits are asked for. output_logits=False
        computes the loss without ever holding the logits. logits_to_keep: only the last n positions, or those of a
        tensor of indices.
        """
        if labels is None and not output_logits:
            raise ValueError("output_logits=False computes the loss alone and needs labels")
        if labels is not None:
            self._check_labels(labels, input_ids if input_ids is not None else inputs_embeds)
        _check_kept(logits_to_keep, input_ids if input_ids is not None else inputs_embeds)
        output, layout, passed = self.decoder.run(
            input_ids, attention_mask, position_ids, inputs_embeds, cache, cu_seqlens, routing,
            output_router_logits, output_routing, output_hidden_states, output_attentions,
        )
        hidden = output.last_hidden_state
        assert hidden is not None
        targets = None if labels is None else _targets(labels.to(hidden.device), layout)
        if self.placement is not None:
            hidden, targets = hidden.to(self.placement.head), moved(targets, self.placement.head)
        if output_logits:
            kept = hidden[:, _kept(logits_to_keep)]
            output.logits = self.lm_head(kept)
        else:
            output = LossOutput(**vars(output))
        if targets is not None:
            output.loss = self._loss(output, hidden, targets, num_items_in_batch, logits_to_keep)
        if output.router_logits is not None:
            choices = [p.router for p in passed if p.router is not None]
            valid = layout.valid
            mask = None if valid is None else valid.flatten()
            output.aux_loss = load_balancing_loss([c.logits for c in choices], [c.indices for c in choices], mask=mask)
            if output.loss is not None:
                balance = self.config.text_config.router_aux_loss_coef * output.aux_loss
                output.loss = output.loss + balance.to(output.loss.device)
        return output

    def _check_labels(self, labels: Tensor, inputs: Tensor | None) -> None:
        check_tensors(labels=labels)
        if not isinstance(inputs, Tensor):
            return  # refused with a better message below
        if labels.shape != inputs.shape[:2] or labels.is_floating_point():
            raise ValueError(f"labels {list(labels.shape)} {labels.dtype} must be integers {list(inputs.shape[:2])}")
        words = self.config.text_config.vocab_size
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= words))]
            if wrong.numel():
                raise ValueError(f"label {int(wrong[0])} is neither {IGNORE} nor in the vocabulary 0 ... {words - 1}")

    def _loss(
        self, output: ModelOutput, hidden: Tensor, targets: Tensor, num_items: int | Tensor | None, keep: int | Tensor
    ) -> Tensor:
        whole = isinstance(keep, int) and keep == 0
        if whole and not isinstance(output, LossOutput) and output.logits is not None:
            return cross_entropy(output.logits.flatten(0, 1), targets.flatten(), num_items=num_items)
        return ops.linear_cross_entropy(
            hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), num_items=num_items, caller=self
        )


def _targets(labels: Tensor, layout: TokenLayout) -> Tensor:
    """The label of each position's prediction [B, T], -100 at padding and at the end of rows and documents."""
    arranged = layout.arrange(labels - IGNORE) + IGNORE  # padding becomes -100
    return layout.restore(shift_labels(arranged, layout.cu_seqlens) - IGNORE) + IGNORE


def check_tensors(**given: object) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: give a tensor")


def check_cache(cache: object, rows: int) -> None:
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"the cache is a {type(cache).__name__}, this model needs its own: model.new_cache({rows})")


def _check_kept(keep: int | Tensor, inputs: Tensor | None) -> None:
    if not isinstance(keep, Tensor):
        if keep < 0:
            raise ValueError(f"logits_to_keep={keep} must be a number of positions >= 0")
        return
    if keep.dim() != 1 or keep.is_floating_point() or keep.dtype == torch.bool:
        raise ValueError(f"logits_to_keep is a number or integers [positions], got {list(keep.shape)} {keep.dtype}")
    if isinstance(inputs, Tensor) and inputs.dim() > 1 and keep.device.type == "cpu" and not torch.compiler.is_compiling():
        beyond = keep[(keep < -inputs.shape[1]) | (keep >= inputs.shape[1])]
        if beyond.numel():
            raise ValueError(f"logits_to_keep names position {int(beyond[0])}, the input has {inputs.shape[1]}")


def _kept(logits_to_keep: int | Tensor) -> Any:
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(-logits_to_keep, None) if logits_to_keep else slice(None)


class Qwen3_5TextModel(Qwen3_5MoeTextModel):
    """The dense siblings' decoder: one MLP per layer instead of experts."""

    dense = True


class Qwen3_5ForCausalLM(Qwen3_5MoeForCausalLM):
    """The dense siblings' decoder with its head."""

    dense = True
    text_model = Qwen3_5TextModel
