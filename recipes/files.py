"""Rows of a file or of a hub data set, with their places there, and rows written in the form they came in."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

KINDS = (".json", ".jsonl", ".csv", ".parquet")


class DataError(ValueError):
    """What is wrong with a file of rows or with what was asked of it, and the way out: for people, no traceback."""


@dataclass
class Source:
    """N rows as they came.

    Args:
        name: of the file or hub data set.
        kind: "jsonl", "json", "csv" or "parquet": the form in which rows are written again.
        rows: the N rows; the empty cells of a csv file are None.
        records: what is written again for a row: its line (jsonl), its cells (csv); None: the row itself.
        lines: line of each row in the file, counted from 1; None where a file has no lines.
    """

    name: str
    kind: str
    rows: Dataset
    records: list[Any] | None = None
    lines: list[int] | None = None

    def place(self, row: int) -> str:
        """Where a row is found, for people."""
        return f"row {row} (from 0)" if self.lines is None else f"line {self.lines[row]}"

    def write(self, path: Path, rows: list[int], more: dict[str, list[Any]] | None = None) -> Path:
        """Writes some rows in the form they came in, with further columns (each one value per row written).

        Returns:
            The file: `path` with the suffix of its kind.
        """
        path, more = path.with_suffix(f".{self.kind}"), more or {}
        if self.kind == "parquet":
            chosen = self.rows.select(rows)
            for column, values in more.items():
                chosen = chosen.add_column(column, values)
            chosen.to_parquet(path)
        elif self.kind == "csv":
            text = io.StringIO()
            table = csv.writer(text, lineterminator="\n")
            table.writerow([*self.rows.column_names, *more])
            assert self.records is not None
            table.writerows([*self.records[row], *(v[i] for v in more.values())] for i, row in enumerate(rows))
            path.write_text(text.getvalue(), encoding="utf-8", newline="")
        else:
            found = [self._json(row, {c: values[i] for c, values in more.items()}) for i, row in enumerate(rows)]
            text = "[\n" + ",\n".join(found) + "\n]\n" if self.kind == "json" else "".join(f"{r}\n" for r in found)
            path.write_text(text, encoding="utf-8", newline="")
        return path

    def _json(self, row: int, more: dict[str, Any]) -> str:
        record = self.rows[row] if self.records is None else self.records[row]
        if isinstance(record, str):
            if not more:
                return record  # the line, byte for byte
            record = json.loads(record)
        text = json.dumps({**record, **more}, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a character, which only an escape can hold
            text = json.dumps({**record, **more})
        return text


def read(name: str, split: str) -> Source:
    """All rows of a file (json, jsonl, csv, parquet) or of a hub data set's split.

    Raises:
        DataError: there is no such file or data set, it is empty or broken, or columns hold several kinds of values.
    """
    path = Path(name)
    if path.suffix not in KINDS and not path.is_file():
        return _from_hub(name, split)
    if not path.is_file():
        raise DataError(f"there is no file {name}.")
    if path.suffix not in KINDS:
        raise DataError(f"{name}: rows are read from {', '.join(KINDS)}, not from {path.suffix or 'such a file'}.")
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty: give a file with rows.")
    source = _READERS[path.suffix](name, path)
    if len(source.rows) == 0:
        raise DataError(f"{name} has no rows: give a file with rows.")
    return source


def _from_hub(name: str, split: str) -> Source:
    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # a wrong name, no network, an unknown split: each has an exception of its own
        text = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"{name} is no file here, and as a data set it cannot be loaded: {text[0][:300]}") from error
    if len(rows) == 0:
        raise DataError(f"{name} has no rows in its split {split!r}.")
    return Source(name, "parquet", rows)


def _from_parquet(name: str, path: Path) -> Source:
    try:
        return Source(name, "parquet", Dataset.from_parquet(str(path)))
    except Exception as error:  # wrapped by datasets in an exception of its own
        raise DataError(f"{name} is no Parquet file that can be read ({type(error).__name__}).") from error


def _from_csv(name: str, path: Path) -> Source:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_text(name, path.read_bytes(), 1), newline=""))
    header = next(reader, [])
    if len(set(header)) < len(header):
        raise DataError(f"{name}, line 1: two columns have one name: rename one.")
    records, lines, line = [], [], reader.line_num + 1
    for cells in reader:
        if cells:
            if len(cells) != len(header):
                raise DataError(
                    f"{name}, line {line}: {len(cells)} cells, but the header names {len(header)} columns: put cells "
                    "with commas or line breaks into quotes."
                )
            records.append(cells)
            lines.append(line)
        line = reader.line_num + 1
    columns = {column: [record[i] or None for record in records] for i, column in enumerate(header)}
    return Source(name, "csv", Dataset.from_dict(columns), records, lines)


def _from_json(name: str, path: Path) -> Source:
    """One row a line, or a list of rows, whatever the suffix."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        try:
            found = json.loads(_text(name, data, 1))
        except json.JSONDecodeError as error:
            raise DataError(f"{name}, line {error.lineno}: broken JSON ({error.msg}): mend it there.") from None
        source = Source(name, "json", Dataset.from_dict({}), found)
    else:
        records, lines, found = [], [], []
        for number, line in enumerate(data.split(b"\n"), start=1):
            if line.strip():
                records.append(_text(name, line, number).strip())
                lines.append(number)
                found.append(_loads(name, number, records[-1]))
        source = Source(name, "jsonl", Dataset.from_dict({}), records, lines)
    for i, row in enumerate(found):
        if not isinstance(row, dict):
            raise DataError(f"{name}, {source.place(i)}: a {type(row).__name__}, not an object with columns.")
    source.rows = _as_dataset(source, found)
    return source


def _loads(name: str, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}, line {line}: broken JSON ({error.msg} at character {error.pos + 1}): mend or delete the line. A "
            "file has one row a line, or is one list of rows in brackets."
        ) from None


def _as_dataset(source: Source, rows: list[dict[str, Any]]) -> Dataset:
    """Rows as a data set with the columns of all of them, None where a row has not got one."""
    columns: dict[str, list[Any]] = {c: [] for c in dict.fromkeys(column for row in rows for column in row)}
    for column, values in columns.items():
        values += [row.get(column) for row in rows]
        kinds = [_kind(value) for value in values]
        common = Counter(kind for kind in kinds if kind).most_common(2)
        if len(common) == 2:
            odd = next(i for i, kind in enumerate(kinds) if kind and kind != common[0][0])
            raise DataError(
                f"{source.name}, {source.place(odd)}: {column!r} is {kinds[odd]}, and {common[0][0]} in most rows: "
                "make them alike."
            )
    try:
        return Dataset.from_dict(columns)
    except Exception as error:  # deeper differences, which Arrow words in its own way
        raise DataError(
            f"{source.name}: rows differ in the form of their values ({error}): make them alike."
        ) from None


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


def _text(name: str, data: bytes, line: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise DataError(f"{name}, line {line}: not UTF-8: save the file in that encoding.") from None


_READERS = {".json": _from_json, ".jsonl": _from_json, ".csv": _from_csv, ".parquet": _from_parquet}
