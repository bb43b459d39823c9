"""Is the package one line inside other frameworks? Each trains a tiny model end to end, with noisy rows left out.

    python tests/frameworks.py FRAMEWORK [--python PATH]

with a Python in which the framework is installed (`pip install --no-deps` and what it imports). One line a way of
training: rows dropped and how many of them are noisy, that the model has seen every kept row and no dropped one, and
how far the scores are from those of `ForValueScorer` on the rows as the framework prepares them. Exits with the number
of failures.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from helpers.elsewhere import chosen_here, stand_in

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "forvalue_callbacks" / "tiny" / "model"
METHOD, POLICY = "fitted_likelihood", "drop:0.25"
N, KEPT = 160, 120
Run = tuple[Path, list[Any], list[Any]]  # folder of the scores, training and validation rows as they are prepared
# Its name, how it is done, and how many rows of batches are to be trained on (None: packs; text: why it is refused).
Way = tuple[str, Callable[[], Any], int | str | None]


def write(folder: Path) -> list[bool]:
    """Noisy and clean rows as `train.jsonl` and `clean.jsonl`; which of the noisy ones are wrong."""
    from forvalue_callbacks.tiny import instructions

    noisy = instructions(N, seed=0, noise=0.25)
    for name, rows in (("train", noisy), ("clean", instructions(90, seed=1))):
        lines = [json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return noisy["is_noisy"]


@contextmanager
def watched() -> Iterator[list[list[int]]]:
    """Tokens that models are trained on while this is open, a list a row of a batch."""
    from transformers import LlamaForCausalLM

    seen: list[list[int]] = []
    forward = LlamaForCausalLM.forward

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            seen.extend(ids.tolist())
        return forward(self, *args, **kwargs)

    noting.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    LlamaForCausalLM.forward = noting
    try:
        yield seen
    finally:
        LlamaForCausalLM.forward = forward


def holds(batches: list[list[int]], rows: list[list[int]]) -> list[bool]:
    """Whether each row's tokens stand together somewhere in what was trained on, packed or not."""
    text = ";".join("," + ",".join(map(str, ids)) + "," for ids in batches)
    return ["," + ",".join(map(str, ids)) + "," in text for ids in rows]


# ---- each framework: the ways in which it trains ----


def axolotl(folder: Path) -> Iterator[Way]:
    stand_in("posthog")
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_cli
    from axolotl.common.datasets import load_datasets

    form = {"field_instruction": "prompt", "field_output": "completion"}
    form |= {"format": "{instruction}", "no_input_format": "{instruction}"}

    def run(packing: bool, **changes: Any) -> Run:
        out = folder / f"out-{packing}"
        settings = {
            "base_model": str(MODEL),
            "plugins": ["forvalue_callbacks.integrations.axolotl.ForValuePlugin"],
            "forvalue": {"method": METHOD, "policy": POLICY},
            "datasets": [{"path": str(folder / "train.jsonl"), "ds_type": "json", "type": form}],
            "test_datasets": [
                {"path": str(folder / "clean.jsonl"), "ds_type": "json", "type": form, "split": "train"}
            ],
            "dataset_prepared_path": str(folder / f"prepared-{packing}"),
            "output_dir": str(out),
            "sequence_len": 256,
            "sample_packing": packing,
            "eval_sample_packing": False,
            "shuffle_merged_datasets": False,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "num_epochs": 4 if packing else 1,  # packs that fill no batch are left out of an epoch
            "learning_rate": 0.001,
            "optimizer": "adamw_torch",
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "use_cpu": True,
            "attn_implementation": "sdpa",
            "logging_steps": 1,
            "save_strategy": "no",
            "dataset_num_proc": 1,
            **changes,
        }
        file = folder / f"axolotl-{packing}.yaml"
        file.write_text(yaml.dump(settings))
        do_cli(str(file))
        found = load_datasets(cfg=load_cfg(str(file)))
        return out, list(found.train_dataset), list(found.eval_dataset)

    yield "rows", lambda: run(False), KEPT
    yield "sample_packing", lambda: run(True), None
    yield "no log odds", lambda: run(False, forvalue={"policy": "drop:auto"}), "needs scores that are log odds"
    yield "a key misspelt", lambda: run(False, forvalue={"polcy": "drop:0.1"}), "polcy"
    yield "no clean rows", lambda: run(False, test_datasets=[]), "name them as test_datasets"


