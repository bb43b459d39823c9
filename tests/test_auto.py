"""method="auto" and "labels": corrupted copies, the classifier and its shares, the label model, every way in."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from forvalue_callbacks import Drop, ForValueConfig, ForValueScorer, ForValueTransform, baselines
from forvalue_callbacks.core.softmax import fit_softmax
from forvalue_callbacks.data.corruption import KINDS, answer_span, corrupted, word_starts
from forvalue_callbacks.data.sft import Row, RowPreparer
from forvalue_callbacks.methods.auto import _scores
from forvalue_callbacks.methods.calibration import fit_classifier, log_odds, shares
from forvalue_callbacks.methods.label_model import _expectation, fit_labels
from forvalue_callbacks.methods.measures import (
    FOLDS,
    HALF_CANDIDATES,
    ROW_CANDIDATES,
    Evidence,
    Half,
    Match,
    Measured,
    n_grams,
)
from forvalue_callbacks.model.run import Batcher, concatenate
from forvalue_callbacks.scores.scores import auc
from helpers.models import build_model, build_rows
from helpers.oracles import inverse_second_moment, relative, row_gradient

EOS = 2


def answered(n, seed=0, vocab=67):
    """Rows of a prompt and an answer of two to eight tokens that ends with EOS."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt, answer = (rng.integers(3, vocab, rng.integers(lo, 9)) for lo in (3, 2))
        ids = np.concatenate([prompt, answer, [EOS]])
        labels = np.concatenate([np.full(len(prompt), -100), answer, [EOS]])
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


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


# ---- corrupted copies ----


def prepared(rows):
    prepare = RowPreparer()
    return [prepare(row) for row in rows]


def answer(row):
    return row.labels[row.labels != -100].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_the_prompt_of_its_row_and_another_answer_that_still_ends(kind):
    rows = prepared(answered(60))
    copies = corrupted(rows, kind, np.random.default_rng(0))
    changed = [(row, copy) for row, copy in zip(rows, copies, strict=True) if copy is not None]
    assert len(changed) > 45
    for row, copy in changed:
        start = answer_span(row).start
        assert copy.input_ids[:start].tolist() == row.input_ids[:start].tolist()
        assert (copy.labels[:start] == -100).all()
        assert copy.input_ids[start:].tolist() == answer(copy) != answer(row)
        assert answer(copy)[-1] == EOS
        words, own = answer(copy)[:-1], answer(row)[:-1]
        if kind == "swapped":
            assert any(answer(copy) == answer(other) for other in rows)
        elif kind == "truncated":
            assert words == own[: len(words)]
            assert len(words) < len(own)
        else:
            longer, shorter = (words, own) if kind == "words inserted" else (own, words)
            rest = iter(longer)
            assert all(token in rest for token in shorter), "one is the other with words left out, in order"
            assert len(longer) > len(shorter)


def test_a_row_that_cannot_be_changed_has_no_copy():
    rows = prepared([{"input_ids": [3, 4, EOS], "labels": [-100, 4, EOS]}] * 5)
    assert corrupted(rows, "words deleted", np.random.default_rng(0)) == [None] * 5
    assert corrupted(rows, "swapped", np.random.default_rng(0)) == [None] * 5, "the same answer everywhere"


def test_words_are_deleted_whole():
    starts = np.zeros(67, dtype=bool)
    starts[:30] = True
    row = Row(np.arange(20, 40), np.array([-100, *range(21, 40)]))  # words 21, ..., 28, one from 29 on, the end
    for seed in range(5):
        (copy,) = corrupted([row], "words deleted", np.random.default_rng(seed), starts)
        kept = answer(copy)
        assert (29 in kept) == (35 in kept) == (38 in kept)


