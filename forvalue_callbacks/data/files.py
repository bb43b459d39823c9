"""Rows of files of text, and some of them written again as they came."""

from __future__ import annotations

import csv
import io
import json
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BOM = b"\xef\xbb\xbf"


class DataError(ValueError):
    """What is wrong with files of rows or with what was asked of them, and the way out: for people, no traceback."""


class Source:
    """N rows as they came, read as often as one likes, not kept in memory.

    Args:
        name: as it was given.
        kind: what it is, for people.
        suffix: of the files that its rows are written to; empty: a folder of `Dataset.save_to_disk`.
    """

    def __init__(self, name: str, kind: str, suffix: str):
        self.name, self.kind, self.suffix = name, kind, suffix

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises DataError where a row cannot be read."""
        raise NotImplementedError

    def pick(self, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Some rows by their places."""
        wanted = set(rows)
        return {i: row for i, row in enumerate(self) if i in wanted}

    def place(self, row: int) -> str:
        """Where a row is found, for people."""
        return f"{self.name}, row {row} (from 0)"

    def line(self, row: int) -> int | None:
        """Line in the file, from 1; None where there are no lines."""
        return None

    def write(self, path: Path, rows: Sequence[int], changed: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        """Writes some rows, in the order of `rows` (ascending), as they came; `changed` ones as given there.

        Raises:
            OSError: it cannot be written.
        """
        raise NotImplementedError


class _Spans(Source):
    """Rows that are stretches of the bytes of files: all of a file belongs to one of its rows, empty lines to the row
    before them, so that the rows written and the rows left out are together all there was."""

    def __init__(self, name: str, kind: str, suffix: str, files: Sequence[Path]):
        super().__init__(name, kind, suffix)
        self.files = files
        found = [self._scan(file) for file in files]
        self._file = np.repeat(np.arange(len(files)), [len(starts) for starts, _, _ in found])
        self._starts = np.concatenate([starts for starts, _, _ in found])
        self._ends = np.concatenate([np.append(starts[1:], end)[: len(starts)] for starts, _, end in found])
        self._lines = np.concatenate([lines for _, lines, _ in found])
        self._open: dict[int, mmap.mmap] = {}

    def _scan(self, file: Path) -> tuple[np.ndarray, np.ndarray, int]:
        """Where rows start in a file and on which lines, int64 (n,) each, and where the last ends."""
        raise NotImplementedError

    def _parse(self, row: int, data: bytes) -> dict[str, Any]:
        raise NotImplementedError

    def _format(self, row: int, values: Mapping[str, Any]) -> bytes:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, row: int) -> bytes:
        """A row's bytes."""
        at = int(self._file[row])
        if at not in self._open:
            with open(self.files[at], "rb") as file:
                self._open[at] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._open[at][self._starts[row] : self._ends[row]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._parse(row, self.raw(row)) for row in range(len(self)))

    def pick(self, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
        return {row: self._parse(row, self.raw(row)) for row in rows}

    def place(self, row: int) -> str:
        return f"{self.files[self._file[row]]}, line {self._lines[row]}"

    def line(self, row: int) -> int | None:
        return int(self._lines[row])

    def _text(self, row: int, data: bytes) -> str:
        try:
            return data.removeprefix(BOM).decode()
        except UnicodeDecodeError:
            raise DataError(f"{self.place(row)}: not UTF-8: save the file in that encoding.") from None

    def _header(self) -> bytes:
        return b""

    def write(self, path: Path, rows: Sequence[int], changed: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        with open(path, "wb") as out:
            last = self._header()
            out.write(last)
            for row in rows:
                if last and not last.endswith(b"\n"):  # the end of one of several files
                    out.write(b"\n")
                last = self._format(row, changed[row]) if changed and row in changed else self.raw(row)
                out.write(last)


class JsonLines(_Spans):
    """One row a line."""

    def _scan(self, file: Path) -> tuple[np.ndarray, np.ndarray, int]:
        starts: list[int] = []
        lines: list[int] = []
        offset = 0
        with open(file, "rb") as opened:
            for number, line in enumerate(opened, start=1):
                if line.removeprefix(BOM).strip():
                    starts.append(offset if starts else 0)
                    lines.append(number)
                offset += len(line)
        return np.array(starts, dtype=np.int64), np.array(lines, dtype=np.int64), offset

    def _parse(self, row: int, data: bytes) -> dict[str, Any]:
        try:
            return _mapping(json.loads(self._text(row, data)), self.place(row))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.place(row)}: broken JSON ({error.msg} at character {error.colno}): mend or delete the line. A "
                "file has one row a line, or is one list of rows in brackets."
            ) from None

    def _format(self, row: int, values: Mapping[str, Any]) -> bytes:
        return _dumps(values) + b"\n"


