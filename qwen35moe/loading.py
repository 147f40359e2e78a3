"""load(): from a name to a model and its tokenizer, with the class that the checkpoint calls for."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from .config import Config
from .processing.text import Tokenizer

log = logging.getLogger(__name__)

TINY = "tiny"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]  # nothing that could be code


def load(
    name: str | os.PathLike[str], *, dtype: str | torch.dtype | None = "auto", device: str | torch.device = "cpu"
) -> tuple[Any, Tokenizer]:
    """(model, tokenizer) of "tiny", the checkpoint bundled with the library, of a folder, or of a Hub name
    ("Qwen/...").

    A folder is meant where one of that name exists. The class follows config.json: mixture of experts or dense. From a
    multimodal checkpoint this is the text model; what that leaves out is said (a warning, and model.loading_report).
    For a model without its tokenizer use the class: Qwen3_5MoeForCausalLM.from_pretrained(folder).
    """
    from . import model as models

    folder = find(name)
    tokenizer = Tokenizer.from_pretrained(folder)  # first: it costs little, and may fail
    config = Config.from_pretrained(folder)
    cls = models.Qwen3_5MoeForCausalLM if config.text_config.is_moe else models.Qwen3_5ForCausalLM
    model = cls.from_pretrained(folder, dtype=dtype, device=device)
    left_out = getattr(getattr(model, "loading_report", None), "left_out", None)
    if left_out:
        parts = ", ".join(f"{what} ({count} tensors)" for what, count in left_out.items())
        log.warning("%s: loaded its text model, %s; left out: %s", folder, cls.__name__, parts)
    return model, tokenizer


def find(name: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint. ValueError says what was looked for."""
    if name == TINY and not Path(name).is_dir():
        return Path(__file__).parent / "assets" / "tiny"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file: give the folder that holds config.json")
    parts = str(name).split("/")
    if len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts):
        return _from_hub(str(name))
    raise ValueError(f"there is no folder {folder}: give a folder with config.json, a Hub name (owner/name), or {TINY!r}")


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise ValueError(
            f"there is no folder {name}, and a Hub name needs the package huggingface_hub: pip install 'qwen35moe[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # its errors have no common base short of Exception
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"there is no folder {name}, and it cannot be fetched from the Hub: {first}") from error