def test_as_many_words_change_as_the_kind_says_and_rows_keep_to_their_longest():
    words, end = 40, np.array([EOS])
    rows = [Row(np.concatenate([[3], k + np.arange(words), end]), np.concatenate([[-100], k + np.arange(words), end]))
            for k in range(100, 100 + 50 * words, words)]  # fmt: skip
    lengths = {kind: [] for kind in KINDS}
    for kind in KINDS:
        copies = corrupted(rows, kind, np.random.default_rng(0))
        lengths[kind] = [len(answer(copy)) - 1 for copy in copies]
        foreign = [
            sum(token not in row.labels for token in answer(copy)) for row, copy in zip(rows, copies, strict=True)
        ]
        if kind == "words inserted":
            assert sum(foreign) > 0.9 * sum(n - words for n in lengths[kind]), "words of all answers"
        cut = corrupted(rows, kind, np.random.default_rng(0), max_length=7)
        for copy, short in zip(copies, cut, strict=True):
            np.testing.assert_array_equal(short.input_ids, copy.input_ids[:7])
            np.testing.assert_array_equal(short.labels, copy.labels[:7])
    for kind, low, high in (("words deleted", 20, 36), ("words inserted", 44, 60), ("truncated", 8, 32)):
        assert low <= min(lengths[kind]) < low + 4 < high - 4 < max(lengths[kind]) <= high, kind


def test_the_answer_is_the_longest_run_of_labels():
    labels = np.array([-100, 5, -100, 6, 7, 8, -100, 9, 10])
    assert answer_span(Row(labels, labels)) == slice(3, 6)


def test_word_starts_come_from_the_tokenizers_spelling():
    class Tokenizer:
        def __len__(self):
            return 4

        def convert_ids_to_tokens(self, ids):
            return [["\u0120a", "b", "\u2581c", None][i] for i in ids]

    assert word_starts(Tokenizer(), 6).tolist() == [True, False, True, False, False, False]
    assert word_starts(None, 6) is None


# ---- classifier and shares ----


def mixture(n, share, seed):
    """Three features; noise of kind 1 shifts the first, of kind 2 spreads the second."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, n, p=[1 - sum(share), *share])
    x = rng.normal(size=(n, 3))
    x[kind == 1, 0] += 2
    x[kind == 2, 1] *= 4
    return x, kind


def calibrated(n=250, seed=0):
    clean, _ = mixture(n, (0, 0), seed)
    one, two = mixture(n, (1, 0), seed + 1)[0], mixture(n, (0, 1), seed + 2)[0]
    classes = np.repeat([0, 1, 2], n)
    return fit_classifier(np.concatenate([clean, one, two]), classes, np.tile(np.arange(n), 3))


@pytest.mark.parametrize("share", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.1, 0.4)])
def test_shares_of_a_known_mixture_are_found(share):
    classifier, _ = calibrated()
    x, kind = mixture(1000, share, 9)
    found = shares(classifier.log_p(x), 250)
    assert found.sum() == pytest.approx(1)
    assert abs((1 - found[0]) - sum(share)) < 0.06
    if sum(share):
        scores = log_odds(classifier.log_p(x), found)
        assert auc(scores[kind == 0], scores[kind > 0]) > 0.8
        assert abs((scores < 0).mean() - sum(share)) < 0.15, "0 is where a row is as likely noisy as clean"


def test_no_noise_is_found_where_there_is_none():
    """What the held-out rows' own sampling error looks like from 3,000 clean rows is no evidence."""
    for seed in range(4):
        classifier, _ = calibrated(seed=10 * seed)
        x, _ = mixture(3000, (0, 0), seed + 5)
        assert shares(classifier.log_p(x), 250).tolist() == [1, 0, 0]


def test_out_of_fold_probabilities_do_not_know_their_own_row():
    """Features that say nothing: out of fold the classes cannot be told, in sample they can."""
    rng = np.random.default_rng(0)
    x, classes = rng.normal(size=(60, 20)), np.repeat([0, 1], 30)
    _, held_out = fit_classifier(x, classes, np.tile(np.arange(30), 2))
    score = held_out[:, 0]
    assert auc(score[:30], score[30:]) < 0.7


def test_copies_of_a_row_are_never_in_different_folds():
    """A row and its copy look the same: what is said of both out of fold is the same."""
    x, classes = np.random.default_rng(0).normal(size=(30, 20)).repeat(2, 0), np.arange(60) % 2
    _, held_out = fit_classifier(x, classes, np.arange(30).repeat(2))
    np.testing.assert_array_equal(held_out[::2], held_out[1::2])


def test_classes_count_alike_however_many_rows_they_have():
    x = np.random.default_rng(0).normal(size=(600, 2))
    classifier, _ = fit_classifier(x, (np.arange(600) >= 500).astype(int), np.arange(600))
    assert abs(classifier.log_p(x).mean(0) - np.log(0.5)).max() < 0.1


