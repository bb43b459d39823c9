"""The recipe that compares methods on images: its drawings, its batches, and a small run."""

import sys

import numpy as np
import pytest
import torch
import yaml
from trl import TrlParser

from forvalue_callbacks import ForValueScorer
from helpers.recipes import RECIPES, load

tasks = load("vlm_tasks")
recipe = load("compare_vlm")


def test_subjects_are_thirty_and_captions_name_their_kind_alone():
    train, validation = tasks.subject_rows(0)
    assert len({row["label"] for row in train}) == 30
    assert (len(train), len(validation)) == (90, 60)
    for row in train:
        colour, shape = row["label"].split()
        assert shape in row["completion"]
        assert colour not in row["completion"]


def test_captions_name_the_style_only_where_they_should():
    train, validation = tasks.style_rows(0, 6, 2)
    assert [sum(row["label"] == style for row in train) for style in tasks.STYLES] == [6, 6, 6]
    assert [sum(row["label"] == style for row in validation) for style in tasks.STYLES] == [2, 2, 2]
    words = {word for row in train for word in row["completion"].split()}
    assert not words & {word for style in tasks.STYLES.items() for word in style}
    named, _ = tasks.style_rows(0, 6, 2, named=True)
    assert all(tasks.STYLES[row["label"]] in row["completion"] for row in named)
    assert [row["image"].tobytes() for row in named] == [row["image"].tobytes() for row in train]


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.5])
def test_the_share_of_wrong_answers_is_exact_in_each_class_and_validation_is_clean(noise):
    train, validation = tasks.animal_rows(0, noise, 20, 5)
    for kind in tasks.ANIMALS:
        shown = [row for row in train if (row["label"] == kind) == row["clean"]]
        assert len(shown) == 20, "rows that show this kind in their image"
        assert sum(not row["clean"] for row in shown) == round(noise * 20)
    assert all(row["clean"] for row in validation)
    assert all(row["completion"] == f" It is a {row['label']}." for row in [*train, *validation])


def test_captions_hardly_repeat_and_a_share_is_that_of_another_picture():
    train, validation = tasks.caption_rows(0, 0.3)
    clean, _ = tasks.caption_rows(0, 0.0)
    assert len({row["completion"] for row in validation}) > 0.9 * len(validation)
    changed = [row["completion"] != own["completion"] for row, own in zip(train, clean, strict=True)]
    assert changed == [not row["clean"] for row in train]
    assert 0.28 * len(train) < sum(changed) <= 0.3 * len(train)
    assert all(row["label"] in row["completion"] for row in train)
    assert sorted(row["completion"] for row in train) == sorted(row["completion"] for row in clean)


def test_drawings_are_seeded_and_no_two_alike():
    rows, again, other = (tasks.style_rows(seed, 5, 1)[0] for seed in (0, 0, 1))
    pixels, same, different = ([row["image"].tobytes() for row in side] for side in (rows, again, other))
    assert pixels == same
    assert len({*pixels, *different}) == 30


def test_batches_hold_image_prompt_and_a_labelled_answer():
    collator = tasks.Collator()
    rows = tasks.pretraining_rows(6, 0)
    batch = collator(rows)
    assert batch["pixel_values"].shape == (6, 3, 32, 32)
    assert batch["pixel_values"].min() >= -1
    assert batch["pixel_values"].max() <= 1
    assert ((batch["input_ids"] == collator.image_token).sum(1) == 16).all()
    tokenizer = collator.prepare.processing_class
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        assert tokenizer.decode(labels[labels != -100]) == row["completion"] + tokenizer.eos_token
        assert row["prompt"] in tokenizer.decode(ids)
    alone = collator.rows(rows)[2]
    assert torch.equal(alone["input_ids"], batch["input_ids"][2][batch["attention_mask"][2].bool()])
    assert torch.equal(alone["pixel_values"], batch["pixel_values"][2])


def test_the_yaml_parses_and_trains_lora_as_the_paper_does():
    path = RECIPES / "compare_vlm.yaml"
    (config,) = TrlParser((recipe.VLMConfig,)).parse_args_and_config(args=["--config", str(path)])
    assert {name: getattr(config, name) for name in yaml.safe_load(path.read_text())} == yaml.safe_load(
        path.read_text()
    )
    assert (config.epochs, config.learning_rate, config.batch_size) == (20, 2e-4, 32)


def test_a_small_run_compares_every_method_on_matching_and_on_noise(tmp_path, monkeypatch):
    spelled = []

    def scorer(*args, processing_class=None, **options):
        spelled.append(processing_class is not None)
        return ForValueScorer(*args, processing_class=processing_class, **options)

    monkeypatch.setattr(sys.modules["influence_comparison"], "ForValueScorer", scorer)
    config = recipe.VLMConfig(
        tasks=["style", "animals_50"],
        pretraining_rows=6,
        pretraining_epochs=1,
        style_rows=4,
        animal_rows=4,
        epochs=1,
        checkpoints=[1],
        output_dir=str(tmp_path),
    )
    results = recipe.main(config)
    methods = [{result.method for result in results if result.task == task} for task in config.tasks]
    assert methods[0] == methods[1] >= {"For-Value, gradient", "RDS+", "cosine of the pixels", "DataInf"}
    for result in results:
        assert (result.noise_auc is None) == (result.task == "style")
        assert np.isfinite(result.auc)
    text = (tmp_path / "compare_vlm.md").read_text()
    assert "| noise | within |" in text
    assert (tmp_path / "compare_vlm.png").read_bytes()[:4] == b"\x89PNG"
    assert spelled
    assert all(spelled), "or `auto` does not know what tokens look like"
