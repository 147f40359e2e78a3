"""Messages, text, images and videos to a model's inputs, and its reply back: one object for a checkpoint's folder.

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

from .images import ImageProcessor, flat
from .pixels import PixelSettings, read_settings
from .reply import MARKUP, THINK, THOUGHT, Reply, parse_pieces
from .template import ChatTemplate, Marks, plain
from .text import Tokenizer, _json
from .video import Sampled, VideoProcessor

Pieces = list[tuple[bool, str]]  # (is a control token, text) in turn

# As tokenizer_config.json calls them, and what they are where it does not.
_VISION_TOKENS = (
    ("image_token", "<|image_pad|>"),
    ("video_token", "<|video_pad|>"),
    ("vision_bos_token", "<|vision_start|>"),
    ("vision_eos_token", "<|vision_end|>"),
)


class Processor:
    """What Hugging Face's Qwen3VLProcessor does, by the same names, from the files of one folder: tokenizer.json,
    chat_template.jinja, preprocessor_config.json, video_preprocessor_config.json. What is missing there is missing here,
    and said when it is asked for.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None = None, image_processor: ImageProcessor | None = None,
        video_processor: VideoProcessor | None = None, variables: Mapping[str, str] | None = None,
    ) -> None:
        """variables: what templates are told besides the messages, such as eos_token."""
        self.tokenizer, self.template = tokenizer, template
        self.image_processor, self.video_processor = image_processor, video_processor
        self.variables = dict(variables or {})
        self._image, self._video, self._start, self._end = (self.variables.get(key, token) for key, token in _VISION_TOKENS)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Processor:
        """Read a checkpoint's folder. ValueError where it has no tokenizer.json, or where its files contradict each other."""
        folder = Path(path)
        tokenizer = Tokenizer.from_pretrained(folder)
        if tokenizer.greedy_tokens:
            raise ValueError(
                f"{folder / 'tokenizer.json'}: the control tokens {sorted(tokenizer.greedy_tokens)} take blanks beside them "
                "with them (lstrip, rstrip, single_word), which this processor does not do"
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
        """ValueError where config.json says something else about patches or placeholders."""
        config = _json(folder / "config.json")
        vision = config.get("vision_config") or {}
        for each in settings:
            for ours, theirs in (("patch_size",) * 2, ("temporal_patch_size",) * 2, ("merge_size", "spatial_merge_size")):
                if each is not None and vision.get(theirs, getattr(each, ours)) != getattr(each, ours):
                    raise ValueError(
                        f"{folder}: pictures are cut with {ours} = {getattr(each, ours)}, and config.json says "
                        f"vision_config.{theirs} = {vision[theirs]}"
                    )
        for key, token in (("image_token_id", self._image), ("video_token_id", self._video)):
            said, found = config.get(key), self.tokenizer.added_tokens.get(token)
            if said is not None and found is not None and said != found:
                raise ValueError(f"{folder}: config.json says {key} = {said}, and {token} is {found} in tokenizer.json")

    # -------------------------------------------------------------------------------------------------------- in

    def __call__(
        self, text: str | Sequence[str], images: Any = None, videos: Any = None, *, padding: bool = True,
        padding_side: str = "left", special: bool = True, progress: bool = False,
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask and mm_token_type_ids [B, T] of prompts as a template renders them, and for pictures
        pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw.

        Each <|image_pad|> and <|video_pad|> stands for one picture, in order. special=False: what looks like a control
        token in the text is text, and no picture has a place. For what users write, use `apply_chat_template`.
        """
        rows = [text] if isinstance(text, str) else list(text)
        if not rows:
            raise ValueError("no text was given")
        marks, tokens = Marks.absent_from(*rows), list(self.tokenizer.added_tokens) if special else []
        return self._inputs([marks.split(each, tokens) for each in rows], images, videos, padding, padding_side, progress)

    def before(
        self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), *, special: bool = False,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """The inputs of pictures followed by a text that goes on, without a chat. special: as for `Tokenizer.encode`."""
        shown = [[(True, self._start), (True, each), (True, self._end)]
                 for each in [self._image] * len(images) + [self._video] * len(videos)]  # fmt: skip
        tokens = list(self.tokenizer.added_tokens) if special else []
        pieces = [part for each in shown for part in each] + Marks.absent_from(text).split(text, tokens)
        return self._inputs([pieces], list(images) or None, list(videos) or None, True, "left", progress)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The prompt as text: what transformers' apply_chat_template(tokenize=False) gives."""
        given = {**self.variables, **variables}
        return self._template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **given)

    def apply_chat_template(
        self, messages: Sequence[Any], *, tools: Any = None, add_generation_prompt: bool = False, tokenize: bool = True,
        special: bool = False, images: Any = None, videos: Any = None, padding_side: str = "left", progress: bool = False,
        **variables: Any,
    ) -> Any:
        """The inputs of a model for a conversation, or for a list of conversations; its text with tokenize=False.

        VisualInputs are those of the messages ({"type": "image", "image": path or picture}, "video" likewise), or images= and
        videos=. variables go to the template: enable_thinking, preserve_thinking, add_vision_id, ...

        Strings that look like control tokens ("<|im_end|>") stay text in everything that the messages say; in an
        assistant's messages this holds for the special ones, while <think> or <tool_call> are what a model writes there.
        special=True makes control tokens of all of them, as transformers does by default.
        """
        batch = [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
        given = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        if not tokenize:
            texts = [self.render(each, **given) for each in batch]
            return texts[0] if batch[0] is messages else texts
        found = [list(_pictures(batch, kind)) for kind in ("image", "video")]
        images, videos = (own or None if each is None else each for each, own in zip((images, videos), found, strict=True))
        rows = [self._pieces(each, special, given) for each in batch]
        return self._inputs(rows, images, videos, True, padding_side, progress)

    @property
    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise ValueError("this checkpoint has no chat template (chat_template.jinja): give text instead of messages")
        return self.template

    def _pieces(self, messages: Sequence[Mapping[str, Any]], special: bool, given: dict[str, Any]) -> Pieces:
        tokens = list(self.tokenizer.added_tokens)
        if special:
            text = self.render(messages, **given)
            return Marks.absent_from(text).split(text, tokens)
        said: Any = plain({"messages": list(messages), **given})
        marks = Marks.absent_from(json.dumps(said, ensure_ascii=False), self._template.source)
        messages = [
            marks.around(each, sorted(self.tokenizer.special_tokens) if _role(each) == "assistant" else tokens)
            for each in said.pop("messages")
        ]
        return marks.split(self.render(messages, **marks.around(said, tokens)), tokens)

    def _inputs(
        self, rows: list[Pieces], images: Any, videos: Any, padding: bool, padding_side: str, progress: bool
    ) -> dict[str, Tensor]:
        self._check_counts(rows, self._image, images)
        self._check_counts(rows, self._video, videos)
        pictures: dict[str, Tensor] = {}
        spans: dict[str, Iterator[Pieces]] = {}
        if images is not None:
            processor = _there(self.image_processor, "preprocessor_config.json")
            pictures |= (found := processor(images, progress=progress))
            merge = processor.settings.merge_size**2
            spans[self._image] = iter([[(True, self._image)] * (int(grid.prod()) // merge) for grid in found["image_grid_thw"]])
        if videos is not None:
            processor = _there(self.video_processor, "video_preprocessor_config.json")
            found, sampled = processor(videos)
            pictures |= found
            spans[self._video] = iter([self._span(each, processor.settings.merge_size) for each in sampled])

        def filled(row: Pieces) -> Pieces:
            parts = (next(spans[text]) if control and text in spans else [(control, text)] for control, text in row)
            return [each for part in parts for each in part]

        ids = [self._ids(filled(row)) for row in rows]
        inputs = self.tokenizer.pad(ids, padding=padding, padding_side=padding_side)
        ids, types = inputs["input_ids"], torch.zeros_like(inputs["input_ids"])
        for kind, token in ((1, self._image), (2, self._video)):
            if token in self.tokenizer.added_tokens:
                types[ids == self.tokenizer.added_tokens[token]] = kind
        return {**inputs, "mm_token_type_ids": types, **pictures}

    def _check_counts(self, rows: list[Pieces], token: str, pictures: Any) -> None:
        places = sum(control and piece == token for row in rows for control, piece in row)
        given = 0 if pictures is None else len(list(flat(pictures)))
        if places != given:
            hint = "" if token in self.tokenizer.added_tokens else f" (tokenizer.json has no {token}: the model sees none)"
            raise ValueError(f"the text has {places} {token} and {given} pictures were given for them{hint}")

    def _span(self, video: Sampled, merge: int) -> Pieces:
        """What stands for a video: each temporal patch with its time. The template has one more pair of marks around it."""
        _, rows, columns = video.grid
        pads = [(True, self._video)] * (rows * columns // merge**2)
        return [
            part for second in video.seconds
            for part in [(False, f"<{second:.1f} seconds>"), (True, self._start), *pads, (True, self._end)]
        ]  # fmt: skip

    def _ids(self, pieces: Pieces) -> list[int]:
        ids: list[int] = []
        for control, group in groupby(pieces, key=lambda piece: piece[0]):
            if control:
                ids += [self.tokenizer.added_tokens[text] for _, text in group]
            else:
                ids += self.tokenizer.encode("".join(text for _, text in group))
        return ids

    # ------------------------------------------------------------------------------------------------------- out

    def parse(
        self, reply: str | Tensor | Sequence[int], *, prompt: str | Tensor | Sequence[int] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Reply:
        """The reasoning, the answer and the tool calls of a reply: the new ids (best: text that merely looks like a control
        token is told apart), or their text.

        prompt: what the reply continues; a template may have opened <think> there. Without it, a </think> that nothing
        opened says so. tools: their schemas say which arguments are numbers, lists, ...; the others stay strings.
        """
        pieces = self._taken_apart(reply)
        said = (pieces if prompt is None else self._taken_apart(prompt))[:: 1 if prompt is None else -1]
        first = next((text for control, text in said if control and text in (THINK, THOUGHT)), None)
        return parse_pieces(pieces, thinking=first == (THOUGHT if prompt is None else THINK), tools=tools)

    def _taken_apart(self, reply: str | Tensor | Sequence[int]) -> Pieces:
        names = {number: text for text, number in self.tokenizer.added_tokens.items()}
        if isinstance(reply, str):
            ends = [names[each] for each in self.tokenizer.eos_token_ids if each in names]
            return [each for each in Marks.absent_from(reply).split(reply, [*MARKUP, *ends]) if each[1] not in ends]
        ids = reply.tolist() if isinstance(reply, Tensor) else list(reply)
        pieces: Pieces = []
        for control, group in groupby(ids, key=lambda number: number in names):
            if control:
                pieces += [(True, names[each]) for each in group if names[each] not in self.tokenizer.special_tokens]
            else:
                pieces.append((False, self.tokenizer.decode(list(group))))
        return pieces


def _there(processor: Any, file: str) -> Any:
    if processor is None:
        raise ValueError(f"this checkpoint has no {file}: it does not say how pictures are to be cut")
    return processor


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _pictures(conversations: Sequence[Any], kind: str) -> Iterator[Any]:
    """The images (or videos) in the messages, in order."""
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
    """The checkpoint's chat template, from the file of its own, else from where older checkpoints have it."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _json(folder / name).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {each.get("name"): each.get("template") for each in found}.get("default")
        if isinstance(found, str):
            return found
    return None


def _named_tokens(folder: Path) -> dict[str, str]:
    """eos_token, pad_token, image_token, ... of tokenizer_config.json: templates may use them."""
    values = _json(folder / "tokenizer_config.json")
    more = values.get("extra_special_tokens")
    values = {**values, **(more if isinstance(more, dict) else {})}
    texts = {name: each.get("content") if isinstance(each, dict) else each for name, each in values.items()}
    return {name: each for name, each in texts.items() if name.endswith("_token") and isinstance(each, str)}
