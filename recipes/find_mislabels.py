"""Which score finds noise? Injects it, scores with every method and rival, averages over seeds.

    python recipes/find_mislabels.py --seeds 5
    python recipes/find_mislabels.py --model PATH --data train.csv --text_column text --label_column category
    python recipes/find_mislabels.py --model PATH --data rows.json --noises swapped deleted inserted \
        --prompt_template '{instruction}\\n{input}\\n' --completion_template '{output}'
    python recipes/find_mislabels.py --model PATH --data rows.jsonl --truth is_bad --output_dir out/a
    python recipes/find_mislabels.py --model PATH --data rows.jsonl --truth is_bad --output_dir out/a --methods auto
    python recipes/find_mislabels.py --tables out/a out/b

Label noise (a text as the prompt, its label as the completion): `symmetric`, any other label; `confusable`, the label
that a probe on the validation rows takes it for most often. Free-form noise: `swapped` answers, words `deleted` or
`inserted`. Reported is the AUC of clean against noisy rows, for label noise within one observed label (rows of that
label with both kinds, weighted by their number); 0.5 is chance. Mean and standard deviation over seeds: which rows are
drawn, which are noisy, which validate. Where a method estimates the share of noise, that is reported beside the
truth. The noise is put in as text here; what `auto` learns from is made by the package, of tokens, in ways of its own.

`--truth`: no noise is put in; the rows hold errors that people or rules have judged, and one seed (`--first_seed`)
draws right rows to validate with. Every score is kept in the output folder: a second run makes only the methods again
that it names. `--tables` prints those of several folders side by side (`real_errors.py`).
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from data import DataConfig, change_words, load_rows, swap_answers
from datasets import Dataset, load_dataset
from matplotlib.figure import Figure
from real_errors import RESULTS, TruthConfig, bag_of_words, find_errors, tables
from scipy import sparse
from sklearn.base import clone
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import confusion_matrix, roc_auc_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from forvalue_callbacks import TINY_MODEL, ForValueConfig, ForValueScorer, baselines
from forvalue_callbacks.methods.label_model import LAST, LabelModel
from forvalue_callbacks.model.backbone import left_as_found
from forvalue_callbacks.tiny import instructions

LABEL_NOISES, FREE_NOISES = ("symmetric", "confusable"), ("swapped", "deleted", "inserted")
METHODS = ForValueConfig.__dataclass_fields__["method"].metadata["choices"]
NORMALIZED = [("gradient", "length"), ("gradient", "cosine"), ("whitened", "length"), ("whitened", "cosine")]
NORMALIZED += [("fitted_likelihood", "length")]


@dataclass
class MislabelConfig:
    model: str = field(default=str(TINY_MODEL), metadata={"help": "Path or hub id of the model."})
    data: str | None = field(default=None, metadata={"help": "A csv, json or jsonl file; None: generated rows."})
    text_column: str = field(default="text", metadata={"help": "Column of the text, for label noise."})
    label_column: str = field(default="label", metadata={"help": "Column of the label, for label noise."})
    classes: int = field(default=12, metadata={"help": "So many of the file's labels, drawn anew per seed."})
    prompt: str = field(default="{}\nintent:", metadata={"help": "Prompt around the text of a label row."})
    prompt_template: str = field(default="{prompt}", metadata={"help": "Prompt of a free-form row, over the columns."})
    completion_template: str = field(default="{completion}", metadata={"help": "Its answer, over the columns."})
    noises: list[str] = field(
        default_factory=lambda: ["symmetric"],
        metadata={"help": f"Some of {', '.join(LABEL_NOISES)}; or of {', '.join(FREE_NOISES)}."},
    )
    shares: list[float] = field(default_factory=lambda: [0.3], metadata={"help": "Shares of noisy rows."})
    train_rows: int = field(default=1000, metadata={"help": "Rows that are scored."})
    validation_rows: int = field(default=300, metadata={"help": "Clean rows they are scored by."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "Methods to score with; all by default."}
    )
    rivals: bool = field(default=True, metadata={"help": "The rivals too, and the other settings of `normalize`."})
    seeds: int = field(default=5, metadata={"help": "So many seeds."})
    first_seed: int = field(default=0, metadata={"help": "The first of them."})
    output_dir: str = field(default="outputs/find_mislabels", metadata={"help": "Where table and picture go."})

    def __post_init__(self) -> None:
        for known in (LABEL_NOISES, FREE_NOISES):
            if set(self.noises) <= set(known):
                return
        raise ValueError(f"noises={self.noises}: choose of {LABEL_NOISES}, or of {FREE_NOISES}.")

    @property
    def of_labels(self) -> bool:
        return self.noises[0] in LABEL_NOISES


class Result(NamedTuple):
    noise: str
    share: float
    seed: int
    score: str
    auc: float
    estimated_share: float | None = None


def draw(config: MislabelConfig, seed: int) -> tuple[Dataset, Dataset]:
    """Clean training and validation rows: prompt, completion, task (labels are noisy within a task)."""
    n, m = config.train_rows, config.validation_rows
    if config.data is None and config.of_labels:
        sides = instructions(n, seed=seed), instructions(m, seed=seed + 10_001)
        return tuple(side.select_columns(["prompt", "completion", "task"]) for side in sides)  # type: ignore
    if config.data is None:
        raise ValueError("the generated rows have labels as answers: give --data for free-form noise.")
    if not config.of_labels:
        templates = {"prompt_template": config.prompt_template, "completion_template": config.completion_template}
        drawn = {"draw_validation": True, "validation_rows": m, "max_train_rows": n, "data_seed_rows": seed}
        rows = load_rows(DataConfig(data=config.data, **drawn, **templates))  # type: ignore
        return rows.train.select_columns(["prompt", "completion"]), rows.validation.select_columns(
            ["prompt", "completion"]
        )
    kind = Path(config.data).suffix[1:].replace("jsonl", "json")
    rows = load_dataset(kind, data_files=config.data, split="train").shuffle(seed=seed)
    known = sorted(set(rows[config.label_column]))
    classes = set(np.random.default_rng(seed).choice(known, min(config.classes, len(known)), replace=False).tolist())
    chosen = Dataset.from_list(
        [
            {
                "prompt": config.prompt.format(row[config.text_column]),
                "completion": " " + str(row[config.label_column]).replace("_", " "),
                "task": "",
            }
            for row in rows
            if row[config.label_column] in classes
        ]
    )
    return chosen.select(range(m, min(len(chosen), m + n))), chosen.select(range(m))


def corrupted(clean: Dataset, noise: str, share: float, seed: int, confused: dict[str, str]) -> Dataset:
    """The rows with a share of them noisy, and `is_noisy`; `confused` names the other label of each label."""
    if noise == "swapped":
        return swap_answers(clean, share, seed)
    if noise in ("deleted", "inserted"):
        return change_words(clean, share, seed, insert=noise == "inserted")
    rng = np.random.default_rng(seed)
    rows = clean.to_list()
    own = {
        task: sorted({row["completion"] for row in rows if row["task"] == task}) for task in {r["task"] for r in rows}
    }
    noisy = set(rng.permutation(len(rows))[: round(share * len(rows))].tolist())
    for i, row in enumerate(rows):
        labels, label = own[row["task"]], row["completion"]
        other = labels[(labels.index(label) + int(rng.integers(1, len(labels)))) % len(labels)]
        if noise == "confusable":
            other = confused.get(label, other)
        row["is_noisy"] = i in noisy
        row["completion"] = other if i in noisy else label
    return Dataset.from_list(rows)


def auc(scores: np.ndarray, rows: Dataset, within: bool) -> float:
    """AUC of clean against noisy rows, within the observed answer where asked; NaN without noisy rows."""
    noisy, labels = np.array(rows["is_noisy"]), np.array(rows["completion"])
    scores = np.nan_to_num(scores, nan=np.nanmin(scores))
    groups = [labels == label for label in np.unique(labels)] if within else [np.ones(len(noisy), dtype=bool)]
    groups = [group for group in groups if 0 < noisy[group].sum() < group.sum()]
    if not groups:
        return float("nan")
    return float(np.average([roc_auc_score(~noisy[g], scores[g]) for g in groups], weights=[g.sum() for g in groups]))


def states(scorer: ForValueScorer, rows: Dataset) -> np.ndarray:
    """[state that predicts the answer's first token | mean state of the prompt], (rows, 2 d): what the probes see."""
    method = LabelModel()
    with left_as_found(scorer.backbone.model):
        score = partial(method.score, {"tokenizer": None}, scorer.backbone.head())
        windows = list(scorer.run.windows(rows, method, score, "states"))
    return np.concatenate([window.columns[LAST] for window in windows])


def probe() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 0, 5), cv=3, max_iter=200))


