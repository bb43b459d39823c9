"""The recipe that compares For-Value with influence functions: its tasks, its metrics, and a small run."""

import csv

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from forvalue_callbacks import TINY_MODEL, ForValueConfig, baselines
from forvalue_callbacks.core import Head
from forvalue_callbacks.data.sft import RowConfig, RowPreparer
from helpers.recipes import RECIPES, load

tasks = load("influence_tasks")
report = load("influence_report")
comparison = load("influence_comparison")
recipe = load("compare_influence")


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (0, "tomorrows. hopeful herald Sunrises"),
        (1, "sUnRiSeS hErAlD hOpEfUl tOmOrRoWs."),
        (2, "Sunrises 1herald 1hopeful 1tomorrows."),
        (3, "S*nr*s*s h*r*ld h*p*f*l t*m*rr*ws."),
        (4, "SSunnrrissess hherralldd hhoppeffull ttommorrrrowwss."),
        (5, "Sunrises Herald Hopeful Tomorrows."),
        (6, "Snrss hrld hpfl tmrrws."),
        (7, "Sunrisesly heraldly hopefully tomorrows.ly"),
        (8, "uie ea oeu ooo."),
        (9, "Sunrises Sunrises herald herald hopeful hopeful tomorrows. tomorrows."),
    ],
)
def test_transformations_are_those_of_the_papers_table(label, expected):
    assert tasks.TRANSFORMATIONS[label][2]("Sunrises herald hopeful tomorrows.") == expected


@pytest.mark.parametrize("label", range(10))
def test_the_reasoning_of_a_problem_computes_its_answer(label):
    problem = tasks.PROBLEMS[label]
    numbers = [low + 1 for low, _ in problem.ranges]
    reason = problem.reason.format(**dict(zip("ABCD", numbers, strict=False)))
    last = reason.rstrip(".").rsplit("=", 1)[1]
    assert eval(last, {"__builtins__": {}}) == problem.answer(*numbers)


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_task_rows_are_seeded_balanced_and_all_different(task):
    train, validation = tasks.task_rows(task, 0)
    assert [sum(row["label"] == k for row in train) for k in range(10)] == [90] * 10
    assert [sum(row["label"] == k for row in validation) for k in range(10)] == [10] * 10
    assert len({(row["prompt"], row["completion"]) for row in [*train, *validation]}) == 1000
    assert tasks.task_rows(task, 0) == (train, validation)
    assert tasks.task_rows(task, 1)[0] != train


def quality(scores, relevant, **labels):
    return comparison.quality(scores, comparison.Labels(relevant, **labels))


def test_quality_is_one_for_the_truth_half_for_a_constant_and_zero_for_the_opposite():
    same = np.eye(3, dtype=bool)[[0, 0, 1, 1, 2, 2]]
    truth = torch.from_numpy(same).double()
    assert quality(truth, same)["auc"] == quality(truth, same)["recall"] == 1
    assert quality(torch.zeros(6, 3), same)["auc"] == 0.5
    assert quality(-truth, same)["auc"] == quality(-truth, same)["recall"] == 0


def test_auc_is_that_of_scikit_learn_with_and_without_ties():
    rng = np.random.default_rng(0)
    same = rng.random((40, 6)) < 0.3
    for scores in (rng.random((40, 6)), rng.integers(0, 4, (40, 6)).astype(float)):
        want = np.mean([roc_auc_score(truth, score) for truth, score in zip(same.T, scores.T, strict=True)])
        assert quality(torch.from_numpy(scores), same)["auc"] == pytest.approx(want, abs=1e-12)


def test_quality_averages_over_validation_rows():
    same = np.array([[True, True], [False, False]])
    got = quality(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), same)
    assert (got["auc"], got["auc_std"], got["recall"]) == (0.5, 0.5, 0.5)


def test_noise_within_a_label_gives_no_credit_for_telling_the_labels_apart():
    """Label 0 is noisier than label 1: a score that knows the label alone beats chance overall, not within it."""
    shown = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    clean = np.array([1, 0, 0, 0, 1, 1, 1, 0], dtype=bool)
    relevant = (shown == 1)[:, None] & clean[:, None]
    noise = {"clean_N": clean, "observed_N": shown}
    got = quality(
        torch.from_numpy(shown)[:, None].expand(8, 2),
        np.hstack([relevant] * 2),
        **noise,
        validation_M=np.array([0, 1]),
    )
    assert got["noise_auc"] == 0.75
    assert got["noise_auc_within"] == 0.5
    # What counts is the score against validation rows of the label that the row shows.
    own = np.where(shown[:, None] == [0, 1], clean[:, None], ~clean[:, None])
    got = quality(torch.from_numpy(own), np.hstack([relevant] * 2), **noise, validation_M=np.array([0, 1]))
    assert got["noise_auc"] == got["noise_auc_within"] == 1