def llamafactory(folder: Path) -> Iterator[Way]:
    stand_in("torchaudio")
    from forvalue_callbacks.integrations.llamafactory import AS_THEY_ARE, UNPACKED, Rows, main

    given = ["forvalue_dataset=clean", f"forvalue_method={METHOD}", f"forvalue_policy={POLICY}"]
    columns = {"prompt": "prompt", "response": "completion"}
    info = {name: {"file_name": f"{name}.jsonl", "columns": columns} for name in ("train", "clean")}
    (folder / "dataset_info.json").write_text(json.dumps(info))

    def run(*more: str, **changes: Any) -> Run:
        out = folder / f"out-{len(changes)}"
        settings = {
            "model_name_or_path": str(MODEL),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "full",
            "dataset": "train",
            "dataset_dir": str(folder),
            "template": "default",
            "cutoff_len": 256,
            "output_dir": str(out),
            "overwrite_cache": True,
            "overwrite_output_dir": True,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 0.001,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            **changes,
        }
        file = folder / "train.yaml"
        file.write_text(json.dumps(settings))  # which is YAML
        sys.argv = ["forvalue-llamafactory", str(file), *(more or given)]
        main()
        changes = UNPACKED, {**UNPACKED, **AS_THEY_ARE, "dataset": "clean"}
        return out, *(list(Rows(settings, change).prepared()) for change in changes)

    yield "rows", run, KEPT
    yield "packing", lambda: run(packing=True), None
    yield "neat_packing", lambda: run(packing=True, neat_packing=True), None
    yield "no clean rows", lambda: run("report_to=none"), "forvalue_dataset=NAME"
    yield "no log odds", lambda: run(*given, "forvalue_method=gradient", "forvalue_policy=drop:auto"), "log odds"
    yield "another stage", lambda: run(stage="pt"), "stage is 'pt'"
    yield "tokenised before", lambda: run(tokenized_path=str(folder / "tokens")), "rows are read anew"


def swift(folder: Path) -> Iterator[Way]:
    from swift.arguments import SftArguments
    from swift.callbacks import TrainerCallback, callbacks_map
    from swift.dataset import PackingDataset
    from swift.pipelines import sft_main

    os.environ |= {"FORVALUE_METHOD": METHOD, "FORVALUE_POLICY": POLICY}
    # No CPU has the flash attention without which it refuses to pack; which rows are trained on does not depend on it.
    SftArguments._check_padding_free = lambda self: None
    made: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            for name, rows in (("train", self.trainer.train_dataset), ("clean", self.trainer.eval_dataset)):
                rows = rows.dataset if isinstance(rows, PackingDataset) else rows
                made[name] = [rows[i] for i in range(len(rows))]

    callbacks_map["look"] = Look

    plugin = folder / "plugin.py"
    plugin.write_text("import forvalue_callbacks.integrations.swift\n")
    itself = ROOT / "forvalue_callbacks" / "integrations" / "swift.py"

    def run(plugin: Path, *more: str) -> Run:
        out = folder / f"out-{len(more)}"
        given = f"""--model {MODEL} --model_type llama --template dummy --tuner_type full --torch_dtype float32
            --external_plugins {plugin} --callbacks look forvalue
            --dataset {folder / "train.jsonl"} --val_dataset {folder / "clean.jsonl"} --split_dataset_ratio 0
            --columns {{"prompt":"query","completion":"response"}} --dataset_shuffle false --val_dataset_shuffle false
            --max_length 256 --output_dir {out} --add_version false --per_device_train_batch_size 4
            --gradient_accumulation_steps 1 --num_train_epochs 1 --learning_rate 0.001 --logging_steps 1
            --save_strategy no --eval_strategy no --report_to none --use_cpu true --fp16 false --bf16 false
            --load_from_cache_file false"""
        sft_main([*given.split(), *more])
        return out, made["train"], made["clean"]

    yield "rows", lambda: run(plugin), KEPT
    yield "packing", lambda: run(itself, "--packing", "true"), None


