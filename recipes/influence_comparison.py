"""What the recipes that compare For-Value with influence functions share: methods, LoRA training, metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from data import collate
from datasets import Dataset
from influence_report import ONE_SCORE, ComparisonConfig, Measured, Meter, Result
from scipy.stats import rankdata
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from forvalue_callbacks import ForValueConfig, ForValueScorer, baselines
from forvalue_callbacks.baselines.batches import batches, prepared
from forvalue_callbacks.core import Head
from forvalue_callbacks.methods import LOG_ODDS, METHODS
from forvalue_callbacks.model.backbone import Backbone

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
Z0_INF, RHO = "Z0-Inf, all checkpoints", "RHO-loss"
NOTHING = Measured(None, 0.0, None)


class Labels(NamedTuple):
    """What a method should find: (N, M), whether a training row is what a validation row should value. Where labels
    are noisy also, (N,), which rows are clean and which label they show, and (M,), the labels of the validation rows.
    """

    relevant_NM: np.ndarray
    clean_N: np.ndarray | None = None
    observed_N: np.ndarray | None = None
    validation_M: np.ndarray | None = None

    def of(self, columns: list[int] | slice) -> Labels:
        """The same for some of the validation rows."""
        validation_M = None if self.validation_M is None else self.validation_M[columns]
        return self._replace(relevant_NM=self.relevant_NM[:, columns], validation_M=validation_M)

    def first_of_each(self) -> list[int]:
        """The first validation row of each kind."""
        return sorted(np.unique(self.relevant_NM, axis=1, return_index=True)[1].tolist())


def mirrored(model: nn.Module, rows: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Tensor:
    return torch.stack([baselines.mirrored(model, rows, [row]) for row in validation], 1)


def forward_only(model: nn.Module, rows: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Tensor:
    """By symmetry each validation row is simulated, not each training row; the Hessian of 20 training rows."""
    few = rows[:: max(1, len(rows) // 20)]
    return baselines.forward_only_inference(model, validation, rows, training=few, iterations=20).T


def in_run(model: nn.Module, rows: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Tensor:
    """Over one epoch by SGD, which is what its equations are for; the model gets its weights back.

    At a constant rate, or rows that happen to be drawn late would count less.
    """
    callback = baselines.InRunShapleyCallback(rows, validation)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        "outputs/in_run", num_train_epochs=1, per_device_train_batch_size=64, learning_rate=3e-4, optim="sgd",
        lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    Trainer(model, arguments, collate, Dataset.from_list(rows), callbacks=[callback]).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in before:
                p.copy_(before[name])
    model.eval()
    return callback.pairwise


COSTLY = {
    "mirrored influence": mirrored,
    "forward-only inference, 20 iterations": forward_only,
    "In-Run Shapley, one epoch": in_run,
}


def max_of(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)


class Rows(NamedTuple):
    """One task for the baselines, tokenised (with `pixel_values` where there are images), and for the scorer."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    scorer_train: list[dict[str, Any]]
    scorer_validation: list[dict[str, Any]]
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None
    processing_class: Any = None


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


def methods(noisy: bool) -> list[str]:
    """All methods that the scorer knows; those whose scores say that a row is clean where rows are not only."""
    return [name for name, method in METHODS.items() if noisy or method.unit != LOG_ODDS]


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
                hidden_TD = batch.pick(backbone.hidden_states(batch.inputs))
                loss = nn.functional.cross_entropy(logits(head, hidden_TD).float(), batch.target_T, reduction="sum")
                (loss / n_labelled).backward()
                step_loss += loss.detach() / n_labelled
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(step_loss)
        model.eval()
        yield float(torch.stack(losses).mean()), float(np.mean(rates))


