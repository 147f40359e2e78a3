"""The text model: embedding, decoder layers, final norm; and the same with a language-model head.

    h = embed(tokens);  h = layer(h) for each layer;  logits = W_head rms_norm(h)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qwen35moe import ops
from qwen35moe.cache.layout import TokenLayout
from qwen35moe.models.arguments import takes
from qwen35moe.models.base import PretrainedModel
from qwen35moe.models.for_libraries import HeadForLibraries
from qwen35moe.models.inputs import CausalLMInputs, TextInputs, check, forced_routing
from qwen35moe.models.outputs import DecoderOutput, LossOutput, ModelOutput
from qwen35moe.modules.context import LayerContext, LayerOutput
from qwen35moe.modules.decoder import DecoderLayer
from qwen35moe.modules.embedding import Embedding
from qwen35moe.modules.initialise import initialise, leave_inference_mode
from qwen35moe.modules.norm import RMSNorm
from qwen35moe.ops.balancing import load_balancing_loss
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

    @takes(TextInputs)
    def forward(self, inputs: TextInputs) -> ModelOutput:
        """Hidden states [B, T, D] of a batch of token rows."""
        return self.run(inputs).results(inputs, self)

    def run(self, inputs: TextInputs) -> DecoderOutput:
        """Checks a call, embeds its tokens and runs the layers."""
        return self.run_layers(inputs, check(inputs, self), self.embed(inputs))

    def embed(self, inputs: TextInputs) -> Tensor:
        """Embeddings [B, T, D]."""
        return self.embed_tokens(inputs.input_ids) if inputs.inputs_embeds is None else inputs.inputs_embeds

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
        frequencies, scale = inverse_frequencies(
            rope, text.rotary_dim, text.max_position_embeddings, dtype=dtype, device=device
        )
        return rotary_tables(position_ids.to(device), frequencies, rope.mrope_section, scale)


class Qwen3_5MoeForCausalLM(HeadForLibraries, PretrainedModel):
    """The decoder with its head, and the training loss."""

    text_model: type[Qwen3_5MoeTextModel] = Qwen3_5MoeTextModel

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

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    @takes(CausalLMInputs)
    def forward(self, inputs: CausalLMInputs) -> ModelOutput:
        """Logits [B, T, vocabulary]; with labels also the loss, to which router_aux_loss_coef times the load-balancing
        loss is added when router logits are returned."""
        return self.predict(inputs, self.model.run(inputs))

    def predict(self, inputs: CausalLMInputs, decoded: DecoderOutput) -> ModelOutput:
        """Logits and losses from the decoder's hidden states."""
        output = decoded.results(inputs, self.decoder)
        hidden, targets = output.last_hidden_state, None
        assert hidden is not None
        if inputs.labels is not None:
            targets = next_tokens(inputs.labels.to(hidden.device), decoded.layout)
        if self.device_map is not None:
            hidden = hidden.to(self.device_map.head)
            targets = None if targets is None else targets.to(self.device_map.head)
        keep = inputs.logits_to_keep
        if inputs.output_logits:
            output.logits = self.lm_head(hidden[:, keep if isinstance(keep, Tensor) else slice(-keep, None)])  # 0: all
        else:
            output = LossOutput(**vars(output))
        if targets is not None:
            output.loss = self._loss(inputs, output, hidden, targets)
        if output.router_logits is not None:
            valid = decoded.layout.valid
            mask = None if valid is None else valid.flatten()
            logits, indices = ([getattr(c, name) for c in decoded.choices] for name in ("logits", "indices"))
            output.aux_loss = load_balancing_loss(logits, indices, mask=mask)
            if output.loss is not None:
                balance = self.config.text_config.router_aux_loss_coef * output.aux_loss
                output.loss = output.loss + balance.to(output.loss.device)
        return output

    def _loss(self, inputs: CausalLMInputs, output: ModelOutput, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy from the logits if all of them were computed, else from the hidden states in chunks."""
        keep = inputs.logits_to_keep
        if inputs.output_logits and isinstance(keep, int) and keep == 0 and output.logits is not None:
            return cross_entropy(output.logits.flatten(0, 1), targets.flatten(), num_items=inputs.num_items_in_batch)
        return ops.linear_cross_entropy(
            hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(),
            num_items=inputs.num_items_in_batch, caller=self,
        )


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
