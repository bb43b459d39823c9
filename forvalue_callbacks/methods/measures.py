"""What forward passes say about a row: the numbers that `method="auto"` chooses from.

Two passes per row: over the whole row, and over its answer alone (its labelled tokens behind BOS). What rests on
held-out rows (the For-Value directions, a fitted head) is measured once for each half of them, so that a held-out row
is never judged by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import core
from ..core.fit import fit_head
from ..data.sft import IGNORED, Row
from ..model.run import Batcher, Labelled

# Numbers of a row that rest on nothing else, and those that rest on one half of the held-out rows.
ROW_CANDIDATES = ("mean log-likelihood", "mutual information", "temperature score", "last token", "length", "overlap")
HALF_CANDIDATES = (
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
OVERFLOW = "hidden states or logits overflow; try forward_dtype='bfloat16' or float32 weights"
# The match is of so many leading directions of prompts and answers.
MATCH_DIMENSIONS = 256
MATCH_RIDGE = 0.1
FOLDS = 5


@dataclass(frozen=True)
class Half:
    """What one half of the held-out rows says about the head (symbols of `core.py`)."""

    gradient_VD: Tensor
    whitened_VD: Tensor
    metric_DD: Tensor
    move_VD: Tensor

    @classmethod
    def of(cls, head: core.Head, positions: Labelled, ridge: float) -> Half:
        """From the labelled positions of clean held-out rows."""
        hidden = positions.hidden_TD
        gradient = torch.zeros(head.weight.shape, dtype=core.working_dtype(head.weight), device=hidden.device)
        core.add_gradient(gradient, head, hidden, positions.labels_T)
        gradient /= len(positions.lengths)
        metric = core.inverse_with_ridge(hidden.double().T @ hidden.double() / len(hidden), ridge).to(gradient)
        move = fit_head(head, hidden, positions.labels_T, positions.rows_T).move_VD
        return cls(gradient, gradient @ metric, metric, move)


@dataclass
class Measured:
    """What was measured on N rows, in row order.

    Args:
        row_NF: (N, len(ROW_CANDIDATES)).
        half_NHF: (N, 2, len(HALF_CANDIDATES)).
        prompt_ND, answer_ND: mean hidden state of the prompt, and of the answer read alone.
        log_likelihood: (N,), sums over the labelled tokens.
        n_labelled: (N,).
        index: (N,), places of the rows among all rows of the data set.
    """

    row_NF: np.ndarray
    half_NHF: np.ndarray
    prompt_ND: Tensor
    answer_ND: Tensor
    log_likelihood: np.ndarray
    n_labelled: np.ndarray
    index: np.ndarray

    def features(self, half: int | np.ndarray, match: np.ndarray) -> np.ndarray:
        """(N, len(CANDIDATES)), by one half of the held-out rows, or by a half (0 or 1) for each row."""
        by_half = self.half_NHF[np.arange(len(self.index)), half]
        return np.hstack([self.row_NF, match[:, None], by_half])


class Evidence:
    """Measures rows.

    Args:
        batcher: runs the model.
        head: the model's output head.
        held_out: clean rows, which the halves and the frequencies of n-grams come from.
        halves: what each half of them says.
        bos: token that an answer read alone starts with.
    """

    def __init__(self, batcher: Batcher, head: core.Head, held_out: Sequence[Row], halves: Sequence[Half], bos: int):
        self.batcher, self.head, self.halves, self.bos = batcher, head, halves, bos
        self.bases: tuple[Tensor, Tensor] | None = None
        self.documents = len(held_out)
        self.frequency: Counter[tuple[int, ...]] = Counter()
        for row in held_out:
            self.frequency.update(n_grams(row.input_ids))

    def measure(
        self, rows: Iterable[Mapping[str, Any] | Row], description: str
    ) -> tuple[Measured, list[str | None], str]:
        """Both passes over rows in any form that the batcher takes.

        Returns:
            What was measured on the rows that can be scored, the reasons of those that cannot, the data's hash.
        """
        first, reasons, data_hash = self.batcher.map(rows, self._whole_rows, description)
        index = sorted(first)
        second, _, _ = self.batcher.map([first[i].alone for i in index], self._answers_alone, answers_of(description))
        for i in index:
            if not first[i].finite:
                reasons[i] = f"non-finite score: {OVERFLOW}"
        pairs = [(i, first[i], second[n]) for n, i in enumerate(index) if first[i].finite and n in second]
        if not pairs:
            raise ValueError(f"none of {len(reasons)} rows can be scored: {reasons[0] if reasons else 'none given'}.")
        index, parts, answers = map(list, zip(*pairs, strict=True))
        row_NF = np.array([part.row for part in parts])
        half_NHF = np.array([part.half for part in parts])
        # Mutual information per token: log p(answer given prompt) - log p(answer), by the model's head and the fitted.
        row_NF[:, 1] -= [answer.log_p for answer in answers]
        half_NHF[:, :, -1] -= np.array([answer.fitted for answer in answers])
        measured = Measured(
            row_NF,
            half_NHF,
            torch.stack([part.prompt_D for part in parts]).double(),
            torch.stack([answer.answer_D for answer in answers]).double(),
            np.array([part.log_p for part in parts]),
            np.array([part.n_labelled for part in parts]),
            np.array(index, dtype=np.int64),
        )
        return measured, reasons, data_hash

    def _whole_rows(self, batch: Labelled) -> list[_WholeRow]:
        head, n = self.head, np.array(batch.lengths)
        # Along W itself the score is that of a colder softmax: log p + entropy, where logits are W h.
        temperature_T, log_p_T = core.score_tokens(head, head.weight, batch.hidden_TD, batch.labels_T)
        log_p = batch.sum(log_p_T)
        half = np.stack([self._by_half(half, batch, log_p) for half in self.halves], 1)
        ends = np.cumsum(n) - 1
        last = log_p_T.double().cpu().numpy()[ends]
        temperature = batch.sum(temperature_T) / n
        prompts = self._projected(batch.prompt_RD, 0)
        out = []
        for i, item in enumerate(batch.items):
            assert item.row is not None
            answer = item.row.labels[1:][item.row.labels[1:] != IGNORED]
            alone = replace(item.row, input_ids=np.append(self.bos, answer), labels=np.append(IGNORED, answer))
            overlap = self._overlap(item.row)
            row = np.array([log_p[i] / n[i], log_p[i] / n[i], temperature[i], last[i], np.log(n[i]), overlap])
            out.append(_WholeRow(row, half[i], prompts[i], float(log_p[i]), int(n[i]), alone))
        return out

    def _by_half(self, half: Half, batch: Labelled, log_p: np.ndarray) -> np.ndarray:
        head, hidden, labels, n = self.head, batch.hidden_TD, batch.labels_T, np.array(batch.lengths)
        columns = []
        for direction, metric_TD in (
            (half.gradient_VD, None),
            (half.whitened_VD, hidden.to(half.metric_DD) @ half.metric_DD),
        ):
            score = batch.sum(core.score_tokens(head, direction, hidden, labels)[0])
            square = core.squared_norms(head, hidden, labels, batch.lengths, metric_TD=metric_TD).cpu().numpy()
            columns += [score, score / n, score / np.sqrt(np.maximum(square, 1e-30))]
        gain = batch.sum(core.gain_tokens(head, half.move_VD, hidden, labels)[0])
        after = (gain + log_p) / n
        return np.stack([*columns, gain, gain / n, after, after], 1)

    def _answers_alone(self, batch: Labelled) -> list[_Answer]:
        n = np.array(batch.lengths)
        fitted = []
        for half in self.halves:
            gain_T, log_p_T = core.gain_tokens(self.head, half.move_VD, batch.hidden_TD, batch.labels_T)
            log_p = batch.sum(log_p_T) / n
            fitted.append(batch.sum(gain_T) / n + log_p)
        means = torch.zeros(len(n), batch.hidden_TD.shape[1], device=batch.hidden_TD.device)
        means.index_add_(0, batch.rows_T, batch.hidden_TD.float())
        means = self._projected(means / torch.as_tensor(n, device=means.device)[:, None], 1)
        by_half = np.stack(fitted, 1)
        return [_Answer(float(log_p[i]), by_half[i], means[i]) for i in range(len(n))]

    def project(self, held_out: Measured) -> Measured:
        """From now on keep `MATCH_DIMENSIONS` directions of prompts and answers, the leading ones of held-out rows.

        Returns the held-out rows so projected. Of no effect on hidden states with fewer dimensions.
        """
        if held_out.prompt_ND.shape[1] <= MATCH_DIMENSIONS:
            return held_out
        sides = (held_out.prompt_ND, held_out.answer_ND)
        prompts, answers = (
            torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:MATCH_DIMENSIONS].T for x in sides
        )
        self.bases = (prompts, answers)
        return replace(held_out, prompt_ND=held_out.prompt_ND @ prompts, answer_ND=held_out.answer_ND @ answers)

    def _projected(self, means_RD: Tensor, side: int) -> Tensor:
        means_RD = means_RD.float().cpu()
        return means_RD if self.bases is None else means_RD @ self.bases[side].float()

    def _overlap(self, row: Row) -> float:
        """Share of the answer's n-grams that its prompt holds, rare ones counting more (inverse frequency)."""
        labelled = row.labels != IGNORED
        start = int(labelled.argmax())
        prompt, answer = set(n_grams(row.input_ids[:start])), set(n_grams(row.input_ids[start:][labelled[start:]]))
        weight = {g: np.log((self.documents + 1) / (self.frequency[g] + 0.5)) for g in answer}
        return float(sum(weight[g] for g in answer & prompt) / max(sum(weight.values()), 1e-9))


