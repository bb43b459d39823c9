"""What is seen of the work: the line before it, the bar over all passes, and who is spoken to."""

import logging
import re
import sys

import pytest
import torch

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks import progress as module
from forvalue_callbacks.core.fit import Fit
from forvalue_callbacks.data.corruption import KINDS
from forvalue_callbacks.methods import auto
from forvalue_callbacks.methods import measures as evidence
from forvalue_callbacks.progress import Pass, Plan, Progress, duration, speaking
from forvalue_callbacks.scores.judgements import Judgements
from forvalue_callbacks.scores.noise import NoiseEstimate
from helpers.models import build_model, build_rows

TRAIN, VALIDATION = build_rows(24, seed=1), build_rows(6, seed=2)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(module, "time", clock := Clock())
    return clock


def test_the_expected_time_is_that_of_the_first_batches_for_all_passes_to_come(clock, capsys):
    progress = Progress(bars=False)
    waited = []
    plan = Plan([Pass("before", 10, 50.0), Pass("first", 100, 10.0), Pass("second", 2000, 20.0)], probe=1)
    with progress.over("Work", plan, lambda: waited.append(clock.now)):
        with progress.part("before", 10):
            clock.now += 1000  # of another pace
            progress.update(10, 500)
        with progress.part("first", 100):
            for seconds in (60, 1, 1, 1):  # something is set up in the first batch
                assert capsys.readouterr().err == ""
                clock.now += seconds
                progress.update(10, 100)
            clock.now += 1
            progress.update(10, 100)
            assert waited == [clock.now]  # work that an accelerator has not done yet would look fast
            # 0.01 s a token: 50 rows of 10 are left here, and 2,000 of 20 after
            said = capsys.readouterr().err
            assert said == "Work: 3 passes (before, first, second), about 6.8 min\n"
        with progress.part("second", 2000):
            progress.update(2000, 40000)
    assert capsys.readouterr().err == ""  # once


@pytest.mark.parametrize(
    ("rows", "time_left"), [(1000, "about 20 s, then a fit"), (None, "about 20 s for 1,000 rows, then a fit")]
)
def test_a_short_first_pass_is_all_there_is_to_go_by(clock, capsys, rows, time_left):
    progress = Progress(bars=False)
    with progress.over("Work", Plan([Pass("first", 4, 5.0), Pass("rest", rows, 5.0)], what="all", then="a fit")):
        with progress.part("first", 4):
            clock.now += 0.08
            progress.update(4, 20)
        assert capsys.readouterr().err == f"Work: 2 passes (all), {time_left}\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "less than a second"),
        (1, "about 1 s"),
        (89, "about 89 s"),
        (400, "about 6.7 min"),
        (4000, "about 67 min"),
        (20_000, "about 5.6 h"),
        (90_000, "about 25 h"),
    ],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_one_bar_goes_over_all_passes_and_ends_full_though_one_is_left_out_and_ranks_differ(capsys, monkeypatch):
    bars, make = [], module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda **options: bars.append(make(**options)) or bars[-1])
    progress = Progress(lines=False)
    with progress.over("", Plan([Pass("a", 5), Pass("left out", 7), Pass("b", 4)])):
        (bar,) = bars
        assert bar.total == 16
        with progress.part("a", 6):  # one more than was planned
            progress.update(4)
            progress.update(4)  # two ranks count for each other, and the last batch has fewer
            assert bar.n == 6
        with progress.part("b", 4):
            progress.update(1)  # the other rank had more
            progress.now("fitting")
        assert bar.n == bar.total == 10
    drawn = re.findall(r"\r([^\r\n]*?): +\d+%", capsys.readouterr().err)
    assert list(dict.fromkeys(drawn)) == ["1 of 3: a", "3 of 3: b", "3 of 3: b, fitting"]


def unfitted(head, *_):
    return Fit(torch.zeros_like(head.weight), 1.0, {})


def unweighed(self, state, found):
    return found.column("log_likelihood"), NoiseEstimate(0.0, {}, 40), Judgements.none(found.n)


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ("gradient", ["validation rows", "rows to score"]),
        ("whitened", ["validation rows", "rows to score"]),
        ("fitted", ["validation rows", "rows to score"]),
        (
            "auto",
            [
                "first half of the validation rows",
                "second half",
                "answers alone",
                *["copies of them"] * 2,
                "rows to score",
            ],
        ),
    ],
)
def test_every_method_says_which_passes_are_to_come_and_makes_them(method, passes, capsys, monkeypatch):
    planned, made, over, part = [], [], Progress.over, Progress.part

    def noted_plan(self, title, plan, *args):
        planned.append([one.name for one in plan.passes])
        return over(self, title, plan, *args)

    def noted(self, name, rows):
        made.append((name, rows))
        return part(self, name, rows)

    monkeypatch.setattr(Progress, "over", noted_plan)
    monkeypatch.setattr(Progress, "part", noted)
    monkeypatch.setattr(evidence, "fit_head", unfitted)  # the fits take a minute and make no pass
    monkeypatch.setattr(auto.Auto, "finish", unweighed)
    monkeypatch.setattr(auto, "KINDS", KINDS[1:3])
    validation = build_rows(40, seed=2) if method == "auto" else VALIDATION
    scorer = ForValueScorer(build_model(), validation, ForValueConfig(method=method))
    scorer.score(TRAIN)
    assert planned == [passes]
    assert [name for name, _ in made] == passes
    said = capsys.readouterr().err
    line = f"For-Value ({method}): scoring 24 rows by {len(validation)} validation rows: {len(passes)} passes ("
    assert said.count(line) == 1
    for k, name in enumerate(passes, 1):
        assert f"\r{k} of {len(passes)}: {name}: " in said
    total = sum(rows for _, rows in made)
    assert re.search(rf"100%\|█+\| {total}/{total} ", said)
    made.clear()
    scorer.score(TRAIN[:3])  # the validation side is known
    assert made == [("rows to score", 6 if method == "auto" else 3)]


