"""method="auto": evidence weighed, what it finds and what it says that it cannot."""

import json
import logging
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from forvalue_callbacks import Drop, ForValueConfig, ForValueScorer, ForValueTransform
from forvalue_callbacks.core.stats import auc
from forvalue_callbacks.data.corruption import KINDS, TEXT_KINDS
from forvalue_callbacks.data.rules import RULES
from forvalue_callbacks.methods.auto import Auto
from forvalue_callbacks.methods.base import Found, measured
from forvalue_callbacks.methods.measures import (
    FOLDS,
    HALF_CANDIDATES,
    ROW_CANDIDATES,
    Match,
)
from forvalue_callbacks.methods.weighing import fold_of
from forvalue_callbacks.progress import Progress
from forvalue_callbacks.report.words import about_noise
from forvalue_callbacks.scores.judgements import Judgements
from forvalue_callbacks.scores.noise import Evidence, NoiseEstimate
from helpers.answers import EOS, answered
from helpers.models import build_model, build_rows
from helpers.oracles import relative


def repeated(n, seed=0, noise=0.0):
    """Rows whose prompt holds the token that decides the answer, one of three; a share of the answers is wrong."""
    rng = np.random.default_rng(seed)
    rows, wrong = [], []
    for _ in range(n):
        kind, is_wrong = int(rng.integers(3)), bool(rng.random() < noise)
        prompt = [*rng.integers(20, 60, 3).tolist(), 3 + kind]
        answer = 10 + (kind + (int(rng.integers(1, 3)) if is_wrong else 0)) % 3
        rows.append({"input_ids": [*prompt, answer], "labels": [-100] * 4 + [answer]})
        wrong.append(is_wrong)
    return rows, np.array(wrong)


def digests_of(numbers):
    """Digests of which the number decides the fold."""
    return np.array([f"{number:016x}" for number in numbers])


def drawn(rng, n, shift=0.0, columns=slice(None), start=0):
    """Numbers drawn at random for n rows, lower by a shift."""
    side = rng.normal(size=(n, 4))
    row, half = rng.normal(size=(n, len(ROW_CANDIDATES))), rng.normal(size=(n, 2, len(HALF_CANDIDATES)))
    half[:, :, columns] -= shift
    found = dict(zip(ROW_CANDIDATES, row.T, strict=True)) | {"prompt": side, "answer": side + 0.1}
    found |= {name: half[:, :, k] for k, name in enumerate(HALF_CANDIDATES)}
    found["alone"] = found["mean log-likelihood"] - found["mutual information"]
    found["alone, fitted"] = found["fitted_likelihood"] - found["mutual information, fitted"]
    number = start + np.arange(n)
    found |= {
        "row": np.arange(n),
        "place": 1000 + np.arange(n),
        "half": np.arange(n) % 2,
        "fold": fold_of(digests_of(number)),
    }
    found |= {"length": rng.normal(size=n), "asked": rng.normal(size=n)}
    found |= {"prompt hash": number, "rule": np.zeros(n, dtype=int)}
    forms = {name: np.zeros(n, dtype=bool) for name in ("lower case", "capitals", "full stop")}
    return found | forms | {"end": np.full(n, EOS), "digest": digests_of(number)}


def scores_of(clean, copied, train, bases=None):
    """From what was measured; copies are in the order of the clean rows."""
    sides = [{**side, "class": np.full(len(side["row"]), k)} for k, side in enumerate(copied.values(), 1)]
    copies = {name: np.concatenate([side[name] for side in sides]) for name in sides[0]}
    reference = SimpleNamespace(bases=None if bases is None else (bases, bases))
    state = {"clean": clean, "copies": copies, "kinds": list(copied), "reference": reference}
    return Auto().finish(state, Found(lambda: iter([train]), train["digest"]))


