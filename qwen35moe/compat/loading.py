"""transformers' keywords of from_pretrained and from_config, of the model classes and the Auto classes.

Keywords with the same name and meaning (dtype, config, revision, token, cache_dir, local_files_only, force_download, subfolder,
output_loading_info, generation_config) are parameters. So are fields of the configuration (output_router_logits=True, ...).
"""

from __future__ import annotations

from typing import Any

from .keyword import Keyword, anything

_TESTS = "tests/models/test_loading_keywords.py::"
_SAME = _TESTS + "test_a_keyword_of_transformers_does_the_same_as_ours"
_NEUTRAL = _TESTS + "test_neutral_keywords_change_nothing"
_REFUSED = _TESTS + "test_other_values_are_refused_with_the_way_out"
_FORMAT = "safetensors is the only format that is read"
_QUANTISE = "load in bfloat16, then quantise, as with torchao.quantize_(model, ...)"
_DEVICES = 'several devices of one process: device_map="auto"'
_WHOLE = ("balanced", "balanced_low_0", "sequential")


def as_device(value: Any) -> Any:
    """Our `device` of a device_map: a strategy is "auto", {"": device} is the device, an integer is a GPU."""
    if isinstance(value, str) and value in _WHOLE:
        return "auto"
    if isinstance(value, dict) and set(value) == {""}:
        value = value[""]
    return f"cuda:{value}" if isinstance(value, int) and not isinstance(value, bool) else value


def as_attention(value: Any) -> Any:
    """The implementation of attention of an attn_implementation; "auto" for sdpa, which takes the fastest that can run."""
    names = {"sdpa": "auto", "eager": "eager", "flash_attention_2": "flash_attn"}
    values = set(value.values()) if isinstance(value, dict) else {value}
    if len(values) != 1 or not isinstance(value := values.pop(), str) or value not in names:
        raise ValueError(
            f"from_pretrained(attn_implementation={value!r}) is not supported: give {', '.join(names)}, or choose by "
            'model.use_backends(attention=...); qwen35moe.backends.describe() lists what this machine has'
        )
    return names[value]


LOADING: tuple[Keyword, ...] = (
    Keyword("pretrained_model_name_or_path", becomes="path", tested_by=_SAME),
    Keyword("torch_dtype", becomes="dtype", tested_by=_SAME),
    Keyword("device_map", becomes="device", convert=as_device, tested_by=_SAME),
    Keyword("use_auth_token", becomes="token", tested_by=_SAME),
    Keyword("attn_implementation", becomes="attention", convert=as_attention, tested_by=_SAME),
    Keyword("trust_remote_code", neutral=anything, instead="no code of a checkpoint is run", tested_by=_NEUTRAL),
    Keyword("code_revision", neutral=anything, instead="no code of a checkpoint is run", tested_by=_NEUTRAL),
    Keyword("low_cpu_mem_usage", neutral=anything, instead="weights go straight to their place", tested_by=_NEUTRAL),
    Keyword("weights_only", neutral=anything, instead="no pickle is read", tested_by=_NEUTRAL),
    Keyword("offload_folder", neutral=anything, instead="nothing is offloaded: a model that does not fit is refused",
            tested_by=_NEUTRAL),
    Keyword("offload_state_dict", neutral=anything, instead="weights are read straight to their place", tested_by=_NEUTRAL),
    Keyword("offload_buffers", neutral=anything, instead="the model has no buffers", tested_by=_NEUTRAL),
    Keyword("resume_download", neutral=anything, instead="a download is always resumed", tested_by=_NEUTRAL),
    Keyword("tqdm_class", neutral=anything, tested_by=_NEUTRAL),
    Keyword("adapter_name", neutral=anything, tested_by=_NEUTRAL),
    Keyword("adapter_kwargs", neutral=({},), instead="use peft.PeftModel.from_pretrained(model, ...)", tested_by=_REFUSED),
    Keyword("_from_auto", neutral=anything, tested_by=_NEUTRAL),
    Keyword("_from_pipeline", neutral=anything, tested_by=_NEUTRAL),
    Keyword("_commit_hash", neutral=anything, tested_by=_NEUTRAL),
    Keyword("_fast_init", neutral=anything, tested_by=_NEUTRAL),
    Keyword("use_safetensors", neutral=(True,), instead=_FORMAT, tested_by=_REFUSED),
    Keyword("from_tf", neutral=(False,), instead=_FORMAT, tested_by=_REFUSED),
    Keyword("from_flax", neutral=(False,), instead=_FORMAT, tested_by=_REFUSED),
    Keyword("gguf_file", instead="convert the file to safetensors first", tested_by=_REFUSED),
    Keyword("variant", instead="give the folder or the revision= with these files", tested_by=_REFUSED),
    Keyword("ignore_mismatched_sizes", neutral=(False,), instead="leave the tensors out by ignore=[...], or correct config=",
            tested_by=_REFUSED),
    Keyword("state_dict", instead="model = cls(config); model.load_state_dict(...)", tested_by=_REFUSED),
    Keyword("key_mapping", instead="rename the tensors, or load them with cls(config).load_state_dict", tested_by=_REFUSED),
    Keyword("quantization_config", instead=_QUANTISE + "; a block-FP8 checkpoint needs no keyword", tested_by=_REFUSED),
    Keyword("load_in_8bit", neutral=(False,), instead=_QUANTISE, tested_by=_REFUSED),
    Keyword("load_in_4bit", neutral=(False,), instead=_QUANTISE, tested_by=_REFUSED),
    Keyword("max_memory", instead='name the devices, as in device=["cuda:0", "cuda:1"]', tested_by=_REFUSED),
    Keyword("experts_implementation", neutral=("grouped_mm", "batched_mm", "sonicmoe"), instead="the fastest that can run is "
            'taken; model.use_backends(experts="loop") chooses one', tested_by=_REFUSED),
    Keyword("use_flash_attention_2", neutral=(False,), instead='give attn_implementation="flash_attention_2"',
            tested_by=_REFUSED),
    Keyword("output_hidden_states", neutral=(False,), instead="pass it to the forward call", tested_by=_REFUSED),
    Keyword("output_attentions", neutral=(False,), instead="pass it to the forward call", tested_by=_REFUSED),
    Keyword("use_kernels", neutral=(False,), instead="own kernels are used where they can run: backends.describe()",
            tested_by=_REFUSED),
    Keyword("kernel_config", instead="choose by model.use_backends(...)", tested_by=_REFUSED),
    Keyword("allow_all_kernels", neutral=(False,), instead="no code of the Hub is run", tested_by=_REFUSED),
    Keyword("fusion_config", instead="choose by model.use_backends(...)", tested_by=_REFUSED),
    Keyword("distributed_config", instead=_DEVICES, tested_by=_REFUSED),
    Keyword("device_mesh", instead=_DEVICES, tested_by=_REFUSED),
    Keyword("tp_plan", instead=_DEVICES, tested_by=_REFUSED),
    Keyword("tp_size", neutral=(1,), instead=_DEVICES, tested_by=_REFUSED),
    Keyword("proxies", instead="set HTTPS_PROXY in the environment", tested_by=_REFUSED),
    Keyword("mirror", instead="set HF_ENDPOINT in the environment", tested_by=_REFUSED),
)  # fmt: skip
