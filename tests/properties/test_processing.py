"""Parsers and processors on random and hostile input: a value or a ValueError, within a budget of processor time and memory.

The budgets are far above what linear work needs and far below what quadratic work would: a slow or busy machine meets them.
"""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35moe.processing.images import ImageProcessor
from qwen35moe.processing.pixels import IMAGE_DEFAULTS, PixelSettings, smart_resize
from qwen35moe.processing.reply import MARKUP, parse_pieces
from qwen35moe.processing.template import ChatTemplate
from tests.properties.tried import tried

SECONDS, BYTES = 20.0, 400 * 2**20


@contextmanager
def budget(seconds: float = SECONDS, size: int = BYTES) -> Iterator[None]:
    """Asserts the processor time of this thread and Python's memory (tracemalloc) of a block."""
    tracemalloc.start()
    start = time.thread_time()
    try:
        yield
    finally:
        spent, peak = time.thread_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert spent < seconds and peak < size, f"{spent:.1f} s, {peak / 2**20:.0f} MiB"


# -------------------------------------------------------------------------------------------------------------- replies

NAME = st.text("abcdefgh_.-", min_size=1, max_size=8)
# What the format can carry: values lose one newline at each end, and cannot hold the closing tag.
TEXT = st.text(max_size=30).filter(lambda text: "</parameter>" not in text)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=3), max_leaves=6,
)  # fmt: skip


@given(
    name=NAME, values=st.dictionaries(NAME, TEXT, max_size=4), structured=st.dictionaries(NAME, JSON, max_size=3),
    blank=st.sampled_from(["", "\n", " \n\n"]),
)
def test_a_call_that_is_written_is_read(name: str, values: dict[str, str], structured: dict[str, Any], blank: str) -> None:
    """Qwen's form: strings as they are, other values as JSON, typed by the schema."""
    structured = {key: value for key, value in structured.items() if key not in values and not isinstance(value, str)}
    kinds = {bool: "boolean", int: "integer", list: "array", dict: "object", type(None): "null"}
    schema = {key: {"type": "string"} for key in values} | {key: {"type": kinds[type(v)]} for key, v in structured.items()}
    written = values | {key: json.dumps(value) for key, value in structured.items()}
    if any("</parameter>" in text for text in written.values()):
        return
    body = "".join(f"{blank}<parameter={key}>\n{text}\n</parameter>" for key, text in written.items())
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": schema}}}]
    pieces = [(True, "<tool_call>"), (False, f"\n<function={name}>{body}{blank}</function>\n"), (True, "</tool_call>")]
    reply = parse_pieces(pieces, tools=tools)
    assert len(reply.tool_calls) == 1 and not reply.content
    assert reply.tool_calls[0].name == name and reply.tool_calls[0].arguments == values | structured
    tried("tool calls read back")


FRAGMENT = st.sampled_from(
    [*MARKUP, "\n", " ", "<function=", "<function=f>", "</function>", "<parameter=", "<parameter=a>", "</parameter>", ">",
     "{", "}", '{"name": "f", "arguments": ', '"', "[", "]", ",", ":", "\\", "x", "\u2028", "\ud7ff", "0", "-", "e9"]
)  # fmt: skip


@given(parts=st.lists(st.tuples(FRAGMENT, st.integers(1, 4)), max_size=25), times=st.sampled_from([1, 1, 1, 20_000]),
       thinking=st.booleans())  # fmt: skip
@settings(max_examples=60)
def test_any_reply_is_parsed_in_linear_time_and_loses_no_answer(
    parts: list[tuple[str, int]], times: int, thinking: bool
) -> None:
    pieces = [(fragment in MARKUP, fragment) for fragment, count in parts for _ in range(count)]
    if times > 1:  # one of the fragments many times, as one piece
        pieces.append((False, "".join(fragment for fragment, _ in parts[:3]) * times))
    with budget():
        reply = parse_pieces(pieces, thinking=thinking)
    # Text outside of reasoning and calls is content, in order.
    assert isinstance(reply.content, str) and len(reply.content) <= sum(len(text) for _, text in pieces)
    if not any(control for control, _ in pieces) and not thinking:
        assert reply.content == "".join(text for _, text in pieces).strip("\n")
    json.dumps(reply.message())
    tried("replies parsed")


# ------------------------------------------------------------------------------------------------------------ templates