def snapshot(model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """What Z0-Inf reads of a checkpoint: the trainable parameters, and the log-likelihoods of both sides."""
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return weights, *(baselines.log_likelihoods(model, side) for side in (rows.train, rows.validation))


def rho_loss(
    config: ComparisonConfig, meter: Meter, model: nn.Module, rows: Rows, seed: int
) -> tuple[Measured, Measured]:
    """Scoring and training: the other model is the same one, after a LoRA run on the validation rows alone."""
    fitted = with_lora(copy.deepcopy(model), config, seed)
    training = meter(lambda: [loss for loss, _ in train_epochs(fitted, rows.validation, config, seed)][-1])
    return meter(lambda: baselines.rho_loss(model, fitted, rows.train)), training


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
    meter = Meter(config.clock)
    evaluation_s = min(meter(lambda: baselines.loss(model, [*rows.train, *rows.validation])).seconds for _ in range(2))

    def add(
        method: str,
        scoring: Measured,
        checkpoint: int | None = None,
        training: Measured = NOTHING,
        gradients: Measured = NOTHING,
        columns: list[int] | slice = slice(None),
    ) -> None:
        scores = scoring.value if scoring.value.ndim == 2 else scoring.value[:, None].expand(n, m)[:, columns]
        phases = (training, gradients, scoring)
        measured = quality(scores, labels.of(columns))
        results.append(
            Result(
                task, seed, method, checkpoint, **measured, training_s=training.seconds,
                gradients_s=gradients.seconds, scoring_s=scoring.seconds,
                evaluation_passes=sum(phase.seconds for phase in phases) / evaluation_s,
                peak_mib=max_of(*(phase.peak_mib for phase in phases)),
                training_loss=training.value,
            )
        )  # fmt: skip
        where = "" if checkpoint is None else f" after {checkpoint} epochs"
        print(f"{task} seed {seed}: {method}{where}: AUC {measured['auc']:.3f}", flush=True)

    calls = {
        "": lambda scorer: scorer.pairwise(rows.scorer_train),
        ONE_SCORE: lambda scorer: torch.from_numpy(scorer.score(rows.scorer_train).values),
    }
    for method in methods(labels.clean_N is not None):
        settings = ForValueConfig(method=method)
        for suffix, call in calls.items():
            if suffix == "" and not METHODS[method].pairwise:
                continue  # one number per row: the whole validation set moves the head
            scorer = ForValueScorer(
                model,
                rows.scorer_validation,
                settings,
                processing_class=rows.processing_class,
                data_collator=rows.data_collator,
                progress=False,
            )
            try:
                add(f"For-Value, {method}{suffix}", meter(partial(call, scorer)))
            except ValueError as error:
                notes.append(f"{task}, seed {seed}: For-Value, {method}{suffix}: {error}")
    for method, score in cheap.items():
        add(method, meter(score))
    scoring, training = rho_loss(config, meter, model, rows, seed)
    add(RHO, scoring, training=training)

    model = with_lora(model, config, seed)
    if config.costly:
        columns = labels.first_of_each()
        some = [rows.validation[j] for j in columns]
        for method, score in COSTLY.items():
            name = f"{method} ({len(some)} validation rows)"
            try:
                add(name, meter(partial(score, model, rows.train, some)), 0, columns=columns)
            except ValueError as error:  # the simulation diverges
                notes.append(f"{task}, seed {seed}: {name}: {error}")
    epochs = train_epochs(model, rows.train, config, seed)
    training, all_gradients = NOTHING, NOTHING
    rates = list[float]()
    medians, largest = list[str](), list[str]()  # residuals at each checkpoint
    over_checkpoints = torch.zeros(n, m)
    snapshots = list[Measured]()
    for checkpoint in range(config.epochs + 1):
        if checkpoint > 0:
            (loss_now, rate), seconds, peak = meter(partial(next, epochs))
            training = Measured(loss_now, training.seconds + seconds, max_of(training.peak_mib, peak))
            rates.append(rate)
        if checkpoint not in config.checkpoints:
            continue
        snapshots.append(meter(partial(snapshot, model, rows)))
        gradients = meter(lambda: tuple(baselines.gradients(model, side) for side in (rows.train, rows.validation)))
        sides = gradients.value
        residuals: dict[str, float] = {}
        published = partial(baselines.hyperinf, iterations=30, residuals=residuals)
        for method, influence in {**LORA_METHODS, SCHULZ: published}.items():
            add(method, meter(partial(influence, *sides)), checkpoint, training, gradients)
        values = list(residuals.values())
        medians.append(f"{np.median(values):.2g}")
        largest.append(f"{max(values):.2g}")
        if checkpoint > 0:
            # Each checkpoint stands for the epochs since the one before it.
            over_checkpoints += sum(rates) * baselines.tracin(*sides).cpu()
            rates.clear()
            peak = max_of(all_gradients.peak_mib, gradients.peak_mib)
            all_gradients = Measured(None, all_gradients.seconds + gradients.seconds, peak)
    kept = sum(g.numel() * g.element_size() for side in sides for g in side.values()) / 2**20
    notes.append(
        f"{task}, seed {seed}: residuals of HyperINF's 30 Schulz steps, median {', '.join(medians)}, largest "
        f"{', '.join(largest)}; the per-sample gradients of one checkpoint take {kept:.0f} MiB"
    )
    add(TRACIN_CP, Measured(over_checkpoints, 0.0, None), config.epochs, training, all_gradients)
    if len(snapshots) > 1:  # or there is nothing to compare
        scoring = meter(lambda: baselines.z0_inf([shot.value for shot in snapshots]))
        looked = Measured(None, sum(s.seconds for s in snapshots), max_of(*(s.peak_mib for s in snapshots)))
        add(Z0_INF, scoring, config.epochs, training, looked)
    return results, notes
