"""What is written down runs: README blocks, examples, recipes."""

import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from trl import TrlParser

from forvalue_callbacks.methods import METHODS

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RECIPES = {
    "benchmark_memory": ["--rows", "40", "--methods", "gradient", "--output_dir", "out"],
    "benchmark_speed": ["--shape", "tiny", "--rows", "2", "--length", "8", "--validation_rows", "2", "--repeats", "1"],
    "compare_influence_cost": [
        *("--shapes", "tiny", "qwen2.5-7b", "--rows", "6", "--validation_rows", "2", "--length", "8"),
        *("--repeats", "1", "--epochs", "1", "--output", "out/cost.md"),
    ],
    "demo": ["--rows", "40", "--epochs", "0.1", "--output_dir", "out"],
    "find_mislabels": [
        *("--train_rows", "120", "--validation_rows", "90", "--seeds", "1", "--shares", "0.3", "--output_dir", "out")
    ],
    "prefilter_sft": ["--max_train_rows", "40", "--max_steps", "2", "--output_dir", "out"],
    "reweight_sft": ["--max_train_rows", "40", "--max_steps", "2", "--output_dir", "out"],
    "swapped_pairs": ["--train_rows", "40", "--validation_rows", "40", "--seeds", "2"],
    "targeted_selection": [
        *("--mixtures", "unnamed", "--train_per_task", "10", "--validation_per_task", "4", "--seeds", "2")
    ],
}
# Run by tests of their own.
ELSEWHERE = {"pretrain_tiny", "compare_influence", "compare_vlm", "sft_outcomes"}
# Modules that recipes share, not scripts.
SHARED = {"data", "sft", "influence_comparison", "influence_report", "influence_tasks", "real_errors"}
SHARED |= {"counting", "shapes", "vlm_tasks", "outcomes", "outcome_report"}


def test_every_recipe_is_known_here():
    found = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert found == set(RECIPES) | (ELSEWHERE & found) | (SHARED & found)
    assert set(RECIPES) <= found
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"recipes/{path.name}" in path.read_text().splitlines()[0], (
            "a config names its command in its first line"
        )
        assert path.with_suffix(".py").is_file()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_take_two_steps(name, tmp_path, monkeypatch, capsys):
    config = ROOT / "recipes" / f"{name}.yaml"
    arguments = (["--config", str(config)] if config.is_file() else []) + RECIPES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    if name == "compare_influence_cost":
        table = Path("out/cost.md").read_text()
        assert table in out
        assert table.count("| tiny |") == 7
        assert ("| qwen2.5-7b | not run: no accelerator |" in table) != torch.accelerator.is_available()
    if name == "demo":
        assert out.count("\n| ") == 6 + 7, "two tables"
        names = {path.name for path in Path("out").iterdir()}
        assert {"scores_gradient.png", "scores_gradient.parquet", "table.md"} <= names
    if name == "find_mislabels":
        assert out.count("\n| ") == 1 + 6 + 5 + 3 + 11, "methods, other normalisations, cheap rivals, classifiers"
        assert Path("out/auc.png").is_file()
    if name == "swapped_pairs":
        assert out.count("\n| ") == 3
    if name == "targeted_selection":
        cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in out.splitlines() if " | " in line}
        assert len(cells) == 1 + 9 + 1, "a line for each way, and what all could reach"
        kept = {way: float(of_shares[1].split()[0]) for way, of_shares in cells.items() if "cosine" in way}
        assert min(kept.values()) > 0.5, "a tenth of the rows are of the task"
        assert float(cells["| random"][1].split()[0]) < 0.3
    if name in ("prefilter_sft", "reweight_sft"):
        assert {"adapter_model.safetensors", "forvalue_scores.parquet"} <= {
            path.name for path in Path("out").iterdir()
        }
    if name == "prefilter_sft":
        report = json.loads(Path("out/report.json").read_text())
        assert report["rows"] == 40
        assert 20 <= report["kept"] < 40, "a fifth is noisy, and nobody says so"
        assert 0 <= report["auc_clean_against_noisy"] <= 1


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_and_stay_short(path, tmp_path, monkeypatch):
    assert len(path.read_text().splitlines()) < 60
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")


def test_there_are_three_examples():
    assert len(EXAMPLES) == 3


README, INSIDE = ROOT / "README.md", ROOT / "forvalue_callbacks" / "README.md"


def python_block(file):
    (block,) = re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL)
    return block


def test_the_method_shown_is_the_one_in_the_package():
    """All that it shows, but for the notes beside it."""
    shown = python_block(INSIDE)
    source = inspect.getsource(METHODS["whitened"]).splitlines()
    lines = [re.sub(r"\s+# .*", "", line) for line in shown.splitlines()]
    assert [line for line in lines if line and line not in source] == []
    assert len([line for line in source if line and line not in lines]) <= 1, "an assertion for the type checker"


