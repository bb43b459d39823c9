"""The one file that scores are kept in, which says when it is not as it was written."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from .files import whole_file

METADATA_KEY, FILE_KEY = b"forvalue_scores", b"forvalue_file"
FORMAT = 1
TYPES = {"row": pa.int64(), "score": pa.float64(), "reason": pa.string(), "log_likelihood": pa.float64()}
TYPES |= {"n_labelled": pa.int64(), "digest": pa.string()}
INSTEAD = "give the file that it wrote (a run keeps forvalue_scores.parquet in its output_dir), or score again"


def write_table(path: str | os.PathLike[str], table: pa.Table, metadata: str) -> None:
    """Writes a table with the columns of `TYPES`, whole or not at all, and metadata in JSON."""
    about = {"format": FORMAT, "rows": len(table), "checksum": _checksum(table, metadata.encode())}
    table = table.replace_schema_metadata({METADATA_KEY: metadata, FILE_KEY: json.dumps(about)})
    with whole_file(path) as temporary:
        pq.write_table(table, temporary)


def read_table(path: str | os.PathLike[str]) -> tuple[pa.Table, dict[str, Any]]:
    """The table that `write_table` wrote, and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file, or not as it was written; says what has changed.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as a Parquet file: {INSTEAD}") from error
    if METADATA_KEY not in (table.schema.metadata or {}):
        raise ValueError(f"{path} was not written by ForValueScores.save: {INSTEAD}")
    try:
        _check(table, path)
        return table, json.loads(table.schema.metadata[METADATA_KEY])
    except (LookupError, TypeError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: score again") from error


def _check(table: pa.Table, path: str | os.PathLike[str]) -> None:
    about = json.loads(table.schema.metadata.get(FILE_KEY, b"{}"))
    if about.get("format") != FORMAT:
        written = f"is of format {about['format']}" if about else "was written by version 0.1"
        raise ValueError(f"{path} {written}, this version reads format {FORMAT}: score again")
    n = about["rows"]
    if len(table) != n:
        raise ValueError(f"{path} holds {len(table):,} of {n:,} rows: {INSTEAD}")
    for name, kind in TYPES.items():
        there = name in table.column_names
        if (not there and name != "digest") or (there and table.schema.field(name).type != kind):
            raise ValueError(f"{path} was changed after it was written: it has no {kind} column {name!r}. Score again")
    rows = table["row"].to_numpy()
    if not np.array_equal(rows, np.arange(n)):
        first = int(np.argmax(rows != np.arange(n)))
        raise ValueError(
            f"the rows of {path} are not in their order: its column 'row' has {rows[first]} in place {first}. Sort "
            "the file by that column, or score again"
        )
    if _checksum(table, table.schema.metadata[METADATA_KEY]) != about["checksum"]:
        raise ValueError(f"{path} was changed after it was written (its checksum is another): score again")


def _checksum(table: pa.Table, metadata: bytes) -> str:
    """Of all columns of ours in their order, a null among numbers being NaN, and of the metadata."""
    hashed = xxhash.xxh3_128(metadata)
    for name in TYPES:
        if name in table.column_names:
            if pa.types.is_string(table.schema.field(name).type):
                hashed.update(json.dumps([name, table[name].to_pylist()]).encode())
            else:
                hashed.update(name.encode() + table[name].to_numpy().tobytes())
    return hashed.hexdigest()