def test_training_rows_are_judged_by_both_halves_alike_and_validation_rows_by_the_other_one():
    rng = np.random.default_rng(0)
    clean, copied, train = drawn(rng, 40), {"swapped": drawn(rng, 40, 2.0)}, drawn(rng, 50, 1.0, start=40)
    want = scores_of(clean, copied, train)[0]
    halves = {name: values for name, values in train.items() if values.shape[1:] == (2,)}
    swapped = train | {name: values[:, ::-1] for name, values in halves.items()}
    np.testing.assert_allclose(scores_of(clean, copied, swapped)[0], want, rtol=1e-10)
    other = train | {name: values + np.array([0.0, 0.5]) for name, values in halves.items()}
    assert relative(scores_of(clean, copied, other)[0], want) > 1e-3
    for side in (clean, *copied.values()):  # what a row's own half says of it
        for name in halves:
            side[name][np.arange(40), np.arange(40) % 2] = np.nan
    np.testing.assert_array_equal(scores_of(clean, copied, train)[0], want)


def test_a_kind_that_cannot_be_told_has_no_share_though_the_training_rows_look_like_it():
    rng = np.random.default_rng(4)
    clean, train = drawn(rng, 60), drawn(rng, 100, 2.0, slice(1), start=60)
    copied = {"swapped": drawn(rng, 60, 0.1, slice(1)), "truncated": drawn(rng, 60, 2.0, slice(5, 10))}
    noise = scores_of(clean, copied, train)[1]
    assert noise.evidence["swapped"].auc < 0.6 < noise.evidence["truncated"].auc
    assert noise.shares["swapped"] == 0


def test_no_row_is_matched_by_what_was_learned_from_it_or_its_original(monkeypatch):
    folds = []

    class Noted(Match):
        def __init__(self, prompt_ND, answer_ND, fold):
            folds.append(fold)
            super().__init__(prompt_ND, answer_ND, fold)

        def __call__(self, prompt_ND, answer_ND, fold):
            folds.append(fold)
            return super().__call__(prompt_ND, answer_ND, fold)

    monkeypatch.setattr("forvalue_callbacks.methods.weighing.Match", Noted)
    rng = np.random.default_rng(0)
    scores_of(drawn(rng, 40), {"swapped": drawn(rng, 40, 2.0)}, drawn(rng, 50, start=40))
    learned, clean, copies, train = folds[:4]
    np.testing.assert_array_equal(np.sort(learned), np.sort(np.concatenate([clean, train])))
    np.testing.assert_array_equal(copies, clean)
    assert set(train.tolist()) == set(clean.tolist()) == set(range(FOLDS))


def shifted(n=200, noisy=60, seed=0):
    """Clean rows, copies whose measures are lower, and training rows of which the first are noisy alike."""
    rng = np.random.default_rng(seed)
    clean, copied = drawn(rng, n), {"swapped": drawn(rng, n, 3.0, slice(5))}
    sides = [drawn(rng, noisy, 3.0, slice(5), start=n), drawn(rng, n - noisy, start=n + noisy)]
    train = {name: np.concatenate([side[name] for side in sides]) for name in sides[0]}
    return clean, copied, train


def test_the_share_comes_with_an_error_and_no_more_is_dropped_than_it_allows():
    values, noise, judgements = scores_of(*shifted())
    assert abs(noise.share - 0.3) < 2 * noise.share_error + 0.01
    assert 0 < noise.share_error < 0.1
    assert (values < 0).mean() <= noise.share + 1.96 * noise.share_error
    assert (values[:60] < 0).mean() > 0.9
    low, high = noise.evidence["swapped"].interval
    assert low <= noise.evidence["swapped"].auc <= high
    bad = np.flatnonzero(values < 0)
    assert all(judgements.kind[i] == "swapped" and judgements.why[i] for i in bad)
    ok = np.flatnonzero(values > 0)
    assert all(judgements.kind[i] is None for i in ok)


def test_no_more_is_dropped_than_the_share_and_its_error_allow(monkeypatch):
    """Whatever the log odds say: here the share that the moments find is a third of what the rows look like."""
    monkeypatch.setattr("forvalue_callbacks.methods.weighing.share_by_moments", lambda *_: (0.1, 0.02))
    values, noise, _ = scores_of(*shifted())
    n_judged = len(values) - noise.n_unjudged - noise.n_unlike
    assert 0.1 * n_judged - 1 <= (values < 0).sum() <= (0.1 + 1.96 * 0.02) * n_judged
    assert (values[60:] >= 0).all()


