"""Which score finds wrong labels? Injects label noise, scores with every direction and rival, averages over seeds.

    python recipes/find_mislabels.py --seeds 5
    python recipes/find_mislabels.py --model PATH --data train.csv --text_column text --label_column category

Rows are a text as the prompt and its label as the completion. Reported is the AUC of clean against noisy rows within
one observed label (rows of that label with both kinds, weighted by their number; 0.5 is chance), mean and standard
deviation over seeds: which rows are drawn, which are noisy, which validate.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from forvalue_callbacks import TINY_MODEL, ForValueConfig, ForValueScorer
from forvalue_callbacks.head import Backbone, left_as_found
from forvalue_callbacks.tiny import instructions


@dataclass
class MislabelConfig:
    model: str = field(default=str(TINY_MODEL), metadata={"help": "Path or hub id of the model."})
    data: str | None = field(default=None, metadata={"help": "A csv or json file; None: generated rows."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    classes: int = field(default=12, metadata={"help": "The most frequent classes of the file, drawn anew per seed."})
    prompt: str = field(default="{}\nintent:", metadata={"help": "Prompt around the text of a file."})
    train_rows: int = field(default=1000, metadata={"help": "Rows that are scored."})
    validation_rows: int = field(default=300, metadata={"help": "Clean rows they are scored by."})
    noise: float = field(default=0.3, metadata={"help": "Share of the training labels that are wrong."})
    asymmetric: bool = field(default=False, metadata={"help": "A wrong label is always the next class, not any."})
    seeds: int = field(default=5, metadata={"help": "Seeds 0, 1, ..."})
    output_dir: str = field(default="outputs/find_mislabels", metadata={"help": "Where table and picture go."})


def draw(config: MislabelConfig, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training rows (prompt, completion, true: the true completion) and clean validation rows."""
    if config.data is None:
        both = [
            [{"prompt": r["prompt"], "true": r["completion"], "task": r["task"]} for r in instructions(n, seed=s)]
            for n, s in ((config.train_rows, seed), (config.validation_rows, seed + 10_001))
        ]
    else:
        rows = load_dataset(Path(config.data).suffix[1:], data_files=config.data, split="train").shuffle(seed=seed)
        rng = np.random.default_rng(seed)
        classes = set(rng.choice(sorted(set(rows[config.label_column])), config.classes, replace=False).tolist())
        chosen = [
            {
                "prompt": config.prompt.format(row[config.text_column]),
                "true": " " + str(row[config.label_column]).replace("_", " "),
                "task": "",
            }
            for row in rows
            if row[config.label_column] in classes
        ]
        both = [chosen[config.validation_rows :][: config.train_rows], chosen[: config.validation_rows]]
    return corrupt(both[0], config, seed), [{**row, "completion": row["true"]} for row in both[1]]


def corrupt(rows: list[dict[str, str]], config: MislabelConfig, seed: int) -> list[dict[str, str]]:
    """A share of the rows gets another label of the same task: any with equal chance, or always the next one."""
    rng = np.random.default_rng(seed)
    labels = {task: sorted({row["true"] for row in rows if row["task"] == task}) for task in {r["task"] for r in rows}}
    noisy = set(rng.permutation(len(rows))[: round(config.noise * len(rows))].tolist())
    out = []
    for i, row in enumerate(rows):
        own = labels[row["task"]]
        step = 1 if config.asymmetric else int(rng.integers(1, len(own)))
        wrong = own[(own.index(row["true"]) + step) % len(own)]
        out.append({**row, "completion": wrong if i in noisy else row["true"]})
    return out


def within_label(scores: np.ndarray, noisy: np.ndarray, labels: np.ndarray) -> float:
    """AUC of clean against noisy rows within the observed label, mean over labels weighted by rows."""
    groups = [labels == label for label in np.unique(labels)]
    groups = [group for group in groups if 0 < noisy[group].sum() < group.sum()]
    return float(np.average([roc_auc_score(~noisy[g], scores[g]) for g in groups], weights=[g.sum() for g in groups]))


