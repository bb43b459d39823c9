"""What two processes go through one after the other, so that torch starts but once: `SCENARIOS`.

Run by `torch.distributed.run` as a module (or the other helpers would stand in for libraries of their names), with a
folder to write RANK.json to.
"""

import json
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from forvalue_callbacks import Drop, ForValueCallback, ForValueConfig, ForValueScorer, prefilter
from forvalue_callbacks.data import reader
from forvalue_callbacks.methods.explain import Explainer
from forvalue_callbacks.scores.pairs import PairsFile
from forvalue_callbacks.scores.scores import ForValueScores
from forvalue_callbacks.scores.writer import ScoreWriter
from helpers import kinds
from helpers.answers import answered, rows_of
from helpers.models import build_model, build_rows
from helpers.trainers import collate

TRAIN, VALIDATION = build_rows(24, seed=1), build_rows(6, seed=2)
CLEAN, NOISY = rows_of(60, 1)[0], rows_of(70, 2, 0.3)[0]
ANSWERED = answered(40, 1), answered(30, 2)
CLASSIFIER = "LlamaForSequenceClassification"
HANGS = timedelta(seconds=60)  # what waits longer waits for ever
WINDOW = 10
SCENARIOS = {}


def scenario(*errors, **settings):
    """A function of the rank and a folder that both share. `errors`: what each rank says; none: the scores of one
    process. Further `settings` make several of it."""

    def add(function):
        name = "-".join([function.__name__, *map(str, settings.values())])
        assert name not in SCENARIOS
        SCENARIOS[name] = partial(function, **settings), errors
        return function

    return add


def scorer_of(model=None, validation=VALIDATION, data_collator=None, max_tokens=40, **config):
    config = ForValueConfig(max_tokens_per_batch=max_tokens, **config)
    model = model or build_model(dtype=torch.float64)
    return ForValueScorer(model, validation, config, data_collator=data_collator, progress=False)


def told(scores):
    return [scores.values.tolist(), scores.log_likelihood.tolist(), scores.n_labelled.tolist(), scores.reasons]


def explained(found):
    places = [[place for place, _ in side] for side in (found.supporting, found.opposing)]
    cosines = [[cosine for _, cosine in side] for side in (found.supporting, found.opposing)]
    return [found.row, list(found.tokens), list(found.token_scores), found.by, found.nearest_by, places, cosines]


def raises(error):
    def fail(*args, **kwargs):
        raise error

    return fail


class Patched:
    """An attribute that is another for a while."""

    def __init__(self, owner, name, value):
        self.owner, self.name, self.value = owner, name, value

    def __enter__(self):
        self.before = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.value)

    def __exit__(self, *error):
        setattr(self.owner, self.name, self.before)


# ---- the scores of one process ----


@scenario(method="gradient")
@scenario(method="gradient", normalize="cosine")
@scenario(method="gradient", normalize="none", vocab="seen")
@scenario(method="whitened")
@scenario(method="fitted")
def scores(rank, folder, **config):
    return told(scorer_of(**config).score(TRAIN))


@scenario(method="whitened", normalize="cosine")
def scores_by_several_sets(rank, folder, **config):
    scores = scorer_of(validation={"two": VALIDATION[:2], "others": VALIDATION[2:]}, **config).score(TRAIN)
    return [*told(scores), *(values.tolist() for values in scores.by_set.values())]


@scenario()
def scores_of_a_reward_model(rank, folder):
    sizes = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=4, num_labels=1, pad_token_id=0))
    model = model.double()
    rows = [{"chosen_ids": row["input_ids"], "rejected_ids": [*row["input_ids"][:1], 5, 6]} for row in TRAIN]
    return told(scorer_of(model, rows[:6], method="whitened").score(rows[6:]))


@scenario()
def scores_by_the_label_model(rank, folder):
    return told(scorer_of(validation=CLEAN, method="label_model").score(NOISY))


@scenario()
def scores_by_auto(rank, folder):
    return told(scorer_of(validation=ANSWERED[0], method="auto").score(ANSWERED[1]))


@scenario()
def token_scores(rank, folder):
    return [tokens.tolist() for tokens in scorer_of().token_scores(TRAIN)]


@scenario(method="gradient")
@scenario(method="label_model")
def explanations(rank, folder, method):
    scorer = scorer_of(validation=CLEAN, method=method)
    return [explained(found) for found in scorer.explain([*NOISY, {"input_ids": [5]}], [70, *range(30, 3, -2)])]


