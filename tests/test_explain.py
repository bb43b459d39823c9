"""What speaks for and against rows: tokens and validation rows, with every method, of the rows asked for alone."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from forvalue_callbacks import TINY_MODEL, ForValueConfig, ForValueScorer
from forvalue_callbacks.core.stats import auc
from forvalue_callbacks.data.pieces import pieces
from forvalue_callbacks.data.reading import rows_at
from forvalue_callbacks.methods import METHODS
from forvalue_callbacks.methods.fitted import Fitted
from forvalue_callbacks.model.run import Run
from forvalue_callbacks.scores.explanations import Explanation, tails
from forvalue_callbacks.tiny import instructions
from helpers.answers import rows_of
from helpers.kinds import SEQUENCE, TOKEN, build, build_rows, collator
from helpers.models import build_model, llava
from helpers.models import build_rows as random_rows
from helpers.oracles import relative
from helpers.tokenizers import build_tokenizer

VALIDATION, (TRAIN, _) = rows_of(60, 1)[0], rows_of(30, 2, 0.3)
UNSCORABLE = {"input_ids": [5, 6, 7], "labels": [-100] * 3}


def scorer_of(method="gradient", model=None, validation=VALIDATION, **options):
    config = {name: options.pop(name) for name in ("normalize", "vocab") if name in options}
    model = model or build_model(dtype=torch.float64)
    return ForValueScorer(model, validation, ForValueConfig(method, **config), progress=False, **options)


def cosines(method, rows, validation):
    """Of the gradients of rows and of validation rows, (rows, validation rows), from `pairwise` and `score` alone."""
    plain, cosine = (scorer_of(method, validation=validation, normalize=n) for n in ("none", "cosine"))
    sides = plain.pairwise(validation).numpy().diagonal() ** 0.5
    return plain.pairwise(rows).numpy() / sides / (plain.score(rows).values / cosine.score(rows).values)[:, None]


@pytest.mark.parametrize("method", METHODS)
def test_token_scores_are_those_of_the_method_or_of_fitted_likelihood(method):
    by = method if METHODS[method].tokenwise else "fitted_likelihood"
    assert (by == method) == (method not in ("auto", "label_model"))
    scorer, rows = scorer_of(method), [7, 3, 12]
    want = scorer_of(by).token_scores([TRAIN[row] for row in rows])
    found = scorer.explain(TRAIN, rows)
    assert [explanation.by for explanation in found] == [by] * 3
    for explanation, tokens, again in zip(found, want, scorer.token_scores([TRAIN[i] for i in rows]), strict=True):
        assert relative(explanation.token_scores, tokens) < 1e-12
        assert relative(again, tokens) < 1e-12
    assert relative(scorer.token_scores(TRAIN)[3], want[1]) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_validation_rows_are_those_of_the_greatest_and_least_cosines_of_all_pairs(method):
    by = method if METHODS[method].pairwise else "whitened"
    validation = [VALIDATION[0], UNSCORABLE, *VALIDATION[1:]]
    rows = [11, 0, 5, 29]
    want = cosines(by, [TRAIN[row] for row in rows], validation)
    for n in (1, 4):
        found = scorer_of(method, validation=validation).explain(TRAIN, rows, n)
        assert [explanation.row for explanation in found] == rows
        assert [explanation.nearest_by for explanation in found] == [by] * 4
        for explanation, values in zip(found, want, strict=True):
            order = [int(i) for i in np.argsort(values) if np.isfinite(values[i])]
            supporting, opposing = [i for i in order[::-1] if values[i] > 0], [i for i in order if values[i] < 0]
            assert [place for place, _ in explanation.supporting] == supporting[:n]
            assert [place for place, _ in explanation.opposing] == opposing[:n]
            for place, cosine in (*explanation.supporting, *explanation.opposing):
                assert cosine == pytest.approx(values[place], rel=1e-8)


@pytest.mark.parametrize("options", [{"normalize": "cosine"}, {"normalize": "length"}, {"vocab": "seen"}])
def test_settings_that_scores_depend_on(options):
    """Tokens have the scores of `token_scores` over all rows; validation rows are near whatever the setting."""
    rows, validation = random_rows(12, seed=1), random_rows(5, seed=2)
    scorer, plain = scorer_of(validation=validation, **options), scorer_of(validation=validation)
    want = scorer.token_scores(rows)
    for explanation, other in zip(scorer.explain(rows, [4, 2]), plain.explain(rows, [4, 2]), strict=True):
        assert relative(explanation.token_scores, want[explanation.row]) < 1e-12
        assert explanation.supporting == other.supporting


def test_the_model_runs_over_the_rows_asked_for_alone_and_over_the_validation_rows_once(monkeypatch):
    read, fits = [], []
    windows, fit = Run.windows, Fitted.fit

    def note(run, rows, *rest, **more):
        read.append(len(rows))
        return windows(run, rows, *rest, **more)

    monkeypatch.setattr(Run, "windows", note)
    monkeypatch.setattr(Fitted, "fit", lambda *args: fits.append(1) or fit(*args))
    scorer = scorer_of("auto")
    (_, first), (again,) = scorer.explain(TRAIN, [3, 1]), scorer.explain(TRAIN, [1])
    assert relative(again.token_scores, first.token_scores) < 1e-12
    assert [place for place, _ in again.opposing] == [place for place, _ in first.opposing]
    assert scorer.explain(TRAIN, []) == []
    assert (read, fits) == ([2, 1], [1])


def test_the_passes_to_come_are_said_and_made(capsys):
    for options, before in (({"method": "auto"}, "validation rows, "), ({"vocab": "seen"}, "labels of all rows, ")):
        scorer = ForValueScorer(build_model(), VALIDATION, ForValueConfig(**options))
        scorer.explain(TRAIN, [1, 2])
        said = capsys.readouterr().err
        name = options.get("method", "gradient")
        assert (
            f"For-Value ({name}): explaining 2 rows by 60 validation rows: 4 passes (validation rows, {before}" in said
        )
        total = 3 * 60 + 2 if name == "auto" else 2 * 60 + 30 + 2
        assert re.search(rf"4 of 4: rows to score: 100%\|█+\| {total}/{total} ", said)
        scorer.explain(TRAIN, [1, 2])
        known = "2 passes (" if name == "auto" else "3 passes (labels of all rows, "
        assert f"{known}validation rows, for pairs, rows to score)" in capsys.readouterr().err


def test_scores_and_the_model_are_left_as_found():
    model = build_model().train()
    scorer = scorer_of("auto", model)
    before, scores = {name: value.clone() for name, value in model.state_dict().items()}, scorer.score(TRAIN)
    state, hooks = torch.get_rng_state(), [len(module._forward_hooks) for module in model.modules()]
    scorer.explain(TRAIN, [0, 1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(scorer.score(TRAIN).values, scores.values)
    np.testing.assert_array_equal(scorer_of("auto", model).score(TRAIN).values, scores.values)


def test_a_row_that_cannot_be_scored_has_nothing_that_speaks_for_or_against_it():
    model = build_model(dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight[66] = torch.inf
    rows = [TRAIN[0], UNSCORABLE, TRAIN[1], {"input_ids": [5, 66, 7], "labels": [-100, 66, 7]}]
    first, *bad, last = scorer_of("auto", model).explain(rows, [2, 1, 3, 0])
    assert bad == [Explanation(row, (), (), "fitted_likelihood", nearest_by="whitened") for row in (1, 3)]
    want = scorer_of("auto", model).explain(TRAIN, [1, 0])
    for found, clean in zip((first, last), want, strict=True):
        assert relative(found.token_scores, clean.token_scores) < 1e-9
        assert found.supporting
        assert [place for place, _ in found.supporting] == [place for place, _ in clean.supporting]


def test_wrong_answers_are_opposed_by_rows_of_the_right_one():
    """What makes an explanation worth reading: they are far more often of it than validation rows are by chance."""
    model, tokenizer = (kind.from_pretrained(TINY_MODEL) for kind in (AutoModelForCausalLM, AutoTokenizer))
    train, validation = instructions(60, seed=0, noise=0.5), instructions(100, seed=1)
    scorer = scorer_of("label_model", model, validation, processing_class=tokenizer)
    noisy = np.array(train["is_noisy"])
    found = scorer.explain(train, range(60))
    assert ["".join(explanation.tokens) for explanation in found] == [
        row["completion"] + tokenizer.eos_token for row in train
    ]
    answers = np.array([sum(explanation.token_scores) for explanation in found])
    assert auc(answers[~noisy], answers[noisy]) > 0.9

    def share(side, column, rows):
        places = [(i, place) for i in rows for place, _ in getattr(found[i], side)]
        return np.mean([validation[place]["answer"] == train[i][column] for i, place in places])

    wrong = np.flatnonzero(noisy).tolist()
    chance = np.mean([row["answer"] == train[i]["true_answer"] for row in validation for i in wrong])
    assert share("supporting", "answer", range(60)) > 0.7
    assert share("opposing", "true_answer", wrong) > 2 * chance


@pytest.mark.parametrize("form", [list, Dataset.from_list, iter, lambda rows: (row for row in rows)])
@pytest.mark.parametrize("vocab", ["full", "seen"])  # which is that of all rows
def test_rows_of_data_sets_in_any_form(form, vocab):
    rows, validation = random_rows(12, seed=1), random_rows(5, seed=2)
    found = scorer_of(vocab=vocab, validation=validation).explain(form(rows), np.array([9, 2]))
    assert found == scorer_of(vocab=vocab, validation=validation).explain(rows, [9, 2])


class Noted:
    """Rows that can be had by their place, and which were."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, i):
        self.read.append(i)
        return TRAIN[i]