def test_a_share_that_is_hardly_known_lets_no_more_be_dropped_than_its_lower_end(monkeypatch):
    monkeypatch.setattr("forvalue_callbacks.methods.weighing.share_by_moments", lambda *_: (0.9, 0.4))
    values, noise, _ = scores_of(*shifted())
    n_judged = len(values) - noise.n_unjudged - noise.n_unlike
    assert 0 < (values < 0).sum() <= (0.9 - 1.96 * 0.4) * n_judged


def test_of_many_kinds_one_is_found_in_clean_rows_by_chance_so_a_share_must_be_surer(monkeypatch):
    """By two and a half standard errors: enough where one kind is looked for, not where seven are."""
    monkeypatch.setattr("forvalue_callbacks.methods.weighing.share_by_moments", lambda *_: (0.1, 0.04))
    clean, copied, train = shifted()
    assert (scores_of(clean, copied, train)[0] < 0).any()
    rng = np.random.default_rng(7)
    more = {f"kind {k}": drawn(rng, 200, 3.0, slice(k, k + 5)) for k in range(1, 7)}
    values, noise, _ = scores_of(clean, copied | more, train)
    assert min(known.auc for known in noise.evidence.values()) > 0.6
    assert (values >= 0).all()
    assert noise.share - 1.96 * noise.share_error <= 0, "what is said is what is done"
    monkeypatch.setattr("forvalue_callbacks.methods.weighing.share_by_moments", lambda *_: (0.3, 0.04))
    assert (scores_of(clean, copied | more, train)[0] < 0).sum() > 40


def test_the_claim_about_a_kind_holds_on_rows_that_nobody_has_seen():
    """Its AUC on copies of the validation rows, out of fold, against that of training rows that went wrong alike."""
    claimed, true = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        clean, copied = drawn(rng, 300), {"swapped": drawn(rng, 300, 0.5, slice(5))}
        sides = [drawn(rng, 1000, 0.5, slice(5), start=300), drawn(rng, 1000, start=1300)]
        train = {name: np.concatenate([side[name] for side in sides]) for name in sides[0]}
        for columns in (clean, copied["swapped"], train):  # halves that agree: the mean of both is no better than one
            for name in (*HALF_CANDIDATES, "alone, fitted"):
                if name in columns:
                    columns[name][:, 1] = columns[name][:, 0]
        values, noise, _ = scores_of(clean, copied, train)
        claimed.append(noise.evidence["swapped"].auc)
        true.append(auc(values[1000:], values[:1000]))
    assert 0.7 < np.mean(claimed) < 0.95, "neither hidden nor plain"
    assert abs(np.mean(claimed) - np.mean(true)) < 0.03


def test_nothing_is_dropped_of_clean_rows():
    for seed in range(3):
        values, noise, _ = scores_of(*shifted(noisy=0, seed=seed))
        assert (values >= 0).all()
        assert noise.share < 0.05


def test_rows_with_prompts_of_another_kind_are_not_judged_and_kept():
    clean, copied, train = shifted()
    train["prompt"][30:90] += 20.0  # noisy ones and right ones
    values, noise, judgements = scores_of(clean, copied, train)
    assert np.isnan(judgements.probability[30:90]).all()
    assert (values[30:90] >= 0).all()
    assert 60 <= noise.n_unjudged < 75
    assert "another kind" in judgements.why[40]
    assert abs(noise.share - 30 / 140) < 2 * noise.share_error + 0.02
    assert (values[:30] < 0).mean() > 0.8


