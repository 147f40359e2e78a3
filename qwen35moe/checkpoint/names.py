"""Names of tensors: those of published files, those of a model, and the canonical name that both map to.

The canonical name is the name without the wrappers around the text model:

    model.language_model.layers.3.linear_attn.A_log    published, multimodal     ->  layers.3.linear_attn.A_log
    model.layers.3.linear_attn.A_log                   text only                 ->  layers.3.linear_attn.A_log
    language_model.model.layers.3.linear_attn.A_log    some fine-tunes           ->  layers.3.linear_attn.A_log
    layers.3.linear_attn.A_log                         a bare text model         ->  layers.3.linear_attn.A_log
    lm_head.weight, model.lm_head.weight, ...                                    ->  lm_head.weight
    model.visual.*, visual.*, vision_tower.*                                     ->  visual.*
    mtp.*                                                                        ->  mtp.*
    _orig_mod.*, module.*                              torch.compile, DDP    ->  *

Loading maps both sides to canonical names, so no class needs a table of renames. Wrappers are removed in any order and
number: transformers 5.4 to 5.5.3 wrote `model.language_model.language_model...` and `model.language_model.visual...` (its
issue 45357). torch.compile, checkpointing and FSDP add their component to every name below the module that they wrap
(`layers.3._orig_mod.mlp...`). Two stored names with the same canonical name are an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

_WRAPPERS = re.compile(r"^(?:(?:model|language_model|module)\.)+")
_ADDED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_PARTS = {
    "embed_tokens": "text",
    "layers": "text",
    "norm": "text",
    "rotary_emb": "text",  # only as one of COMPUTED
    "lm_head": "head",
    "visual": "visual",
    "vision_tower": "visual",
    "mtp": "mtp",
}

# Parts of a checkpoint that a model may leave out, with the pattern under which the report counts them. Any other stored
# tensor without a parameter is an error.
LEFT_OUT = {"visual": "model.visual.*", "mtp": "mtp.*", "head": "lm_head.weight"}

# Tensors that some older exports store although every model computes them.
COMPUTED = ("rotary_emb.inv_freq",)

# A grouped expert tensor [E, rows, ...] and the per-expert projections that stack to it, in the order of their rows.
EXPERT_WEIGHTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_GROUPED = re.compile(r"^(?P<module>.+\.experts)\.(?P<weight>gate_up_proj|down_proj)$")
_SINGLE = re.compile(
    r"^(?P<module>.+\.experts)\.(?P<expert>0|[1-9]\d{0,8})\.(?P<projection>(?:gate|up|down)_proj)\.weight$"
)


def canonical(name: str) -> str | None:
    """The canonical name of a tensor, or None if the name belongs to no part of this architecture."""
    bare = _WRAPPERS.sub("", unwrapped(name))
    head, dot, rest = bare.partition(".")
    part = _PARTS.get(head)
    if part is None or not dot:
        return None
    return f"visual.{rest}" if part == "visual" else bare


def unwrapped(name: str) -> str:
    """The name without the components that torch's wrappers add."""
    return _ADDED.sub("", name) if "_orig_mod." in name or "_wrapped_module." in name else name


def wrapper_of(name: str) -> str | None:
    """The component that some wrapper has added to a name, or None."""
    if match := _ADDED.search(name):
        return match[0]
    return "module." if name.startswith("module.") else None


def ignored_by(patterns: Sequence[str], name: str) -> str | None:
    """The first of the patterns ("score.*") that a stored name fits; None if it fits none."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def checked_patterns(ignore: str | Iterable[str] | None) -> tuple[str, ...]:
    """The patterns of ignore=; ValueError for anything but strings."""
    listed: Any = () if ignore is None else ignore
    patterns = tuple(listed) if isinstance(listed, Iterable) and not isinstance(listed, str) else (listed,)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"ignore={patterns!r} must be patterns of tensor names, such as ['score.*']")
    return patterns


def part_of(canonical_name: str) -> str:
    """'text', 'head', 'visual' or 'mtp'."""
    return _PARTS[canonical_name.partition(".")[0]]


def published(canonical_name: str, *, multimodal: bool) -> str:
    """The published name of a tensor: text is `model.language_model.*` in a multimodal model, otherwise `model.*`."""
    part = part_of(canonical_name)
    if part == "text":
        return f"model.language_model.{canonical_name}" if multimodal else f"model.{canonical_name}"
    return f"model.{canonical_name}" if part == "visual" else canonical_name


def grouped_experts(canonical_name: str) -> tuple[str, tuple[str, ...]] | None:
    """('layers.3.mlp.experts', ('gate_proj', 'up_proj')) for a grouped expert tensor, None for any other."""
    match = _GROUPED.match(canonical_name)
    return None if match is None else (match["module"], EXPERT_WEIGHTS[match["weight"]])


def group_of(projection: str) -> tuple[str, tuple[str, ...]]:
    """('gate_up_proj', ('gate_proj', 'up_proj')) for 'up_proj': the grouped weight with this projection, and all of its."""
    return next((weight, group) for weight, group in EXPERT_WEIGHTS.items() if projection in group)


def single_expert(module: str, expert: int, projection: str) -> str:
    """'layers.3.mlp.experts.17.gate_proj.weight'."""
    return f"{module}.{expert}.{projection}.weight"


def expert_of(canonical_name: str) -> tuple[str, int, str] | None:
    """('layers.3.mlp.experts', 17, 'gate_proj') for the tensor of a single expert, None for any other."""
    match = _SINGLE.match(canonical_name)
    return None if match is None else (match["module"], int(match["expert"]), match["projection"])
