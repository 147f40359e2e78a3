"""pipeline(): prompts and conversations in, texts out, with transformers' arguments and results.

    pipe = qwen35moe.pipeline("text-generation", model="tiny")
    pipe("And God said", max_new_tokens=20)[0]["generated_text"]
    pipe([{"role": "user", "content": "Hello"}])[0]["generated_text"][-1]["content"]
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen35moe.compat import short

from .auto import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TASKS = ("text-generation", "image-text-to-text")
MAX_NEW_TOKENS = 256  # as in transformers' pipelines, where neither the call nor the checkpoint has a number


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: Any = None,
    tokenizer: Any = None,
    processor: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    trust_remote_code: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> Pipeline:
    """A pipeline of a model and its tokenizer, or its processor for images and videos.

    task: "text-generation" (also of a multimodal checkpoint, by its text model) or "image-text-to-text".
    model: "tiny", a folder, a name on the Hub, or a model. tokenizer, processor: the same; needed where `model` is an object.
    device, device_map, dtype, revision, token, model_kwargs: for loading, see `Qwen3_5MoeForCausalLM.from_pretrained`.
    keywords: arguments of every call that its own do not replace (max_new_tokens=20, return_full_text=False, ...).
    """
    if task is None and model is not None:
        task = TASKS[0]
    if task not in TASKS:
        raise ValueError(f"pipeline(task={short(task)}) is not supported: give {' or '.join(map(repr, TASKS))}")
    if model is None:
        raise ValueError(f'pipeline({task!r}) needs a model: model="tiny", a folder, a name on the Hub, or a model')
    for other in ("framework", "use_fast", "pipeline_class", "feature_extractor", "image_processor"):
        if keywords.pop(other, None) not in (None, True, False, "pt"):
            raise ValueError(f"pipeline({other}=...) is not supported: give tokenizer= or processor=")
    hub = {name: value for name, value in (("revision", revision), ("token", token)) if value is not None}
    visual, source = task == TASKS[1], model
    if isinstance(model, str | os.PathLike):
        torch_dtype = keywords.pop("torch_dtype", None)
        options = {"device": device, "device_map": device_map, "dtype": dtype, "torch_dtype": torch_dtype, "config": config}
        options = {name: value for name, value in options.items() if value is not None}
        auto = AutoModelForImageTextToText if visual else AutoModelForCausalLM
        if isinstance(device, int):
            options["device"] = "cpu" if device < 0 else f"cuda:{device}"
        model = auto.from_pretrained(source, **{**options, **hub, **(model_kwargs or {})})
    else:
        source = None
        if device is not None:
            model = model.to("cpu" if device == -1 else device)
        loading = {"device_map": device_map, "dtype": dtype, "config": config, "model_kwargs": model_kwargs or None}
        if unused := [name for name, value in loading.items() if value is not None]:
            raise ValueError(f"pipeline({unused[0]}=...) is for loading, and model is an object: load it with {unused[0]}")
    given_reader, name = (processor, "processor") if visual else (tokenizer or processor, "tokenizer")
    reader = _reader(given_reader, source, visual, name, hub)
    return Pipeline(task, model, reader, keywords)


def _reader(reader: Any, source: Any, visual: bool, name: str, hub: Mapping[str, Any]) -> Any:
    """The tokenizer or processor: the given object, or that of the given name or of the model's."""
    if reader is None and source is None:
        raise ValueError(f"pipeline(model=...) got a model: give its {name} too, as {name}=")
    if reader is None or isinstance(reader, str | os.PathLike):
        auto = AutoProcessor if visual else AutoTokenizer
        return auto.from_pretrained(source if reader is None else reader, **hub)
    return reader