def test_states_along_directions_that_validation_rows_chose_are_judged():
    """Of 200 validation rows all lie where the last of their own directions is 0, and no other row does."""
    clean, copied, train = shifted()
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(400, 300)) / np.arange(1, 301)
    basis = np.linalg.svd(wide[:200] - wide[:200].mean(0), full_matrices=False)[2].T
    clean["prompt"], train["prompt"] = np.split(wide.astype(np.float32) @ basis.astype(np.float32), 2)
    copied["swapped"]["prompt"] = clean["prompt"]
    for side in (clean, copied["swapped"], train):
        side["answer"] = side["prompt"] + 0.1
    values, noise, _ = scores_of(clean, copied, train, bases=basis)
    assert noise.n_unjudged < 30
    assert (values[:60] < 0).mean() > 0.8
    train["prompt"] = train["prompt"] + 30 * (np.arange(200) == 0)
    assert scores_of(clean, copied, train, bases=basis)[1].n_unjudged == 200, "another kind is seen there too"


def test_prompts_that_training_rows_share_do_not_make_them_another_kind():
    """Five rows of each of 40 prompts: one that is in several folds tells that its rows are no validation rows."""
    clean, copied, train = shifted()
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(240, 8))
    clean["prompt"] = clean["answer"] = copied["swapped"]["prompt"] = copied["swapped"]["answer"] = prompts[:200]
    which = rng.permutation(200) % 40
    train["prompt"] = train["answer"] = prompts[200 + which]
    train["asked"] = clean["asked"][which]
    values, noise, _ = scores_of(clean, copied, {**train, "prompt hash": 1000 + which})
    assert noise.n_unjudged < 20
    assert (values[:60] < 0).mean() > 0.8
    for side in (clean, train):
        side["prompt hash"] = np.zeros(200, dtype=int)
    train["prompt"] = train["prompt"] + 1.0  # of images, say, under a text that all rows have
    assert scores_of(clean, copied, train)[1].n_unjudged > 60, "one prompt for all does not make one fold"


def test_answers_far_shorter_or_longer_are_not_judged():
    clean, copied, train = shifted()
    train["length"][:10] -= 20.0
    values, _, judgements = scores_of(clean, copied, train)
    assert (values[:10] >= 0).all()
    assert all("shorter or longer" in why for why in judgements.why[:10])
    copied["swapped"]["length"][:100] -= 20.0  # as this kind of noise is, which is never taken for another
    values, _, judgements = scores_of(clean, copied, train)
    assert (values[:10] < 0).sum() >= 8


def test_answers_longer_than_all_known_are_judged_where_a_single_measure_tells_the_noise():
    def found(row_shift):
        rng = np.random.default_rng(5)
        clean, noise = drawn(rng, 200), drawn(rng, 200, shift=1.5)
        noise["last token"] = noise["last token"] - row_shift
        train = drawn(rng, 200, start=200)
        bad = drawn(rng, 60, shift=1.5, start=400)
        bad["last token"] = bad["last token"] - row_shift
        train = {name: np.concatenate([train[name], bad[name]]) for name in train}
        train["length"][200:230] += 20.0
        train["length"][:5] += 20.0
        return scores_of(clean, {"garbage": noise}, train)

    (values, _, _), (by_many, _, judgements) = found(6.0), found(0.0)
    assert (values[200:230] < 0).sum() >= 28
    assert (values[:5] >= 0).all()
    assert (by_many[200:230] >= 0).all()  # many measures tell it, each of them a little: of rows of known lengths only
    assert (by_many[230:] < 0).sum() >= 20
    assert all("shorter or longer" in why for why in judgements.why[200:230])


@pytest.mark.parametrize(
    ("name", "value", "word"), [("end", 7, "EOS"), ("capitals", True, "capitals"), ("full stop", True, "full stop")]
)
def test_a_form_that_one_side_has_and_the_other_has_not_is_named_and_no_noise(name, value, word, caplog):
    clean, copied, train = shifted()
    train[name][:] = value
    values, noise, judgements = scores_of(clean, copied, train)
    assert (values >= 0).all()
    assert noise.n_unjudged == len(values)
    assert (noise.share, noise.share_error) == (0.0, 1.0), "nothing is known"
    assert len(noise.differences) == 1
    assert word in noise.differences[0]
    assert noise.differences[0] in caplog.text
    assert "another form" in judgements.why[0]