def test_log_odds_are_those_of_bayes():
    p = np.array([[0.5, 0.3, 0.2]])
    share = np.array([0.6, 0.1, 0.3])
    want = np.log(0.5 * 0.6) - np.log(0.3 * 0.1 + 0.2 * 0.3)
    # The floor of half a row for each kind is above 0.1 with one row: take many.
    assert log_odds(np.log(np.repeat(p, 100, 0)), share)[0] == pytest.approx(want)


def test_rows_are_ranked_by_a_kind_that_was_not_found():
    """It keeps the share of half a row."""
    p = np.linspace(0.1, 0.9, 100)
    odds = log_odds(np.log(np.stack([p, 1 - p], 1)), np.array([1.0, 0.0]))
    np.testing.assert_allclose(odds, np.log(p) - np.log((1 - p) * 0.5 / 100), rtol=1e-12)


def test_auc_counts_ties_half():
    assert auc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


def test_the_softmax_is_fitted_to_its_optimum():
    torch.manual_seed(0)
    x, targets = torch.randn(80, 4, dtype=torch.float64), torch.rand(80, 3, dtype=torch.float64)
    fitted = fit_softmax(x, targets, ridge=2.0).requires_grad_(True)
    log_p = (x @ fitted[:-1] + fitted[-1]).log_softmax(1)
    objective = (targets * log_p).sum() - fitted[:-1].square().sum() - 0.5e-2 * fitted[-1].square().sum()
    (gradient,) = torch.autograd.grad(objective, fitted)
    assert float(gradient.abs().max()) < 1e-3


def test_a_match_never_scores_a_pair_that_it_has_seen():
    torch.manual_seed(0)
    prompts, answers = torch.randn(50, 4).double(), torch.randn(50, 4).double()
    fold = np.arange(50) % FOLDS
    before = Match(prompts, answers, fold)(prompts, answers, fold)
    kept = Match(prompts, answers, fold)
    for k in range(FOLDS):
        x, y = kept.sides[0](prompts), kept.sides[1](answers)
        others = torch.from_numpy(fold != k)
        torch.testing.assert_close(kept.cross[k], x[others].T @ y[others] / int(others.sum()))
    answers_related = prompts @ torch.randn(4, 4).double()
    related = Match(prompts, answers_related, fold)
    right = related(prompts, answers_related, fold)
    wrong = related(prompts, answers_related.roll(1, 0), fold)
    assert auc(right, wrong) > 0.9
    assert auc(before, Match(prompts, answers, fold)(prompts, answers.roll(1, 0), fold)) < 0.75


def test_the_match_is_a_cosine_of_whitened_sides_with_a_tenth_of_ridge():
    torch.manual_seed(0)
    prompts = torch.randn(30, 4).double() @ torch.randn(4, 4).double()
    answers, fold = prompts + torch.randn(30, 4).double(), np.arange(30) % FOLDS

    def inverse_root(x):
        moment = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
        values, vectors = torch.linalg.eigh(moment + 0.1 * moment.trace() / 4 * torch.eye(4, dtype=torch.float64))
        return ((x - x.mean(0)) @ (vectors * values**-0.5)).numpy()

    p, a, want = inverse_root(prompts), inverse_root(answers), np.zeros(30)
    for i in range(30):
        others = fold != fold[i]
        projected = p[i] @ (p[others].T @ a[others]) / others.sum()
        want[i] = projected @ a[i] / (np.linalg.norm(p[i]) * np.linalg.norm(a[i]))
    assert relative(Match(prompts, answers, fold)(prompts, answers, fold), want) < 1e-9


