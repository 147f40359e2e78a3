"""Conversations to prompts: what `Tokenizer.apply_chat_template` and `Processor.apply_chat_template` share.

The messages are read once (`messages.py`); strings in them that look like control tokens are marked before the template runs,
so that the pieces of its text tell which control tokens the template wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..compat import TOKENIZER, read_keywords, short
from .batch import BatchEncoding, tensor_kind
from .media import Media
from .messages import check_depth, read_messages
from .pieces import Pieces, RenderedPrompt
from .settings import SETTINGS
from .template import REASONING, ChatTemplate, Marks, check_tools, plain_data

if TYPE_CHECKING:
    from .text import Tokenizer

CHAT_KEYWORDS = ("messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
                 "tokenize", "return_dict", "special", "padding", "truncation", "max_length", "padding_side",
                 "pad_to_multiple_of", "return_tensors", "return_attention_mask", "add_special_tokens")  # fmt: skip
_TAG = "CONTINUE_FINAL_MESSAGE_TAG"


@dataclass(frozen=True)
class ChatOptions:
    """The inputs of a template besides the messages, and whether the last message stays open.

    continue_final_message: True, or the name of the field to continue ("reasoning_content").
    """

    tools: Any = None
    documents: Any = None
    add_generation_prompt: bool = False
    continue_final_message: bool | str = False
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tools is not None:
            listed = isinstance(self.tools, Iterable) and not isinstance(self.tools, (str, Mapping))
            tools = list(self.tools) if listed else self.tools
            check_tools(tools)
            object.__setattr__(self, "tools", tools)


@dataclass(frozen=True)
class Conversation:
    """Messages as plain data for a template, and their images and videos."""

    messages: list[dict[str, Any]]
    media: list[Media]


def conversations(messages: Any, source: str) -> tuple[list[Conversation], bool]:
    """Each conversation of a batch, and whether it is a batch. `messages` is one conversation or a list of them."""
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"messages is a list of messages or of conversations, got {type(messages).__name__}")
    check_depth(messages, "messages")
    batched = bool(messages) and isinstance(messages[0], (list, tuple))
    batch = messages if batched else [messages]
    if not all(isinstance(conversation, (list, tuple)) for conversation in batch):
        raise ValueError("a batch is a list of conversations: one of its entries is a single message")
    return [Conversation(*read_messages(conversation, source)) for conversation in batch], batched


def render(template: ChatTemplate, messages: Sequence[Any], options: ChatOptions, named: Mapping[str, str]) -> str:
    """The prompt as text. messages: plain data. named: values for the template such as eos_token."""
    final = options.continue_final_message
    if options.add_generation_prompt and final:
        raise ValueError(
            "add_generation_prompt opens a new message and continue_final_message keeps the last one open: give one of them"
        )
    own = {"tools": options.tools, "documents": options.documents, "add_generation_prompt": options.add_generation_prompt}
    template.check_variables(own)
    variables = {**named, **template.check_variables(options.variables, [*CHAT_KEYWORDS, *SETTINGS]), **own}

    def rendered(messages: Sequence[Any]) -> str:
        return template.run(messages, variables)

    if not final:
        return rendered(messages)
    return _open_end(template, messages, final if isinstance(final, str) else "content", rendered)


def _open_end(template: ChatTemplate, messages: Sequence[Any], name: str, rendered: Any) -> str:
    """The prompt up to the end of one field of the last message, as in transformers: a tag is rendered there and cut off."""
    if not messages:
        raise ValueError("continue_final_message needs a message to continue")
    last = dict(messages[-1])
    fields = [other for other in REASONING if other in last] if name in REASONING else [name]
    text = next((last[other] for other in fields if last.get(other) is not None), None)
    if text is None:
        raise ValueError(f"continue_final_message: the last message has no {short(name)} to continue")
    tag = _TAG
    while tag in json.dumps(messages, ensure_ascii=False):
        tag += "_"
    if isinstance(text, list):
        blocks = [dict(block) if isinstance(block, dict) else block for block in text]
        block = next((block for block in reversed(blocks) if isinstance(block, dict) and "text" in block), None)
        if block is None:
            raise ValueError("continue_final_message: the last message has no text to continue")
        text, block["text"] = block["text"], block["text"] + tag + " "
        last[name] = blocks
    elif isinstance(text, str):
        last.update(dict.fromkeys(fields, text + tag + " "))
    else:
        raise ValueError(f"continue_final_message: {name} must be text, got {type(text).__name__}")
    prompt = rendered([*messages[:-1], last])
    at = prompt.rfind(tag)
    if at < 0 or text.strip() not in prompt:
        raise ValueError(
            f"continue_final_message: the chat template leaves out or changes {name} of the last message, so it cannot be "
            f"continued: {short(text)}"
        )
    return prompt[:at] if prompt.startswith(tag + " ", at) else prompt[:at].rstrip()


def pieces(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Any], options: ChatOptions, named: Mapping[str, str],
    special: bool,
) -> Pieces:
    """The rendered prompt, split at its control tokens. special: also those that the messages spell."""
    tokens = list(tokenizer.added_tokens)
    if special:
        text = render(template, messages, options, named)
        return Marks.absent_from(text).split(text, tokens)
    values: Any = plain_data({"messages": list(messages), "tools": options.tools, "documents": options.documents,
                              "variables": dict(options.variables)})  # fmt: skip
    marks = Marks.absent_from(json.dumps(values, ensure_ascii=False), template.source)
    messages = [
        marks.escape(message, sorted(tokenizer.special_tokens) if message.get("role") == "assistant" else tokens)
        for message in values.pop("messages")
    ]
    escaped = marks.escape(values, tokens)
    options = ChatOptions(escaped["tools"], escaped["documents"], options.add_generation_prompt,
                          options.continue_final_message, escaped["variables"])  # fmt: skip
    return marks.split(render(template, messages, options, named), tokens)


def rendered_prompts(
    template: ChatTemplate, chats: Sequence[Conversation], rows: Sequence[Pieces], options: ChatOptions,
    named: Mapping[str, str],
) -> list[RenderedPrompt]:
    """The prompts of conversations as text. rows: their `pieces`."""
    return [RenderedPrompt(render(template, chat.messages, options, named), row) for chat, row in zip(chats, rows, strict=True)]


def own_template(tokenizer: Any, source: str | None) -> ChatTemplate:
    """The compiled template of an object with `_chat`, its last one. ValueError if there is none."""
    if source is None:
        raise ValueError(
            "this checkpoint has no chat template (chat_template.jinja): pass text instead of messages, or chat_template="
        )
    compiled = tokenizer.__dict__.get("_chat")
    if compiled is None or compiled.source != source:
        compiled = tokenizer.__dict__["_chat"] = ChatTemplate(source)
    return compiled


def read_options(
    keywords: Mapping[str, Any], table: Iterable[Any], own: Iterable[str], method: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keywords of the method under this library's names, variables of the template): a keyword that neither the method
    nor the table has is a variable."""
    known = {keyword.name for keyword in table}
    own = list(own)
    read = read_keywords(method, table, {name: value for name, value in keywords.items() if name in known or name in own}, own)
    return read, {name: value for name, value in keywords.items() if name not in known and name not in own}


