"""Is the fine-tuned model better? SFT on what each score keeps, beside no filter, random rows and the clean rows.

    python recipes/sft_outcomes.py --config recipes/sft_outcomes.yaml
    python recipes/sft_outcomes.py --config recipes/sft_outcomes.yaml --noise 0 --drop auto 0.3 --output_dir out/clean
    python recipes/sft_outcomes.py --config recipes/sft_outcomes.yaml --model_name_or_path MODEL \
        --data train.csv --prompt_template '{text}\\nintent:' --completion_template ' {category}' \
        --draw_validation true --draw_test true --max_train_rows 1000 --noise 0.3
    python recipes/sft_outcomes.py --config recipes/sft_outcomes.yaml --arms "no filter" random auto DataInf

Every arm starts from the same weights and sees the same test rows; a seed draws rows, noise and batches alike for all
arms, so that differences are paired. `--drop auto`: as many rows as the method `auto` drops by itself, for the others
too, `random` among them (they do not know the number; it is given to them). `--budgets epochs`: fewer rows are fewer
steps; `steps`: as many steps as all rows take. `METHOD, reweighted` keeps all rows and draws the good ones more often.

Measured on the test rows: the share of answers that greedy decoding writes whole and right, where answers repeat; the
loss, where they do not, and beside it. A line of `runs.jsonl` in the output folder is a run; a second start makes only
the runs that are not there. `outcomes.md` and `outcomes.png` are of all that are. Every field of `SFTConfig` and
`ModelConfig` is a flag: `--use_peft false` fine-tunes the whole model.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import ROW, DataConfig, Rows, load_rows
from datasets import Dataset, concatenate_datasets
from datasets.utils.logging import disable_progress_bar
from influence_comparison import LORA_METHODS
from influence_report import CLOCKS, ComparisonConfig, Meter, known
from outcome_report import BASE, CEILING, Run, picture, table
from outcomes import RIVALS, Job, answers_repeat, constant_scores, fine_tune
from real_errors import commit
from sft import make_trainer, parse, without_traceback
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, SFTConfig

from forvalue_callbacks import TINY_MODEL, Drop, ForValueCallback, Keep, Reweight
from forvalue_callbacks.data.files import DataError
from forvalue_callbacks.data.shown import shown
from forvalue_callbacks.methods import LOG_ODDS, METHODS
from forvalue_callbacks.scores.files import whole_file

VALIDATION, ADDED, REWEIGHTED = "validation rows alone", "validation rows added", ", reweighted"
SCORES = [*RIVALS, *LORA_METHODS, *METHODS]
ARMS = [BASE, *SCORES, f"auto{REWEIGHTED}", VALIDATION, ADDED, CEILING]
BUDGETS = ["epochs", "steps"]


@dataclass
class OutcomesConfig:
    arms: list[str] = field(
        default_factory=lambda: [a for a in ARMS if a not in LORA_METHODS or a == "DataInf"],
        metadata={"help": f"Some of {ARMS}."},
    )
    drop: list[str] = field(
        default_factory=lambda: ["auto"], metadata={"help": "Shares of the rows to drop; auto: as many as auto drops."}
    )
    budgets: list[str] = field(default_factory=lambda: ["epochs"], metadata={"help": f"Some of {BUDGETS}."})
    seeds: int = field(default=5, metadata={"help": "So many seeds, of rows, noise and training."})
    first_seed: int = field(default=0, metadata={"help": "The first of them."})
    influence_epochs: int = field(
        default=10, metadata={"help": "Epochs of LoRA training before influence functions (DataInf's own: 10)."}
    )
    clock: str = field(
        default="wall", metadata={"help": "Time is 'wall' time, or 'cpu' time (of all threads) on a busy machine."}
    )

    def __post_init__(self) -> None:
        for name, choices in (("arms", [*ARMS, *(f"{s}{REWEIGHTED}" for s in SCORES)]), ("budgets", BUDGETS)):
            known(name, getattr(self, name), choices)
        known("clock", [self.clock], CLOCKS)
        if wrong := [d for d in self.drop if d != "auto" and not (_number(d) and 0 < float(d) < 1)]:
            raise ValueError(f"drop: {wrong[0]!r} is neither 'auto' nor a share between 0 and 1")


def _number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune. `drop` and `budget` are None where they make no difference."""

    name: str
    drop: str | None = None
    budget: str | None = None

    @property
    def score(self) -> str | None:
        name = self.name.removesuffix(REWEIGHTED)
        return name if name in SCORES else None

    def key(self, seed: int) -> tuple[Any, ...]:
        return self.name, self.drop, self.budget, seed


