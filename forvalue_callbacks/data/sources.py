"""Files, folders and hub data sets by their names -> rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .files import BOM, Csv, DataError, JsonArray, JsonLines, Source
from .tables import OfDatasets, Parquet

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")  # owner/name:config
KINDS = (".jsonl", ".json", ".csv", ".parquet")


def read(name: str, split: str = "train") -> Source:
    """The rows of a file or a folder of files (.jsonl, .json, .csv, .parquet; all of one kind), of a folder that
    `Dataset.save_to_disk` has written, or of a data set on the hub (`owner/name`, `owner/name:config`).

    Args:
        split: of a data set that has several.

    Raises:
        DataError: there is no such thing, or no rows in it, or it is broken.
    """
    path = Path(name)
    if path.is_dir():
        source = _of_folder(name, path, split)
    elif path.is_file():
        source = _of_files(name, [path])
    elif path.suffix in KINDS or not HUB_ID.fullmatch(name):
        raise DataError(f"there is no file or folder {name}: check the path.")
    else:
        source = _of_hub(name, split)
    if len(source) == 0:
        raise DataError(f"{name} has no rows: give a file with rows.")
    return source


def refuse_unprintable(names: Iterable[str | None]) -> None:
    """Raises DataError for a name that would do more on a terminal than be read, or be another than it seems."""
    for name in names:
        if name is not None and not name.isprintable():
            raise DataError(f"{name!r} has control characters or others that cannot be printed: rename it.")


def _of_folder(name: str, path: Path, split: str) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        from datasets import load_from_disk

        rows = load_from_disk(name)
        if isinstance(rows, dict):
            if split not in rows:
                raise DataError(f"{name} has no split {split!r}: choose one of {', '.join(rows)}.")
            rows = rows[split]
        return OfDatasets(name, "a saved data set", rows)
    files = sorted(file for file in path.iterdir() if file.suffix in KINDS)
    refuse_unprintable(file.name for file in files)
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else f"no files that end in {', '.join(KINDS)}"
        raise DataError(f"the folder {name} holds {found}: give a folder with files of one kind, or one file.")
    return _of_files(name, files)


def _of_files(name: str, files: Sequence[Path]) -> Source:
    for file in files:
        if file.suffix not in KINDS:
            raise DataError(f"{file}: rows are read from {', '.join(KINDS)}, not from {file.suffix or 'such a file'}.")
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty: give a file with rows.")
    if files[0].suffix == ".parquet":
        return Parquet(name, files)
    if files[0].suffix == ".csv":
        return Csv(name, "CSV", ".csv", files)
    with open(files[0], "rb") as opened:
        is_list = opened.read(4096).removeprefix(BOM).lstrip()[:1] == b"["  # either suffix is used for either
    return JsonArray(name, files) if is_list else JsonLines(name, "JSONL", files[0].suffix, files)


def _of_hub(name: str, split: str) -> Source:
    from datasets import load_dataset

    identity, _, config = name.partition(":")
    try:
        rows = load_dataset(identity, config or None, split=split)
    except Exception as error:  # a wrong name, no network, an unknown split: each has an exception of its own
        text = str(error).splitlines() or [type(error).__name__]
        raise DataError(
            f"{name} is no file or folder here, and as a data set of the hub it cannot be loaded ({text[0][:200]}): "
            "check the name, the split and the network."
        ) from error
    return OfDatasets(name, "a data set of the hub", rows)
