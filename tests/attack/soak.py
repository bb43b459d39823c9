"""`forvalue select` on generated rows, killed and on full disks at random, for some minutes on one core.

    python tests/attack/soak.py --minutes 120

Each round is disturbed up to eight times and then let end: what lies there must be, bit for bit, what a run leaves
that nothing befell, and nothing else.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from forvalue_callbacks.cli import main
from forvalue_callbacks.data import reader
from helpers.attacks import Child, contents, disk, fill
from helpers.cli import MODEL, pairs, write

DISK, WINDOW = 2**22, 8
METHODS, POLICIES = ("gradient", "whitened", "fitted"), ("drop:0.25", "drop:0.5", "keep:10")


class Soak:
    """Rounds in a folder, and what was seen.

    Args:
        root: a folder for rows, logs and the disk.
        small: the disk; None: there is none, and only kills befall.
    """

    def __init__(self, root, small, seed):
        self.root, self.small, self.draw = root, small, random.Random(seed)
        self.run, self.log = root / "disk" / "run", root / "log"
        self.seen = dict.fromkeys(("rounds", "kills", "full disks", "ended", "wrong"), 0)

    def child(self, arguments, dies_at=None):
        """The command in a process of its own, which writes what it says to a log."""
        self.run.mkdir(exist_ok=True)

        def work():
            with open(self.log, "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            return main(arguments)

        return Child(work, self.root / "disk", dies_at)

    def disturbed(self, arguments, seconds, n_changes):
        """One run that something befalls."""
        what = self.draw.choice(("kill", "kill between changes", "full disk" if self.small else "kill"))
        ballast = fill(self.small, self.draw.randrange(0, 120_000)) if what == "full disk" else None
        between = what == "kill between changes" or (ballast and self.draw.random() < 0.3)
        status = self.child(arguments, self.draw.randint(1, n_changes) if between else None).wait(
            self.draw.uniform(0, 1.2 * seconds) if what == "kill" else None
        )
        self.seen["kills"] += status == signal.SIGKILL
        self.seen["ended"] += status == 0
        if ballast is not None:
            ballast.unlink()
        if status not in (0, signal.SIGKILL):
            said = self.log.read_text(errors="replace")
            named = "No space left on device" in said and str(self.root / "disk") in said and "Traceback" not in said
            self.seen["full disks"] += 1
            self.wrong(f"{what}: {said[-500:]}", ballast is None or not named)

    def round(self):
        """Rows, a run that nothing befalls, and one that much befalls."""
        seed, n = self.draw.randrange(10**6), self.draw.randint(16, 96)
        for name, rows in (("rows.jsonl", pairs(n, seed, 0.3)), ("trusted.jsonl", pairs(12, seed + 1))):
            write(name, rows)
        choice = ["--method", self.draw.choice(METHODS), "--policy", self.draw.choice(POLICIES)]
        arguments = ["select", "rows.jsonl", "--validation", "trusted.jsonl", *MODEL, *choice, "--card", "true"]
        arguments += ["--out", str(self.run / "kept.jsonl"), "--report", str(self.run / "report.html")]
        began = time.monotonic()
        child = self.child(arguments)
        status = child.wait()
        self.wrong(f"undisturbed: {status} {self.log.read_text()[-500:]}", status != 0)
        seconds, whole = time.monotonic() - began, contents(self.run)
        self.clear()
        for _ in range(self.draw.randint(1, 8)):
            self.disturbed(arguments, seconds, child.n_changes)
        status, found = self.child(arguments).wait(), contents(self.run)
        self.wrong(f"the last run: {status} {self.log.read_text()[-500:]}", status != 0)
        self.wrong(f"files {sorted(found)}, wanted {sorted(whole)}", found.keys() != whole.keys())
        other = [name for name in whole if found.get(name) != whole[name]]
        self.wrong(f"{other} are not as an undisturbed run leaves them", other)
        self.wrong("temporary folders are left", list(Path(tempfile.gettempdir()).glob("forvalue-*")))
        self.clear()
        self.seen["rounds"] += 1

    def wrong(self, text, is_wrong):
        if is_wrong:
            self.seen["wrong"] += 1
            print(f"WRONG in round {self.seen['rounds']}: {text}", flush=True)

    def clear(self):
        for path in self.run.iterdir():
            path.unlink()


def soak(minutes, seed):
    """How much was seen; the exit code."""
    torch.set_num_threads(1)
    reader.WINDOW = WINDOW
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(os.chdir, os.getcwd())
        os.chdir(root)
        small = stack.enter_context(disk(root / "disk", DISK))
        tempfile.tempdir = str(root / "disk" / "tmp")
        os.mkdir(tempfile.tempdir)
        if small is None:
            print("no disk of its own can be had (root may have one): kills alone")
        done, until = Soak(root, small, seed), time.monotonic() + 60 * minutes
        while time.monotonic() < until or not done.seen["rounds"]:
            done.round()
            if done.seen["rounds"] % 10 == 1:
                print(time.strftime("%H:%M"), done.seen, flush=True)
        print(f"{minutes:g} minutes: {done.seen}")
    return 1 if done.seen["wrong"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(soak(**vars(parser.parse_args())))
