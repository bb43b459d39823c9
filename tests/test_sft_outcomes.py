"""The recipe that asks whether fine-tuning gets better: its arms, its pairs, its table, and a small run of it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, TrlParser

from forvalue_callbacks import TINY_MODEL, ForValueScorer, baselines
from forvalue_callbacks.data.files import DataError
from forvalue_callbacks.tiny import instructions
from helpers.recipes import RECIPES, load

report = load("outcome_report")
outcomes = load("outcomes")
recipe = load("sft_outcomes")

# ---- pairs ----


def test_paired_differences_are_those_computed_by_hand():
    """Differences .1, .2, .3: their deviation is .1, and t of two degrees of freedom is 4.30265."""
    got = report.paired({0: 0.6, 1: 0.9, 2: 0.5, 7: 0.0}, {2: 0.2, 1: 0.7, 0: 0.5, 8: 1.0})
    half = 4.30265 * 0.1 / 3**0.5
    assert got == pytest.approx((0.2, 0.2 - half, 0.2 + half, 3), abs=1e-5)
    assert str(got) == "+0.200 (-0.048 to +0.448)"


def test_a_single_pair_has_no_interval_and_no_pair_no_difference():
    assert str(report.paired({3: 0.5}, {3: 0.75, 4: 1.0})) == "-0.250 (1 seed)"
    assert report.paired({3: 0.5}, {4: 1.0}) is None


def test_names_beside_dots_at_one_height_lie_apart_in_the_order_of_their_dots():
    got = report.spread([0.5, 0.98, 0.1, 0.99, 0.97, 0.1], 0.05)
    assert got == pytest.approx([0.5, 0.95, 0.1, 1.0, 0.9, 0.15])
    crowded = report.spread([1.0] * 41, 0.05)
    assert crowded == pytest.approx([k / 40 for k in range(41)]), "more than fit: closer, and none outside"
    assert report.spread([0.3], 0.05) == [0.3]


def line(arm, seed, accuracy, drop=None, budget=None, **more):
    run = {"arm": arm, "drop": drop, "budget": budget, "seed": seed, "accuracy": accuracy, "test_loss": 1 - accuracy}
    run |= {"kept_share": 0.7, "wrong_share": None, "valuation_seconds": 2.0, "training_seconds": 9.0}
    return run | more


RUNS = [
    *(line("no filter", seed, 0.5 + seed / 10) for seed in (0, 1)),
    *(line("clean rows alone", seed, 0.7 + seed / 10, budget="epochs") for seed in (0, 1)),
    *(line("random", seed, 0.45 + seed / 10, "auto", "epochs") for seed in (0, 1)),
    *(line("random", seed, 0.1, "0.3", "epochs") for seed in (0, 1)),
    *(line("auto", seed, 0.65 + seed / 10, "auto", "epochs", wrong_share=0.1 * seed) for seed in (0, 1)),
    line("auto", 0, 0.9, "auto", "steps"),
]


def cells(budget, measure="accuracy"):
    head, _, *lines = report.table(RUNS, budget, measure)
    names = [cell.strip() for cell in head.strip("|").split("|")]
    rows = [dict(zip(names, map(str.strip, text.strip("|").split("|")), strict=True)) for text in lines]
    return {(row["arm"], row["dropped"]): row for row in rows}


def test_the_table_compares_each_arm_with_no_filter_and_with_random_rows_of_the_same_number():
    rows = cells("epochs")
    auto = rows["auto", "auto"]
    assert auto["accuracy"] == "0.700 ± 0.071"
    assert auto["to no filter (95 %)"] == "+0.150 (+0.150 to +0.150)"
    assert auto["to random (95 %)"] == "+0.200 (+0.200 to +0.200)"
    assert auto["gap"] == "75%"
    assert (auto["wrong among kept"], auto["kept"], auto["seeds"]) == ("5.0%", "70%", "2")
    assert rows["no filter", ""]["to no filter (95 %)"] == ""
    assert rows["random", "0.3"]["to no filter (95 %)"].startswith("-0.450 ")


def test_a_budget_has_its_own_runs_and_those_that_it_does_not_touch():
    rows = cells("steps")
    assert list(rows) == [("no filter", ""), ("auto", "auto")]
    assert rows["auto", "auto"]["to no filter (95 %)"] == "+0.400 (1 seed)"
    assert rows["auto", "auto"]["gap"] == ""
    assert cells("epochs", "test_loss")["auto", "auto"]["to no filter (95 %)"].startswith("-0.150 ")


# ---- one run ----


def test_accuracy_is_that_of_answers_that_greedy_decoding_writes():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY_MODEL), AutoTokenizer.from_pretrained(TINY_MODEL)
    rows = []
    for i, row in enumerate(instructions(6, seed=3)):
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()
        if i % 3 == 0:
            made[ids.shape[1]] += 1
        rows.append({"input_ids": made, "labels": [-100] * ids.shape[1] + made[ids.shape[1] :]})
    collate = load("data").collate
    batches = [collate(rows[:4]), collate(rows[4:])]
    assert outcomes.accuracy(SimpleNamespace(model=model, get_eval_dataloader=lambda: batches)) == pytest.approx(4 / 6)


def study(values, wrong):
    n = len(wrong)
    train = Dataset.from_dict({"prompt": ["p"] * n, "completion": ["a"] * n, "is_noisy": wrong})
    job = SimpleNamespace(value=lambda name: (np.array(values[name]), 1.0), seed=0)
    return recipe.Study(SimpleNamespace(train=train), job, None, None, None)


def test_an_arm_keeps_the_best_rows_and_as_many_as_auto_where_it_is_told_no_share():
    made = study({"auto": [2.0, -1.0, 3.0, -0.5], "loss": [0.1, 0.4, 0.2, 0.3]}, [False, True, False, False])
    kept = {
        ("auto", "auto"): [0, 2],
        ("loss", "auto"): [1, 3],
        ("auto", "0.25"): [0, 2, 3],
        ("loss", "0.25"): [1, 2, 3],
        ("clean rows alone", None): [0, 2, 3],
        ("validation rows alone", None): [],
        ("validation rows added", None): [0, 1, 2, 3],
        ("auto, reweighted", None): [0, 1, 2, 3],
    }
    for (name, drop), places in kept.items():
        assert made.places(recipe.Arm(name, drop, "epochs")).tolist() == places, name


def test_arms_that_a_budget_or_a_share_does_not_touch_are_run_once():
    names = ["no filter", "loss", "auto, reweighted", "validation rows alone", "clean rows alone"]
    config = recipe.OutcomesConfig(arms=names, drop=["auto", "0.3"], budgets=["epochs", "steps"])
    arms = recipe.arms_of(config, has_truth=True)
    assert [sum(arm.name == name for arm in arms) for name in names] == [1, 4, 1, 2, 2]
    assert len(set(arms)) == len(arms)
    assert not any(arm.name == "clean rows alone" for arm in recipe.arms_of(config, has_truth=False))


def test_unknown_arms_shares_and_budgets_are_refused_by_name():
    for wrong in ({"arms": ["magic"]}, {"budgets": ["hours"]}, {"clock": "sun"}):
        with pytest.raises(ValueError, match="is none of"):
            recipe.OutcomesConfig(**wrong)
    for share in ("1.5", "0", "most"):
        with pytest.raises(ValueError, match=f"'{share}' is neither"):
            recipe.OutcomesConfig(drop=[share])


# ---- scores ----


@pytest.fixture(scope="module")
def job():
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(TINY_MODEL).eval(),
        AutoTokenizer.from_pretrained(TINY_MODEL),
    )
    train, validation = (
        side.select_columns(["prompt", "completion", "is_noisy"])
        for side in (instructions(90, 0, 0.3, ["mood"]), instructions(40, 1, tasks=["mood"]))
    )
    settings = recipe.ComparisonConfig(epochs=1)
    return outcomes.Job(model, tokenizer, train, train, validation, 0, settings, recipe.Meter("wall"))


def test_every_score_is_one_number_a_row_and_leaves_the_model_as_it_was(job):
    few = {"train": job.train.select(range(24)), "raw": job.raw.select(range(24))}
    job = replace(job, **few, validation=job.validation.select(range(12)))
    before = {name: p.clone() for name, p in job.model.state_dict().items()}
    for name in [*outcomes.RIVALS, "DataInf", "fitted_likelihood"]:
        values, seconds = job.value(name)
        assert values.shape == (24,), name
        assert np.isfinite(values).all(), name
        assert seconds >= 0
    assert all(torch.equal(before[name], p) for name, p in job.model.state_dict().items())


def test_scores_are_those_of_the_baselines_and_of_the_package(job):
    tokens, known = job.tokens
    assert np.array_equal(job.value("loss")[0], baselines.loss(job.model, tokens).numpy())
    assert np.array_equal(job.value("RDS+")[0], baselines.rds_plus(job.model, tokens, known).numpy().mean(1))
    scorer = ForValueScorer(job.model, job.validation, processing_class=job.tokenizer, progress=False)
    assert np.array_equal(job.value("gradient")[0], scorer.score(job.train).values)


@pytest.mark.parametrize("name", ["bag of words, validation labels", "bag of words, cross-validated (cleanlab)"])
def test_bags_of_words_find_wrong_labels(job, name):
    values, wrong = job.value(name)[0], np.array(job.train["is_noisy"])
    assert (values[~wrong][:, None] > values[wrong]).mean() > 0.65


def test_labels_are_asked_of_rows_whose_answers_repeat_alone(job):
    free = Dataset.from_dict({"prompt": ["p"] * 4, "completion": list("abcd")})
    other = replace(job, train=free, raw=free, validation=free)
    with pytest.raises(ValueError, match="answers do not repeat"):
        other.value("bag of words, validation labels")


# ---- the whole ----

ARMS = ["no filter", "random", "gradient, reweighted", "validation rows alone", "clean rows alone"]


def configs(folder, *arguments):
    classes = recipe.OutcomesConfig, recipe.DataConfig, SFTConfig, ModelConfig
    parser = TrlParser(classes)
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    sizes = ["--max_train_rows", "20", "--validation_rows", "6", "--test_rows", "4", "--num_train_epochs", "1"]
    sizes += ["--per_device_train_batch_size", "8"]
    given = ["--config", str(RECIPES / "sft_outcomes.yaml"), "--seeds", "1", "--drop", "0.25", *sizes]
    return parser.parse_args_and_config([*given, "--output_dir", str(folder), *arguments])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outcomes")
    return folder, recipe.main(*configs(folder, "--arms", *ARMS))


def test_a_small_run_fine_tunes_every_arm_by_both_budgets(small):
    _, runs = small
    found = {(run["arm"], run["budget"]): run for run in runs}
    assert len(runs) == len(found) == 8
    assert all(0 <= run["accuracy"] <= 1 and run["test_loss"] > 0 for run in runs)
    assert found["no filter", None]["steps"] == 3, "20 rows in batches of 8"
    assert found["gradient, reweighted", None]["steps"] == 3
    assert [found["random", b]["steps"] for b in ("epochs", "steps")] == [2, 3]
    assert [found["validation rows alone", b]["steps"] for b in ("epochs", "steps")] == [1, 3]
    assert found["random", "steps"]["kept"] == 15
    assert found["clean rows alone", "epochs"]["wrong_share"] == 0
    assert found["clean rows alone", "epochs"]["kept"] == 20 - round(found["no filter", None]["wrong_share"] * 20)
    assert found["gradient, reweighted", None]["valuation_seconds"] > 0
    losses = [run["test_loss"] for run in runs]
    assert len(set(losses)) == len(losses), "no arm is another one by mistake"


def test_a_small_run_writes_its_runs_a_table_and_a_picture(small):
    folder, runs = small
    assert [json.loads(text) for text in (folder / "runs.jsonl").read_text().splitlines()] == runs
    text = (folder / "outcomes.md").read_text()
    assert text.count("| no filter | ") == 2
    assert "## Equal epochs" in text
    assert "## Equal steps" in text
    assert (folder / "outcomes.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_start_makes_the_runs_that_are_missing_and_no_other(small, monkeypatch):
    """What a run made again says is what it said: an arm starts from the same weights, rows and order."""
    folder, runs = small
    before = (folder / "runs.jsonl").read_text()
    gone = next(run for run in runs if (run["arm"], run["budget"]) == ("random", "steps"))
    (folder / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs if run is not gone))
    fine_tune, made = recipe.fine_tune, []
    monkeypatch.setattr(recipe, "fine_tune", lambda *given: made.append(fine_tune(*given)) or made[-1])
    again = recipe.main(*configs(folder, "--arms", *ARMS))
    assert len(made) == 1
    assert (made[0].test_loss, made[0].accuracy) == (gone["test_loss"], gone["accuracy"])
    assert len(again) == len(runs)
    recipe.main(*configs(folder, "--arms", *ARMS))
    assert len(made) == 1
    with pytest.raises(DataError, match=r"holds runs with learning_rate='0.002', not '0.5': choose another"):
        recipe.main(*configs(folder, "--arms", *ARMS, "--learning_rate", "0.5"))
    (folder / "runs.jsonl").write_text(before)


def test_rows_without_test_rows_are_refused_before_anything_is_trained(tmp_path):
    rows = [{"prompt": f"p {i}", "completion": f" a {i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--data", str(tmp_path / "rows.jsonl"), "--draw_validation", "true"]
    with pytest.raises(DataError, match="give --test_data FILE or --draw_test true"):
        recipe.main(*configs(tmp_path / "out", *given))
