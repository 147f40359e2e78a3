"""from_pretrained, from_config and save_pretrained: our arguments, and those of transformers by the table of `compat`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwen35moe.compat import read_keywords, short
from qwen35moe.compat.loading import LOADING
from qwen35moe.compat.saving import SAVING
from qwen35moe.config import Config
from qwen35moe.config.reading import TEXT_KEYS
from qwen35moe.models.device_map import Devices
from qwen35moe.models.for_libraries import ForLibraries

if TYPE_CHECKING:
    from typing_extensions import Self

HUB = ("token", "cache_dir", "local_files_only", "force_download")
_OWN = (
    "path", "dtype", "device", "config", "revision", "layers", "experts", "parts", "ignore", "check", "weights", "dtype_policy",
    "subfolder", "output_loading_info", "generation_config", "attention", *HUB,
)  # fmt: skip


class FromPretrained(ForLibraries):
    """Base of `PretrainedModel`: loading and saving checkpoints."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
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
    ) -> Self:
        """A model with the weights of a checkpoint, in eval mode.

        path: a folder, a name on the Hub (owner/name) at `revision`, or "tiny", the bundled checkpoint.
        dtype: "auto" is that of the stored weights; parameters kept in fp32 (A_log, ...) stay float32.
        device: a device; "auto" (all GPUs, or the CPU) or a list places whole layers on several devices; a dict of module names
            places them as it says; "meta" checks the checkpoint and reads no weights.
        config: used instead of config.json: any kind of configuration that `Config.of` reads.
        layers, experts, parts: of the checkpoint only these, by the checkpoint's numbers.
        ignore: patterns of tensors that are left out, as ["score.*"]. check: whether weights are searched for NaN and infinity.
        weights: "map" uses the files as memory on a CPU, "copy" reads them, "packed" packs them as `pack_weights` does.
        dtype_policy: "transformers" rounds the parameters kept in fp32 through `dtype`, as transformers does.
        keywords: those of transformers' from_pretrained (docs/guide/from_transformers.md), and fields of the configuration.

        CheckpointError lists what is missing, unexpected, of a wrong shape or damaged. ValueError or TypeError: an argument.
        """
        from qwen35moe.checkpoint import load_model

        arguments = dict(path=path, dtype=dtype, device=device, config=config, revision=revision, layers=kept(layers),
                     experts=kept(experts), parts=kept(parts), ignore=kept(ignore), check=check, weights=weights,
                     dtype_policy=dtype_policy)  # fmt: skip
        read, fields = read_loading("from_pretrained", arguments, keywords)
        folder = checkpoint_folder(read)
        if fields or read["config"] is not None:
            whole = Config.from_pretrained(folder) if read["config"] is None else Config.of(read["config"])
            read["config"] = whole.replace(**fields) if fields else whole
        read["device"] = "cpu" if read["device"] is None else read["device"]
        ours = {name: value for name, value in read.items() if name in arguments and name not in ("path", "revision")}
        with torch.inference_mode(False):  # parameters made under inference_mode could not be trained
            model = load_model(cls, folder, **ours)
        model.name_or_path = model.config._name_or_path = os.fspath(read["path"])
        if read.get("generation_config") is not None:
            model.generation_config = read["generation_config"]
        if read.get("attention") not in (None, "auto"):
            model.use_backends(attention=read["attention"])
        result: Any = (model, _loading_info(model)) if read.get("output_loading_info") else model
        return result

    @classmethod
    def from_config(cls, config: Any, *, dtype: str | torch.dtype | None = None, **keywords: Any) -> Self:
        """A new model of any kind of configuration that `Config.of` reads, its parameters drawn as by the constructor and then
        converted to `dtype`. keywords: those of transformers' from_config, and fields of the configuration."""
        arguments = dict(dtype=dtype)
        read, fields = read_loading("from_config", arguments, keywords)
        config = Config.of(config)
        build: Any = cls
        model = build(config.replace(**fields) if fields else config)
        if read["dtype"] not in (None, "auto"):
            model.to(_dtype(read["dtype"]))
        if read.get("attention") not in (None, "auto"):
            model.use_backends(attention=read["attention"])
        return model

    @classmethod
    def _from_config(cls, config: Any, **keywords: Any) -> Self:
        """The same; transformers and TRL call it by this name."""
        return cls.from_config(config, **keywords)

    def save_pretrained(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        layout: str = "grouped",
        max_shard_size: int | str = "5GB",
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        **keywords: Any,
    ) -> None:
        """Writes a checkpoint folder in one step: config.json, the weights, generation_config.json.

        layout: "grouped" stores the experts of a layer as two tensors, as published; "per_expert" as three per expert.
        max_shard_size: bytes, or a number with KB, MB, GB or KiB, MiB, GiB. state_dict: values to write instead of the model's
        own, by its names. is_main_process: False writes nothing. keywords: those of transformers' save_pretrained.
        """
        from qwen35moe.checkpoint import save_model

        arguments = dict(path=path, layout=layout, max_shard_size=max_shard_size, state_dict=state_dict,
                     is_main_process=is_main_process)  # fmt: skip
        read = _read("save_pretrained", SAVING, arguments, keywords)
        checked_path("save_pretrained", read["path"])
        if not read["is_main_process"]:
            return
        if read["state_dict"] is not None:
            check_values(self, read["state_dict"])
        save_model(
            self, read["path"], layout=read["layout"], max_shard_size=read["max_shard_size"], state_dict=read["state_dict"]
        )


