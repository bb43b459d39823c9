"""Raw or tokenised rows -> token ids with labels, by the rules of TRL's `SFTTrainer`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from transformers import ProcessorMixin
from trl import get_training_chat_template, is_conversational, is_conversational_from_value, maybe_convert_to_chatml
from trl.chat_template_utils import has_generation_markers

_MASKS = ("completion_mask", "assistant_masks")
_IMAGES = ("image", "images")
_EMPTY = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Row:
    """One sample as the model sees it; labels are aligned with input_ids (not shifted), -100 = not scored.

    Both are int64 (L,). A row that cannot be scored has a `reason` that names the column and the way out.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    reason: str | None = None

    @classmethod
    def unscorable(cls, reason: str) -> Row:
        return cls(_EMPTY, _EMPTY, reason)

    @property
    def n_labelled(self) -> int:
        """Labelled positions that are predicted: a label on the first token never is."""
        return int((self.labels[1:] != -100).sum())


@dataclass
class RowConfig:
    """How rows are prepared; names, meanings and defaults are those of `trl.SFTConfig`."""

    dataset_text_field: str = field(default="text", metadata={"help": "Column of rows that are plain text."})
    max_length: int | None = field(default=1024, metadata={"help": "Tokens that a row is cut to; None: as it is."})
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "Which end of a long row stays.", "choices": ["keep_start", "keep_end"]},
    )
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "Label the completion only. None: where the row has a completion."}
    )
    assistant_only_loss: bool = field(default=False, metadata={"help": "Label the assistant's messages only."})

    def __post_init__(self) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode={self.truncation_mode!r}: choose 'keep_start' or 'keep_end'.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: a row needs two tokens at least, or None.")


