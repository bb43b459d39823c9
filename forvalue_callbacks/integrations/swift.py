"""ms-swift: `--external_plugins .../forvalue_callbacks/integrations/swift.py --callbacks forvalue`.

The clean rows are its `--val_dataset`. `FORVALUE_METHOD=auto FORVALUE_POLICY=drop:auto` in the environment say how
rows are scored and which are left out; both have the defaults of `ForValueCallback`. Its data sets encode rows when
they are asked for, and its batch sampler makes whole batches: rows leave below both, and before they are packed.
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
        trainer, template = self.trainer, self.trainer.template
        packs, clean = trainer.train_dataset, trainer.eval_dataset
        trainer.train_dataset, trainer.eval_dataset = rows = unpacked(packs), unpacked(clean)
        free = template.packing, template.padding_free
        template.packing = template.padding_free = False  # its collator is to make a row of each
        method = os.environ.get("FORVALUE_METHOD", ForValueConfig().method)
        prefilter(trainer, EVAL, os.environ.get("FORVALUE_POLICY"), ForValueConfig(method=method))
        template.packing, template.padding_free = free
        trainer.eval_dataset = clean
        if isinstance(rows[0], LazyLLMDataset):
            trainer.train_dataset = fewer(rows[0], trainer.train_dataset.indices)
        if isinstance(packs, PackingDataset):
            trainer.train_dataset = packed_as(packs, trainer.train_dataset)


def unpacked(rows: Any) -> Any:
    """What a data set of packs packs; any other as it is."""
    return rows.dataset if isinstance(rows, PackingDataset) else rows


def fewer(rows: LazyLLMDataset, places: list[int]) -> LazyLLMDataset:
    """Some of its rows: what it takes in the place of one that it cannot encode is one of them."""
    same = {name: getattr(rows, name) for name in ("n_try_fetch", "strict", "random_state", "traceback_limit")}
    return LazyLLMDataset(rows.dataset.select(places), rows.encode_func, **same)


def packed_as(packs: PackingDataset, rows: LazyLLMDataset) -> PackingDataset:
    """Rows packed as others were."""
    names = "num_proc strict load_from_cache_file packing_length packing_num_proc packing_strategy"
    same = {name: getattr(packs, name) for name in [*names.split(), "multiprocessing_context"]}
    return PackingDataset(packs.template, rows, **same)


callbacks_map["forvalue"] = ForValue
