"""Single rows for the report: which ones, their text made safe to look at, their tokens and images."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.reading import rows_at
from ..data.shown import Shown, shown
from ..scores.explanations import Explanation, tails
from ..scores.scores import ForValueScores

# So many of the worst, of the best, and of the others at random. What does not fit on the page is left out.
WORST, BEST, SAMPLE = 150, 50, 100
PAGE_BYTES, IMAGE_BYTES = 2_500_000, 1_200_000
LONGEST, LONGEST_BESIDE, MOST_TOKENS, IMAGE_SIDE = 1500, 300, 400, 224
LISTS = {"worst": "Worst", "best": "Best", "sample": "Random"}
# Shades of tokens: shares of the strongest score on the page.
SHADES = (0.04, 0.15, 0.35, 0.65)

# Control characters, and what turns the direction of text around: nobody sees them, and they change what is seen.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: str, longest: int = LONGEST) -> str:
    """Text with what cannot be seen written out, as [U+202E], and a long one without what comes after its start."""
    cut = text[:longest]
    out = _UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", cut.replace("\r\n", "\n"))
    return out if len(text) <= longest else f"{out} … ({len(text) - longest:,} more characters)"


@dataclass
class Token:
    """A token: its text, its score and the class of its shade ("" for none)."""

    text: str
    score: float
    shade: str


@dataclass
class Near:
    """A validation row near a row: its place, how near, and its text, where that is known."""

    row: int
    score: float
    text: Shown | None


@dataclass
class ShownRow:
    """One row as the page shows it; texts are `visible`."""

    row: int
    place: str  # of `LISTS`
    score: float
    n_labelled: int
    text: Shown | None
    probability: float | None = None
    kind: str | None = None
    why: str | None = None
    suggested_row: int | None = None
    suggested_probability: float | None = None
    suggested: str | None = None
    group: str | None = None
    tokens: list[Token] = field(default_factory=list)
    more_tokens: int = 0
    by: str = ""
    supporting: list[Near] = field(default_factory=list)
    opposing: list[Near] = field(default_factory=list)
    nearest_by: str = ""
    images: list[str] = field(default_factory=list)


class Texts:
    """Rows of a data set as text; no data set has none."""

    def __init__(self, dataset: Any, rows: Iterable[int], processing_class: Any, longest: int = LONGEST):
        places = sorted(set(rows))
        examples = [] if dataset is None or not places else rows_at(dataset, places)
        self._found: dict[int, Shown] = {}
        for place, example in zip(places, examples, strict=bool(examples)):
            one = shown(example, processing_class)
            self._found[place] = Shown(visible(one.prompt, longest), visible(one.answer, longest), one.images)

    def __getitem__(self, row: int) -> Shown | None:
        return self._found.get(row)


def chosen(scores: ForValueScores, explained: Iterable[int], seed: int = 0) -> dict[int, str]:
    """Rows to show, and the list that each is in: the explained ones first, then the worst, the best and some others.

    Explained rows that are in none of the lists are among the others.
    """
    worst, best = tails(scores.values, min(WORST, max(1, len(scores) // 2)))
    best = best[:BEST]
    rest = np.setdiff1d(np.flatnonzero(np.isfinite(scores.values)), [*worst, *best])
    drawn = np.random.default_rng(seed).permutation(rest)[:SAMPLE].tolist()
    lists = {row: name for name, rows in zip(LISTS, (worst, best, drawn), strict=True) for row in rows}
    first = {row: lists.get(row, "sample") for row in explained if 0 <= row < len(scores)}
    return {**first, **{row: lists[row] for row in (*worst[:20], *best[:10], *drawn[:10])}, **lists}


def shown_rows(
    scores: ForValueScores,
    dataset: Any,
    validation: Any,
    explanations: Sequence[Explanation],
    groups: Mapping[int, str] | Sequence[str] | None,
    processing_class: Any,
) -> list[ShownRow]:
    """The rows of `chosen` that fit on the page, in its order.

    Args:
        groups: (N,), the first group of each row.
    """
    known = {one.row: one for one in explanations}
    lists, said = chosen(scores, known), scores.judgements
    suggested = {} if said is None else {row: int(said.suggested_row[row]) for row in lists}
    texts = Texts(dataset, [*lists, *(row for row in suggested.values() if row >= 0)], processing_class)
    near = {row for one in explanations for row, _ in (*one.supporting, *one.opposing)}
    beside = Texts(validation, near, processing_class, LONGEST_BESIDE)
    strongest = _strongest(explanations)
    out, size, image_bytes = [], 0, 0
    for row, name in lists.items():
        one = ShownRow(row, name, float(scores.values[row]), int(scores.n_labelled[row]), texts[row])
        if said is not None:
            one.probability = float(said.probability[row]) if np.isfinite(said.probability[row]) else None
            one.kind, one.why = said.kind[row], said.why[row]
            if suggested[row] >= 0:
                other = texts[suggested[row]]
                one.suggested_row = suggested[row]
                one.suggested_probability = float(said.suggested_probability[row])
                one.suggested = None if other is None else visible(other.answer.strip(), LONGEST_BESIDE)
        one.group = None if groups is None else visible(groups[row], 80)
        if row in known:
            _explain(one, known[row], beside, strongest)
        if image_bytes < IMAGE_BYTES and one.text is not None:
            one.images = [uri for image in one.text.images[:4] if (uri := data_uri(image)) is not None]
            image_bytes += sum(map(len, one.images))
        size += _bytes(one)
        if size > PAGE_BYTES:
            break
        out.append(one)
    return out


def _explain(one: ShownRow, explanation: Explanation, beside: Texts, strongest: float) -> None:
    pairs = zip(explanation.tokens, explanation.token_scores, strict=True)
    tokens = [Token(visible(text, 80), score, _shade(score / strongest)) for text, score in pairs]
    one.tokens, one.more_tokens = tokens[:MOST_TOKENS], max(0, len(tokens) - MOST_TOKENS)
    one.by, one.nearest_by = explanation.by, explanation.nearest_by
    one.supporting = [Near(row, score, beside[row]) for row, score in explanation.supporting]
    one.opposing = [Near(row, score, beside[row]) for row, score in explanation.opposing]


def _strongest(explanations: Sequence[Explanation]) -> float:
    """What the shades are relative to; one outlier does not pale all others."""
    scores = np.abs([score for one in explanations for score in one.token_scores if np.isfinite(score)])
    return max(float(np.quantile(scores, 0.98)), 1e-12) if len(scores) else 1.0


def _shade(share: float) -> str:
    step = sum(abs(share) >= least for least in SHADES)
    return f"{'m' if share < 0 else 'p'}{step}" if step else ""


def _bytes(one: ShownRow) -> int:
    """About what a row takes on the page, markup and escapes apart from those of the text it is."""
    sides = [one.text, *(near.text for near in (*one.supporting, *one.opposing))]
    letters = "".join(side.prompt + side.answer for side in sides if side is not None)
    escapes = sum(letters.count(letter) for letter in "<>&\"'")
    tokens = sum(len(token.text.encode()) + 60 for token in one.tokens)
    return 1500 + len(letters.encode()) + 4 * escapes + tokens


def data_uri(image: Any) -> str | None:
    """A small JPEG of an image as `datasets` or a chat has it; None where it cannot be read."""
    try:
        from PIL import Image

        if isinstance(image, Mapping):
            image = Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"])
        small = image.convert("RGB")
        small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        small.save(out := io.BytesIO(), "JPEG", quality=80)
    except Exception:  # a file that is gone, an address, an array: the report has no image then
        return None
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