def test_label_rows_say_their_passes_and_the_fit(capsys):
    answers = [
        {**row, "input_ids": [*row["input_ids"][:2], 5 + i % 2], "labels": [-100, -100, 5 + i % 2]}
        for i, row in enumerate(build_rows(40, seed=3))
    ]
    ForValueScorer(build_model(), answers[:20], ForValueConfig(method="label_model")).score(answers[20:])
    said = capsys.readouterr().err
    assert "2 passes (validation rows, rows to score), " in said
    assert ", then a label model is fitted\n" in said
    assert "2 of 2: rows to score, fitting the label model: 100%" in said


def test_pairs_and_token_scores_have_one_bar_too(capsys):
    scorer = ForValueScorer(build_model(), VALIDATION)
    scorer.pairwise(TRAIN)
    assert "3 of 3: pairs: " in capsys.readouterr().err
    scorer.token_scores(TRAIN)
    assert "1 pass (rows to score)" in capsys.readouterr().err
    ForValueScorer(build_model(), VALIDATION, ForValueConfig(vocab="seen")).score(TRAIN)
    assert "2 of 3: labels of all rows: " in capsys.readouterr().err


def test_rows_of_a_stream_have_a_bar_without_a_total(capsys):
    scores = ForValueScorer(build_model(), VALIDATION).score(iter(TRAIN))
    assert len(scores) == 24
    said = capsys.readouterr().err
    assert "scoring a stream of rows by 6 validation rows: 2 passes" in said
    assert " for 1,000 rows\n" in said
    assert "2 of 2: rows to score: 30row [" in said


def test_nothing_is_shown_where_nobody_asked_and_the_scores_are_the_same(capsys):
    shown = ForValueScorer(build_model(), VALIDATION).score(TRAIN)
    assert capsys.readouterr().err
    silent = ForValueScorer(build_model(), VALIDATION, progress=False).score(TRAIN)
    assert capsys.readouterr() == ("", "")
    assert (shown.values == silent.values).all()


def test_a_line_is_seen_once_by_the_log_or_on_stderr(capsys, caplog):
    Progress().say("seen")
    assert capsys.readouterr().err == "seen\n"
    assert "seen" not in caplog.text
    with caplog.at_level(logging.INFO, logger="forvalue_callbacks"):
        Progress().say("heard")
    assert capsys.readouterr().err == ""
    assert caplog.text.count("heard") == 1
    with caplog.at_level(logging.WARNING, logger="forvalue_callbacks"):  # somebody wants warnings alone
        Progress().say("silenced")
    Progress(lines=False).say("silent")
    assert capsys.readouterr().err == ""


def test_a_handler_that_takes_warnings_alone_does_not_count_as_heard(capsys, monkeypatch):
    log = logging.getLogger("forvalue_callbacks")
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    monkeypatch.setattr(log, "handlers", [handler, logging.NullHandler()])
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(log, "level", logging.INFO)
    log.manager._clear_cache()
    Progress().say("seen")
    assert capsys.readouterr().err == "seen\n"
    log.manager._clear_cache()


def test_only_the_first_rank_warns(caplog):
    log = logging.getLogger("forvalue_callbacks.methods.auto")
    with speaking(False):
        log.warning("of another rank")
        log.error("an error of another rank")
    with speaking(True):
        log.warning("of the first rank")
    log.warning("after")
    assert [record.getMessage() for record in caplog.records] == [
        "an error of another rank",
        "of the first rank",
        "after",
    ]


def test_a_line_is_never_written_into_a_bar(capsys):
    """A bar without a line end is cleared first."""
    progress = Progress()
    with progress.over("", Plan([Pass("a", 2)])), progress.part("a", 2):
        progress.update(1)
        progress.say("a line")
        with module.aside():
            logging.getLogger("forvalue_callbacks").warning("beside")
    for line in capsys.readouterr().err.split("\n"):
        assert "a line" not in line or line.split("\r")[-1] == "a line"
