"""What forward passes say about a row: the numbers that `auto` chooses from.

Two parts per row: the whole row, and its answer alone (its labelled tokens behind BOS). What rests on validation rows
(the For-Value directions, a fitted head, which words are rare) is measured once for each half of them, so that a
validation row is never judged by itself.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .. import core
from ..core.fit import fit_head
from ..core.stats import power_of_moment
from ..data.corruption import Spelling
from ..data.rules import RULES, rule_of
from ..data.sample import Segment
from ..model.positions import Columns, Positions
from .base import reasons_unless

# Numbers of a row that rest on nothing else, and those that rest on one half of the validation rows.
ROW_CANDIDATES = ("mean log-likelihood", "mutual information", "temperature score", "last token", "repetition")
HALF_CANDIDATES = (
    "overlap",
    "gradient",
    "gradient, length",
    "gradient, cosine",
    "whitened",
    "whitened, length",
    "whitened, cosine",
    "fitted",
    "fitted, length",
    "fitted_likelihood",
    "mutual information, fitted",
)
CANDIDATES = (*ROW_CANDIDATES, "match", *HALF_CANDIDATES)
N_GRAMS = (1, 2, 3)
# The match is of so many leading directions of prompts and answers.
MATCH_DIMENSIONS = 256
MATCH_RIDGE = 0.1
FOLDS = 5


@dataclass(frozen=True)
class Half:
    """What one half of the validation rows says about the head (symbols of `core`)."""

    gradient_VD: Tensor
    metric_DD: Tensor
    move: core.Move

    @classmethod
    def of(cls, head: core.Head, positions: Positions, ridge: float) -> Half:
        """From the labelled positions of clean rows."""
        hidden = positions.hidden_TD
        gradient = torch.zeros(head.weight.shape, dtype=core.working_dtype(head.weight), device=hidden.device)
        core.add_gradient(gradient, head, hidden, positions.target_T)
        gradient /= len(positions.lengths)
        metric = core.inverse_with_ridge(hidden.double().T @ hidden.double() / len(hidden), ridge).to(gradient)
        move = fit_head(head, hidden, positions.target_T, positions.rows_T).move_VD
        return cls(gradient, metric, core.Move.of(move))


@dataclass(frozen=True)
class Reference:
    """What rows are measured against.

    Args:
        halves: what each half of the validation rows says.
        documents, frequency: how many rows each half has, and in how many of them each n-gram occurs.
        spelling: of the answers, where it is known.
        bases: the directions that are kept of mean states of prompts and of answers, (D, `MATCH_DIMENSIONS`) each.
    """

    halves: Sequence[Half]
    documents: Sequence[int]
    frequency: Sequence[Counter[tuple[int, ...]]] = field(repr=False)
    spelling: Spelling | None = None
    bases: tuple[Tensor, Tensor] | None = None

    def half(self, h: int) -> Reference:
        """One half alone: numbers by half are of one dimension then."""
        return replace(self, halves=[self.halves[h]], documents=[self.documents[h]], frequency=[self.frequency[h]])

    @cached_property
    def along(self) -> core.Along:
        """What whole rows are measured along."""
        like, moves = self.halves[0].gradient_VD, [half.move for half in self.halves]
        return core.Along.of(
            like, [half.gradient_VD for half in self.halves], [half.metric_DD for half in self.halves], moves
        )

    @cached_property
    def fitted(self) -> core.Along:
        """The fitted heads alone."""
        return core.Along.of(self.halves[0].gradient_VD, [], [], [half.move for half in self.halves])

    def by_half(self, values_NK: np.ndarray) -> np.ndarray:
        """A column for each half, or the only one, (N,)."""
        return values_NK if len(self.halves) > 1 else values_NK[:, 0]

    def overlap(self, segment: Segment) -> list[float]:
        """Share of the answer's n-grams that its prompt holds, rare ones counting more (inverse frequency in each
        half)."""
        prompt = n_grams(segment.ids[: segment.n_prompt])
        answer = n_grams(learnt(segment))
        shared, out = answer & prompt, []
        for weights, frequency in zip(self._weights, self.frequency, strict=True):
            weight = {g: weights[frequency.get(g, 0)] for g in answer}
            out.append(sum(weight[g] for g in shared) / max(sum(weight.values()), 1e-9))
        return out

    @cached_property
    def _weights(self) -> list[list[float]]:
        """Of each half, of an n-gram by the number of rows that have it."""
        return [[math.log((n + 1) / (k + 0.5)) for k in range(n + 1)] for n in self.documents]

    def projected(self, means_RD: Tensor, side: int) -> np.ndarray:
        """Mean states along the directions that are kept, float32."""
        means_RD = means_RD.float().cpu()
        return (means_RD if self.bases is None else means_RD @ self.bases[side].float()).numpy()


def whole_rows(reference: Reference, head: core.Head, positions: Positions) -> Columns:
    """Measures of whole rows."""
    assert positions.prompt_RD is not None
    n = np.array(positions.lengths)
    found = core.measure(head, reference.along, positions.hidden_TD, positions.target_T, positions.lengths)
    log_p = positions.sum(found.log_likelihood_T)
    columns = {
        "mean log-likelihood": log_p / n,
        # Along W itself the score is that of a colder softmax: log p + entropy, where logits are W h.
        "temperature score": positions.sum(found.temperature_T) / n,
        "last token": found.log_likelihood_T.double().cpu().numpy()[np.cumsum(n) - 1],
        "length": np.log(n),
        "repetition": np.array([_repetition(learnt(segment)) for segment in positions.segments]),
        "asked": np.log1p([segment.n_prompt for segment in positions.segments]),
        "prompt hash": np.array([prompt_hash(segment) for segment in positions.segments], dtype=np.int64),
        **_forms(reference.spelling, positions.segments),
    }
    halves = {"overlap": np.array([reference.overlap(segment) for segment in positions.segments])}
    squares = found.squares_NK.cpu().numpy()
    for name, score_TK, square in (
        ("gradient", found.score_TK, squares[:, :1]),
        ("whitened", found.metric_score_TK, squares[:, 1:]),
    ):
        score = positions.sum(score_TK)
        halves |= {name: score, f"{name}, length": score / n[:, None]}
        halves[f"{name}, cosine"] = score / np.sqrt(np.maximum(square, 1e-30))
    gain = positions.sum(found.gain_TK)
    halves |= {"fitted": gain, "fitted, length": gain / n[:, None]}
    halves["fitted_likelihood"] = (gain + log_p[:, None]) / n[:, None]
    columns |= {name: reference.by_half(values) for name, values in halves.items()}
    finite = np.isfinite(np.column_stack(list(columns.values()))).all(1)
    return {
        **columns,
        "prompt": reference.projected(positions.prompt_RD, 0),
        "log_likelihood": log_p,
        "n_labelled": n.astype(np.int64),
        "reason": reasons_unless(finite),
    }


def prompt_hash(segment: Segment) -> int:
    """The same for rows whose prompts have the same tokens."""
    return zlib.crc32(np.ascontiguousarray(segment.ids[: segment.n_prompt], dtype=np.int64).tobytes())


def _repetition(tokens: np.ndarray) -> float:
    """Share of the pairs of tokens that came before."""
    pairs = list(pairwise(tokens.tolist()))
    return 1 - len(set(pairs)) / max(1, len(pairs))


def _forms(spelling: Spelling | None, segments: Sequence[Segment]) -> Columns:
    """The token that answers end with; where text can be read, whether they have lower case letters, capitals, and a
    sign that ends a sentence, and which plain rule they hit (0: none, k: the k-th)."""
    ends = np.array([segment.target[-1] for segment in segments], dtype=np.int64)
    forms = np.zeros((len(segments), 3), dtype=bool)
    rules = np.zeros(len(segments), dtype=np.int64)
    names = [None, *RULES]
    for i, segment in enumerate(segments if spelling is not None else ()):
        assert spelling is not None
        answer = spelling.text(learnt(segment)).strip()
        forms[i] = answer != answer.upper(), answer != answer.lower(), answer.endswith((".", "!", "?", '."', "\u3002"))
        rules[i] = names.index(rule_of(spelling.text(segment.ids[: segment.n_prompt]), answer))
    return {"end": ends, "lower case": forms[:, 0], "capitals": forms[:, 1], "full stop": forms[:, 2], "rule": rules}


def answers_alone(reference: Reference, head: core.Head, positions: Positions) -> Columns:
    """Measures of answers without their prompts."""
    hidden, n = positions.hidden_TD, np.array(positions.lengths)
    found = core.measure(head, reference.fitted, hidden, positions.target_T, positions.lengths)
    log_p = positions.sum(found.log_likelihood_T) / n
    fitted = positions.sum(found.gain_TK) / n[:, None] + log_p[:, None]
    means = torch.zeros(len(n), hidden.shape[1], device=hidden.device)
    means.index_add_(0, positions.rows_T, hidden.float())
    means = means / torch.as_tensor(n, device=means.device)[:, None]
    columns = {"alone": log_p, "alone, fitted": reference.by_half(fitted)}
    finite = np.isfinite(np.column_stack(list(columns.values()))).all(1)
    return {**columns, "answer": reference.projected(means, 1), "reason": reasons_unless(finite)}


def features(columns: Columns, half: int | np.ndarray, match: np.ndarray) -> np.ndarray:
    """(N, len(CANDIDATES)), by one half of the validation rows, or by a half (0 or 1) for each row.

    Mutual information per token is log p(answer given prompt) - log p(answer), by the model's head and the fitted one.
    """
    rows = np.arange(len(match))
    derived = {
        "mutual information": columns["mean log-likelihood"] - columns["alone"],
        "mutual information, fitted": columns["fitted_likelihood"] - columns["alone, fitted"],
        "match": match,
    }
    values = {**columns, **derived}
    return np.stack([v if (v := values[name]).ndim == 1 else v[rows, half] for name in CANDIDATES], 1)


def leading(prompt_ND: Tensor, answer_ND: Tensor) -> tuple[Tensor, Tensor] | None:
    """The `MATCH_DIMENSIONS` leading directions of prompts and of answers, None where there are no more."""
    if prompt_ND.shape[1] <= MATCH_DIMENSIONS:
        return None
    prompts, answers = (
        torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:MATCH_DIMENSIONS].T for x in (prompt_ND, answer_ND)
    )
    return prompts, answers


def learnt(segment: Segment) -> np.ndarray:
    """The tokens of a segment that are learnt: what it predicts, and a first one that nothing does."""
    return segment.target if segment.n_prompt else np.append(segment.ids[:1], segment.target)


def n_grams(tokens: np.ndarray) -> set[tuple[int, ...]]:
    """All runs of one, two and three tokens."""
    ids = tokens.tolist()
    return {tuple(ids[i : i + n]) for n in N_GRAMS for i in range(len(ids) - n + 1)}


class Match:
    """How well an answer fits its prompt: `p^T C_p^(-1/2) K C_a^(-1/2) a`, cosine of `p K` and `a` so whitened.

    p and a are centred mean hidden states of prompt and answer, C their covariances, K the whitened cross-covariance
    of pairs (canonical correlation analysis without its cut-off). K is learned from validation and training pairs:
    wrong pairs among them add noise and no bias. No row is scored by a K that has seen it.

    Args:
        prompt_ND, answer_ND: of the rows it is learned from.
        fold: (N,), 0 to FOLDS - 1.
    """

    def __init__(self, prompt_ND: Tensor, answer_ND: Tensor, fold: np.ndarray):
        self.sides = [_Whitening(prompt_ND), _Whitening(answer_ND)]
        p, a = (side(x) for side, x in zip(self.sides, (prompt_ND, answer_ND), strict=True))
        self.cross = []
        for k in range(FOLDS):
            kept = torch.from_numpy(fold != k)
            self.cross.append(p[kept].T @ a[kept] / max(1, int(kept.sum())))

    def __call__(self, prompt_ND: Tensor, answer_ND: Tensor, fold: np.ndarray) -> np.ndarray:
        """(N,); `fold` is that of the row, or of the row it is a copy of."""
        p, a = (side(x) for side, x in zip(self.sides, (prompt_ND, answer_ND), strict=True))
        out = np.zeros(len(p))
        for k, cross in enumerate(self.cross):
            here = torch.from_numpy(fold == k)
            score = (p[here] @ cross * a[here]).sum(1) / (p[here].norm(dim=1) * a[here].norm(dim=1)).clamp(min=1e-12)
            out[fold == k] = score.numpy()
        return out


class _Whitening:
    """x -> (x - mean) (C + ridge)^(-1/2), up to a rotation."""

    def __init__(self, x_ND: Tensor):
        self.mean_D = x_ND.mean(0)
        centred = x_ND - self.mean_D
        moment = centred.T @ centred / len(x_ND)
        self.map_DD = power_of_moment(moment, -0.5, ridge=MATCH_RIDGE, floor=1e-12, rotated=True)

    def __call__(self, x_ND: Tensor) -> Tensor:
        return (x_ND - self.mean_D) @ self.map_DD
