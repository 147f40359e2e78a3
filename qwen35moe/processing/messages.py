"""Messages as programs write them, read: null keys dropped, other APIs' forms translated, images and videos taken out.

A key that neither the processor nor the chat template reads is an error: a misspelt one must not lose its value.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..compat import short
from .media import Media
from .template import plain_data
from .video import Video

MAX_DEPTH = 64  # of lists and mappings in messages and tools

_MESSAGE_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking"}
# Of API objects that are passed on as messages; they carry nothing for the prompt.
_INERT_MESSAGE_KEYS = {"id", "refusal", "annotations", "function_call", "audio", "weight", "status", "object", "created"}
_TYPES = {"text": "text", "input_text": "text", "output_text": "text", "image": "image", "image_url": "image",
          "input_image": "image", "video": "video", "video_url": "video", "input_video": "video"}  # fmt: skip
_SOURCES = ("{kind}", "{kind}_url", "url", "path", "base64", "source")
_SIZES = {"min_pixels", "max_pixels", "resized_height", "resized_width"}
_SETTINGS = {
    "image": _SIZES,
    "video": {"fps", "sample_fps", "raw_fps", "num_frames", "nframes", "min_frames", "max_frames", "total_pixels",
              "resized_height", "resized_width", "do_sample_frames"},
}  # fmt: skip


def read_messages(messages: Sequence[Any], source: str = "") -> tuple[list[dict[str, Any]], list[Media]]:
    """A conversation as plain data for a template, and its images and videos in order. The caller's objects stay as they are.

    source: the text of the template, which may read further keys. ValueError, which names the message: no mapping, an
    unknown key or kind of block, arguments of a tool call that are no JSON object.
    """
    media: list[Media] = []
    read = []
    for number, message in enumerate(messages):
        message = plain_objects(message)
        if not isinstance(message, Mapping):
            raise ValueError(f"a message is a mapping with role and content, got {short(message)}")
        try:
            read.append(_read_message(message, source, media))
        except ValueError as error:
            role = message.get("role")
            raise ValueError(f"message {number}{f' ({short(role)})' if role else ''}: {error}") from None
    return read, media


def _read_message(message: Mapping[str, Any], source: str, media: list[Media]) -> dict[str, Any]:
    kept = {name: value for name, value in message.items() if value is not None}
    for name in kept:
        if name not in _MESSAGE_KEYS | _INERT_MESSAGE_KEYS and not _read_by(source, name):
            raise ValueError(_unread(name, _MESSAGE_KEYS, "the chat template"))
    if not isinstance(kept.get("role"), str):
        raise ValueError(f"a message needs a role, such as 'user', got {short(kept.get('role'))}")
    content = kept.pop("content", None)
    calls = kept.pop("tool_calls", None)
    out = {name: plain_data(value) for name, value in kept.items()}
    if isinstance(content, (list, tuple)):
        out["content"] = [_read_block(block, source, media) for block in content]
    elif content is not None and not isinstance(content, str):
        hint = ": put it into a list" if isinstance(content, Mapping) else ""
        raise ValueError(f"content must be a str or a list of blocks, got {type(content).__name__}{hint}")
    elif content is not None:
        out["content"] = plain_data(content)
    if calls is not None:
        if not isinstance(calls, (list, tuple)):
            raise ValueError(f"tool_calls must be a list, got {type(calls).__name__}")
        as_text = re.search(r"arguments\s+is\s+(?:not\s+)?(?:string|mapping)", source) is not None
        out["tool_calls"] = [_read_call(call, number, as_text) for number, call in enumerate(calls)]
    # The order of keys is the caller's: a template may print a message as it is.
    return {name: out[name] for name in message if name in out}


# ------------------------------------------------------------------------------------------------------- blocks of content


def _read_block(block: Any, source: str, media: list[Media]) -> Any:
    """A block for the template. An image or video that it holds is appended to `media`."""
    block = plain_objects(block)
    if isinstance(block, str):
        return block
    if not isinstance(block, Mapping):
        raise ValueError(f"a block of content is a mapping with a type, got {short(block)}")
    block = {name: value for name, value in block.items() if value is not None}
    named = block.get("type")
    kind = _TYPES.get(named) if isinstance(named, str) else None
    if named is None:
        kind = next((kind for kind in ("text", "image", "video") if kind in block), None)
        kind = kind or next((_TYPES[name] for name in block if name in _TYPES), None)
    if kind is None:
        if isinstance(named, str) and _read_by(source, named):
            return plain_data(block)
        hint = ": the model takes no audio" if "audio" in str(named) else ""
        raise ValueError(f"a block of type {short(named)} cannot be read, only text, image and video{hint}")
    if kind == "text":
        return _text_block(block, source)
    return _media_block(kind, block, source, media)


def _text_block(block: dict[str, Any], source: str) -> dict[str, Any]:
    for name in block:
        if name not in ("type", "text") and not _read_by(source, name):
            raise ValueError(f"block of type 'text': {_unread(name, ('text',), 'the chat template')}")
    if not isinstance(block.get("text"), str):
        raise ValueError(f"a block of type 'text' needs the key 'text' with a str, got {short(block.get('text'))}")
    kept = plain_data(block)
    return {**kept, "type": "text"} if "type" in kept else kept


def _media_block(kind: str, block: dict[str, Any], source: str, media: list[Media]) -> dict[str, Any]:
    keys = [form.format(kind=kind) for form in _SOURCES]
    sources = [name for name in keys if name in block]
    if len(sources) > 1:
        raise ValueError(f"block of type {kind!r}: {sources[0]!r} and {sources[1]!r} both name the {kind}: give one")
    settings, out = {}, {"type": kind}
    for name, value in block.items():
        if name in ("type", *sources):
            continue
        if name in _SETTINGS[kind]:
            settings[name] = value
        elif kind == "image" and name == "detail":
            _check_detail(value)
        elif _read_by(source, name):
            out[name] = plain_data(value)
        elif name in ("min_pixels", "max_pixels"):
            raise ValueError(
                f"block of type 'video': {name} is ambiguous: they count the pixels of one frame in some programs and of all "
                "frames in others; give total_pixels (all frames)"
            )
        else:
            raise ValueError(f"block of type {kind!r}: {_unread(name, [*keys, *_SETTINGS[kind]], 'the processor')}")
    if sources:
        item = _source(kind, sources[0], block[sources[0]])
        if kind == "video":
            item, settings = _video(item, settings)
        media.append(Media(kind, item, settings))
        out[kind] = f"<{kind}>"
    elif settings:
        raise ValueError(f"block of type {kind!r}: {sorted(settings)} without a {kind}")
    return out


def _source(kind: str, name: str, value: Any) -> Any:
    """The image or video of a block: OpenAI's {"url": ...}, Anthropic's source and bare base64 become what processors read."""
    if isinstance(value, Mapping):
        value = {key: entry for key, entry in value.items() if entry is not None}
        if name == "source" and value.get("type") == "base64" and isinstance(value.get("data"), str):
            return f"data:{value.get('media_type', 'image/png')};base64,{value['data']}"
        if kind == "image" and set(value) <= {"bytes", "path"} and value:  # a row of Hugging Face's datasets
            return value.get("bytes", value.get("path"))
        if not isinstance(value.get("url"), str) or set(value) - {"url", "detail", "type", "format", "mime_type"}:
            raise ValueError(f"{name} is a mapping with the key 'url', got the keys {short(sorted(map(str, value)))}")
        _check_detail(value.get("detail"))
        return value["url"]
    if name == "base64":
        if not isinstance(value, str):
            raise ValueError(f"base64 must be a str, got {type(value).__name__}")
        return value if value.startswith("data:") else f"data:{kind};base64,{value}"
    return value


def _check_detail(value: Any) -> None:
    if value not in (None, "auto"):
        raise ValueError(f"detail={short(value)} is not supported: give max_pixels= instead")


def _video(item: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A `Video` of a list of frames with their rate; the settings without those that it used.

    fps: of frames, their rate, from which the processor samples as from a file; of a file, the rate to sample at.
    sample_fps: the rate of frames that are already sampled, all of which are kept.
    """
    settings = dict(settings)
    if "nframes" in settings:
        settings["num_frames"] = settings.pop("nframes")
    if "total_pixels" in settings:
        settings["max_pixels"] = settings.pop("total_pixels")
    decoded = isinstance(item, (list, tuple)) or hasattr(item, "shape")
    if not decoded:
        for name in ("sample_fps", "raw_fps"):
            if name in settings:
                raise ValueError(f"{name} is the rate of a list of frames, and this video is none: give fps to sample at")
        return item, settings
    sampled, raw, fps = (settings.pop(name, None) for name in ("sample_fps", "raw_fps", "fps"))
    if sampled is not None:
        if fps not in (None, sampled):
            raise ValueError(f"a list of frames has one rate, got fps={short(fps)} and sample_fps={short(sampled)}")
        return Video(item, fps=sampled, indices=range(len(item))), settings
    rate = raw if fps is None else fps
    if rate is None:
        raise ValueError(f"a list of {len(item)} frames needs its rate: give fps= in the block, or Video(frames, fps=...)")
    return Video(item, fps=rate), settings