@scenario()
def pairs(rank, folder):
    return scorer_of().pairwise(TRAIN).tolist()


@scenario()
def pairs_in_a_file(rank, folder):
    return scorer_of(method="whitened").pairwise(TRAIN, folder / "pairs.npy").tolist()


@scenario(n=0)
@scenario(n=1)
@scenario(n=3)
def few_rows(rank, folder, n):
    return told(scorer_of().score(TRAIN[:n]))


@scenario()
def one_validation_row(rank, folder):
    return told(scorer_of(validation=VALIDATION[:1]).score(TRAIN))


@scenario(method="gradient")
@scenario(method="fitted")
def validation_rows_that_overflow(rank, folder, method):
    """One is found when the model is checked, the other by the rank that runs it."""
    model = build_model(dtype=torch.float64)
    with torch.no_grad():
        model.get_input_embeddings().weight[66] = torch.inf
    rows, validation = ([row for row in side if 66 not in row["input_ids"]] for side in (TRAIN, VALIDATION))
    broken = [{"input_ids": [66] * n, "labels": [-100] + [9] * (n - 1)} for n in (16, 4)]
    return told(scorer_of(model, [broken[0], *validation, broken[1]], method=method).score(rows))


@scenario()
def rows_of_a_stream(rank, folder):
    return told(scorer_of().score(iter(TRAIN)))


@scenario()
def rows_that_a_collator_makes(rank, folder):
    return told(scorer_of(data_collator=collate).score([{**row, "other": [1]} for row in TRAIN]))


@scenario()
def rows_that_cannot_be_scored(rank, folder):
    rows = [*TRAIN[:3], {"input_ids": [5], "labels": [5]}, *TRAIN[3:]]
    return told(scorer_of().score(rows))


@scenario()
def a_direction_that_one_rank_alone_finds(rank, folder):
    scorer_of(direction_cache=str(folder / "both")).direction()
    scorer = scorer_of(direction_cache=str(folder / ("both" if rank == 0 else "empty")))
    return told(scorer.score(TRAIN))


@scenario()
def a_run_that_goes_on(rank, folder):
    """Two windows of the three, then a row that nobody can read; then the rest of them, as the first rank says."""
    scored = []

    def broken():
        yield from TRAIN[: 2 * WINDOW]
        raise OSError("the disk is gone")

    def score(rows):
        scorer = scorer_of()
        find = scorer.run.positions
        scorer.run.positions = lambda samples, *args, **kwargs: (
            scored.append([sample.index for sample in samples]),
            find(samples, *args, **kwargs),
        )[1]
        return scorer.score(rows, folder / "goes_on.parquet")

    with suppress(OSError, RuntimeError):
        score(broken())
    scored.clear()
    return [told(score(TRAIN)), scored]


# ---- one rank out of memory ----


def limited(model, most):
    forward = model.base_model.forward

    def short_of_memory(*args, input_ids=None, **kwargs):
        if input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, input_ids=input_ids, **kwargs)

    model.base_model.forward = short_of_memory
    return model


@scenario(short=0)
@scenario(short=1)
def forward_out_of_memory(rank, folder, short):
    model = limited(build_model(dtype=torch.float64), 25) if rank == short and is_one_of_two() else None
    scorer = scorer_of(model, max_tokens=80)
    return [told(scorer.score(TRAIN)), told(scorer.score(TRAIN[:7]))]


@scenario()
def forward_of_two_parts_out_of_memory(rank, folder):
    """Of each row the answer alone too: a second pass over the window, with less room on one rank."""
    scorer = scorer_of(validation=ANSWERED[0], method="auto", max_tokens=80)
    scorer.validation.state()
    if rank == 1 and is_one_of_two():
        limited(scorer.backbone.model, 25)
    return told(scorer.score(ANSWERED[1]))


@scenario(short=0)
def another_pass_after_one_out_of_memory(rank, folder, short):
    """The validation rows are run again by plans of which no rank may have its own."""
    model = limited(build_model(dtype=torch.float64), 25) if rank == short and is_one_of_two() else None
    scorer = scorer_of(model, max_tokens=80)
    scorer.direction()
    scorer.validation.known = None
    return scorer.direction().tolist()