def test_a_plain_rule_counts_unless_validation_rows_hit_it_as_often():
    clean, copied, train = shifted(noisy=0)
    train["rule"][:20] = 1 + list(RULES).index("refusal")
    values, noise, judgements = scores_of(clean, copied, train)
    assert (values[:20] < -1).all()
    assert (values[20:] >= 0).all()
    assert set(judgements.kind[:20]) == {"refusal"}
    assert noise.share == pytest.approx(0.1, abs=0.02)
    clean["rule"][:20] = 1 + list(RULES).index("refusal")
    assert (scores_of(clean, copied, train)[0] >= 0).all()


def test_rows_unlike_anything_are_named_and_kept():
    clean, copied, train = shifted()
    for name in HALF_CANDIDATES[5:]:  # as no copy is
        train[name][100:105] += np.array([-9.0, -9.0])
        train[name][105:110] += np.array([9.0, 9.0])
    values, noise, judgements = scores_of(clean, copied, train)
    assert noise.n_unlike >= 10
    assert (values[100:110] >= 0).all()
    assert all("worth a look" in why for why in judgements.why[100:110])


def test_answers_are_swapped_within_a_half(monkeypatch):
    """The other half would know them."""
    validation, halves = answered(40, seed=1), []

    def noted(rows, *_):
        halves.append([row.input_ids.tolist() for row in rows])
        if len(halves) == 2:
            raise RuntimeError("seen enough")
        return [None] * len(rows)

    monkeypatch.setattr("forvalue_callbacks.methods.auto.corrupted", noted)
    scorer = ForValueScorer(build_model(), validation, ForValueConfig(method="auto"), progress=False)
    with pytest.raises(RuntimeError, match="seen enough"):
        scorer.score(answered(3))
    assert sorted([*halves[0], *halves[1]]) == sorted(row["input_ids"] for row in validation)
    assert len(halves[0]) == len(halves[1]) == 20


def test_answers_that_copies_share_are_read_once_and_judged_by_the_half_that_does_not_know_them(monkeypatch):
    validation, kept, made, part = answered(40, seed=1), {}, {}, Progress.part

    def counted(self, name, rows):
        made[name] = rows
        return part(self, name, rows)

    def noted(self, state, found):
        kept.update(state)
        return np.zeros(found.n), NoiseEstimate(0.0, {}, 40), Judgements.none(found.n)

    monkeypatch.setattr(Progress, "part", counted)
    monkeypatch.setattr(Auto, "finish", noted)
    scorer = ForValueScorer(build_model(), validation, ForValueConfig(method="auto"))
    scorer.score(answered(3))
    clean, copies, reference = kept["clean"], kept["copies"], kept["reference"]
    assert kept["kinds"][0] == "swapped"
    assert made["answers alone"] <= 40 + len(copies["class"]) - (copies["class"] == 1).sum()
    method = Auto()
    method.bos = scorer.backbone.bos
    for h in (0, 1):
        rows = [validation[int(i)] for i in clean["place"][clean["half"] == h]]
        with torch.no_grad():
            judged = measured(scorer.run, method, {"reference": reference.half(1 - h)}, rows, "rows")
        swapped = (copies["class"] == 1) & (copies["half"] == h)
        for name in ("alone", "alone, fitted"):
            np.testing.assert_allclose(clean[name][clean["half"] == h], judged[name], rtol=1e-4, atol=1e-6)
            # In another order the answers are the same ones.
            assert set(copies[name][swapped].tolist()) == set(clean[name][clean["half"] == h].tolist())


def test_auto_and_labels_agree_where_answers_repeat_and_find_the_wrong_ones():
    model = build_model("llama")
    validation, _ = repeated(90, seed=1)
    train, wrong = repeated(300, seed=2, noise=0.3)
    values = {}
    for method in ("label_model", "auto"):
        scores = ForValueScorer(model, validation, ForValueConfig(method=method), progress=False).score(train)
        values[method] = scores.values
        assert abs(scores.noise.share - wrong.mean()) < 0.08
        assert "estimated share" in scores.summary()
    np.testing.assert_array_equal(values["label_model"], values["auto"])
    assert auc(values["auto"][~wrong], values["auto"][wrong]) > 0.9
    plain = ForValueScorer(model, validation, progress=False).score(train)
    assert relative(scores.log_likelihood, plain.log_likelihood) < 1e-5
    np.testing.assert_array_equal(scores.n_labelled, plain.n_labelled)


