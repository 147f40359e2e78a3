"""Messages, text, images and videos to a model's inputs, and a model's output to a `Reply`: one object per checkpoint.

    processor = Processor.from_pretrained(folder)
    inputs = processor.apply_chat_template([{"role": "user", "content": [{"type": "image", "image": "cat.png"},
                                            {"type": "text", "text": "What is this?"}]}], add_generation_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=500)
    reply = processor.parse(ids[0, inputs["input_ids"].shape[1]:], prompt=inputs["input_ids"][0])
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..compat import PROCESSOR, read_keywords, short
from .batch import BatchEncoding
from .chat import (
    ChatOptions,
    Conversation,
    check_text_only,
    conversations,
    own_template,
    pieces,
    read_options,
    render,
    rendered_prompts,
)
from .files import read_json
from .images import ImageProcessor
from .inputs import given_media, model_inputs
from .pieces import Pieces, RenderedPrompt
from .pixels import PixelSettings, read_settings
from .reply import Reply, parse_pieces, split_reply, starts_in_reasoning
from .settings import SETTINGS, media_settings
from .template import ChatTemplate, Marks
from .text import OWN, CallDefaults, Tokenizer
from .video import VideoProcessor

# Keys of tokenizer_config.json, and the tokens if it lacks them.
_VISION_TOKENS = (
    ("image_token", "<|image_pad|>"),
    ("video_token", "<|video_pad|>"),
    ("vision_bos_token", "<|vision_start|>"),
    ("vision_eos_token", "<|vision_end|>"),
)
# Keywords of a call that decide about the form of input_ids.
_LAYOUT = ("padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of", "return_tensors",
           "return_attention_mask", "add_special_tokens")  # fmt: skip


class Processor:
    """The counterpart of Hugging Face's Qwen3VLProcessor, with the same names, from the files of one folder: tokenizer.json,
    chat_template.jinja, preprocessor_config.json, video_preprocessor_config.json. All but the first are optional; a call
    that needs a missing one raises ValueError.
    """

    model_input_names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw",
                         "pixel_values_videos", "video_grid_thw")  # fmt: skip

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None = None, image_processor: ImageProcessor | None = None,
        video_processor: VideoProcessor | None = None, variables: Mapping[str, str] | None = None,
    ) -> None:
        """variables: values for the template besides the messages, such as eos_token."""
        self.tokenizer, self._own_template = tokenizer, template
        self.image_processor, self.video_processor = image_processor, video_processor
        self.variables = dict(variables or {})
        self._image, self._video, self._start, self._end = (self.variables.get(key, token) for key, token in _VISION_TOKENS)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, defaults: CallDefaults = OWN, padding_side: str | None = None, **keywords: Any
    ) -> Processor:
        """Read a checkpoint folder. ValueError if it has no tokenizer.json, or if its files contradict each other.

        keywords: settings of images and videos instead of those of the files (min_pixels, max_pixels, size, fps, ...; also
        images_kwargs={...} and videos_kwargs={...}), and transformers' keywords without effect here.
        """
        folder = Path(path)
        changes, keywords = media_settings("from_pretrained", keywords)
        read_keywords("from_pretrained", PROCESSOR, keywords, SETTINGS)
        tokenizer = Tokenizer.from_pretrained(folder, defaults=defaults, padding_side=padding_side)
        if tokenizer.stripping_tokens:
            raise ValueError(
                f"{folder / 'tokenizer.json'}: the control tokens {sorted(tokenizer.stripping_tokens)} also match the blanks "
                "beside them (lstrip, rstrip, single_word), which is not implemented"
            )
        image, video = read_settings(folder, "image"), read_settings(folder, "video")
        image_processor = None if image is None else ImageProcessor(image)
        video_processor = None if video is None else VideoProcessor(video)
        for part, kind, own in ((image_processor, "image", changes.images), (video_processor, "video", changes.videos)):
            if part is not None:
                part.read_file(folder, kind)
                part.settings = part.settings.with_values(own, "from_pretrained")
        template = None if tokenizer.chat_template is None else ChatTemplate(tokenizer.chat_template)
        processor = cls(tokenizer, template, image_processor, video_processor, tokenizer.named_tokens)
        processor._check(folder, image, video)
        return processor

    def save_pretrained(self, path: str | os.PathLike[str], **keywords: Any) -> tuple[str, ...]:
        """Write the tokenizer's files, preprocessor_config.json and video_preprocessor_config.json into a folder; returns
        their paths."""
        from .saving import save_processor

        return save_processor(self, path, keywords)

    def __repr__(self) -> str:
        parts = (self.tokenizer, self.image_processor, self.video_processor)
        return f"Processor({', '.join(repr(part) for part in parts if part is not None)})"

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template, compiled."""
        return self._own_template

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template or None; it can be set."""
        return None if self._own_template is None else self._own_template.source

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        self._own_template = None if source is None else ChatTemplate(source)
        self.tokenizer.chat_template = source

    image_token = property(lambda self: self._image, doc="The placeholder of an image.")
    video_token = property(lambda self: self._video, doc="The placeholder of a video.")
    vision_start_token = property(lambda self: self._start, doc="The token before a placeholder.")
    vision_end_token = property(lambda self: self._end, doc="The token after a placeholder.")
    image_token_id = property(lambda self: self.tokenizer.token_to_id(self._image), doc="The id of image_token.")
    video_token_id = property(lambda self: self.tokenizer.token_to_id(self._video), doc="The id of video_token.")
    vision_start_token_id = property(lambda self: self.tokenizer.token_to_id(self._start), doc="The id of that token.")
    vision_end_token_id = property(lambda self: self.tokenizer.token_to_id(self._end), doc="The id of that token.")

    def _check(self, folder: Path, *settings: PixelSettings | None) -> None:
        """ValueError if config.json has other patch sizes or placeholder ids than the processor's files."""
        config = read_json(folder / "config.json")
        vision = config.get("vision_config")
        vision = vision if isinstance(vision, dict) else {}
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
        self, text: str | Sequence[str] | None = None, images: Any = None, videos: Any = None, *, special: bool | None = None,
        progress: bool = False, **keywords: Any,
    ) -> BatchEncoding:
        """input_ids, attention_mask and mm_token_type_ids [B, T] of prompts as a template renders them; with images and videos
        also pixel_values, image_grid_thw, pixel_values_videos and video_grid_thw.

        Each <|image_pad|> or <|video_pad|> in the text stands for one image or video, in order. special=False encodes the
        names of control tokens as text, so that the text has no placeholders. For user text, use `apply_chat_template`.

        keywords: padding (True), padding_side ("left"), truncation, max_length, pad_to_multiple_of, return_tensors ("pt",
        "np" or None for lists); settings of this call for images and videos (min_pixels, max_pixels, size, fps, num_frames,
        do_sample_frames, do_resize, ...), also in images_kwargs, videos_kwargs and text_kwargs as transformers groups them.
        """
        settings, keywords = media_settings("processor", keywords)
        keywords = read_keywords("processor", PROCESSOR, keywords, (*_LAYOUT, "special", *SETTINGS))
        special = keywords.pop("special", special)
        if not isinstance(text, (str, list, tuple)):
            raise ValueError(f"text must be a str or a list of str, got {type(text).__name__}: give images as images=")
        rows = [text] if isinstance(text, str) else list(text)
        if not rows:
            raise ValueError("no texts")
        if not all(isinstance(row, str) for row in rows):
            raise ValueError(f"text must be a str or a list of str, got {short(rows)}")
        split = [self._split_prompt(row, special) for row in rows]
        media = given_media("image", images), given_media("video", videos)
        return model_inputs(self, split, *media, settings, keywords, progress)

    def _split_prompt(self, text: str, special: bool | None) -> Pieces:
        if isinstance(text, RenderedPrompt) and special is None:
            return text.pieces
        return Marks.absent_from(text).split(text, list(self.tokenizer.added_tokens) if special is not False else [])

    def completion_inputs(
        self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), *, special: bool = False,
        progress: bool = False, **keywords: Any,
    ) -> BatchEncoding:
        """The inputs to continue a text after images and videos, without a chat template. special: as for
        `Tokenizer.encode`. keywords: those of a call."""
        settings, keywords = media_settings("completion_inputs", keywords)
        keywords = read_keywords("completion_inputs", PROCESSOR, keywords, (*_LAYOUT, *SETTINGS))
        placeholders = [self._image] * len(images) + [self._video] * len(videos)
        row = [(True, token) for pad in placeholders for token in (self._start, pad, self._end)]
        row += Marks.absent_from(text).split(text, list(self.tokenizer.added_tokens) if special else [])
        media = given_media("image", list(images) or None), given_media("video", list(videos) or None)
        return model_inputs(self, [row], *media, settings, keywords, progress)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, add_generation_prompt: bool = False,
        continue_final_message: bool | str = False, documents: Any = None, chat_template: str | None = None, **variables: Any,
    ) -> str:
        """The prompt as text: the result of transformers' apply_chat_template(tokenize=False)."""
        template = self._template(chat_template)
        chat = conversations(list(messages), template.source)[0][0] if messages else Conversation([], [])
        options = ChatOptions(tools, documents, add_generation_prompt, continue_final_message, variables)
        return render(template, chat.messages, options, self._named())

    def apply_chat_template(
        self, messages: Sequence[Any] | None = None, chat_template: str | None = None, *, tools: Any = None,
        documents: Any = None, add_generation_prompt: bool = False, continue_final_message: bool | str = False,
        tokenize: bool = True, return_dict: bool | None = True, special: bool | None = None, images: Any = None,
        videos: Any = None, progress: bool = False, **keywords: Any,
    ) -> Any:
        """The inputs of a model for a conversation or a list of conversations; with tokenize=False their text.

        Images and videos come from the messages or from images= and videos=. A block is {"type": "image", "image": ...} with
        a path, a PIL image, an array, bytes or a data: address, {"type": "video", "video": ...} with a path, a `Video` or a
        list of frames and "fps", or one in the form of OpenAI's API; it may hold settings (max_pixels, resized_height, fps,
        ...) of its own. tools: JSON schemas. continue_final_message=True leaves the last message open, to be continued.
        return_dict=False returns input_ids alone.

        keywords: those of a call, also as processor_kwargs={...}, and variables that the template reads (enable_thinking,
        preserve_thinking, add_vision_id, ...); one that nothing reads is an error.

        Names of control tokens ("<|im_end|>") in the messages are encoded as text. In assistant messages this holds for the
        special ones only, because models write <think> and <tool_call> themselves. special=True encodes all of them as
        control tokens, transformers' default.
        """
        settings, keywords = media_settings("apply_chat_template", keywords)
        keywords, variables = read_options(keywords, PROCESSOR, (*_LAYOUT, "special", "messages"), "apply_chat_template")
        messages, special = keywords.pop("messages", messages), keywords.pop("special", special)
        template = self._template(chat_template)
        chats, batched = conversations(messages, template.source)
        options = ChatOptions(tools, documents, bool(add_generation_prompt), continue_final_message or False, variables)
        named = self._named()
        rows = [pieces(self.tokenizer, template, chat.messages, options, named, bool(special)) for chat in chats]
        if not tokenize:
            check_text_only({**keywords, **settings.images, **settings.videos})
            texts = rendered_prompts(template, chats, rows, options, named)
            return texts if batched else texts[0]
        media = {}
        for kind, items in (("image", images), ("video", videos)):
            media[kind] = [item for chat in chats for item in chat.media if item.kind == kind] or None
            if items is not None and media[kind]:
                raise ValueError(f"the messages hold {kind}s and {kind}s= is given: give them in one place")
            media[kind] = media[kind] if items is None else given_media(kind, items)
        inputs = model_inputs(self, rows, media["image"], media["video"], settings, keywords, progress)
        return inputs if return_dict is None or return_dict else inputs["input_ids"]

    def _template(self, chat_template: str | None) -> ChatTemplate:
        if chat_template is None and self._own_template is not None:
            return self._own_template
        return own_template(self.tokenizer, chat_template)

    def _named(self) -> dict[str, str]:
        return {**self.variables, **self.tokenizer.special_tokens_map}

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
        pieces = split_reply(self.tokenizer, reply)
        before = None if prompt is None else split_reply(self.tokenizer, prompt)
        return parse_pieces(pieces, thinking=starts_in_reasoning(pieces, before), tools=tools)

    def decode(self, ids: Any = None, skip_special_tokens: bool = False, **keywords: Any) -> Any:
        """`Tokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special_tokens, **keywords)

    def batch_decode(self, rows: Any = None, skip_special_tokens: bool = False, **keywords: Any) -> list[str]:
        """`Tokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(rows, skip_special_tokens, **keywords)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **keywords: Any
    ) -> list[str]:
        """The texts of rows of generated ids, without special tokens."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens, **keywords)