class Pipeline:
    """A callable from prompts and conversations to texts. `model`, `tokenizer` (or `processor`) and `task` are attributes."""

    def __init__(self, task: str, model: Any, reader: Any, defaults: Mapping[str, Any]) -> None:
        self.task, self.model, self.defaults = task, model, dict(defaults)
        self.processor = reader if task == TASKS[1] else None
        self.tokenizer = getattr(reader, "tokenizer", reader) if self.processor is None else reader.tokenizer
        self._reader = reader if self.processor is not None else self.tokenizer

    def __repr__(self) -> str:
        return f"Pipeline({self.task!r}, {type(self.model).__name__}, {type(self._reader).__name__})"

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    def __call__(self, text_inputs: Any = None, *, text: Any = None, images: Any = None, **keywords: Any) -> Any:
        """Continues prompts. A prompt is a string, or a conversation: a list of {"role", "content"}.

        Returns [{"generated_text": ...}] for one prompt, a list of such lists for a list of them. generated_text is the prompt
        and its continuation; of a conversation, its messages and one of the assistant's, or with its last message continued
        where that is the assistant's.

        return_full_text=False: only the continuation. return_tensors=True: {"generated_token_ids": [...]} instead.
        continue_final_message, tools, documents, prefix, stop_sequence, skip_special_tokens, tokenizer_encode_kwargs as in
        transformers. batch_size: prompts that are generated together, padded on the left. text, images: names of
        image-text-to-text; images belong into the messages. All others go to `model.generate`.
        """
        if images is not None:
            raise ValueError('pipeline(images=...) is not supported: put {"type": "image", "image": ...} into the messages')
        prompts = text if text_inputs is None else text_inputs
        options = _Options({**self.defaults, **keywords}, self.model, self.tokenizer)
        if _is_prompt(prompts):
            return self._run([prompts], options)[0]
        if not isinstance(prompts, Sequence) or not all(map(_is_prompt, prompts)):
            raise ValueError(f"a prompt is a string or a list of messages with role and content, not {short(prompts)}")
        results = []
        for start in range(0, len(prompts), options.batch_size):
            results += self._run(prompts[start : start + options.batch_size], options)
        return results

    def _run(self, prompts: Sequence[Any], options: _Options) -> list[list[dict[str, Any]]]:
        inputs = [self._inputs(prompt, options) for prompt in prompts]
        batch = inputs[0] if len(inputs) == 1 else self._together(inputs)
        from torch import Tensor

        batch = {name: value.to(self.device) for name, value in batch.items() if isinstance(value, Tensor)}
        out = self.model.generate(**batch, **options.generate)
        sequences = out if isinstance(out, Tensor) else out.sequences
        copies, width = len(sequences) // len(prompts), batch["input_ids"].shape[1]
        return [
            [self._record(prompt, len(encoding["input_ids"][0]), row[width:], row, options) for row in rows]
            for prompt, encoding, rows in zip(prompts, inputs, sequences.cpu().split(copies), strict=True)
        ]

    def _inputs(self, prompt: Any, options: _Options) -> dict[str, Any]:
        """What the tokenizer or the processor makes of one prompt."""
        encode = {"return_tensors": "pt", **options.encode}
        if isinstance(prompt, str):
            read = self._reader(text=options.prefix + prompt, **encode) if self.processor else None
            return dict(read if read is not None else self.tokenizer(options.prefix + prompt, **encode))
        continues = options.continues(prompt)
        chat = {name: value for name, value in encode.items() if name != "add_special_tokens"} | options.chat
        if continues:
            chat["continue_final_message"] = True
        return dict(
            self._reader.apply_chat_template(list(prompt), tokenize=True, return_dict=True,
                                             add_generation_prompt=not continues, **chat)  # fmt: skip
        )

    def _together(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows of text padded on the left."""
        import torch  # not above: `qwen35moe inspect` imports this package and runs without torch

        if any(set(row) - {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"} for row in inputs):
            raise ValueError("batch_size above 1 with images or videos is not supported: leave batch_size out")
        rows = [row["input_ids"][0] for row in inputs]
        pad = getattr(self.tokenizer, "pad_token_id", None)
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), 0 if pad is None else pad, dtype=torch.long, device="cpu")
        mask = torch.zeros((len(rows), width), dtype=torch.long, device="cpu")
        for index, row in enumerate(rows):
            ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    def _record(self, prompt: Any, length: int, new: Tensor, row: Tensor, options: _Options) -> dict[str, Any]:
        if options.tensors:
            return {"generated_token_ids": row[len(row) - len(new) - length :].tolist()}
        written = self.tokenizer.decode(new.tolist(), skip_special_tokens=options.skip_special_tokens)
        if not options.full_text:
            return {"generated_text": written}
        if isinstance(prompt, str):
            return {"generated_text": prompt + written}
        messages = [dict(message) for message in prompt]
        if options.continues(prompt):
            messages[-1]["content"] = _continued(messages[-1]["content"], written)
        else:
            messages.append({"role": "assistant", "content": written})
        before = {} if self.processor is None else {"input_text": list(prompt)}
        return before | {"generated_text": messages}


class _Options:
    """The keywords of one call: for the tokenizer, for `generate`, and for the result."""

    def __init__(self, keywords: dict[str, Any], model: Any, tokenizer: Any) -> None:
        take = keywords.pop
        full, text, tensors = take("return_full_text", None), take("return_text", None), take("return_tensors", None)
        if sum(value is not None for value in (full, text, tensors)) > 1:
            raise ValueError("return_full_text, return_text and return_tensors exclude one another: give one of them")
        self.full_text, self.tensors = full is not False, bool(tensors) or text is False
        self.skip_special_tokens = take("skip_special_tokens", None) is not False
        self.continue_final_message = take("continue_final_message", None)
        self.prefix = take("prefix", None) or ""
        size = take("batch_size", None)
        self.batch_size = 1 if size is None else size
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise ValueError(f"batch_size={short(self.batch_size)}: give a whole number, 1 or more")
        for name, neutral in (("clean_up_tokenization_spaces", (None, True, False)), ("handle_long_generation", (None,)),
                              ("num_workers", (None, 0))):  # fmt: skip
            if (value := take(name, None)) not in neutral:
                raise ValueError(f"pipeline({name}={short(value)}) is not supported: leave it out")
        self.chat = {name: keywords.pop(name) for name in ("tools", "documents") if keywords.get(name) is not None}
        encode = ("add_special_tokens", "truncation", "padding")
        self.encode = {name: keywords.pop(name) for name in encode if keywords.get(name) is not None}
        self.encode |= take("tokenizer_encode_kwargs", None) or {}
        stop = take("stop_sequence", None)
        if stop is not None:
            keywords["stop_strings"] = [stop] if isinstance(stop, str) else list(stop)
        if keywords.get("stop_strings") is not None or keywords.get("stop") is not None:
            keywords.setdefault("tokenizer", tokenizer)
        lengths = ("max_new_tokens", "max_length", "generation_config")
        if all(keywords.get(name) is None for name in lengths) and not _length_of(model):
            keywords["max_new_tokens"] = MAX_NEW_TOKENS
        self.generate = keywords

    def continues(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the last message is continued: by default where it is the assistant's, as in transformers."""
        if self.continue_final_message is None:
            return messages[-1]["role"] == "assistant"
        return bool(self.continue_final_message)


def _continued(content: Any, written: str) -> Any:
    """The content of a message, a string or a list of parts of which the last one is text, with more text."""
    if isinstance(content, str):
        return content + written
    return [*content[:-1], {**content[-1], "text": content[-1]["text"] + written}]


def _length_of(model: Any) -> Any:
    settings = getattr(model, "generation_config", None) or {}
    read = settings.get if isinstance(settings, Mapping) else lambda name: getattr(settings, name, None)
    return read("max_new_tokens") or read("max_length")


def _is_prompt(value: Any) -> bool:
    """A string, or a list of messages."""
    if isinstance(value, str):
        return True
    return isinstance(value, Sequence) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)