def test_auto_finds_swapped_answers_that_repeat_their_prompt():
    """Answers that copy their prompt, which no random model predicts: the overlap and the match tell."""
    rng = np.random.default_rng(0)

    def copies(n):
        rows = []
        for _ in range(n):
            words = rng.integers(3, 67, 6).tolist()
            rows.append({"input_ids": [*words, *words[:4], EOS], "labels": [-100] * 6 + [*words[:4], EOS]})
        return rows

    validation, train = copies(80), copies(200)
    wrong = np.arange(200) < 60
    for i in range(60):
        train[i] = {**train[i], "input_ids": train[i]["input_ids"][:6] + train[(i + 1) % 60]["labels"][6:]}
        train[i]["labels"] = [-100] * 6 + train[i]["input_ids"][6:]
    train[100] = {"input_ids": [5], "labels": [-100]}
    scores = ForValueScorer(build_model("llama"), validation, ForValueConfig(method="auto"), progress=False).score(
        train
    )
    assert scores.reasons[100] is not None
    assert np.isnan(scores.values[100])
    ok = np.isfinite(scores.values)
    assert ok.sum() == 199
    assert auc(scores.values[ok & ~wrong], scores.values[ok & wrong]) > 0.95
    assert abs(scores.noise.share - 0.3) < 0.08
    assert scores.noise.evidence["swapped"].auc > 0.95
    assert set(scores.noise.evidence) == set(KINDS) - set(TEXT_KINDS), "no tokenizer"
    assert "on your 80 validation rows" in scores.summary()
    assert (Drop("auto")(scores.values) == 0)[wrong].mean() > 0.8


def test_auto_says_what_it_cannot_find(caplog):
    """Random answers of a random model: nothing tells a swapped one."""
    validation, train = answered(60, seed=1), answered(40, seed=2)
    scores = ForValueScorer(build_model("llama"), validation, ForValueConfig(method="auto"), progress=False).score(
        train
    )
    assert scores.noise.evidence["swapped"].auc < 0.65
    assert "do not filter by this against it" in scores.summary()
    assert any("do not filter" in record.message for record in caplog.records)


def test_scores_do_not_depend_on_the_batch_size():
    model, validation, train = build_model("llama", torch.float64), answered(50, seed=1), answered(30, seed=2)
    values = [
        ForValueScorer(model, validation, ForValueConfig(method="auto", max_tokens_per_batch=n), progress=False)
        .score(train)
        .values
        for n in (20, 10_000)
    ]
    assert relative(values[0], values[1]) < 1e-3


def test_what_has_no_meaning_for_log_odds_is_refused():
    model, (validation, _) = build_model(), repeated(20)
    scorer = ForValueScorer(model, validation, ForValueConfig(method="label_model"), progress=False)
    for call in (partial(scorer.pairwise, validation), scorer.direction):
        with pytest.raises(ValueError, match="one number per row"):
            call()
    with pytest.raises(ValueError, match="normalize"):
        ForValueConfig(method="auto", normalize="length")
    with pytest.raises(ValueError, match="add_column"):
        ForValueTransform(model, validation, ForValueConfig(method="auto"))
    with pytest.raises(ValueError, match="answers that repeat"):
        ForValueScorer(model, build_rows(20), ForValueConfig(method="label_model"), progress=False).score(
            build_rows(3)
        )
    with pytest.raises(ValueError, match="give at least 40"):
        ForValueScorer(model, build_rows(20), ForValueConfig(method="auto"), progress=False).score(build_rows(3))


