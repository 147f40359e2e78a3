"""The text model: embedding, decoder layers, final norm; and the same with a language-model head.

    h = embed(tokens);  h = layer(h) for each layer;  logits = W_head rms_norm(h)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qwen35moe.cache.layout import TokenLayout
from qwen35moe.compat.forward import FORWARD
from qwen35moe.models.arguments import takes
from qwen35moe.models.base import PretrainedModel
from qwen35moe.models.for_libraries import HeadForLibraries
from qwen35moe.models.head import dtype_of, linear_loss, logits_of
from qwen35moe.models.inputs import CausalLMInputs, TextInputs, body_arguments, forced_routing, prepared
from qwen35moe.models.outputs import DecoderOutput, LossOutput, ModelOutput, returned
from qwen35moe.modules.context import LayerContext, LayerOutput
from qwen35moe.modules.decoder import DecoderLayer
from qwen35moe.modules.embedding import Embedding
from qwen35moe.modules.initialise import initialise, leave_inference_mode
from qwen35moe.modules.norm import RMSNorm
from qwen35moe.ops.losses import IGNORE, cross_entropy, shift_labels
from qwen35moe.ops.mrope import rotary_tables
from qwen35moe.ops.precision import wide_dtype
from qwen35moe.ops.rope import inverse_frequencies
from qwen35moe.taps import note_rows, tap


class Qwen3_5MoeTextModel(PretrainedModel):
    """The decoder without its head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = self.config.text_config
        pad = text.pad_token_id if isinstance(text.pad_token_id, int) else None
        if pad is not None and not -text.vocab_size <= pad < text.vocab_size:
            pad = None  # the embedding has no row of this id
        # padding_idx: this row gets no gradient (as in transformers)
        self.embed_tokens = Embedding(text.vocab_size, text.hidden_size, padding_idx=pad)
        self.layers = nn.ModuleList(DecoderLayer(text, index) for index in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        # The layers' numbers in the checkpoint, for routing and named values: a model may have some of its layers only.
        self.source_layers: tuple[int, ...] = tuple(range(text.num_hidden_layers))
        initialise(self, text.initializer_range)
        leave_inference_mode(self)
        self.name_parts()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layers; the embedding, the norms, the routers and the head may have a wider one."""
        layer: Any = self.layers[0]
        projection = layer.linear_attn.in_proj_qkv if layer.kind == "linear_attention" else layer.self_attn.q_proj
        return dtype_of(projection) or self.embed_tokens.weight.dtype

    @takes(TextInputs, FORWARD)
    def forward(self, inputs: TextInputs) -> ModelOutput:
        """Hidden states [B, T, D] of a batch of token rows."""
        inputs, layout = prepared(inputs, self)
        return returned(self.run_layers(inputs, layout, self.embed(inputs)).results(inputs, self), inputs)

    def embed(self, inputs: TextInputs) -> Tensor:
        """Embeddings [B, T, D] in the dtype of the layers."""
        if inputs.inputs_embeds is not None:
            return inputs.inputs_embeds
        return self.embed_tokens(inputs.input_ids).to(self.dtype)

    def run_layers(self, inputs: TextInputs, layout: TokenLayout, embeds: Tensor) -> DecoderOutput:
        """Layers and final norm of a checked call, from embeddings [B, T, D]; updates the cache."""
        cache, device_map = inputs.cache, self.device_map
        note_rows((layout.rows, layout.tokens), layout.lengths)
        hidden = tap(self, "embed", layout.arrange(embeds))
        rotation = self.rotation(layout.position_ids, hidden)
        forced = None if inputs.routing is None else forced_routing(inputs.routing, layout, self)
        record = cache is not None and cache.record > 0
        context = LayerContext(layout, rotation, forced, record, inputs.output_attentions)
        states: list[Tensor] = []
        outputs: list[LayerOutput] = []
        for index, layer in enumerate(self.layers):
            if inputs.output_hidden_states:
                states.append(hidden)
            if device_map is not None and device_map.layers[index] != hidden.device:
                hidden, context = hidden.to(device_map.layers[index]), context.to(device_map.layers[index])
            hidden, output = layer(hidden, context, None if cache is None else cache._layers[index])
            outputs.append(output)
        hidden = tap(self, "norm", self.norm(hidden))
        if cache is not None:
            cache.commit(layout, [output.state for output in outputs if output.state is not None], inputs.input_ids)
        if device_map is not None:
            states, outputs = [state.to(hidden.device) for state in states], [out.to(hidden.device) for out in outputs]
        return DecoderOutput(context.layout, hidden, states, outputs)

    def rotation(self, position_ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [rows, tokens, R/2] of positions [3, rows, tokens] (M-RoPE), shared by all attention layers."""
        text, dtype, device = self.config.text_config, wide_dtype(hidden), hidden.device
        rope = text.rope
        frequencies, scale = inverse_frequencies(rope, text.rotary_dim, text.max_position_embeddings, device=device)
        return rotary_tables(position_ids.to(device), frequencies, rope.mrope_section, scale, dtype)


class Qwen3_5MoeForCausalLM(HeadForLibraries, PretrainedModel):
    """The decoder with its head, and the training loss."""

    text_model: type[Qwen3_5MoeTextModel] = Qwen3_5MoeTextModel
    body_inputs: type[TextInputs] = TextInputs  # the arguments that `model` takes

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = self.config.text_config
        self.model: Any = self._build()
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.tie_weights()
        if self.lm_head.weight is not self.get_input_embeddings().weight:
            initialise(self, text.initializer_range)
        leave_inference_mode(self)

    def _build(self) -> PretrainedModel:
        return self.text_model(self.config)

    @property
    def decoder(self) -> Qwen3_5MoeTextModel:
        """The model without its head (and, in the multimodal class, without its tower)."""
        return self.model

    def get_decoder(self) -> Qwen3_5MoeTextModel:
        """The same as `decoder`, as a method."""
        return self.decoder

    def tie_weights(self, missing_keys: Any = None, recompute_mapping: bool = True) -> None:
        """Shares the embedding with the head where the configuration has tie_word_embeddings."""
        if self.config.text_config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.decoder.embed_tokens

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    @takes(CausalLMInputs, FORWARD)
    def forward(self, inputs: CausalLMInputs) -> ModelOutput:
        """Logits [B, T, vocabulary]; with labels also the loss, to which router_aux_loss_coef times the load-balancing
        loss is added when router logits are returned."""
        return self.run(inputs)

    def run(self, inputs: CausalLMInputs) -> ModelOutput:
        """Checks a call once, calls the model without its head, and computes logits and losses."""
        inputs, layout = prepared(inputs, self.decoder)
        return returned(self.predict(inputs, layout, self.model(**body_arguments(self.body_inputs, inputs, layout))), inputs)

    def predict(self, inputs: CausalLMInputs, layout: TokenLayout, body: ModelOutput) -> ModelOutput:
        """Logits and losses from the output of the model without its head, which hooks may have changed."""
        results: dict[str, Any] = dict(body) if isinstance(body, dict) else {"last_hidden_state": body[0]}
        hidden, balance = results.pop("last_hidden_state"), results.pop("balancing_loss", None)
        targets = None
        if inputs.labels is not None:
            layout = layout if self.device_map is None else layout.to(hidden.device)
            targets = next_tokens(inputs.labels.to(hidden.device, non_blocking=hidden.is_cuda), layout)
        if self.device_map is not None:
            hidden = hidden.to(self.device_map.head)
            targets = None if targets is None else targets.to(self.device_map.head)
        if inputs.output_logits:
            keep = inputs.logits_to_keep
            kept = hidden[:, keep if isinstance(keep, Tensor) else slice(-keep, None)]  # 0: all
            results["logits"] = logits_of(self.lm_head, kept)
        if targets is not None:
            results["loss"] = self._loss(inputs, results.get("logits"), hidden, targets, layout)
        if balance is not None:
            results["aux_loss"] = balance
            if targets is not None:
                weighted = self.config.text_config.router_aux_loss_coef * balance
                results["loss"] = results["loss"] + weighted.to(results["loss"].device)
        return ModelOutput(results) if inputs.output_logits else LossOutput(results)

    def _loss(
        self, inputs: CausalLMInputs, logits: Tensor | None, hidden: Tensor, targets: Tensor, layout: TokenLayout
    ) -> Tensor:
        """Cross-entropy from the logits if all of them were computed, else from the hidden states in blocks of tokens; or the
        loss_function that was assigned."""
        keep, num_items = inputs.logits_to_keep, inputs.num_items_in_batch
        whole = logits is not None and isinstance(keep, int) and keep == 0
        if "_loss_function" in self.__dict__:
            logits = logits if whole else logits_of(self.lm_head, hidden)
            options: dict[str, Any] = {} if num_items is None else {"num_items_in_batch": num_items}
            if layout.cu_seqlens is not None or layout.source is not None:
                options["shift_labels"] = targets  # without labels across documents and padding
            return self.loss_function(logits, inputs.labels, self.config.text_config.vocab_size, **options)
        if logits is not None and whole:
            return cross_entropy(logits.flatten(0, 1), targets.flatten(), num_items=num_items)
        return linear_loss(self.lm_head, hidden.flatten(0, 1), targets.flatten(), num_items=num_items, caller=self)


def next_tokens(labels: Tensor, layout: TokenLayout) -> Tensor:
    """The label that each position predicts [B, T], -100 at padding and at the end of rows and documents."""
    arranged = layout.arrange(labels - IGNORE) + IGNORE  # padding becomes -100
    return layout.restore(shift_labels(arranged, layout.cu_seqlens) - IGNORE) + IGNORE


class Qwen3_5TextModel(Qwen3_5MoeTextModel):
    """The dense siblings' decoder: one MLP per layer instead of experts."""

    dense = True


class Qwen3_5ForCausalLM(Qwen3_5MoeForCausalLM):
    """The dense siblings' decoder with its head."""

    dense = True
    text_model = Qwen3_5TextModel
