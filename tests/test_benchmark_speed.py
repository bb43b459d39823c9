"""The speed benchmark: its rivals compute what they claim to, and its tables hold what they should."""

import numpy as np
import pytest
import torch

from forvalue_callbacks import ForValueConfig, ForValueScorer
from helpers.recipes import load

recipe = load("benchmark_speed")
SMALL = {"shape": "tiny", "rows": 5, "length": 12, "validation_rows": 3, "repeats": 1}


@pytest.fixture(scope="module")
def small():
    config = recipe.BenchmarkConfig(**SMALL)
    model, train, validation = recipe.build(config)
    with torch.no_grad():
        return model, train, validation, recipe.arms(config)


def by_length(rows):
    (batch,) = recipe.by_length(rows, 2048)
    return batch


def test_captum_gives_the_same_scores(small):
    """Positions to rows: the sums over a row's positions, and the mean over the validation rows."""
    model, train, validation, runs = small
    with torch.no_grad():
        pairs = runs["captum"]()
    count = lambda rows: [sum(label != -100 for label in row["labels"][1:]) for row in rows]  # noqa: E731
    ordered = by_length(train)
    assert pairs.shape == (sum(count(validation)), sum(count(ordered)))
    got = [float(part.sum()) / len(validation) for part in pairs.split(count(ordered), 1)]
    want = ForValueScorer(model, validation, progress=False).score(ordered).values
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_algorithm1_is_the_score_on_the_tokens_seen(small):
    model, train, validation, runs = small
    with torch.no_grad():
        got = np.array(runs["algorithm1"]()) / len(validation)  # of the sum over validation rows
    scorer = ForValueScorer(model, validation, ForValueConfig(vocab="seen"), progress=False)
    want = scorer.score(by_length(train)).values
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_every_arm_runs_and_is_compared_with_the_scorer(tmp_path):
    config = recipe.BenchmarkConfig(
        **{**SMALL, "validation_rows": 40}, arms=list(recipe.ARMS), output_dir=str(tmp_path)
    )
    text = recipe.main(config)
    for name in recipe.ARMS:
        assert f"\n| {name} | " in text
    assert "| scorer | " in text
    assert 0.5 < float(text.rsplit("rank correlation with the exact score ", 1)[1].rstrip(".\n")) < 1
    assert (tmp_path / "benchmark_speed.md").read_text() == text


def test_the_work_of_the_methods_is_counted():
    """Of the plain score by hand: each token is read once, and there are two products with the head; the validation
    side makes three, and a look at whether the model is what it seems to be."""
    enough = {**SMALL, "length": 100, "shortest": 1.0, "validation_rows": 40}
    with torch.no_grad():
        head, _, validation, rows = recipe.count_work(recipe.BenchmarkConfig(**enough, arms=["backbone", "scorer"]))
    assert head.startswith("| method | side |")
    assert rows == "| gradient | rows | 0.99 | 2.00 |", "but for the last token of each"
    _, method, side, read, products, _ = (cell.strip() for cell in validation.split("|"))
    assert (method, side) == ("gradient", "validation")
    assert 0.99 <= float(read) < 1.1
    assert 3.0 <= float(products) < 3.1


def test_sweeps_give_exponents_and_a_picture(tmp_path, monkeypatch):
    few = {"rows": ("rows", [2, 4, 8]), "common": ("common", [0.0, 0.5]), "vocabulary": ("vocabulary", [64, 128, 256])}
    monkeypatch.setattr(recipe, "SWEEPS", few)
    text = recipe.main(recipe.BenchmarkConfig(**SMALL, sweeps=list(few), output_dir=str(tmp_path)))
    assert text.count("\n| rows | ") == text.count("\n| vocabulary | ") == 3
    assert text.count("\n| | exponent | ") == 3
    assert (tmp_path / "benchmark_speed.png").read_bytes()[:4] == b"\x89PNG"


def test_the_exponent_is_the_slope_of_the_logarithms():
    steps = [(x, 0.0, 3 * x**1.5, 7.0) for x in (1.0, 2.0, 8.0)]
    assert recipe.exponent(steps, 2) == "1.50"
    assert recipe.exponent(steps, 3) in ("0.00", "-0.00")
    assert recipe.exponent(steps, 1) == "", "no time that could be told from none"


def test_rows_are_as_the_config_says():
    config = recipe.BenchmarkConfig(shape="tiny", rows=50, length=40, labelled=0.25, common=0.5, vocabulary=100)
    model, train, validation = recipe.build(config)
    assert (len(train), len(validation), model.config.vocab_size) == (50, 4, 100)
    assert recipe.SHAPES["tiny"].vocab_size != 100, "the shape itself stays"
    assert len({tuple(row["input_ids"][:20]) for row in [*train, *validation]}) == 1
    for row in train:
        n_labelled = sum(label != -100 for label in row["labels"])
        assert n_labelled == max(1, round(0.25 * (len(row["input_ids"]) - 20)))
        assert row["labels"][-n_labelled:] == row["input_ids"][-n_labelled:]


@pytest.mark.parametrize(("name", "value"), [("shape", "huge"), ("arms", ["legs"]), ("sweeps", ["floor"])])
def test_unknown_names_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: .* is none of"):
        recipe.BenchmarkConfig(**{name: value})
