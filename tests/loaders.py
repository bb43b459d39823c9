"""Do other frameworks take the rows as they are? Files of each form, some lines left out, through their own loaders.

    python tests/loaders.py FRAMEWORK [--python PATH]

with a Python in which the framework is installed (`pip install --no-deps` and what its loader imports do). One line a
form: how many rows came out, and whether what is learnt of each holds its answer. Exits with the number of failures.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

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


FORMS: dict[str, Callable[[str, str], dict[str, object]]] = {
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "sharegpt": sharegpt,
    "messages": lambda q, a: {"messages": chat(q, a)},
    "prompt-completion": lambda q, a: {"prompt": q, "completion": a},
    "prompt-completion-messages": lambda q, a: {"prompt": chat(q, a)[:-1], "completion": chat(q, a)[-1:]},
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


def stand_in(*names: str) -> None:
    """Modules that a loader imports for sound and pictures: not needed for rows of text."""
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module


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
        name: {"file_name": path.name, **described[path.stem]} for name, path in files.items() if path.stem in described
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for name in info:
        given = {"model_name_or_path": str(MODEL), "stage": "sft", "do_train": True, "finetuning_type": "full"}
        given |= {"dataset": name, "dataset_dir": str(folder), "template": "default", "output_dir": str(folder / "out")}
        try:
            model, data, training, *_ = get_train_args({**given, "use_cpu": True, "overwrite_cache": True})
            tokenizer = load_tokenizer(model)["tokenizer"]
            template = get_template_and_fix_tokenizer(tokenizer, data)
            made = get_dataset(template, model, data, training, stage="sft", tokenizer=tokenizer)
            yield name, learnt(made["train_dataset"], tokenizer)
        except Exception as error:
            yield name, error


INSIDE = {"llamafactory": llamafactory}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("framework", choices=INSIDE)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--inside", action="store_true", help="this is the Python of the framework")
    options = parser.parse_args()
    if not options.inside:
        return subprocess.run([options.python, __file__, options.framework, "--inside"], check=False).returncode
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        results = list(INSIDE[options.framework](write(Path(folder))))
    names = [options.framework, "transformers", "datasets", "torch"]
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
