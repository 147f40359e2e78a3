"""From a model's modules to the names of the catalogue: module paths, layer numbers, patterns."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from typing import TypeAlias

from torch import nn

from .catalogue import CATALOGUE, Entry

# (module, own name) -> (full name, entry)
Places: TypeAlias = dict[tuple[nn.Module, str], tuple[str, Entry]]

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "base_model"}
_PREFIX = re.compile(r"^(model\.|language_model\.)+")


def matching_places(model: nn.Module, patterns: Sequence[str]) -> Places:
    """The places whose names match. ValueError with the closest names for a pattern that matches none."""
    places = named_places(model)
    names = [name for name, _ in places.values()]
    result: Places = {}
    for pattern in patterns:
        glob = glob_of(pattern)
        matched = {place: named for place, named in places.items() if matches(named[0], glob)}
        if not matched:
            closest = difflib.get_close_matches(glob, dict.fromkeys(names), n=5, cutoff=0.3)
            hint = f"closest: {', '.join(closest)}" if closest else "taps.catalogue() lists all names"
            if reason := _other_kind(model, glob):
                hint = f"{reason}; {hint}"
            raise ValueError(f"{pattern!r:.100} matches no named value of this {type(model).__name__}; {hint}")
        result.update(matched)
    return result


def glob_of(pattern: str) -> str:
    """The pattern relative to the text model, with * for the letter N of a layer number."""
    if not isinstance(pattern, str):
        raise ValueError(f"a name or pattern is a string, not {type(pattern).__name__}")
    return re.sub(r"(?<=\.)N(?=\.)", "*", without_prefix(pattern))


def matches(name: str, glob: str) -> bool:
    """Whether a glob matches a name."""
    return fnmatch.fnmatchcase(name, glob)


def _other_kind(model: nn.Module, glob: str) -> str | None:
    """The reason why a layer of the model does not have a value that the catalogue lists, or None."""
    number = re.match(r"layers\.(\d+)\.(.*)", glob)
    if number is None:
        return None
    paths = {path for _, path in _modules_with_paths(model)}
    layers = sorted({int(match[1]) for path in paths if (match := re.match(r"layers\.(\d+)(?:\.|$)", path))})
    layer = int(number[1])
    if layer not in layers:
        return f"the model has the layers {layers[:40]}" if layers else None
    mixers = {"linear_attn": "linear_attention", "self_attn": "full_attention"}
    for other, kind in mixers.items():
        if number[2].split(".")[0] in mixers.keys() - {other} and f"layers.{layer}.{other}" in paths:
            return f"layer {layer} is a {kind} layer, its mixer is {other}"
    if number[2].startswith("mlp.") and f"layers.{layer}.mlp.experts" not in paths and f"layers.{layer}.mlp" in paths:
        return f"the feed-forward of layer {layer} is dense: its only value is mlp.output"
    return None


def _modules_with_paths(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every module with its path relative to the text model, with the checkpoint's layer numbers."""
    layers = next((m.__dict__["source_layers"] for m in model.modules() if "source_layers" in m.__dict__), ())
    return [(module, _with_source_layer(_relative(path), layers)) for path, module in model.named_modules()]


def named_places(model: nn.Module) -> Places:
    """Every place of this model that has a name."""
    modules = _modules_with_paths(model)
    roots = _roots({_catalogue_path(path) for _, path in modules})
    places: Places = {}
    for module, path in modules:
        for root in roots:
            parent = ".".join(part for part in (root, _catalogue_path(path)) if part)
            for entry in CATALOGUE:
                if entry.parent == parent and (entry.needs is None or hasattr(module, entry.needs)):
                    places[module, entry.leaf] = (f"{path}.{entry.leaf}" if path else entry.leaf, entry)
    return places


def without_prefix(name: str) -> str:
    """The name relative to the text model: without leading "model." and "language_model."."""
    return _PREFIX.sub("", name)


def _relative(path: str) -> str:
    """A module's path relative to the text model: without wrappers (compile, FSDP, DDP, peft) and outer models."""
    parts = [part for part in path.split(".") if part and part not in _WRAPPERS]
    while parts and parts[0] in ("model", "language_model"):
        del parts[0]
    return ".".join(parts)


def _catalogue_path(path: str) -> str:
    """The path with N for every layer number; the MTP head's layers count as layers of the text model."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", path.removeprefix("mtp."))


def _with_source_layer(path: str, layers: Sequence[int]) -> str:
    """The path with the checkpoint's layer number in place of the model's, for a model that holds some layers only."""
    match = re.match(r"layers\.(\d+)(.*)", path)
    if match is None or int(match[1]) >= len(layers):
        return path
    return f"layers.{layers[int(match[1])]}{match[2]}"


def _roots(paths: set[str]) -> list[str]:
    """The catalogue path of the model itself: "" for a text model, "layers.N" for a bare decoder layer, and so on.

    It is the path below which the catalogue lists most of the model's modules. A bare mixer or feed-forward block has no
    submodules in the catalogue: then every part of a layer is tried.
    """
    parents = sorted({entry.parent for entry in CATALOGUE}, key=len)
    counts = {
        root: len({parent[len(root) :].lstrip(".") for parent in parents if parent != root and parent.startswith(root)} & paths)
        for root in parents
    }
    best = max(parents, key=lambda root: counts[root])  # the first of several, the shortest
    return [best] if counts[best] else [root for root in parents if root.count(".") > 1 and root.startswith("layers")]