@torch.no_grad()
def answer_states(model, tokenizer, rows) -> np.ndarray:
    """Hidden state that predicts the first token of the answer, (rows, d): what the probes of the rivals see."""
    backbone, out = Backbone(model), []
    with left_as_found(model):
        for row in rows:
            ids = tokenizer(row["prompt"])["input_ids"]
            out.append(backbone.hidden_states({"input_ids": torch.tensor([ids])})[0, -1].float().numpy())
    return np.stack(out)


def probe() -> object:
    return make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 0, 5), cv=3, max_iter=200))


def own_probability(fitted_classes, probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log p(observed label); a label that the probe has never seen gets the lowest."""
    place = {label: k for k, label in enumerate(fitted_classes)}
    chosen = [p[place[label]] if label in place else 0.0 for p, label in zip(probabilities, labels, strict=True)]
    return np.log(np.array(chosen) + 1e-12)


def evaluate(config: MislabelConfig, model, tokenizer, seed: int) -> dict[str, float]:
    """AUC within the observed label of every method, at one seed."""
    train, validation = draw(config, seed)
    observed, true = (np.array([row[k] for row in train]) for k in ("completion", "true"))
    noisy, known = observed != true, np.array([row["true"] for row in validation])
    rows = [
        Dataset.from_list([{k: r[k] for k in ("prompt", "completion")} for r in part]) for part in (train, validation)
    ]
    found = {}
    for direction in ForValueConfig.__dataclass_fields__["direction"].metadata["choices"]:
        scorer = ForValueScorer(
            model, rows[1], ForValueConfig(direction=direction), processing_class=tokenizer, progress=False
        )
        scores = scorer.score(rows[0])
        found[direction] = scores.values
    found["loss of the model"] = scores.log_likelihood / scores.n_labelled
    states, states_validation = (answer_states(model, tokenizer, part) for part in (train, validation))
    clean = probe().fit(states_validation, known)
    found["probe on the validation rows"] = own_probability(clean.classes_, clean.predict_proba(states), observed)
    trusting = cross_val_predict(probe(), states, observed, cv=3, method="predict_proba")
    found["probe on the noisy rows (confident learning)"] = own_probability(np.unique(observed), trusting, observed)
    distance = states @ states_validation.T / np.linalg.norm(states_validation, axis=1)
    nearest = np.argsort(-distance, 1)[:, :10]
    found["agreement of 10 nearest validation rows"] = (known[nearest] == observed[:, None]).mean(1)
    ceiling = cross_val_predict(probe(), states, true, cv=3, method="predict_proba")
    found["ceiling: probe on the true labels"] = own_probability(np.unique(true), ceiling, observed)
    return {name: within_label(values, noisy, observed) for name, values in found.items()}


def main(config: MislabelConfig) -> dict[str, list[float]]:
    warnings.simplefilter("ignore")  # scikit-learn's, on defaults that will change
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    results: dict[str, list[float]] = {}
    for seed in range(config.seeds):
        for name, value in evaluate(config, model, tokenizer, seed).items():
            results.setdefault(name, []).append(value)
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in results.items()))
    lines = ["| score | AUC within the observed label | std over seeds |", "|---|---|---|"]
    lines += [f"| {name} | {np.mean(v):.3f} | {np.std(v):.3f} |" for name, v in results.items()]
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(results), [np.mean(v) for v in results.values()], xerr=[np.std(v) for v in results.values()])
    axes.axvline(0.5, color="black", linewidth=1)
    axes.set(xlim=(0.3, 1.0), xlabel="AUC of clean against noisy rows within the observed label (line: chance)")
    axes.invert_yaxis()
    figure.savefig(out / "auc.png", dpi=120)
    print("\n" + "\n".join(lines) + f"\n\nPicture: {out / 'auc.png'}")
    return results


if __name__ == "__main__":
    main(*HfArgumentParser(MislabelConfig).parse_args_into_dataclasses())