@scenario(short=0)
@scenario(short=1)
def head_out_of_memory(rank, folder, short):
    scorer = scorer_of()
    method, most = scorer.validation.method, 8
    score = method.score

    def short_of_memory(state, head, positions):
        if rank == short and is_one_of_two() and len(positions.lengths) > 1 and len(positions.target_T) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(state, head, positions)

    method.score = short_of_memory
    return told(scorer.score(TRAIN))


@scenario(where="forward")
@scenario(where="head")
def a_row_too_large_alone(rank, folder, where):
    """The longest row is run by the first rank: the other must say the same of it."""
    rows = [*TRAIN, {"input_ids": list(range(3, 43)), "labels": list(range(3, 43))}]
    scorer = scorer_of()
    scorer.direction()
    if where == "forward" and rank == 0:
        limited(scorer.backbone.model, 35)
    elif rank == 0:
        score = scorer.validation.method.score
        scorer.validation.method.score = lambda state, head, positions: (
            (raises(torch.OutOfMemoryError("CUDA out of memory."))() if max(positions.lengths) > 35 else 0)
            or score(state, head, positions)
        )
    return told(scorer.score(rows))


@scenario("MemoryError: validation row 6: out of memory with this row alone", "rank 0 failed .* validation row 6")
def a_validation_row_too_large_alone(rank, folder):
    validation = [*VALIDATION, {"input_ids": list(range(3, 43)), "labels": list(range(3, 43))}]
    scorer = scorer_of(validation=validation)
    scorer.validation.check()
    if rank == 0:
        limited(scorer.backbone.model, 35)
    scorer.score(TRAIN)


# ---- ranks that are given something else: both say so ----


def both(text):
    return text, text


@scenario(*both(r"row 3 is another on rank 1 than on rank 0"))
def rows_in_another_order(rank, folder):
    rows = list(TRAIN)
    if rank == 1:
        rows[3], rows[4] = rows[4], rows[3]
    scorer_of().score(rows)


@scenario(*both(r"row 23 is another"))
def another_row_in_a_later_window(rank, folder):
    scorer_of().score([*TRAIN[:23], TRAIN[rank]])


@scenario(*both(r"rank 1 has fewer rows than rank 0, from row 17 on"), n=17)
@scenario(*both(r"rank 1 has fewer rows than rank 0, from row 20 on"), n=20)
def fewer_rows(rank, folder, n):
    scorer_of().score(TRAIN if rank == 0 else TRAIN[:n])


@scenario(*both(r"rank 1 has more rows than rank 0, from row 17 on"))
def more_rows(rank, folder):
    scorer_of().score(TRAIN[:17] if rank == 0 else TRAIN)


@scenario(*both("ValueError: row 24 is asked for, and the data set has 24 rows"))
def a_row_to_explain_that_is_not_there(rank, folder):
    scorer_of().explain(TRAIN, [0, 24])


@scenario("rank 1 failed while reading the rows to explain.*ValueError: row 24 is asked for", "ValueError: row 24")
def a_row_to_explain_that_one_rank_does_not_have(rank, folder):
    scorer_of().explain(TRAIN, [23 + rank])


@scenario(*both(r"row 0 is another on rank 1"))
def other_rows_to_explain(rank, folder):
    scorer_of().explain(TRAIN, [rank])


@scenario(*both(r"validation row 2 is another on rank 1"), way="score")
@scenario(*both(r"validation row 2 is another on rank 1"), way="token_scores")
@scenario(*both(r"validation row 2 is another on rank 1"), way="pairwise")
def other_validation_rows(rank, folder, way):
    rows = list(VALIDATION)
    if rank == 1:
        rows[2] = TRAIN[0]
    getattr(scorer_of(validation=rows), way)(TRAIN)


@scenario(*both(r"rank 1 has fewer validation rows than rank 0, from row 5 on"))
def fewer_validation_rows(rank, folder):
    scorer_of(validation=VALIDATION[: 6 - rank]).score(TRAIN)


@scenario(*both(r"rank 1 has other weights than rank 0"), way="score")
@scenario(*both(r"rank 1 has other weights than rank 0"), way="token_scores")
def other_weights(rank, folder, way):
    getattr(scorer_of(build_model(seed=rank)), way)(TRAIN)


@scenario(*both(r"rank 1 has other settings than rank 0 \(normalize\)"))
def another_config(rank, folder):
    scorer_of(normalize=["none", "length"][rank]).score(TRAIN)


