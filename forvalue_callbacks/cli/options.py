"""Flags: dataclasses, YAML in their place, and the file that says what a run was given."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml  # comes with transformers
from transformers import HfArgumentParser

from ..data.sources import KINDS, refuse_unprintable
from ..scores.files import whole_file
from . import COMMANDS, EXIT_CODES

try:
    from trl import TrlParser as Parser
except ImportError:

    class Parser(HfArgumentParser):  # type: ignore[no-redef]
        """What is used of TRL's parser: YAML values are defaults, flags win."""

        def parse_args_and_config(self, args: Iterable[str]) -> tuple[Any, ...]:
            given = list(args)
            if "--config" in given:
                at = given.index("--config")
                with open(given[at + 1], encoding="utf-8") as file:
                    values = yaml.safe_load(file)
                del given[at : at + 2]
                for action in self._actions:
                    if action.dest in values:
                        action.default, action.required = values[action.dest], False
            return self.parse_args_into_dataclasses(given)


# Flags that name a path; some of them may name something on the hub in its place.
PATHS, MAY_BE_IDS = ("out", "chat_template", "dropped", "scores", "report"), ("data", "validation", "model")


# Where the command differs from the classes.
DEFAULTS = {"method": "auto"}


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ScoringOptions:
    """Which rows, by which rows, with which model."""

    data: str = field(
        metadata={
            "help": "Rows to score: a file or a folder of files (.jsonl, .json, .csv, .parquet), a folder of "
            "save_to_disk, or a hub id (owner/name, owner/name:config). The first argument may stand without --data.",
        }
    )
    model: str = field(metadata={"help": "Folder or hub id of the causal language model."})
    out: str = field(metadata={"help": "The file to write (of save_to_disk rows: a folder)."})
    validation: str | None = _flag(
        None,
        "Rows that you trust, of the same kind: two or three hundred, 40 at least. None: "
        "methods auto and label_model find wrong answers where answers repeat.",
    )
    validation_share: float | None = field(
        default=None,
        metadata={"help": "Take this share of the training rows in place of --validation: only if you trust them."},
    )
    split: str = _flag("train", "Split of --data, where it has several.")
    validation_split: str = _flag("train", "Split of --validation.")
    text_column: str = _flag("text", "Column of rows that are text.")
    prompt_template: str | None = _flag(None, "Of rows in a form of their own, over their columns: '{question}\\n'.")
    completion_template: str | None = _flag(None, "The same for the answer: '{answer}'.")
    chat_template: str | None = _flag(
        None, "A file with a Jinja chat template. None: the tokenizer's own, or ChatML where it has none."
    )
    learn_prompts: bool = _flag(False, "Score all tokens of a row, not the answer alone.")
    max_length: int | None = _flag(1024, "Rows are cut to this many tokens, as in SFTConfig.")
    dtype: str = _flag("auto", "Of the weights: auto, float32, bfloat16, float16.")
    seed: int = _flag(0, "Of what --validation-share takes.")
    overwrite: bool = _flag(False, "Replace files that are there, scores among them.")
    dry_run: bool = _flag(False, "Say what it would take (rows, tokens, passes, memory, time), and write nothing.")


@dataclass
class SelectOptions:
    """What becomes of the rows."""

    policy: str = field(
        default="drop:auto",
        metadata={"help": "Which rows go: drop:auto, drop:0.2, keep:5000, drop:0.2@source (within each source), ..."},
    )
    relabel: float | None = field(
        default=None,
        metadata={
            "help": "Keep a row to drop with the answer of another row, where that is right with this probability "
            "(0.95), as far as the model knows; where answers repeat. It is among the dropped rows too, as it came."
        },
    )
    dropped: str | None = _flag(None, "File for the dropped rows. None: kept.jsonl has kept.dropped.jsonl beside it.")
    scores: str | None = _flag(None, "File for the scores. None: kept.jsonl has kept.scores.parquet beside it.")
    report: str | None = _flag(None, "File for the report (.html). None: no report.")
    card: bool = _flag(False, "Write a card of the data set, README.md, beside the kept rows.")
    push_to_hub: str | None = _flag(
        None, "Data set of the hub (owner/name) that kept and dropped rows, scores and card go to; no other file does."
    )
    private: bool = _flag(True, "Of a data set that --push-to-hub makes.")


