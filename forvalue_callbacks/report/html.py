"""The report: one HTML file that needs nothing beside it.

Rows are counted, not listed: a histogram per group is what the slider recounts from, and only the tails and a random
sample are shown with their text, so that a page of a million rows is as small and as fast as one of a thousand.
Whatever comes from rows is escaped by jinja2, and a page may run no script but its own (its hash is in the policy).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..data.reading import examples_of
from ..data.sft import IMAGES
from ..data.shown import shown
from ..scores.explanations import Explanation
from ..scores.files import whole_file
from ..scores.provenance import PARTS
from ..scores.scores import ForValueScores, grouped_reasons
from .counts import by_group, cuts_of, lengths
from .plots import score_by_length
from .rows import LISTS, LONGEST_BESIDE, Texts, shown_rows, visible
from .words import NO_EVIDENCE, about_noise

TEMPLATES = Path(__file__).parent / "template"
# Columns that say where a row is from or what it is about; those that are there are counted by, unless told otherwise.
GROUP_COLUMNS = ("source", "dataset", "task", "category", "domain", "language", "label")
# More different answers than these are no classes.
MOST_ANSWERS = 1000
MOST_NAMED = 20  # rows or findings that are listed by number
ANSWER, LENGTH, KIND = "answer", "labelled tokens", "kind of noise"

Finding = tuple[str, Sequence[int]]


def write_report(
    path: str | os.PathLike[str],
    scores: ForValueScores,
    dataset: Any = None,
    validation: Any = None,
    explanations: Sequence[Explanation] | None = None,
    weights: np.ndarray | None = None,
    columns: Sequence[str] | None = None,
    processing_class: Any = None,
    findings: Sequence[Finding] = (),
    warnings: Sequence[str] = (),
    run: Mapping[str, Any] | None = None,
) -> None:
    """Writes the report: see `ForValueScores.report`."""
    if dataset is not None and hasattr(dataset, "__len__") and len(dataset) != len(scores):
        raise ValueError(
            f"the scores are of {len(scores):,} rows, and the data set has {len(dataset):,}: give the rows that were "
            "scored, in their order."
        )
    if weights is not None and len(weights) != len(scores):
        raise ValueError(f"{len(weights):,} weights for {len(scores):,} rows: give those that a policy made of them.")
    if not np.isfinite(scores.values).any():
        raise ValueError("no row has a score, so that there is nothing to report: summary() says why.")
    groups = _groups(scores, dataset, columns, processing_class)
    explanations = explanations or ()
    rows = shown_rows(scores, dataset, validation, explanations, next(iter(groups.values()), None), processing_class)
    html = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            **_facts(scores, weights, run or {}),
            **_data(scores, weights, groups),
            rows=rows,
            lists={name: title for name, title in LISTS.items() if any(row.place == name for row in rows)},
            group=next(iter(groups), None),
            suspects=_suspects(scores, validation, processing_class),
            warnings=[visible(warning) for warning in warnings],
            findings=[
                (visible(text), list(at)[:MOST_NAMED], len(at))
                for text, at in [*findings, *_leakage(scores, findings)]
            ],
            figure=score_by_length(scores),
            has_text=dataset is not None,
        )
    )
    with whole_file(path) as file:
        file.write_text(html, encoding="utf-8", newline="\n")


def _environment() -> Environment:
    out = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    out.globals |= {"script": Markup(script), "script_hash": digest}
    out.filters |= {"share": _percent, "visible": visible}
    return out


def _percent(share: float) -> str:
    """One digit behind the point where it says something."""
    return f"{100 * share:.{int(0 < share < 0.0995)}f} %"


# ---- what is said of all rows ----


def _facts(scores: ForValueScores, weights: np.ndarray | None, run: Mapping[str, Any]) -> dict[str, Any]:
    """What was scored with what, and the evidence."""
    config, noise, scored = scores.metadata.get("config", {}), scores.noise, np.isfinite(scores.values)
    made: dict[str, Any] = {name: run.get(name) for name in ("data", "validation", "model", "policy")}
    made |= {"method": config.get("method"), "rows": f"{len(scores):,}"}
    if noise is not None:
        made["validation rows"] = f"{noise.n_validation:,}"
    made["version"] = scores.metadata.get("version") or version("forvalue-callbacks")
    made |= {name: value for name, value in run.items() if name not in made and name != "command"}
    for part, digest in scores.metadata.get("provenance", {}).items():
        made[f"hash of {PARTS.get(part, part)}"] = digest
    settings = {"config": config, "row_config": scores.metadata.get("row_config", {})}
    return {
        "n": len(scores),
        "scored": int(scored.sum()),
        "dropped": None if weights is None else int((np.asarray(weights)[scored] == 0).sum()),
        "noise": noise,
        "words": _words(about_noise(noise)) if noise is not None else [("evidence", NO_EVIDENCE)],
        "reasons": [(count, visible(text)) for count, text in grouped_reasons(scores.reasons)],
        "made": {visible(str(name)): visible(str(value)) for name, value in made.items() if value is not None},
        "command": None if run.get("command") is None else visible(str(run["command"])),
        "settings": visible(json.dumps(settings, indent=1, default=str), 5000) if config else None,
    }


def _words(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Lines as `words` makes them: a label, or none where they go on, and what is said."""
    return [(line[:12].strip(), " ".join(line[12:].split())) for line in lines]


