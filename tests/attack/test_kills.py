"""Kill -9 at any moment of whatever writes: done again it ends bit for bit alike, and nothing is left over."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset

from forvalue_callbacks import ForValueCallback, ForValueConfig, ForValueScorer, ForValueTransform, prefilter
from forvalue_callbacks.cli import main
from forvalue_callbacks.data import reader
from forvalue_callbacks.scores.pairs import PairsFile
from forvalue_callbacks.scores.writer import ScoreWriter
from helpers.answers import answered, rows_of
from helpers.attacks import Child, contents
from helpers.cli import FAST, MODEL, files
from helpers.models import build_model, build_rows
from helpers.trainers import make_trainer

IS_LONG = os.environ.get("ATTACK", "1") != "1"
FILE, VALIDATION, ROWS = "forvalue_scores.parquet", build_rows(6, seed=2), build_rows(32, seed=1)


# ---- what is killed: work that writes to a folder ----


def score(method, rows, validation):
    def work(folder):
        config = ForValueConfig(method=method, direction_cache=str(folder / "states"))
        ForValueScorer(build_model(), validation, config, progress=False).score(rows, folder / FILE)

    return work


def pairs(folder):
    ForValueScorer(build_model(), VALIDATION, progress=False).pairwise(ROWS, folder / "pairs.npy")


def train(folder):
    trainer = make_trainer(folder, [ForValueCallback(VALIDATION)], max_steps=2)
    trainer.train()
    (folder / "trained.json").write_text(json.dumps([p.sum().item() for p in trainer.model.parameters()]))


def filtered(folder):
    prefilter(make_trainer(folder), VALIDATION)


def mapped(folder):
    transform = ForValueTransform(build_model(), VALIDATION, ForValueConfig(direction_cache=str(folder / "states")))
    options = {"batched": True, "batch_size": 8, "cache_file_name": str(folder / "mapped.arrow")}
    Dataset.from_list(ROWS).map(transform, **options)


def select(name):
    def work(folder):
        out = folder / f"kept{Path(name).suffix}"
        arguments = [name, "--validation", f"trusted_{name}", *MODEL, *FAST, "--out", str(out)]
        assert main(["select", *arguments, "--report", str(folder / "report.html"), "--card", "true"]) == 0

    return work


WORK = {
    "score": score("whitened", ROWS, VALIDATION),
    "score, label_model": score("label_model", rows_of(32, 1, noise=0.2)[0], rows_of(40, 0)[0]),
    "score, auto": score("auto", answered(32, 1), answered(42, 0)),
    "pairs": pairs,
    "trainer.train()": train,
    "prefilter": filtered,
    "dataset.map": mapped,
    "select": select("pairs.jsonl"),
    "select, a folder": select("saved"),
}
if not IS_LONG:  # slow, and they write as label_model and a trainer with the callback do
    del WORK["score, auto"], WORK["prefilter"]
# Work that is done again when it is asked for again, and the file that is there when it was done.
AGAIN = {"score": FILE, "score, label_model": FILE, "score, auto": FILE, "prefilter": FILE, "pairs": "pairs.npy"}


# ---- a process that kills its children ----


def noting(work, folder, log):
    """The work, which notes the windows that it has written for good."""

    def noted():
        for kind in (ScoreWriter, PairsFile):

            def write_and_note(self, start, *what, write=kind.write):
                write(self, start, *what)
                if folder in (self.folder if isinstance(self, ScoreWriter) else self.path).parents:
                    with open(log, "a") as file:
                        file.write(f"{start}\n")

            kind.write = write_and_note
        work(folder)

    return noted


def killed(name, n_kills, root):
    """Kills some work until that has been so often enough and it has ended; what has been seen."""
    draw, log, now = random.Random(name), root / "log", root / "now"
    folder, work = now / "run", noting(WORK[name], now / "run", log)

    def start(dies_at=None):
        folder.mkdir(exist_ok=True)
        return Child(work, now, dies_at)

    def windows():
        return log.read_text().split() if log.exists() else []

    def begin_anew():
        log.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    began = time.monotonic()
    child = start()
    assert child.wait() == 0
    seconds, n_changes, whole = time.monotonic() - began, child.n_changes, contents(folder)
    assert not [file for file in whole if ".part" in file or ".forvalue-" in file or file.endswith(".lock")], sorted(
        whole
    )
    n_windows, n, ended = len(windows()), 0, 0
    begin_anew()
    while n < n_kills or ended == 0 or folder.exists():
        if (folder / AGAIN.get(name, "-")).exists():
            log.unlink(missing_ok=True)
        if n == n_kills:
            status = start().wait()
        elif draw.random() < 0.5:
            status = start().wait(draw.uniform(0, seconds))
        else:
            status = start(draw.randint(1, n_changes)).wait()
        assert status in (0, signal.SIGKILL), status
        assert len(set(windows())) == len(windows()) <= n_windows, windows()
        n += status != 0
        if status == 0:
            ended += 1
            found = contents(folder)
            if name == "dataset.map":  # `datasets` leaves its own temporary files
                found = {file: data for file, data in found.items() if not file.startswith("tmp")}
            assert found.keys() == whole.keys(), sorted(found)
            assert not [file for file in whole if found[file] != whole[file]], "not bit for bit alike"
            assert not list(Path(tempfile.gettempdir()).glob("forvalue-*"))
            begin_anew()
    return {"kills": n, "ended": ended, "changes": n_changes, "windows": n_windows, "files": sorted(whole)}


def kill_all(root, n_kills):
    """Prints what `killed` has seen of each piece of work."""
    os.chdir(root)
    torch.set_num_threads(1)
    reader.WINDOW = 4
    for name in ("pairs.jsonl", "saved"):
        files(name, n=32)
    tempfile.tempdir = str(root / "now" / "tmp")
    Path(tempfile.tempdir).mkdir(parents=True)
    print(json.dumps({name: killed(name, n_kills, root) for name in WORK}))


# ---- the test ----


def test_whatever_is_killed_at_any_moment_ends_bit_for_bit_alike_when_it_is_done_again(tmp_path):
    """No window is written twice, nothing is left over. ATTACK=20 kills ten times as often."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    n_kills = 20 if IS_LONG else 2
    arguments = [sys.executable, __file__, str(tmp_path), str(n_kills)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print("\n".join(f"{name}: {what}" for name, what in found.items()))
    assert found.keys() == WORK.keys()
    assert all(one["kills"] == n_kills and one["changes"] >= 15 for one in found.values())
    assert all(one["windows"] >= 6 for name, one in found.items() if name != "dataset.map")


if __name__ == "__main__":
    kill_all(Path(sys.argv[1]), int(sys.argv[2]))