@scenario(*both(r"rank 1 has other settings than rank 0 \(max_tokens_per_batch\)"))
def another_budget(rank, folder):
    scorer_of(max_tokens=[40, 50][rank]).score(TRAIN)


@scenario(*both(r"rank 1 is .*pairs while rank 0 is"))
def another_call(rank, folder):
    scorer = scorer_of()
    scorer.validation.state()
    scorer.score(TRAIN) if rank == 0 else scorer.pairwise(TRAIN)


# ---- one rank fails: it says why, the other which ----


@scenario(*both(r"row 3 is another on rank 1 .*rank 0: fine; rank 1: the data_collator fails: OSError"), way="raises")
@scenario(*both(r"row 3 is another on rank 1 .*rank 0: fine; rank 1: the data_collator gives no 'labels'"), way="row")
def a_collator_that_fails(rank, folder, way):
    broken = TRAIN[3]["input_ids"]

    def fails(rows):
        if rank == 1 and rows[0]["input_ids"] == broken:
            if way == "raises":
                raise OSError("no such picture")
            return {"input_ids": torch.tensor([broken])}
        return collate(rows)

    fails.__module__ = "somebody's"
    scorer_of(data_collator=fails).score([{**row, "other": [1]} for row in TRAIN])


@scenario(
    "rank 1 failed while reading the validation rows.* data_collator fails: OSError",
    "no validation row can be scored .*data_collator fails: OSError",
)
def a_collator_that_always_fails(rank, folder):
    scorer_of(data_collator=raises(OSError("no such picture")) if rank == 1 else collate).score(TRAIN)


@scenario(*both(r"row 0 is another on rank 1 .*rank 1: the data_collator fails: OSError"))
def a_collator_that_fails_on_all_training_rows(rank, folder):
    learnt = [row["input_ids"] for row in VALIDATION]

    def fails(rows):
        if rank == 1 and rows[0]["input_ids"] not in learnt:
            raise OSError("no such picture")
        return collate(rows)

    scorer_of(data_collator=fails).score(TRAIN)


@scenario(*both(r"validation row 2 is another on rank 1 .*rank 0: fine; rank 1: "))
def a_validation_row_that_one_rank_cannot_read(rank, folder):
    rows = list(VALIDATION)
    if rank == 1:
        rows[2] = {"input_ids": [5], "labels": [5]}
    scorer_of(validation=rows).score(TRAIN)


class Broken(torch.utils.data.Dataset):
    def __init__(self, at):
        self.at = at

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, i):
        if i == self.at:
            raise OSError("the disk is gone")
        return TRAIN[i]


@scenario(*["row 0 is another on rank 1 .*fails on this row: OSError"] * 2, at=0)
@scenario(*["row 15 is another on rank 1 .*fails on this row: OSError"] * 2, at=15)
@scenario(*["row 15 is another on rank 1 .*fails on this row: OSError"] * 2, at=15, vocab="seen")
def a_data_set_that_raises(rank, folder, at, **config):
    scorer_of(**config).score(Broken(at if rank == 1 else None))


@scenario("rank 1 failed while .*the disk is gone", "OSError: the disk is gone", vocab="full")
@scenario("rank 1 failed while .*the disk is gone", "OSError: the disk is gone", vocab="seen")
def a_stream_that_raises(rank, folder, vocab):
    broken = Broken(15 if rank == 1 else None)
    scorer_of(vocab=vocab).score(broken[i] for i in range(24))


@scenario("ArithmeticError: no", "rank 0 failed while putting the scores together.*ArithmeticError: no")
def a_method_that_cannot_finish(rank, folder):
    scorer = scorer_of(validation=CLEAN, method="label_model")
    scorer.validation.method.finish = raises(ArithmeticError("no"))
    scorer.score(NOISY)


@scenario("rank 1 failed while checking the model.*ArithmeticError: no", "ArithmeticError: no")
def a_model_that_one_rank_refuses(rank, folder):
    scorer = scorer_of()
    if rank == 1:
        scorer.backbone.check = raises(ArithmeticError("no"))
    scorer.score(TRAIN)


@scenario(
    "ValueError: .*cannot be written|ValueError|OSError|NotADirectoryError",
    "rank 0 failed while opening the file of the scores",
)
def a_file_that_cannot_be_opened(rank, folder):
    (folder / "file").touch()
    scorer_of().score(TRAIN, folder / "file" / "scores.parquet")


