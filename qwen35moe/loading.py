"""load(): from a name to a model and its tokenizer, with the class that fits the checkpoint."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.headers import read_headers
from .checkpoint.hub import folder_of
from .checkpoint.names import canonical, part_of
from .config import Config

if TYPE_CHECKING:  # `find` is used without torch
    import torch

    from .models.device_map import Devices
    from .processing.processor import Processor
    from .processing.text import Tokenizer

log = logging.getLogger(__name__)

TINY = "tiny"
_TEXT_FILES = ("tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json")


def load(
    name: str | os.PathLike[str], *, dtype: str | torch.dtype | None = "auto", device: Devices = "cpu",
    revision: str | None = None,
) -> tuple[Any, Tokenizer]:
    """(model, tokenizer) of "tiny", the checkpoint bundled with the library, of a folder, or of a Hub name
    ("Qwen/...", at a revision: a commit, tag or branch).

    An existing folder takes precedence. config.json decides between mixture of experts and dense, and the files decide
    between multimodal (with a vision tower) and text only. A warning and model.loading_report list what is left out. For
    the text model of a multimodal checkpoint, or a model without tokenizer, use the class:
    Qwen3_5MoeForCausalLM.from_pretrained(folder).
    """
    from .models import text, vision_language
    from .processing.text import Tokenizer

    folder = find(name, revision)
    tokenizer = Tokenizer.from_pretrained(folder)  # first, because it is cheap and may fail
    config = Config.from_pretrained(folder)
    kind = "Qwen3_5Moe" if config.text_config.is_moe else "Qwen3_5"
    multimodal = config.vision_config is not None and has_tower(folder)
    cls = getattr(vision_language, f"{kind}ForConditionalGeneration") if multimodal else getattr(text, f"{kind}ForCausalLM")
    model = cls.from_pretrained(folder, dtype=dtype, device=device)
    left_out = getattr(getattr(model, "loading_report", None), "left_out", None)
    if left_out:
        parts = ", ".join(f"{name} ({count} tensors)" for name, count in left_out.items())
        log.warning("%s: loaded as %s; left out: %s", folder, cls.__name__, parts)
    return model, tokenizer


def load_processor(name: str | os.PathLike[str], *, revision: str | None = None) -> Processor:
    """The processor of the model that `load` returns for this name: it turns messages with images and videos into inputs,
    and generated tokens into replies."""
    from .processing.processor import Processor

    return Processor.from_pretrained(find(name, revision))


def has_tower(folder: Path) -> bool:
    """Whether the files of a folder contain a vision tower (config.json may describe one that they lack)."""
    names = map(canonical, read_headers(folder, []).tensors)
    return any(part_of(name) == "visual" for name in names if name is not None)


def find(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint with its tokenizer. ValueError if there is none."""
    if name == TINY and not Path(name).is_dir():
        return Path(__file__).parent / "assets" / "tiny"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file: give the folder that holds config.json")
    cached = folder_of(name, revision=revision, required=["tokenizer.json"], optional=_TEXT_FILES)
    if cached != folder:
        return cached
    raise ValueError(f"there is no folder {folder}: give a folder with config.json, a Hub name (owner/name), or {TINY!r}")
