"""Rows with errors that people or rules have judged: every score beside its rivals, and claims beside the truth.

What `find_mislabels.py --truth COLUMN` does. The truth draws the validation rows (rows judged right, one of each
prompt, whose other rows are not scored then) and is compared with the scores. No score sees it but what is called a
ceiling.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from data import as_dataset
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from forvalue_callbacks import TINY_MODEL, Drop, ForValueConfig, ForValueScorer, baselines
from forvalue_callbacks.data.files import DataError
from forvalue_callbacks.data.sources import read

RESULTS = "real_errors.json"
DRAWS = 2000  # of the bootstrap


@dataclass
class TruthConfig:
    truth: str | None = field(
        default=None,
        metadata={"help": "Column of --data that says which rows are wrong (true or 1): no noise is put in then."},
    )
    max_characters: int | None = field(
        default=None, metadata={"help": "With --truth: longer rows (prompt and completion) are left out. None: none."}
    )
    tables: list[str] = field(
        default_factory=list,
        metadata={"help": "Output folders of --truth on one file: prints their tables side by side, scores nothing."},
    )


@dataclass
class Judged:
    """Validation rows, all right, and N rows to score (prompt, completion).

    Args:
        bad: (N,) bool, which are wrong.
        prompts: (N,) int, the same number for rows of the same prompt.
        places: (N,) int, of the rows in the file.
    """

    validation: Dataset
    train: Dataset
    bad: np.ndarray
    prompts: np.ndarray
    places: np.ndarray


def judged_rows(
    data: str,
    truth: str,
    templates: tuple[str, str],
    n_train: int,
    n_validation: int,
    seed: int,
    max_characters: int | None = None,
) -> Judged:
    """Draws them: no row twice, and no prompt on both sides.

    Prompts are gone through in random order: each gives one of its right rows, if it has one, to the validation rows,
    until there are enough, and its other rows to nothing. What is scored is drawn of the rows of the other prompts.

    Raises:
        DataError: no such column, a truth that is neither true, false, 1 nor 0, too few right rows.
    """
    rows = as_dataset(read(data))
    if truth not in rows.column_names:
        raise DataError(f"--truth names the column {truth!r}, and {data} has {', '.join(rows.column_names)}.")
    texts, by_prompt, bad = {}, {}, {}  # in order
    for i, row in enumerate(rows):
        if row[truth] not in (True, False):  # 1 and 0 as well
            raise DataError(f"{data}, row {i} (from 0): {truth!r} is {type(row[truth]).__name__}, not true or false.")
        text = tuple(template.replace("\\n", "\n").format(**row) for template in templates)
        if text in texts or (max_characters is not None and len("".join(text)) > max_characters):
            continue
        texts[text] = i
        bad[i] = bool(row[truth])
        by_prompt.setdefault(text[0], []).append(i)
    text_of = {i: text for text, i in texts.items()}
    rng = np.random.default_rng(seed)
    prompts = [list(by_prompt)[k] for k in rng.permutation(len(by_prompt))]
    validation: list[int] = []
    while prompts and len(validation) < n_validation:
        right = [i for i in by_prompt[prompts.pop()] if not bad[i]]
        if right:
            validation.append(int(rng.choice(right)))
    left = np.array([i for prompt in prompts for i in by_prompt[prompt]], dtype=int)
    if len(validation) < n_validation or len(left) == 0:
        raise DataError(
            f"{data} has {len(validation)} prompts with a right row, and {len(left)} rows beside them: lower "
            "--validation_rows, or raise --max_characters."
        )
    scored = np.sort(rng.permutation(left)[:n_train])
    number = {prompt: k for k, prompt in enumerate(by_prompt)}

    def side(places) -> Dataset:
        return Dataset.from_list([dict(zip(("prompt", "completion"), text_of[int(i)], strict=True)) for i in places])

    return Judged(
        side(validation),
        side(scored),
        np.array([bad[int(i)] for i in scored]),
        np.array([number[text_of[int(i)][0]] for i in scored]),
        scored,
    )


def bag_of_words() -> Any:
    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True),
        LogisticRegression(C=10, class_weight="balanced", max_iter=1000),
    )


def probability(model: Any, x: Any, is_right: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Of the class 1, out of fold, (N,). Folds keep a prompt's rows together: none is known by its siblings."""
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    return cross_val_predict(model, x, is_right, groups=prompts, cv=folds, method="predict_proba")[:, 1]