def own_probability(classes: np.ndarray, probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log p(observed label); a label that the probe has never seen gets the lowest."""
    place = {label: k for k, label in enumerate(classes)}
    chosen = [p[place[label]] if label in place else 0.0 for p, label in zip(probabilities, labels, strict=True)]
    return np.log(np.array(chosen) + 1e-12)


def confusions(x: np.ndarray, labels: np.ndarray, tasks: np.ndarray) -> dict[str, str]:
    """For each label, the other of its task that a cross-validated probe on clean rows takes it for most often."""
    out = {}
    for task in np.unique(tasks):
        here = tasks == task
        names = np.unique(labels[here])
        predicted = cross_val_predict(probe(), x[here], labels[here], cv=3)
        counts = confusion_matrix(labels[here], predicted, labels=names).astype(float)
        np.fill_diagonal(counts, -1)
        out |= {str(name): str(names[row.argmax()]) for name, row in zip(names, counts, strict=True)}
    return out


def trusting_with(
    make: Callable[[], Any], x: Any, observed: np.ndarray, x_known: Any, known: np.ndarray
) -> np.ndarray:
    """log p(observed label) by a classifier of the rows of the other folds as they are and the validation rows."""
    out, both = np.zeros(len(observed)), sparse.vstack if sparse.issparse(x) else np.concatenate
    for others, fold in KFold(3, shuffle=True, random_state=0).split(observed):
        model = make().fit(both([x[others], x_known]), np.concatenate([observed[others], known]))
        out[fold] = own_probability(model.classes_, model.predict_proba(x[fold]), observed[fold])
    return out


def word_rivals(train: Dataset, validation: Dataset) -> Iterator[tuple[str, np.ndarray]]:
    """The same of a bag of words, without a model: name, score."""
    observed, known = (np.array(side["completion"]) for side in (train, validation))
    words, classifier = bag_of_words()[:1], partial(clone, bag_of_words()[-1])
    x_known = words.fit([*train["prompt"], *validation["prompt"]]).transform(validation["prompt"])
    x = words.transform(train["prompt"])
    clean = classifier().fit(x_known, known)
    yield "bag of words on validation rows", own_probability(clean.classes_, clean.predict_proba(x), observed)
    yield (
        "bag of words, confident learning with validation rows",
        trusting_with(classifier, x, observed, x_known, known),
    )


def label_rivals(x: np.ndarray, train: Dataset, true: np.ndarray, x_known: np.ndarray, known: np.ndarray):
    """Scores of classifiers on hidden states: name, score."""
    observed, first = np.array(train["completion"]), x.shape[1] // 2
    for name, a, b in (("first state", x[:, :first], x_known[:, :first]), ("first state + prompt mean", x, x_known)):
        clean = probe().fit(b, known)
        yield f"probe on validation rows, {name}", own_probability(clean.classes_, clean.predict_proba(a), observed)
        trusting = cross_val_predict(probe(), a, observed, cv=3, method="predict_proba")
        yield f"confident learning, {name}", own_probability(np.unique(observed), trusting, observed)
        yield f"confident learning with validation rows, {name}", trusting_with(probe, a, observed, b, known)
        ceiling = cross_val_predict(probe(), a, true, cv=3, method="predict_proba")
        yield f"ceiling: probe on true labels, {name}", own_probability(np.unique(true), ceiling, observed)
    distance = x[:, :first] @ x_known[:, :first].T / np.linalg.norm(x_known[:, :first], axis=1)
    nearest = np.argsort(-distance, 1)[:, :10]
    yield "agreement of 10 nearest validation rows", (known[nearest] == observed[:, None]).mean(1)


def scored(config: MislabelConfig, model, tokenizer, seed: int) -> Iterator[Result]:
    """AUC of every score at one seed, for all noises and shares."""
    clean, validation = draw(config, seed)
    rows = validation.select_columns(["prompt", "completion"])
    common = {"processing_class": tokenizer, "progress": False}
    plain = ForValueScorer(model, rows, **common)
    prepare = plain.run.reader.prepare
    clean, validation = (
        side.select([i for i, row in enumerate(side) if prepare(row).reason is None]) for side in (clean, validation)
    )
    confused: dict[str, str] = {}
    if config.of_labels:
        known = np.array(validation["completion"])
        x, x_known = states(plain, clean), states(plain, validation)
    if "confusable" in config.noises:
        confused = confusions(x_known, known, np.array(validation["task"]))
    scorers = {
        (method, normalize): ForValueScorer(model, rows, ForValueConfig(method, normalize), **common)
        for method, normalize in [*((d, "none") for d in config.methods), *(NORMALIZED if config.rivals else [])]
    }
    for noise in config.noises:
        for share in config.shares:
            train = corrupted(clean, noise, share, seed, confused)
            given = train.select_columns(["prompt", "completion"])

            def result(name: str, values: np.ndarray, estimate=None, train=train, noise=noise, share=share) -> Result:
                return Result(noise, share, seed, name, auc(values, train, config.of_labels), estimate)

            for (method, normalize), scorer in scorers.items():
                try:
                    scores = scorer.score(given)
                except ValueError as error:  # a method that is not for such data
                    print(f"{method} refuses: {error}")
                    yield Result(noise, share, seed, method, float("nan"))
                    continue
                name = method if normalize == "none" else f"{method}, {normalize}"
                yield result(name, scores.values, scores.metadata.get("noise", {}).get("share"))
                if (method, normalize) == ("gradient", "none"):
                    yield result("mean log-likelihood", scores.log_likelihood / scores.n_labelled)
            if not config.rivals:
                continue
            tokens, known_tokens = (
                [{"input_ids": r.input_ids.tolist(), "labels": r.labels.tolist()} for r in map(prepare, side)]
                for side in (given, rows)
            )
            yield result("mutual information", baselines.pmi(model, tokens).numpy())
            yield result("RDS+, mean cosine", baselines.rds_plus(model, tokens, known_tokens).mean(1).numpy())
            if config.of_labels:
                of_states = label_rivals(x, train, np.array(clean["completion"]), x_known, known)
                for name, values in chain(of_states, word_rivals(train, validation)):
                    yield result(name, values)
            else:
                yield result("IFD", -baselines.pmi(model, tokens).exp().numpy())
                texts = [[r["prompt"] + r["completion"] for r in side] for side in (given, rows)]
                yield result("TF-IDF, mean cosine", baselines.tfidf(*texts).mean(1).numpy())


def table(results: list[Result]) -> list[str]:
    """A Markdown table per noise: a line per score, a column per share, the estimated shares below."""
    lines: list[str] = []
    for noise in dict.fromkeys(r.noise for r in results):
        shares = sorted({r.share for r in results if r.noise == noise and r.share > 0})
        here: dict[str, dict[float, list[Result]]] = {}
        for r in results:
            if r.noise == noise:
                here.setdefault(r.score, {}).setdefault(r.share, []).append(r)
        lines += ["", f"| {noise} | " + " | ".join(f"{share:.0%}" for share in shares) + " |"]
        lines.append("|---|" + "---|" * len(shares))
        for score, by_share in here.items():
            aucs = [[r.auc for r in by_share.get(share, [])] for share in shares]
            cells = [f"{np.mean(v):.3f} ± {np.std(v):.3f}" if np.isfinite(v).any() else "-" for v in aucs]
            lines.append(f"| {score} | " + " | ".join(cells) + " |")
        for score, by_share in here.items():
            for share, group in by_share.items():
                estimates = [r.estimated_share for r in group if r.estimated_share is not None]
                if estimates:
                    lines.append(
                        f"\n{score}, {noise}, {share:.0%} noisy: estimated {np.mean(estimates):.3f} ± "
                        f"{np.std(estimates):.3f}"
                    )
    return lines


def picture(results: list[Result], path: Path) -> None:
    noises = list(dict.fromkeys((r.noise, r.share) for r in results if r.share > 0))
    figure = Figure(figsize=(6.5 * len(noises), 6), layout="constrained")
    for axes, (noise, share) in zip(figure.subplots(1, len(noises), squeeze=False)[0], noises, strict=True):
        found: dict[str, list[float]] = {}
        for r in results:
            if (r.noise, r.share) == (noise, share):
                found.setdefault(r.score, []).append(r.auc)
        colors = ["tab:orange" if name.split(",")[0] in METHODS else "tab:blue" for name in found]
        axes.barh(
            list(found), [np.mean(v) for v in found.values()], xerr=[np.std(v) for v in found.values()], color=colors
        )
        axes.axvline(0.5, color="black", linewidth=1)
        axes.set(
            xlim=(0.3, 1.0), xlabel="AUC of clean against noisy rows (line: chance)", title=f"{noise}, {share:.0%}"
        )
        axes.invert_yaxis()
    figure.savefig(path, dpi=90)


def main(config: MislabelConfig, truth: TruthConfig) -> None:
    warnings.simplefilter("ignore")  # scikit-learn's, on defaults that will change
    if truth.tables:
        print("\n".join(tables([json.loads((Path(folder) / RESULTS).read_text()) for folder in truth.tables])))
        return
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    if truth.truth is not None:
        print("\n".join(find_errors(config, truth, model, tokenizer)))
        return
    results: list[Result] = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        for result in scored(config, model, tokenizer, seed):
            results.append(result)
            print(f"{result.noise} {result.share:.0%} seed {seed}: {result.score} {result.auc:.3f}", flush=True)
        with open(out / "results.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Result._fields)
            writer.writerows(results)
        (out / "table.md").write_text("\n".join(table(results)) + "\n")
        picture(results, out / "auc.png")
    print("\n".join(table(results)) + f"\n\nPicture: {out / 'auc.png'}")


if __name__ == "__main__":
    main(*HfArgumentParser((MislabelConfig, TruthConfig)).parse_args_into_dataclasses())