@scenario("OSError: full", "rank 0 failed while writing the scores.*OSError: full")
def a_part_that_cannot_be_written(rank, folder):
    with Patched(ScoreWriter, "write", raises(OSError("full"))):
        scorer_of().score(TRAIN, folder / "full.parquet")


@scenario("OSError: full", "rank 0 failed while putting the scores together.*OSError: full")
def scores_that_cannot_be_saved(rank, folder):
    with Patched(ForValueScores, "save", raises(OSError("full"))):
        scorer_of().score(TRAIN, folder / "full2.parquet")


@scenario("OSError: full", "rank 0 failed while opening the file of the pairs.*OSError: full", what="__init__")
@scenario("OSError: full", "rank 0 failed while scoring pairs.*OSError: full", what="holds")
@scenario("OSError: full", "rank 0 failed while writing the pairs.*OSError: full", what="write")
@scenario("OSError: full", "rank 0 failed while writing the pairs.*OSError: full", what="finish")
def pairs_that_cannot_be_written(rank, folder, what):
    with Patched(PairsFile, what, raises(OSError("full"))):
        scorer_of().pairwise(TRAIN, folder / f"{what}.npy")


# ---- a trainer ----


def trainer_of(folder, callbacks=(), train=None, **settings):
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=4,
        max_steps=1,
        disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )
    rows = Dataset.from_list(TRAIN) if train is None else train
    return Trainer(build_model(), args=args, train_dataset=rows, data_collator=collate, callbacks=list(callbacks))


def callback_of(policy=None, **settings):
    return ForValueCallback(VALIDATION, policy or Drop(0.25), ForValueConfig(max_tokens_per_batch=40), **settings)


class Refuses(Drop):
    """A policy that raises on one rank."""

    rank = None

    def __call__(self, *args, **kwargs):
        if world_rank() == self.rank:
            raise ArithmeticError("no")
        return super().__call__(*args, **kwargs)


def refusing(rank):
    return type("RefusesHere", (Refuses,), {"rank": rank})(0.25)


@scenario(times=1)
@scenario(times=2)
def a_callback(rank, folder, times):
    """Run a second time, it finds the scores of the first."""
    for _ in range(times):
        callback = callback_of()
        trainer_of(folder / f"callback{times}", [callback]).train()
    return [told(callback.scores), callback.weights.tolist()]


@scenario()
def a_callback_on_a_stream(rank, folder):
    """One process takes as many rows, in two steps of accumulation."""
    callback = callback_of()
    settings = {"gradient_accumulation_steps": 1 if is_one_of_two() else 2}
    settings |= {"accelerator_config": {"dispatch_batches": False}}
    stream = Dataset.from_list(TRAIN).to_iterable_dataset()
    trainer_of(folder / "stream", [callback], train=stream, **settings).train()
    return [told(callback.scores), callback.weights.tolist()]


@scenario(*both("the shards of the stream are read by a process each.*num_shards=1.*split_batches"))
def a_callback_on_a_stream_in_shards(rank, folder):
    stream = Dataset.from_list(TRAIN).to_iterable_dataset(num_shards=4)
    settings = {"accelerator_config": {"dispatch_batches": False}}
    trainer_of(folder / "shards", [callback_of()], train=stream, **settings).train()


@scenario(fails=-1)
@scenario(fails=0)
@scenario(fails=1)
def a_report(rank, folder, fails):
    """Where one rank cannot explain rows, the report is without them, and all ranks train."""
    made = []

    def report(self, path, dataset, explanations=None, **options):
        made.append(None if explanations is None else len(explanations))

    def unable(*args, **kwargs):
        if world_rank() == fails and is_one_of_two():
            raise ArithmeticError("no")
        return able(*args, **kwargs)

    able = Explainer.explained
    callback = callback_of()
    with patch.object(ForValueScores, "report", report, create=True), Patched(Explainer, "explained", unable):
        trainer = trainer_of(folder / f"report{fails}", [callback])
        trainer.train()
    n = 24 if fails < 0 or not is_one_of_two() else None
    assert made == ([n] if rank == 0 else [])
    return [callback.weights.tolist(), trainer.state.global_step]


@scenario("rank 1 failed while preparing to train.*ArithmeticError: no", "ArithmeticError: no", fails=1)
@scenario("ArithmeticError: no", "rank 0 failed while preparing to train.*ArithmeticError: no", fails=0)
def a_policy_that_raises(rank, folder, fails):
    trainer_of(folder / "policy", [callback_of(refusing(fails))]).train()