class RowPreparer:
    """Turns an example into a `Row`. One bad row never raises; a set-up that fits no row does.

    Args:
        processing_class: tokenizer or processor; not needed for rows with `input_ids`.
        config: `RowConfig`.
        max_positions: tokens that the model was made for; longer rows cannot be scored.
        vocab_size: token ids must be below it.

    Raises (when called):
        ValueError: no known column; raw rows without a processing_class; packed rows; images (which a data collator
            must make model inputs of); assistant_only_loss without messages or a chat template that cannot mark them.
    """

    def __init__(
        self,
        processing_class: Any = None,
        config: RowConfig | None = None,
        *,
        max_positions: int | None = None,
        vocab_size: int | None = None,
    ):
        self.processing_class = processing_class
        self.config = config or RowConfig()
        self.max_positions = max_positions
        self.vocab_size = vocab_size

    def __call__(self, example: Mapping[str, Any]) -> Row:
        if not isinstance(example, Mapping):
            return Row.unscorable(f"the row is a {type(example).__name__}, not a mapping from columns to values")
        tokenised = "input_ids" in example
        self._refuse_set_up(example, tokenised)
        try:
            ids, labels = self._tokenised(example) if tokenised else self._raw(example)
        except _BadRowError as error:
            return Row.unscorable(str(error))
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            empty = [name for name, value in example.items() if value is None or value == []]
            named = f"columns {empty} are empty; " if empty else ""
            return Row.unscorable(f"{named}cannot be prepared ({type(error).__name__}: {error})")
        if self.config.max_length is not None:
            start = self.config.truncation_mode == "keep_start"
            cut = slice(None, self.config.max_length) if start else slice(-self.config.max_length, None)
            was_labelled = Row(ids, labels).n_labelled > 0
            ids, labels = ids[cut], labels[cut]
        else:
            was_labelled = False
        return Row(ids, labels, self._reason(ids, labels, was_labelled))

    def _refuse_set_up(self, example: Mapping[str, Any], tokenised: bool) -> None:
        columns = sorted(map(str, example))
        if "seq_lengths" in example:
            raise ValueError("packed rows (column 'seq_lengths') hold several samples each: score before packing.")
        if tokenised:
            return
        if any(name in example for name in _IMAGES):
            raise ValueError("rows with images need a data_collator that makes model inputs of them.")
        known = {self.config.dataset_text_field, "prompt", "messages", "conversations"}
        if not known & set(example):
            raise ValueError(
                f"no column to score in {columns}. Rows need 'input_ids' (with 'labels' or a mask), "
                f"{self.config.dataset_text_field!r} (dataset_text_field), 'prompt' and 'completion', or 'messages'."
            )
        if "prompt" in example and "completion" not in example:
            raise ValueError(f"rows have 'prompt' but no 'completion' (columns: {columns}).")
        if self.processing_class is None:
            raise ValueError(f"rows with columns {columns} are not tokenised: pass processing_class=tokenizer.")

    # ---- the two kinds of rows ----

    def _tokenised(self, example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        ids = _integers(example, "input_ids")
        labels = _integers(example, "labels", len(ids)) if "labels" in example else None
        if labels is None:
            masks = [name for name in _MASKS if name in example]
            if self.config.completion_only_loss is False and "completion_mask" in masks:
                masks.remove("completion_mask")
            labels = _mask(ids, [_integers(example, name, len(ids)) for name in masks])
        if "attention_mask" in example:
            real = _integers(example, "attention_mask", len(ids)).astype(bool)
            ids, labels = ids[real], labels[real]
        if "position_ids" in example and (np.diff(_integers(example, "position_ids")) < 0).any():
            raise ValueError("packed rows ('position_ids' restart) hold several samples each: score before packing.")
        return ids, labels

    def _raw(self, example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """The steps of `SFTTrainer._prepare_dataset`: ChatML, EOS, tokens, masks, labels."""
        if is_conversational_from_value(dict(example)):
            example = maybe_convert_to_chatml(deepcopy(dict(example)))
        conversational = is_conversational(dict(example))
        config, assistant_only = self.config, self.config.assistant_only_loss
        if assistant_only and not conversational:
            raise ValueError("assistant_only_loss=True needs conversational rows ('messages', or lists of messages).")
        if not conversational:
            example = self._with_eos(example)
        tools = example.get("tools")
        template = {
            "chat_template": self._chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(example.get("chat_template_kwargs") or {}),
        }
        masks = []
        if "prompt" in example:
            prompt, whole = example["prompt"], example["prompt"] + example["completion"]
            options = {"add_generation_prompt": True} if conversational else {}
            prompt_ids = self._tokenize(prompt, **options, **template)["input_ids"]
            processed = self._tokenize(whole, return_assistant_tokens_mask=assistant_only, **template)
            ids = np.asarray(processed["input_ids"], dtype=np.int64)
            # The completion starts where the tokens of prompt and of prompt + completion part ways.
            n = min(len(ids), len(prompt_ids))
            differ = np.flatnonzero(ids[:n] != np.asarray(prompt_ids[:n], dtype=np.int64))
            start = int(differ[0]) if len(differ) else n
            if config.completion_only_loss is not False:
                masks.append((np.arange(len(ids)) >= start).astype(np.int64))
        else:
            text = example["messages"] if conversational else example[config.dataset_text_field]
            processed = self._tokenize(text, return_assistant_tokens_mask=assistant_only, **template)
            ids = np.asarray(processed["input_ids"], dtype=np.int64)
        if assistant_only:
            mask = np.asarray(processed.get("assistant_masks", []), dtype=np.int64)
            if not mask.any():
                raise _BadRowError(
                    "no assistant tokens though assistant_only_loss=True: no assistant message, or a chat template "
                    "whose {% generation %} part is empty"
                )
            masks.append(mask)
        return ids, _mask(ids, masks)

    def _with_eos(self, example: Mapping[str, Any]) -> dict[str, Any]:
        example = dict(example)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        names = ("prompt", "completion") if "prompt" in example else (self.config.dataset_text_field,)
        for name in names:
            if not isinstance(example[name], str):
                raise _BadRowError(f"column {name!r} holds {type(example[name]).__name__}, not text")
        last = self.config.dataset_text_field if self.config.dataset_text_field in example else "completion"
        if not example[last].endswith(tokenizer.eos_token):
            example[last] += tokenizer.eos_token
        return example

    def _tokenize(self, text: Any, **template: Any) -> dict[str, Any]:
        batched = isinstance(self.processing_class, ProcessorMixin)
        if isinstance(text, list):
            if batched:  # processors take content as a list of typed parts
                text = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in text]
            template = {k: v for k, v in template.items() if v is not False}
            out = self.processing_class.apply_chat_template(text, tokenize=True, return_dict=True, **template)
        else:
            out = self.processing_class(text=text)
        return {k: v[0] for k, v in out.items()} if batched else dict(out)

    @cached_property
    def _chat_template(self) -> str | None:
        """A training template with generation markers where assistant-only loss needs one and the own has none."""
        own = self.processing_class.chat_template
        if not self.config.assistant_only_loss or (own is not None and has_generation_markers(own)):
            return None
        return get_training_chat_template(self.processing_class)

    def _reason(self, ids: np.ndarray, labels: np.ndarray, was_labelled: bool) -> str | None:
        if not Row(ids, labels).n_labelled:
            if was_labelled:
                return f"no labelled tokens within max_length={self.config.max_length}: raise it"
            return "no labelled tokens: every label is -100, or the only one is on the first token"
        if self.vocab_size is not None:
            for name, values in (("input_ids", ids), ("labels", labels[labels != -100])):
                bad = values[(values < 0) | (values >= self.vocab_size)]
                if len(bad):
                    return f"{name} holds {bad[0]}, outside the model's vocabulary of {self.vocab_size}"
        if self.max_positions is not None and len(ids) > self.max_positions:
            return f"{len(ids):,} tokens, but the model takes {self.max_positions:,}: set max_length"
        return None


class _BadRowError(Exception):
    """This row cannot be prepared; others may."""


def needs_collator(example: Any) -> bool:
    """Whether only a data collator can tell the model inputs (images) or the labels (`input_ids` alone) of a row."""
    if not isinstance(example, Mapping):
        return False
    if any(name in example for name in (*_IMAGES, "pixel_values")):
        return True
    return "input_ids" in example and not any(name in example for name in ("labels", *_MASKS))


def _integers(example: Mapping[str, Any], name: str, length: int | None = None) -> np.ndarray:
    """A column as int64 (L,).

    Raises:
        _BadRowError: it is empty, not a flat list of integers, or of another length than input_ids.
    """
    values = example[name]
    if values is None or (isinstance(values, Sequence) and len(values) == 0):
        raise _BadRowError(f"column {name!r} is empty")
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.asarray(None)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise _BadRowError(f"column {name!r} is not a flat list of integers")
    if length is not None and len(array) != length:
        raise _BadRowError(f"column {name!r} has {len(array)} entries, input_ids {length}")
    return array.astype(np.int64)


def _mask(ids: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """Labels: the ids where all masks are 1, else -100."""
    labels = ids.copy()
    for mask in masks:
        labels[mask == 0] = -100
    return labels