def check_text_only(keywords: Mapping[str, Any]) -> None:
    """ValueError for keywords about ids, images or videos in a call with tokenize=False, which gives text."""
    for name, value in keywords.items():
        if name not in ("return_tensors", "return_attention_mask", "add_special_tokens") and value not in (None, False, "left"):
            raise ValueError(f"{name}={short(value)} has no effect with tokenize=False, which gives text: leave it out")


def tokenizer_chat(tokenizer: Tokenizer, messages: Any, tools: Any, keywords: dict[str, Any]) -> Any:
    """`Tokenizer.apply_chat_template`."""
    read, variables = read_options(keywords, TOKENIZER, CHAT_KEYWORDS, "apply_chat_template")
    messages = read.pop("messages", messages)
    special, tokenize = read.pop("special", None), read.pop("tokenize", True)
    template = own_template(tokenizer, tokenizer.get_chat_template(read.pop("chat_template", None)))
    options = ChatOptions(tools, read.pop("documents", None), bool(read.pop("add_generation_prompt", False)),
                          read.pop("continue_final_message", False) or False, variables)  # fmt: skip
    chats, batched = conversations(messages, template.source)
    named = {**tokenizer.named_tokens, **tokenizer.special_tokens_map}
    rows = [pieces(tokenizer, template, chat.messages, options, named, bool(special)) for chat in chats]
    if not tokenize:
        read.pop("return_dict", None)
        check_text_only(read)
        texts = rendered_prompts(template, chats, rows, options, named)
        return texts if batched else texts[0]
    if any(chat.media for chat in chats):
        raise ValueError("the messages hold images or videos, which a tokenizer cannot read: use the processor")
    return_dict = read.pop("return_dict", True)
    kind = tensor_kind(tokenizer.defaults.return_tensors if read.get("return_tensors", "auto") == "auto"
                       else read["return_tensors"])  # fmt: skip
    texts = [RenderedPrompt("".join(text for _, text in row), row) for row in rows]
    inputs: BatchEncoding = tokenizer(texts if batched else texts[0], **{**read, "return_tensors": kind})
    return inputs if return_dict is None or return_dict else inputs["input_ids"]
