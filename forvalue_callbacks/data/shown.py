"""A row of any form as people read it: what is given, what is answered, its images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .answers import labelled
from .formats import ROLES
from .preference import CHOSEN, REJECTED, without_prompt
from .sft import IMAGES

# Columns that hold an answer, and those of conversations, in the order in which they are looked for.
ANSWERS = ("completion", "output", "chosen", "response", "answer", "label", "labels")
CHATS = ("messages", "conversations", "chosen")
# Columns that are no text to read: what a tokenizer has made, and what steers templates.
UNREAD = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "completion_mask", "assistant_masks"}
UNREAD |= {"tools", "chat_template_kwargs", *IMAGES}


@dataclass(frozen=True)
class Shown:
    """A row.

    Args:
        prompt, answer: text; a row of text alone is all answer, one of no known form all prompt.
        images: as they are in the row.
    """

    prompt: str
    answer: str
    images: tuple[Any, ...] = ()


def shown(row: Any, processing_class: Any = None) -> Shown:
    """Any row.

    Args:
        processing_class: tokenizer or processor, for rows of token ids; without one ids are shown.
    """
    if not isinstance(row, Mapping):
        return Shown(_text(row), "")
    return Shown(*_sides(row, processing_class), tuple(_images(row)))


def short(text: str, longest: int = 100) -> str:
    """A text for one line, in quotes, a long one without its middle."""
    return repr(text) if len(text) <= longest else f"{text[: longest - 40]!r} ... {text[-30:]!r}"


def _sides(row: Mapping[str, Any], processing_class: Any) -> tuple[str, str]:
    if (pair := _sides_of_pair(row)) is not None:
        return pair
    if row.get("completion") is not None:
        return _text(row.get("prompt")), _text(row["completion"])
    if (chat := next((row[name] for name in CHATS if _is_chat(row.get(name))), None)) is not None:
        return _sides_of_chat(chat, row.get("system"))
    if row.get("instruction") is not None and row.get("output") is not None:
        parts = (row.get("system"), row["instruction"], row.get("input"))
        return "\n".join(filter(None, map(_text, parts))), _text(row["output"])
    texts = {name: value for name, value in row.items() if name not in UNREAD and value is not None}
    if row.get("input_ids") is not None and not any(isinstance(value, str) for value in texts.values()):
        return _sides_of_tokens(row, processing_class)
    answers = [name for name in ANSWERS if name in texts]
    if list(texts) == ["text"]:
        return "", _text(texts["text"])
    given = [name for name in texts if name not in answers[:1]]
    prompt = (
        _text(texts[given[0]]) if len(given) == 1 else "\n".join(f"{name}: {_text(texts[name])}" for name in given)
    )
    return prompt, _text(texts[answers[0]]) if answers else ""


def _sides_of_pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """A pair: what both answers answer, and both."""
    if not all(isinstance(row.get(name), (str, list)) for name in (CHOSEN, REJECTED)):
        return None
    if "prompt" not in row and all(row[name] for name in (CHOSEN, REJECTED)):
        row = without_prompt(row)
    answers = [f"{name}: {_text(row[name])}" for name in (CHOSEN, REJECTED)]
    return _text(row.get("prompt", "")), "\n".join(answers)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _sides_of_chat(turns: Sequence[Mapping[str, Any]], system: Any = None) -> tuple[str, str]:
    """All before the last thing that the assistant says, and that."""
    last = max((i for i, turn in enumerate(turns) if _role(turn) == "assistant"), default=len(turns))
    given = [f"system: {_text(system)}"] if system else []
    given += [f"{_role(turn)}: {_content(turn)}" for turn in turns[:last]]
    return "\n".join(given), "\n".join(_content(turn) for turn in turns[last:])


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn.get("role", turn.get("from", "?")))
    return ROLES.get(role, role)


def _content(turn: Mapping[str, Any]) -> str:
    parts = [_text(turn.get("content", turn.get("value")))]
    if turn.get("tool_calls"):
        parts.append(json.dumps(turn["tool_calls"], default=str, ensure_ascii=False))
    return "\n".join(filter(None, parts))


def _sides_of_tokens(row: Mapping[str, Any], processing_class: Any) -> tuple[str, str]:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)  # a processor's
    ids = np.asarray(row["input_ids"])
    try:
        learnt = labelled(row)
    except (ValueError, TypeError):  # masks of another length, which scoring has given as a reason
        learnt = np.ones(len(ids), dtype=bool)

    def text(some: np.ndarray) -> str:
        return tokenizer.decode(some.tolist()) if hasattr(tokenizer, "decode") else " ".join(map(str, some.tolist()))

    return text(ids[~learnt]), text(ids[learnt])


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if _is_chat(value):
        if any("role" in turn or "from" in turn for turn in value):
            return "\n".join(f"{_role(turn)}: {_content(turn)}" for turn in value)
        return "".join(str(part.get("text") or f"[{part.get('type', '?')}]") for part in value)
    if isinstance(value, (bytes, bytearray)):
        return f"[{len(value):,} bytes]"
    return str(value)


def _images(row: Mapping[str, Any]) -> Iterator[Any]:
    for name in sorted(IMAGES - {"pixel_values"}):
        value = row.get(name)
        yield from (image for image in (value if isinstance(value, (list, tuple)) else [value]) if image is not None)
    for name in ("prompt", *CHATS):
        for turn in row[name] if _is_chat(row.get(name)) else []:
            parts = turn.get("content")
            yield from (part["image"] for part in parts if part.get("image") is not None) if _is_chat(parts) else ()
