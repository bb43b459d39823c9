"""Data set in, scores out: by two oracles, and the same whatever the order, padding and size of batches."""

import copy

import numpy as np
import pytest
import torch

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.data import reader
from forvalue_callbacks.data.sft import RowConfig
from forvalue_callbacks.methods import METHODS
from forvalue_callbacks.methods.label_model import LabelModel
from helpers.models import ARCHITECTURES, build_model, build_rows, llava
from helpers.oracles import (
    inverse_second_moment,
    relative,
    row_gradient,
    score_by_autograd,
    score_by_double_sum,
)

TRAIN, VALIDATION = build_rows(12, seed=1), build_rows(5, seed=2)


def score(model, train=TRAIN, validation=VALIDATION, rows=None, **config):
    return ForValueScorer(model, validation, ForValueConfig(**config), row_config=rows, progress=False).score(train)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_autograd_on_the_heads_weight(architecture):
    """float64 to 1e-10, and float32 within 1e-5 of the float64 oracle.

    Gemma's own RMSNorm rounds to float32 in a float64 model too, so that a row in a batch differs from the row alone.
    """
    model = build_model(architecture, torch.float64)
    want = [score_by_autograd(model, row, VALIDATION) for row in TRAIN]
    assert relative(score(model).values, want) < (1e-6 if architecture.startswith("gemma") else 1e-10)
    assert relative(score(model.float()).values, want) < 1e-5


def test_scores_equal_the_papers_double_sum():
    model = build_model("llama", torch.float64)
    pairs = [[score_by_double_sum(model, row, v) for v in VALIDATION] for row in TRAIN]
    assert relative(score(model).values, np.mean(pairs, axis=1)) < 1e-10
    scorer = ForValueScorer(model, VALIDATION, progress=False)
    assert relative(scorer.pairwise(TRAIN), pairs) < 1e-10


@pytest.mark.parametrize("fault", ["shift", "prompt"])
def test_the_oracle_sees_a_planted_fault(fault):
    """Labels shifted by one more, or the prompt scored too: the oracle must tell."""
    model = build_model("llama", torch.float64)
    want = [score_by_autograd(model, row, VALIDATION) for row in TRAIN]
    if fault == "shift":
        wrong = [{**row, "labels": [-100, *row["labels"][:-1]]} for row in TRAIN]
    else:
        wrong = [{"input_ids": row["input_ids"]} for row in TRAIN]
    assert relative(np.nan_to_num(score(model, wrong).values), want) > 1e-2


