"""Attributes and methods with transformers' names that other libraries ask a model or its configuration for.

Each is there because a library needs it, and a test runs that library or states the value. docs/guide/from_transformers.md is
generated from this table too.
"""

from __future__ import annotations

from dataclasses import dataclass

_TRAINER = "tests/integrations/test_trainer.py::"
_PEFT = "tests/integrations/test_peft.py::"
_ACCELERATE = "tests/integrations/test_accelerate.py::"
_MODELS = "tests/models/test_for_libraries.py::"


@dataclass(frozen=True)
class Attribute:
    """name: an attribute or method of a model, or config.NAME of its configuration. what: what it is or does here. asked_by:
    the library that reads it. tested_by: a test that exists."""

    name: str
    what: str
    asked_by: str
    tested_by: str


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("accepts_loss_kwargs", "True: forward takes num_items_in_batch, so that accumulated steps are exact", "Trainer",
              _TRAINER + "test_accumulated_steps_are_those_of_a_written_out_loop"),
    Attribute("loss_type", '"ForCausalLM": the model shifts labels, so that the first of a row is not counted', "Trainer",
              _TRAINER + "test_trainer_finds_what_it_asks_a_model_for"),
    Attribute("loss_function", "the loss of logits, labels and num_items_in_batch; can be assigned", "TRL",
              _TRAINER + "test_the_loss_function_is_that_of_transformers"),
    Attribute("num_parameters(only_trainable=, exclude_embeddings=)", "counts; a tied head once", "Trainer, lm-eval",
              _TRAINER + "test_operations_and_parameters_are_counted"),
    Attribute("floating_point_ops, estimate_tokens", "6 * tokens * parameters, all experts included", "Trainer",
              _TRAINER + "test_operations_and_parameters_are_counted"),
    Attribute("gradient_checkpointing_enable(gradient_checkpointing_kwargs=, every_n_layers=), ..._disable, "
              "activation_checkpointing_...", "use_reentrant has no effect; options that would change something raise",
              "Trainer",
              _TRAINER + "test_checkpointing_of_activations_changes_no_gradient"),
    Attribute("is_gradient_checkpointing, supports_gradient_checkpointing", "as named", "Trainer, peft",
              _MODELS + "test_every_nth_layer_is_checkpointed"),
    Attribute("enable_input_require_grads, disable_input_require_grads", "a hook on the embedding, once", "peft",
              _MODELS + "test_the_embedding_requires_a_gradient_until_it_is_disabled"),
    Attribute("_tied_weights_keys, all_tied_weights_keys, _keys_to_ignore_on_save", "the names that share a parameter",
              "peft, accelerate, Trainer", _MODELS + "test_tied_names_are_those_that_share_a_parameter"),
    Attribute("tie_weights", "shares embedding and head where the configuration says so", "accelerate, lm-eval",
              _MODELS + "test_tied_names_are_those_that_share_a_parameter"),
    Attribute("get_input_embeddings, set_input_embeddings", "the token embedding; its rows become vocab_size", "peft",
              _MODELS + "test_embedding_and_head_can_be_replaced"),
    Attribute("get_output_embeddings, set_output_embeddings", "the head; another one makes tie_word_embeddings false", "peft",
              _MODELS + "test_embedding_and_head_can_be_replaced"),
    Attribute("resize_token_embeddings", "old rows stay, new ones are their mean (or normal); configuration and tying follow",
              "scripts that add tokens", _MODELS + "test_resizing_keeps_rows_and_answers"),
    Attribute("get_decoder, set_decoder, base_model, base_model_prefix", "the model without its head", "peft, TRL",
              _MODELS + "test_the_decoder_is_found_and_replaced"),
    Attribute("can_generate", "True for a class with a head", "Trainer, pipeline", _MODELS + "test_constants"),
    Attribute("device, dtype", "those of the token embedding; with offloaded weights the device to which they are brought",
              "lm-eval, pipeline", _ACCELERATE + "test_weights_on_the_cpu_or_disk_until_they_are_used"),
    Attribute("name_or_path", "the folder or Hub name that was loaded", "peft, lm-eval",
              _PEFT + "test_an_adapter_names_its_base_model"),
    Attribute("hf_device_map", "only of a model on several devices, so that libraries do not move it to one",
              "Trainer, peft, pipeline", _MODELS + "test_a_placed_model_has_a_device_map"),
    Attribute("main_input_name, input_modalities, is_parallelizable, is_loaded_in_8bit, is_loaded_in_4bit, is_quantized, "
              "quantization_method, hf_quantizer, warnings_issued", "constants", "Trainer, peft", _MODELS + "test_constants"),
    Attribute("_no_split_modules", "decoder layers and vision blocks", "accelerate",
              _ACCELERATE + "test_whole_layers_are_distributed"),
    Attribute("add_model_tags, model_tags", "tags for a model card", "Trainer, TRL", _MODELS + "test_constants"),
    Attribute("get_memory_footprint", "bytes of parameters and buffers", "scripts", _MODELS + "test_constants"),
    Attribute("config.keys_to_ignore_at_inference", "all results but logits, hidden states and attention weights", "Trainer",
              _TRAINER + "test_evaluation_and_prediction"),
    Attribute("config.tie_word_embeddings, config.vocab_size, config.use_cache, config.pad_token_id, ... assigned",
              "accepted and checked", "Trainer, peft", _TRAINER + "test_padded_batches_of_a_language_modelling_collator"),
)  # fmt: skip
