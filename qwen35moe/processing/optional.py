"""Imports of optional packages: the error of a missing one names the extra that installs it."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, message: str, extra: str) -> Any:
    """The imported module. Only its own absence is handled: an import error inside an installed package passes through."""
    top = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != top:
            raise
        raise ModuleNotFoundError(f"{message}: pip install 'qwen35moe[{extra}]'", name=top) from None
