"""Numbers that are none, in rows, weights and what is learned from them: scores or a reason, by every method."""

import logging
import math
import os
from functools import cache

import numpy as np
import pytest
import torch

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.methods import METHODS
from helpers.answers import answered, rows_of
from helpers.models import build_model

# ATTACK=20 spoils twenty times as many weights, and every method is asked in all its normalizations.
ATTACK = int(os.environ.get("ATTACK", "1"))
WAYS = [(name, normalize) for name, method in METHODS.items() for normalize in method.normalizations]
WAYS = WAYS if ATTACK > 1 else [(name, method.normalizations[-1]) for name, method in METHODS.items()]
BAD = 66
# Over this row the model overflows where the embedding of BAD does; of 16 tokens: it is the one to check a model on.
BROKEN = {"input_ids": [*range(5, 17), BAD, 4, 10, 2], "labels": [-100] * 14 + [10, 2]}
SHORT = {"input_ids": [5, 6, BAD, 4, 10], "labels": [-100] * 4 + [10]}


def sides(method):
    """Validation and training rows, none of which holds BAD."""
    if method == "label_model":
        return rows_of(40, 1)[0], rows_of(24, 2, 0.2)[0]
    return answered(42, 1, vocab=BAD), answered(24, 2, vocab=BAD)


def with_embedding(value, model=None):
    model = model or build_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = value
    return model


def score(model, validation, rows, way):
    scores = ForValueScorer(model, validation, ForValueConfig(*way), progress=False).score(rows)
    assert len(scores) == len(rows)
    for value, reason in zip(scores.values, scores.reasons, strict=True):
        assert math.isfinite(value) == (reason is None)
    return scores


def scores_or_reason(model, validation, rows, way, reasons):
    """Scores, or what is said of them all."""
    try:
        return score(model, validation, rows, way)
    except ValueError as error:  # torch's LinAlgError is none
        said = str(error)
    assert any(reason in said for reason in reasons), said
    return None


@cache
def plain(way):
    """The scores of rows without BAD by rows without it, whatever its embedding is."""
    return score(build_model(), *sides(way[0]), way).values


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- rows ----


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_validation_rows_that_overflow_are_left_out_and_named(way, caplog):
    """One is found when the model is checked, the other when the method learns from it."""
    model, (validation, rows) = with_embedding(math.inf), sides(way[0])
    got = score(model, [*validation[:7], SHORT, BROKEN, *validation[7:]], rows, way)
    np.testing.assert_allclose(got.values, plain(way), rtol=1e-4, atol=1e-5)
    said = " ".join(text for text in warnings_of(caplog) if "validation rows cannot be scored" in text)
    assert "(row 7: " in said
    assert "(row 8: " in said
    assert said.count("overflow") == said.count("row ") == 2


def test_a_validation_row_that_overflows_has_no_pairs_and_is_near_to_none(tmp_path):
    model, (validation, rows) = with_embedding(math.inf), sides("gradient")
    scorer = ForValueScorer(model, [*validation[:7], SHORT, *validation[7:]], progress=False)
    pairs = scorer.pairwise(rows).numpy()
    assert np.isnan(pairs[:, 7]).all()
    assert np.isfinite(np.delete(pairs, 7, 1)).all()
    np.testing.assert_allclose(np.nanmean(pairs, 1), scorer.score(rows).values, rtol=1e-4, atol=1e-5)
    places = [
        place
        for found in scorer.explain(rows, [0, 1], 60)
        for side in (found.supporting, found.opposing)
        for place, _ in side
    ]
    assert places
    assert 7 not in places


def test_what_was_learned_without_a_row_is_not_kept_so_that_all_are_told(tmp_path, caplog):
    model, (validation, rows) = with_embedding(math.inf), sides("gradient")
    config = ForValueConfig(direction_cache=str(tmp_path))
    for _ in range(2):
        caplog.clear()
        ForValueScorer(model, [SHORT, *validation], config, progress=False).score(rows)
        assert "(row 0: " in " ".join(warnings_of(caplog))


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_where_all_validation_rows_overflow_the_weights_are_named(way):
    rows = sides(way[0])[1]
    for value, said in ((math.inf, "'model.embed_tokens.weight' are not finite"), (3e38, "overflow")):
        model = with_embedding(value)
        with torch.no_grad():  # what is finite in the weights overflows in the logits
            model.lm_head.weight.mul_(1.0 if value == math.inf else 3e38)
        with pytest.raises(ValueError, match=said):
            score(model, [SHORT, BROKEN] * 30, rows, way)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_training_row_that_overflows_gets_a_reason_and_moves_no_other(way):
    model, (validation, rows) = with_embedding(math.inf), sides(way[0])
    want = plain(way)
    got = score(model, validation, [*rows[:5], SHORT, *rows[5:]], way)
    assert "overflow" in got.reasons[5]
    np.testing.assert_allclose(np.delete(got.values, 5), want, rtol=1e-4, atol=1e-5)
    none = scores_or_reason(model, validation, [SHORT, BROKEN], way, ["none of 2 can be scored (non-finite"])
    assert none is None or all("overflow" in reason for reason in none.reasons)


