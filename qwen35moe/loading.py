"""load(): from a name to a model and its tokenizer, with the class that the checkpoint calls for."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint.hub import folder_of
from .config import Config

if TYPE_CHECKING:  # `find` is used where torch is not
    import torch

    from .placement import Devices
    from .processing.text import Tokenizer

log = logging.getLogger(__name__)

TINY = "tiny"
_TEXT_FILES = ("tokenizer_config.json", "chat_template.jinja")


def load(
    name: str | os.PathLike[str], *, dtype: str | torch.dtype | None = "auto", device: Devices = "cpu",
    revision: str | None = None,
) -> tuple[Any, Tokenizer]:
    """(model, tokenizer) of "tiny", the checkpoint bundled with the library, of a folder, or of a Hub name
    ("Qwen/...", at a revision: a commit, tag or branch).

    A folder is meant where one of that name exists. The class follows config.json: mixture of experts or dense. From a
    multimodal checkpoint this is the text model; what that leaves out is said (a warning, and model.loading_report).
    For a model without its tokenizer use the class: Qwen3_5MoeForCausalLM.from_pretrained(folder).
    """
    from . import model as models
    from .processing.text import Tokenizer

    folder = find(name, revision)
    tokenizer = Tokenizer.from_pretrained(folder)  # first: it costs little, and may fail
    config = Config.from_pretrained(folder)
    cls = models.Qwen3_5MoeForCausalLM if config.text_config.is_moe else models.Qwen3_5ForCausalLM
    model = cls.from_pretrained(folder, dtype=dtype, device=device)
    left_out = getattr(getattr(model, "loading_report", None), "left_out", None)
    if left_out:
        parts = ", ".join(f"{what} ({count} tensors)" for what, count in left_out.items())
        log.warning("%s: loaded its text model, %s; left out: %s", folder, cls.__name__, parts)
    return model, tokenizer


def find(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint with its tokenizer. ValueError says what was looked for."""
    if name == TINY and not Path(name).is_dir():
        return Path(__file__).parent / "assets" / "tiny"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file: give the folder that holds config.json")
    found = folder_of(name, revision=revision, required=["tokenizer.json"], optional=_TEXT_FILES)
    if found != folder:
        return found
    raise ValueError(f"there is no folder {folder}: give a folder with config.json, a Hub name (owner/name), or {TINY!r}")
