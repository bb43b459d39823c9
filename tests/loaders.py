"""Do other frameworks take the rows as they are? Files of each form, some lines left out, through their own loaders.

    python tests/loaders.py FRAMEWORK [--python PATH]

with a Python in which the framework is installed (`pip install --no-deps` and what its loader imports do). One line a
form: how many rows came out, and whether what is learnt of each holds its answer. Exits with the number of failures.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from helpers.elsewhere import chosen_here, stand_in

MODEL = Path(__file__).parent.parent / "forvalue_callbacks" / "tiny" / "model"  # for its tokenizer
QUESTIONS = ["what is the sky", "where is the cat", "who sees the dog", "what is blue", "where is tom", "who sings"]
ANSWERS = ["the sky is blue", "the cat is here", "tom sees the dog", "the sky is", "tom is at home", "the bird sings"]
KEPT = [0, 2, 3, 5]
SYSTEM = "be kind"


def chat(question: str, answer: str) -> list[dict[str, str]]:
    roles = ("system", "user", "assistant")
    return [{"role": role, "content": text} for role, text in zip(roles, (SYSTEM, question, answer), strict=True)]


def sharegpt(question: str, answer: str) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "system": SYSTEM}


# Prompts and completions that are messages are TRL's own form: ms-swift reads them wrongly, the others not at all.
FORMS: dict[str, Callable[[str, str], dict[str, object]]] = {
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "sharegpt": sharegpt,
    "messages": lambda q, a: {"messages": chat(q, a)},
    "prompt-completion": lambda q, a: {"prompt": q, "completion": a},
}


def write(folder: Path) -> dict[str, Path]:
    """The kept rows of each form, each line (or element of a list) as it was in the file that held all of them."""
    files = {}
    for form, row in FORMS.items():
        lines = [json.dumps(row(q, a), ensure_ascii=False) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
        kept = [lines[i] for i in KEPT]
        files[form] = folder / f"{form}.jsonl"
        files[form].write_text("\n".join(kept) + "\n")
        files[f"{form}.json"] = folder / f"{form}.json"
        files[f"{form}.json"].write_text("[\n" + ",\n".join(kept) + "\n]\n")
    return files


# ---- what each framework makes of a file: texts of what is learnt, row by row ----


def learnt(rows: Iterator[dict[str, list[int]]], tokenizer: object) -> list[str]:
    return [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in rows]  # type: ignore[attr-defined]


def llamafactory(files: dict[str, Path]) -> Iterator[tuple[str, list[str] | Exception]]:
    stand_in("torchaudio")
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    of_openai = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {
        "alpaca": {},
        "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}},
        "messages": {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {**of_openai, "system_tag": "system"},
        },
        "prompt-completion": {"columns": {"prompt": "prompt", "response": "completion"}},
    }
    folder = next(iter(files.values())).parent
    info = {
        name: {"file_name": path.name, **described[path.stem]}
        for name, path in files.items()
        if path.stem in described
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for name in info:
        given = {"model_name_or_path": str(MODEL), "stage": "sft", "do_train": True, "finetuning_type": "full"}
        given |= {
            "dataset": name,
            "dataset_dir": str(folder),
            "template": "default",
            "output_dir": str(folder / "out"),
        }
        try:
            model, data, training, *_ = get_train_args({**given, "use_cpu": True, "overwrite_cache": True})
            tokenizer = load_tokenizer(model)["tokenizer"]
            template = get_template_and_fix_tokenizer(tokenizer, data)
            made = get_dataset(template, model, data, training, stage="sft", tokenizer=tokenizer)
            yield name, learnt(made["train_dataset"], tokenizer)
        except Exception as error:
            yield name, error


def axolotl(files: dict[str, Path]) -> Iterator[tuple[str, list[str] | Exception]]:
    stand_in("posthog")
    from axolotl.utils.data import prepare_datasets
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    chat_template = {"type": "chat_template", "chat_template": "chatml"}
    from_value = {"message_property_mappings": {"role": "from", "content": "value"}}
    fields = {"field_instruction": "prompt", "field_output": "completion", "format": "{instruction}\n"}
    described = {
        "alpaca": {"type": "alpaca"},
        "sharegpt": {**chat_template, "field_messages": "conversations", **from_value},
        "messages": {**chat_template, "field_messages": "messages"},
        "prompt-completion": {"type": {**fields, "no_input_format": "{instruction}\n"}},
    }
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for name, path in files.items():
        if path.stem not in described:
            continue
        settings = {
            "base_model": str(MODEL),
            "datasets": [{"path": str(path), "ds_type": "json", **described[path.stem]}],
            "dataset_prepared_path": str(path.parent / "prepared" / name),
            "sequence_len": 512,
            "train_on_inputs": False,
            "shuffle_merged_datasets": False,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "batch_size": 1,
            "num_epochs": 1,
            "val_set_size": 0,
            "dataset_num_proc": 1,
            "seed": 0,
        }
        try:
            yield name, learnt(prepare_datasets(DictDefault(settings), tokenizer)[0], tokenizer)
        except Exception as error:
            yield name, error


def swift(files: dict[str, Path]) -> Iterator[tuple[str, list[str] | Exception]]:
    """Rows as its templates get them: the last message is what is learnt."""
    from swift.dataset import load_dataset

    for name, path in files.items():
        try:
            rows, _ = load_dataset([str(path)], num_proc=1, load_from_cache_file=False)
            yield name, [row["messages"][-1]["content"] for row in rows]
        except Exception as error:
            yield name, error


def openrlhf(files: dict[str, Path]) -> Iterator[tuple[str, list[str] | Exception]]:
    """It knows an input and an output by name, or messages."""
    from datasets import load_dataset
    from openrlhf.datasets import SFTDataset
    from transformers import AutoTokenizer

    described = {
        "alpaca": {"input_key": "instruction", "output_key": "output"},
        "messages": {"input_key": "messages", "apply_chat_template": True},
        "prompt-completion": {"input_key": "prompt", "output_key": "completion"},
    }
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    for name, path in files.items():
        if path.stem not in described:
            continue
        try:
            rows = load_dataset("json", data_files=str(path), split="train")
            args = types.SimpleNamespace(data=types.SimpleNamespace(**described[path.stem]))
            strategy = types.SimpleNamespace(args=args)
            made = SFTDataset(rows, tokenizer, 512, strategy, input_template="{}\n", num_processors=1)
            batches = [made[i] for i in range(len(made))]
            yield name, [tokenizer.decode(ids[0, 1:][mask[0, :-1].bool()]) for ids, _, mask in batches]
        except Exception as error:
            yield name, error


INSIDE = {"openrlhf": openrlhf, "llamafactory": llamafactory, "axolotl": axolotl, "ms-swift": swift}


def main() -> int:
    # LLaMA-Factory refuses newer versions than it was tried with; nothing is to be fetched, or told.
    env = {"DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    framework = chosen_here(__file__, "framework", INSIDE, env)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        results = list(INSIDE[framework](write(Path(folder))))
    names = [framework, "transformers", "datasets", "torch"]
    print(", ".join(f"{name} {version(name)}" for name in names))
    for form, found in results:
        if isinstance(found, Exception):
            failed, text = failed + 1, f"{type(found).__name__}: {found}"
        else:
            answers = [ANSWERS[i] for i in KEPT]
            right = len(found) == len(KEPT) and all(a in text for a, text in zip(answers, found, strict=True))
            asked = any(QUESTIONS[i] in text for i, text in zip(KEPT, found, strict=False))
            failed += not right
            text = f"{len(found)} of {len(KEPT)} rows, " + ("each with its answer" if right else f"not: {found}")
            text += ", the questions learnt too" if asked else ""
        print(f"{form:32s} {text}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