def test_the_readmes_python_runs_as_it_stands(tmp_path):
    """In a process of its own, with nothing put in the place of anything: as somebody pastes it."""
    script = python_block(README)
    assert "bf16" not in script, "TRL's own default"
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = done.stdout + done.stderr
    for said in (
        "scoring 300 rows by 300 validation rows: 2 passes",
        "evidence    on your 300",
        "policy      drop:auto",
    ):
        assert said in seen, said
    assert (tmp_path / "out" / "forvalue_scores.parquet").is_file()


def test_the_readmes_table_of_methods_is_what_the_methods_say():
    readme = README.read_text()
    table = [line for line in readme.split("| method | score of a row |")[1].split("\n\n")[0].splitlines()[2:] if line]
    assert table == [f"| `{method.name}` | {method.help} |" for method in METHODS.values()]


def test_the_tree_names_every_module():
    """Each under its folder; the baselines in one line."""
    block = re.search(r"```\n(forvalue_callbacks/\n.*?)recipes/", INSIDE.read_text(), re.DOTALL)[1]
    named, folders = set(), []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [line.split()[0]]
        named.add("".join(folders))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "forvalue_callbacks").rglob("*.py")}
    modules = {name for name in modules if not name.endswith("__init__.py") and "/baselines/" not in name}
    assert sorted(modules ^ {name for name in named if name.endswith(".py")}) == []


def test_every_setting_has_help():
    from forvalue_callbacks.data.sft import RowConfig
    from forvalue_callbacks.scorer import ForValueConfig

    configs = [ForValueConfig, RowConfig]
    sys.path.insert(0, str(ROOT / "recipes"))
    for path in (ROOT / "recipes").glob("*.py"):
        module = runpy.run_path(str(path), run_name="looked_at")
        here = [c for c in module.values() if isinstance(c, type) and c.__module__ == "looked_at"]
        configs += [c for c in here if is_dataclass(c) and c.__name__.endswith("Config")]
    assert len(configs) > 5
    for config in configs:
        for spec in fields(config):
            assert spec.metadata.get("help"), f"{config.__name__}.{spec.name}"


def test_one_parser_takes_our_config_beside_those_of_trl():
    from trl import ModelConfig, SFTConfig

    from forvalue_callbacks import ForValueConfig

    arguments = [
        "--method",
        "whitened",
        "--output_dir",
        "x",
        "--max_length",
        "7",
        "--model_name_or_path",
        "m",
        "--use_cpu",
    ]
    scoring, training, model = TrlParser((ForValueConfig, SFTConfig, ModelConfig)).parse_args_and_config(arguments)
    assert (scoring.method, training.max_length, model.model_name_or_path) == ("whitened", 7, "m")


def test_the_public_names_are_all_there():
    code = (
        "import forvalue_callbacks as f; print([n for n in f.__all__ if getattr(f, n) is None] or sorted(f.__all__))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    for name in ("ForValueCallback", "ForValueScorer", "ForValueTransform", "prefilter", "Drop"):
        assert name in out


def test_noise_is_put_into_the_rows_that_say_so(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from data import change_words, swap_answers
    from datasets import Dataset

    answers = [" ".join(f"w{i}-{k}" for k in range(1 + i % 5)) for i in range(50)]
    rows = Dataset.from_dict({"prompt": ["p"] * 50, "completion": answers})
    for noisy in (swap_answers(rows, 0.4, 0), change_words(rows, 0.4, 0, True), change_words(rows, 0.4, 0, False)):
        changed = [new != old for new, old in zip(noisy["completion"], answers, strict=True)]
        assert noisy["is_noisy"] == changed
        assert 10 < sum(changed) <= 20, "an answer of one word cannot lose any"

    def more_words(insert):
        changed = change_words(rows, 1.0, 0, insert)["completion"]
        return [len(new.split()) - len(old.split()) for new, old in zip(changed, answers, strict=True)]

    longer, shorter = more_words(True), more_words(False)
    assert min(longer) == 1
    assert max(shorter) == 0 > min(shorter)


def test_free_form_noise_goes_through_the_noise_recipe(tmp_path, monkeypatch, capsys):
    rows = [{"q": f"say {i} and {i + 1}", "a": f"{i} and {i + 1} said"} for i in range(200)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", "rows.json", "--prompt_template", "{q}\\n", "--completion_template", "{a}"]
    arguments += ["--noises", "swapped", "--train_rows", "100", "--validation_rows", "60", "--seeds", "1"]
    arguments += ["--methods", "gradient", "auto", "--rivals", "false", "--output_dir", "out"]
    monkeypatch.setattr(sys, "argv", ["find_mislabels.py", *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    runpy.run_path(str(ROOT / "recipes" / "find_mislabels.py"), run_name="__main__")
    found = dict(re.findall(r"\| (\w+) \| (0\.\d+|1\.0+) ", capsys.readouterr().out))
    assert float(found["auto"]) > 0.9
    assert "gradient" in found
