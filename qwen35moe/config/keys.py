"""Keys of a configuration that are not fields, and the check for unknown keys.

Other programs add keys to files. Every key is one of four: a field (declared by the classes), a key with only one supported
value (`FIXED_*`: any other value would change the mathematics), a key without effect in this library (`INERT*`, each with
its reason), or unknown. An unknown key is an error, because ignoring it may change what the model computes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from .checks import Check, ConfigError, one_of, shown

MOE, DENSE = "qwen3_5_moe", "qwen3_5"  # the two families, as model_type names them
MAX_DEPTH = 32  # nesting of a configuration; published files reach 4


def family(model_type: Any) -> str:
    """MOE or DENSE, from a model_type of a text, vision or whole model."""
    name = model_type.removesuffix("_text").removesuffix("_vision") if isinstance(model_type, str) else model_type
    if name not in (MOE, DENSE):
        raise ConfigError(
            f"model_type = {shown(model_type)} is not supported; this library implements {MOE} and {DENSE}, "
            "each also with the suffix _text for a model without vision"
        )
    return name


# Keys with one supported value. Other values select mathematics that no published Qwen3.5 model uses and that the original
# implementation does not read either.
FIXED_TEXT: dict[str, Check] = {
    "attn_output_gate": one_of(True),  # q_proj always contains a gate for every query
    "output_gate_type": one_of("swish", "silu", None),  # the gate of the delta rule's output norm; two names of one function
    "mamba_ssm_dtype": one_of("float32", None),  # the recurrent state's dtype; tests and kernels rely on it
    "mlp_only_layers": one_of([], (), None),  # every layer of a MoE model is sparse
    "decoder_sparse_step": one_of(1, None),
    "moe_layer_freq": one_of(1, None),
    "norm_topk_prob": one_of(True, None),  # the weights of the top-k experts always sum to 1
    "scoring_func": one_of("softmax", None),
    "routed_scaling_factor": one_of(1, None),
    "mtp_use_dedicated_embeddings": one_of(False, None),  # the MTP head shares the embedding
    "use_sliding_window": one_of(False, None),
    "sliding_window": one_of(None),
    "is_causal": one_of(True, None),
    "per_layer_config": one_of(None),  # transformers' overrides for single layers
}
FIXED_VISION: dict[str, Check] = {
    "deepstack_visual_indexes": one_of([], (), None),  # no published file has deepstack mergers
}


def _axial(name: str, value: Any) -> None:
    """transformers writes the parameters of the tower's rotation; they are the same in every published model."""
    if not isinstance(value, Mapping):
        return one_of(None)(name, value)
    rest = {key: item for key, item in value.items() if item is not None}
    for key, check in (("rope_type", one_of("axial", "default")), ("rope_theta", one_of(10_000))):
        if key in rest:
            check(f"{name}.{key}", rest.pop(key))
    if rest:
        raise ConfigError(unknown_message(name, list(rest), rest, ("rope_type", "rope_theta")))


FIXED_VISION["rope_parameters"] = _axial

_GENERATION = "a default of generate(): kept in generation_config.json, and passed to generate() here"
_TASK = "belongs to transformers' classification heads, which this library does not have"
_RETURN = "an argument of each call decides what it returns"
_WRITTEN = "names the program that wrote the file"
_BERT = "an option of other architectures that transformers writes into every file"
INERT: dict[str, str] = {
    "transformers_version": _WRITTEN,
    "unsloth_version": _WRITTEN,
    "unsloth_fixed": _WRITTEN,
    "name_or_path": _WRITTEN,
    "auto_map": "names code inside the checkpoint; code from a checkpoint is never run",
    "tokenizer_class": "the tokenizer's own files decide it",
    "processor_class": "the processor's own files decide it",
    "language_model_only": "makes servers leave out the vision tower; here the class decides that",
    "return_dict": _RETURN,
    "output_hidden_states": _RETURN,
    "output_attentions": _RETURN,
    "attn_implementation": "chosen by backends.use, not by the file",
    "experts_implementation": "chosen by backends.use, not by the file",
    "torchscript": _BERT,
    "chunk_size_feed_forward": "splits the MLP over the sequence without changing its result",
    "is_decoder": _BERT,
    "is_encoder_decoder": _BERT,
    "add_cross_attention": _BERT,
    "cross_attention_hidden_size": _BERT,
    "tie_encoder_decoder": _BERT,
    "pruned_heads": _BERT,
    "prefix": _BERT,
    "task_specific_params": _BERT,
    "max_window_layers": "read only together with use_sliding_window, which must be false",
    "id2label": _TASK,
    "label2id": _TASK,
    "num_labels": _TASK,
    "problem_type": _TASK,
    "finetuning_task": _TASK,
} | dict.fromkeys(
    "max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff eta_cutoff".split(),
    _GENERATION,
)
INERT_TOP = INERT | dict.fromkeys(
    ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
    "the value in text_config is used; other programs write a copy beside it",
)


INERT_VISION = INERT | dict.fromkeys(("dtype", "torch_dtype"), "the tower has the dtype of its tensors on disk")


def check_keys(where: str, values: Mapping[str, Any], known: Iterable[str], fixed: Mapping[str, Check],
               inert: Mapping[str, str]) -> dict[str, Any]:
    """The fields in `values`. Fixed keys must have their supported value; one error names all unknown keys.

    A key with the value null has no effect, and a key that starts with an underscore is a note of the program that wrote
    it, so neither counts as unknown.
    """
    known = set(known)
    kept, unknown = {}, []
    for key, value in values.items():
        if key in known:
            kept[key] = value
        elif key in fixed:
            fixed[key](f"{where}.{key}" if where else key, value)
        elif key not in inert and not key.startswith("_") and value is not None:
            unknown.append(key)
    if unknown:
        raise ConfigError(unknown_message(where, unknown, values, known | set(fixed)))
    return kept


def unknown_message(where: str, unknown: list[str], values: Mapping[str, Any], known: Iterable[str]) -> str:
    """Every unknown key with its value and similar known names."""
    lines = []
    for key in unknown[:20]:
        near = difflib.get_close_matches(key[:100], sorted(known), n=3, cutoff=0.6)
        hint = f" (close to {', '.join(near)})" if near else ""
        name = key if key.isidentifier() and len(key) < 80 else shown(key)
        lines.append(f"{name} = {shown(values[key])}{hint}")
    more = f"; and {len(unknown) - 20} more" if len(unknown) > 20 else ""
    place = where or "the configuration"
    return (
        f"unknown in {place}: {'; '.join(lines)}{more}. Ignoring a key could change what the model computes: "
        "correct its name, or remove it if it is a note of another program"
    )


def check_depth(value: Any, limit: int = MAX_DEPTH) -> None:
    """Refuse nesting deeper than `limit`, without recursion; later steps (copies, repr, JSON) recurse."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, (Mapping, list, tuple))
            for child in (item.values() if isinstance(item, Mapping) else item)
        ]
        if not level:
            return
    raise ConfigError(f"the configuration is nested more than {limit} deep; published files reach 4")
