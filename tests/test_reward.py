"""Reward models by their own head: pairs against autograd of the loss of Bradley and Terry, and in RewardTrainer."""

import re

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from forvalue_callbacks import (
    TINY_MODEL,
    ForValueCallback,
    ForValueConfig,
    ForValueScorer,
    Swap,
    Threshold,
    prefilter,
)
from forvalue_callbacks.core.stats import auc
from forvalue_callbacks.tiny import instructions
from helpers.oracles import relative
from helpers.trainers import Passes

TEXT = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": 1}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
KINDS = ["LlamaForSequenceClassification", "Qwen2ForSequenceClassification", "BertForSequenceClassification"]


def build(kind="LlamaForSequenceClassification", dtype=torch.float64, **changes):
    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**TEXT, **changes})).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def pairs(n, seed):
    """Both sides begin alike; lengths differ."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt = rng.integers(3, 67, rng.integers(1, 6)).tolist()
        sides = [[*prompt, i, *rng.integers(3, 67, rng.integers(1, 8)).tolist()] for i in (1, 2)]
        rows.append({"chosen_ids": sides[0], "rejected_ids": sides[1]})
    return rows


TRAIN, VALIDATION = pairs(14, 1), pairs(6, 2)


def scorer(model, validation=VALIDATION, method="gradient", **config):
    return ForValueScorer(model, validation, ForValueConfig(method=method, **config), progress=False)


def head_of(model):
    return next(name for name, module in model.named_modules() if name in ("score", "classifier"))


def log_likelihood(model, weight, row):
    """Minus the loss of trl's RewardTrainer, by the model's own forward."""
    rewards = [
        functional_call(model, {f"{head_of(model)}.weight": weight}, kwargs={"input_ids": torch.tensor([row[side]])})
        for side in ("chosen_ids", "rejected_ids")
    ]
    return torch.nn.functional.logsigmoid(rewards[0].logits - rewards[1].logits).sum()


def gradient(model, row):
    """Autograd: in the head's own weight, (1, D)."""
    weight = model.get_parameter(f"{head_of(model)}.weight").detach().clone().requires_grad_(True)
    return torch.autograd.grad(log_likelihood(model, weight, row), weight)[0]


def difference(model, row):
    """What the head gets of the chosen answer minus what it gets of the rejected one, (D,)."""
    seen = []
    hook = model.get_submodule(head_of(model)).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for side in ("chosen_ids", "rejected_ids"):
            model(input_ids=torch.tensor([row[side]]))
    hook.remove()
    chosen, rejected = (states[0] if states.ndim == 2 else states[0, -1] for states in seen)
    return chosen - rejected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["gradient", "whitened"])
def test_scores_equal_autograd_of_the_loss_in_the_heads_weight(kind, method):
    model = build(kind)
    direction = torch.stack([gradient(model, row) for row in VALIDATION]).mean(0)
    if method == "whitened":
        states = torch.stack([difference(model, row) for row in VALIDATION])
        moment = states.T @ states / len(states)
        direction = direction @ torch.linalg.inv(moment + 0.01 * moment.diagonal().mean() * torch.eye(32).double())
    scores = scorer(model, method=method).score(TRAIN)
    assert relative(scores.values, [float((direction * gradient(model, row)).sum()) for row in TRAIN]) < 1e-10
    weight = model.get_parameter(f"{head_of(model)}.weight")
    want = [log_likelihood(model, weight, row).detach() for row in TRAIN]
    assert relative(scores.log_likelihood, want) < 1e-10
    assert scores.n_labelled.tolist() == [1] * len(TRAIN)


def test_pairs_of_rows_have_the_mean_that_scores_are():
    model = build()
    made = scorer(model)
    gradients = [[gradient(model, row) for row in rows] for rows in (TRAIN, VALIDATION)]
    want = [[float((one * other).sum()) for other in gradients[1]] for one in gradients[0]]
    assert relative(made.pairwise(TRAIN), want) < 1e-10


@pytest.mark.parametrize("changes", [{}, {"pad_token_id": None}])
def test_a_pair_scores_as_it_does_alone_whatever_is_beside_it(changes):
    model = build(**changes)
    together = scorer(model).score(TRAIN).values
    alone = [scorer(model).score([row]).values[0] for row in TRAIN]
    assert relative(together, alone) < 1e-10
    assert relative(scorer(model.float()).score(TRAIN).values, together) < 1e-4


