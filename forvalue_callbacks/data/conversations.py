"""Messages as chat templates take them, by the rules of TRL, and what a template would make no text of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .reasons import SetUpError, UnscorableError

ROLES = ("system", "user", "assistant", "tool")
# What `apply_chat_template` is asked for: a row may set variables of the template, and nothing of these.
NOT_THE_ROWS = {
    *("conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "padding_side", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens", "processor_kwargs", "load_audio_from_video"),
}


def has_from_value(messages: Any) -> bool:
    """Whether these are messages with 'from' and 'value'."""
    return (
        isinstance(messages, list)
        and bool(messages)
        and isinstance(messages[0], dict)
        and {"from", "value"} <= set(messages[0])
    )


def messages_of(example: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """A column's messages with 'role' and 'content', as new dictionaries where they come with 'from' and 'value'.

    Raises:
        UnscorableError: one is no message, or its content is neither text nor parts (nor left out beside tool calls).
    """
    messages = example[column]
    if not isinstance(messages, list) or not messages:
        raise UnscorableError(f"{column!r} must be a list of messages with 'role' and 'content'")
    if has_from_value(messages):
        messages = [_renamed(message) for message in messages]
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UnscorableError(
                f"message {i} of {column!r} has no role: {column!r} must be a list of messages with 'role' and "
                "'content'"
            )
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not isinstance(content, str) and not parts:
            kind = "None" if content is None else f"a {type(content).__name__}"
            raise UnscorableError(
                f"the content of message {i} of {column!r} is {kind}, not text: fill it or drop the row"
            )
    return messages


def template_variables(example: Mapping[str, Any]) -> dict[str, Any]:
    """What a row sets for the chat template, with the tools that it may call.

    Raises:
        UnscorableError: it sets what is not the template's (rows come from anywhere, and a template is a program), or
            what cannot be read.
    """
    extra, tools = example.get("chat_template_kwargs"), example.get("tools")
    try:
        extra = {} if extra is None else {str(name): value for name, value in extra.items()}
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except (AttributeError, ValueError) as error:
        raise UnscorableError("'tools' must be JSON and 'chat_template_kwargs' a mapping") from error
    if taken := sorted(NOT_THE_ROWS & extra.keys()):
        raise UnscorableError(
            f"'chat_template_kwargs' sets {', '.join(map(repr, taken))}, which no row may: give the tokenizer its "
            "chat_template, and the config its lengths"
        )
    return {"tools": tools, **extra}


def _renamed(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    names = {"from": "role", "value": "content"}
    return {names.get(name, name): value for name, value in message.items()}


def in_parts(messages: Sequence[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Messages for a processor: every content a list of parts (`trl.prepare_multimodal_messages` without images).

    Raises:
        UnscorableError: a role that processors do not know, or a part that is an image.
    """
    for message in messages:
        if message["role"] not in ROLES:
            raise UnscorableError(f"a role in {source} is none of {', '.join(ROLES)}: rename it or drop the row")
        if isinstance(message.get("content"), list) and any(
            part.get("type") == "image" for part in message["content"]
        ):
            raise UnscorableError(
                f"a message in {source} has a place for an image, and the row has no image: drop the row"
            )
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def refuse_unread(messages: Sequence[dict[str, Any]], source: str, render: Callable[[Any], str]) -> None:
    """Raises UnscorableError where a chat template writes out a list or None as Python does, or leaves a part out.

    Args:
        messages: as `messages_of` gives them.
        render: messages to text.
    """
    if all(isinstance(message.get("content"), str) for message in messages):
        return
    texts = {
        i: _texts(message["content"], source)
        for i, message in enumerate(messages)
        if isinstance(message.get("content"), list)
    }
    shown = render(messages)
    joined = list(messages)
    for i, parts in texts.items():
        joined[i] = {**joined[i], "content": "".join(parts)}
    lines = [
        {**message, "content": "\n".join(texts[i])} if i in texts else message for i, message in enumerate(messages)
    ]
    if texts and shown not in (render(joined), render(lines)):
        raise UnscorableError(
            f"the content of a message in {source} is a list, which the chat template does not read as text: join "
            "its parts"
        )
    filled = [{**message, "content": message.get("content") or ""} for message in joined]
    if shown.count("None") > render(filled).count("None"):
        raise UnscorableError(
            f"the content of a message in {source} is None, which the chat template writes out: make it empty text"
        )


def _texts(parts: Sequence[Any], source: str) -> list[str]:
    if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
        raise UnscorableError(
            f"the content of a message in {source} has parts that are no text, and a tokenizer takes text: pass a "
            "processor and a data_collator, or drop the row"
        )
    return [part["text"] for part in parts]


def has_generation_markers(chat_template: str | dict[str, str]) -> bool:
    """Whether a chat template says which tokens are the assistant's."""
    template = chat_template["default"] if isinstance(chat_template, dict) else chat_template
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def training_template(processing_class: Any) -> str | None:
    """The chat template with generation markers that `SFTTrainer` would swap in for one without; None: it needs none.

    Raises:
        SetUpError: TRL has none for this template, or is not there (this is all that it is needed for).
    """
    needed = "assistant_only_loss=True needs {% generation %} markers in the chat template, and "
    instead = ": add them, or set assistant_only_loss=False"
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError as error:
        raise SetUpError(
            f"{needed}trl, which knows templates with them, is not here or too old{instead}, or install "
            "'forvalue-callbacks[trl]'"
        ) from error
    try:
        return get_training_chat_template(processing_class)
    except ValueError as error:
        raise SetUpError(f"{needed}trl has no version of it with them{instead}") from error


def common_prefix_length(ids: Sequence[int], other_ids: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(ids, other_ids, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(other_ids)))
