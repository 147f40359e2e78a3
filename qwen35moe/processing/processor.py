"""Messages, text, images and videos to a model's inputs, and a model's output to a `Reply`: one object per checkpoint.

    processor = Processor.from_pretrained(folder)
    inputs = processor.apply_chat_template([{"role": "user", "content": [{"type": "image", "image": "cat.png"},
                                            {"type": "text", "text": "What is this?"}]}], add_generation_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=500)
    reply = processor.parse(ids[0, inputs["input_ids"].shape[1]:], prompt=inputs["input_ids"][0])
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import read_json
from .images import ImageProcessor, flatten
from .pixels import PixelSettings, read_settings
from .reply import MARKUP, THINK_END, THINK_START, Reply, parse_pieces
from .template import ChatTemplate, Marks, plain_data
from .text import Tokenizer
from .video import SampledVideo, VideoProcessor

Pieces = list[tuple[bool, str]]  # (is a control token, text) in order

# Keys of tokenizer_config.json, and the tokens if it lacks them.
_VISION_TOKENS = (
    ("image_token", "<|image_pad|>"),
    ("video_token", "<|video_pad|>"),
    ("vision_bos_token", "<|vision_start|>"),
    ("vision_eos_token", "<|vision_end|>"),
)


class Processor:
    """The counterpart of Hugging Face's Qwen3VLProcessor, with the same names, from the files of one folder: tokenizer.json,
    chat_template.jinja, preprocessor_config.json, video_preprocessor_config.json. All but the first are optional; a call
    that needs a missing one raises ValueError.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None = None, image_processor: ImageProcessor | None = None,
        video_processor: VideoProcessor | None = None, variables: Mapping[str, str] | None = None,
    ) -> None:
        """variables: values for the template besides the messages, such as eos_token."""
        self.tokenizer, self.template = tokenizer, template
        self.image_processor, self.video_processor = image_processor, video_processor
        self.variables = dict(variables or {})
        self._image, self._video, self._start, self._end = (self.variables.get(key, token) for key, token in _VISION_TOKENS)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Processor:
        """Read a checkpoint folder. ValueError if it has no tokenizer.json, or if its files contradict each other."""
        folder = Path(path)
        tokenizer = Tokenizer.from_pretrained(folder)
        if tokenizer.stripping_tokens:
            raise ValueError(
                f"{folder / 'tokenizer.json'}: the control tokens {sorted(tokenizer.stripping_tokens)} also match the blanks "
                "beside them (lstrip, rstrip, single_word), which is not implemented"
            )
        image, video = read_settings(folder, "image"), read_settings(folder, "video")
        source = _template_source(folder)
        processor = cls(
            tokenizer,
            None if source is None else ChatTemplate(source),
            None if image is None else ImageProcessor(image),
            None if video is None else VideoProcessor(video),
            _named_tokens(folder),
        )
        processor._check(folder, image, video)
        return processor

    def _check(self, folder: Path, *settings: PixelSettings | None) -> None:
        """ValueError if config.json has other patch sizes or placeholder ids than the processor's files."""
        config = read_json(folder / "config.json")
        vision = config.get("vision_config") or {}
        for own in filter(None, settings):
            for name, key in (("patch_size",) * 2, ("temporal_patch_size",) * 2, ("merge_size", "spatial_merge_size")):
                if vision.get(key, getattr(own, name)) != getattr(own, name):
                    raise ValueError(
                        f"{folder}: the processor has {name} = {getattr(own, name)}, config.json has vision_config.{key} = "
                        f"{vision[key]}"
                    )
        for key, token in (("image_token_id", self._image), ("video_token_id", self._video)):
            configured, number = config.get(key), self.tokenizer.added_tokens.get(token)
            if configured is not None and number is not None and configured != number:
                raise ValueError(f"{folder}: config.json has {key} = {configured}, tokenizer.json has {token} = {number}")

    # ----------------------------------------------------------------------------------------------- inputs of a model

    def __call__(
        self, text: str | Sequence[str], images: Any = None, videos: Any = None, *, padding: bool = True,
        padding_side: str = "left", special: bool = True, progress: bool = False,
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask and mm_token_type_ids [B, T] of prompts as a template renders them; with images and videos
        also pixel_values, image_grid_thw, pixel_values_videos and video_grid_thw.

        Each <|image_pad|> or <|video_pad|> in the text stands for one image or video, in order. special=False encodes the
        names of control tokens as text, so that the text has no placeholders. For user text, use `apply_chat_template`.
        """
        rows = [text] if isinstance(text, str) else list(text)
        if not rows:
            raise ValueError("no texts")
        marks, tokens = Marks.absent_from(*rows), list(self.tokenizer.added_tokens) if special else []
        return self._inputs([marks.split(row, tokens) for row in rows], images, videos, padding, padding_side, progress)

    def completion_inputs(
        self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), *, special: bool = False,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """The inputs to continue a text after images and videos, without a chat template. special: as for
        `Tokenizer.encode`."""
        placeholders = [self._image] * len(images) + [self._video] * len(videos)
        pieces = [(True, token) for pad in placeholders for token in (self._start, pad, self._end)]
        pieces += Marks.absent_from(text).split(text, list(self.tokenizer.added_tokens) if special else [])
        return self._inputs([pieces], list(images) or None, list(videos) or None, True, "left", progress)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The prompt as text: the result of transformers' apply_chat_template(tokenize=False)."""
        variables = {**self.variables, **variables}
        return self._template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)

    def apply_chat_template(
        self, messages: Sequence[Any], *, tools: Any = None, add_generation_prompt: bool = False, tokenize: bool = True,
        special: bool = False, images: Any = None, videos: Any = None, padding_side: str = "left", progress: bool = False,
        **variables: Any,
    ) -> Any:
        """The inputs of a model for a conversation or a list of conversations; with tokenize=False their text.

        Images and videos come from the messages ({"type": "image", "image": path or PIL image}, "video" likewise) or from
        images= and videos=. variables go to the template: enable_thinking, preserve_thinking, add_vision_id, ...

        Names of control tokens ("<|im_end|>") in the messages are encoded as text. In assistant messages this holds for the
        special ones only, because models write <think> and <tool_call> themselves. special=True encodes all of them as
        control tokens, transformers' default.
        """
        batch = [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        if not tokenize:
            texts = [self.render(conversation, **options) for conversation in batch]
            return texts[0] if batch[0] is messages else texts
        images = (list(_media(batch, "image")) or None) if images is None else images
        videos = (list(_media(batch, "video")) or None) if videos is None else videos
        rows = [self._pieces(conversation, special, options) for conversation in batch]
        return self._inputs(rows, images, videos, True, padding_side, progress)

    @property
    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise ValueError("this checkpoint has no chat template (chat_template.jinja): pass text instead of messages")
        return self.template

    def _pieces(self, messages: Sequence[Mapping[str, Any]], special: bool, options: dict[str, Any]) -> Pieces:
        """The rendered prompt, split at its control tokens."""
        tokens = list(self.tokenizer.added_tokens)
        if special:
            text = self.render(messages, **options)
            return Marks.absent_from(text).split(text, tokens)
        values: Any = plain_data({"messages": list(messages), **options})
        marks = Marks.absent_from(json.dumps(values, ensure_ascii=False), self._template.source)
        messages = [
            marks.escape(message, sorted(self.tokenizer.special_tokens) if _role(message) == "assistant" else tokens)
            for message in values.pop("messages")
        ]
        return marks.split(self.render(messages, **marks.escape(values, tokens)), tokens)

    def _inputs(
        self, rows: list[Pieces], images: Any, videos: Any, padding: bool, padding_side: str, progress: bool
    ) -> dict[str, Tensor]:
        self._check_counts(rows, self._image, "images", images)
        self._check_counts(rows, self._video, "videos", videos)
        visual: dict[str, Tensor] = {}
        spans: dict[str, Iterator[Pieces]] = {}  # by placeholder: the pieces that replace each of its occurrences
        if images is not None:
            processor = _required(self.image_processor, "preprocessor_config.json", "images")
            visual |= processor(images, progress=progress)
            merge = processor.settings.merge_size**2
            spans[self._image] = iter([[(True, self._image)] * (int(n) // merge) for n in visual["image_grid_thw"].prod(1)])
        if videos is not None:
            processor = _required(self.video_processor, "video_preprocessor_config.json", "videos")
            inputs, sampled = processor(videos)
            visual |= inputs
            spans[self._video] = iter([self._video_span(video, processor.settings.merge_size) for video in sampled])

        def expanded(row: Pieces) -> Pieces:
            parts = (next(spans[text]) if control and text in spans else [(control, text)] for control, text in row)
            return [piece for part in parts for piece in part]

        padded = self.tokenizer.pad([self._ids(expanded(row)) for row in rows], padding=padding, padding_side=padding_side)
        ids, types = padded["input_ids"], torch.zeros_like(padded["input_ids"])
        for kind, token in ((1, self._image), (2, self._video)):
            if token in self.tokenizer.added_tokens:
                types[ids == self.tokenizer.added_tokens[token]] = kind
        return {**padded, "mm_token_type_ids": types, **visual}

    def _check_counts(self, rows: list[Pieces], token: str, kind: str, items: Any) -> None:
        placeholders = sum(control and piece == token for row in rows for control, piece in row)
        count = 0 if items is None else len(list(flatten(items)))
        if placeholders != count:
            hint = "" if token in self.tokenizer.added_tokens else f" (tokenizer.json has no {token}: text only)"
            raise ValueError(f"{placeholders} {token} in the text but {count} {kind}{hint}")

    def _video_span(self, video: SampledVideo, merge: int) -> Pieces:
        """The pieces of a video: each temporal patch preceded by its time. The template adds one more pair of vision tokens
        around them."""
        _, rows, columns = video.grid
        pads = [(True, self._video)] * (rows * columns // merge**2)
        return [
            piece for second in video.seconds
            for piece in [(False, f"<{second:.1f} seconds>"), (True, self._start), *pads, (True, self._end)]
        ]  # fmt: skip

    def _ids(self, pieces: Pieces) -> list[int]:
        ids: list[int] = []
        for control, group in groupby(pieces, key=lambda piece: piece[0]):
            if control:
                ids += [self.tokenizer.added_tokens[text] for _, text in group]
            else:
                ids += self.tokenizer.encode("".join(text for _, text in group))
        return ids

    # ------------------------------------------------------------------------------------------------ output of a model

    def parse(
        self, reply: str | Tensor | Sequence[int], *, prompt: str | Tensor | Sequence[int] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Reply:
        """The reasoning, answer and tool calls of a reply: its new ids, or its text. Ids are preferable: they distinguish
        control tokens from text that spells them.

        prompt: the prompt of the reply, whose template may have opened <think>. Without it, a </think> without <think>
        ends the reasoning. tools: their schemas declare which arguments are numbers, lists, ...; the others stay strings.
        """
        pieces = self._split(reply)
        if prompt is None:
            thinking = _first_think_token(pieces) == THINK_END
        else:
            thinking = _first_think_token(reversed(self._split(prompt))) == THINK_START
        return parse_pieces(pieces, thinking=thinking, tools=tools)

    def _split(self, reply: str | Tensor | Sequence[int]) -> Pieces:
        """The reply split at its control tokens; of ids, special tokens are left out, of text, end tokens."""
        names = {number: text for text, number in self.tokenizer.added_tokens.items()}
        if isinstance(reply, str):
            ends = [names[number] for number in self.tokenizer.eos_token_ids if number in names]
            return [piece for piece in Marks.absent_from(reply).split(reply, [*MARKUP, *ends]) if piece[1] not in ends]
        ids = reply.tolist() if isinstance(reply, Tensor) else list(reply)
        pieces: Pieces = []
        for control, group in groupby(ids, key=lambda number: number in names):
            if control:
                tokens = (names[number] for number in group)
                pieces += [(True, token) for token in tokens if token not in self.tokenizer.special_tokens]
            else:
                pieces.append((False, self.tokenizer.decode(list(group))))
        return pieces


def _first_think_token(pieces: Iterator[tuple[bool, str]] | Pieces) -> str | None:
    return next((text for control, text in pieces if control and text in (THINK_START, THINK_END)), None)


def _required(processor: Any, file: str, kind: str) -> Any:
    if processor is None:
        raise ValueError(f"this checkpoint has no {file}: the settings for {kind} are missing")
    return processor


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _media(conversations: Sequence[Any], kind: str) -> Iterator[Any]:
    """The images or videos in the messages, in order. kind: "image" or "video"."""
    for message in (message for conversation in conversations for message in conversation):
        content = message.get("content") if isinstance(message, Mapping) else None
        for block in content if isinstance(content, (list, tuple)) else ():
            if not isinstance(block, Mapping) or block.get("type") not in (kind, f"{kind}_url"):
                continue
            for key in (kind, f"{kind}_url", "url", "path"):
                if block.get(key) is not None:
                    yield block[key]["url"] if isinstance(block[key], Mapping) else block[key]
                    break


def _template_source(folder: Path) -> str | None:
    """The text of the checkpoint's chat template: a file of its own, or a key of a JSON file in older checkpoints."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not valid UTF-8: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        source = read_json(folder / name).get("chat_template")
        if isinstance(source, list):  # several named templates
            source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
        if isinstance(source, str):
            return source
    return None


def _named_tokens(folder: Path) -> dict[str, str]:
    """eos_token, pad_token, image_token, ... of tokenizer_config.json; templates may read them."""
    values = read_json(folder / "tokenizer_config.json")
    extra = values.get("extra_special_tokens")
    values = {**values, **(extra if isinstance(extra, dict) else {})}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}