@pytest.mark.parametrize(("pad", "least", "most"), [(0, 2, len(TRAIN)), (None, 2 * len(TRAIN), 2 * len(TRAIN))])
def test_pairs_of_other_lengths_run_together_where_the_model_knows_padding(pad, least, most):
    model = build(pad_token_id=pad)
    made = scorer(model)
    made.validation.state()
    passes = Passes(model)
    made.score(TRAIN)
    assert least <= passes.n <= most, "no pass in vain"


def test_a_fitted_head_tells_pairs_that_are_the_right_way_round():
    """Answers that say one token are better."""

    def rows(n, seed):
        made = pairs(n, seed)
        for row in made:
            row["chosen_ids"] = [*row["chosen_ids"], 7]
        return made

    model, train = build(), rows(20, 3)
    turned = [{"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in train[:10]]
    scores = scorer(model, rows(30, 4), "fitted").score([*turned, *train[10:]]).values
    assert auc(scores[10:], scores[:10]) > 0.9


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"method": "auto"}, "method='auto' scores answers.*preferences"),
        ({"method": "label_model"}, "method='label_model' scores answers.*preferences"),
        ({"method": "gradient", "normalize": "cosine"}, "normalize='cosine' scores answers.*preferences"),
    ],
)
def test_other_methods_are_refused_by_name(config, match):
    with pytest.raises(ValueError, match=match):
        scorer(build(), **config)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            {"input_ids": [5, 6], "labels": 0.5},
            r"predicts a number .*this row is none \(columns found: 'input_ids'",
        ),
        ({**TRAIN[0], "margin": 0.5}, "without a margin; this row has a 'margin'"),
        ({"prompt_ids": [5], "completion_ids": [6], "label": True}, "this row is none"),
    ],
)
def test_rows_that_are_no_pairs_have_no_score(row, match):
    model = build()
    reasons = scorer(model).score([TRAIN[0], row]).reasons
    assert reasons[0] is None
    assert re.search(match, reasons[1])
    passes = Passes(model)
    with pytest.raises(ValueError, match=f"no validation row can be scored by Llama.*{match}"):
        scorer(model, [row]).score(TRAIN)
    assert passes.n == 0


# ---- in trl's RewardTrainer ----


def demo_pairs(n, seed, share=0.0):
    right, wrong = (instructions(n, seed, noise).to_list() for noise in (0.0, 1.0))
    swapped = np.random.default_rng(seed).permutation(n) < round(share * n)
    rows = []
    for one, other, turned in zip(right, wrong, swapped, strict=True):
        answers = [one["completion"], other["completion"]][:: -1 if turned else 1]
        rows.append({"prompt": one["prompt"], "chosen": answers[0], "rejected": answers[1]})
    return rows, swapped


def reward_trainer(path, rows, callbacks=()):
    trl = pytest.importorskip("trl")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(TINY_MODEL, num_labels=1, dtype=torch.float32)
    args = {"output_dir": str(path), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    args |= {"max_steps": 2, "save_strategy": "no", "gradient_checkpointing": False}
    return trl.RewardTrainer(
        model,
        args=trl.RewardConfig(**args),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


@pytest.mark.filterwarnings("ignore")
def test_reward_trainer_drops_pairs_by_scores_of_its_own_model(tmp_path):
    rows, swapped = demo_pairs(120, 0, 0.3)
    validation = demo_pairs(150, 1)[0]
    callback = ForValueCallback(validation, Threshold(0.0), ForValueConfig(method="whitened"))
    trainer = reward_trainer(tmp_path, rows, [callback])
    raw = ForValueScorer(
        trainer.model,
        validation,
        ForValueConfig(method="whitened"),
        processing_class=trainer.processing_class,
        progress=False,
    ).score(rows)
    trainer.train()
    assert np.array_equal(callback.scores.row_digests, raw.row_digests), "raw rows are read as the trainer reads them"
    assert relative(callback.scores.values, raw.values) < 1e-5
    assert auc(callback.scores.values[~swapped], callback.scores.values[swapped]) > 0.8
    assert np.array_equal(callback.weights == 0, callback.scores.values < 0)


@pytest.mark.filterwarnings("ignore")
def test_prefilter_turns_pairs_of_a_reward_trainer_round(tmp_path):
    trainer = reward_trainer(tmp_path, demo_pairs(40, 0, 0.3)[0])
    before = trainer.train_dataset.to_list()
    scores = prefilter(trainer, demo_pairs(60, 1)[0], Swap(), verbose=False)
    assert (scores.values < 0).any()
    for old, new, turned in zip(before, trainer.train_dataset.to_list(), scores.values < 0, strict=True):
        names = [name for name in old if name.startswith("chosen")]
        assert [new[name] for name in names] == [
            old[name.replace("chosen", "rejected") if turned else name] for name in names
        ]
    trainer.train()