def lightning(folder: Path) -> Iterator[Way]:
    import torch
    from datasets import load_dataset
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    from forvalue_callbacks import ForValueConfig
    from forvalue_callbacks.integrations.lightning import ForValue

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def tokenized(row: dict[str, str]) -> dict[str, list[int]]:
        prompt, answer = (
            tokenizer(row[name], add_special_tokens=False).input_ids for name in ("prompt", "completion")
        )
        answer = [*answer, tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def rows(name: str) -> Any:
        return load_dataset("json", data_files=str(folder / f"{name}.jsonl"), split="train").map(
            tokenized, remove_columns=["prompt", "completion"]
        )

    class Module(LightningModule):
        def __init__(self, workers: int):
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
            self.workers = workers

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-3)

        def train_dataloader(self) -> Any:
            collate = DataCollatorForSeq2Seq(tokenizer)
            options = {"num_workers": self.workers, "shuffle": True}
            return DataLoader(rows("train"), batch_size=4, collate_fn=collate, **options)

    def run(workers: int, reload: int) -> Run:
        callback = ForValue(
            rows("clean"), POLICY, ForValueConfig(method=METHOD), path=folder / "forvalue_scores.parquet"
        )
        options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 2}
        trainer = Trainer(**options, reload_dataloaders_every_n_epochs=reload, callbacks=[callback])
        trainer.fit(Module(workers).train())
        return folder, list(rows("train")), list(rows("clean"))

    yield "one loader", lambda: run(0, 0), 2 * N
    yield "reloaded", lambda: run(0, 1), 2 * N
    yield "workers", lambda: run(2, 0), 2 * N


INSIDE = {"axolotl": axolotl, "llamafactory": llamafactory, "ms-swift": swift, "lightning": lightning}


def outcome(way: Callable[[], Run], noisy: list[bool], n_trained: int | None) -> tuple[bool, str]:
    """Whether a way of training keeps what it promises, and what came out."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from forvalue_callbacks import ForValueConfig, ForValueScorer, ForValueScores
    from forvalue_callbacks.policies import as_policy

    with watched() as batches:
        folder, rows, validation = way()
    scores = ForValueScores.load(folder / "forvalue_scores.parquet")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    want = ForValueScorer(model, validation, ForValueConfig(method=METHOD), progress=False).score(rows).values
    apart = float(np.abs(scores.values - want).max() / np.abs(want).max())
    kept = as_policy(POLICY)(scores.values) > 0
    there = np.array(holds(batches, [list(row["input_ids"]) for row in rows]))
    caught = int((np.array(noisy) & ~kept).sum())
    found = f"{(~kept).sum()} of {len(rows)} rows dropped, {caught} of {sum(noisy)} noisy ones among them; "
    packs = "packs" if n_trained is None else "rows"
    found += f"trained on {len(batches)} {packs}, {there[kept].sum()} of {kept.sum()} kept and {there[~kept].sum()} "
    found += "dropped ones in them; "
    found += f"scores within {apart:.0e} of ForValueScorer's"
    right = len(rows) == N and caught > sum(noisy) / 2 and (there == kept).all() and apart < 1e-6
    return bool(right and n_trained in (None, len(batches))), found


def refused(way: Callable[[], Any], why: str) -> tuple[bool, str]:
    """Whether a way of training is refused for a reason, and what is said."""
    try:
        way()
    except (Exception, SystemExit) as error:
        return why in str(error), f"refused: {' '.join(str(error).split())[:100]}"
    return False, "not refused"


def main() -> int:
    # LLaMA-Factory refuses newer versions than it was tried with; nothing is to be fetched, or told.
    env = {"DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    framework = chosen_here(__file__, "framework", INSIDE, env)
    failed, results = 0, []
    with tempfile.TemporaryDirectory() as name:
        noisy = write(Path(name))
        for way, run, n_trained in INSIDE[framework](Path(name)):
            try:
                right, text = refused(run, n_trained) if isinstance(n_trained, str) else outcome(run, noisy, n_trained)
            except Exception as error:
                traceback.print_exc()
                right, text = False, f"{type(error).__name__}: {error}"
            failed += not right
            results.append(f"{way:16s} {'' if right else 'WRONG: '}{text}")
    names = [framework, "transformers", "datasets", "torch"]
    print(", ".join(f"{name} {version(name)}" for name in names))
    print("\n".join(results), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
