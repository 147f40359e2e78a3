"""How long rows of ids become: transformers' rules for padding=, truncation= and max_length=."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..compat import short

log = logging.getLogger(__name__)

LARGE = int(1e20)  # a model_max_length from here on is no limit
MAX_WIDTH = 1 << 28  # of a padded row: a larger max_length is a mistake


def truncation_limit(truncation: Any, max_length: int | None, padding: Any, model_max_length: int) -> int | None:
    """The number of tokens that a text is cut to, or None. ValueError for other values."""
    truncation = getattr(truncation, "value", truncation)
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"max_length must be an integer of at least 1, got {max_length!r}")
    if truncation is None and max_length is not None and not padding:
        return max_length  # as in transformers: max_length alone cuts
    if truncation in (None, False, "do_not_truncate"):
        if max_length is not None and padding in (True, "longest"):
            log.warning("max_length=%d has no effect with padding=%r: give truncation=True or padding='max_length'",
                        max_length, padding)  # fmt: skip
        return None
    if truncation not in (True, "longest_first", "only_first"):
        raise ValueError(f"truncation must be True, False, 'longest_first' or 'only_first', got {truncation!r}")
    limit = model_max_length if max_length is None else max_length
    return None if limit >= LARGE else limit


def padding_width(
    lengths: Sequence[int], padding: Any, max_length: int | None, multiple: int | None, model_max_length: int
) -> int | None:
    """The length that rows are padded to, or None for none. ValueError for other values."""
    padding = getattr(padding, "value", padding)
    if padding in (False, "do_not_pad"):
        return None
    if padding not in (True, "longest", "max_length"):
        raise ValueError(f"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', got {padding!r}")
    width = max(lengths)
    if padding == "max_length":
        limit = model_max_length if max_length is None else max_length
        width = limit if limit < LARGE else width  # longer rows stay as they are
    if multiple is not None:
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise ValueError(f"pad_to_multiple_of must be an integer of at least 1, got {multiple!r}")
        width = -(-width // multiple) * multiple
    if width > MAX_WIDTH:
        raise ValueError(f"rows of {width} tokens are too long: at most {MAX_WIDTH:,} are padded")
    return width


def pad_rows(rows: Sequence[Sequence[int]], width: int, fill: int, side: str) -> list[list[int]]:
    """The rows as lists of `width` values."""
    padding = [[fill] * (width - len(row)) for row in rows]
    return [[*pad, *row] if side == "left" else [*row, *pad] for row, pad in zip(rows, padding, strict=True)]


def columns_of(rows: Any) -> dict[str, list[Any]]:
    """Rows of ids, a mapping of rows or a list of mappings, as lists by name."""
    if isinstance(rows, (list, tuple)) and rows and isinstance(rows[0], Mapping):
        missing = next((name for name in rows[0] for features in rows if name not in features), None)
        if missing is not None:
            raise ValueError(f"pad takes features with the same names: {short(missing)} is not in all of them")
        rows = {name: [features[name] for features in rows] for name in rows[0]}
    if not isinstance(rows, Mapping):
        rows = {"input_ids": rows}
    if "input_ids" not in rows:
        raise ValueError(f"pad needs input_ids, got {short(list(rows))}")
    columns = {name: as_lists(values) for name, values in rows.items()}
    if not columns["input_ids"]:
        raise ValueError("no rows to pad")
    if not isinstance(columns["input_ids"][0], list):
        raise ValueError("pad takes a list of rows of ids, got one row: pass [row]")
    return columns


def as_lists(values: Any) -> Any:
    """Tensors and arrays, also in lists, as lists; anything else as it is."""
    if isinstance(values, Tensor) or hasattr(values, "__array_interface__"):
        return values.tolist()
    return [as_lists(value) for value in values] if isinstance(values, (list, tuple)) else values
