"""Settings that the recipes comparing For-Value with influence functions share, and the tables that they write."""

from __future__ import annotations

import csv
import ctypes
import gc
import platform
import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers

# One score per row, by the whole validation set: what the callback computes.
ONE_SCORE = ", score()"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class ComparisonConfig:
    """The LoRA runs that the baselines need, and how all is measured; rates are those published with DataInf."""

    seeds: int = field(default=1, metadata={"help": "Seeds 0, 1, ...: of the rows, of LoRA and of the training."})
    epochs: int = field(default=10, metadata={"help": "Epochs of LoRA training."})
    checkpoints: list[int] = field(
        default_factory=lambda: [0, 1, 3, 10],
        metadata={"help": "Epochs after which the LoRA methods are read; 0: before training. The last one always is."},
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of LoRA, falling linearly to 0."})
    batch_size: int = field(default=64, metadata={"help": "Rows per training step."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA."})
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Modules that LoRA adapts."}
    )
    costly: bool = field(
        default=False,
        metadata={
            "help": "Also methods that cost minutes for each validation row (mirrored influence, forward-only "
            "inference, In-Run Shapley), on the first validation row of each label."
        },
    )
    clock: str = field(
        default="wall", metadata={"help": "Time is 'wall' time, or 'cpu' time (of all threads) on a busy machine."}
    )
    output_dir: str = field(default="outputs", metadata={"help": "Where the results go."})

    def __post_init__(self) -> None:
        known("clock", [self.clock], CLOCKS)
        self.checkpoints = sorted({c for c in self.checkpoints if c < self.epochs} | {self.epochs})


class Measured(NamedTuple):
    value: Any
    seconds: float
    peak_mib: float | None  # memory of the accelerator, or of the process on a CPU, the model included


class Meter:
    """Seconds of a call, by the clock of the config, and its peak memory."""

    def __init__(self, clock: str):
        self.now = CLOCKS[clock]

    def __call__(self, function: Callable[[], Any]) -> Measured:
        on_device = torch.accelerator.is_available()
        status = Path("/proc/self/status")
        if on_device:
            torch.accelerator.reset_peak_memory_stats()
            torch.accelerator.synchronize()
        elif status.exists():  # Linux: what was freed goes back to the system, and the peak starts again from here
            gc.collect()
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
            Path("/proc/self/clear_refs").write_text("5")
        started = self.now()
        out = function()
        if on_device:
            torch.accelerator.synchronize()
        seconds = self.now() - started
        peak = None
        if on_device:
            peak = torch.accelerator.max_memory_allocated() / 2**20
        elif status.exists() and (found := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
            peak = int(found[1]) / 1024
        return Measured(out, seconds, peak)


def known(name: str, values: Sequence[str], choices: Any) -> None:
    """Raises ValueError for a value that is none of the choices."""
    for value in values:
        if value not in choices:
            raise ValueError(f"{name}: {value!r} is none of {list(choices)}.")


class Result(NamedTuple):
    """One line of the CSV: seconds in phases, each for all the rows of both sides."""

    task: str
    seed: int
    method: str
    checkpoint: int | None  # epochs trained; None: no LoRA
    auc: float
    auc_std: float
    recall: float
    recall_std: float
    noise_auc: float | None  # clean against mislabelled rows, by mean scores over validation rows of the label shown
    noise_auc_within: float | None  # the same among rows of one observed label, mean over the labels
    training_s: float
    gradients_s: float
    scoring_s: float
    evaluation_passes: float
    peak_mib: float | None = None  # of training, gradients and scoring the largest
    training_loss: float | None = None


def summary(results: list[Result]) -> list[dict[str, Any]]:
    """One line per task and method (LoRA ones twice: best and last checkpoint), means over the seeds."""
    lines: list[dict[str, Any]] = []
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task, result.method), []).append(result)
    for (task, method), group in groups.items():
        by_checkpoint: dict[int | None, list[Result]] = {}
        for result in group:
            by_checkpoint.setdefault(result.checkpoint, []).append(result)
        means = {c: float(np.mean([r.auc for r in rs])) for c, rs in by_checkpoint.items()}
        chosen = {"": None} if None in means else {" (last)": max(means)}
        if len(means) > 1:
            best = max(means, key=means.__getitem__)
            chosen = {f" (best, {best} epochs)": best, " (last)": max(means)}
        for suffix, checkpoint in chosen.items():
            rows = by_checkpoint[checkpoint]
            line: dict[str, Any] = {"task": task, "method": method + suffix, "low": min(means.values())}
            line["high"] = max(means.values())
            line["span"] = f"{line['low']:.3f} - {line['high']:.3f}" if len(means) > 1 else ""
            for name in ("auc", "auc_std", "recall", "recall_std", "noise_auc", "noise_auc_within"):
                values = [getattr(r, name) for r in rows]
                line[name] = None if None in values else float(np.mean(values))
            line["auc_seeds"] = float(np.std([r.auc for r in rows]))
            for name in ("training_s", "gradients_s", "scoring_s", "evaluation_passes"):
                line[name] = float(np.median([getattr(r, name) for r in rows]))
            peaks = [r.peak_mib for r in rows if r.peak_mib is not None]
            line["peak"] = f"{max(peaks):.0f}" if peaks else ""
            lines.append(line)
    return lines


def ratios(lines: list[dict[str, Any]]) -> list[str]:
    """How many times dearer DataInf at its last checkpoint, training included, is than each way to run For-Value: a
    table with a column per task."""
    seconds = {
        (line["task"], line["method"]): line["training_s"] + line["gradients_s"] + line["scoring_s"] for line in lines
    }
    tasks = [task for task, method in seconds if method == "DataInf (last)"]
    methods = dict.fromkeys(method for _, method in seconds if method.startswith("For-Value"))
    out = [f"| DataInf (last) / this | {' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
    for method in methods:
        own = [(seconds[task, "DataInf (last)"], seconds.get((task, method))) for task in tasks]
        cells = ["" if value is None else f"{whole / value:.1f} ({value:.1f} s)" for whole, value in own]
        out.append(f"| {method} | {' | '.join(cells)} |")
    return out


def markdown(config: ComparisonConfig, head: str, results: list[Result], notes: list[str], seconds: float) -> str:
    """The report: `head` says what the rows and the model are."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = summary(results)
    noisy = any(line["noise_auc"] is not None for line in lines)
    out = [
        head,
        "",
        f"Seeds 0 to {config.seeds - 1}. LoRA r={config.lora_r}, alpha={config.lora_alpha} on "
        f"{', '.join(config.lora_targets)}, learning rate {config.learning_rate:g}, {config.epochs} epochs, batches "
        f"of {config.batch_size}. Whole run: {seconds:.0f} s, peak memory {peak:.0f} MiB. torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads; all times are {config.clock} time.",
        "",
        "AUC, recall: mean ± standard deviation over validation rows; `seeds`: deviation of the mean AUC over seeds; "
        "`checkpoints`: range of the AUC over them, the untrained one included; seconds: medians over seeds, for all "
        "pairs; `passes`: their sum in evaluation passes over all rows; `peak MiB`: of the whole process. Methods "
        "with one score per row (`score()`, loss, IFD, ...) have 0.5 by construction where classes are equally large: "
        "listed for their cost.",
    ]
    if noisy:
        out[-1] += (
            " `noise`: AUC of clean against mislabelled rows by the mean score over validation rows of the label that "
            "the row shows; `within`: the same among rows that show one label."
        )
    columns = [
        "method", "AUC", "seeds", "recall", *(["noise", "within"] if noisy else []),
        "checkpoints", "training s", "gradients s", "scoring s", "passes", "peak MiB",
    ]  # fmt: skip
    for task in dict.fromkeys(line["task"] for line in lines):
        out += ["", f"## {task}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for line in lines:
            if line["task"] == task:
                noise = [
                    "" if line[name] is None else f"{line[name]:.3f}" for name in ("noise_auc", "noise_auc_within")
                ]
                cells = [
                    line["method"],
                    "{auc:.3f} ± {auc_std:.3f}".format(**line),
                    f"{line['auc_seeds']:.3f}",
                    "{recall:.3f} ± {recall_std:.3f}".format(**line),
                    *(noise if noisy else []),
                    line["span"],
                    *(f"{line[name]:.2f}" for name in ("training_s", "gradients_s", "scoring_s")),
                    f"{line['evaluation_passes']:.1f}",
                    line["peak"],
                ]
                out.append(f"| {' | '.join(cells)} |")
    out += ["", "## Cost: times that DataInf, its training included, takes as long (seconds of this)", ""]
    out += [*ratios(lines), "", "## Notes", ""]
    out += [f"Residuals: after {', '.join(map(str, config.checkpoints))} epochs.", "", *(f"- {n}" for n in notes), ""]
    return "\n".join(out)


def picture(results: list[Result], path: Path) -> None:
    """AUC of every method, a panel per task; a line spans the checkpoints of a LoRA method."""
    from matplotlib.figure import Figure  # here, so that machines without it can measure costs

    lines = [line for line in summary(results) if "(best" not in line["method"] and ONE_SCORE not in line["method"]]
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(5 * len(tasks), 5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        shown = [line for line in lines if line["task"] == task][::-1]
        for y, line in enumerate(shown):
            color = "tab:orange" if line["method"].startswith("For-Value") else "tab:blue"
            axes.plot([line["low"], line["high"]], [y, y], color=color, alpha=0.4)
            axes.plot(line["auc"], y, "o", color=color)
        axes.set_yticks(range(len(shown)), [line["method"] for line in shown], fontsize=8)
        axes.set_title(task)
        axes.set_xlabel("AUC (dot: last checkpoint, line: range)")
        axes.axvline(0.5, color="grey", linewidth=0.5)
    figure.savefig(path, dpi=70)


def write(
    config: ComparisonConfig, head: str, results: list[Result], notes: list[str], seconds: float, name: str
) -> str:
    """`name`.csv (one line per method, checkpoint and seed), .md and .png in the output folder; returns the report."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Result._fields)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in result] for result in results)
    text = markdown(config, head, results, notes, seconds)
    (folder / f"{name}.md").write_text(text)
    picture(results, folder / f"{name}.png")
    return text