def parse(command: str, classes: Sequence[Any], argv: Sequence[str], more: str = "") -> tuple[Any, ...]:
    """Objects of the classes, of the flags and of the YAML file of `--config`.

    Arguments that stand before the first flag are those of the first field.

    Raises:
        SystemExit: with 2 for what is no usage, with 0 after help.
        OSError: the YAML file cannot be read.
    """
    what, _, example = COMMANDS[command]
    parser = Parser(
        list(classes),
        prog=f"forvalue {command}",
        usage=example,
        description=f"{what[0].upper()}{what[1:]}.\n{more}",
        epilog=f"--config FILE.yaml: flags from a file, as {{flag: value}}; those given here win. --debug: a "
        f"traceback where something is wrong.\n{EXIT_CODES}",
        formatter_class=_Help,
    )
    known = {spec.name for cls in classes for spec in fields(cls)}
    parser.set_defaults(**{name: value for name, value in DEFAULTS.items() if name in known})
    given = list(argv)
    n = next((i for i, argument in enumerate(given) if argument.startswith("-")), len(given))
    if n:
        given = [f"--{fields(classes[0])[0].name}", *given[:n], *given[n:]]
    _check_config(parser, given, known)
    try:
        parsed = tuple(parser.parse_args_and_config(given))
    except ValueError as error:  # what a dataclass finds wrong
        parser.exit(2, f"forvalue {command}: {' '.join(str(error).split())}\n")
    for options in parsed:
        for name in (*PATHS, *MAY_BE_IDS):
            value = getattr(options, name, None)
            refuse_unprintable(value if isinstance(value, list) else [value])
    return parsed


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    def _get_help_string(self, action: Any) -> str | None:  # argparse has no other way
        return action.help if action.default is None else super()._get_help_string(action)


def _check_config(parser: Any, given: list[str], known: set[str]) -> None:
    if "--config" not in given:
        return
    at = given.index("--config")
    if at + 1 == len(given):
        parser.error("--config needs a file")
    with open(given[at + 1], encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)
        except yaml.YAMLError as error:
            parser.error(f"{given[at + 1]} is no YAML: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"{given[at + 1]} must hold flags with their values, as 'policy: drop:auto'")
    if other := sorted(map(str, values.keys() - known - {"env"})):
        parser.error(f"{given[at + 1]} sets what is no flag here: {', '.join(other)}")


def typed(command: str, *options: Any) -> str:
    """What to type for these flags, those alone that are not as they are by themselves."""
    words = ["forvalue", command]
    for group in options:
        for spec in fields(group):
            value = getattr(group, spec.name)
            if value is not None and value != DEFAULTS.get(spec.name, spec.default):
                text = str(value).lower() if isinstance(value, bool) else str(value)
                words += [f"--{spec.name.replace('_', '-')}", text]
    return shlex.join(words)


def run_file(out: str) -> Path:
    """Where the flags of a run are kept: kept.run.yaml beside kept.jsonl."""
    return beside(out, "run", ".yaml")


def beside(out: str, what: str, suffix: str | None = None) -> Path:
    """kept.jsonl: kept.WHAT.jsonl, or with another suffix."""
    path = Path(out)
    stem, own = (path.stem, path.suffix) if path.suffix in KINDS else (path.name, "")  # folders may have dots
    return path.with_name(f"{stem}.{what}{own if suffix is None else suffix}")


def write_run(command: str, out: str, *options: Any) -> Path:
    """Writes every flag of a run, with paths that hold from everywhere; `forvalue replay` reads it."""
    values = {name: value for group in options for name, value in asdict(group).items()}
    for name in (*PATHS, *MAY_BE_IDS):
        value = values.get(name)
        if value is not None and (name in PATHS or Path(value).exists()):
            values[name] = str(Path(value).resolve())
    path = run_file(out).resolve()
    with whole_file(path) as file:
        first = f"# forvalue {command} --config {path}\n"
        file.write_text(first + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