def rows(n, seed, *, eos):
    generator = np.random.default_rng(seed)
    out = []
    for i in range(n):
        prompt, answer = generator.integers(10, 60, 5).tolist(), [3 + i % 3, *([EOS] if eos else [])]
        out.append({"input_ids": prompt + answer, "labels": [-100] * 5 + answer})
    return out


def test_answers_in_another_form_are_told(caplog):
    scorer = ForValueScorer(build_model(), rows(40, 0, eos=True), ForValueConfig("auto"), progress=False)
    with caplog.at_level(logging.WARNING):
        scorer.score(rows(12, 1, eos=False))
    assert "0 of 12 training rows have an answer that a validation row has, token for token" in caplog.text
    assert "nearly all answers end with the same token, as with EOS" in caplog.text


def test_answers_in_one_form_are_not(caplog):
    train = rows(12, 1, eos=True)
    train[0]["input_ids"][-2] = train[0]["labels"][-2] = 9  # no validation row has it
    ForValueScorer(build_model(), rows(40, 0, eos=True), ForValueConfig("auto"), progress=False).score(train)
    assert "token for token" not in caplog.text


def test_the_words_say_what_the_evidence_is_about_and_what_is_not_judged():
    evidence = {
        "swapped": Evidence(0.9, (0.85, 0.95), "overlap", 0.8, 0.7),
        "refusal": Evidence(0.5, (0.4, 0.6), "match", 0.5, 0.5),
    }
    noise = NoiseEstimate(
        0.2, evidence, 80, {"swapped": 0.2}, share_error=0.05, n_unjudged=7, n_unlike=3, differences=("no EOS",)
    )
    assert NoiseEstimate.from_dict(json.loads(json.dumps(noise.to_dict()))) == noise
    said = "\n".join(about_noise(noise))
    for words in (
        "0.90 (0.85 to 0.95; best single measure: overlap 0.80; mean log-likelihood 0.70)",
        "no promise about the errors of your data",
        "no score finds refusal: do not filter by this against it",
        "no EOS: a difference of form, no noise",
        "0.20 (95 %: 0.10 to 0.30): swapped 0.20; of the kinds that were found, and not of others",
        "not judged  7 rows, kept",
        "look at     3 rows, kept",
    ):
        assert words in said


def test_the_order_of_rows_decides_nothing():
    """Neither that of the validation rows nor that of the training rows."""
    model, validation, train = build_model("llama", torch.float64), answered(60, seed=1), answered(60, seed=2)
    validation[7] = validation[3]  # rows alike stay in one half and one fold
    rng = np.random.default_rng(0)
    for i in range(20):  # words of another answer
        start = sum(label == -100 for label in train[i]["labels"])
        train[i]["input_ids"][start:] = train[i]["labels"][start:] = rng.integers(
            3, 20, len(train[i]["labels"]) - start
        ).tolist()
    turns = [np.arange(60), rng.permutation(60)]
    values = []
    for turn, other in zip(turns, reversed(turns), strict=True):
        config = ForValueConfig(method="auto")
        scorer = ForValueScorer(model, [validation[i] for i in other], config, progress=False)
        found = np.empty(60)
        found[turn] = scorer.score([train[i] for i in turn]).values
        values.append(found)
    np.testing.assert_array_equal(values[0] < 0, values[1] < 0)
    assert relative(values[0], values[1]) < 1e-3


def test_validation_rows_that_look_like_noise_are_named_by_their_places(caplog):
    rng = np.random.default_rng(6)
    clean, copied, train = drawn(rng, 200), {"swapped": drawn(rng, 200, 3.0)}, drawn(rng, 100, start=200)
    _, noise, _ = scores_of(clean, copied, train)
    assert not noise.validation.surely
    bad = np.arange(0, 200, 10)
    for name in HALF_CANDIDATES:
        clean[name][bad] -= 3.0
    found = scores_of(clean, copied, train)[1].validation
    assert found.surely
    assert np.isin(found.rows, 1000 + bad).mean() > 0.8
    assert len(found.rows) > 0.6 * len(bad)
    assert f"{len(found.rows)} validation rows look wrong themselves (rows 1" in caplog.text