def arms_of(config: OutcomesConfig, has_truth: bool) -> list[Arm]:
    out = []
    for name in config.arms:
        if name == BASE or name.endswith(REWEIGHTED):
            out.append(Arm(name))
        elif name != CEILING or has_truth:
            drops = config.drop if name in SCORES else [None]
            out += [Arm(name, drop, budget) for budget in config.budgets for drop in drops]
    return out


@dataclass
class Study:
    """Rows of one seed, and what it takes to fine-tune on some of them."""

    rows: Rows
    job: Job
    training: SFTConfig
    model_config: ModelConfig
    clock: Callable[[], float]

    @property
    def wrong(self) -> np.ndarray | None:
        """(N,) bool, where it is known."""
        return np.array(self.rows.train["is_noisy"]) if "is_noisy" in self.rows.train.column_names else None

    def places(self, arm: Arm) -> np.ndarray:
        """Training rows that the arm keeps."""
        n = len(self.rows.train)
        if arm.name == CEILING:
            assert self.wrong is not None
            return np.flatnonzero(~self.wrong)
        if arm.name == VALIDATION:
            return np.arange(0)
        if arm.drop is None or arm.score is None:
            return np.arange(n)
        values, _ = self.job.value(arm.score)
        if arm.drop != "auto":
            policy = Drop(float(arm.drop))
        elif arm.score in METHODS and METHODS[arm.score].unit == LOG_ODDS:
            policy = Drop("auto")
        else:
            policy = Keep(int((Drop("auto")(self.job.value("auto")[0]) > 0).sum()))
        return np.flatnonzero(policy(values))

    def run(self, arm: Arm) -> Run:
        """Fine-tunes, and measures. JSON-able."""
        places, wrong = self.places(arm), self.wrong
        chosen = self.rows.train.select(places)
        if arm.name in (VALIDATION, ADDED):
            own = self.rows.train.column_names
            chosen = concatenate_datasets([_like(own, side) for side in (chosen, self.rows.validation) if len(side)])
        callbacks = []
        if arm.name.endswith(REWEIGHTED):
            assert arm.score is not None
            scores = constant_scores(self.job.value(arm.score)[0])
            callbacks.append(ForValueCallback(self.rows.validation, Reweight(0.5), scores=scores, verbose=False))
        training = copy.deepcopy(self.training)
        training.seed = self.job.seed
        if arm.budget == "steps":
            training.max_steps = steps_of(training, len(self.rows.train))
        trainer = make_trainer(replace(self.rows, train=chosen, warnings=[]), training, self.model_config, callbacks)
        trainer.remove_callback(PrinterCallback)  # the table says it
        outcome = fine_tune(trainer, self.clock)
        return {
            "arm": arm.name, "drop": arm.drop, "budget": arm.budget, "seed": self.job.seed, "kept": len(places),
            "kept_share": len(places) / len(self.rows.train),
            "wrong_share": float(wrong[places].mean()) if wrong is not None and len(places) else None,
            "valuation_seconds": self.job.value(arm.score)[1] if arm.score else 0.0,
            **outcome._asdict(),
        }  # fmt: skip