def read_loading(method: str, arguments: dict[str, Any], keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments in our words, and the fields of the configuration among them."""
    known = {*arguments, *_OWN, *(keyword.name for keyword in LOADING)}
    fields = {name: value for name, value in keywords.items() if name in TEXT_KEYS and name not in known}
    rest = {name: value for name, value in keywords.items() if name not in fields}
    return _read(method, LOADING, arguments, rest, [*_OWN, *TEXT_KEYS] if rest.keys() - known else _OWN), fields


def _read(method: str, table: Any, arguments: dict[str, Any], keywords: dict[str, Any], own: Any = ()) -> dict[str, Any]:
    """`given` with the keywords in our words. An argument at its default gives way to a keyword that means the same."""
    defaults = {"dtype": "auto", "device": "cpu"}
    explicit = {name: value for name, value in arguments.items() if value is not None and value != defaults.get(name)}
    if not keywords:
        return dict(arguments)
    return {**arguments, **read_keywords(method, table, {**explicit, **keywords}, [*arguments, *own])}


def checked_path(method: str, path: Any) -> None:
    """ValueError for no path and the empty one, which would be the current folder."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        hub = ", or a name on the Hub" if method == "from_pretrained" else ""
        raise ValueError(f"{method}(path={short(path)}): name a folder{hub}")


def checkpoint_folder(read: Mapping[str, Any]) -> Path:
    """The folder of the checkpoint that the arguments of from_pretrained name, fetched from the Hub if it is a name there."""
    from qwen35moe.checkpoint.hub import HubOptions, folder_of
    from qwen35moe.checkpoint.selection import Selection

    path = read["path"]
    checked_path("from_pretrained", path)
    selection = Selection.of(read.get("layers"), read.get("experts"), read.get("parts"))
    options = HubOptions(**{name: read[name] for name in HUB if read.get(name) is not None})
    wanted = None if selection.is_everything else selection.needs
    return folder_of(path, revision=read.get("revision"), wanted=wanted, options=options, subfolder=read.get("subfolder"))


def kept(values: Any) -> Any:
    """An iterator is read once, and its values are used more than once."""
    return list(values) if hasattr(values, "__next__") else values


def _dtype(value: Any) -> torch.dtype:
    dtype = value if isinstance(value, torch.dtype) else getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={short(value)} is no dtype of weights: give torch.bfloat16, float32, float16 or float64")
    return dtype


def _loading_info(model: Any) -> dict[str, Any]:
    """As transformers' output_loading_info. Missing and mismatched tensors are errors here, so those are empty."""
    left_out = set(model.loading_report.left_out)
    return {"missing_keys": set(), "unexpected_keys": left_out, "mismatched_keys": set(), "error_msgs": []}


def check_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """ValueError where the names or shapes of a state_dict differ from the model's."""
    named = dict(model.named_parameters(remove_duplicate=False))
    shared = {id(parameter) for name, parameter in named.items() if name in values}
    missing = [name for name, parameter in named.items() if id(parameter) not in shared]
    unexpected = [name for name in values if name not in named]
    wrong = [name for name in values if name in named and values[name].shape != named[name].shape]
    if missing or unexpected or wrong:
        problems = []
        for problem, listed in (("lacks", missing), ("has unknown", unexpected), ("has other shapes of", wrong)):
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            problems += [f"{problem} {', '.join(map(short, listed[:3]))}{more}"] if listed else []
        raise ValueError(f"save_pretrained(state_dict=...) {'; '.join(problems)}: give all of model.state_dict() by its names")