def test_what_is_measured_on_a_row_is_that_of_the_row_alone():
    """Against the baselines' mutual information, the model's own logits, and n-grams counted by hand."""
    model, rows, held_out = build_model("llama", torch.float64), answered(8, seed=1), answered(12, seed=2)
    scorer = ForValueScorer(model, held_out, progress=False)
    items = scorer._validation()
    head = scorer.backbone.head()
    with torch.no_grad():
        halves = [Half.of(head, concatenate(scorer.batcher.labelled(items[h::2])), 0.01) for h in (0, 1)]
        evidence = Evidence(scorer.batcher, head, prepared(held_out), halves, bos=1)
        measured, reasons, _ = evidence.measure(rows, "rows")
    assert reasons == [None] * 8
    column = dict(zip(ROW_CANDIDATES, measured.row_NF.T, strict=True))
    assert relative(column["mutual information"], baselines.pmi(model, rows, bos_token_id=1)) < 1e-8
    assert relative(column["mean log-likelihood"], baselines.loss(model, rows)) < 1e-8
    for i, row in enumerate(rows):
        ids, start = torch.tensor(row["input_ids"]), sum(label == -100 for label in row["labels"])
        with torch.no_grad():
            logits_LV = model(input_ids=ids[None]).logits[0, :-1]
        log_p = logits_LV.log_softmax(-1)[start - 1 :]
        own = log_p.gather(1, ids[start:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(1)
        assert column["last token"][i] == pytest.approx(float(own[-1]))
        assert column["temperature score"][i] == pytest.approx(float((own + entropy).mean()))
        prompt, answer_ids = row["input_ids"][:start], row["input_ids"][start:]
        weights = {g: np.log(13 / (sum(g in n_grams(r.input_ids) for r in prepared(held_out)) + 0.5))
                   for g in n_grams(np.array(answer_ids))}  # fmt: skip
        shared = sum(w for g, w in weights.items() if g in n_grams(np.array(prompt)))
        assert column["overlap"][i] == pytest.approx(shared / sum(weights.values()))
    for h in (0, 1):
        plain = ForValueScorer(model, held_out[h::2], progress=False).score(rows)
        after = ForValueScorer(model, held_out[h::2], ForValueConfig("fitted_likelihood", "length"), progress=False)
        by_half = dict(zip(HALF_CANDIDATES, measured.half_NHF[:, h].T, strict=True))
        assert relative(by_half["gradient"], plain.values) < 1e-8
        assert relative(by_half["fitted_likelihood"], after.score(rows).values) < 1e-4


def log_likelihood(model, row):
    """Of the row's labelled tokens, by the model's own forward."""
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
    with torch.no_grad():
        log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    keep = labels != -100
    return float(log_p[keep].gather(1, labels[keep][:, None]).sum())


def test_what_half_of_the_held_out_rows_says_of_a_row_is_written_out():
    """Against autograd on the head's weight, and a copy of the model with the moved head."""
    model, rows, held_out = build_model("llama", torch.float64), answered(6, seed=1), answered(12, seed=2)
    scorer = ForValueScorer(model, held_out, progress=False)
    items, head = scorer._validation(), scorer.backbone.head()
    with torch.no_grad():
        halves = [Half.of(head, concatenate(scorer.batcher.labelled(items[h::2])), 0.01) for h in (0, 1)]
        measured, _, _ = Evidence(scorer.batcher, head, prepared(held_out), halves, bos=1).measure(rows, "rows")
    np.testing.assert_array_equal(measured.n_labelled, [len(answer(row)) for row in prepared(rows)])
    np.testing.assert_allclose(measured.row_NF[:, ROW_CANDIDATES.index("length")], np.log(measured.n_labelled))
    gradients, n = [row_gradient(model, row) for row in rows], measured.n_labelled
    answers = [answer(row) for row in prepared(rows)]
    alone = [{"input_ids": [1, *tokens], "labels": [-100, *tokens]} for tokens in answers]
    for h, half in enumerate(halves):
        metric = inverse_second_moment(model, held_out[h::2])
        direction = torch.stack([row_gradient(model, row) for row in held_out[h::2]]).mean(0)
        moved = deepcopy(model)
        with torch.no_grad():
            moved.get_output_embeddings().weight += half.move_VD
        before, after = (np.array([log_likelihood(m, row) for row in rows]) for m in (model, moved))
        after_alone = np.array([log_likelihood(moved, row) for row in alone])
        want, plain = {}, torch.eye(len(metric), dtype=metric.dtype)
        for name, along, m in (("gradient", direction, plain), ("whitened", direction @ metric, metric)):
            want[name] = np.array([float((along * g).sum()) for g in gradients])
            want[f"{name}, length"] = want[name] / n
            want[f"{name}, cosine"] = want[name] / [float((g @ m * g).sum().sqrt()) for g in gradients]
        want |= {"fitted": after - before, "fitted, length": (after - before) / n, "fitted_likelihood": after / n}
        want["mutual information, fitted"] = (after - after_alone) / n
        assert half.move_VD.any()
        assert tuple(want) == HALF_CANDIDATES
        for column, (name, values) in enumerate(want.items()):
            assert relative(measured.half_NHF[:, h, column], values) < 1e-6, name


def drawn(rng, n, shift=0.0, columns=slice(None)):
    """Numbers drawn at random for n rows, lower by a shift."""
    side = torch.from_numpy(rng.normal(size=(n, 4)))
    row, half = rng.normal(size=(n, len(ROW_CANDIDATES))), rng.normal(size=(n, 2, len(HALF_CANDIDATES)))
    half[:, :, columns] -= shift
    return Measured(row, half, side, side + 0.1, np.zeros(n), np.ones(n, dtype=int), np.arange(n))


def scores_of(clean, copied, train):
    """From what was measured, the same draws of folds each time; copies are in the order of the clean rows."""
    copies = {kind: (copy, np.arange(len(copy.index))) for kind, copy in copied.items()}
    return _scores(clean, copies, train, [None] * len(train.index), np.random.default_rng(1))


def test_training_rows_are_judged_by_both_halves_alike_and_held_out_rows_by_the_other_one():
    rng = np.random.default_rng(0)
    clean, copied, train = drawn(rng, 40), {"swapped": drawn(rng, 40, 2.0)}, drawn(rng, 50, 1.0)
    want = scores_of(clean, copied, train).values
    swapped = replace(train, half_NHF=train.half_NHF[:, ::-1])
    np.testing.assert_allclose(scores_of(clean, copied, swapped).values, want, rtol=1e-10)
    other = train.half_NHF.copy()
    other[:, 1] += 0.5
    assert relative(scores_of(clean, copied, replace(train, half_NHF=other)).values, want) > 1e-3
    for measured in (clean, *copied.values()):  # what a row's own half says of it
        measured.half_NHF[np.arange(40), np.arange(40) % 2] = np.nan
    np.testing.assert_array_equal(scores_of(clean, copied, train).values, want)


def test_a_kind_that_cannot_be_told_has_no_share_though_the_training_rows_look_like_it():
    rng = np.random.default_rng(4)
    clean, train = drawn(rng, 60), drawn(rng, 100, 2.0, slice(1))
    copied = {"swapped": drawn(rng, 60, 0.1, slice(1)), "truncated": drawn(rng, 60, 2.0, slice(5, 10))}
    noise = scores_of(clean, copied, train).metadata["noise"]
    assert noise["held_out"]["swapped"]["auc"] < 0.6 < noise["held_out"]["truncated"]["auc"]
    assert noise["shares"]["swapped"] == 0


def test_no_row_is_matched_by_what_was_learned_from_it_or_its_original(monkeypatch):
    folds = []

    class Noted(Match):
        def __init__(self, prompt_ND, answer_ND, fold):
            folds.append(fold)
            super().__init__(prompt_ND, answer_ND, fold)

        def __call__(self, prompt_ND, answer_ND, fold):
            folds.append(fold)
            return super().__call__(prompt_ND, answer_ND, fold)

    monkeypatch.setattr("forvalue_callbacks.methods.auto.Match", Noted)
    rng = np.random.default_rng(0)
    scores_of(drawn(rng, 40), {"swapped": drawn(rng, 40, 2.0)}, drawn(rng, 50))
    learned, clean, copies, train = folds
    np.testing.assert_array_equal(learned, np.concatenate([clean, train]))
    np.testing.assert_array_equal(copies, clean)
    assert set(train.tolist()) == set(clean.tolist()) == set(range(FOLDS))


def test_answers_are_swapped_within_a_half(monkeypatch):
    """The other half would know them."""
    held_out, halves = answered(40, seed=1), []

    def noted(rows, *_):
        halves.append([row.input_ids.tolist() for row in rows])
        if len(halves) == 2:
            raise RuntimeError("seen enough")
        return [None] * len(rows)

    monkeypatch.setattr("forvalue_callbacks.methods.auto.corrupted", noted)
    scorer = ForValueScorer(build_model(), held_out, ForValueConfig(method="auto"), progress=False)
    with pytest.raises(RuntimeError, match="seen enough"):
        scorer.score(answered(3))
    assert halves == [[row["input_ids"] for row in held_out[h::2]] for h in (0, 1)]


def test_wide_states_are_kept_along_their_leading_directions(monkeypatch):
    """Prompts along those of the held-out rows' prompts, answers along those of their answers."""
    monkeypatch.setattr("forvalue_callbacks.methods.measures.MATCH_DIMENSIONS", 4)
    model, rows, held_out = build_model("llama", torch.float64), answered(8, seed=1), answered(12, seed=2)
    scorer = ForValueScorer(model, held_out, progress=False)
    head = scorer.backbone.head()
    with torch.no_grad():
        half = Half.of(head, concatenate(scorer.batcher.labelled(scorer._validation())), 0.01)
        evidence = Evidence(scorer.batcher, head, prepared(held_out), [half, half], bos=1)
        clean, wide = (evidence.measure(side, "rows")[0] for side in (held_out, rows))
        narrow = evidence.project(clean), evidence.measure(rows, "rows")[0]
    for name in ("prompt_ND", "answer_ND"):
        known = getattr(clean, name)
        _, _, directions = np.linalg.svd((known - known.mean(0)).numpy())
        for before, after in zip((clean, wide), narrow, strict=True):
            x, kept = getattr(before, name).numpy() @ directions[:4].T, getattr(after, name).numpy()
            assert relative(kept @ kept.T, x @ x.T) < 1e-5, "up to a rotation"


# ---- the label model ----


def clusters(n, seed, noise, k=4, d=6):
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(k, d, generator=torch.Generator().manual_seed(99))
    true = torch.randint(k, (n,), generator=generator)
    x = centers[true] + torch.randn(n, d, generator=generator)
    wrong = torch.rand(n, generator=generator) < noise
    observed = torch.where(wrong, (true + torch.randint(1, k, (n,), generator=generator)) % k, true)
    return x, true.numpy(), observed.numpy(), wrong.numpy()


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_label_model_finds_wrong_answers_and_their_share(noise):
    known, answers, _, _ = clusters(60, 0, 0.0)
    x, _, observed, wrong = clusters(500, 1, noise)
    fit = fit_labels(known, answers, x, observed)
    assert abs(fit.noise_share - wrong.mean()) < 0.04
    assert fit.flipped_auc > 0.9
    if noise:
        assert auc(fit.log_odds[~wrong], fit.log_odds[wrong]) > 0.95


def test_an_answer_that_no_held_out_row_has_is_learned_from_the_training_rows():
    known, answers, _, _ = clusters(80, 0, 0.0)
    x, true, observed, wrong = clusters(500, 1, 0.2)
    kept = answers != 3
    fit = fit_labels(known[torch.from_numpy(kept)], answers[kept], x, observed)
    right = (true == 3) & ~wrong
    assert (fit.log_odds[right] > 0).mean() > 0.9


def test_a_row_does_not_vouch_for_itself():
    """One row's observed answer changed: the model that judges it is the same, so the odds of both answers agree."""
    known, answers, _, _ = clusters(60, 0, 0.0, k=2)
    x, _, observed, _ = clusters(300, 1, 0.2, k=2)
    before = fit_labels(known, answers, x, observed)
    flipped = observed.copy()
    flipped[7] = 1 - flipped[7]
    after = fit_labels(known, answers, x, flipped)
    # log p(o) T[o, o] / p(c) T[c, o] changes sign up to the noise terms T, which one row in 300 hardly moves.
    assert before.log_odds[7] * after.log_odds[7] < 0


def test_a_row_that_only_its_own_feature_could_explain_does_not_vouch_for_itself():
    """The odds of both answers of a row add up to what the noise says, also where it has a feature of its own."""
    rng = np.random.default_rng(0)
    known, x = torch.randn(40, 2, generator=torch.manual_seed(0)), torch.randn(200, 2)
    answers = (known[:, 0] > 0).long().numpy()
    observed = ((x[:, 0] > 0).numpy() ^ (rng.random(200) < 0.2)).astype(int)
    known, x = torch.cat([known, torch.zeros(40, 6)], 1), torch.cat([x, torch.eye(200)[:, :6]], 1)
    before, sums = fit_labels(known, answers, x, observed), []
    for i in range(9):
        flipped = observed.copy()
        flipped[i] = 1 - flipped[i]
        sums.append(before.log_odds[i] + fit_labels(known, answers, x, flipped).log_odds[i])
    assert max(sums) - min(sums) < 1


def test_an_answer_given_in_place_of_another_is_doubted_and_not_the_other_way_round():
    true = torch.arange(600) % 2
    x = torch.randn(600, 3, generator=torch.manual_seed(0))
    x[:, 0] += true
    observed = true[:400].clone()
    observed[100:] = 1  # none of the answers 0 is wrong, of the answers 1 many are
    fit = fit_labels(x[400:], true[400:].numpy(), x[:400], observed.numpy())
    zero, one = (fit.log_odds[observed.numpy() == k].mean() for k in (0, 1))
    assert zero > one + 0.3


def test_training_rows_teach_the_label_model_what_few_held_out_rows_cannot():
    known, answers, _, _ = clusters(8, 0, 0.0)
    x, _, observed, _ = clusters(300, 1, 0.2)
    alone, together = fit_labels(known, answers, x, observed).likelihood
    assert together > alone + 0.3


def test_the_expectation_step_is_that_of_a_loop():
    """Two alternations: after the first the noise is no longer the symmetric one that it starts from."""
    torch.manual_seed(0)
    log_p = (3 * torch.randn(30, 3, dtype=torch.float64)).log_softmax(1)
    observed = np.arange(30) % 3
    truth, flips = _expectation(log_p, observed, iterations=2)
    noise = 0.8 * np.eye(3) + 0.1 * (1 - np.eye(3))
    for _ in range(2):
        q = np.array([[float(log_p[i, c].exp()) * noise[c, o] for c in range(3)] for i, o in enumerate(observed)])
        q /= q.sum(1, keepdims=True)
        counts = np.zeros((3, 3))
        for i, o in enumerate(observed):
            counts[:, o] += q[i]
        rate = 1 - np.trace(counts) / counts.sum()
        symmetric = (1 - rate) * np.eye(3) + rate * (1 - np.eye(3)) / 2
        noise = (counts + 5 * symmetric) / (counts.sum(1, keepdims=True) + 5)
    np.testing.assert_allclose(truth, q, rtol=1e-10)
    np.testing.assert_allclose(flips, noise, rtol=1e-10)


def test_one_answer_cannot_be_wrong():
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match="all answers are the same"):
        fit_labels(x, np.zeros(10, dtype=int), x, np.zeros(10, dtype=int))


# ---- the scorer ----


def test_auto_and_labels_agree_where_answers_repeat_and_find_the_wrong_ones():
    model = build_model("llama")
    validation, _ = repeated(90, seed=1)
    train, wrong = repeated(300, seed=2, noise=0.3)
    values = {}
    for method in ("label_model", "auto"):
        scores = ForValueScorer(model, validation, ForValueConfig(method=method), progress=False).score(train)
        values[method] = scores.values
        assert abs(scores.metadata["noise"]["share"] - wrong.mean()) < 0.08
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
    noise = scores.metadata["noise"]
    assert abs(noise["share"] - 0.3) < 0.08
    assert noise["held_out"]["swapped"]["auc"] > 0.95
    assert set(noise["held_out"]) == set(KINDS)
    assert "on your 80 held-out rows" in scores.summary()
    assert (Drop("auto")(scores.values) == 0)[wrong].mean() > 0.8


def test_auto_says_what_it_cannot_find(caplog):
    """Random answers of a random model: nothing tells a swapped one."""
    validation, train = answered(60, seed=1), answered(40, seed=2)
    scores = ForValueScorer(build_model("llama"), validation, ForValueConfig(method="auto"), progress=False).score(
        train
    )
    assert scores.metadata["noise"]["held_out"]["swapped"]["auc"] < 0.65
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
    for call in (scorer.token_scores, scorer.pairwise):
        with pytest.raises(ValueError, match="one number per row"):
            call(validation)
    with pytest.raises(ValueError, match="one number per row"):
        scorer.direction()
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


def test_the_batcher_takes_rows_that_are_prepared():
    model, rows = build_model(), build_rows(6)
    scorer = ForValueScorer(model, build_rows(2, seed=1), progress=False)
    assert isinstance(scorer.batcher, Batcher)
    given, _, _ = scorer.batcher.map(rows, lambda batch: batch.lengths, "rows")
    ready, _, _ = scorer.batcher.map(prepared(rows), lambda batch: batch.lengths, "rows")
    assert given == ready
