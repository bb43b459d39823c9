"""What the recipes that compare For-Value with influence functions share: methods, LoRA training, metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from influence_report import CLOCKS, ONE_SCORE, ComparisonConfig, Result
from scipy.stats import rankdata
from torch import Tensor, nn

from forvalue_callbacks import ForValueConfig, ForValueScorer, baselines
from forvalue_callbacks.baselines.batches import batches, prepared
from forvalue_callbacks.core import Head
from forvalue_callbacks.head import Backbone

LORA_METHODS: dict[str, Callable[..., Tensor]] = {
    "Hessian-free (TracIn)": baselines.tracin,
    "DataInf": baselines.datainf,
    "HyperINF, solved": baselines.hyperinf,
    "LiSSA, 10 steps": baselines.lissa,
    "influence, exact inverse": baselines.exact_influence,
    "outlier gradients": lambda rows, validation: baselines.outlier_gradients(rows),
}
SCHULZ = "HyperINF, 30 Schulz steps"
TRACIN_CP = "TracIn, all checkpoints"


class Labels(NamedTuple):
    """What a method should find: (N, M), whether a training row is what a validation row should value. Where labels
    are noisy also, (N,), which rows are clean and which label they show, and (M,), the labels of the validation rows.
    """

    relevant_NM: np.ndarray
    clean_N: np.ndarray | None = None
    observed_N: np.ndarray | None = None
    validation_M: np.ndarray | None = None


class Rows(NamedTuple):
    """One task for the baselines, tokenised (with `pixel_values` where there are images), and for the scorer."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    scorer_train: list[dict[str, Any]]
    scorer_validation: list[dict[str, Any]]
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None


def aucs(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """AUC of each column of (N, M) scores against the same column of (N, M) truth, (M,); ties count half."""
    n = positive.sum(0)
    ranks = rankdata(scores, axis=0)
    return ((ranks * positive).sum(0) - n * (n + 1) / 2) / (n * (len(positive) - n))


def quality(scores_NM: Tensor, labels: Labels) -> dict[str, float | None]:
    """AUC and recall per validation row, means and standard deviations; AUC of clean against mislabelled rows.

    Recall: share of the n best-scored rows that are relevant, n being the number of relevant rows.
    """
    scores, relevant = scores_NM.double().cpu().numpy(), labels.relevant_NM
    per_row = aucs(scores, relevant)
    order = np.argsort(-scores, axis=0, kind="stable")
    recalls = [truth[best[: truth.sum()]].mean() for truth, best in zip(relevant.T, order.T, strict=True)]
    noise = within = None
    if labels.clean_N is not None and labels.observed_N is not None and labels.validation_M is not None:
        own = labels.observed_N[:, None] == labels.validation_M
        means, clean = ((scores * own).sum(1) / own.sum(1))[:, None], labels.clean_N[:, None]
        noise = float(aucs(means, clean)[0])
        groups = [labels.observed_N == label for label in np.unique(labels.observed_N)]
        within = float(np.mean([aucs(means[group], clean[group])[0] for group in groups]))
    return {
        "auc": float(np.mean(per_row)),
        "auc_std": float(np.std(per_row)),
        "recall": float(np.mean(recalls)),
        "recall_std": float(np.std(recalls)),
        "noise_auc": noise,
        "noise_auc_within": within,
    }


class Stopwatch:
    """Seconds of a call, by the clock of the config."""

    def __init__(self, clock: str):
        self.now = CLOCKS[clock]

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, float]:
        started = self.now()
        out = function()
        return out, self.now() - started


def directions() -> list[str]:
    """All directions that the scorer knows."""
    (spec,) = (spec for spec in dataclasses.fields(ForValueConfig) if spec.name == "direction")
    return list(spec.metadata["choices"])


def with_lora(model: nn.Module, config: ComparisonConfig, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=config.lora_targets)
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=False).eval()


def logits(head: Head, hidden_TD: Tensor) -> Tensor:
    """`head.logits`, which works in place, as a differentiable function, in the model's own precision."""
    linear_TV = nn.functional.linear(hidden_TD, head.weight, head.bias) * head.scale
    return linear_TV if head.softcap is None else head.softcap * (linear_TV / head.softcap).tanh()