def test_lora_training_takes_the_steps_of_the_models_own_loss():
    """Cut into batches by length, the head on labelled positions: the losses of three epochs of one step each."""
    config = comparison.ComparisonConfig(epochs=3, batch_size=5, learning_rate=1e-2)
    rows = []
    for n in (9, 14, 5, 11, 7):
        ids = torch.randint(3, 2000, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})

    def model():
        return comparison.with_lora(AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float64), config, 0)

    got = [loss for loss, _ in comparison.train_epochs(model(), rows, config, 0)]
    naive, want = model(), []
    batch = comparison.collate(rows)
    optimizer = torch.optim.AdamW([p for p in naive.parameters() if p.requires_grad], weight_decay=0.0)
    for rate in (1e-2, 1e-2 * 7 / 9, 1e-2 * 5 / 9):  # from 1 to 1/3 in three steps
        optimizer.param_groups[0]["lr"] = rate
        loss = naive(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        want.append(loss.item())
    assert got == pytest.approx(want, rel=1e-6)
    assert want[2] < want[0]


@pytest.mark.parametrize("method", list(comparison.COSTLY))
def test_costly_methods_agree_with_tracin_at_the_start_and_leave_the_model_as_it_was(method):
    """One small step, and a Hessian that is small beside its damping: what is left of all three is `<g_v, g_z>`."""
    prepare = RowPreparer(AutoTokenizer.from_pretrained(TINY_MODEL), RowConfig())
    rows = [recipe.tokenised(prepare(row)) for row in tasks.task_rows("math", 0, 1, 1)[0][:6]]
    config = comparison.ComparisonConfig()
    model = comparison.with_lora(AutoModelForCausalLM.from_pretrained(TINY_MODEL), config, 0)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    got = comparison.COSTLY[method](model, rows[:4], rows[4:])
    want = baselines.tracin(*(baselines.gradients(model, side) for side in (rows[:4], rows[4:])))
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert not model.training
    cosine = torch.nn.functional.cosine_similarity(got.flatten().double(), want.flatten().double(), 0)
    assert cosine > 0.98


def test_what_z0_inf_and_rho_loss_read_of_a_run():
    """The first checkpoint is the model itself, and only the second model has seen the validation rows."""
    prepare = RowPreparer(AutoTokenizer.from_pretrained(TINY_MODEL), RowConfig())
    items = [recipe.tokenised(prepare(row)) for row in tasks.task_rows("math", 0, 1, 1)[0][:6]]
    rows = comparison.Rows(items[:4], items[4:], items[:4], items[4:])
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL).eval()
    config = comparison.ComparisonConfig(epochs=2, learning_rate=1e-2)
    before = baselines.loss(model, items)
    scoring, training = comparison.rho_loss(config, report.Meter("wall"), model, rows, 0)
    assert torch.equal(baselines.loss(model, items), before)
    assert scoring.value.shape == (4,)
    assert scoring.value.abs().max() > 0
    assert training.value < -float(before[4:].mean()), "the loss of the last epoch, on the validation rows"
    weights, train, validation = comparison.snapshot(comparison.with_lora(model, config, 0), rows)
    assert len(weights) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = [sum(label != -100 for label in row["labels"]) for row in items]
    torch.testing.assert_close(torch.cat([train, validation]), before * torch.tensor(counts))


def test_a_label_s_first_validation_row_stands_for_it():
    relevant = np.eye(3, dtype=bool)[[0, 0, 1, 2]][:, [2, 2, 0, 1, 0]]
    labels = comparison.Labels(relevant, validation_M=np.arange(5))
    assert labels.first_of_each() == [0, 2, 3]
    some = labels.of([0, 2, 3])
    assert some.relevant_NM.shape == (4, 3)
    assert some.validation_M.tolist() == [0, 2, 3]


def test_the_meter_sees_the_memory_of_the_call_alone():
    meter = report.Meter("wall")
    large = meter(lambda: bool(torch.ones(50_000_000).sum()))  # 200 MB
    small = meter(lambda: 1)
    if large.peak_mib is not None:
        assert large.peak_mib - small.peak_mib > 150