def test_other_rows_are_not_even_read():
    rows = Noted()
    assert rows_at(rows, [9, 2, 9]) == [TRAIN[9], TRAIN[2], TRAIN[9]]
    assert rows.read == [9, 2, 9]


@pytest.mark.parametrize("form", [list, iter])
@pytest.mark.parametrize("row", [-1, 30])
def test_rows_that_are_not_there_are_refused_by_name(form, row):
    with pytest.raises(ValueError, match=f"row {row} is asked for, and the data set has 30 rows"):
        scorer_of().explain(form(TRAIN), [0, row])
    with pytest.raises(ValueError, match="is no data set of rows"):
        scorer_of().explain({"input_ids": [[1]]}, [0])


def test_tokens_without_a_tokenizer_are_their_ids():
    (found,) = scorer_of().explain(TRAIN, [3])
    assert found.tokens == tuple(str(token) for token in TRAIN[3]["labels"] if token != -100)


@pytest.mark.parametrize("kind", ["t5", "BertForSequenceClassification", "BertForTokenClassification"])
def test_rows_of_other_models_have_their_tokens_or_the_names_of_their_classes(kind):
    rows, model = build_rows(kind, 8, seed=1), build(kind)
    scorer = scorer_of("fitted_likelihood", model, build_rows(kind, 6, seed=2), data_collator=collator(kind))
    found = scorer.explain(rows, [6, 2])
    for explanation, row in zip(found, (rows[6], rows[2]), strict=True):
        labels = [row["label"]] if kind in SEQUENCE else [label for label in row["labels"] if label != -100]
        names = [model.config.id2label[label] if kind in (*SEQUENCE, *TOKEN) else str(label) for label in labels]
        assert explanation.tokens == tuple(names)
        assert explanation.nearest_by == "whitened"
        assert relative(explanation.token_scores, scorer.token_scores([row])[0]) < 1e-5


