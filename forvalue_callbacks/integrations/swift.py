"""ms-swift: `--external_plugins .../forvalue_callbacks/integrations/swift.py --callbacks forvalue`.

The clean rows are its `--val_dataset`. `FORVALUE_METHOD=auto FORVALUE_POLICY=drop:auto` in the environment say how rows
are scored and which are left out; both have the defaults of `ForValueCallback`. Its data sets encode rows when they are
asked for, and its batch sampler makes whole batches, so rows leave below both, before they are packed too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map
from swift.dataset import LazyLLMDataset, PackingDataset

from forvalue_callbacks.config import ForValueConfig
from forvalue_callbacks.trainer.evaluation import EVAL
from forvalue_callbacks.trainer.prefilter import prefilter

# ms-swift puts the folder of a plugin first on the path, where this file would hide the package of its name.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]


class ForValue(TrainerCallback):
    """Scores the training rows by the validation rows once the trainer is made, and leaves the dropped ones out."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, packs = self.trainer, None
        if isinstance(trainer.train_dataset, PackingDataset):
            packs, trainer.train_dataset = trainer.train_dataset, trainer.train_dataset.dataset
        rows = trainer.train_dataset
        method = os.environ.get("FORVALUE_METHOD", ForValueConfig().method)
        prefilter(trainer, EVAL, os.environ.get("FORVALUE_POLICY"), ForValueConfig(method=method))
        if isinstance(rows, LazyLLMDataset):  # its Subset would take any row in the place of one that it cannot encode
            trainer.train_dataset = fewer(rows, trainer.train_dataset.indices)
        if packs is not None:
            trainer.train_dataset = packed(packs, trainer.train_dataset)


def fewer(rows: LazyLLMDataset, places: list[int]) -> LazyLLMDataset:
    """A lazy data set of some of its rows."""
    same = {name: getattr(rows, name) for name in ("n_try_fetch", "strict", "random_state", "traceback_limit")}
    return LazyLLMDataset(rows.dataset.select(places), rows.encode_func, **same)


def packed(packs: PackingDataset, rows: LazyLLMDataset) -> PackingDataset:
    """Rows packed as others were."""
    names = "num_proc strict load_from_cache_file packing_length packing_num_proc packing_strategy"
    same = {name: getattr(packs, name) for name in [*names.split(), "multiprocessing_context"]}
    return PackingDataset(packs.template, rows, **same)


callbacks_map["forvalue"] = ForValue
