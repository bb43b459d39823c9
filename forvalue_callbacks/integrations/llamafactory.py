"""LLaMA-Factory: `forvalue-llamafactory train.yaml forvalue_dataset=clean` for `llamafactory-cli train train.yaml`.

`clean` is a data set of its `dataset_info.json` with clean rows. `forvalue_method=auto forvalue_policy=drop:auto` say
how rows are scored and which are left out; both have the defaults of `ForValueCallback`. All of them may stand in the
YAML. Several GPUs: `torchrun ... -m forvalue_callbacks.integrations.llamafactory train.yaml ...`.

Both sides are read by LLaMA-Factory's own `get_dataset`. With `packing`, rows are scored and left out before they are
packed, by its own packing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.data.processor import PackedSupervisedDatasetProcessor
from llamafactory.hparams import get_train_args, read_args
from llamafactory.model import load_tokenizer
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback

from ..config import ForValueConfig
from ..policies import as_policy
from ..trainer.evaluation import trainer_of
from ..trainer.prefilter import prefilter
from ..trainer.refusals import refuse_policy

PREFIX = "forvalue_"
SETTINGS = ("dataset", "method", "policy")
UNPACKED = {"packing": False, "neat_packing": False}
# What would make other rows of the validation rows, or fewer.
AS_THEY_ARE = {"eval_dataset": None, "val_size": 0.0, "max_samples": None, "streaming": False}


class Rows:
    """The rows of LLaMA-Factory's settings with some changes, as its own code prepares them."""

    def __init__(self, given: dict[str, Any], changes: dict[str, Any]):
        self.model, self.data, self.training, *_ = get_train_args({**given, **changes})
        self.module = load_tokenizer(self.model)
        self.template = get_template_and_fix_tokenizer(self.module["tokenizer"], self.data)

    def prepared(self) -> Any:
        """Those of `dataset`."""
        found = get_dataset(self.template, self.model, self.data, self.training, stage="sft", **self.module)
        return found["train_dataset"]

    def packed(self, prepared: Any) -> Any:
        """Rows that have been prepared without packing, packed."""
        packing = Again(template=self.template, data_args=self.data, **self.module)
        options = {"batch_size": self.data.preprocessing_batch_size, "remove_columns": prepared.column_names}
        return prepared.map(packing.pack, batched=True, load_from_cache_file=False, **options)


class Again(PackedSupervisedDatasetProcessor):
    """LLaMA-Factory's packing of rows that it has tokenised already."""

    def pack(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        raw = {"_prompt": [[ids] for ids in examples["input_ids"]], "_response": [[ids] for ids in examples["labels"]]}
        raw |= {f"_{name}": examples[name] for name in ("images", "videos", "audios")}
        none: list[Any] = [None] * len(examples["input_ids"])
        return self.preprocess_dataset({**raw, "_system": none, "_tools": none})

    # There is no public place between its tokens and its packs.
    def _encode_data_example(self, prompt: Any, response: Any, **media: Any) -> tuple[list[int], list[int]]:
        return prompt[0], response[0]


class ForValue(TrainerCallback):
    """Scores the training rows once the trainer is made, and leaves out those that the policy drops.

    Args:
        given: LLaMA-Factory's settings.
        dataset: name of the data set of clean rows.
        method, policy: how rows are scored, and which are left out.

    Raises:
        ValueError: a policy or method that is none, a stage other than "sft", rows tokenised before, a data set that
            is not described.
    """

    def __init__(self, given: dict[str, Any], dataset: str, method: str | None = None, policy: str | None = None):
        self.policy = as_policy(policy)
        self.config = ForValueConfig(method=method or ForValueConfig().method)
        refuse_policy(self.policy, self.config.gives_log_odds)
        if given.get("stage") != "sft":
            raise ValueError(f"stage is {given.get('stage')!r}, and a For-Value score is of a labelled answer: sft.")
        if given.get("tokenized_path"):
            raise ValueError("tokenized_path holds rows that may be packed already: leave it out, rows are read anew.")
        # All of it before the trainer is made: settings that are read later undo its accelerator.
        self.validation = Rows(given, {**UNPACKED, **AS_THEY_ARE, "dataset": dataset}).prepared()
        self.packing = Rows(given, {})
        self.unpacked = Rows(given, UNPACKED).prepared() if self.packing.data.packing else None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = trainer_of(state)
        collator: Any = trainer.data_collator
        if self.unpacked is not None:
            trainer.train_dataset = self.unpacked
            trainer.data_collator = replace(collator, neat_packing=False, block_diag_attn=False)
        prefilter(trainer, self.validation, self.policy, self.config)
        if self.unpacked is not None:
            trainer.train_dataset, trainer.data_collator = self.packing.packed(trainer.train_dataset), collator


def main() -> None:
    """The command `forvalue-llamafactory`."""
    given = read_args()
    if not isinstance(given, dict):
        raise SystemExit("forvalue-llamafactory: give a YAML file, then forvalue_dataset=NAME and what else.")
    ours = {name: given.pop(PREFIX + name) for name in SETTINGS if PREFIX + name in given}
    if "dataset" not in ours:
        raise SystemExit("forvalue-llamafactory: name the data set of clean rows: forvalue_dataset=NAME.")
    run_exp(given, callbacks=[ForValue(given, **ours)])


if __name__ == "__main__":
    main()