def test_rows_with_images():
    model, rows, collate = llava()
    scorer = scorer_of("auto", model, rows[4:], data_collator=collate)
    (found,) = scorer.explain(rows[:4], [2])
    assert found.tokens == tuple(str(token) for token in rows[2]["text"][3:])
    assert relative(found.token_scores, scorer.token_scores(rows[2:3])[0]) < 1e-12
    assert found.supporting


@pytest.mark.parametrize(
    "text", ["the sky is blue", "日本語 and Ωß\U0001f600 é", " leading", "two  spaces , and\nlines", ""]
)
def test_pieces_are_the_text(text):
    tokenizer = build_tokenizer()
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text
    assert pieces(type("Processor", (), {"tokenizer": tokenizer})(), ids) == found
    cut = pieces(tokenizer, tokenizer("日")["input_ids"][:-1])
    assert cut[:-1] == ("",) * (len(cut) - 1)
    assert cut[-1]
    assert pieces(None, [5, 7]) == ("5", "7")


def test_the_tails_are_the_worst_and_the_best_rows_with_a_score():
    values = np.array([0.5, np.nan, -2.0, 3.0, 0.5, -np.inf, 1.0, np.nan])
    assert tails(values, 2) == ([5, 2], [3, 6])
    assert tails(values, 1) == ([5], [3])
    assert tails(values, 4) == ([5, 2, 0, 4], [3, 6])
    assert tails(values, 9) == ([5, 2, 0, 4, 6, 3], [])
    assert tails(values, 0) == ([], [])
    assert tails(np.full(3, np.nan), 2) == ([], [])
