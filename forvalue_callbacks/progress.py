"""What is seen of the work: a line before it, one bar over all its passes, lines after it. Knows no model."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

# The expected time is that of so much of a pass, or of all of it where it is shorter.
PROBE_BATCHES, PROBE_SECONDS = 4, 1.0
# How often a bar is drawn anew, in seconds, on a terminal and into a file, which keeps each drawing.
INTERVAL, INTERVAL_IN_FILES = 0.1, 1.0


@dataclass
class Pass:
    """A pass of the model over some rows.

    Args:
        name: what is done there, in a few words.
        rows: how many; None: nobody knows.
        tokens: how many the model reads in a row, on average.
    """

    name: str
    rows: int | None
    tokens: float = 1.0


@dataclass
class Plan:
    """Passes in the order in which they come. One that is left out is passed over.

    Args:
        passes: all of them.
        probe: place of the first whose pace is that of those that follow.
        what: the passes in words; empty: their names.
        then: what comes after them and takes time too.
    """

    passes: list[Pass]
    probe: int = 0
    what: str = ""
    then: str = ""


class Progress:
    """Speaks to whoever runs the script; make it silent on all ranks but the first.

    Args:
        lines: say what is about to be done and what came of it.
        bars: draw a bar.
    """

    def __init__(self, lines: bool = True, bars: bool = True):
        self.lines, self.bars = lines, bars
        self._bar: tqdm | None = None  # of the work that is under way, and its passes
        self._plan = Plan([])
        self._at = -1  # place of the pass that is under way

    def say(self, text: str) -> None:
        """A line for people: to the log where somebody listens to it, else to stderr, beside the bars."""
        if not self.lines:
            return
        with aside():
            if _heard(logger):
                logger.info(text)
            elif not _silenced():
                print(text, file=sys.stderr, flush=True)

    @contextmanager
    def over(self, title: str | None, plan: Plan, wait: Callable[[], None] | None = None) -> Iterator[None]:
        """The work: all its passes.

        Args:
            title: first half of the line before the work; the passes and the expected time follow. None: no line, and
                a bar where it takes more than a second.
            wait: waits until the accelerator has done what it was told.
        """
        self._plan, self._at, self._title, self._wait = plan, -1, title, wait
        self._announced = title is None
        self._shown = self._description(0)
        self._bar = tqdm(
            desc=self._shown,
            total=_sum(plan.passes),
            unit="row",
            dynamic_ncols=True,
            mininterval=INTERVAL if sys.stderr.isatty() else INTERVAL_IN_FILES,
            delay=1 if title is None else 0,
            disable=not self.bars,
        )
        try:
            yield
        finally:
            self._bar.close()
            self._bar = None

    @contextmanager
    def part(self, name: str, rows: int | None) -> Iterator[None]:
        """One pass, of so many rows; work of its own where none that it belongs to is under way."""
        if self._bar is None:
            with self.over(None, Plan([Pass(name, rows)])), self.part(name, rows):
                yield
            return
        passes = self._plan.passes
        places = [i for i, planned in enumerate(passes) if planned.name == name and i > self._at]
        if not places:
            places = [self._at + 1]
            passes.insert(places[0], Pass(name, rows))
        for left_out in passes[self._at + 1 : places[0]]:
            left_out.rows = 0
        self._at = places[0]
        passes[self._at].rows = rows
        self._done = self._probed = self._batches = 0
        self._started = time.perf_counter()
        self._bar.total = _sum(passes)
        self.now()
        yield
        if rows is not None:
            self.update(rows - self._done)
        if self._at >= self._plan.probe and not self._announced:
            self._announce()

    def now(self, doing: str = "") -> None:
        """Shows what is being done in the pass that is under way."""
        if self._bar is not None:
            text = self._description(self._at, doing)
            if text != self._shown:
                self._bar.set_description_str(text, refresh=self._title is not None)
            self._shown = text

    def _description(self, at: int, doing: str = "") -> str:
        passes = self._plan.passes
        number = f"{at + 1} of {len(passes)}: " if len(passes) > 1 else ""
        return number + passes[at].name + (f", {doing}" if doing else "")

    def update(self, rows: int, tokens: int = 0) -> None:
        """So many rows more are done, in which the model has read so many tokens.

        Never more than the pass has: ranks count for each other and need not have equally many.
        """
        if self._bar is None:
            return
        here = self._plan.passes[self._at]
        rows = rows if here.rows is None else min(rows, here.rows - self._done)
        self._done += rows
        self._bar.update(rows)
        if tokens and self._at >= self._plan.probe and not self._announced:
            self._probed += tokens
            self._batches += 1
            if self._batches > PROBE_BATCHES and time.perf_counter() - self._started >= PROBE_SECONDS:
                self._announce()
            elif self._batches == 1:
                self._first = time.perf_counter(), tokens

    def _announce(self) -> None:
        """The line before the work, once its pace is known."""
        self._announced = True
        if self._wait is not None:
            self._wait()
        started, probed = self._started, self._probed
        if self._batches > 1:  # the first is slower: something is set up
            started, probed = self._first[0], probed - self._first[1]
        pace = (time.perf_counter() - started) / max(1, probed)
        passes = self._plan.passes
        here, later = passes[self._at], passes[self._at + 1 :]
        if any(planned.rows is None for planned in (here, *later)):
            time_left = f"{duration(pace * passes[-1].tokens * 1000)} for 1,000 rows"
        else:
            tokens = sum((planned.rows or 0) * planned.tokens for planned in later)
            tokens += max(0, (here.rows or 0) - self._done) * here.tokens
            time_left = duration(pace * tokens)
        what = self._plan.what or ", ".join(planned.name for planned in passes)
        n, then = len(passes), f", then {self._plan.then}" if self._plan.then else ""
        self.say(f"{self._title}: {n} pass{'es' if n > 1 else ''} ({what}), {time_left}{then}")


def aside() -> AbstractContextManager[None]:
    """Bars make way for a line while it is written: no line in the middle of a bar."""
    return tqdm.external_write_mode(file=sys.stderr)


@contextmanager
def speaking(first_rank: bool) -> Iterator[None]:
    """On all ranks but the first the log of this package holds errors alone."""
    log = logging.getLogger(__package__)
    level = log.level
    if not first_rank:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def duration(seconds: float) -> str:
    """About how long, for people."""
    if seconds < 1:
        return "less than a second"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            value = seconds / size
            return f"about {value:.1f} {unit}" if value < 10 else f"about {value:.0f} {unit}"
    return f"about {seconds:.0f} s"


def size(rows: Iterable[Any]) -> int | None:
    """How many rows there are; None: nobody knows."""
    return len(rows) if isinstance(rows, Sized) else None


def _sum(passes: Sequence[Pass]) -> int | None:
    rows = [planned.rows for planned in passes]
    return None if None in rows else sum(n for n in rows if n is not None)


def _silenced() -> bool:
    """Whether the log of this package has been set to warnings alone."""
    return any(logging.getLogger(name).level > logging.INFO for name in (__name__, __package__))


def _heard(log: logging.Logger) -> bool:
    """Whether somebody has set up where lines of the level INFO go."""
    if not log.isEnabledFor(logging.INFO):
        return False
    here: logging.Logger | None = log
    while here is not None:
        if any(h.level <= logging.INFO and not isinstance(h, logging.NullHandler) for h in here.handlers):
            return True
        here = here.parent if here.propagate else None
    return False
