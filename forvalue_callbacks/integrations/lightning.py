"""Lightning: `Trainer(callbacks=[ForValue(validation, "drop:auto", ForValueConfig(method="auto"))])`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..config import ForValueConfig
from ..data.sft import RowConfig
from ..policies import Policy
from ..trainer.sampler import find_sampler, install_sampler
from ..trainer.value import value


class ForValue(Callback):
    """Scores the rows of the training data loader before the first epoch, and draws them by weight from then on.

    As many steps as without it: the places of dropped rows go to kept ones. A loader that Lightning makes anew
    (`reload_dataloaders_every_n_epochs`) must load the same rows in the same order. The weights lie in checkpoints.

    Args:
        validation_dataset, policy, config, processing_class, row_config, path, verbose: as for `value`.
        model: name of the attribute of the LightningModule that is the Hugging Face model.
        seed: of the draws; the same on every rank.

    Raises:
        ValueError: (at the start of the first epoch) no such model, several loaders, one that cannot draw by weight
            (Lightning's own `DistributedSampler`: one process only), what `value` refuses.
    """

    def __init__(
        self,
        validation_dataset: Iterable[Mapping[str, Any]] | None,
        policy: Policy | str | None = None,
        config: ForValueConfig | None = None,
        *,
        model: str = "model",
        processing_class: Any = None,
        row_config: RowConfig | None = None,
        path: str | Path | None = None,
        verbose: bool = True,
        seed: int = 0,
    ):
        self.arguments: dict[str, Any] = {"validation_dataset": validation_dataset, "policy": policy, "config": config}
        self.arguments |= {"processing_class": processing_class, "row_config": row_config}
        self.arguments |= {"path": path, "verbose": verbose}
        self.model = model
        self.seed = seed
        self.weights: np.ndarray | None = None
        self._loader: Any = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader: Any = trainer.train_dataloader
        if loader is self._loader:
            return
        if not hasattr(loader, "dataset"):
            raise ValueError(f"the training rows come from a {type(loader).__name__}: give one data loader.")
        find_sampler(loader, len(loader.dataset))
        if self.weights is None:
            model = getattr(pl_module, self.model, None)
            if model is None:
                name = type(pl_module).__name__
                raise ValueError(f"{name} has no {self.model!r}: name the attribute that is the model (model=...).")
            self.weights = value(model, loader.dataset, data_collator=loader.collate_fn, **self.arguments)
        install_sampler(loader, self.weights, self.seed).set_epoch(trainer.current_epoch)
        # Workers have begun to read by the sampler that was there; Lightning has no public way to begin anew.
        fetcher: Any = trainer.fit_loop._data_fetcher
        iter(fetcher)
        self._loader = loader

    def state_dict(self) -> dict[str, Any]:
        return {} if self.weights is None else {"weights": torch.from_numpy(self.weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "weights" in state_dict:
            self.weights = state_dict["weights"].numpy()