@dataclass(frozen=True)
class _WholeRow:
    row: np.ndarray
    half: np.ndarray
    prompt_D: Tensor
    log_p: float
    n_labelled: int
    alone: Row

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.row).all() and np.isfinite(self.half).all())


@dataclass(frozen=True)
class _Answer:
    log_p: float
    fitted: np.ndarray
    answer_D: Tensor


def answers_of(description: str) -> str:
    """Name of the pass over the answers alone of the rows of another."""
    return f"{description}, answers alone"


def n_grams(tokens: np.ndarray) -> set[tuple[int, ...]]:
    """All runs of one, two and three tokens."""
    ids = tokens.tolist()
    return {tuple(ids[i : i + n]) for n in N_GRAMS for i in range(len(ids) - n + 1)}


class Match:
    """How well an answer fits its prompt: `p^T C_p^(-1/2) K C_a^(-1/2) a`, cosine of `p K` and `a` so whitened.

    p and a are centred mean hidden states of prompt and answer, C their covariances, K the whitened cross-covariance
    of pairs (canonical correlation analysis without its cut-off). K is learned from held-out and training pairs:
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
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x_ND))
        values = values.clamp(min=0)
        self.map_DD = vectors * (values + MATCH_RIDGE * values.mean() + 1e-12) ** -0.5

    def __call__(self, x_ND: Tensor) -> Tensor:
        return (x_ND - self.mean_D) @ self.map_DD
