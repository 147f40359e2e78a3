"""Writing the files of a tokenizer and a processor, so that this library and transformers read them back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compat import SAVING, read_keywords, short
from ..files import write_text
from .pixels import IMAGE_DEFAULTS, VIDEO_DEFAULTS, PixelSettings
from .settings import VIDEO_ONLY

if TYPE_CHECKING:
    from .processor import Processor
    from .text import Tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str], keywords: Mapping[str, Any]) -> tuple[str, ...]:
    """`Tokenizer.save_pretrained`."""
    return _write(path, _tokenizer_files(tokenizer), keywords)


def save_processor(processor: Processor, path: str | os.PathLike[str], keywords: Mapping[str, Any]) -> tuple[str, ...]:
    """`Processor.save_pretrained`."""
    files = _tokenizer_files(processor.tokenizer)
    if processor.chat_template is not None:
        files["chat_template.jinja"] = processor.chat_template
    for part, kind, name in ((processor.image_processor, "image", "preprocessor_config.json"),
                             (processor.video_processor, "video", "video_preprocessor_config.json")):  # fmt: skip
        if part is not None:
            unchanged = part._file is not None and part._file[1] == part.settings
            files[name] = part._file[0] if unchanged and part._file else _json(settings_values(part.settings, kind))
    return _write(path, files, keywords)


def settings_values(settings: PixelSettings, kind: str) -> dict[str, Any]:
    """The settings as the object of preprocessor_config.json ("image") or video_preprocessor_config.json ("video")."""
    video = kind == "video"
    values: dict[str, Any] = {
        f"{kind}_processor_type": "Qwen3VLVideoProcessor" if video else "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
        "patch_size": settings.patch_size,
        "temporal_patch_size": settings.temporal_patch_size,
        "merge_size": settings.merge_size,
        "image_mean": list(settings.image_mean),
        "image_std": list(settings.image_std),
    }  # fmt: skip
    defaults = VIDEO_DEFAULTS if video else IMAGE_DEFAULTS
    for name in ("rescale_factor", "do_resize", "do_rescale", "do_normalize", *(VIDEO_ONLY if video else ())):
        if getattr(settings, name) != getattr(defaults, name):
            values[name] = getattr(settings, name)
    return values


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    settings = dict(tokenizer.settings)
    for name, token in (("eos_token", tokenizer.eos_token), ("pad_token", tokenizer.pad_token)):
        if token is not None and tokenizer.named_tokens.get(name) != token:
            settings[name] = token
    # transformers' default side is the right one, and so is the checkpoint's if it has none: a setting of this library's own
    # default is not written.
    if tokenizer.padding_side != tokenizer.configured_padding_side():
        settings["padding_side"] = tokenizer.padding_side
    if tokenizer.truncation_side != settings.get("truncation_side", "right"):
        settings["truncation_side"] = tokenizer.truncation_side
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    files = {"tokenizer.json": tokenizer.definition}
    if tokenizer.chat_template is not None:
        files["chat_template.jinja"] = tokenizer.chat_template
        settings.pop("chat_template", None)
    unchanged = settings == tokenizer.settings and tokenizer.settings_text is not None
    files["tokenizer_config.json"] = tokenizer.settings_text if unchanged else _json(settings)  # type: ignore[assignment]
    return files


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _write(path: str | os.PathLike[str], files: Mapping[str, str], keywords: Mapping[str, Any]) -> tuple[str, ...]:
    read_keywords("save_pretrained", SAVING, keywords, ())
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"save_pretrained({short(path)}): name a folder")
    if not os.fspath(path):
        raise ValueError("save_pretrained needs the path of a folder, got an empty one: '.' is the current folder")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the path of a folder")
    for name in files:
        target = folder / name
        if target.exists() and not target.is_file():
            raise ValueError(f"{target} is not a regular file: it is not replaced")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in files.items():
        write_text(folder / name, text)
        written.append(str(folder / name))
    return tuple(written)
