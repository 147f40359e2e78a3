# pyright: strict
"""load(): from a name to a model and its tokenizer, with the class that fits the checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen35moe.checkpoint.headers import read_headers
from qwen35moe.checkpoint.hub import BUNDLED, DEFAULTS, TINY, HubOptions, Wanted, folder_of, no_weights
from qwen35moe.checkpoint.names import canonical, part_of
from qwen35moe.checkpoint.problems import CheckpointError
from qwen35moe.checkpoint.selection import Selection
from qwen35moe.compat import short
from qwen35moe.config import Config

if TYPE_CHECKING:  # `find` is used without torch
    import torch

    from qwen35moe.models.device_map import Devices
    from qwen35moe.models.text import Qwen3_5MoeForCausalLM
    from qwen35moe.processing.processor import Processor
    from qwen35moe.processing.text import Tokenizer

log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
OTHER_FILES = ("tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json")


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = "auto",
    device: Devices | None = "cpu",
    config: Any = None,
    revision: str | None = None,
    layers: Iterable[int] | None = None,
    experts: Iterable[int] | Mapping[Any, Iterable[int]] | None = None,
    parts: Iterable[str] | None = None,
    ignore: str | Iterable[str] = (),
    check: bool = False,
    weights: str = "map",
    dtype_policy: str = "native",
    **keywords: Any,
) -> tuple[Qwen3_5MoeForCausalLM, Tokenizer | Any]:
    """(model, tokenizer) of "tiny", the checkpoint bundled with the library, of a folder, or of a Hub name
    ("Qwen/...", at a revision: a commit, tag or branch). The tokenizer is None where the checkpoint has none.

    An existing folder takes precedence. config.json decides between mixture of experts and dense, and the files decide
    between multimodal (with a vision tower) and text only; parts={"text"} chooses text only. A warning and
    model.loading_report list what is left out. The other arguments are those of
    `Qwen3_5MoeForCausalLM.from_pretrained`, those of transformers included (device_map, torch_dtype, token, ...).
    """
    from qwen35moe.models.pretrained import kept
    from qwen35moe.processing.text import Tokenizer

    layers, experts = kept(layers), kept(experts)
    selection = Selection.of(layers, experts, parts)
    wanted = None if selection.is_everything else selection.needs
    folder, hub, subfolder = locate(name, revision, keywords, wanted=wanted)
    tokenizer = None
    if (folder / TOKENIZER_FILE).exists():
        tokenizer = Tokenizer.from_pretrained(folder)  # first, because it is cheap and may fail
    whole = Config.from_pretrained(folder) if config is None else Config.of(config)
    chosen = selection.parts
    multimodal = whole.vision_config is not None and (chosen is None or "vision" in chosen) and has_tower(folder)
    cls = class_for(whole, "ForConditionalGeneration" if multimodal else "ForCausalLM")
    model = cls.from_pretrained(
        name, dtype=dtype, device=device, config=config, revision=revision, layers=layers, experts=experts, parts=chosen,
        ignore=ignore, check=check, weights=weights, dtype_policy=dtype_policy, subfolder=subfolder, **hub, **keywords,
    )
    left_out = getattr(getattr(model, "loading_report", None), "left_out", None)
    if left_out:
        listed = ", ".join(f"{part} ({count} tensors)" for part, count in left_out.items())
        log.warning("%s: loaded as %s; left out: %s", folder, cls.__name__, listed)
    if tokenizer is None:
        log.warning(
            "%s has no %s: load() returns None for the tokenizer. Save one there with tokenizer.save_pretrained(folder), or "
            "read that of the original checkpoint: qwen35moe.AutoTokenizer.from_pretrained(name)", folder, TOKENIZER_FILE,
        )
    return model, tokenizer


def load_processor(name: str | os.PathLike[str], *, revision: str | None = None, **keywords: Any) -> Processor:
    """The processor of the model that `load` returns for this name: it turns messages with images and videos into inputs,
    and generated tokens into replies. keywords: those of `Processor.from_pretrained`, and of the Hub (token, ...)."""
    from qwen35moe.processing.processor import Processor

    return Processor.from_pretrained(locate(name, revision, keywords)[0], **keywords)


def load_with_tokenizer(name: str | os.PathLike[str], **options: Any) -> tuple[Any, Tokenizer]:
    """`load` for a program that reads text: ValueError, before weights are read, where there is no tokenizer."""
    if not (folder := find(name)).joinpath(TOKENIZER_FILE).exists():
        raise ValueError(f"{folder} has no {TOKENIZER_FILE}: copy it from the original checkpoint into this folder")
    return load(name, **options)


def class_for(config: Config, suffix: str) -> Any:
    """The class of a configuration: Qwen3_5MoeForCausalLM for "ForCausalLM", or its dense sibling."""
    from qwen35moe.models import text, vision_language

    name = ("Qwen3_5Moe" if config.text_config.is_moe else "Qwen3_5") + suffix
    return getattr(text, name, None) or getattr(vision_language, name)


def has_tower(folder: Path) -> bool:
    """Whether the files of a folder contain a vision tower (config.json may describe one that they lack)."""
    names = map(canonical, read_headers(folder, []).tensors)
    return any(part_of(name) == "visual" for name in names if name is not None)


def locate(
    name: str | os.PathLike[str], revision: str | None, keywords: dict[str, Any], *, wanted: Wanted | None = no_weights
) -> tuple[Path, dict[str, Any], Any]:
    """The folder of a name; takes the keywords of the Hub out of `keywords` and returns them too, and the subfolder."""
    hub = {key: keywords.pop(key) for key in HubOptions.__dataclass_fields__ if key in keywords}
    if (old := keywords.pop("use_auth_token", None)) is not None:
        hub.setdefault("token", old)
    subfolder = keywords.pop("subfolder", None)
    set_options = {key: value for key, value in hub.items() if value is not None}
    return find(name, revision, wanted=wanted, options=HubOptions(**set_options), subfolder=subfolder), hub, subfolder


def find(
    name: str | os.PathLike[str], revision: str | None = None, *, wanted: Wanted | None = None,
    options: HubOptions = DEFAULTS, subfolder: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder of a checkpoint. ValueError if there is none. wanted: of a Hub name only these tensors."""
    given_name: Any = name
    if not isinstance(given_name, str | os.PathLike) or not os.fspath(name):
        raise ValueError(f"name={short(name)}: give a folder with config.json, a Hub name (owner/name), or {TINY!r}")
    if name == TINY and not Path(TINY).is_dir():
        return BUNDLED
    folder = Path(name).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder that holds config.json")
    request: Any = {"revision": revision, "wanted": wanted, "optional": OTHER_FILES, "options": options, "subfolder": subfolder}
    try:  # a tokenizer that is not cached yet is fetched
        cached = folder_of(name, required=[TOKENIZER_FILE], **request)
    except CheckpointError:
        cached = folder_of(name, **request)  # without one
    if not cached.is_dir():
        raise ValueError(f"there is no folder {cached}: give a folder with config.json, a Hub name (owner/name), or {TINY!r}")
    return cached
