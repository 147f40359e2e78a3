# pyright: strict
"""What to use for a name that this library does not have: misspelt names, and names of transformers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Names that scripts for transformers import beside the model, and what takes their place.
_INSTEAD = {
    "TextStreamer": "use transformers.TextStreamer(tokenizer) as streamer=, or model.stream(...)",
    "TextIteratorStreamer": "use transformers.TextIteratorStreamer(tokenizer) as streamer=, or model.stream(...)",
    "Trainer": "use transformers.Trainer: it trains these models",
    "TrainingArguments": "use transformers.TrainingArguments",
    "DataCollatorForLanguageModeling": "use that of transformers",
    "set_seed": "use torch.manual_seed, or seed= of generate",
    "BitsAndBytesConfig": "load in bfloat16 and quantise with torchao.quantize_(model, ...)",
    "DynamicCache": "use model.new_cache(batch_size), or past_key_values=None",
    "StaticCache": "use model.new_cache(batch_size, max_length=...)",
    "PreTrainedModel": "the base class is qwen35moe.models.base.PretrainedModel",
    "PretrainedConfig": "use qwen35moe.Config",
    "PreTrainedConfig": "use qwen35moe.Config",
    "PreTrainedTokenizerFast": "use qwen35moe.AutoTokenizer",
    "Qwen2TokenizerFast": "use qwen35moe.AutoTokenizer",
    "Qwen2Tokenizer": "use qwen35moe.AutoTokenizer",
    "Qwen3VLProcessor": "use qwen35moe.AutoProcessor",
    "AutoImageProcessor": "use qwen35moe.AutoProcessor",
    "AutoVideoProcessor": "use qwen35moe.AutoProcessor",
    "AutoModelForVision2Seq": "use qwen35moe.AutoModelForImageTextToText",
    "TextGenerationPipeline": 'use qwen35moe.pipeline("text-generation", model=...)',
}
_HEADS = re.compile(r".*For(SequenceClassification|TokenClassification|QuestionAnswering|MaskedLM|Seq2SeqLM|.*Classification)$")
_FAMILY = re.compile(r"Qwen3_?5(Moe)?(Text|Vision)?(.*)$")
_OTHER = re.compile(r"(Qwen[234]|Llama|Mistral|Mixtral|Gemma|Deepseek)\w*(Model|LM|Generation|Config|Processor)$")


def unknown_attribute(name: str, known: Iterable[str]) -> str:
    """The message for a name that the package does not have."""
    start, public = f"module 'qwen35moe' has no attribute {name[:60]!r}", sorted(known)
    if name in _INSTEAD:
        return f"{start}: {_INSTEAD[name]}"
    match = _FAMILY.match(name)
    if match and match[3] == "Config":
        part = {"Text": "TextConfig", "Vision": "VisionConfig", None: "Config"}[match[2]]
        return f"{start}: use qwen35moe.{part}, which serves mixtures of experts and dense models"
    if match and match[3] in ("Processor", "Tokenizer", "TokenizerFast"):
        return f"{start}: use qwen35moe.Auto{match[3].removesuffix('Fast')}"
    if match and match[2] == "Vision" and match[3] == "Model":
        return f"{start}: use qwen35moe.Qwen3_5MoeVisionModel, the tower of both families"
    if _HEADS.match(name):
        return f"{start}: there are no classification heads here; put one on qwen35moe.AutoModel"
    near = difflib.get_close_matches(name, public, n=3, cutoff=0.6)
    if near and not (_OTHER.match(name) and not match):
        return f"{start}: did you mean {' or '.join(near)}?"
    if _OTHER.match(name):
        classes = ", ".join(near) or "AutoModelForCausalLM"
        return f"{start}: it belongs to another architecture; this library has Qwen3.5, as {classes}"
    return f"{start}; it has {', '.join(public)}"