def word_scores(judged: Judged) -> np.ndarray:
    """How much a row is of the validation rows' kind, by a bag of words: logistic regression, against scored rows."""
    sides = judged.train, judged.validation
    texts = [row["prompt"] + row["completion"] for side in sides for row in side]
    is_validation = np.repeat([0, 1], [len(side) for side in sides])
    own = -1 - np.arange(len(judged.validation))  # each has a prompt of its own
    prompts = np.concatenate([judged.prompts, own])
    return probability(bag_of_words(), texts, is_validation, prompts)[: len(judged.bad)]


def said(row: dict[str, str]) -> float:
    """Share of the prompt's different words that the answer has."""
    prompt, answer = (set(re.findall(r"\w+", row[side].lower())) for side in ("prompt", "completion"))
    return len(prompt & answer) / max(1, len(prompt))


def rivals(model: Any, prepare: Callable, judged: Judged, seed: int) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Name and how to get the scores, (N,) each, higher is better. Those named ceilings are fitted on the truth."""
    tokens, known = (
        [{"input_ids": r.input_ids.tolist(), "labels": r.labels.tolist()} for r in map(prepare, side)]
        for side in (judged.train, judged.validation)
    )
    texts, known_texts = ([r["prompt"] + r["completion"] for r in s] for s in (judged.train, judged.validation))
    n = len(tokens)

    def ceiling(classifier: Any, x: Any) -> np.ndarray:
        return probability(classifier, x, ~judged.bad, judged.prompts)

    def state_probe() -> np.ndarray:
        cosines_NM = baselines.emb(model, tokens, known, cosine=True).numpy()
        return ceiling(make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)), cosines_NM)

    yield "random", lambda: baselines.random_scores(n, 1, seed=seed)[:, 0].numpy()
    yield "length (shorter first)", lambda: -np.array([sum(x >= 0 for x in row["labels"]) for row in tokens])
    yield "share of the prompt's words in the answer", lambda: np.array([said(row) for row in judged.train])
    yield "TF-IDF, mean cosine", lambda: baselines.tfidf(texts, known_texts).mean(1).numpy()
    yield "bag of words, validation against scored rows", lambda: word_scores(judged)
    yield "mean log-likelihood", lambda: baselines.loss(model, tokens).numpy()
    yield "mutual information", lambda: baselines.pmi(model, tokens).numpy()
    yield "IFD", lambda: baselines.ifd(model, tokens).numpy()
    yield "RDS+, mean cosine", lambda: baselines.rds_plus(model, tokens, known).mean(1).numpy()
    yield "ceiling: bag of words on the truth", lambda: ceiling(bag_of_words(), texts)
    yield "ceiling: probe on the truth, cosines of answers' states with those of validation rows", state_probe


def find_errors(config: Any, truth: TruthConfig, model: Any, tokenizer: Any) -> list[str]:
    """Scores the rows with the methods asked for, and with the rivals that the output folder does not hold already.

    Args:
        config: that of `find_mislabels.py`.

    Returns:
        The tables, as lines.

    Raises:
        DataError: no --data, rows that cannot be scored, other rows in the output folder.
    """
    if config.data is None or truth.truth is None:
        raise DataError("--truth names a column of a file: give it as --data FILE.")
    templates = config.prompt_template, config.completion_template
    sizes = config.train_rows, config.validation_rows
    judged = judged_rows(config.data, truth.truth, templates, *sizes, config.first_seed, truth.max_characters)
    common = {"processing_class": tokenizer, "progress": False}
    prepare = ForValueScorer(model, judged.validation, **common).run.reader.prepare
    prepared = [prepare(row) for side in (judged.train, judged.validation) for row in side]
    if reasons := {row.reason for row in prepared if row.reason is not None}:
        raise DataError(f"{config.data} has rows that cannot be scored, lower --max_characters: {min(reasons)}")
    kept = Kept.opened(Path(config.output_dir) / RESULTS, _settings(config, truth), judged)
    if config.rivals:
        for name, score in rivals(model, prepare, judged, config.first_seed):
            if name not in kept.facts["scores"]:
                kept.add(name, score())
    for method in config.methods:
        try:
            scores = ForValueScorer(model, judged.validation, ForValueConfig(method), **common).score(judged.train)
        except ValueError as error:  # a method that is not for such data
            print(f"{method} refuses: {error}")
            continue
        kept.add(method, scores.values, scores.metadata.get("noise"))
    return tables([kept.facts])


def _settings(config: Any, truth: TruthConfig) -> dict[str, Any]:
    """What determines the rows and the model, JSON-able."""
    return {
        "model": "tiny" if config.model == str(TINY_MODEL) else Path(config.model).name,
        "data": Path(config.data).name,
        "sha256": hashlib.sha256(Path(config.data).read_bytes()).hexdigest()[:16],
        "truth": truth.truth,
        "templates": [config.prompt_template, config.completion_template],
        "max_characters": truth.max_characters,
        "seed": config.first_seed,
        "validation_rows": config.validation_rows,
    }


@dataclass
class Kept:
    """All that is known of one draw of rows, in a file: settings, truth, and the scores by name."""

    path: Path
    facts: dict[str, Any]

    @classmethod
    def opened(cls, path: Path, settings: dict[str, Any], judged: Judged) -> Kept:
        """That of the file, or a new one.

        Raises:
            DataError: it is of other rows or of another model.
        """
        rows = {name: getattr(judged, name).tolist() for name in ("bad", "prompts", "places")}
        new = {"settings": settings, **rows}
        if not path.is_file():
            return cls(path, new | {"scores": {}})
        facts = json.loads(path.read_text())
        if {name: facts[name] for name in new} != new:
            raise DataError(f"{path} holds scores of other rows or of another model: choose another --output_dir.")
        return cls(path, facts)

    def add(self, name: str, values: np.ndarray, noise: dict[str, Any] | None = None) -> None:
        """Keeps N scores under this name, in place of those before, with what the method claims of the noise."""
        made = {"date": date.today().isoformat(), "commit": commit()}
        made |= {package: version(package) for package in ("torch", "transformers")}
        self.facts["scores"][name] = {"values": np.asarray(values, dtype=float).tolist(), "noise": noise, "made": made}
        self.path.write_text(json.dumps(self.facts))
        print(f"{name}: {auc_of(values, self.facts['bad'], self.facts['prompts'])}", flush=True)


def commit() -> str:
    """Of the clone that the recipe lies in; "unknown" where there is none."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


