"""Are training rows of the kind of the validation rows? Before rows are judged by validation rows, both are compared.

What is compared is what noise in answers does not change: the prompts, and the range of lengths; and forms that
nearly all answers of one side have and those of the other have not (an end, capitals, a full stop). Rows unlike every
validation row are not judged: that they differ says nothing of whether they are right. Imports torch and numpy.

Shapes: M validation rows, N training rows, D hidden size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..core.fit import fit_softmax, logits
from ..core.stats import auc
from ..model.positions import Columns

LIKE, OTHER_PROMPT, OTHER_LENGTH, OTHER_FORM = range(4)
WHY = {
    OTHER_PROMPT: "not judged: its prompt is of another kind than those of the validation rows",
    OTHER_LENGTH: "not judged: its answer is shorter or longer than those of the validation rows",
    OTHER_FORM: "not judged: its answer is of another form than those of the validation rows",
}
# Directions of the prompts that are compared, at most one for so many validation rows.
DIRECTIONS, ROWS_PER_DIRECTION = 32, 8
NEIGHBOURS = 3
# Rows of a prompt are in one fold, or some of them would tell of which side the others are; but for a prompt that more
# than this of all rows have, which says nothing of a side.
COMMON = 0.1
# Training rows may be as far from validation rows as all but this share of those are from each other; and as short or
# long as all but that share on either side.
ODD, ODD_LENGTH = 0.01, 0.025
# Sides that a classifier tells apart this well differ in kind. A row is then of another kind if it is less likely than
# this of the validation rows'.
DIFFERENT, LIKELY = 0.6, 0.35
# Where so many training rows are of another kind, or sides are told apart so well, rows that look alike do so by
# chance: none is judged.
MOST, ALL_DIFFERENT = 0.67, 0.8
RIDGE, FOLDS = 30.0, 5
# A form is that of one side if so many of its answers have it, and so few of the other's.
MOST_HAVE, HARDLY_ANY = 0.5, 0.05
FORMS = {
    "end": "end with the same token, as with EOS",
    "lower case": "have lower case letters",
    "capitals": "have capitals",
    "full stop": "end with a full stop",
}


@dataclass
class Comparison:
    """Of the two sides.

    Args:
        clean: columns of the validation rows, with "fold".
        train: columns of training rows, with "fold".
        leading: prompts lie along the directions in which those of the validation rows differ most, in their order.

    Attributes:
        told_apart: AUC with which prompts of the two sides are told apart, cross-fitted.
        differences: what nearly all answers of one side have and hardly any of the other, in words.
    """

    clean: Columns
    train: Columns
    leading: bool = False
    told_apart: float = field(init=False)
    differences: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._fold_of_prompts()
        self._prompts = _Prompts(self._sides(self.clean))
        self._lengths = length_range(self.clean["length"])
        self._models, self.told_apart = self._classifiers()
        self._forms, self.differences = _other_forms(self.clean, self.train)
        self._none = False
        self._none = self.told_apart > ALL_DIFFERENT or self._unlike() > MOST

    def __call__(self, columns: Columns) -> np.ndarray:
        """LIKE or what makes a row unlike the validation rows, (N,)."""
        out = np.full(len(columns["length"]), LIKE)
        out[(columns["length"] < self._lengths[0]) | (columns["length"] > self._lengths[1])] = OTHER_LENGTH
        for name, value in self._forms.items():
            out[columns[name] != value] = OTHER_FORM
        x = self._prompts(self._sides(columns))
        far = self._prompts.distance(x) > self._prompts.farthest
        if self.told_apart > DIFFERENT:
            far |= self._usual - self._log_ratio(x, self._fold(columns)) < np.log(LIKELY)
        out[far | self._none] = OTHER_PROMPT
        return out

    def _sides(self, columns: Columns) -> Tensor:
        """Prompts and their lengths. Of leading directions no more than are compared: along the last ones validation
        rows hardly differ, being those that chose them, and all other rows would lie far away."""
        prompt = columns["prompt"]
        if self.leading:
            prompt = prompt[:, : _n_directions(len(self.clean["prompt"]))]
        return torch.from_numpy(np.column_stack([prompt, columns["asked"]])).double()

    def _fold_of_prompts(self) -> None:
        """A prompt that is there once keeps the fold of its row."""
        names, fold = (np.concatenate([self.clean[n], self.train[n]]) for n in ("prompt hash", "fold"))
        known, which, counts = np.unique(names, return_inverse=True, return_counts=True)
        kept = counts <= max(1, COMMON * len(names))
        total = np.bincount(which, weights=fold).astype(np.int64)
        self._known, self._fold_of_known = known[kept], total[kept] % FOLDS

    def _fold(self, columns: Columns) -> np.ndarray:
        """(N,), that of its prompt, or its own."""
        if not len(self._known):
            return np.asarray(columns["fold"])
        place = np.searchsorted(self._known, columns["prompt hash"]).clip(max=len(self._known) - 1)
        return np.where(self._known[place] == columns["prompt hash"], self._fold_of_known[place], columns["fold"])

    def _unlike(self) -> float:
        """Share of the training rows with other prompts or lengths."""
        return float(np.isin(self(self.train), [OTHER_PROMPT, OTHER_LENGTH]).mean())

    def _classifiers(self) -> tuple[list[Tensor], float]:
        """Softmax regressions that tell validation prompts from training prompts, and their AUC out of fold."""
        sides = [self._prompts(self._sides(side)) for side in (self.clean, self.train)]
        x, fold = torch.cat(sides), np.concatenate([self._fold(self.clean), self._fold(self.train)])
        targets = torch.zeros(len(x), 2, dtype=torch.float64)
        targets[: len(sides[0]), 0] = len(x) / 2 / len(sides[0])
        targets[len(sides[0]) :, 1] = len(x) / 2 / len(sides[1])
        kept = [torch.from_numpy(fold != k) for k in range(FOLDS)]
        models = [fit_softmax(_expand(x[some]), targets[some], RIDGE) for some in kept]
        self._models = models
        ratio = self._log_ratio(x, fold)
        known, others = ratio[: len(sides[0])], ratio[len(sides[0]) :]
        # Training rows of which a share is of another kind are a share 1 - s as frequent where validation rows are.
        self._usual = min(0.0, float(np.median(known)))
        return models, auc(others, known)

    def _log_ratio(self, x_ND: Tensor, fold: np.ndarray) -> np.ndarray:
        """How much more frequent rows like these are in training than in validation, as a logarithm."""
        out = np.zeros(len(x_ND))
        for k, model in enumerate(self._models):
            here = fold == k
            two = logits(model, _expand(x_ND[torch.from_numpy(here)])).numpy()
            out[here] = two[:, 1] - two[:, 0]
        return out


class _Prompts:
    """Prompts along the directions in which those of the validation rows differ most, with their length."""

    def __init__(self, x_MD: Tensor):
        n = min(_n_directions(len(x_MD)), x_MD.shape[1])
        self.center, self.spread = x_MD.mean(0), x_MD.std(0) + 1e-9
        z = (x_MD - self.center) / self.spread
        self.basis = torch.linalg.svd(z, full_matrices=False).Vh[:n].T
        self.scale = (z @ self.basis).std(0) + 1e-9
        self.known = self(x_MD)
        near = torch.cdist(self.known, self.known).sort(1).values[:, 1 : NEIGHBOURS + 1].mean(1)
        self.farthest = float(near.quantile(1 - ODD))

    def __call__(self, x_ND: Tensor) -> Tensor:
        return (x_ND - self.center) / self.spread @ self.basis / self.scale

    def distance(self, x_ND: Tensor) -> np.ndarray:
        """Mean distance to the nearest validation rows, (N,)."""
        near = torch.cdist(x_ND, self.known).sort(1).values
        return near[:, :NEIGHBOURS].mean(1).numpy()


def _n_directions(n_validation: int) -> int:
    return min(DIRECTIONS, max(1, n_validation // ROWS_PER_DIRECTION))


def _expand(x: Tensor) -> Tensor:
    x = x.clamp(-4, 4)
    return torch.cat([x, x**2 - 1], 1)


def length_range(x: np.ndarray) -> tuple[float, float]:
    """In which all but a few odd rows lie."""
    low, high = np.quantile(x, [ODD_LENGTH, 1 - ODD_LENGTH])
    return float(low), float(high)


def _other_forms(clean: Columns, train: Columns) -> tuple[dict[str, object], list[str]]:
    """The forms of the validation rows that training rows do not have: by column, and in words."""
    forms: dict[str, object] = {}
    words = []
    for name, what in FORMS.items():
        usual, of_training = (Counter(side[name].tolist()).most_common(1)[0][0] for side in (clean, train))
        for value in (usual, of_training) if name == "end" else (True,):
            sides = {"validation": clean[name] == value, "training": train[name] == value}
            (one, have), (other, have_not) = sorted(sides.items(), key=lambda side: -float(side[1].mean()))
            if have.mean() >= MOST_HAVE and have_not.mean() <= HARDLY_ANY and name not in forms:
                forms[name] = usual
                words.append(f"{have.mean():.0%} of the {one} answers {what}, and hardly any {other} answer does")
    return forms, words