class Csv(_Spans):
    """One record a row under a header; an empty cell is None."""

    def _scan(self, file: Path) -> tuple[np.ndarray, np.ndarray, int]:
        csv.field_size_limit(2**31 - 1)
        starts: list[int] = []
        lines: list[int] = []
        offset, line = 0, 1

        def texts(opened: Any) -> Iterator[str]:
            nonlocal offset
            for number, data in enumerate(opened, start=1):
                offset += len(data)
                try:
                    yield data.removeprefix(BOM).decode()
                except UnicodeDecodeError:
                    raise DataError(f"{file}, line {number}: not UTF-8: save the file in that encoding.") from None

        with open(file, "rb") as opened:
            reader = csv.reader(texts(opened), strict=True)
            try:
                header = next(reader, [])
                start, line = offset, reader.line_num + 1
                for cells in reader:
                    if cells and len(cells) != len(header):
                        raise DataError(
                            f"{file}, line {line}: {len(cells)} cells, but the header names {len(header)} columns: "
                            "put cells with commas or line breaks into quotes."
                        )
                    if cells:
                        starts.append(start)
                        lines.append(line)
                        start = offset
                    elif starts:
                        start = offset
                    line = reader.line_num + 1
            except csv.Error as error:
                raise DataError(f"{file}, line {line}: broken CSV ({error}): mend it there.") from None
        self._take_header(file, header)
        return np.array(starts, dtype=np.int64), np.array(lines, dtype=np.int64), offset

    def _take_header(self, file: Path, header: list[str]) -> None:
        if len(set(header)) < len(header):
            raise DataError(f"{file}, line 1: two columns have one name: rename one.")
        if file == self.files[0]:
            self.columns = header
        elif header != self.columns:
            raise DataError(f"{file}, line 1: other columns than in {self.files[0]}: make them alike.")

    def _header(self) -> bytes:
        with open(self.files[0], "rb") as file:
            return file.read(int(self._starts[0]))

    def _parse(self, row: int, data: bytes) -> dict[str, Any]:
        cells = next(filter(None, csv.reader(io.StringIO(self._text(row, data), newline=""))))
        return {column: cell or None for column, cell in zip(self.columns, cells, strict=True)}

    def _format(self, row: int, values: Mapping[str, Any]) -> bytes:
        text = io.StringIO()
        end = "\r\n" if self._header().endswith(b"\r\n") else "\n"
        csv.writer(text, lineterminator=end).writerow(["" if values[c] is None else values[c] for c in self.columns])
        return text.getvalue().encode()


class JsonArray(Source):
    """Files that are one list of rows each; a row is written with the letters that it came with."""

    def __init__(self, name: str, files: Sequence[Path]):
        super().__init__(name, "JSON", ".json")
        self._rows: list[tuple[Path, int, str]] = []  # its file, the line where it begins, its text
        for file in files:
            self._rows += ((file, line, text) for line, text in _elements(file))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (_mapping(json.loads(text), self.place(i)) for i, (_, _, text) in enumerate(self._rows))

    def place(self, row: int) -> str:
        file, line, _ = self._rows[row]
        return f"{file}, line {line} (row {row} from 0)"

    def line(self, row: int) -> int | None:
        return self._rows[row][1]

    def write(self, path: Path, rows: Sequence[int], changed: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        changed = changed or {}
        found = [_dumps(changed[i]) if i in changed else self._rows[i][2].encode() for i in rows]
        path.write_bytes(b"[\n" + b",\n".join(found) + b"\n]\n")


def _elements(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each element of a list in a file."""
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")
    try:
        text = file.read_bytes().removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise DataError(f"{file}, line {line}: not UTF-8: save the file in that encoding.") from None

    def skipped(at: int) -> int:
        return blank.match(text, at).end()  # type: ignore[union-attr]

    at, line, seen = skipped(skipped(0) + 1), 1, 0
    try:
        while text[at : at + 1] != "]":
            _, end = decode(text, at)
            line, seen = line + text.count("\n", seen, at), at
            yield line, text[at:end]
            at = skipped(end)
            if text[at : at + 1] == ",":
                at = skipped(at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: broken JSON ({error.msg}): mend it there.") from None


def _mapping(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a {type(row).__name__}, not an object with columns.")
    return row


def _dumps(values: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a character, which only an escape can hold
        return json.dumps(values).encode()