@dataclass
class Interval:
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def auc_of(values: Any, bad: Any, prompts: Any) -> Interval:
    """AUC of right against wrong rows with its 95 % interval, by a bootstrap over prompts; 0.5 is chance.

    Args:
        values: (N,), higher is better; NaN counts as the lowest.
        bad: (N,) bool.
        prompts: (N,) int: rows of the same prompt are drawn together.
    """
    values, bad = np.asarray(values, dtype=float), np.asarray(bad)
    values = np.nan_to_num(values, nan=np.nanmin(values))
    right, wrong = values[~bad], values[bad]
    above_RW = (right[:, None] > wrong) + 0.5 * (right[:, None] == wrong)
    known, prompt = np.unique(prompts, return_inverse=True)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(DRAWS):
        times = np.bincount(rng.integers(len(known), size=len(known)), minlength=len(known))[prompt]
        weights_R, weights_W = times[~bad], times[bad]
        if weights_R.sum() and weights_W.sum():
            drawn.append(weights_R @ above_RW @ weights_W / weights_R.sum() / weights_W.sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(above_RW.mean()), float(low), float(high))


def tables(found: list[dict[str, Any]]) -> list[str]:
    """Markdown: what was scored, AUCs with a column per result, and what methods claim beside the truth."""
    lines = []
    for result in found:
        known, bad = result["settings"], result["bad"]
        limit = known["max_characters"]
        lines.append(
            f"- {known['model']}: {len(bad)} rows of {known['data']} ({sum(bad)} wrong, {sum(bad) / len(bad):.1%}), "
            f"{known['validation_rows']} validation rows, seed {known['seed']}, "
            f"{'all lengths' if limit is None else f'at most {limit} characters'}; {_made(result)}"
        )
    lines += ["", "| AUC (95 %) | " + " | ".join(map(_name, found)) + " |"]
    lines.append("|---|" + "---|" * len(found))
    for name in dict.fromkeys(name for result in found for name in result["scores"]):
        cells = [
            str(auc_of(result["scores"][name]["values"], result["bad"], result["prompts"]))
            if name in result["scores"]
            else "-"
            for result in found
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| claims of a method | AUC claimed | AUC true | share claimed | share true | dropped | precision |"
        " recall | right rows dropped |",
        "|---|" + "---|" * 8,
    ]
    for result in found:
        for name, facts in result["scores"].items():
            if facts["noise"] is not None:
                lines.append(
                    f"| {_name(result)}, {name} at {facts['made']['commit']} | "
                    + " | ".join(claims(result, facts))
                    + " |"
                )
    return lines


