"""What a scorer and a trainer keep on disk: killed, begun with something else, on a disk that is full."""

import json
import os
import subprocess
import sys

import pytest

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.scores.pairs import PairsFile
from forvalue_callbacks.scores.writer import ScoreWriter
from helpers.models import build_model, build_rows

WINDOW = 8
ROWS, VALIDATION = build_rows(5 * WINDOW + 3, seed=1), build_rows(6, seed=2)
FILE = "forvalue_scores.parquet"
STARTS = list(range(0, len(ROWS), WINDOW))


@pytest.fixture
def written(monkeypatch):
    """First rows of the windows that are written, in windows that are small."""
    monkeypatch.setattr("forvalue_callbacks.data.reader.WINDOW", WINDOW)
    starts = []
    for kind in (ScoreWriter, PairsFile):

        def write_and_note(self, start, *what, write=kind.write):
            write(self, start, *what)
            starts.append(start)

        monkeypatch.setattr(kind, "write", write_and_note)
    return starts


def scorer(validation=VALIDATION, seed=0, **config):
    return ForValueScorer(build_model(seed=seed), validation, ForValueConfig(**config), progress=False)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """As sudden as can be had without a process of its own."""


def stop_before(monkeypatch, kind, name, n=0):
    """Ends the run at the call number n, once."""
    method, calls = getattr(kind, name), iter(range(n + 1))

    def stop(*args, **options):
        if next(calls, None) == n:
            raise Killed
        return method(*args, **options)

    monkeypatch.setattr(kind, name, stop)


def half_done(monkeypatch, tmp_path, score, kind=ScoreWriter, n=3):
    """Leaves what a run that has written three windows leaves."""
    with monkeypatch.context() as patch:
        stop_before(patch, kind, "write", n)
        with pytest.raises(Killed):
            score()


# ---- killed, and started again ----

# Each piece of work in a child of this process, which has imported everything, and kills some of them.
KILLED = """
import json, os, random, shutil, signal, sys, time, torch
from pathlib import Path
from forvalue_callbacks import ForValueCallback, ForValueConfig, ForValueScorer, prefilter
from forvalue_callbacks.data import reader
from forvalue_callbacks.scores.pairs import PairsFile
from forvalue_callbacks.scores.writer import ScoreWriter
from helpers.answers import answered, rows_of
from helpers.models import build_model, build_rows
from helpers.trainers import make_trainer

torch.set_num_threads(1)
reader.WINDOW = 4
VALIDATION, FILE = build_rows(6, seed=2), "forvalue_scores.parquet"

def note_windows(log):
    for kind in (ScoreWriter, PairsFile):
        def write_and_note(self, start, *what, write=kind.write):
            write(self, start, *what)
            with open(log, "a") as file:
                file.write(f"{start}\\n")
        kind.write = write_and_note

def score(method, rows, validation):
    def work(folder):
        config = ForValueConfig(method=method)
        ForValueScorer(build_model(), validation, config, progress=False).score(rows, folder / FILE)
    return work

def pairs(folder):
    ForValueScorer(build_model(), VALIDATION, progress=False).pairwise(build_rows(32, seed=1), folder / "pairs.npy")

def train(folder):
    make_trainer(folder, [ForValueCallback(VALIDATION, verbose=False)], max_steps=2).train()

def filtered(folder):
    prefilter(make_trainer(folder), VALIDATION, verbose=False)

WORK = {
    "gradient": score("gradient", build_rows(32, seed=1), VALIDATION),
    "label_model": score("label_model", rows_of(32, 1, noise=0.2)[0], rows_of(40, 0)[0]),
    "auto": score("auto", answered(32, 1), answered(42, 0)),
    "pairs": pairs,
    "callback": train,
    "prefilter": filtered,
}

def begin(work, folder, log):
    child = os.fork()
    if child:
        return child
    try:
        note_windows(log)
        work(folder)
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
    os._exit(1)

def starts(log):
    return log.read_text().split() if log.exists() else []

def killed(name, n_kills, root):
    draw, work = random.Random(name), WORK[name]
    whole, log = root / "whole", root / "log"
    whole.mkdir(parents=True)
    began = time.monotonic()
    child = begin(work, whole, log)
    assert os.waitpid(child, 0)[1] == 0
    seconds, windows = time.monotonic() - began, sorted(starts(log))
    log.unlink()
    n, rounds, resumed = 0, 0, 0
    while n < n_kills or rounds == 0:
        folder = root / str(rounds)
        folder.mkdir()
        while True:
            if name != "callback" and any((folder / file).exists() for file in (FILE, "pairs.npy")):
                log.unlink(missing_ok=True)  # all was done but for the last touches; it is made again when asked for
            resumed += bool(starts(log))
            child = begin(work, folder, log)
            if n < n_kills:
                time.sleep(draw.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL), status
            n += status != 0
            if status == 0:
                break
        assert sorted(starts(log)) == windows, (starts(log), windows)
        for file in whole.iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name
        assert sorted(os.listdir(folder)) == sorted(os.listdir(whole)), os.listdir(folder)
        log.unlink()
        rounds += 1
    found = {"kills": n, "ended": rounds, "went on": resumed, "windows": len(windows)}
    return {**found, "files": sorted(os.listdir(whole))}

root = Path(sys.argv[1])
print(json.dumps({name: killed(name, int(sys.argv[2]), root / name) for name in WORK}))
"""


def test_whatever_is_killed_at_any_moment_goes_on_and_ends_the_same(tmp_path):
    """Bit for bit, no window written twice, nothing left over. KILLS=20 for more."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), os.environ.get("KILLS", "3")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    files = {name: ["pairs.npy"] if name == "pairs" else [FILE] for name in found}
    assert {name: one["files"] for name, one in found.items()} == files
    assert all(one["kills"] >= 3 and one["windows"] >= 6 for one in found.values())
