"""Disks that are full, folders that go or that nobody may write to, other things in the place of files, two processes
at once: an error before the work or at once that names the file, and what was there stays whole."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from forvalue_callbacks import ForValueCallback, ForValueConfig, ForValueScorer, prefilter
from forvalue_callbacks.cli import main
from forvalue_callbacks.data import reader
from helpers.attacks import Child, befalling, contents, disk, fill, read_only
from helpers.cli import FAST, MODEL, files
from helpers.models import build_model, build_rows
from helpers.trainers import make_trainer

IS_LONG = os.environ.get("ATTACK", "1") != "1"
FILE, VALIDATION, ROWS = "scores.parquet", build_rows(6, seed=2), build_rows(32, seed=1)


class CommandError(Exception):
    """The command has ended with 1 and this text."""


# ---- work that writes to a folder, on some rows or on one less ----


def score(folder, n=32):
    config = ForValueConfig(direction_cache=str(folder / "states"))
    ForValueScorer(build_model(), VALIDATION, config, progress=False).score(ROWS[:n], folder / FILE)


def pairs(folder, n=32):
    ForValueScorer(build_model(), VALIDATION, progress=False).pairwise(ROWS[:n], folder / "pairs.npy")


def select(folder, n=32, name="pairs.jsonl", *more):
    """The command; raises `CommandError` in the place of its exit code 1, and KeyboardInterrupt in that of 130."""
    arguments = [*files(name, n=n), *FAST, "--out", str(folder / f"kept{Path(name).suffix}"), "--overwrite", "true"]
    code = main(["select", *arguments, "--card", "true", *more])
    if code == 130:
        raise KeyboardInterrupt
    assert code in (0, 1)
    if code:
        raise CommandError


def select_folder(folder, n=32):
    select(folder, n, "saved")


WORK = {"score": score, "pairs": pairs, "select": select, "select, a folder": select_folder}
if not IS_LONG:  # slow
    del WORK["select, a folder"]


@pytest.fixture(scope="module")
def the_folder(tmp_path_factory):
    """One for all tests: some files name it."""
    return tmp_path_factory.mktemp("disks") / "run"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch, the_folder):
    monkeypatch.setattr("forvalue_callbacks.data.reader.WINDOW", 8)
    monkeypatch.chdir(the_folder.parent)


@pytest.fixture
def folder(the_folder):
    shutil.rmtree(the_folder, ignore_errors=True)
    the_folder.mkdir()
    return the_folder


@pytest.fixture(scope="module")
def expected(the_folder):
    """What each piece of work leaves on 31 rows, and then on 32; and how often it changes files then."""
    kept = {}

    def made(what):
        folder = the_folder
        if what not in kept:
            WORK[what](folder, 31)
            old = contents(folder)
            with befalling(folder, None, None) as changes:
                WORK[what](folder)
            kept[what] = old, contents(folder), len(changes)
            lay({}, folder)
        return kept[what]

    return made


def lay(found, folder):
    """Puts contents into a folder in the place of all that is there."""
    for path in list(folder.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in sorted(found):
        if found[name] is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(found[name])


def assert_old_or_new(folder, old, new):
    found = contents(folder)
    for name in old:
        assert name in found, f"{name} is gone"
        assert found[name] in (old[name], new[name]), f"{name} is not whole"
    assert not [name for name in found if ".forvalue-" in name], sorted(found)


def assert_named(error, said, folder):
    """An error of a disk names a file of ours in its message."""
    text = said if isinstance(error, CommandError) else str(error)
    assert isinstance(error, (OSError, ValueError, CommandError)), repr(error)
    assert str(folder) in text, text


# ---- between two changes of files ----


def full(event, path):
    if event in ("open", "os.mkdir", "os.truncate"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def interrupted(event, path):
    raise KeyboardInterrupt


@pytest.mark.parametrize("befalls", ["full", "interrupted", "removed"])
@pytest.mark.parametrize("what", WORK)
def test_what_befalls_at_any_moment(what, befalls, expected, folder, capsys):
    """The disk is full for a moment, Ctrl-C, the folder goes: old files are whole, and done again it is as if nothing
    had been. ATTACK=20 does so ten times."""
    old, new, n_changes = expected(what)
    happens = {"full": full, "interrupted": interrupted, "removed": lambda *_: shutil.rmtree(folder)}[befalls]
    draw = random.Random(f"{what} {befalls}")
    for at in draw.sample(range(1, n_changes + 1), 10 if IS_LONG else 1):
        lay(old, folder)
        capsys.readouterr()
        try:
            with befalling(folder, at, happens) as changes:
                WORK[what](folder)
        except (OSError, ValueError, CommandError) as error:
            assert befalls != "interrupted"
            assert_named(error, capsys.readouterr().err, folder)
        except KeyboardInterrupt:
            assert befalls == "interrupted"
        if befalls == "full":
            assert_old_or_new(folder, old, new)
        elif befalls == "interrupted":
            assert all(name in contents(folder) for name in old), changes[-3:]
        folder.mkdir(exist_ok=True)
        WORK[what](folder)
        found = contents(folder)
        assert found.keys() == new.keys(), changes[-3:]
        assert found == new


# ---- a disk that is full ----


@pytest.mark.parametrize("what", WORK)
def test_a_full_disk(what, expected, folder, capsys):
    """Of any room that is left: an error that names a file, or all is well; then room is made, and all is well."""
    with disk(folder, 2**20) as small:
        if small is None:
            pytest.skip("only root may have a disk of its own; tests/test_store.py limits the size of files instead")
        old, new, _ = expected(what)
        rooms, failed = range(0, 120_000, 8192), 0
        for room in rooms if IS_LONG else random.Random(what).sample(rooms, 1):
            lay(old, folder)
            ballast = fill(folder, room)
            capsys.readouterr()
            try:
                WORK[what](folder)
            except (OSError, ValueError, CommandError) as error:
                failed += 1
                assert_named(error, capsys.readouterr().err, folder)
            ballast.unlink()
            assert_old_or_new(folder, old, new)
            WORK[what](folder)
            assert contents(folder) == new
        print(f"{what}: {failed} full disks")
        assert failed or not IS_LONG


def test_no_room_for_temporary_files_is_an_error_that_names_their_folder(folder, monkeypatch, capsys):
    small = folder.parent / "small"
    with disk(small, 2**16) as there:
        if there is None:
            pytest.skip("only root may have a disk of its own")
        fill(small, 0)
        monkeypatch.setattr("tempfile.tempdir", str(small))
        with pytest.raises(CommandError):
            select(folder)
        assert "No space left on device" in (said := capsys.readouterr().err)
        assert str(small) in said


# ---- folders that nobody may write to, and other things in the place of files ----


def train(folder):
    make_trainer(folder, [ForValueCallback(VALIDATION, verbose=False)], max_steps=1).train()


def filtered(folder):
    prefilter(make_trainer(folder), VALIDATION, verbose=False)


@pytest.fixture
def no_work(monkeypatch):
    """No row may be scored."""
    monkeypatch.setattr("forvalue_callbacks.model.run.Run.windows", lambda *args, **options: pytest.fail("scored"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("what", ["score", "pairs", "select", "train", "prefilter"])
def test_a_folder_that_nobody_may_write_to_is_refused_before_the_work(what, folder, capsys):
    work = {**WORK, "train": train, "prefilter": filtered}[what]
    with read_only(folder), pytest.raises((ValueError, CommandError)) as raised:
        work(folder)
    said = capsys.readouterr().err if what == "select" else str(raised.value)
    assert f"nothing can be written to the folder {folder}" in said
    assert "(Permission denied): choose another" in said
    assert contents(folder) == {}


@pytest.mark.usefixtures("no_work")
def test_every_file_of_a_result_is_tried_out_before_the_work(folder, capsys):
    there = folder / "there"
    there.mkdir()
    for flag in ("--dropped", "--scores", "--report"):
        with read_only(there), pytest.raises(CommandError):
            select(folder, 32, "pairs.jsonl", flag, str(there / f"file{'.jsonl' * (flag == '--dropped')}"))
        assert f"nothing can be written to the folder {there}" in capsys.readouterr().err
    assert contents(folder) == {"there": None}
    there.rmdir()
    for name in ("kept.jsonl", "kept.dropped.jsonl", "kept.dropped.reasons.jsonl", "kept.scores.parquet", "README.md",
                 "kept.run.yaml", "report.html"):  # fmt: skip
        (folder / name / "mine").mkdir(parents=True)
        with pytest.raises(CommandError):
            select(folder, 32, "pairs.jsonl", "--report", str(folder / "report.html"))
        assert f"{folder / name} is " in capsys.readouterr().err
        assert contents(folder) == {name: None, f"{name}/mine": None}
        shutil.rmtree(folder / name)


@pytest.mark.usefixtures("no_work")
def test_a_folder_of_something_else_is_never_replaced_by_rows(folder, capsys):
    (folder / "kept" / "mine").mkdir(parents=True)
    with pytest.raises(CommandError):
        select(folder, 32, "saved")
    assert f"{folder / 'kept'} is a folder of something else than rows, and stays" in capsys.readouterr().err
    assert contents(folder) == {"kept": None, "kept/mine": None}


@pytest.mark.parametrize("place", ["loop", "nowhere/below", "file/below", "\0"])
def test_a_path_that_can_be_none_is_refused_before_the_work(place, folder, no_work, capsys):
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "nowhere").symlink_to(folder / "gone" / "gone")
    (folder / "file").write_text("mine")
    before = contents(folder)
    for work in (score, pairs, select):
        with pytest.raises((OSError, ValueError, CommandError)) as raised:
            work(folder / place)
        said = capsys.readouterr().err if work is select else str(raised.value)
        assert place in said or "null byte" in said or "cannot be printed" in said, said
    assert contents(folder) == before


# ---- symbolic links ----


def test_links_lead_to_folders_and_are_replaced_by_files(folder, capsys):
    """A folder may be a link; a file that is one is replaced, and what it leads to stays."""
    real, elsewhere = folder / "real", folder / "elsewhere"
    real.mkdir()
    elsewhere.write_text("mine")
    (folder / "link").symlink_to(real)
    for work, name in ((score, FILE), (pairs, "pairs.npy"), (select, "kept.dropped.jsonl")):
        (real / name).symlink_to(elsewhere)
        work(folder / "link")
        assert (real / name).is_file()
        assert not (real / name).is_symlink()
    assert elsewhere.read_text() == "mine"
    assert (folder / "link").is_symlink()
    assert not [path for path in real.iterdir() if path.name.startswith(".") or path.suffix in (".parts", ".partial")]
    files("pairs.jsonl", n=32)
    Path("pairs_link.jsonl").symlink_to("pairs.jsonl")
    rows = Path("pairs.jsonl").read_bytes()
    with pytest.raises(CommandError):
        select(folder, 32, "pairs.jsonl", "--dropped", str(Path("pairs_link.jsonl").absolute()))
    assert "pairs_link.jsonl is what is read" in capsys.readouterr().err
    Path("pairs_link.jsonl").unlink()
    assert Path("pairs.jsonl").read_bytes() == rows


# ---- two processes at once, with one process id, as on two machines that share a folder ----


def chosen(policy):
    def work(folder):
        arguments = ["pairs.jsonl", "--validation", "trusted_pairs.jsonl", *MODEL, "--method", "gradient"]
        return main(["select", *arguments, "--policy", policy, "--out", str(folder / "kept.jsonl")])

    return work


def said_by(work, folder, log):
    """Makes an error the exit code 1, and writes what is said to a log."""

    def says():
        os.getpid = lambda: 7
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            return work(folder)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1

    return says


def both(name, works, root, n_times):
    """Does two pieces of work at once, again and again; how often one was refused, and how often neither was."""
    refused, folder, wholes = 0, root / name, []
    for work in works:
        folder.mkdir()
        assert Child(said_by(work, folder, root / "log"), folder).wait() == 0, (root / "log").read_text()
        wholes.append(contents(folder))
        shutil.rmtree(folder)
    for _ in range(n_times):
        folder.mkdir()
        logs = [root / "log0", root / "log1"]
        children = [Child(said_by(work, folder, log), folder) for work, log in zip(works, logs, strict=True)]
        ends = [child.wait() for child in children]
        for status, log in zip(ends, logs, strict=True):
            said = log.read_text()
            assert status == 0 or ("another process is writing" in said and str(folder) in said), said
        assert 0 in ends
        refused += ends != [0, 0]
        assert contents(folder) in wholes, sorted(contents(folder))
        assert not list(Path(tempfile.gettempdir()).glob("forvalue-*"))
        shutil.rmtree(folder)
    return {"refused": refused, "both ended": n_times - refused}


def cached(folder):
    """Without a file for the scores: a cache in one folder, parts among the system's temporary files."""
    config = ForValueConfig(direction_cache=str(folder / "states"))
    ForValueScorer(build_model(), VALIDATION, config, progress=False).score(ROWS)


