"""TensorBoard and W&B, where a trainer reports to them."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any


def report(args: Any, step: int, found: dict[str, float]) -> None:
    """Writes numbers to TensorBoard and to the run of W&B, where the trainer reports to them; for the first rank.

    A callback cannot call `Trainer.log`, and what it puts into the dictionaries of others is found there by others.
    """
    found = {f"train/{name}": value for name, value in found.items()}
    if "tensorboard" in args.report_to:
        _to_tensorboard(args, step, found)
    wandb = sys.modules.get("wandb")  # WandbCallback has imported it
    if "wandb" in args.report_to and wandb is not None and wandb.run is not None:
        wandb.run.log({**found, "train/global_step": step})


def _to_tensorboard(args: Any, step: int, found: dict[str, float]) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter  # type: ignore[no-redef]

    # The folder of transformers' TensorBoardCallback, which has opened its file before the caller's callbacks are
    # asked; `logging_dir` is that of transformers 4.
    folder = getattr(args, "logging_dir", None) or os.getenv("TENSORBOARD_LOGGING_DIR")
    folder = os.path.expanduser(folder or os.path.join(args.output_dir, "runs"))
    files = list(Path(folder).rglob("events.out.tfevents.*"))
    if files:
        folder = str(max(files, key=lambda file: file.stat().st_mtime).parent)
    # TensorBoard reads the files of a folder by name and may never come back to one: ours comes before the trainer's.
    with tempfile.TemporaryDirectory() as made:
        with SummaryWriter(log_dir=made) as writer:
            for name, value in found.items():
                writer.add_scalar(name, value, step)
        os.makedirs(folder, exist_ok=True)
        for file in Path(made).iterdir():
            shutil.move(file, os.path.join(folder, file.name.replace("tfevents.", "tfevents.0", 1)))
