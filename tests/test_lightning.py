"""Lightning's callback, where Lightning is installed (`tests/frameworks.py lightning` trains a real model)."""

import importlib.util

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from forvalue_callbacks import Drop, ForValueScorer
from helpers.models import build_model, build_rows

if importlib.util.find_spec("lightning") is None:
    pytest.skip("Lightning is not installed", allow_module_level=True)

import lightning.pytorch as pl

from forvalue_callbacks.integrations.lightning import ForValue

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, of loaders, loggers and its dependencies
VALIDATION = build_rows(6, seed=2)
ROWS = [{**row, "input_ids": [3 + i, *row["input_ids"][1:]]} for i, row in enumerate(build_rows(24, seed=1))]
KEPT = set(Drop(0.25)(ForValueScorer(build_model(), VALIDATION, progress=False).score(ROWS).values).nonzero()[0])


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    fillers = {"input_ids": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
        for name, filler in fillers.items()
    }


class Module(pl.LightningModule):
    def __init__(self, **options):
        super().__init__()
        self.model = build_model()
        self.options = {"batch_size": 4, "shuffle": True, **options}
        self.seen = []

    def training_step(self, batch, _):
        self.seen += (batch["input_ids"][:, 0] - 3).tolist()
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)

    def train_dataloader(self):
        return DataLoader(ROWS, collate_fn=collate, **self.options)


def fit(module, callback, tmp_path, checkpoint=None, **options):
    options = {"accelerator": "cpu", "logger": False, "max_epochs": 2, "enable_progress_bar": False, **options}
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[callback], **options)
    trainer.fit(module.train(), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("reload", [0, 1])
def test_dropped_rows_are_never_drawn_in_any_epoch(tmp_path, workers, reload):
    module = Module(num_workers=workers)
    fit(module, ForValue(VALIDATION, "drop:0.25", verbose=False), tmp_path, reload_dataloaders_every_n_epochs=reload)
    assert len(module.seen) == 2 * len(ROWS)
    for epoch in (module.seen[:24], module.seen[24:]):
        assert set(epoch) == KEPT
    assert module.seen[:24] != module.seen[24:]


def test_a_run_that_goes_on_keeps_the_weights_of_its_first_step(tmp_path):
    first = ForValue(VALIDATION, "drop:0.25", verbose=False)
    trainer = fit(Module(), first, tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    module, again = Module(), ForValue([], "drop:0.25", verbose=False)  # no rows to score by
    fit(module, again, tmp_path, tmp_path / "kept.ckpt")
    assert again.weights.tolist() == first.weights.tolist()
    assert set(module.seen) == KEPT


@pytest.mark.parametrize(
    ("options", "model", "match"),
    [
        ({}, "net", "Module has no 'net': name the attribute"),
        ({"sampler": DistributedSampler(ROWS, 2, 0), "shuffle": False}, "model", "DistributedSampler draws 12 rows"),
    ],
)
def test_what_cannot_be_weighted_is_refused(tmp_path, options, model, match):
    with pytest.raises(ValueError, match=match):
        fit(Module(**options), ForValue(VALIDATION, model=model, verbose=False), tmp_path)


def test_several_loaders_are_refused(tmp_path):
    class Two(Module):
        def train_dataloader(self):
            return [super().train_dataloader()] * 2

    with pytest.raises(ValueError, match="come from a list: give one data loader"):
        fit(Two(), ForValue(VALIDATION, verbose=False), tmp_path)
