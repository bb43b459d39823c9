"""A card for a data set that was filtered by scores, and the way to the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import DatasetCardData, HfApi

from ..scores.noise import NoiseEstimate
from ..scores.scores import ForValueScores, grouped_reasons
from .words import NO_EVIDENCE, about_noise

CARD = "README.md"
FILES = (".jsonl", ".json", ".csv", ".parquet")
TAGS = ["forvalue", "data-filtering"]
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
LIMITS = """
- Scores look through the output head of this one model: another model ranks these rows otherwise.
- They are relative to the validation rows. What those are silent about (other topics, other languages) may score low
  and be right.
- The evidence is about errors put into validation rows on purpose. Errors of other kinds (wrong facts, changed
  numbers) may be left in the kept rows, and right rows may be among the dropped ones.
- A random share of as many rows is the baseline that a filter should beat on your task.
"""


def card_text(scores: ForValueScores, run: Mapping[str, Any], files: Mapping[str, int]) -> str:
    """The README.md of a folder of rows that were chosen by scores.

    Args:
        scores: of all rows.
        run: the resolved config of the run, JSON-able, as it was written beside the result: "data", "validation",
            "model" and "policy" are named where they are there, and "command", what to type to get it again.
        files: what lies beside the card, with the rows of each (0: not rows); the first holds the kept rows.
    """
    names = list(files)
    kept = files[names[0]]
    data = DatasetCardData(
        size_categories=next((size for most, size in SIZES.items() if kept < most), "n>10M"),
        tags=TAGS,
        configs=[_config(name) for name, rows in files.items() if rows],
    )
    title = _line(run.get("data", names[0]))
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}, filtered",
        "Rows of a fine-tuning set, chosen by For-Value scores "
        "([arXiv 2508.10180](https://arxiv.org/abs/2508.10180), `forvalue_callbacks`).",
        "## What scored what",
        _table([(key, run[key]) for key in ("data", "validation", "model", "policy") if run.get(key) is not None]),
        "## Rows",
        _table([(name, f"{rows:,} rows" if rows else "") for name, rows in files.items()]),
        _counts(scores),
        "## Evidence",
        _evidence(scores.noise),
        "## Limits\n" + LIMITS.rstrip(),
        "## How it was made",
        _made(scores, run),
    ]
    return "\n\n".join(parts) + "\n"


def _config(name: str) -> dict[str, str]:
    """How a file of rows is loaded, or a folder of `Dataset.save_to_disk`."""
    if Path(name).suffix in FILES:
        return {"config_name": Path(name).stem, "data_files": name}
    return {"config_name": name, "data_files": f"{name}/*.arrow"}


def is_card(path: str | Path) -> bool:
    """Whether a file is what `card_text` has written once."""
    tags = "".join(f"- {tag}\n" for tag in TAGS)
    return Path(path).is_file() and f"\ntags:\n{tags}" in Path(path).read_text(encoding="utf-8", errors="replace")


def push(folder: str | Path, repo_id: str, *, private: bool = True, names: Sequence[str] | None = None) -> str:
    """Uploads a folder as a data set of the hub, made where there is none; its address.

    Args:
        names: of the files and folders in it that go, the card with them; None: all of them.

    Token and endpoint are those of the environment (`hf auth login`, `HF_TOKEN`, `HF_ENDPOINT`).

    Raises:
        ValueError: there is no card in the folder, or the hub refuses.
    """
    if not (Path(folder) / CARD).is_file():
        raise ValueError(f"{folder} has no {CARD}: write `card_text` there before it is pushed.")
    api = HfApi(library_name="forvalue_callbacks")
    try:
        repo = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            repo_type="dataset",
            commit_message="Rows filtered by For-Value",
            allow_patterns=None if names is None else _patterns(folder, [CARD, *names]),
        )
    except Exception as error:  # no token, no network, no right to write: each has an exception of its own
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{folder} cannot be pushed to {repo_id} ({type(error).__name__}: {first}): log in with `hf auth login` "
            "as somebody who may write there."
        ) from error
    return str(repo)


def _patterns(folder: str | Path, names: Sequence[str]) -> list[str]:
    return [glob.escape(name) + ("/*" if Path(folder, name).is_dir() else "") for name in names]


def _counts(scores: ForValueScores) -> str:
    scored = int(np.isfinite(scores.values).sum())
    lines = [f"{len(scores):,} rows were looked at, {scored:,} have a score."]
    lines += [f"- {count:,} not scored: {_line(reason)}" for count, reason in grouped_reasons(scores.reasons)]
    if n := scores.metadata.get("leakage", {}).get("n"):
        lines.append(f"- {n:,} are validation rows too, so that scores and evidence are better than they should be")
    return "\n".join(lines)


def _evidence(noise: NoiseEstimate | None) -> str:
    if noise is None:
        return NO_EVIDENCE
    rows = [("kind of error put in", "AUC (95 % interval)")]
    for kind, found in noise.evidence.items():
        interval = "" if found.interval is None else " ({:.2f} to {:.2f})".format(*found.interval)
        rows.append((kind, f"{found.auc:.2f}{interval}"))
    return _table(rows[1:], rows[0]) + "\n\n" + _fenced("\n".join(about_noise(noise)))


def _made(scores: ForValueScores, run: Mapping[str, Any]) -> str:
    settings = {**run, "version": scores.metadata.get("version"), "provenance": scores.metadata.get("provenance", {})}
    command = [_fenced(str(run["command"]), "bash")] if run.get("command") else []
    return "\n\n".join([*command, _fenced(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "yaml")])


def _fenced(text: str, language: str = "") -> str:
    """A block of code that no back-ticks in it end."""
    fence = "`" * max([3, *(1 + len(ticks) for ticks in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _table(rows: list[tuple[str, Any]], head: tuple[str, str] = ("", "")) -> str:
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {_line(a)} | {_line(b)} |" for a, b in rows)])


def _line(value: Any) -> str:
    """As one line of Markdown, which names of files and reasons may not leave."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
