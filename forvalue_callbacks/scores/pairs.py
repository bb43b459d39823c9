"""Numbers of pairs of rows, more of them than the memory holds: one `.npy` file, written a window at a time."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .files import make_folder, open_locked, release, sync_folder, whole_file
from .parts import hash_digests
from .provenance import as_json, differing

logger = logging.getLogger(__name__)

FORMAT = 1
FLOAT = np.dtype("<f8")
CHUNK = 2**20  # numbers that are written at once


class PairsFile:
    """An (n, m) float64 `.npy` file that has its name when `finish` was called.

    Until then it is NAME.partial, NaN where nothing has been written, and NAME.partial.json says which windows are
    there. A run that was killed and is started again goes on from them. Rows are written to the file, not into memory
    that is mapped, and all of the space is taken at once: a full disk is an error before the work, and never a crash.

    Args:
        path: the `.npy` file; what is there now stays until the new one is finished.
        n, m: its shape.
        provenance: JSON-able, of what determines the numbers. Windows of another provenance or shape are not used.

    Raises:
        OSError: there is no room for the file; the message names it and its size.
        ValueError: another process is writing it, its folder cannot be written to, or a folder is in its place.
    """

    def __init__(self, path: str | os.PathLike[str], n: int, m: int, provenance: Mapping[str, Any]) -> None:
        self.path, self.n, self.m = Path(path), n, m
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._list = self.path.with_name(self.path.name + ".partial.json")
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder, and the pairs go into a file of that name: choose another.")
        make_folder(self.path.parent)
        if self._partial.is_symlink():
            self._partial.unlink()
        held = open_locked(self._partial)
        if held is None:
            raise ValueError(f"another process is writing {self.path}: wait until it has ended, or give another file.")
        self._held, self._is_open = held, True
        try:
            with io.BytesIO() as header:
                about = {"descr": FLOAT.str, "fortran_order": False, "shape": (n, m)}
                np.lib.format.write_array_header_1_0(header, about)
                self._header = header.getvalue()
            self._about = {
                "forvalue_pairs": FORMAT,
                "version": version("forvalue-callbacks"),
                "provenance": as_json(dict(provenance)),
                "shape": [n, m],
            }
            self._windows = self._look()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PairsFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Of the file when it is finished."""
        return len(self._header) + self.n * self.m * FLOAT.itemsize

    def holds(self, start: int, digests: Sequence[str]) -> bool:
        """Whether the rows from `start` on are there, exactly these, and as they were written."""
        window = self._windows.get(start)
        if window is None or window[:2] != [len(digests), hash_digests(digests)]:
            return False
        values = np.fromfile(self._partial, FLOAT, len(digests) * self.m, offset=self._place(start))
        return _hash(values) == window[2]

    def write(self, start: int, digests: Sequence[str], values: np.ndarray) -> None:
        """Writes the rows from `start` on.

        Args:
            digests: of the k rows.
            values: (k, m); NaN for what has no number.

        Raises:
            ValueError: another shape, or rows that the file does not have.
            OSError: it cannot be written.
        """
        values = np.ascontiguousarray(values, dtype=FLOAT)
        if values.shape != (len(digests), self.m) or start + len(digests) > self.n:
            raise ValueError(
                f"{len(digests)} rows from {start} on, of shape {values.shape}, are not rows of {self.path}, "
                f"which has the shape {(self.n, self.m)}"
            )
        for other in [s for s, (k, *_) in self._windows.items() if s < start + len(digests) and start < s + k]:
            del self._windows[other]  # no longer as it was written
        self._write_at(self._place(start), values)
        os.fsync(self._held)
        self._windows[start] = [len(digests), hash_digests(digests), _hash(values)]
        self._write_list()

    def finish(self) -> None:
        """Gives the file its name, and closes it.

        Raises:
            ValueError: rows are missing.
        """
        row = 0
        while row in self._windows:
            row += self._windows[row][0]
        if row != self.n:
            raise ValueError(f"{self._partial} holds {row:,} of {self.n:,} rows")
        os.replace(self._partial, self.path)
        self._list.unlink(missing_ok=True)
        sync_folder(self.path.parent)
        self.close()

    def close(self) -> None:
        """Lets go of the file; what has been written stays, to be gone on with."""
        if self._is_open:
            self._is_open = False
            release(self._held)

    def _look(self) -> dict[int, list[Any]]:
        """The windows that are there: how many rows, the hash of their digests, and that of their numbers."""
        if (found := self._read_list()) is not None:
            windows = found.pop("windows", {})
            if other := self._others(found):
                what = " and other ".join(other)
                logger.warning("%s was begun with other %s: it is begun anew", self._partial, what)
            elif os.fstat(self._held).st_size == self.nbytes:
                return {int(start): window for start, window in windows.items()}
        self._list.unlink(missing_ok=True)
        try:
            self._reserve()
        except OSError as error:
            self._partial.unlink(missing_ok=True)
            raise OSError(
                error.errno, f"{self.path} needs {self.nbytes:,} bytes, which cannot be had: {error.strerror}"
            ) from error
        return {}

    def _others(self, found: dict[str, Any]) -> list[str]:
        """What the windows that are there were made with, where that is not what these are, for people."""
        mine, provenance = self._about, found.get("provenance", {})
        other = differing(provenance, {**dict.fromkeys(provenance), **mine["provenance"]})
        if (found["forvalue_pairs"], found.get("version")) != (FORMAT, mine["version"]):
            other.append(f"version of the package ({found.get('version')})")
        return other + (["numbers of rows"] if found.get("shape") != mine["shape"] else [])

    def _reserve(self) -> None:
        """Takes the space, at once where the system can, and fills it with NaN."""
        os.ftruncate(self._held, 0)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._held, 0, self.nbytes)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot: NaN takes it
                    raise
        self._write_at(0, np.frombuffer(self._header, np.uint8))
        nothing = np.full(CHUNK, np.nan, dtype=FLOAT)
        for first in range(0, self.n * self.m, CHUNK):
            self._write_at(len(self._header) + first * FLOAT.itemsize, nothing[: self.n * self.m - first])
        os.fsync(self._held)
        self._windows = {}
        self._write_list()

    def _place(self, row: int) -> int:
        return len(self._header) + row * self.m * FLOAT.itemsize

    def _write_at(self, place: int, values: np.ndarray) -> None:
        os.lseek(self._held, place, os.SEEK_SET)
        rest = _bytes(values)
        try:
            while rest:
                rest = rest[os.write(self._held, rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._partial)) from error

    def _read_list(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._list.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and "forvalue_pairs" in found else None

    def _write_list(self) -> None:
        with whole_file(self._list) as file:
            file.write_text(json.dumps({**self._about, "windows": self._windows}), encoding="utf-8")


def _hash(values: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(_bytes(values))


def _bytes(values: np.ndarray) -> memoryview:
    return values.reshape(-1).view(np.uint8).data
