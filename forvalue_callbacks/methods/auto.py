"""Scores that are the log of the odds that a row is clean: 0 is where it is as likely noisy as clean.

`method="label_model"`, where answers repeat: the label model of `labels.py`. `method="auto"`: the same where answers
repeat; else copies of the held-out rows are corrupted in the ways in which data goes wrong, and what tells the copies
from the clean rows is learned there, cross-fitted, and used on the training rows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .. import core
from ..core.stats import auc
from ..data.corruption import KINDS, corrupted
from ..data.sft import IGNORED, Row
from ..model.run import Batcher, Item, Labelled, answer_of, concatenate
from ..progress import Pass, Plan, aside, size
from ..scores.scores import ForValueScores
from .calibration import USEFUL_AUC, fit_classifier, log_odds, shares
from .label_model import fit_labels
from .measures import CANDIDATES, FOLDS, OVERFLOW, Evidence, Half, Match, Measured, answers_of

logger = logging.getLogger(__name__)

MIN_ROWS = 40
# Answers repeat where so many held-out rows share theirs with another.
REPEATED = 0.5
# The passes by name.
HALVES, VALIDATION, ROWS = ("first half of the validation rows", "second half"), "validation rows", "rows to score"
# Below such a share of training rows with an answer of the validation rows, the two are in different forms.
AGREEING = 0.1


def share_repeated(items: Sequence[Item]) -> float:
    """Share of rows whose labelled tokens are those of another row too."""
    return _share([item.answer for item in items])


def _share(answers: Sequence[bytes]) -> float:
    return sum(count for count in Counter(answers).values() if count > 1) / max(1, len(answers))


def plan_labels(items: Sequence[Item], dataset: Iterable[Any]) -> Plan:
    """The passes to come in `score_labels`."""
    tokens = float(np.mean([item.tokens for item in items]))
    return Plan(
        [Pass(VALIDATION, len(items), tokens), Pass(ROWS, size(dataset), tokens)], then="a label model is fitted"
    )


def plan_auto(items: Sequence[Item], dataset: Iterable[Any]) -> Plan:
    """The passes to come in `score_auto`: after the halves each measures as much as those over the rows do."""
    n, tokens = len(items), float(np.mean([item.tokens for item in items]))
    answers = float(np.mean([item.n_labelled for item in items]))
    passes = [Pass(half, n // 2, tokens) for half in HALVES]
    for name, rows in ((VALIDATION, n), *((kind, n) for kind in KINDS), (ROWS, size(dataset))):
        passes += [Pass(name, rows, tokens), Pass(answers_of(name), rows, answers)]
    what = f"{VALIDATION}, {len(KINDS)} kinds of corrupted copies of them, {ROWS}; of each the answers alone too"
    return Plan(passes, probe=len(HALVES), what=what)


def score_labels(
    batcher: Batcher, head: core.Head, items: list[Item], dataset: Iterable[Mapping[str, Any]]
) -> tuple[ForValueScores, str]:
    """Log odds that the observed answers are right, and the data's hash.

    Under several ranks each reads its share of the rows and fits for itself on the features of all.

    Raises:
        ValueError: answers that do not repeat, or that are all the same; no row on one of the sides.
    """

    def read(batch: Labelled) -> list[tuple[torch.Tensor, bytes, float, int, str | None]]:
        log_p = batch.sum(core.log_likelihood_tokens(head, batch.hidden_TD, batch.labels_T))
        features = torch.cat([batch.first_RD, batch.prompt_RD], 1).float().cpu()
        answers = [answer_of(answer.numpy()) for answer in batch.labels_T.cpu().split(batch.lengths)]
        finite = torch.isfinite(features).all(1).numpy() & np.isfinite(log_p)
        why = [None if ok else f"non-finite score: {OVERFLOW}" for ok in finite]
        for i, item in enumerate(batch.items):
            if item.row is not None and item.row.labels[0] != IGNORED:
                why[i] = "no prompt: method='label_model' judges an answer by its prompt"
        return list(zip(features, answers, log_p.tolist(), batch.lengths, why, strict=True))

    def readable(rows: Iterable[Any], side: str) -> tuple[dict[int, Any], list[str | None], str]:
        found, reasons, rows_hash = batcher.map(rows, read, side)
        for i, (*_, reason) in found.items():
            reasons[i] = reason
        kept = {i: found[i] for i in sorted(found) if reasons[i] is None}
        if not kept:
            raise ValueError(f"{side}: none of {len(reasons)} can be scored ({reasons[0] if reasons else 'no rows'}).")
        return kept, reasons, rows_hash

    known = list(readable(items, VALIDATION)[0].values())
    if (repeated := _share([answer for _, answer, *_ in known])) < REPEATED:
        raise ValueError(
            f"method='label_model' is for answers that repeat, and {repeated:.0%} of the {len(known)} validation rows "
            "share theirs with another: use method='auto'."
        )
    train, reasons, data_hash = readable(dataset, ROWS)
    index, rows = list(train), list(train.values())
    numbers = {answer: k for k, answer in enumerate(sorted({answer for _, answer, *_ in (*known, *rows)}))}
    features = [torch.stack([x for x, *_ in side]) for side in (known, rows)]
    answers = [np.array([numbers[answer] for _, answer, *_ in side]) for side in (known, rows)]
    _warn_of_other_forms([answer for _, answer, *_ in known], [answer for _, answer, *_ in rows])
    batcher.progress.now("fitting the label model")
    fit = fit_labels(features[0], answers[0], features[1], answers[1])
    report = [
        f"evidence    on your {len(known)} validation rows a wrong answer put in on purpose is told from the right "
        f"one with AUC {fit.flipped_auc:.2f} (cross-fitted; {len(numbers)} different answers)",
        f"noise       estimated share of wrong answers {fit.noise_share:.2f}",
    ]
    if fit.flipped_auc < USEFUL_AUC:
        report[0] += ": do not filter by this"
        with aside():
            logger.warning(report[0])
    noise = {
        "share": fit.noise_share,
        "held_out": {"flipped": {"auc": fit.flipped_auc}},
        "likelihood": list(fit.likelihood),
        "answers": len(numbers),
        "report": report,
    }
    _, _, log_likelihood, n_labelled, _ = zip(*rows, strict=True)
    scores = ForValueScores.of_scored(reasons, index, fit.log_odds, log_likelihood, n_labelled, {"noise": noise})
    return scores, data_hash


def _warn_of_other_forms(known: Sequence[bytes], answers: Sequence[bytes]) -> None:
    """Says so where training rows have hardly an answer of the validation rows, token for token."""
    among = set(known)
    agree = sum(answer in among for answer in answers)
    if agree >= AGREEING * len(answers):
        return
    text = (
        "%d of %d training rows have an answer that a validation row has, token for token: the answers of both sides "
        "seem to be tokenised in different forms, and right ones are then taken for wrong ones. Prepare both alike%s."
    )
    ends = [Counter(answer[-8:] for answer in side).most_common(1)[0] for side in (known, answers)]
    one_sided = ends[0][0] != ends[1][0] and any(
        n > 0.9 * len(side) for (_, n), side in zip(ends, (known, answers), strict=True)
    )
    hint = " (on one side nearly all answers end with the same token, as with EOS, and on the other they do not)"
    logger.warning(text, agree, len(answers), hint if one_sided else "")


def score_auto(
    batcher: Batcher,
    head: core.Head,
    items: list[Item],
    dataset: Iterable[Mapping[str, Any]],
    *,
    starts: np.ndarray | None,
    bos: int,
    max_length: int | None,
    ridge: float,
    seed: int = 0,
) -> tuple[ForValueScores, str]:
    """Scores of a data set, and its hash; `metadata["noise"]` holds the evidence and the estimated shares.

    Args:
        items: clean held-out rows.
        starts: which tokens begin a word.
        bos: token that an answer read alone starts with.
        max_length: corrupted copies are cut to so many tokens, as the rows are.
        ridge: of the whitened direction.

    Raises:
        ValueError: too few held-out rows, or rows that a collator makes batches of (nothing can change their answers).
    """
    held_out = [item.row for item in items if item.row is not None]
    if len(held_out) < len(items):
        raise ValueError(
            "method='auto' needs rows of token ids, or answers that repeat: nothing can corrupt answers in "
            "rows that a collator makes batches of."
        )
    if len(held_out) < MIN_ROWS:
        raise ValueError(
            f"method='auto' learns from the held-out rows and has {len(held_out)}: give at least {MIN_ROWS} "
            "(a few hundred are better), or choose a direction."
        )
    rng = np.random.default_rng(seed)
    places = [np.arange(h, len(held_out), 2) for h in (0, 1)]
    halves = []
    for half, name in zip(places, HALVES, strict=True):
        batches = batcher.labelled([items[i] for i in half], name, all_ranks=True)
        halves.append(Half.of(head, concatenate(batches), ridge))
    evidence = Evidence(batcher, head, held_out, halves, bos)
    clean = evidence.project(evidence.measure(held_out, VALIDATION)[0])
    copies = {}
    for kind in KINDS:
        changed: list[Row | None] = [None] * len(held_out)
        for half in places:  # an answer comes from the same half, or the other half would know it
            rows = corrupted([held_out[i] for i in half], kind, rng, starts, max_length)
            for i, row in zip(half, rows, strict=True):
                changed[i] = row
        kept = np.array([i for i, row in enumerate(changed) if row is not None])
        if len(kept) < MIN_ROWS // 2:
            with aside():
                logger.warning("too few held-out rows can be %s: this kind of noise is not looked for", kind)
            continue
        measured, _, _ = evidence.measure([row for row in changed if row is not None], kind)
        copies[kind] = (measured, kept[measured.index])
    train, reasons, data_hash = evidence.measure(dataset, ROWS)
    batcher.progress.now("weighing the evidence")
    return _scores(clean, copies, train, reasons, rng), data_hash


def _scores(
    clean: Measured,
    copies: dict[str, tuple[Measured, np.ndarray]],
    train: Measured,
    reasons: Sequence[str | None],
    rng: np.random.Generator,
) -> ForValueScores:
    """What was measured to scores. `copies` come with the held-out rows that they are copies of."""
    train_fold, fold = rng.integers(FOLDS, size=len(train.index)), clean.index % FOLDS
    match = Match(
        torch.cat([clean.prompt_ND, train.prompt_ND]),
        torch.cat([clean.answer_ND, train.answer_ND]),
        np.concatenate([fold, train_fold]),
    )

    def features(measured: Measured, row: np.ndarray) -> np.ndarray:
        """Of held-out rows and their copies: judged by the half that they are not in."""
        matches = match(measured.prompt_ND, measured.answer_ND, row % FOLDS)
        return measured.features(1 - row % 2, matches)

    parts = {"clean": features(clean, clean.index)}
    parts |= {kind: features(measured, row) for kind, (measured, row) in copies.items()}
    rows = np.concatenate([clean.index, *(row for _, row in copies.values())])
    classes = np.repeat(np.arange(len(parts)), [len(part) for part in parts.values()])
    classifier, out_of_fold = fit_classifier(np.concatenate(list(parts.values())), classes, rows)

    even = np.full(len(parts), 1 / len(parts))
    combined = log_odds(out_of_fold, even)
    found: dict[str, dict[str, Any]] = {}
    for k, kind in enumerate(copies, 1):
        single = {
            name: auc(parts["clean"][:, c], parts[kind][:, c]) for c, name in enumerate(CANDIDATES) if name != "length"
        }
        best = max(single, key=lambda name: single[name])
        found[kind] = {
            "auc": auc(combined[classes == 0], combined[classes == k]),
            "best": best,
            "best_auc": single[best],
            "loss_auc": single["mean log-likelihood"],
        }
    matches = match(train.prompt_ND, train.answer_ND, train_fold)
    log_p = np.mean([classifier.log_p(train.features(half, matches)) for half in (0, 1)], 0)
    useful = [0, *(k for k, kind in enumerate(found, 1) if found[kind]["auc"] >= USEFUL_AUC)]
    share = np.zeros(len(parts))
    share[useful] = shares(log_p[:, useful], len(clean.index))

    report = _report(found, share, len(clean.index))
    noise = {
        "share": float(1 - share[0]),
        "shares": dict(zip(found, share[1:].tolist(), strict=True)),
        "held_out": found,
        "report": report,
    }
    for line in report:
        if "do not filter" in line:
            with aside():
                logger.warning(line)
    return ForValueScores.of_scored(
        list(reasons), train.index, log_odds(log_p, share), train.log_likelihood, train.n_labelled, {"noise": noise}
    )


def _report(found: dict[str, dict[str, Any]], share: np.ndarray, n_rows: int) -> list[str]:
    """Lines for the summary."""
    lines = [f"evidence    on your {n_rows} held-out rows against copies corrupted on purpose (AUC, cross-fitted):"]
    for kind, facts in found.items():
        lines.append(
            f"            {kind:15s} {facts['auc']:.2f}  (best single score: {facts['best']} {facts['best_auc']:.2f}; "
            f"mean log-likelihood {facts['loss_auc']:.2f})"
        )
    hidden = [kind for kind, facts in found.items() if facts["auc"] < USEFUL_AUC]
    if hidden:
        lines.append(
            f"            on your held-out rows no score finds {' or '.join(hidden)}: do not filter by this against it"
        )
    kinds = ", ".join(f"{kind} {s:.2f}" for kind, s in zip(found, share[1:], strict=True) if s > 0)
    lines.append(f"noise       estimated share of noisy rows {1 - share[0]:.2f}" + (f" ({kinds})" if kinds else ""))
    return lines
