"""Forms that rows come in -> rows as `RowPreparer` takes them, by the rules of `SFTTrainer`.

What is learnt of a row is its answer: the completion, or what the assistant says. Where a chat template does not mark
that, it is found turn by turn: it begins where the turns before it, with the template's generation prompt, end.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from string import Formatter
from typing import Any

import xxhash

from .conversations import (
    common_prefix_length,
    has_from_value,
    has_generation_markers,
    messages_of,
    refuse_unread,
    template_variables,
)
from .files import DataError, Source
from .preference import is_pair, is_preference
from .reasons import UnscorableError, place_of, printable
from .sample import IGNORED, Sample

# For a tokenizer without a chat template of its own.
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] or '' }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# ShareGPT's names of those who speak, and those of chat templates.
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
PAIRS, ALPACA = "prompt/completion", "Alpaca"
PREFERENCES, MARKED = "chosen/rejected", "prompt/completion/label"
# So many rows are looked at for their columns.
LOOKED_AT = 100
MASKS = {"labels": IGNORED, "completion_mask": 0, "assistant_masks": 0}


@dataclass(frozen=True)
class Form:
    """How rows are read.

    Args:
        name: for people.
        convert: a row to one that `RowPreparer` takes.
        answer: columns that make the answer, or the one of messages whose last turn of the assistant is it.
        chats: rows become conversations, which need a chat template.
        tokenised: rows are token ids.
        preferences: rows are pairs of a chosen and a rejected answer, or answers marked as good or bad.
    """

    name: str
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    answer: tuple[str, ...]
    chats: bool = False
    tokenised: bool = False
    preferences: bool = False


class FormedRows:
    """Rows of a source as a scorer takes them; one that cannot be read so is a `Sample` with the reason.

    Args:
        set_aside: reasons of rows that are not to be scored, by their places.
        places: of the rows that these are; None: all of the source.
    """

    def __init__(
        self,
        source: Source,
        form: Form,
        set_aside: Mapping[int, str] | None = None,
        places: Sequence[int] | None = None,
    ):
        self.source, self.form, self.set_aside, self.places = source, form, set_aside or {}, places

    def __len__(self) -> int:
        return len(self.source) if self.places is None else len(self.places)

    def __iter__(self) -> Iterator[Any]:
        rows = enumerate(self.source) if self.places is None else sorted(self.source.pick(self.places).items())
        for i, row in rows:
            try:
                if i in self.set_aside:
                    raise UnscorableError(self.set_aside[i])
                yield self.form.convert(row)
            except UnscorableError as reason:
                yield Sample(i, (), row_hash(row), printable(str(reason)))
            except Exception as error:  # lines come from anywhere, and one of them ends no run
                yield Sample(i, (), row_hash(row), f"the row cannot be read: {place_of(error)}")

    def place(self, row: int) -> str:
        """Where one of these rows is found, for people."""
        return self.source.place(row if self.places is None else sorted(self.places)[row])


def row_hash(row: Mapping[str, Any]) -> str:
    """Of a row as it came, 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(json.dumps(row, sort_keys=True, default=repr).encode())


def form_of(
    source: Source, templates: tuple[str | None, str | None] = (None, None), text_column: str = "text"
) -> Form:
    """The form of a source's rows.

    Args:
        templates: of prompt and completion, format strings over the columns ("{question}\\n", "{answer}"), if rows
            have a form of their own.
        text_column: column of rows that are text.

    Raises:
        DataError: there is no known form; a template names a column that is not there.
    """
    first = list(islice(source, LOOKED_AT))
    columns = list(dict.fromkeys(column for row in first for column in row))
    if any(templates):
        return _of_templates(source, templates, columns)
    values = {column: [row[column] for row in first if row.get(column) is not None] for column in columns}
    # What half of the rows have, so that an odd one does not decide; or what there is.
    for least in (len(first) / 2, 1, 0):
        known = {column: _usual(there) for column, there in values.items() if len(there) >= least}
        if (form := _known_form(known, text_column)) is not None:
            return form
    raise DataError(
        f"{source.name}: no known form of rows (columns found: {', '.join(map(repr, columns[:12])) or 'none'}): give "
        "'prompt' and 'completion', 'messages', 'conversations', 'instruction' and 'output', 'chosen' and 'rejected', "
        "or 'input_ids'; name the column of text by --text-column; or give --prompt-template '{question}\\n' "
        "--completion-template '{answer}'."
    )