def train_epochs(
    model: nn.Module, rows: list[dict[str, Any]], config: ComparisonConfig, seed: int
) -> Iterator[tuple[float, float]]:
    """LoRA training by AdamW, an epoch at a time: yields the epoch's mean loss and mean learning rate.

    As fast as it gets, so that For-Value wins over no straw man: a step's rows are sorted by length and cut into
    batches that stay in the cache, and only labelled positions meet the head.
    """
    items = prepared(rows)
    backbone = Backbone(model)
    head = backbone.head()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    n_steps = config.epochs * -(-len(rows) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / n_steps, n_steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        losses, rates = [], []
        for chosen in torch.randperm(len(rows), generator=generator).split(config.batch_size):
            step = [items[i] for i in chosen]
            n_labelled = sum(item.n_labelled for item in step)
            model.train()
            step_loss = torch.zeros((), device=backbone.device)
            for batch in batches(step, device=backbone.device):
                hidden_TD = backbone.hidden_states({**batch.inputs, "labels": batch.labels})[:, :-1][batch.predicts]
                labels_T = batch.labels[:, 1:][batch.predicts]
                loss = nn.functional.cross_entropy(logits(head, hidden_TD).float(), labels_T, reduction="sum")
                (loss / n_labelled).backward()
                step_loss += loss.detach() / n_labelled
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(step_loss)
        model.eval()
        yield float(torch.stack(losses).mean()), float(np.mean(rates))


def compare(
    config: ComparisonConfig,
    task: str,
    seed: int,
    model: nn.Module,
    rows: Rows,
    labels: Labels,
    cheap: Mapping[str, Callable[[], Tensor]],
) -> tuple[list[Result], list[str]]:
    """All methods on one task, `cheap` being what needs no LoRA, and notes: residuals, what could not be computed."""
    n, m = labels.relevant_NM.shape
    results: list[Result] = []
    notes: list[str] = []
    timed = Stopwatch(config.clock)
    evaluation_s = min(timed(lambda: baselines.loss(model, [*rows.train, *rows.validation]))[1] for _ in range(2))

    def add(
        method: str, scores: Tensor, scoring_s: float, checkpoint=None, training=0.0, gradients=0.0, loss_now=None
    ):
        scores = scores if scores.ndim == 2 else scores[:, None].expand(n, m)
        passes = (training + gradients + scoring_s) / evaluation_s
        measured = quality(scores, labels)
        results.append(
            Result(
                task, seed, method, checkpoint, **measured, training_s=training, gradients_s=gradients,
                scoring_s=scoring_s, evaluation_passes=passes, training_loss=loss_now,
            )
        )  # fmt: skip
        where = "" if checkpoint is None else f" after {checkpoint} epochs"
        print(f"{task} seed {seed}: {method}{where}: AUC {measured['auc']:.3f}", flush=True)

    calls = {
        "": lambda scorer: scorer.pairwise(rows.scorer_train),
        ONE_SCORE: lambda scorer: torch.from_numpy(scorer.score(rows.scorer_train).values),
    }
    for direction in directions():
        for suffix, call in calls.items():
            scorer = ForValueScorer(
                model,
                rows.scorer_validation,
                ForValueConfig(direction=direction),
                data_collator=rows.data_collator,
                progress=False,
            )
            try:
                add(f"For-Value, {direction}{suffix}", *timed(partial(call, scorer)))
            except ValueError as error:
                notes.append(f"{task}, seed {seed}: For-Value, {direction}{suffix}: {error}")
    for method, score in cheap.items():
        add(method, *timed(score))

    model = with_lora(model, config, seed)
    epochs = train_epochs(model, rows.train, config, seed)
    training_s = all_gradients_s = 0.0
    loss_now, rates = None, list[float]()
    over_checkpoints = torch.zeros(n, m)
    for checkpoint in range(config.epochs + 1):
        if checkpoint > 0:
            (loss_now, rate), seconds = timed(partial(next, epochs))
            training_s += seconds
            rates.append(rate)
        if checkpoint not in config.checkpoints:
            continue
        sides, gradients_s = timed(
            lambda: tuple(baselines.gradients(model, side) for side in (rows.train, rows.validation))
        )
        residuals: dict[str, float] = {}
        published = partial(baselines.hyperinf, iterations=30, residuals=residuals)
        for method, influence in {**LORA_METHODS, SCHULZ: published}.items():
            add(method, *timed(partial(influence, *sides)), checkpoint, training_s, gradients_s, loss_now)
        values = sorted(residuals.values())
        notes.append(
            f"{task}, seed {seed}, after {checkpoint} epochs: residuals of HyperINF's 30 Schulz steps, "
            f"median {np.median(values):.2g}, largest {values[-1]:.2g}"
        )
        if checkpoint > 0:
            # Each checkpoint stands for the epochs since the one before it.
            over_checkpoints += sum(rates) * baselines.tracin(*sides).cpu()
            rates.clear()
            all_gradients_s += gradients_s
    kept = sum(g.numel() * g.element_size() for side in sides for g in side.values()) / 2**20
    notes.append(f"{task}, seed {seed}: the per-sample gradients of one checkpoint take {kept:.0f} MiB")
    add(TRACIN_CP, over_checkpoints, 0.0, config.epochs, training_s, all_gradients_s, loss_now)
    return results, notes