def _leakage(scores: ForValueScores, findings: Sequence[Finding]) -> list[Finding]:
    """What scoring has found, unless somebody has looked closer."""
    found = scores.metadata.get("leakage", {})
    if findings or not found.get("n"):
        return []
    text = f"{found['n']:,} training rows are validation rows too: scores and evidence are better than they should be"
    return [(text, found.get("rows", []))]


def _suspects(scores: ForValueScores, validation: Any, processing_class: Any) -> list[dict[str, Any]]:
    """Validation rows that look wrong themselves, the worst first."""
    known = None if scores.noise is None else scores.noise.validation
    if known is None:
        return []
    pairs = list(zip(known.rows, known.log_odds, strict=True))[:MOST_NAMED]
    texts = Texts(validation, [row for row, _ in pairs], processing_class, LONGEST_BESIDE)
    return [{"row": row, "log_odds": odds, "text": texts[row]} for row, odds in pairs]


# ---- what the slider counts ----


def _data(scores: ForValueScores, weights: np.ndarray | None, groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    cuts = cuts_of(scores.values, weights, scores.noise is not None)
    scored = np.isfinite(scores.values)
    values = scores.values[scored]
    tables = [
        by_group(name, [group for group, ok in zip(of, scored, strict=True) if ok], values, cuts)
        for name, of in groups.items()
    ]
    if (spans := lengths(scores.n_labelled[scored])) is not None:
        tables.append(by_group(LENGTH, spans[0], values, cuts, spans[1]))
    tables = [table for table in tables if len(table["levels"]) > 1]
    for table in tables:
        for level in table["levels"]:
            level["name"] = visible(level["name"], 80)
    data = {
        "edges": cuts.edges.tolist(),
        "counts": cuts.counted(scores.values),
        "start": cuts.start,
        "unit": "log odds that a row is clean" if scores.noise is not None else "score",
        "tables": tables,
    }
    return {"data": data, "tables": [table["name"] for table in tables], "exact": cuts.exact or weights is None}


def _groups(
    scores: ForValueScores, dataset: Any, columns: Sequence[str] | None, processing_class: Any
) -> dict[str, Sequence[str]]:
    """By name, the group of each row: its answer where those repeat, columns, what it looks like."""
    noise, said = scores.noise, scores.judgements
    out: dict[str, Sequence[str]] = {}
    if dataset is not None:
        out |= _groups_of_rows(
            dataset, columns, noise is not None and 1 < (noise.n_answers or 0) <= MOST_ANSWERS, processing_class
        )
    if said is not None and any(kind is not None for kind in said.kind):
        judged = said.judged.tolist()
        out[KIND] = [kind or ("none" if ok else "not judged") for kind, ok in zip(said.kind, judged, strict=True)]
    return out


def _groups_of_rows(
    dataset: Any, columns: Sequence[str] | None, by_answer: bool, processing_class: Any
) -> dict[str, Sequence[str]]:
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":  # nobody opens images to count
        dataset = dataset.remove_columns([name for name in dataset.column_names if name in IMAGES])
    first = next(iter(examples_of(dataset)))
    there = set(first) if isinstance(first, Mapping) else set()
    if missing := [name for name in columns or () if name not in there]:
        raise ValueError(f"the rows have no column {missing[0]!r}: choose of {', '.join(map(repr, sorted(there)))}.")
    names = [name for name in GROUP_COLUMNS if name in there] if columns is None else list(columns)
    if not names and not by_answer:
        return {}
    out: dict[str, list[str]] = {name: [] for name in names}
    answers: list[str] = []
    for row in examples_of(dataset):
        for name in names:
            out[name].append(str(row.get(name)))
        if by_answer:
            answers.append(shown(row, processing_class).answer.strip())
    return {**({ANSWER: answers} if by_answer else {}), **out}


# ---- in a notebook ----


def in_notebook(scores: ForValueScores) -> str:
    """What a cell shows that ends with scores: what is known of them, and their histogram; no script."""
    counts = cuts_of(scores.values, None, scores.noise is not None) if np.isfinite(scores.values).any() else None
    bars = [] if counts is None else counts.counted(scores.values)[1:-1]
    words = _words(scores.summary().splitlines())
    return _environment().get_template("notebook.html.jinja").render(words=words, bars=bars, cuts=counts)
