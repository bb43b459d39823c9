"""Files: whole or not at all, and what killed runs have left goes."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from forvalue_callbacks.scores import ForValueScores, files
from forvalue_callbacks.scores.cache import save_state
from forvalue_callbacks.scores.files import (
    hold_folder,
    make_folder,
    release,
    remove_leftovers,
    whole_file,
    whole_folder,
)
from forvalue_callbacks.scores.pairs import PairsFile
from forvalue_callbacks.scores.writer import ScoreWriter
from helpers.attacks import befalling

WRITES = """
import sys, time
from forvalue_callbacks.scores.files import whole_file
with whole_file(sys.argv[1]) as file:
    file.write_text("half")
    print(flush=True)
    sys.stdin.readline()
    file.write_text("whole")
"""


def start_writing(path):
    """Another process that has half written a file, and writes the rest when it is told to."""
    arguments = [sys.executable, "-c", WRITES, str(path)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "\n"
    return process


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_name_when_it_is_whole_and_not_before(tmp_path):
    (tmp_path / "a").write_text("old")
    with whole_file(tmp_path / "a") as file:
        file.write_text("new")
        assert file.parent == tmp_path
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_goes_wrong_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    (tmp_path / "a").write_text("old")

    def break_off():
        with whole_file(tmp_path / "a") as file:
            file.write_text("ne")
            raise error

    with pytest.raises(error):
        break_off()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"), whole_file(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["a", "folder"]
    assert (tmp_path / "a").read_text() == "old"


def test_temporary_names_differ_and_permissions_are_those_of_any_new_file(tmp_path):
    with whole_file(tmp_path / "a") as one, whole_file(tmp_path / "a") as other:
        assert one.name != other.name
        assert str(os.getpid()) not in one.name.split("-")
    (tmp_path / "b").touch()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run" / "a").symlink_to(tmp_path / "elsewhere")
    with whole_file(tmp_path / "run" / "a") as file:
        file.write_text("new")
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert (tmp_path / "run" / "a").read_text() == "new"
    assert not (tmp_path / "run" / "a").is_symlink()


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    (tmp_path / ".forvalue-mine").write_text("not one of ours")
    with start_writing(tmp_path / "a") as killed, start_writing(tmp_path / "b") as writing:
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        assert len(names(tmp_path)) == 3
        remove_leftovers(tmp_path)
        assert len(names(tmp_path)) == 2
        writing.communicate("\n")
    assert writing.returncode == 0
    assert names(tmp_path) == [".forvalue-mine", "b"]
    assert (tmp_path / "b").read_text() == "whole"


def write_folder(path, error=None):
    with whole_folder(path) as folder:
        (folder / "below").mkdir()
        remove_leftovers(path.parent)  # as another process does meanwhile
        (folder / "below" / "a").write_text("new" if error is None else "newer")
        if error is not None:
            raise error


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: ScoreWriter(folder, {}, {}).close(),
        lambda folder: PairsFile(folder / "pairs.npy", 1, 1, {}).close(),
        lambda folder: write_folder(folder / "saved"),
        lambda folder: ForValueScores([], [], [], []).save(folder / "scores.parquet"),
        lambda folder: save_state(folder / "state.safetensors", {"a": np.zeros(1)}),
    ],
)
def test_whatever_writes_removes_what_a_killed_run_left(tmp_path, write):
    (tmp_path / f".forvalue-{'0' * 32}").touch()
    (tmp_path / f".forvalue-{'1' * 32}" / "below").mkdir(parents=True)
    write(tmp_path)
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_a_folder_appears_whole_in_the_place_of_whatever_is_there_or_not_at_all(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    for name in ("new", "new", "link", "file"):
        write_folder(tmp_path / name)
        assert (tmp_path / name / "below" / "a").read_text() == "new"
    for error in (OSError(28, "x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised:
            write_folder(tmp_path / "new", error)
        assert (tmp_path / "new" / "below" / "a").read_text() == "new"
        assert names(tmp_path) == ["elsewhere", "file", "link", "new"]
        assert str(raised.value) in (f"[Errno 28] No space left on device: '{tmp_path}/new'", "")
    assert names(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("how", [whole_file, whole_folder])
def test_what_was_there_is_whole_whatever_befalls_between_two_changes(tmp_path, how):
    """An error or Ctrl-C before any of them, the replacing of the old folder among them."""

    def write(text):
        with how(tmp_path / "a") as new:
            (new if how is whole_file else new / "b").write_text(text)

    def stop(*_):
        raise KeyboardInterrupt

    for at in range(1, 20):
        write("old")
        with contextlib.suppress(KeyboardInterrupt), befalling(tmp_path, at, stop) as changes:
            write("new")
        found = {path.name: path.read_text() for path in tmp_path.glob("a" if how is whole_file else "a/*")}
        assert found in ({path: text} for path in ("a", "b") for text in ("old", "new")), changes
    assert len(changes) < at, "each of them was stopped once"


@pytest.mark.parametrize("write", [whole_file, whole_folder])
def test_an_error_names_the_file_that_was_to_be_written(tmp_path, write):
    file = tmp_path / "gone" / "a"
    with pytest.raises(OSError, match=f"No such file or directory: '{file}'"), write(file):
        pass


def test_a_link_under_one_of_our_names_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run" / f".forvalue-{'0' * 32}").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(tmp_path / "run")
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_where_there_are_no_locks_what_is_a_day_old_is_a_leftover(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    old, new = tmp_path / f".forvalue-{'0' * 32}", tmp_path / f".forvalue-{'1' * 32}"
    for file in (old, new):
        file.touch()
    os.utime(old, (time.time() - 90000,) * 2)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [new.name]
    with whole_file(tmp_path / "a") as file:
        file.write_text("new")
    assert names(tmp_path) == [new.name, "a"]


def test_a_folder_is_made_and_tried_out(tmp_path):
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"nothing can be written to the folder \S+file \(.*choose another"):
        make_folder(tmp_path / "file")


def test_a_folder_that_another_process_removes_before_it_is_held_is_made_again(tmp_path, monkeypatch):
    """Seen where two runs wrote scores to one file at once: the first was done between two calls of the second."""
    removed = []

    def after_it_has_gone(function):
        def call(*args, **kwargs):
            if function not in removed:
                removed.append(function)
                (tmp_path / "parts").rmdir()
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(tempfile, "TemporaryFile", after_it_has_gone(tempfile.TemporaryFile))
    monkeypatch.setattr(files, "open_locked", after_it_has_gone(files.open_locked))
    folder, held = hold_folder(tmp_path / "parts", "lock")
    assert len(removed) == 2
    assert hold_folder(folder, "lock") == (folder, None)
    release(held)
