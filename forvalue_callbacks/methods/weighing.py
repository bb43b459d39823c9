"""The evidence weighed: from what was measured of validation rows, of corrupted copies of them and of training rows to
log odds, shares and judgements. Knows no model.

Validation rows and copies are judged out of fold, by the half of the validation rows that they are not in. Folds and
halves follow the content of rows, so that their order decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..core.stats import auc
from ..data.corruption import FORMS
from ..data.rules import RULES
from ..model.positions import Columns
from ..scores.judgements import Judgements
from ..scores.noise import USEFUL_AUC, Evidence, NoiseEstimate, ValidationNoise
from .base import Found
from .calibration import (
    FOLDS,
    INTERVAL,
    Classifier,
    errors_of_one_of,
    fit_classifier,
    log_odds,
    share_by_moments,
    shares,
    shift_to,
)
from .comparison import LIKE, OTHER_LENGTH, WHY, Comparison, length_range
from .measures import CANDIDATES, Match, features

# How often validation rows are drawn again for an interval.
DRAWS = 200
# A row that the nearest class fits worse than it fits this share of its own rows is unlike anything known.
ODD = 0.002
UNKNOWN = "worth a look: unlike the validation rows and unlike every kind of noise that was tried (kept)"
# A kind that is told so well is believed, at such odds, of rows shorter or longer than all validation rows.
CERTAIN_AUC, CERTAIN_ODDS = 0.98, 3.0
# A share with a larger standard error is hardly known: no more rows are dropped than there are noisy ones at least.
UNSURE = 0.1
# Another form that so many rows have is named.
MANY = 0.05
# A plain rule hits right rows by itself: as if so many of so many more validation rows had been hit.
RULE_HITS, RULE_ROWS = 0.1, 100
# A row's reason names so many measures at most, each of which said so much for it.
REASONS, ENOUGH_SAID = 3, 0.5
# A measure that is low, and one that is high.
WORDS = {
    "mean log-likelihood": ("its words are unlikely", "its words are likelier than those of right answers"),
    "mutual information": (
        "the prompt tells little about the answer",
        "the answer hangs on its prompt more than right ones do",
    ),
    "mutual information, fitted": (
        "the prompt tells little about the answer",
        "the answer hangs on its prompt more than right ones do",
    ),
    "temperature score": ("its words surprise where the model is sure", "its words are the model's own first choice"),
    "last token": ("it ends early", "its end is likelier than that of right answers"),
    "repetition": ("it repeats less than right answers", "it repeats itself"),
    "overlap": ("it takes up little of its prompt", "it repeats its prompt"),
    "match": ("it does not fit its prompt", "it fits its prompt closer than right answers do"),
    "fitted_likelihood": (
        "its words are unlike those of validation answers",
        "its words are likelier than those of right answers",
    ),
}
DIRECTION = ("validation rows speak against its words", "validation rows speak for its words more than for right ones")


def fold_of(digests: np.ndarray) -> np.ndarray:
    """The fold of rows, by their content."""
    return np.array([int(digest, 16) % FOLDS for digest in digests.tolist()], dtype=np.int64)


class Weighing:
    """What the measured columns say.

    Args:
        clean: of the validation rows, with "fold" and "half".
        copies: of their corrupted copies, with "fold", "half" and "row" of the original, and "class", 1 to K.
        kinds: the names of the K classes.
        found: the training rows.
        leading: mean states lie along their leading directions, in their order.
    """

    def __init__(self, clean: Columns, copies: Columns, kinds: Sequence[str], found: Found, leading: bool):
        self.clean, self.copies, self.kinds, self.found = clean, copies, kinds, found
        self.fold = fold_of(found.digests)
        some = found.some()
        names = ["prompt", "prompt hash", "answer", "asked", "length", "end", "lower case", "capitals", "full stop"]
        train = {**found.take(some, names), "fold": self.fold[some]}
        self.comparison = Comparison(clean, train, leading)
        fold = np.concatenate([clean["fold"], train["fold"]])
        prompts, answers = (torch.cat(side) for side in zip(_means(clean), _means(train), strict=True))
        self.match = Match(prompts, answers, fold)
        sides = [self._features(side) for side in (clean, copies)]
        self.classes = np.concatenate([np.zeros(len(sides[0]), dtype=np.int64), copies["class"]])
        self.of_validation = np.concatenate(sides)
        self.classifier, self.out_of_fold = fit_classifier(
            self.of_validation,
            np.concatenate([clean["length"], copies["length"]]),
            self.classes,
            np.concatenate([clean["fold"], copies["fold"]]),
        )
        self.noisy = np.array([False, *(kind not in FORMS for kind in kinds)])
        self.evidence = {kind: self._evidence(k) for k, kind in enumerate(kinds, 1) if self.noisy[k]}

    def _features(self, columns: Columns) -> np.ndarray:
        """Of validation rows and their copies: judged by the half that they are not in."""
        return features(columns, 1 - columns["half"], self.match(*_means(columns), columns["fold"]))

    def _evidence(self, k: int) -> Evidence:
        """How well one kind of copies is told from the clean rows, by its log odds and by the measures."""
        of_kind = self.classes == k
        odds = self.out_of_fold[:, 0] - self.out_of_fold[:, k]
        n = len(self.clean["fold"])
        single = {
            name: auc(self.of_validation[:n, c], self.of_validation[of_kind, c]) for c, name in enumerate(CANDIDATES)
        }
        best = max(single, key=lambda name: single[name])
        clean, noisy = odds[:n], odds[of_kind]
        rows = self.copies["row"][of_kind[n:]]
        rng = np.random.default_rng(0)
        drawn = []
        for _ in range(DRAWS):  # a validation row is drawn with its copy
            times = np.bincount(rng.integers(n, size=n), minlength=n)
            some, others = np.repeat(np.arange(n), times), np.repeat(np.arange(len(rows)), times[rows])
            if len(others):
                drawn.append(auc(clean[some], noisy[others]))
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Evidence(
            auc(clean, noisy), (float(low), float(high)), best, single[best], single["mean log-likelihood"]
        )

    def result(self) -> tuple[np.ndarray, NoiseEstimate, Judgements]:
        """Log odds of the training rows, what is known of the noise, and judgements."""
        log_p, unlike, rule, odd = self._judged()
        useful = [k for k in range(log_p.shape[1]) if not self.noisy[k] or self._evidence_of(k).auc >= USEFUL_AUC]
        ruled, hit_odds = self._by_rules(rule)
        unlike[self._certain(log_p, self.found.column("length")) & (unlike == OTHER_LENGTH)] = LIKE
        judged = (unlike == LIKE) & ~ruled & ~odd
        share = np.zeros(log_p.shape[1])
        share[0] = 1.0
        if judged.any():
            share[useful] = shares(log_p[np.ix_(judged, useful)], len(self.clean["fold"]))
        values = log_odds(log_p, share, self.noisy)
        total, error = 0.0, 0.0 if judged.any() else 1.0
        if share[self.noisy].any():
            total, error = self._share(share, judged)
        spread, sure = INTERVAL * error, errors_of_one_of(int(self.noisy[useful].sum()))
        if total > sure * error:
            most = total - spread if error > UNSURE else min(1.0, total + spread)
            values += shift_to(values[judged], total, most)
        elif judged.any():
            values += shift_to(values[judged], 0.0, 0.0)
            share = np.where(self.noisy, 0.0, share)
        values[~judged] = np.maximum(values[~judged], 0.0)
        values[ruled] = np.minimum(values[ruled], hit_odds[ruled])
        rest = 1 - ruled.mean()
        of_kinds = share * rest * total / max(share[self.noisy].sum(), 1e-12)
        by_kind = {kind: float(of_kinds[k]) for k, kind in enumerate(self.kinds, 1) if self.noisy[k]}
        names = [None, *RULES]
        for k in np.unique(rule[ruled]).tolist():
            name = str(names[k])
            by_kind[name] = by_kind.get(name, 0.0) + float((ruled & (rule == k)).mean())
        noise = NoiseEstimate(
            float(1 - rest * (1 - total)),
            self.evidence,
            len(self.clean["fold"]),
            by_kind,
            share_error=float(min(1.0, error * sure / INTERVAL) * rest),  # 0 is in its interval where no row goes
            n_unjudged=int((unlike != LIKE).sum() - (ruled & (unlike != LIKE)).sum()),
            n_unlike=int((odd & (unlike == LIKE) & ~ruled).sum()),
            differences=(*self.comparison.differences, *self._other_forms(share)),
            validation=self._of_validation(useful),
        )
        weighted = log_p + np.log(np.maximum(share, 0.5 / max(1, len(log_p))))
        kinds = np.where(self.noisy, weighted, -np.inf)[:, 1:].argmax(1)
        noisy = judged & (values < 0)
        judgements = self._judgements(np.where(ruled, rule, 0), kinds, noisy, unlike, odd)
        judgements.probability = np.where(judged | ruled, 1 / (1 + np.exp(np.clip(values, -500, 500))), np.nan)
        return values, noise, judgements

    def _judgements(
        self, rule: np.ndarray, kinds: np.ndarray, noisy: np.ndarray, unlike: np.ndarray, odd: np.ndarray
    ) -> Judgements:
        """What is said of each row: the rule that it is judged by (0: none), else its kind (0 to K - 1) where it is
        noisy, else why it is not judged."""
        judgements, names = Judgements.none(self.found.n), [None, *RULES]
        why = self._why(kinds, noisy)
        for i in range(self.found.n):
            if rule[i]:
                judgements.kind[i] = names[rule[i]]
                judgements.why[i] = f"a plain rule: {names[rule[i]]}"
            elif noisy[i]:
                judgements.kind[i], judgements.why[i] = self.kinds[kinds[i]], why[i]
            elif unlike[i] != LIKE:
                judgements.why[i] = WHY[int(unlike[i])]
            elif odd[i]:
                judgements.why[i] = UNKNOWN
        return judgements

    def _of_validation(self, useful: Sequence[int]) -> ValidationNoise:
        """Validation rows that look like noise themselves, by what was learned from the others."""
        n = len(self.clean["fold"])
        log_p, share = self.out_of_fold[:n], np.zeros(len(self.noisy))
        share[useful] = shares(log_p[:, useful], n)
        odds = log_odds(log_p, share, self.noisy)
        doubted = np.argsort(odds, kind="stable")[: int((odds < 0).sum())]
        wrong = float(share[self.noisy].sum())
        rows, values = self.clean["place"][doubted].tolist(), odds[doubted].tolist()
        return ValidationNoise(wrong, float(np.sqrt(wrong * (1 - wrong) / n)), tuple(rows), tuple(values))

    def _certain(self, log_p: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Rows that look like a kind of noise that is hardly ever taken for another, and are as long as it is; or
        longer, where a single measure tells it so well: more of the same is no less of it."""
        likely = np.where(self.noisy, log_p, -np.inf).argmax(1)
        out = log_p[:, 0] - log_p[np.arange(len(log_p)), likely] < -CERTAIN_ODDS
        for k in np.flatnonzero(self.noisy).tolist():
            low, high = length_range(self.copies["length"][self.copies["class"] == k])
            evidence = self._evidence_of(k)
            known = evidence.auc > CERTAIN_AUC
            alone = (evidence.best_auc or 0.0) > CERTAIN_AUC
            out &= (likely != k) | (known & (length >= low) & (alone | (length <= high)))
        return out

    def _evidence_of(self, k: int) -> Evidence:
        return self.evidence[self.kinds[k - 1]]

    def _other_forms(self, share: np.ndarray) -> list[str]:
        """Forms that many training answers have and the validation answers have not, in words."""
        return [
            f"about {share[k]:.0%} of the training answers are like validation answers with {kind}"
            for k, kind in enumerate(self.kinds, 1)
            if kind in FORMS and share[k] > MANY
        ]

    def _windows(self) -> Iterator[tuple[slice, Columns, list[np.ndarray]]]:
        """Training rows a window at a time: where they are, their columns, their features by each half."""
        start = 0
        for columns in self.found.windows():
            n = len(columns["length"])
            columns = {**columns, "fold": self.fold[start : start + n]}
            matches = self.match(*_means(columns), columns["fold"])
            yield slice(start, start + n), columns, [features(columns, half, matches) for half in (0, 1)]
            start += n

    def _judged(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of all training rows log p of the classes, the mean over folds and halves, (n, K + 1), what makes them
        unlike the validation rows, the rule they hit, and whether they are unlike anything."""
        n = self.found.n
        log_p, unlike, rule, odd = (
            np.zeros((n, len(self.kinds) + 1)),
            np.zeros(n, int),
            np.zeros(n, int),
            np.zeros(n, bool),
        )
        known = _Known(
            self.classifier,
            self.of_validation,
            np.concatenate([self.clean["length"], self.copies["length"]]),
            self.classes,
        )
        for here, columns, both in self._windows():
            log_p[here] = np.mean([self.classifier.by_fold(x, columns["length"]).mean(0) for x in both], 0)
            unlike[here] = self.comparison(columns)
            rule[here] = columns["rule"]
            odd[here] = known.odd(np.mean(both, 0), columns["length"])
        return log_p, unlike, rule, odd

    def _share(self, share: np.ndarray, judged: np.ndarray) -> tuple[float, float]:
        """Of noisy rows among those that are judged, by moments, and its standard error."""
        sides = [share * ~self.noisy, share * self.noisy]
        weights = [side / side.sum() for side in sides]

        def clean_probability(log_p: np.ndarray) -> np.ndarray:
            clean, noisy = (np.exp(log_p) @ side for side in weights)
            return np.asarray(clean / (clean + noisy))

        train = np.zeros(self.found.n)
        for here, columns, both in self._windows():
            by_fold = [self.classifier.by_fold(x, columns["length"]) for x in both]
            train[here] = np.mean([clean_probability(log_p).mean(0) for log_p in by_fold], 0)
        held_out = clean_probability(self.out_of_fold)
        found = [np.flatnonzero(side) for side in weights]
        of_clean, of_noisy = ([held_out[self.classes == k] for k in kinds] for kinds in found)
        return share_by_moments(train[judged], of_clean, of_noisy, share[np.concatenate(found)])

    def _by_rules(self, rule: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows that a plain rule hits and validation rows hit less often, and their log odds."""
        hit, odds = np.zeros(len(rule), dtype=bool), np.zeros(len(rule))
        for k in range(1, len(RULES) + 1):
            here = rule == k
            right = ((self.clean["rule"] == k).sum() + RULE_HITS) / (len(self.clean["rule"]) + RULE_ROWS)
            wrong = here.mean() - right
            if wrong > right:
                hit[here], odds[here] = True, np.log(right / wrong) - 1
        return hit, odds

    def _why(self, kinds: np.ndarray, noisy: np.ndarray) -> list[str | None]:
        """The measures that spoke most for the noise of rows, in words."""
        out: list[str | None] = [None] * len(noisy)
        for here, columns, both in self._windows():
            rows = np.flatnonzero(noisy[here])
            if not len(rows):
                continue
            said, z = self.classifier.spoke(np.mean(both, 0)[rows], columns["length"][rows], kinds[here][rows])
            for row, said_F, z_F in zip((here.start + rows).tolist(), said, z, strict=True):
                words: list[str] = []
                for c in np.argsort(said_F):
                    pair = WORDS.get(CANDIDATES[c], DIRECTION)
                    text = pair[int(z_F[c] > 0)]
                    if said_F[c] > -ENOUGH_SAID or len(words) == REASONS:
                        break
                    if text not in words:
                        words.append(text)
                out[row] = "; ".join(words) or "many measures a little"
        return out


class _Known:
    """How far rows are from all that is known: the nearest class, by its own mean and covariance."""

    def __init__(self, classifier: Classifier, x: np.ndarray, length: np.ndarray, classes: np.ndarray):
        self.classifier = classifier
        z = classifier.relative(x, length)
        self.means, self.inverse = [], []
        everything = np.cov((z - np.stack([z[classes == k].mean(0) for k in range(classes.max() + 1)])[classes]).T)
        for k in range(classes.max() + 1):
            own = z[classes == k]
            shrunk = 0.5 * np.cov(own.T) + 0.5 * everything + 0.05 * np.eye(z.shape[1])
            self.means.append(own.mean(0))
            self.inverse.append(np.linalg.inv(shrunk))
        self.farthest = float(np.quantile(self._distance(z), 1 - ODD))

    def _distance(self, z: np.ndarray) -> np.ndarray:
        of_classes = []
        for mean, inverse in zip(self.means, self.inverse, strict=True):
            of_classes.append(((z - mean) @ inverse * (z - mean)).sum(1))
        return np.min(of_classes, 0)

    def odd(self, x: np.ndarray, length: np.ndarray) -> np.ndarray:
        return self._distance(self.classifier.relative(x, length)) > 1.2 * self.farthest


def _means(columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(columns["prompt"]).double(), torch.from_numpy(columns["answer"]).double()