def _usual(values: Sequence[Any]) -> Any:
    """The first value of the most frequent type, None where there is none."""
    if not values:
        return None
    usual = Counter(type(value) for value in values).most_common(1)[0][0]
    return next(value for value in values if type(value) is usual)


def _known_form(known: Mapping[str, Any], text_column: str) -> Form | None:
    """By columns with a value of each."""
    if "input_ids" in known:
        return Form("tokenised", dict, (), tokenised=True)
    if is_preference(known):
        return _of_preferences(known)
    if {"prompt", "completion"} <= known.keys():
        return Form(PAIRS, dict, ("completion",), isinstance(known["prompt"], list))
    for column in ("messages", "conversations"):
        if isinstance(known.get(column), list):
            name = "ShareGPT" if has_from_value(known[column]) else "messages"
            return Form(f"{name} ({column!r})", partial(_chat, column), (column,), True)
    if {"instruction", "output"} <= known.keys():
        return Form(ALPACA, _alpaca, ("output",), True)
    if text_column in known:
        return Form(f"text ({text_column!r})", dict, ())
    return None


def _of_preferences(known: Mapping[str, Any]) -> Form:
    """By the first value of each column."""
    pair = is_pair(known)
    name, answer = (PREFERENCES, ("chosen", "rejected")) if pair else (MARKED, ("completion",))
    if answer[0] not in known:
        return Form(f"tokenised {name}", dict, (), tokenised=True, preferences=True)
    if isinstance(known["chosen" if pair else "prompt"], list):
        return Form(name, dict, answer, chats=True, preferences=True)
    if pair and ("instruction" in known or "conversations" in known):  # as LLaMA-Factory has them
        return Form(name, _pair_of_turns, answer, chats=True, preferences=True)
    return Form(name, dict, answer, preferences=True)


def _pair_of_turns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A pair whose prompt is Alpaca's or ShareGPT's, and whose answers are text or one message each."""
    pair = {}
    for column in ("chosen", "rejected"):
        if not isinstance(row.get(column), (str, Mapping)):
            raise UnscorableError(f"{column!r} is neither text nor a message: fill it or drop the row")
        turn = {"from": "gpt", "value": row[column]} if isinstance(row[column], str) else row[column]
        pair[column] = _chat("turns", {"turns": [turn]})["turns"]
    if row.get("conversations") is not None:
        chat = _chat("conversations", row)
        return {**chat, **pair, "prompt": chat["conversations"]}
    return {**pair, "prompt": _alpaca({**row, "output": ""})["prompt"]}


def _of_templates(source: Source, templates: tuple[str | None, str | None], columns: Collection[str]) -> Form:
    prompt, completion = templates
    if prompt is None or completion is None:
        raise DataError(
            "one template of two is missing: give both --prompt-template and --completion-template, as "
            "'{question}\\n' and '{answer}'."
        )
    fields = [_fields(template) for template in (prompt, completion)]
    for field in (*fields[0], *fields[1]):
        if field not in columns:
            raise DataError(
                f"{source.name}: a template names the column {field!r}, and the rows have "
                f"{', '.join(map(repr, columns)) or 'none'}: name one of those."
            )
    if not fields[1]:
        raise DataError("the completion template names no column, and so every answer would be the same: name one.")
    texts = [template.replace("\\n", "\n") for template in (prompt, completion)]

    def convert(row: Mapping[str, Any]) -> Mapping[str, Any]:
        for column in fields[1]:
            if row.get(column) is None:
                raise UnscorableError(f"{column!r} is None: fill it or drop the row")
        filled = {c: "" if row.get(c) is None else row[c] for c in (*fields[0], *fields[1])}
        return {"prompt": texts[0].format(**filled), "completion": texts[1].format(**filled)}

    return Form("own templates", convert, tuple(fields[1]))


def _fields(template: str) -> list[str]:
    try:
        return [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"a template is no format string ({error}): write '{{question}}\\n'.") from None


def _chat(column: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of messages, ShareGPT's among them, with the roles that chat templates know."""
    if row.get(column) is None:
        raise UnscorableError(f"{column!r} is None: fill it or drop the row")
    messages = messages_of(row, column)
    if has_from_value(row[column]):
        for i, message in enumerate(messages):
            if message["role"] not in ROLES:
                raise UnscorableError(f"message {i} of {column!r} is from none of {', '.join(ROLES)}: rename it")
            message["role"] = ROLES[message["role"]]
    system = row.get("system")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    more = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
    return {column: messages, **more}