@scenario("ValueError: .*forvalue_scores.parquet is a folder", "rank 0 failed while preparing .* is a folder")
def a_file_of_scores_that_is_a_folder(rank, folder):
    (folder / "taken" / "forvalue_scores.parquet").mkdir(parents=True, exist_ok=True)
    trainer_of(folder / "taken", [callback_of()]).train()


@scenario("rank 1 failed while preparing.*ValueError: .*other rows", "ValueError: .*other rows")
def scores_of_other_rows_on_one_rank(rank, folder):
    scores = scorer_of().score(TRAIN)
    if rank == 1:
        scores.row_digests[3] = scores.row_digests[4]
    trainer_of(folder / "other", [callback_of(scores=scores)]).train()


@scenario("OSError: full", "rank 0 failed while keeping the scores.*OSError: full")
def a_checkpoint_without_room_for_scores(rank, folder):
    callback = callback_of()
    trainer = trainer_of(folder / "checkpoint", [callback], save_strategy="steps", save_steps=1)
    on_save = callback.on_save

    def full(*args, **kwargs):
        with Patched(ForValueScores, "save", raises(OSError("full"))):
            on_save(*args, **kwargs)

    callback.on_save = full
    trainer.train()


@scenario()
def a_trainer_with_fewer_rows(rank, folder):
    trainer = trainer_of(folder / "prefilter")
    scores = prefilter(trainer, VALIDATION, Drop(0.25), ForValueConfig(max_tokens_per_batch=40))
    return [told(scores), [row["input_ids"] for row in trainer.train_dataset]]


@scenario("ArithmeticError: no", "rank 0 failed while shortening.*ArithmeticError: no")
def a_policy_that_raises_in_prefilter(rank, folder):
    prefilter(trainer_of(folder / "prefilter2"), VALIDATION, refusing(0))


# ---- weights that lie on all ranks ----


def each_way(function):
    """DeepSpeed's scenarios are there where it is, in an environment of its own."""
    for how in ("fsdp2", "fsdp1", *(("zero2", "zero3") if find_spec("deepspeed") else ())):
        scenario(how=how)(function)
    return function


def sharded(how="fsdp2", model=None, units="layers", **settings):
    """A model whose layers and the rest lie on both ranks; FSDP1 and DeepSpeed give a wrapper around it."""
    model = model or build_model(dtype=torch.float64)
    model = model.float() if how == "zero3" else model  # which takes no float64
    if not is_one_of_two():
        return model
    if how.startswith("zero"):
        return partitioned(model, int(how[-1]))
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    if how == "fsdp1":
        classes = {"layers": {type(layer) for layer in layers}, "linear": {nn.Linear, nn.Embedding}, "none": set()}
        settings = {"use_orig_params": True, "device_id": torch.device("cpu"), **settings}
        return FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy(classes[units]), **settings)
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, **settings)


def partitioned(model, stage):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled here
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # the smallest weights too
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, config=config, optimizer=torch.optim.SGD(model.parameters()))[0]


def sharded_and_out_of_memory(rank, folder):
    """No rank can go on without the other here: not one of `SCENARIOS`, for both end."""
    scorer = scorer_of(sharded(), max_tokens=80)
    scorer.validation.check()
    if rank == 1:
        limited(scorer.backbone.model, 25)
    scorer.score(TRAIN)


@scenario(how="fsdp2", reshard_after_forward=True)  # as accelerate does
@scenario(how="fsdp1", use_orig_params=False)
@scenario(how="fsdp1", units="none")
@scenario(how="fsdp1", units="linear")  # the head is one of its own
@each_way
def sharded_weights(rank, folder, how, **settings):
    scorer = scorer_of(sharded(how, **settings))
    assert scorer.run.sharded == (is_one_of_two() and how != "zero2")
    return [told(scorer.score(TRAIN)), scorer.provenance()["weights"]]


@scenario()
def mixed_precision_of_fsdp1(rank, folder):
    """Its dtype is that of the forward pass without being asked for."""
    model = sharded("fsdp1", build_model(), mixed_precision=MixedPrecision(torch.bfloat16))
    return told(scorer_of(model, forward_dtype=None if is_one_of_two() else "bfloat16").score(TRAIN))


