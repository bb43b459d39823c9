"""What is refused before any row is scored, each with the way out."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainingArguments

from forvalue_callbacks import Drop, ForValueCallback, ForValueConfig, ForValueScorer, ForValueScores, prefilter
from forvalue_callbacks.scores.noise import NoiseEstimate
from forvalue_callbacks.trainer.callback import SCORES_FILE
from helpers.models import build_model, build_rows
from helpers.trainers import TRAIN, VALIDATION, Passes, make_trainer, rows_with_id

AUTO = Drop("auto")
LABELS = ForValueConfig(method="label_model")


def callback(*args, **options):
    """A trainer with a callback, made when it is called."""
    return lambda path, model, **more: make_trainer(
        path, [ForValueCallback(VALIDATION, *args, **options)], model=model, **more
    ).train()


def filtered(*args, **options):
    return lambda path, model, **more: prefilter(make_trainer(path, model=model, **more), VALIDATION, *args, **options)


def refused(path, build, match, kind=ValueError, **options):
    model = build_model()
    passes = Passes(model)
    with pytest.raises(kind, match=match):
        build(path, model, **options)
    assert passes.n == 0


@pytest.mark.parametrize("way", [callback, filtered])
@pytest.mark.parametrize(
    ("policy", "kind", "match"),
    [
        (0.2, TypeError, r"type float.*Drop\(0.2\)"),
        (Drop, TypeError, r"class Drop.*Drop\(0.2\)"),
        ("drop everything", ValueError, r"cannot read the policy.*drop:0.2"),
        (AUTO, ValueError, r"log odds.*method='auto'.*or give a fraction"),
        ("drop:0.1+drop:auto", ValueError, r"log odds.*method='auto'"),
    ],
)
def test_policies_that_are_none_or_need_other_scores(tmp_path, way, policy, kind, match):
    refused(tmp_path, lambda *args: way(policy)(*args), match, kind)


@pytest.mark.parametrize("way", [callback, filtered])
def test_a_config_that_is_none(tmp_path, way):
    refused(tmp_path, lambda *args: way(Drop(0.2), "auto")(*args), r"type str.*ForValueConfig\(", TypeError)


def test_no_validation_rows():
    with pytest.raises(TypeError, match="validation_dataset is None: give clean rows"):
        ForValueCallback(None)


def test_a_policy_in_words_is_one(tmp_path):
    made = ForValueCallback(VALIDATION, "drop:0.25")
    make_trainer(tmp_path, [made], max_steps=1).train()
    assert (made.weights == 0).sum() == 6


@pytest.mark.parametrize("policy", ["reweight:1.0", "drop:0.1+reweight:1.0"])
def test_prefilter_has_no_use_for_weights(tmp_path, policy):
    refused(tmp_path, filtered(policy), "weights rows.*use ForValueCallback")


@pytest.mark.parametrize("way", [callback, filtered])
@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (None, r"no column 'source'.*remove_unused_columns=False.*groups=\["),
        (["a"] * 23, "a group for each of 24 training rows, and there is 23 groups"),
        ("source", "there is str in place of a list"),
        (5, "there is int in place of a list"),
        ([["a"]] * 24, "the group of row 0 is a list: make it text or a number"),
    ],
)
def test_groups_that_do_not_fit(tmp_path, way, groups, match):
    refused(tmp_path, way("drop:0.5@source", groups=groups), match)


@pytest.mark.parametrize("kind", [list, lambda rows: Subset(Dataset.from_list(rows), range(24))])
def test_groups_are_read_row_by_row_where_a_data_set_knows_no_columns(tmp_path, kind):
    rows = [{**row, "source": i % 2} for i, row in enumerate(rows_with_id())]
    trainer = make_trainer(tmp_path, train=kind(rows))
    prefilter(trainer, VALIDATION, "drop:0.5@source", verbose=False)
    kept = [trainer.train_dataset[i]["source"] for i in range(len(trainer.train_dataset))]
    assert sorted(np.bincount(kept)) == [6, 6]
    del rows[5]["source"]
    with pytest.raises(ValueError, match="training row 5 has no column 'source'"):
        prefilter(make_trainer(tmp_path, train=rows), VALIDATION, "drop:0.5@source")


@pytest.mark.parametrize("way", [callback, filtered])
def test_groups_that_no_policy_asks_for(tmp_path, way):
    refused(tmp_path, way(Drop(0.5), groups=["a"] * 24), "drop:0.5 has none.*group_column=")


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_groups_in_any_form_are_compared_by_value(tmp_path, form):
    source = [i % 2 for i in range(24)]
    trainer = make_trainer(tmp_path)
    prefilter(trainer, VALIDATION, "drop:0.5@source", groups=form(source), verbose=False)
    kept = [row["input_ids"][0] - 3 for row in trainer.train_dataset]
    assert sorted(np.bincount([source[i] for i in kept])) == [6, 6]


class OwnBatches(Trainer):
    def get_train_dataloader(self):
        rows = Dataset.from_list(rows_with_id()).with_format("torch")
        return DataLoader(rows, batch_sampler=[[0, 1], [2, 3]], collate_fn=self.data_collator)


class NoLoader(Trainer):
    def get_train_dataloader(self):
        return [{"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}]


@pytest.mark.parametrize(("kind", "match"), [(OwnBatches, "list makes whole batches"), (NoLoader, "has no dataset")])
def test_a_loader_that_cannot_draw_by_weight(tmp_path, kind, match):
    model = build_model()
    passes = Passes(model)
    with pytest.raises(ValueError, match=rf"{match}.*prefilter\(trainer\)"):
        make_trainer(tmp_path, [ForValueCallback(VALIDATION)], model=model, kind=kind, max_steps=1).train()
    assert passes.n == 0


@pytest.mark.parametrize("way", [callback, filtered])
def test_a_folder_that_is_gone_is_made_and_one_that_cannot_be_is_named(tmp_path, way):
    way()(tmp_path / "new" / "below", build_model(), max_steps=1)
    assert (tmp_path / "new" / "below" / SCORES_FILE).is_file()
    (tmp_path / "file").write_text("")
    model = build_model()
    passes = Passes(model)
    trainer = make_trainer(tmp_path / "a", [ForValueCallback(VALIDATION)] if way is callback else (), model=model)
    for folder in ("file", "file/below"):  # where a file is, or the folder of one
        trainer.args.output_dir = str(tmp_path / folder)
        with pytest.raises(ValueError, match=rf"nothing can be written to the folder \S+{folder} \(.*choose another"):
            trainer.train() if way is callback else prefilter(trainer, VALIDATION)
    trainer.args.output_dir = str(tmp_path / "b")
    (tmp_path / "b" / SCORES_FILE).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is a folder.*move it away"):
        trainer.train() if way is callback else prefilter(trainer, VALIDATION)
    assert passes.n == 0


def test_a_folder_for_directions_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    config = ForValueConfig(direction_cache=str(tmp_path / "file" / "directions"))
    refused(tmp_path, callback(Drop(0.2), config), "nothing can be written to the folder.*directions")
    model = build_model()
    passes = Passes(model)
    with pytest.raises(ValueError, match="nothing can be written"):
        ForValueScorer(model, VALIDATION, config, progress=False).score(TRAIN)
    assert passes.n == 0


def test_two_callbacks_are_refused_before_either_scores_and_one_may_go_on(tmp_path):
    model = build_model()
    passes = Passes(model)
    pair = [ForValueCallback(VALIDATION, Drop(0.5)), ForValueCallback(VALIDATION, Drop(0.2))]
    trainer = make_trainer(tmp_path, pair, model=model, max_steps=1)
    with pytest.raises(ValueError, match=r"two ForValueCallbacks.*a\.then\(b\)"):
        trainer.train()
    assert passes.n == 0
    trainer.remove_callback(pair[1])
    trainer.train()
    trainer.add_callback(pair[1])  # it has seen no beginning of this trainer
    with pytest.raises(ValueError, match="two ForValueCallbacks"):
        trainer.train()
    trainer.remove_callback(pair[0])
    trainer.train()
    for one in pair:  # each in a trainer of its own
        make_trainer(tmp_path, [one], max_steps=1).train()


OTHER_ROWS = {
    "compared": ["TPOConfig"],
    "marked": ["BCOConfig", "PRMConfig"],
    "prompts": ["GRPOConfig", "RLOOConfig", "OnlineDPOConfig", "PPOConfig", "GKDConfig", "NashMDConfig", "XPOConfig"],
}


@pytest.mark.parametrize(("what", "name"), [(what, name) for what, names in OTHER_ROWS.items() for name in names])
def test_trainers_whose_rows_are_no_labelled_answers(tmp_path, what, name):
    """Their arguments have these names, in frameworks with classes of their own around them too."""
    other = type("OwnArguments", (type(name, (TrainingArguments,), {}),), {})
    trainer = make_trainer(tmp_path, [ForValueCallback(VALIDATION)], args=other)
    for go in (trainer.train, lambda: prefilter(trainer, VALIDATION)):
        with pytest.raises(ValueError, match=rf"a trainer with {name}.*{what}.*ForValueScorer\(model, validation\)"):
            go()


def given(rows, **metadata):
    scores = ForValueScorer(build_model(), VALIDATION, progress=False).score(rows)
    scores.metadata |= metadata
    return scores


def test_given_scores_are_those_of_these_rows_in_this_order(tmp_path):
    rows = rows_with_id()
    scores = given(rows)
    scores.save(tmp_path / "scores.parquet")
    for good in (scores, str(tmp_path / "scores.parquet")):
        callback = ForValueCallback(VALIDATION, Drop(0.25), scores=good)
        make_trainer(tmp_path, [callback], max_steps=1).train()
        assert set(np.flatnonzero(callback.weights == 0)) == set(np.argsort(scores.values)[:6])
    by_other_means = {"provenance": {}}  # then there are numbers of labelled tokens to compare
    for other, metadata in ((rows[::-1], {}), (rows[::-1], by_other_means), (build_rows(24, seed=9), {})):
        refused(tmp_path, callback_with(given(other, **metadata)), "other rows, of these rows in another order")
    refused(tmp_path, callback_with(given(rows[:-1])), "23 scores for 24 training rows")
    own = ForValueScores(np.arange(24.0), [None] * 24, np.zeros(24), np.zeros(24, dtype=int))
    callback_with(own)(tmp_path, build_model(), max_steps=1)  # numbers that come from elsewhere


def callback_with(scores):
    return callback(Drop(0.25), scores=scores)


def test_given_scores_without_log_odds_cannot_be_dropped_by_them(tmp_path):
    with pytest.raises(ValueError, match="log odds"):
        ForValueCallback(VALIDATION, AUTO, LABELS, scores=given(rows_with_id()))
    made = ForValueCallback(VALIDATION, AUTO, scores=given(rows_with_id(), noise=NoiseEstimate(0.5, {}, 40).to_dict()))
    make_trainer(tmp_path, [made], max_steps=1).train()
    assert np.array_equal(made.weights > 0, made.scores.values >= 0)