def _alpaca(row: Mapping[str, Any]) -> Mapping[str, Any]:
    for column in ("instruction", "output"):
        if not isinstance(row.get(column), str):
            kind = "None" if row.get(column) is None else f"a {type(row[column]).__name__}"
            raise UnscorableError(f"{column!r} is {kind}, not text: fill it or drop the row")
    if not isinstance(row.get("input") or "", str):
        raise UnscorableError(f"'input' is a {type(row['input']).__name__}, not text: fill it or drop the row")
    asked = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    before = [("system", row["system"])] if row.get("system") else []
    for question, answer in row.get("history") or []:  # as LLaMA-Factory has it
        before += [("user", question), ("assistant", answer)]
    turns = [{"role": role, "content": text} for role, text in (*before, ("user", asked))]
    return {"prompt": turns, "completion": [{"role": "assistant", "content": row["output"]}]}


# ---- what the assistant says ----


def with_answers_marked(form: Form, tokenizer: Any) -> Form:
    """A form of which the conversations are tokenised, and what the assistant says in them is labelled."""
    if not form.chats or form.preferences or form.name in (PAIRS, ALPACA):  # a prompt and its completion
        return form
    read, column = form.convert, form.answer[0]
    marked = has_generation_markers(tokenizer.chat_template)
    return Form(form.name, lambda row: _marked(read(row), column, tokenizer, marked), form.answer, True)


def _marked(row: Mapping[str, Any], column: str, tokenizer: Any, by_template: bool) -> Mapping[str, Any]:
    """Tokens of a conversation, those of the assistant's turns marked in 'assistant_masks'."""
    messages = row[column]
    try:
        render = partial(tokenizer.apply_chat_template, **template_variables(row))
        refuse_unread(messages, repr(column), partial(render, tokenize=False))
        whole = render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=by_template)
        ids = whole["input_ids"]
        mask = whole["assistant_masks"] if by_template else _by_turns(messages, ids, render)
    except UnscorableError:
        raise
    except Exception as error:  # chat templates raise what they like where a conversation is not to their taste
        raise UnscorableError(f"{column!r} cannot be tokenised: {place_of(error)}") from error
    if 1 not in mask:
        raise UnscorableError(f"no labelled tokens in {column!r}: add an assistant's turn, or drop the row")
    return {"input_ids": ids, "assistant_masks": mask}


def _by_turns(messages: Sequence[Any], whole: Sequence[int], render: Callable[..., Any]) -> list[int]:
    """1 for each token of the assistant's turns, else 0: a turn begins where what comes before it ends, with the
    generation prompt."""

    def ids(turns: Sequence[Any], prompt: bool) -> list[int]:
        return render(turns, tokenize=True, return_dict=True, add_generation_prompt=prompt)["input_ids"]

    mask = [0] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = common_prefix_length(ids(messages[:i], True), whole) if i else 0
            last = i + 1 == len(messages)
            end = len(whole) if last else common_prefix_length(ids(messages[: i + 1], False), whole)
            mask[start:end] = [1] * max(0, end - start)
    return mask
