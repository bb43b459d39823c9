"""Cards and the hub, by the command."""

import shlex
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from forvalue_callbacks.cli import main
from helpers.cli import FAST, M, N, failed, files, rows_of, select
from helpers.hub import is_private, standing_in


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    with standing_in(monkeypatch) as server:
        yield server


def test_a_card_says_what_scored_what_and_how_to_do_it_again(capsys):
    arguments = [*files(), *FAST, "--out", "there/kept.jsonl"]
    assert select(*arguments) == 0
    assert not Path("there/README.md").exists()
    assert select(*arguments, "--card", "true") == 0
    assert f"card        {Path('there/README.md')}" in capsys.readouterr().out
    text = Path("there/README.md").read_text()
    card = DatasetCard(text)
    assert [config["data_files"] for config in card.data.to_dict()["configs"]] == ["kept.jsonl", "kept.dropped.jsonl"]
    for line in ("| data | pairs.jsonl |", "| validation | trusted_pairs.jsonl |", "| policy | drop:0.25 |",
                 "| kept.jsonl | 18 rows |", "| kept.dropped.jsonl | 6 rows |"):  # fmt: skip
        assert line in text.splitlines()
    (command,) = [line for line in text.splitlines() if line.startswith("forvalue select ")]
    before = {path.name: path.read_bytes() for path in Path("there").iterdir() if path.suffix != ".yaml"}
    for path in Path("there").iterdir():
        path.unlink()
    assert main(shlex.split(command)[1:]) == 0
    assert {path.name: path.read_bytes() for path in Path("there").iterdir() if path.suffix != ".yaml"} == before


@pytest.mark.parametrize(("name", "out"), [("pairs.jsonl", "kept.jsonl"), ("saved", "kept")])
def test_a_folder_with_a_card_is_loaded_by_it(name, out, capsys):
    assert select(*files(name), *FAST, "--out", f"there/{out}", "--card", "true") == 0
    for config, n in (("kept", 18), ("kept.dropped", 6)):
        rows = load_dataset("there", config, split="train", cache_dir="cache")
        suffix = Path(out).suffix
        assert rows.to_list() == rows_of(f"there/{config}{suffix}")
        assert len(rows) == n


def test_a_readme_of_somebody_else_stays(capsys):
    Path("README.md").write_text("# My project\n")
    given = [*files(), *FAST, "--out", "kept.jsonl", "--overwrite", "true"]
    for more in (["--card", "true"], ["--push-to-hub", "me/rows"]):
        said = failed(capsys, 1, "select", *given, *more)
        assert "README.md is no card of forvalue and stays: give --out a folder of its own" in said
    assert Path("README.md").read_text() == "# My project\n"
    assert not Path("kept.jsonl").exists()


@pytest.mark.parametrize("private", [True, False])
def test_the_result_goes_to_the_hub_and_no_other_file_does(private, hub, capsys):
    given = [*files(), *FAST, "--out", "kept.jsonl", "--report", "look/report.html", "--push-to-hub", "me/rows"]
    Path(".env").write_text("secret")
    assert select(*given, *([] if private else ["--private", "false"])) == 0
    assert f"hub         {hub.url}/datasets/me/rows" in capsys.readouterr().out
    names = ["README.md", "kept.dropped.jsonl", "kept.dropped.reasons.jsonl", "kept.jsonl"]
    assert sorted(hub.files) == [*names, "kept.scores.parquet"]
    assert hub.files["kept.jsonl"] == Path("kept.jsonl").read_bytes()
    assert is_private(hub.created) is private
    assert len(rows_of("kept.jsonl")) < N + M


def test_a_hub_that_refuses_leaves_the_result(hub, capsys):
    hub.refuses = True
    given = [*files(), *FAST, "--out", "kept.jsonl", "--push-to-hub", "me/rows"]
    assert "cannot be pushed to me/rows" in failed(capsys, 1, "select", *given)
    assert len(rows_of("kept.jsonl")) == 18
    assert Path("README.md").is_file()