STATEMENT = st.sampled_from(
    [
        "{{ messages }}", "{{ 'a' * 10 ** 9 }}", "{{ range(10 ** 9) | list | length }}",
        "{% for i in range(10 ** 7) %}x{% endfor %}", "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% set x = x ~ x %}", "{% set x = 'ab' * 99999 %}", "{{ x * 99999 }}", "{{ messages | tojson(indent=10 ** 6) }}",
        "{{ '%999999999d' | format(1) }}", "{{ ''.join(['a' * 10 ** 6] * 10 ** 4) }}", "{{ 9 ** 9 ** 9 }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "{{ x.__class__ }}", "{{ x.replace('a', x) }}",
        "{{ messages[0].content.split('') }}", "{{ raise_exception('no') }}", "{{ 'x' | center(10 ** 9) }}",
        "{{ x | batch(1) | list }}",
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s | length }}",
        "{% if", "{{ undefined.attribute }}", "text", "{% set x = [x, x, x] %}", "{{ x | string | length }}", "{{ 1 / 0 }}",
        "{{ ('a' * 999).ljust(10 ** 9) }}", "{{ [1] * 10 ** 9 }}", "{{ (1, 2) * 10 ** 8 }}",
        "{{ '{:>999999999}'.format(1) }}",
    ]
)  # fmt: skip


@given(statements=st.lists(STATEMENT, min_size=1, max_size=6), content=st.text(max_size=20))
@settings(max_examples=60)
def test_any_template_renders_or_is_refused_within_its_budget(statements: list[str], content: str) -> None:
    with budget():
        try:
            template = ChatTemplate("{% set x = 'a' %}" + "".join(statements))
            text = template.render([{"role": "user", "content": content}])
        except ValueError as error:
            assert len(str(error)) < 2_000
            tried("templates refused")
            return
    assert isinstance(text, str)
    tried("templates rendered")


# --------------------------------------------------------------------------------------------------------------- images


@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), least=st.integers(1, 200), most=st.integers(1, 4000),
    patch=st.sampled_from([8, 14, 16]), merge=st.sampled_from([1, 2, 3]),
)  # fmt: skip
def test_sizes_are_those_of_the_definition(
    height: int, width: int, least: int, most: int, patch: int, merge: int
) -> None:
    """Round both sides to units; where the area is beyond a limit, scale both sides to that limit and round towards it."""
    unit = patch * merge
    low, high = least * unit**2, max(least, most) * unit**2
    limits = {"patch_size": patch, "merge_size": merge, "min_pixels": low, "max_pixels": high}
    sized = IMAGE_DEFAULTS.with_values(limits, "test")
    try:
        actual = smart_resize(height, width, sized)
    except ValueError:
        assert max(height, width) / min(height, width) > 200
        tried("picture sizes refused")
        return
    sides = [round(side / unit) * unit for side in (height, width)]
    if sides[0] * sides[1] > high:
        scale = math.sqrt(height * width / high)
        sides = [max(unit, math.floor(side / scale / unit) * unit) for side in (height, width)]
    elif sides[0] * sides[1] < low:
        scale = math.sqrt(low / (height * width))
        sides = [math.ceil(side * scale / unit) * unit for side in (height, width)]
    assert list(actual) == [max(unit, side) for side in sides]
    tried("picture sizes")


SETTING = st.sampled_from(
    ["patch_size", "merge_size", "temporal_patch_size", "size", "image_mean", "image_std", "do_resize", "resample",
     "min_pixels", "max_pixels", "rescale_factor", "do_rescale", "do_normalize", "do_convert_rgb"]
)  # fmt: skip


@given(data=st.dictionaries(
    SETTING,
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=4)
    | st.lists(st.floats(width=16) | st.integers(0, 2**40), max_size=4)
    | st.dictionaries(st.sampled_from(["shortest_edge", "longest_edge", "height"]), st.integers(-1, 2**65), max_size=2),
    max_size=5,
))  # fmt: skip
def test_any_settings_are_refused_or_process_a_small_picture_within_the_budget(data: dict[str, Any]) -> None:
    picture = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    with budget():
        try:
            read: PixelSettings = IMAGE_DEFAULTS.with_values(data, "preprocessor_config.json")
            out = ImageProcessor(read)(picture)
        except ValueError as error:
            assert len(str(error)) < 2_000
            tried("picture settings refused")
            return
    values = out["pixel_values"]
    assert values.shape[0] == int(out["image_grid_thw"].prod()) and values.nbytes < BYTES
    tried("pictures processed")