@scenario(*both("LlamaForCausalLM is what FSDP has wrapped, .*give the wrapper"), use_orig_params=True)
@scenario(*both("LlamaForCausalLM is what FSDP has wrapped, .*give the wrapper"), use_orig_params=False)
def a_model_without_its_wrapper(rank, folder, use_orig_params):
    scorer_of(sharded("fsdp1", use_orig_params=use_orig_params).module)


@scenario(*both("LlamaForCausalLM is split by tensor parallelism"), by="transformers")
@scenario(*both("LlamaForCausalLM is split by tensor parallelism"), by="torch")
def tensor_parallelism(rank, folder, by):
    if by == "torch":
        mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        model = parallelize_module(build_model(), mesh, {"lm_head": ColwiseParallel()})
    else:
        if rank == 0:
            build_model().save_pretrained(folder / "model")
        torch.distributed.barrier()
        model = LlamaForCausalLM.from_pretrained(folder / "model", tp_plan="auto")
    scorer_of(model).score(TRAIN)


@each_way
def sharded_weights_and_the_label_model(rank, folder, how):
    return told(scorer_of(sharded(how), validation=CLEAN, method="label_model").score(NOISY))


@each_way
def sharded_weights_and_auto(rank, folder, how):
    return told(scorer_of(sharded(how), validation=ANSWERED[0], method="auto").score(ANSWERED[1]))


@each_way
def sharded_weights_and_adapters(rank, folder, how):
    torch.manual_seed(0)
    model = get_peft_model(build_model(dtype=torch.float64), LoraConfig(r=2, init_lora_weights=False))
    return told(scorer_of(sharded(how, model.double())).score(TRAIN))


@each_way
def a_sharded_classifier(rank, folder, how):
    """The whole model is run up to its head."""
    rows, validation = kinds.build_rows(CLASSIFIER, 24, seed=1), kinds.build_rows(CLASSIFIER, 6, seed=2)
    model = sharded(how, kinds.build(CLASSIFIER))
    return told(scorer_of(model, validation, kinds.collator(CLASSIFIER)).score(rows))


@each_way
def explanations_by_sharded_weights(rank, folder, how):
    scorer = ForValueScorer(sharded(how), CLEAN, ForValueConfig("auto"), progress=False)
    return [explained(found) for found in scorer.explain(NOISY, [5, 3, 40])]


@each_way
def a_callback_with_sharded_weights(rank, folder, how):
    """As a trainer is with `--fsdp`, which accelerate has for accelerators alone: training goes on after scoring."""
    callback = callback_of()
    trainer = trainer_of(folder / how, [callback])

    def prepare(model, **options):
        trainer.model = sharded(how, model)
        return trainer.model

    trainer.accelerator.prepare_model = prepare
    trainer.train()
    return [callback.scores.values.tolist(), callback.weights.tolist(), trainer.state.global_step]


@each_way
def sharded_weights_and_common_beginnings(rank, folder, how):
    """Two forward passes a batch, and not equally many batches on both ranks."""
    rows = [{"input_ids": [*range(3, 23), *row["input_ids"]], "labels": [-100] * 20 + row["labels"]} for row in TRAIN]
    return told(scorer_of(sharded(how), max_tokens=70).score(rows))


@scenario()
def sharded_weights_and_rows_that_do_not_go_together(rank, folder):
    """A mask of four dimensions: of such rows the model reads one at a time, and all ranks must know before."""

    def masked(rows):
        batch = collate(rows)
        n = batch["input_ids"].shape[1]
        return {**batch, "attention_mask": torch.ones(1, 1, n, n, dtype=torch.bool).tril()}

    return told(scorer_of(sharded(), data_collator=masked).score([{**row, "other": [1]} for row in TRAIN]))


# ---- the two of them ----


def is_one_of_two():
    return torch.distributed.is_initialized()


def world_rank():
    return torch.distributed.get_rank() if is_one_of_two() else 0


def outcome(name, folder):
    """What a scenario gives here."""
    run, _ = SCENARIOS[name]
    started = time.perf_counter()
    found = {"value": None, "error": None}
    try:
        with Patched(reader, "WINDOW", WINDOW):
            found["value"] = run(world_rank(), folder)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return {**found, "seconds": time.perf_counter() - started}


def main():
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo", timeout=HANGS)
    if sys.argv[2:] == [sharded_and_out_of_memory.__name__]:
        return sharded_and_out_of_memory(world_rank(), folder)
    found = {}
    for name in sys.argv[2:] or SCENARIOS:
        found[name] = outcome(name, folder)
        (folder / f"{world_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