def test_prompt_means_and_first_states_equal_a_loop():
    model = build_model("llama", torch.float64)
    run = ForValueScorer(model, VALIDATION, progress=False).run
    with torch.no_grad():
        for batch in run.positions(list(run.reader.samples(TRAIN)), LabelModel()):
            for index, prompt, first in zip(batch.index, batch.prompt_RD, batch.first_RD, strict=True):
                states = model.base_model(input_ids=torch.tensor([TRAIN[index]["input_ids"]])).last_hidden_state[0]
                start = next(t for t, label in enumerate(TRAIN[index]["labels"]) if label != -100)
                torch.testing.assert_close(prompt, states[:start].mean(0), rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(first, states[start - 1], rtol=1e-10, atol=1e-12)


def test_bf16_within_its_error_budget():
    """No worse than the model itself in bf16 under autograd, plus a tenth."""
    exact = [score_by_autograd(build_model("llama", torch.float64), row, VALIDATION) for row in TRAIN]
    naive = [score_by_autograd(build_model("llama", torch.bfloat16), row, VALIDATION) for row in TRAIN]
    ours = score(build_model("llama", torch.bfloat16)).values
    assert relative(ours, exact) <= 1.1 * relative(naive, exact)


@pytest.mark.parametrize("tokens", [1, 20, 100_000])
def test_scores_are_the_same_whatever_the_batch_size(tokens):
    model = build_model()
    assert relative(score(model, max_tokens_per_batch=tokens).values, score(model).values) < 1e-6


def test_scores_are_the_same_whatever_the_row_order_and_the_window(monkeypatch):
    model, order = build_model(), torch.randperm(len(TRAIN)).tolist()
    want = score(model).values
    assert relative(score(model, [TRAIN[i] for i in order], VALIDATION[::-1]).values, want[order]) < 1e-6
    monkeypatch.setattr(reader, "WINDOW", 3)
    assert relative(score(model).values, want) < 1e-6


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_the_same_whatever_the_padding(architecture, side):
    model = build_model(architecture)

    def pad(row, n=20):
        k = n - len(row["input_ids"])
        padded = {}
        for name, values, filler in (
            ("input_ids", row["input_ids"], 0),
            ("labels", row["labels"], -100),
            ("attention_mask", [1] * len(row["input_ids"]), 0),
        ):
            padded[name] = [filler] * k + values if side == "left" else values + [filler] * k
        return padded

    assert (
        relative(score(model, [pad(r) for r in TRAIN], [pad(r) for r in VALIDATION]).values, score(model).values)
        < 1e-6
    )


def test_token_scores_sum_to_the_rows_score():
    model = build_model()
    scorer = ForValueScorer(model, VALIDATION, progress=False)
    tokens, scores = scorer.token_scores(TRAIN), scorer.score(TRAIN)
    assert [len(t) for t in tokens] == scores.n_labelled.tolist()
    assert relative([t.sum() for t in tokens], scores.values) < 1e-12


def test_the_log_likelihood_comes_along():
    model = build_model("gemma2-softcap", torch.float64)
    scores = score(model)
    for row, got in zip(TRAIN, scores.log_likelihood, strict=True):
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        n = sum(label != -100 for label in row["labels"][1:])
        assert got == pytest.approx(-float(loss) * n, rel=1e-6)


@pytest.mark.parametrize("method", ["gradient", "whitened"])
def test_normalize_divides_by_tokens_or_by_the_rows_own_norm(method):
    model = build_model("llama", torch.float64)
    plain = score(model, method=method)
    assert relative(score(model, method=method, normalize="length").values, plain.values / plain.n_labelled) < 1e-12
    gradients = [row_gradient(model, row) for row in TRAIN]
    metric = inverse_second_moment(model, VALIDATION) if method == "whitened" else torch.eye(gradients[0].shape[1])
    norms = [float((g @ metric.to(g) * g).sum().sqrt()) for g in gradients]
    cosine = score(model, method=method, normalize="cosine").values
    assert relative(cosine, plain.values / norms) < 1e-10


def test_whitened_scores_are_those_of_the_inverse_second_moment_written_out():
    model = build_model("llama", torch.float64)
    gradients, sides = ([row_gradient(model, row) for row in rows] for rows in (TRAIN, VALIDATION))
    metric = inverse_second_moment(model, VALIDATION)
    pairs = np.array([[float((side @ metric * g).sum()) for side in sides] for g in gradients])
    norms = [float((g @ metric * g).sum().sqrt()) for g in gradients]
    assert relative(score(model, method="whitened").values, pairs.mean(1)) < 1e-9
    assert relative(score(model, method="whitened", normalize="cosine").values, pairs.mean(1) / norms) < 1e-9
    scorer = ForValueScorer(model, VALIDATION, ForValueConfig(method="whitened"), progress=False)
    assert relative(scorer.pairwise(TRAIN), pairs) < 1e-9


def test_pairwise_averages_to_the_score_and_keeps_bad_rows_as_nan():
    model = build_model()
    train = [TRAIN[0], {"input_ids": [5], "labels": [5]}, *TRAIN[1:]]
    validation = [{"input_ids": [5], "labels": [5]}, *VALIDATION]
    for method in ("gradient", "whitened"):
        scorer = ForValueScorer(model, validation, ForValueConfig(method=method), progress=False)
        pairs, scores = scorer.pairwise(train), scorer.score(train)
        assert pairs.shape == (len(train), len(validation))
        assert torch.isnan(pairs[1]).all()
        assert torch.isnan(pairs[:, 0]).all()
        good = ~np.isnan(scores.values)
        assert relative(pairs.nanmean(1)[torch.from_numpy(good)], scores.values[good]) < 1e-5


@pytest.mark.parametrize("window", [3, 4096])
def test_pairs_go_to_a_file_a_window_at_a_time(window, monkeypatch, tmp_path):
    monkeypatch.setattr(reader, "WINDOW", window)
    train = [TRAIN[0], {"input_ids": [5], "labels": [5]}, *TRAIN[1:]]
    scorer = ForValueScorer(build_model(), VALIDATION, progress=False)
    want = scorer.pairwise(train)
    got = scorer.pairwise(train, tmp_path / "pairs.npy")
    np.testing.assert_array_equal(got.numpy(), want.numpy())
    np.testing.assert_array_equal(np.load(tmp_path / "pairs.npy", mmap_mode="r"), want.numpy())
    with pytest.raises(ValueError, match="data set with a length"):
        scorer.pairwise(iter(train), tmp_path / "pairs.npy")


def test_seen_vocabulary_is_the_score_over_the_labels_of_both_sets():
    model = build_model("llama", torch.float64)
    seen = sorted({t for row in TRAIN + VALIDATION for t in row["labels"][1:] if t != -100})
    direction = torch.stack([row_gradient(model, v) for v in VALIDATION]).mean(0)
    want = [float((direction[seen] * row_gradient(model, row)[seen]).sum()) for row in TRAIN]
    assert relative(score(model, vocab="seen").values, want) < 1e-10


def test_a_generator_of_rows_is_scored_as_a_list_is():
    """The seen vocabulary needs the rows twice, a generator gives them once."""
    for vocab in ("full", "seen"):
        scorer = ForValueScorer(build_model(), VALIDATION, ForValueConfig(vocab=vocab), progress=False)
        np.testing.assert_array_equal(scorer.score(row for row in TRAIN).values, scorer.score(TRAIN).values)
        tokens = zip(scorer.token_scores(row for row in TRAIN), scorer.token_scores(TRAIN), strict=True)
        assert all(torch.equal(once, kept) for once, kept in tokens)


def test_as_many_rows_out_as_in_and_a_reason_for_each_that_has_no_score():
    rows = [
        TRAIN[0],
        {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
        {"input_ids": list(range(3, 63)) * 2, "labels": list(range(3, 63)) * 2},
        {"input_ids": [5, 6], "labels": [5]},
        {"input_ids": [5, 6, 9999], "labels": [5, 6, 9999]},
        {"input_ids": None, "labels": None},
        TRAIN[1],
    ]
    model = build_model("gpt2")  # whose table of positions ends
    scores = score(model, rows, rows=RowConfig(max_length=None))
    assert len(scores) == len(rows)
    assert [r is None for r in scores.reasons] == [True, False, False, False, False, False, True]
    assert np.isnan(scores.values[1:6]).all()
    assert relative(scores.values[[0, 6]], score(model, TRAIN[:2]).values) < 1e-6


def test_non_finite_rows_get_a_reason_and_leave_their_batch_mates_alone():
    model = build_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[66] = torch.inf
    clean = [row for row in TRAIN + VALIDATION if 66 not in row["input_ids"]]
    rows = [clean[0], {"input_ids": [5, 66, 7], "labels": [-100, 66, 7]}, clean[1]]
    scores = score(model, rows, clean)
    assert np.isnan(scores.values[1])
    assert "non-finite" in scores.reasons[1]
    assert np.isfinite(scores.values[[0, 2]]).all()
    with pytest.raises(ValueError, match="not finite"):
        score(model, clean, rows[1:2])


def test_fingerprints_change_with_what_makes_the_scores_and_with_nothing_else(tmp_path):
    model = build_model()
    base = score(model).metadata["provenance"]
    assert score(model, max_tokens_per_batch=17, direction_cache=str(tmp_path)).metadata["provenance"] == base
    nudged = build_model()
    with torch.no_grad():
        nudged.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-3
    changed = {
        "data": score(model, TRAIN[1:]),
        "validation": score(model, validation=VALIDATION[1:]),
        "config": score(model, normalize="length"),
        "weights": score(nudged),
    }
    for part, scores in changed.items():
        assert {k for k, v in scores.metadata["provenance"].items() if v != base[k]} == {part}


@pytest.mark.parametrize(
    ("method", "normalize"),
    [("gradient", "none"), ("whitened", "cosine"), ("fitted", "none"), ("fitted_likelihood", "length")],
)
def test_a_direction_is_kept_for_other_processes(method, normalize, tmp_path, monkeypatch):
    def scorer(model, validation=VALIDATION, **config):
        config = {"method": method, "normalize": normalize, "direction_cache": str(tmp_path / "new"), **config}
        return ForValueScorer(model, validation, ForValueConfig(**config), progress=False)

    first = scorer(build_model())
    want = first.score(TRAIN)
    monkeypatch.setattr(METHODS[method], "fit", lambda *_: pytest.fail("the direction is computed again"))
    again = scorer(build_model(), max_tokens_per_batch=50)
    got = again.score(TRAIN)
    assert relative(got.values, want.values) < 1e-5
    assert got.metadata["provenance"] == want.metadata["provenance"]
    if method == "whitened":
        first, again = (scorer(build_model(), normalize="none") for _ in range(2))
        monkeypatch.undo()
        np.testing.assert_array_equal(again.pairwise(TRAIN).numpy(), first.pairwise(TRAIN).numpy())
    if method.startswith("fitted"):
        assert again.fit.curve == first.fit.curve
        assert again.fit.ridge == first.fit.ridge
        assert torch.equal(again.fit.move_VD, first.fit.move_VD)


def test_a_kept_direction_is_not_taken_for_another(tmp_path):
    config = {"direction_cache": str(tmp_path)}
    nudged = build_model()
    with torch.no_grad():
        nudged.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-3
    for n, other in enumerate(
        (
            lambda: score(build_model(), **config),
            lambda: score(nudged, **config),
            lambda: score(build_model(), validation=VALIDATION[1:], **config),
            lambda: score(build_model(), method="whitened", **config),
        ),
        start=1,
    ):
        other()
        assert len(list(tmp_path.iterdir())) == n


def test_rows_that_are_validation_rows_too_are_counted_and_named(tmp_path, caplog):
    nothing = {"input_ids": [5], "labels": [5]}
    train = [*TRAIN, VALIDATION[3], nothing, *VALIDATION * 5]
    scores = ForValueScorer(build_model(), [*VALIDATION, nothing], progress=False).score(train, tmp_path / "s.parquet")
    assert scores.metadata["leakage"] == {"n": 26, "rows": [12, *range(14, 33)]}
    assert "26 of 39 training rows are validation rows too (first: row 12)" in caplog.text
    assert type(scores).load(tmp_path / "s.parquet").metadata["leakage"] == scores.metadata["leakage"]
    caplog.clear()
    assert score(build_model()).metadata["leakage"] == {"n": 0, "rows": []}
    assert not caplog.records


def test_bad_settings_say_what_would_be_right():
    with pytest.raises(ValueError, match=r"method='newton'.*gradient"):
        ForValueConfig(method="newton")
    with pytest.raises(ValueError, match="no validation row can be scored"):
        score(build_model(), validation=[{"input_ids": [5], "labels": [5]}])
    with pytest.raises(ValueError, match="pairwise"):
        ForValueScorer(build_model(), VALIDATION, ForValueConfig(normalize="length")).pairwise(TRAIN)


def test_an_empty_data_set_gives_no_scores():
    assert len(score(build_model(), [])) == 0


def test_vlm_rows_go_through_the_collator_and_equal_autograd():
    model, rows, collate = llava()
    weight = model.get_output_embeddings().weight

    def gradient(row):
        batch = collate([row])
        labels = batch.pop("labels")
        log_p = model(**batch).logits[0, :-1].log_softmax(-1)
        keep = labels[0, 1:] != -100
        return torch.autograd.grad(log_p[keep].gather(1, labels[0, 1:][keep][:, None]).sum(), weight)[0]

    direction = torch.stack([gradient(row) for row in rows[6:]]).mean(0)
    scorer = ForValueScorer(model, rows[6:], data_collator=collate, progress=False)
    assert (
        relative(scorer.score(rows[:6]).values, [float((direction * gradient(row)).sum()) for row in rows[:6]]) < 1e-10
    )
    with_bad_row = scorer.score([rows[0], {"image": None, "text": [3, 4]}, rows[1]])
    assert "data_collator" in with_bad_row.reasons[1]
    assert relative(with_bad_row.values[[0, 2]], scorer.score(rows[:2]).values) < 1e-10


def test_the_hash_of_rows_with_images_is_that_of_text_and_pixels_in_their_order():
    model, rows, collate = llava()
    scorer = ForValueScorer(model, rows[6:], data_collator=collate, progress=False)
    other = copy.deepcopy(rows[:3])
    assert scorer.hash_rows(other) == scorer.hash_rows(rows[:3])
    hashes = [scorer.hash_rows(rows[:3]), scorer.hash_rows(rows[:2]), scorer.hash_rows(rows[2::-1])]
    other[1]["image"][2][7][7] += 1e-3
    hashes.append(scorer.hash_rows(other))
    other[2]["text"][-1] += 1
    hashes.append(scorer.hash_rows(other))
    assert len(set(hashes)) == len(hashes)
    assert scorer.score(other).metadata["provenance"]["data"] == hashes[-1]
    provenance = ForValueScorer(model, other, data_collator=collate, progress=False).provenance()
    assert (
        provenance["validation"] != ForValueScorer(model, rows[:3], data_collator=collate).provenance()["validation"]
    )