@pytest.mark.parametrize("head", [{}, {"scale": 0.5}, {"softcap": 3.0}])
def test_differentiable_logits_are_those_of_the_head(head):
    weight, hidden = torch.randn(7, 4), torch.randn(5, 4, requires_grad=True)
    described = Head(weight, torch.randn(7), **head)
    logits = comparison.logits(described, hidden)
    torch.testing.assert_close(logits, described.logits(hidden.detach().clone()))
    logits.sum().backward()


def test_every_direction_of_the_config_is_compared():
    for method in comparison.methods(noisy=True):
        ForValueConfig(method=method)
    assert set(comparison.methods(noisy=True)) - set(comparison.methods(noisy=False)) == {"auto", "label_model"}
    assert {"gradient", "whitened"} <= set(comparison.methods(noisy=False))


def test_the_yaml_is_the_papers_benchmark_and_parses():
    path = RECIPES / "compare_influence.yaml"
    parser = TrlParser((recipe.CompareConfig,))
    (config,) = parser.parse_args_and_config(args=["--config", str(path)])
    assert {name: getattr(config, name) for name in yaml.safe_load(path.read_text())} == yaml.safe_load(
        path.read_text()
    )
    assert (config.train_per_class, config.validation_per_class, config.seeds) == (90, 10, 3)
    assert (config.lora_r, config.lora_alpha, config.lora_targets) == (8, 32, ["q_proj", "v_proj"])


def test_unknown_tasks_and_losses_are_refused_by_name():
    with pytest.raises(ValueError, match="'poems' is none of"):
        recipe.CompareConfig(tasks=["poems"])
    with pytest.raises(ValueError, match="'prompt' is none of"):
        recipe.CompareConfig(losses=["prompt"])
    with pytest.raises(ValueError, match="'sun' is none of"):
        recipe.CompareConfig(clock="sun")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    config = recipe.CompareConfig(
        tasks=["math"], losses=["answer"], train_per_class=2, validation_per_class=1, epochs=1, output_dir=str(folder)
    )
    return folder, recipe.main(config)


def test_a_small_run_compares_every_method_at_every_checkpoint(run):
    folder, results = run
    methods = {result.method for result in results}
    assert set(comparison.LORA_METHODS) | {comparison.SCHULZ, comparison.TRACIN_CP} <= methods
    assert {comparison.RHO, comparison.Z0_INF, "in-context approximation, 3 rows"} <= methods
    assert {"For-Value, gradient", "For-Value, whitened", "Emb", "RDS+", "TF-IDF of the text", "random"} <= methods
    for method in comparison.LORA_METHODS:
        assert [r.checkpoint for r in results if r.method == method] == [0, 1]
    assert all(0 <= r.auc <= 1 and 0 <= r.recall <= 1 and r.scoring_s >= 0 for r in results)
    with open(folder / "compare_influence.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(results)


def test_a_small_run_writes_a_table_with_best_and_last_checkpoint_and_a_picture(run):
    folder, _ = run
    text = (folder / "compare_influence.md").read_text()
    assert "| DataInf (best, " in text
    assert "| DataInf (last) |" in text
    assert "residuals of HyperINF" in text
    assert (folder / "compare_influence.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["compare_influence", "compare_vlm"])
def test_the_results_page_is_what_the_recipe_writes_of_the_csv_beside_it(name):
    """But for what the CSV does not hold: times of the whole run, residuals, the last digit of a tie."""
    kinds = {"task": str, "method": str, "seed": int, "checkpoint": int}
    with open(RECIPES / "results" / f"{name}.csv", newline="") as file:
        lines = [
            {key: kinds.get(key, float)(value) if value else None for key, value in line.items()}
            for line in csv.DictReader(file)
        ]
    checkpoints = sorted({line["checkpoint"] for line in lines} - {None})
    config = report.ComparisonConfig(checkpoints=checkpoints, epochs=checkpoints[-1])
    written = report.markdown(config, "", [report.Result(**line) for line in lines], [], 0.0).splitlines()
    page = [line.split() for line in (RECIPES / "results" / f"{name}.md").read_text().splitlines()]
    not_held = ("Seeds 0 to ", "| outlier gradients (best")
    assert [text for text in written if not text.startswith(not_held) and not any(same(text, o) for o in page)] == []


def same(text, other):
    words = text.split()
    return len(words) == len(other) and all(a == b or near(a, b) for a, b in zip(words, other, strict=True))


def near(a, b):
    try:
        return abs(float(a) - float(b)) < 0.0011
    except ValueError:
        return False
