"""The command stopped and given again: what is left, what is used again, and what is refused."""

import errno
import os
from pathlib import Path

import pytest

from forvalue_callbacks import ForValueScores
from helpers.cli import FAST, N, failed, files, pairs, rows_of, select, write


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- scores that are there ----


def test_scores_are_used_again_or_refused_by_name(capsys):
    arguments = [*files(), *FAST, "--out", "kept.jsonl"]
    assert select(*arguments) == 0
    assert "scored in" in capsys.readouterr().out
    assert select(*arguments, "--policy", "drop:0.5") == 0
    assert "with the scores made before" in capsys.readouterr().out
    assert len(rows_of("kept.jsonl")) == N // 2
    for change, what in (
        (["--method", "whitened"], "other settings"),
        (["--max-length", "100"], "other settings"),
        (["--validation", "few.jsonl"], "other validation rows"),
        (["--data", "more.jsonl"], "other training rows"),
    ):
        write("few.jsonl", rows_of("trusted_pairs.jsonl")[:5])
        write("more.jsonl", [*rows_of("pairs.jsonl"), *pairs(1, 5)])
        given = arguments[1:] if "--data" in change else arguments
        said = failed(capsys, 1, "select", *given, *change)
        assert f"the scores in kept.scores.parquet was made with {what}" in said, said
        assert "--overwrite true" in said
    assert select(*arguments, "--method", "whitened", "--overwrite", "true") == 0
    assert ForValueScores.load("kept.scores.parquet").metadata["config"]["method"] == "whitened"


# A disk that fills, and Ctrl-C, while rows are scored: small windows, one part each.
@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr("forvalue_callbacks.data.reader.WINDOW", 8)


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("why", ["disk full", "interrupted"])
def test_what_is_done_is_kept(why, monkeypatch, capsys):
    from forvalue_callbacks.scores.writer import ScoreWriter

    arguments = [*files(), *FAST, "--out", "kept.jsonl"]
    assert select(*arguments) == 0
    expected = {path.name: path.read_bytes() for path in Path().glob("kept.*") if path.suffix != ".yaml"}
    for name in expected:
        Path(name).unlink()
    real, error = ScoreWriter.write, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written = []

    def write_two(self, start, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt if why == "interrupted" else error
        written.append(start)
        real(self, start, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreWriter, "write", write_two)
        if why == "interrupted":
            assert "interrupted: what has been scored is kept, the same command goes on" in failed(
                capsys, 130, "select", *arguments
            )
        else:
            said = failed(capsys, 1, "select", *arguments)
            assert "No space left on device" in said
            assert "Make room and give the same command again" in said
    assert not Path("kept.jsonl").exists()
    assert len(list(Path("kept.scores.parquet.parts").glob("part-*"))) == 2
    said = failed(capsys, 1, "select", *arguments, "--method", "whitened")
    assert "what is in kept.scores.parquet.parts was made with other settings" in said
    read = []
    monkeypatch.setattr(
        ScoreWriter, "write", lambda self, start, *rest: (read.append(start), real(self, start, *rest))
    )
    assert select(*arguments) == 0
    assert read == [16], "the third window alone"
    assert {name: Path(name).read_bytes() for name in expected} == expected
    assert not Path("kept.scores.parquet.parts").exists()


@pytest.mark.usefixtures("windows")
def test_a_full_disk_leaves_no_half_of_a_file(monkeypatch, capsys):
    from forvalue_callbacks.data.files import JsonLines

    arguments = [*files(), *FAST, "--out", "kept.jsonl"]

    def half(self, path, rows, changed=None):
        path.write_bytes(b'{"half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", half)
        assert "kept.dropped.jsonl" in failed(capsys, 1, "select", *arguments)
    assert not Path("kept.jsonl").exists()
    assert not Path("kept.dropped.jsonl").exists()
    assert not [path for path in Path().iterdir() if path.name.startswith(".forvalue-")]
    assert select(*arguments) == 0
    assert "with the scores made before" in capsys.readouterr().out


@pytest.mark.usefixtures("windows")
def test_parts_beside_scores_that_are_whole_go(monkeypatch):
    """A kill between writing the one and removing the others leaves both."""
    from forvalue_callbacks.scores.writer import ScoreWriter

    arguments = [*files(), *FAST, "--out", "kept.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(ScoreWriter, "remove", lambda self: self.close())
        patch.setattr("forvalue_callbacks.cli.scoring.remove_parts", lambda path: None)
        assert select(*arguments) == 0
    assert Path("kept.scores.parquet.parts").is_dir()
    assert select(*arguments) == 0
    assert not Path("kept.scores.parquet.parts").exists()