def steps_of(training: SFTConfig, n_rows: int) -> int:
    """Optimizer steps on so many rows in one process, as Trainer counts them."""
    if training.max_steps > 0:
        return training.max_steps
    batches = -(-n_rows // training.per_device_train_batch_size)
    return max(1, round(training.num_train_epochs * max(1, -(-batches // training.gradient_accumulation_steps))))


def _like(columns: list[str], rows: Dataset) -> Dataset:
    """Those of the columns that SFTTrainer reads: noise and places are of training rows alone."""
    read = ("prompt", "completion", "messages", "conversations", "text", "input_ids", "labels")
    return rows.select_columns([c for c in read if c in columns])


def study_of(
    config: OutcomesConfig, data: DataConfig, training: SFTConfig, model_config: ModelConfig, seed: int
) -> Study:
    """The rows of a seed, without those that SFTTrainer leaves out."""
    rows = load_rows(replace(data, data_seed_rows=seed), training.dataset_text_field)
    if rows.test is None:
        raise DataError("what comes of a filter is measured on test rows: give --test_data FILE or --draw_test true.")
    trainer = make_trainer(rows, training, model_config)
    prepared = set(trainer.train_dataset[ROW])
    train = rows.train.select([i for i, row in enumerate(rows.train[ROW]) if row in prepared])
    model = AutoModelForCausalLM.from_pretrained(_name(model_config), dtype=torch.float32).eval()
    influence = ComparisonConfig(epochs=config.influence_epochs)
    meter = Meter(config.clock)
    job = Job(model, trainer.processing_class, trainer.train_dataset, train, rows.validation, seed, influence, meter)
    return Study(replace(rows, train=train), job, training, model_config, meter.now)


def _name(model_config: ModelConfig) -> str:
    return model_config.model_name_or_path or str(TINY_MODEL)


def _plain(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value)


def settings_of(
    config: OutcomesConfig, data: DataConfig, training: SFTConfig, model_config: ModelConfig
) -> dict[str, Any]:
    """What runs of one folder have in common, JSON-able."""
    shown = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
    shown += ("learning_rate", "lr_scheduler_type", "max_length")
    peft = ("use_peft", "lora_r", "lora_alpha", "lora_target_modules")
    out = {name: _plain(getattr(training, name)) for name in shown}
    out |= {name: _plain(getattr(model_config, name)) for name in peft[: None if model_config.use_peft else 1]}
    known_rows = {name: value for name, value in asdict(data).items() if name != "data_seed_rows"}
    for name in ("data", "validation_data", "test_data"):
        known_rows[name] = None if known_rows[name] is None else Path(known_rows[name]).name
    model = "tiny" if _name(model_config) == str(TINY_MODEL) else Path(_name(model_config)).name
    return {"model": model, **known_rows, **out, "influence_epochs": config.influence_epochs, "clock": config.clock}


def runs_of(path: Path, settings: dict[str, Any]) -> list[Run]:
    """The runs that are there already.

    Raises:
        DataError: they are of other settings.
    """
    if not path.is_file():
        return []
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    for run in runs:
        if other := [name for name in settings if run["settings"].get(name) != settings[name]]:
            raise DataError(
                f"{path} holds runs with {other[0]}={run['settings'].get(other[0])!r}, not {settings[other[0]]!r}: "
                "choose another --output_dir."
            )
    return runs


def missing(
    config: OutcomesConfig, data: DataConfig, training: SFTConfig, model_config: ModelConfig, done: list[Run]
) -> Iterator[Run]:
    """The runs that are not there, one by one: all arms of a seed, then the next seed."""
    there = {(run["arm"], run["drop"], run["budget"], run["seed"]) for run in done}
    has_truth = data.data is None or bool(data.noise)
    arms = arms_of(config, has_truth and data.noise != 0)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    todo = {seed: [arm for arm in arms if arm.key(seed) not in there] for seed in seeds}
    with tqdm(total=sum(map(len, todo.values())), desc="fine-tuning", unit="run") as bar:
        for seed, here in todo.items():
            study = study_of(config, data, training, model_config, seed) if here else None
            for arm in here:
                assert study is not None
                bar.set_postfix_str(f"seed {seed}, {arm.name}")
                try:
                    yield study.run(arm)
                except ValueError as refusal:  # a score that is not for such rows
                    tqdm.write(f"{arm.name}, seed {seed}: {refusal}")
                bar.update()


def report(runs: list[Run], config: OutcomesConfig, settings: dict[str, Any], measure: str, folder: Path) -> str:
    """`outcomes.md` and `outcomes.png` of the runs; returns the text."""
    made = {name: sorted({run["made"][name] for run in runs}) for name in runs[0]["made"]}
    lines = ["; ".join(f"{name} {value}" for name, value in settings.items() if value is not None) + "."]
    lines += ["", "Made: " + "; ".join(f"{name} {', '.join(values)}" for name, values in made.items()) + "."]
    for budget in config.budgets:
        lines += ["", f"## Equal {budget}", "", *table(runs, budget, measure)]
    picture(runs, config.budgets, measure, folder / "outcomes.png")
    text = "\n".join(lines) + "\n"
    (folder / "outcomes.md").write_text(text)
    return text


def main(config: OutcomesConfig, data: DataConfig, training: SFTConfig, model_config: ModelConfig) -> list[Run]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bar()
    warnings.simplefilter("ignore", category=Warning)  # notes between the frameworks, once per run
    folder = Path(training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    training.disable_tqdm = True  # one bar over all runs
    settings = settings_of(config, data, training, model_config)
    file = folder / "runs.jsonl"
    runs = runs_of(file, settings)
    made = {"date": date.today().isoformat(), "commit": commit()}
    made |= {package: version(package) for package in ("torch", "transformers", "trl", "peft")}
    for run in missing(config, data, training, model_config, runs):
        runs.append({**run, "settings": settings, "made": made | {"threads": str(torch.get_num_threads())}})
        with whole_file(file) as temporary:  # a killed run leaves no half line
            temporary.write_text("".join(json.dumps(run) + "\n" for run in runs))
    test = load_rows(data, training.dataset_text_field).test
    labels = test is not None and answers_repeat([shown(row).answer for row in test])
    print(report(runs, config, settings, "accuracy" if labels else "test_loss", folder))
    print(f"Runs: {file}; table and picture: {folder / 'outcomes.md'}, {folder / 'outcomes.png'}")
    return runs


if __name__ == "__main__":
    with without_traceback():
        main(*parse(OutcomesConfig, DataConfig, SFTConfig, ModelConfig))
