"""What came of the scores, for people and for the tools that a trainer reports to."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .policies import Policy, describe
from .scores import ForValueScores


def numbers(scores: ForValueScores, weights: np.ndarray, seconds: float) -> dict[str, float]:
    """What there is to log, JSON-able: what the weights do, and the shares and evidence where scores have them."""
    found = {
        **describe(weights),
        "unscored": int(np.isnan(scores.values).sum()),
        "seconds": round(seconds, 3),
    }
    noise = scores.metadata.get("noise", {})
    if "share" in noise:
        found["noise_share"] = noise["share"]
    found |= {f"share_{kind}": share for kind, share in noise.get("shares", {}).items()}
    found |= {f"auc_{kind}": facts["auc"] for kind, facts in noise.get("held_out", {}).items()}
    return {f"forvalue_{name.replace(' ', '_')}": value for name, value in found.items()}


def lines(scores: ForValueScores, weights: np.ndarray, policy: Policy, seconds: float | None, drawn: bool) -> str:
    """What came of the scores: the evidence, the shares, what is kept and dropped.

    Args:
        seconds: how long the scoring took; None: it was done before.
        drawn: kept rows take the places of dropped ones, so it says how often each is drawn.
    """
    facts = describe(weights)
    how = "with the scores made before" if seconds is None else f"scored in {seconds:.1f} s"
    out = [f"For-Value: {len(scores):,} rows {how}", scores.summary()]
    out.append(f"policy      {policy} keeps {facts['kept']:,} rows and drops {facts['dropped']:,}")
    if drawn:
        mean, most = facts["draws_per_kept_row_mean"], facts["draws_per_kept_row_max"]
        out.append(
            f"draws       a kept row is drawn {mean:.2f} times an epoch"
            + (f" (at most {most:.2f})" if most > mean + 0.005 else "")
            + f"; effective sample size {facts['effective_sample_size']:,.0f}"
        )
    return "\n".join(out)


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
