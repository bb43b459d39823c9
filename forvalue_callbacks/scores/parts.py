"""A part: what is known of some rows that follow each other, as one Parquet file that says when it is damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from .files import whole_file

KEY = b"forvalue_part"
DTYPES = ("float64", "float32", "int64", "bool")
OURS = ("digest", "reason")


@dataclass(frozen=True, eq=False)
class Part:
    """Rows `start` to `start + len(digests) - 1`.

    Args:
        digests: 16 hex digits for each of the n rows, n > 0.
        reasons: why a row has nothing, None where it has.
        columns: arrays (n, ...) of float64, float32, int64 or bool; whatever is there for a row with a reason.

    Raises:
        ValueError: no rows, lengths that differ, another dtype, a column of the name of one of ours.
    """

    start: int
    digests: list[str]
    reasons: list[str | None]
    columns: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        n, lengths = len(self.digests), {"reasons": len(self.reasons)}
        for name, column in self.columns.items():
            if column.dtype.name not in DTYPES or column.ndim == 0 or name in OURS:
                raise ValueError(
                    f"column {name!r} is {column.dtype} {column.shape}: rows of {', '.join(DTYPES)} are kept, under "
                    f"other names than {' and '.join(OURS)}"
                )
            lengths[name] = len(column)
        if n == 0 or set(lengths.values()) != {n}:
            raise ValueError(f"a part of {n} rows, by their digests, has {lengths}")

    @property
    def end(self) -> int:
        """The first row after it."""
        return self.start + len(self.digests)

    def write(self, path: str | os.PathLike[str], identity: str) -> None:
        """Writes the file, whole or not at all. Without dictionaries: hardly anything in it comes twice."""
        columns = {
            "digest": pa.array(self.digests, type=pa.string()),
            "reason": pa.array(self.reasons, type=pa.string()),
            **{name: _to_arrow(column) for name, column in self.columns.items()},
        }
        header = {
            "start": self.start,
            "columns": {name: [column.dtype.name, column.shape[1:]] for name, column in self.columns.items()},
            "checksum": self._checksum(identity),
        }
        table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(header)})
        with whole_file(path) as file:
            pq.write_table(table, file, use_dictionary=False)

    def _checksum(self, identity: str) -> str:
        """Of all there is in it, and of what it was made of."""
        shapes = [(name, column.dtype.name, column.shape) for name, column in self.columns.items()]
        hashed = xxhash.xxh3_128(json.dumps([identity, self.start, self.digests, self.reasons, shapes]).encode())
        for column in self.columns.values():
            hashed.update(np.ascontiguousarray(column).data)
        return hashed.hexdigest()


def read_part(path: str | os.PathLike[str], identity: str) -> Part:
    """What `Part.write` wrote, bit for bit.

    Raises:
        ValueError: it is damaged, or made of something else.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read().combine_chunks()
        header = json.loads(table.schema.metadata[KEY])
        columns = {
            name: _to_numpy(table[name].chunk(0), np.dtype(dtype), shape)
            for name, (dtype, shape) in header["columns"].items()
        }
        part = Part(header["start"], table["digest"].to_pylist(), table["reason"].to_pylist(), columns)
        if part._checksum(identity) != header["checksum"]:
            raise ValueError("another checksum")
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is damaged, or made of something else: {error}") from error
    return part


def hash_digests(digests: Sequence[str]) -> str:
    """One hash of the digests of rows, in their order."""
    return xxhash.xxh3_128_hexdigest("\n".join(digests).encode())


def printable(reason: str) -> str:
    """A reason with "?" for what logs and files do not bear: control characters, halves of characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in reason)


def _to_arrow(column: np.ndarray) -> pa.Array:
    """Numbers where a row has one, else its bytes: twice as fast as lists."""
    if column.ndim == 1:
        return pa.array(column)
    column = np.ascontiguousarray(column)
    return pa.Array.from_buffers(pa.binary(column[0].nbytes), len(column), [None, pa.py_buffer(column)])


def _to_numpy(array: Any, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    if not shape:
        return array.to_numpy(zero_copy_only=False).astype(dtype, casting="safe")
    width = dtype.itemsize * int(np.prod(shape))
    first, data = array.offset * width, array.buffers()[1]
    return np.frombuffer(data, dtype, len(array) * width // dtype.itemsize, first).reshape(-1, *shape).copy()