def test_without_validation_rows_the_model_is_checked_on_another_row():
    rows = rows_of(60, 2, 0.2)[0]
    scores = score(with_embedding(math.inf), None, [BROKEN, *rows], ("label_model", "none"))
    assert "overflow" in scores.reasons[0]
    assert np.isfinite(scores.values[1:]).all()


@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_that_overflow_in_half_precision_alone(dtype, way, caplog):
    """An embedding is as large as numbers are, and the third position adds to it."""
    model = build_model("gpt2", dtype)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        model.transformer.wpe.weight[2] = 100
        model.transformer.wte.weight[BAD] = torch.finfo(dtype).max
    validation, rows = sides(way[0])
    got = score(model, [*validation, SHORT], [SHORT, *rows], way)
    assert f"(row {len(validation)}: " in " ".join(warnings_of(caplog))
    assert "overflow" in got.reasons[0]
    assert np.isfinite(got.values[1:]).all()


# ---- weights ----


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_masked_tokens_are_refused_with_the_way_out_which_is_one(way):
    model, (validation, rows) = build_model("phi-bias"), sides(way[0])
    with torch.no_grad():
        model.lm_head.bias[[0, 1, 66]] = -math.inf
    with pytest.raises(ValueError, match=r"3 tokens \(first: 0\) are -inf.*-1e4"):
        score(model, validation, rows, way)
    with torch.no_grad():
        model.lm_head.bias[[0, 1, 66]] = -1e4
    assert np.isfinite(score(model, validation, rows, way).values).all()


@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_named(name, way):
    model, (validation, rows) = build_model(), sides(way[0])
    with torch.no_grad():
        model.get_parameter(name)[-1, -1] = math.nan
    with pytest.raises(ValueError, match=f"'{name}' are not finite themselves"):
        score(model, validation, rows, way)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_hidden_states_that_are_all_zero(way, caplog):
    model, (validation, rows) = build_model(), sides(way[0])
    with torch.no_grad():
        model.model.norm.weight.zero_()
    scores = scores_or_reason(model, validation, rows, way, ["hidden states of the validation rows are all 0"])
    if scores is not None and not scores.values.any():
        assert any("move the head nowhere" in text or "no move of the head" in text for text in warnings_of(caplog))


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_second_moments_of_rank_one(way):
    model, (validation, rows) = build_model(), sides(way[0])
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.eye(32)[3])
    assert np.isfinite(score(model, validation, rows, way).values).all()


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_few_rows_and_rows_that_are_all_the_same(way):
    validation, rows = sides(way[0])
    few = ["give at least 40", "for answers that repeat", "all answers are the same"]
    same = rows[:1] * 40
    for learned, scored in ((rows[:1], rows), (same, rows[:6]), (validation, same), (same, same)):
        scores_or_reason(build_model(), learned, scored, way, few)


@pytest.mark.parametrize("seed", range(6 * ATTACK))
def test_anything_in_any_weight(seed):
    rng = np.random.default_rng(seed)
    way = WAYS[int(rng.integers(len(WAYS)))]
    model, (validation, rows) = build_model(["llama", "phi-bias", "gemma2-softcap"][seed % 3]), sides(way[0])
    weights = list(model.parameters())
    weight = weights[int(rng.integers(len(weights)))]
    value = float(rng.choice([math.inf, -math.inf, math.nan, 3e38, -3e38, 1e20, 1e-40, 0.0]))
    with torch.no_grad():
        if rng.random() < 0.5:
            weight.fill_(value)
        else:
            weight.flatten()[int(rng.integers(weight.numel()))] = value
    reasons = ["not finite", "non-finite", "-inf", "are all 0", "cannot describe the output head", "different hidden"]
    reasons += ["no validation row can be scored: hidden states or logits overflow"]
    scores_or_reason(model, validation, rows, way, reasons)
