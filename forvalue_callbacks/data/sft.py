"""Raw or tokenised rows to token rows with labels, by the rules of trl's `SFTTrainer`.

The rules are those of `SFTTrainer.__init__` (which columns decide, chat template) and `SFTTrainer._prepare_dataset`
(EOS, tokens, masks, truncation) in trl 1.16, for one row at a time; the tests compare them row by row with a real
`SFTTrainer`. What differs, on purpose: padding is removed, and a row that cannot be scored gets a reason where
`SFTTrainer` stops, drops it, or trains on nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from .conversations import (
    common_prefix_length,
    has_from_value,
    has_generation_markers,
    in_parts,
    messages_of,
    refuse_unread,
    template_variables,
    training_template,
)
from .packed import LENGTHS
from .reasons import SetUpError, UnscorableError, place_of, printable
from .sample import IGNORED

logger = logging.getLogger(__name__)

# Columns of images: without them the token ids are half of the row.
IMAGES = frozenset({"image", "images", "pixel_values"})
# Columns of a batch that say all there is to say of a row of tokens.
TOKEN_COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids")


@dataclass(frozen=True)
class Row:
    """One sample as the model sees it. The arrays are never the caller's; a reason says why it cannot be scored."""

    input_ids: np.ndarray  # int64 (L,)
    labels: np.ndarray  # int64 (L,), aligned with input_ids (not shifted); -100: not scored
    reason: str | None = None  # then the arrays are empty
    set_up: bool = False  # the reason is one of the set-up, if no row is without such
    typed: bool = False  # it comes with token types, all 0, and the model takes them: GPT-2 adds an embedding of 0

    @classmethod
    def unscorable(cls, reason: str | UnscorableError) -> Row:
        empty = np.zeros(0, dtype=np.int64)
        return cls(empty, empty, printable(str(reason)), isinstance(reason, SetUpError))

    @property
    def n_labelled(self) -> int:
        """Labelled positions that are predicted: nothing predicts the first."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass
class RowConfig:
    """How rows become tokens and labels: fields, meanings and defaults are those of `SFTConfig`.

    Its `eos_token` and `chat_template_path` are not here, since they change the tokenizer itself: pass
    `trainer.processing_class`, or a tokenizer changed alike. Nor is `formatting_func`: map it over the rows first.

    Raises:
        ValueError: an unknown truncation mode; a max_length that leaves no token to predict.
    """

    dataset_text_field: str = field(default="text", metadata={"help": "Column that holds the text of text rows."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Rows are truncated to this many tokens. None: not at all."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "Which end of a row that is too long is kept.", "choices": ["keep_end", "keep_start"]},
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={"help": "Label the completion only. None: where rows have the columns 'prompt' and 'completion'."},
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Label the assistant's turns only (conversations only)."}
    )

    def __post_init__(self) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode={self.truncation_mode!r}: choose 'keep_start' or 'keep_end'.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: must be at least 2, or None for no truncation.")


class RowPreparer:
    """Makes `Row`s of rows in any form that `SFTTrainer` takes; the same as this, but one row at a time::

        SFTTrainer(model, SFTConfig(...), train_dataset=dataset, processing_class=tokenizer).train_dataset

    Tokenised rows ('input_ids'): 'labels' alone wins; else 'completion_mask' (if the loss is completion-only) and
    'assistant_masks' (always) both apply; else every token is labelled. Positions whose 'attention_mask' is 0 are
    removed first.

    Raw rows, by precedence: 'prompt' with 'completion', 'conversations' with from/value, 'messages', the text field,
    'conversations' with role/content (which `SFTTrainer` does not take). Text ends with EOS. A completion starts where
    the tokens of the prompt alone and of prompt and completion diverge.

    Args:
        processing_class: tokenizer or processor; not needed for tokenised rows.
        config: `RowConfig`.
        max_positions: how many tokens the model takes.
        vocab_size: what token ids and labels must be below.
        takes_types: the model takes 'token_type_ids'.
    """

    def __init__(
        self,
        processing_class: Any = None,
        config: RowConfig | None = None,
        *,
        max_positions: int | None = None,
        vocab_size: int | None = None,
        takes_types: bool = False,
    ):
        self.processing_class = processing_class
        self.config = config or RowConfig()
        self.max_positions = max_positions
        self.vocab_size = vocab_size
        self.takes_types = takes_types
        self._template: tuple[str | None] | None = None  # looked up at the first conversation
        self._warned = False

    def __call__(self, example: Mapping[str, Any]) -> Row:
        """One row, left as it is. If it cannot be scored, the answer has a `reason` that says what to do.

        `set_up` is true where the reason is one of the set-up, if all rows have such: no known column, images, raw
        rows without a tokenizer (or one without EOS or chat template), `assistant_only_loss` without a conversation or
        a template with generation markers, packed rows.
        """
        if not isinstance(example, Mapping):
            name = type(example).__name__
            return Row.unscorable(SetUpError(f"the row is a {name}: make it a mapping from columns to values"))
        try:
            refuse_packed(example)
            return self._prepare(example)
        except UnscorableError as reason:
            return Row.unscorable(reason)
        except Exception as error:  # rows come from anywhere, and one of them ends no run
            return Row.unscorable(UnscorableError(f"the row cannot be read: {place_of(error)}"))

    def collated(self, example: Mapping[str, Any], batch: Mapping[str, Any]) -> Row:
        """The row that a data collator has made of an example: a batch of one, `input_ids` and `labels` (1, L).

        Truncated where the example was tokenised already, since `SFTTrainer` truncates before it collates; what a
        collator makes of raw rows is trained on as it is.
        """
        batch_row = {column: batch[column][0] for column in TOKEN_COLUMNS if batch.get(column) is not None}
        try:
            refuse_packed(batch_row)
            ids, labels, _ = self._labelled(batch_row, batch_row)
            truncated = "input_ids" in example
            row = self.checked(ids, labels, "'labels' of the data_collator", truncated=truncated)
            return replace(row, typed=self.takes_types and batch.get("token_type_ids") is not None)
        except UnscorableError as reason:
            return Row.unscorable(reason)

    def _prepare(self, example: Mapping[str, Any]) -> Row:
        if has_images(example):
            found = columns_of(example)
            raise SetUpError(f"rows with images ({found}) need their own preparation: pass a data_collator")
        if "input_ids" not in example:
            tokens, source = self._tokenise(example)
            ids, labels, _ = self._labelled(example, {**example, **tokens})
            return self.checked(ids, labels, source)
        types = example.get("token_type_ids") if self.takes_types else None
        if types is not None and np.any(integers({"token_type_ids": types}, "token_type_ids")):
            raise SetUpError("'token_type_ids' that are not all 0 change what the model reads: pass the data_collator")
        row = self.checked(*self._labelled(example, example))
        return replace(row, typed=types is not None)

    def _labelled(self, example: Mapping[str, Any], tokens: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, str]:
        """Token ids and labels without padding, not truncated yet, and the columns that the labels come from."""
        completion_only = self.config.completion_only_loss
        if completion_only is None:
            completion_only = "prompt" in example and "completion" in example
        if "labels" in tokens:
            columns = ["labels"]
        else:
            masks = ["completion_mask", "assistant_masks"] if completion_only else ["assistant_masks"]
            columns = [column for column in masks if column in tokens]
        others = []
        if "input_ids" in example:
            others = [column for column in ("attention_mask", "position_ids") if example.get(column) is not None]
            self._check_set_up(example, columns)
        arrays = {column: integers(tokens, column) for column in ["input_ids", *columns, *others]}
        for column, values in arrays.items():
            if len(values) != len(arrays["input_ids"]):
                raise UnscorableError(
                    f"{len(values):,} values in {column!r}, but {len(arrays['input_ids']):,} in 'input_ids': "
                    "make them equally long"
                )
        if "attention_mask" in arrays:
            attended = arrays.pop("attention_mask") != 0
            arrays = {column: values[attended] for column, values in arrays.items()}
        ids = arrays["input_ids"]
        if "labels" in arrays:
            return ids, arrays["labels"], "'labels'"
        labels = ids.copy()
        for column in columns:
            labels[arrays[column] == 0] = IGNORED
        return ids, labels, _names(columns or ["input_ids"])

    def _check_set_up(self, example: Mapping[str, Any], columns: list[str]) -> None:
        """What is wrong with all tokenised rows if it is with one; `columns` are those that make the labels."""
        if self.config.assistant_only_loss and columns in ([], ["completion_mask"]):
            raise SetUpError(
                "assistant_only_loss=True needs conversations, or 'labels' or 'assistant_masks' with 'input_ids' "
                f"({columns_of(example)})"
            )
        if "completion_mask" in example and columns in ([], ["assistant_masks"]) and not self._warned:
            self._warned = True
            logger.warning(
                "'completion_mask' does not count, as in SFTTrainer, with completion_only_loss=%s and no columns "
                "'prompt' and 'completion': set completion_only_loss=True.",
                self.config.completion_only_loss,
            )

    def checked(self, ids: np.ndarray, labels: np.ndarray, source: str, *, truncated: bool = True) -> Row:
        """The row, truncated as `SFTTrainer` does, if it can be scored then."""
        n_tokens, limit, size = len(ids), self.config.max_length if truncated else None, self.vocab_size
        if n_tokens == 0:
            raise UnscorableError(f"no tokens in {source}: fill it or drop the row")
        if not (labels != IGNORED).any():
            raise UnscorableError(f"no labelled tokens in {source}: label what is to be learnt, or drop the row")
        if limit is not None:
            kept = slice(limit) if self.config.truncation_mode == "keep_start" else slice(-limit, None)
            ids, labels = ids[kept], labels[kept]
        row = Row(ids, labels)
        if row.n_labelled == 0 and len(ids) < n_tokens:
            raise UnscorableError(
                f"no labelled tokens left in {source} after truncation of {n_tokens:,} tokens to max_length={limit}: "
                "raise max_length, or shorten the unlabelled part"
            )
        if row.n_labelled == 0:
            raise UnscorableError(
                f"no labelled tokens in {source} but the first, which nothing predicts: put a prompt or BOS before it"
            )
        if self.max_positions is not None and len(ids) > self.max_positions:
            raise UnscorableError(
                f"{len(ids):,} tokens in {source}, but the model takes {self.max_positions:,}: "
                f"set max_length={self.max_positions}"
            )
        for column, values in (("input_ids", ids), ("labels", labels[labels != IGNORED])):
            wrong = values[(values < 0) | (values >= (np.inf if size is None else size))]
            if len(wrong):
                raise UnscorableError(
                    f"token id {wrong[0]} in {column!r} is outside the model's vocabulary"
                    f"{'' if size is None else f' of {size:,}'}: use the model's tokenizer, or resize its embeddings"
                )
        return row

    # ---- raw rows ----

    def _tokenise(self, example: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """`input_ids` of a raw row with the masks that apply, and the names of the columns they come from."""
        columns = self._raw_columns(example)
        source = _names(columns)
        if self.processing_class is None:
            raise SetUpError(f"raw rows ({columns_of(example)}) need a tokenizer: pass processing_class")
        for column in columns:
            value, chat_only = example[column], column in ("messages", "conversations")
            if not isinstance(value, list if chat_only else (str, list)):
                kind = "None" if value is None else f"a {type(value).__name__}"
                wanted = "a list of messages" if chat_only else "text or a list of messages"
                raise UnscorableError(f"{column!r} is {kind}, not {wanted}: fill it or drop the row")
            if len(value) == 0 and (isinstance(value, list) or len(columns) == 1):  # a completion may be EOS alone
                raise UnscorableError(f"{column!r} is empty: fill it or drop the row")
        prompt = None
        if all(isinstance(example[column], str) for column in columns):
            if self.config.assistant_only_loss:
                raise SetUpError(f"assistant_only_loss=True needs conversations, but {source} is text")
            text = self._with_eos(example, columns[-1])
            if len(columns) == 2:
                prompt = self.tokens(source, example["prompt"])
                text = example["prompt"] + text
            whole = self.tokens(source, text)
        else:
            messages = messages_of(example, columns[-1])
            options = self.template_options(example)
            if len(columns) == 2:
                first = messages_of(example, "prompt")
                prompt = self.tokens(source, first, add_generation_prompt=True, **options)
                messages = first + messages
            mask = self.config.assistant_only_loss
            whole = self.tokens(source, messages, return_assistant_tokens_mask=mask, **options)
        tokens: dict[str, Any] = {name: whole[name] for name in ("input_ids", "assistant_masks") if name in whole}
        if 1 not in tokens.get("assistant_masks", [1]):
            raise UnscorableError(f"no labelled tokens in {source}: add an assistant's turn, or drop the row")
        if prompt is not None:
            start = common_prefix_length(prompt["input_ids"], whole["input_ids"])
            tokens["completion_mask"] = [0] * start + [1] * (len(whole["input_ids"]) - start)
        return tokens, source

    def _raw_columns(self, example: Mapping[str, Any]) -> list[str]:
        """The columns that the tokens are made of, in `SFTTrainer`'s order of precedence."""
        if "prompt" in example:
            if "completion" in example:
                return ["prompt", "completion"]
        elif has_from_value(example.get("conversations")):
            return ["conversations"]
        elif isinstance(example.get("messages"), list):
            return ["messages"]
        else:
            for column in (self.config.dataset_text_field, "conversations", "messages"):
                if column in example:
                    return [column]
        raise SetUpError(
            f"no known column ({columns_of(example)}): give 'input_ids' (with 'labels', 'completion_mask' or "
            "'assistant_masks'), 'prompt' with 'completion', 'messages', 'conversations', or text in the column that "
            f"dataset_text_field names (now {self.config.dataset_text_field!r})"
        )

    def _with_eos(self, example: Mapping[str, Any], column: str) -> str:
        """A column's text with EOS. A row gets one EOS: a text field beside 'completion' takes it if it needs it."""
        field = self.config.dataset_text_field
        other = example.get(field) if column != field else None
        taken = isinstance(other, str) and self.ending(other) != other
        return example[column] if taken else self.ending(example[column])

    def ending(self, text: str) -> str:
        """A text with EOS at its end."""
        eos = getattr(self.processing_class, "tokenizer", self.processing_class).eos_token
        if eos is None:
            raise SetUpError("the tokenizer has no EOS token, which ends text rows: set tokenizer.eos_token")
        return text if text.endswith(eos) else text + eos

    def template_options(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments for `apply_chat_template`, with the training template that `SFTTrainer` would swap in."""
        template = self.processing_class.chat_template
        if template is None:
            raise SetUpError("the tokenizer has no chat template, which conversations need: set its chat_template")
        if self._template is None:
            swapped = None
            if self.config.assistant_only_loss and not has_generation_markers(template):
                swapped = training_template(self.processing_class)
            self._template = (swapped,)
        return {"chat_template": self._template[0], **template_variables(example)}

    def tokens(self, source: str, text: str | list[Any], /, **options: Any) -> Mapping[str, Any]:
        """Tokens of a text, or of messages through the chat template; a processor's batch of one is undone."""
        from transformers import ProcessorMixin  # takes seconds, which tokenised rows need not wait for

        processor = isinstance(self.processing_class, ProcessorMixin)
        try:
            if isinstance(text, str):
                tokens = self.processing_class(text=text)
            else:
                chat = in_parts(text, source) if processor else text
                if not processor:
                    refuse_unread(chat, source, partial(self._text_of, **options))
                tokens = self.processing_class.apply_chat_template(chat, tokenize=True, return_dict=True, **options)
        except UnscorableError:
            raise
        except Exception as error:  # chat templates raise what they like where a conversation is not to their taste
            raise UnscorableError(f"{source} cannot be tokenised: {place_of(error)}") from error
        return {name: values[0] for name, values in tokens.items()} if processor else tokens

    def _text_of(self, messages: list[Any], /, *, return_assistant_tokens_mask: bool = False, **options: Any) -> str:
        """What the chat template makes of messages."""
        return self.processing_class.apply_chat_template(messages, tokenize=False, **options)


def has_images(example: Mapping[str, Any]) -> bool:
    """Whether a row has an image: its columns may be there and empty, beside rows that have some."""
    return any(not _is_empty(example[column]) for column in IMAGES & example.keys())


def _is_empty(images: Any) -> bool:
    if isinstance(images, (list, tuple)):
        return all(image is None for image in images)
    return images is None or (isinstance(images, str) and not images)  # as a CSV file has it


def refuse_packed(example: Mapping[str, Any]) -> None:
    """Raises SetUpError for a row that holds several samples, told by columns that packing leaves."""
    why = None
    for column in example:
        if str(column).startswith((LENGTHS, "cu_seq")) and example[column] is not None:
            one = str(column) == LENGTHS and np.size(example[column]) == 1  # a row of a padding-free batch
            why = why if one else repr(column)
    mask, positions = (_numbers(example.get(column)) for column in ("attention_mask", "position_ids"))
    if mask is not None and (mask > 1).any():
        why = "'attention_mask' counts samples"
    if positions is not None:
        if mask is not None and len(mask) == len(positions):
            positions = positions[mask != 0]
        if (np.diff(positions) <= 0).any():
            why = "'position_ids' restart"
    if why is not None:
        raise SetUpError(f"packed rows ({why}; {columns_of(example)}): score before packing")


def _numbers(value: Any) -> np.ndarray | None:
    """A flat list, array or tensor of numbers, None for all else."""
    try:
        return None if value is None else integers({"": value}, "")
    except UnscorableError:
        return None


def integers(tokens: Mapping[str, Any], column: str) -> np.ndarray:
    """A list, array or tensor as a new int64 array."""
    value = tokens[column]
    if value is None:
        raise UnscorableError(f"{column!r} is None: fill it or drop the row")
    try:
        array = np.asarray(value.detach().cpu() if torch.is_tensor(value) else value)
    except (TypeError, ValueError):  # ragged lists, dtypes that numpy has not
        array = np.asarray(None)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "biu"):
        raise UnscorableError(f"{column!r} must be one flat list of integers, not this {type(value).__name__}")
    return array.astype(np.int64)


def _names(columns: Sequence[str]) -> str:
    return " and ".join(map(repr, columns))


def columns_of(example: Mapping[str, Any]) -> str:
    names = [repr(column) for column in example]
    return f"columns found: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