AT_ONCE = {
    "store": (score, score),
    "pairs file": (pairs, pairs),
    "cache": (cached, cached),
    "output folder": (chosen("drop:0.25"), chosen("drop:0.5")),
}


def at_once(root, n_times):
    """Prints what `both` has seen of each pair."""
    os.chdir(root)
    torch.set_num_threads(1)
    reader.WINDOW = 4
    files("pairs.jsonl", n=32)
    tempfile.tempdir = str(root / "tmp")
    os.mkdir(tempfile.tempdir)
    print(json.dumps({name: both(name, works, root, n_times) for name, works in AT_ONCE.items()}))


def test_two_processes_at_once_never_mix_what_they_write(tmp_path):
    """One is refused by name, or both end; what lies there is what one of them alone leaves."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, __file__, str(tmp_path), "20" if IS_LONG else "2"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print("\n".join(f"{name}: {what}" for name, what in found.items()))
    assert found.keys() == AT_ONCE.keys()
    assert sum(one["refused"] for one in found.values())
    assert found["cache"]["refused"] == 0


@pytest.mark.skipif(not IS_LONG, reason="a round of it takes minutes: ATTACK=20")
def test_a_soak_ends_with_nothing_wrong():
    script = Path(__file__).with_name("soak.py")
    done = subprocess.run([sys.executable, str(script), "--minutes", "0.1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "'wrong': 0" in done.stdout.splitlines()[-1]


if __name__ == "__main__":
    at_once(Path(sys.argv[1]), int(sys.argv[2]))
