"""`forvalue demo`: the whole job on rows of which the truth is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config import ForValueConfig
from ..scores.files import whole_file
from ..tiny import TINY_MODEL, instructions
from .options import ScoringOptions, SelectOptions, parse
from .select import run_select


@dataclass
class DemoOptions:
    """Generated rows."""

    out: str = field(default="forvalue-demo", metadata={"help": "Folder for the rows and for what comes of them."})
    rows: int = field(default=1000, metadata={"help": "Training rows."})
    validation_rows: int = field(default=200, metadata={"help": "Trusted rows."})
    noise: float = field(default=0.3, metadata={"help": "Share of the training rows with a wrong answer."})
    seed: int = field(default=0, metadata={"help": "Of the rows."})
    policy: str = field(default="drop:auto", metadata={"help": "Which rows go."})


def demo(argv: Sequence[str]) -> None:
    """The command."""
    (options,) = parse("demo", (DemoOptions,), argv)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    train = instructions(options.rows, options.seed, options.noise)
    sides = {"train": train, "trusted": instructions(options.validation_rows, options.seed + 10_001)}
    for name, rows in sides.items():
        chosen = rows.select_columns(["prompt", "completion"])
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        with whole_file(folder / f"{name}.jsonl") as file:
            file.write_text(text, encoding="utf-8")
    given = ScoringOptions(
        str(folder / "train.jsonl"),
        str(TINY_MODEL),
        str(folder / "kept.jsonl"),
        str(folder / "trusted.jsonl"),
    )
    report = str(folder / "report.html")
    print(
        f"forvalue select {given.data} --validation {given.validation} --model {given.model} "
        f"--policy {options.policy} --out {given.out} --report {report}",
        flush=True,
    )
    _, dropped = run_select(given, SelectOptions(policy=options.policy, report=report), ForValueConfig(method="auto"))
    noisy = train["is_noisy"]
    found = sum(noisy[row] for row in dropped)
    print(
        f"truth       {sum(noisy):,} answers are wrong: {found:,} of them are among the {len(dropped):,} dropped rows"
    )