# --------------------------------------------------------------------------------------------------------------- tool calls


def _read_call(call: Any, number: int, keep_text: bool) -> Any:
    """A tool call whose arguments are a mapping; OpenAI's API gives them as JSON text. keep_text: the template reads text."""
    call = plain_objects(call)
    if not isinstance(call, Mapping):
        raise ValueError(f"tool_calls[{number}] must be a mapping with a function, got {short(call)}")
    call = {name: value for name, value in call.items() if value is not None}
    function = plain_objects(call.get("function", call))
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"tool_calls[{number}] needs a function with a name, got {short(function)}")
    function = {name: value for name, value in function.items() if value is not None}
    where = f"tool_calls[{number}].function.arguments ({short(function['name'])})"
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON: {str(error)[:200]}") from None
        if not isinstance(parsed, dict):
            raise ValueError(f"{where} must be a JSON object, got {short(parsed)}")
        arguments = arguments if keep_text else parsed
    elif not isinstance(arguments, Mapping):
        raise ValueError(f"{where} must be a mapping or the text of a JSON object, got {type(arguments).__name__}")
    function = {**function, "arguments": arguments}
    return plain_data({**call, "function": function} if "function" in call else function)


# ------------------------------------------------------------------------------------------------------------------- helpers


def plain_objects(value: Any) -> Any:
    """An object of an API's client library (pydantic) as a mapping."""
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) and not isinstance(value, (Mapping, str, list, tuple)) else value


def _read_by(source: str, name: str) -> bool:
    """Whether a template mentions a key: .name, 'name' or "name"."""
    key = re.escape(str(name))
    return re.search(rf"\.\s*{key}(?!\w)|'{key}'|\"{key}\"", source) is not None


def _unread(name: Any, known: Any, reader: str) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"{reader} does not read the key {short(name)}: " + (f"did you mean {near[0]!r}?" if near else "leave it out")


def check_depth(value: Any, what: str) -> None:
    """ValueError for data that is nested too deeply or contains itself."""
    level = [[value]]
    for _ in range(MAX_DEPTH):
        entries = (item for entry in level for item in (entry.values() if isinstance(entry, Mapping) else entry))
        level = list({id(item): item for item in entries if isinstance(item, (Mapping, list, tuple))}.values())
        if not level:
            return
    raise ValueError(f"{what} are nested more than {MAX_DEPTH} levels deep")
