"""A checkpoint folder for tests of chat and visual inputs: a tokenizer with vision tokens, a chat template of our own with the
features of the published one (ChatML, thinking, tools, vision ids), and the preprocessor files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.fakes import tokenizer_definition

VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TOOL_TOKENS = ["</tool_call>", "<tool_response>", "</tool_response>"]

TEMPLATE = r"""
{%- macro shown(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if part.type == 'image' or 'image' in part %}
                {%- set count.images = count.images + 1 %}
                {%- if add_vision_id %}{{ 'Picture ' ~ count.images ~ ': ' }}{% endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'video' in part %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- else %}
                {{- raise_exception('no such part: ' ~ part) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set count = namespace(images=0, last=0) %}
{%- if not messages %}{{ raise_exception('there are no messages') }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'user' and not message.content is none %}
        {%- set count.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{ shown(messages[0].content) | trim ~ '\n\n' }}{% endif %}
    {{- '# Tools\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\n' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' ~ shown(messages[0].content) | trim ~ '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{ raise_exception('a system message comes first') }}{% endif %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {%- set content = shown(message.content) | trim %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if reasoning and (preserve_thinking or loop.index0 > count.last) %}
            {{- '<think>\n' ~ reasoning.strip() ~ '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n<function=' ~ call.function.name ~ '>\n' }}
            {%- for name, value in call.function.arguments | items %}
                {{- '<parameter=' ~ name ~ '>\n' }}
                {{- value if value is string else value | tojson }}
                {{- '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' ~ shown(message.content) ~ '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ shown(message.content) | trim ~ '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '<think>\n' }}
{%- endif %}
"""

PREPROCESSOR = {
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}


def definition() -> dict[str, Any]:
    tokenizer = tokenizer_definition()
    first_id = max(token["id"] for token in tokenizer["added_tokens"]) + 1
    for number, token in enumerate([*VISION, *TOOL_TOKENS]):
        tokenizer["added_tokens"].append(
            {"id": first_id + number, "content": token, "special": token in VISION, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False}
        )  # fmt: skip
    return tokenizer


def write_folder(path: Path, template: str = TEMPLATE) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(definition()))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    (path / "chat_template.jinja").write_text(template)
    image = {"size": {"shortest_edge": 1024, "longest_edge": 16_384}, "image_processor_type": "Qwen2VLImageProcessorFast"}
    video = {"size": {"shortest_edge": 512, "longest_edge": 32_768}, "video_processor_type": "Qwen3VLVideoProcessor"}
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | image))
    (path / "video_preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | video))
    return path


def processor_of_transformers(folder: Path | str, **options: Any) -> Any:
    """transformers' Qwen3VLProcessor of a folder for text and images. options: of its tokenizer.

    Its AutoProcessor also needs torchvision, for videos: here a stand-in has the two settings from which transformers computes
    timestamps and placeholders.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    class Unchecked(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    return Unchecked(
        Qwen2VLImageProcessorPil.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder, **options),
        SimpleNamespace(merge_size=2, temporal_patch_size=2),
        chat_template=(Path(folder) / "chat_template.jinja").read_text(),
    )  # fmt: skip
