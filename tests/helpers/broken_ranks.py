"""Ranks of which one goes wrong: `python -m helpers.broken_ranks FOLDER RANKS NAME ...`, each in processes of its own.

The processes of a scenario are forked from one that has everything imported, so that torch starts but once. They leave
NAME-RANK.json; of one that was killed there is none.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from forvalue_callbacks import ForValueCallback, ForValueConfig, ForValueScorer
from forvalue_callbacks.core import stats
from forvalue_callbacks.data import reader
from forvalue_callbacks.methods import fitted, gradient
from forvalue_callbacks.model import run
from forvalue_callbacks.scores import writer
from helpers.answers import answered, rows_of
from helpers.models import build_model, build_rows
from helpers.trainers import make_trainer

TRAIN, VALIDATION = build_rows(24, seed=1), build_rows(6, seed=2)
CLEAN, NOISY = rows_of(40, 1)[0], rows_of(30, 2, 0.3)[0]
ANSWERED = answered(40, 1), answered(10, 2)
HANGS = timedelta(seconds=40)  # what is not over then waits for ever
WAYS = {
    "gradient": (VALIDATION, TRAIN),
    "whitened": (VALIDATION, TRAIN),
    "fitted": (VALIDATION, TRAIN),
    "label_model": (CLEAN, NOISY),
    "auto": ANSWERED,
}


def score(folder, method="gradient", n=None):
    """The first n rows, by windows of ten."""
    validation, rows = WAYS[method]
    config = ForValueConfig(method, max_tokens_per_batch=40)
    scorer = ForValueScorer(build_model(dtype=torch.float64), validation, config, progress=False)
    return scorer.score(rows[:n], folder / "scores.parquet").values.tolist()


def by_one_validation_row(folder):
    return (
        ForValueScorer(build_model(dtype=torch.float64), VALIDATION[:1], progress=False).score(TRAIN).values.tolist()
    )


def train(folder):
    trainer = make_trainer(
        folder,
        [ForValueCallback(VALIDATION, config=ForValueConfig(max_tokens_per_batch=40))],
        train=TRAIN,
        max_steps=1,
    )
    trainer.train()
    return trainer.state.global_step


# ---- what goes wrong: at the n-th call of a function ----


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def raising(error):
    def fail():
        raise error

    return fail


FAULTS = {
    "killed": dies,
    "memory": raising(MemoryError("no room")),
    "out_of_memory": raising(torch.OutOfMemoryError("CUDA out of memory.")),
    "allocator": raising(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")),
    "error": raising(ArithmeticError("no such number")),
    "interrupted": raising(KeyboardInterrupt()),
    "exit": raising(SystemExit(3)),
}
# Where: what is done there, in a module or class that looks it up when it is called.
PLACES = {
    "reading": (reader.Reader, "sample"),
    "reading_validation": (reader.Reader, "samples"),
    "forward": (run.Run, "run"),
    "check": (run.Backbone, "check"),
    "gradient": (gradient.core, "add_gradient"),
    "fold": (gradient.core, "score_tokens"),
    "fit": (fitted, "fit_head"),
    "moment": (stats.torch.linalg, "cholesky_ex"),
    "writing": (writer.ScoreWriter, "write"),
    "finishing": (writer.ScoreWriter, "finish"),
}


def spoil(place, fault, nth, note):
    """From now on, in this process, the n-th call fails, at a time that goes into the file `note`."""
    owner, name = PLACES[place]
    function, calls = getattr(owner, name), []

    def spoiled(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            note.write_text(str(time.time()))
            FAULTS[fault]()
        return function(*args, **kwargs)

    setattr(owner, name, spoiled)


# ---- scenarios ----


def scenario(place, fault, last=True, nth=1, way=score, **settings):
    """Settings of `outcome`; `last`: it is the last rank that goes wrong, else the first."""
    name = "-".join([way.__name__, *map(str, settings.values()), place, fault, str(nth)])
    return name, {"place": place, "fault": fault, "nth": nth, "bad": -last, "way": partial(way, **settings)}


def whole(way, **settings):
    return "-".join([way.__name__, *map(str, settings.values())]), {"way": partial(way, **settings)}


# Nothing goes wrong, but some ranks have nothing to do.
EMPTY = dict(
    [
        *[whole(score, method=method, n=n) for method in ("gradient", "fitted") for n in (0, 1, 3)],
        whole(score, method="label_model", n=10),
        whole(by_one_validation_row),
    ]
)
OUT_OF_MEMORY = [
    *[scenario(place, fault) for place in ("forward", "fold") for fault in ("memory", "out_of_memory", "allocator")],
    scenario("forward", "out_of_memory", last=False, nth=4),
    scenario("fold", "out_of_memory", last=False, nth=2),
    scenario("check", "out_of_memory"),
    scenario("gradient", "memory", last=False),
    scenario("gradient", "out_of_memory"),
    scenario("fit", "out_of_memory", method="fitted"),
    scenario("moment", "out_of_memory", method="whitened"),
    scenario("reading", "memory", nth=13),
    scenario("writing", "memory", last=False, nth=2),
    scenario("forward", "memory", method="auto", nth=2),
    scenario("forward", "memory", method="label_model", nth=3),
    scenario("forward", "memory", way=train),
]
LIVES_ON = [
    *[scenario(place, fault) for place in ("reading", "forward") for fault in ("error", "interrupted", "exit")],
    scenario("reading_validation", "interrupted"),
    scenario("fold", "error", last=False, nth=2),
    scenario("finishing", "interrupted", last=False),
    scenario("writing", "exit", last=False),
    scenario("fold", "error", way=train),
]
KILLED = [
    scenario("forward", "killed", nth=3),
    scenario("reading", "killed", nth=13),
    scenario("writing", "killed", last=False),
    scenario("fit", "killed", way=score, method="fitted"),
    scenario("forward", "killed", way=train),
]
BROKEN = dict([*OUT_OF_MEMORY, *LIVES_ON, *KILLED])


def outcome(rank, n_ranks, folder, name, way, place=None, fault=None, nth=1, bad=None):
    """What one rank is left with. One that fails lives on for a while, and does nothing."""
    store = f"file://{folder / name}.store"
    torch.distributed.init_process_group("gloo", store, 2 * HANGS, world_size=n_ranks, rank=rank)
    reader.WINDOW = 10
    own = folder / name
    own.mkdir(exist_ok=True)
    is_bad = place is not None and rank == bad % n_ranks
    if is_bad:
        spoil(place, fault, nth, folder / f"{name}.fault")
    torch.distributed.barrier()
    found = {"value": None, "error": None}
    try:
        found["value"] = way(own)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too
        found["error"] = f"{type(error).__name__}: {error}"
    found["ended"] = time.time()
    whole_file = folder / f"{name}-{rank}.json"
    whole_file.with_suffix(".part").write_text(json.dumps(found))
    whole_file.with_suffix(".part").rename(whole_file)
    if is_bad and found["error"] is not None:
        time.sleep(HANGS.total_seconds())


def forked(n_ranks, folder, name, settings):
    """Runs the ranks of a scenario until each has left what it found, or they hang."""
    children = []
    for rank in range(n_ranks):
        child = os.fork()
        if child == 0:
            try:
                outcome(rank, n_ranks, folder, name, **settings)
            finally:
                os._exit(0)
        children.append(child)
    n_living = n_ranks - (settings.get("fault") == "killed")
    end = time.monotonic() + HANGS.total_seconds()
    while len(list(folder.glob(f"{name}-?.json"))) < n_living and time.monotonic() < end:
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        time.sleep(0.02)
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main():
    folder, n_ranks = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    for name in sys.argv[3:]:
        forked(n_ranks, folder, name, {**EMPTY, **BROKEN}[name])


if __name__ == "__main__":
    main()