def _name(result: dict[str, Any]) -> str:
    return f"{result['settings']['model']}, {len(result['bad']):,} rows"


def _made(result: dict[str, Any]) -> str:
    """When and with what the scores were made, each value once."""
    values: dict[str, dict[str, None]] = {}
    for facts in result["scores"].values():
        for what, value in facts["made"].items():
            values.setdefault(what, {})[value] = None
    return ", ".join(f"{what} {' and '.join(found)}" for what, found in values.items())


def claims(result: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """What a method said (AUCs by kind of noise, share) beside the truth, and what `Drop("auto")` does by it."""
    values, bad, noise = np.asarray(facts["values"], dtype=float), np.array(result["bad"]), facts["noise"]
    dropped = (Drop("auto")(values) == 0) & np.isfinite(values)
    error = noise.get("share_error")
    share = f"{noise['share']:.2f}"
    if error is not None:
        share += f" ({max(0, noise['share'] - 1.96 * error):.2f} to {min(1, noise['share'] + 1.96 * error):.2f})"
    right = (dropped & bad).sum()
    return [
        _claimed(noise["evidence"]),
        str(auc_of(values, bad, result["prompts"])),
        share,
        f"{bad.mean():.2f}",
        str(dropped.sum()),
        f"{right / dropped.sum():.2f}" if dropped.any() else "-",
        f"{right / bad.sum():.2f}",
        f"{(dropped & ~bad).sum() / (~bad).sum():.2f}",
    ]


def _claimed(evidence: dict[str, dict[str, Any]]) -> str:
    """The AUCs of the kinds of noise, from the worst to the best."""
    found = []
    for kind, known in sorted(evidence.items(), key=lambda item: item[1]["auc"]):
        interval = known.get("interval")
        found.append(
            f"{kind} " + (f"{known['auc']:.2f}" if interval is None else str(Interval(known["auc"], *interval)))
        )
    return found[0] if len(found) == 1 else f"{len(found)} kinds: {' to '.join(found[:1] + found[-1:]) or '-'}"
