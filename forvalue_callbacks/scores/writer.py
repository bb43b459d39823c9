"""Scores, and whatever else a method knows of rows, kept on disk while they are made: a part a window, and a manifest.

A folder::

    manifest.json                 format, package version, provenance, settings; when all is done, the number of rows
    part-000000000000.parquet     the rows from 0 on: their digests, reasons and columns
    part-000000004096.parquet     the rows from 4,096 on
    forvalue.lock                 held by the process that writes

A part holds the digests of its rows, and its checksum covers what it was made of: what one says does not depend on the
others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .files import hold_folder, open_locked, release, remove_leftovers, temporary_folder, whole_file
from .parts import Part, hash_digests, printable, read_part
from .provenance import as_json, differing

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, LOCK = "manifest.json", "forvalue.lock"
PART = re.compile(r"part-(\d{12})\.parquet")


class OtherProvenanceError(ValueError):
    """What is kept in a folder was made of something else.

    Args:
        what: it is, and what differs.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: give another folder, or anew=True to begin anew there")
        self.what = what


class ScoreWriter:
    """A folder of parts that one process has open to write to.

    Args:
        folder: made where there is none; None is a temporary folder that goes when the writer is closed.
        provenance: what determines the columns, part by part: weights, validation, config.
        settings: JSON-able, for the reader: the resolved config.
        anew: what a writer has put into the folder goes first. Other files stay.

    Raises:
        ValueError: the folder is of another provenance or version, is open in another process, cannot be written to,
            or holds somebody else's manifest.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        provenance: Mapping[str, Any],
        settings: Mapping[str, Any],
        anew: bool = False,
    ) -> None:
        self._is_temporary = folder is None
        self._held: int | None
        if folder is None:
            self.folder, self._held = temporary_folder(LOCK)
        else:
            self.folder, self._held = hold_folder(folder, LOCK)
        if self._held is None:
            raise ValueError(
                f"another process is writing scores to {self.folder}: wait until it has ended, or give another folder."
            )
        try:
            self._open(as_json(dict(provenance)), as_json(dict(settings)), anew)
        except BaseException:
            self.close()
            raise

    def _open(self, provenance: dict[str, Any], settings: dict[str, Any], anew: bool) -> None:
        found = read_manifest(self.folder)
        if anew:
            _remove_files(self.folder)
            found = None
        mine = {
            "forvalue_scores": FORMAT,
            "version": version("forvalue-callbacks"),
            "provenance": provenance,
            "settings": settings,
        }
        if found is not None:
            _refuse_other(found, mine, self.folder)
        self._manifest = found or mine
        self._identity = identity(mine)
        if found is None:
            self._write_manifest()
        self._found = self._look()

    def __enter__(self) -> ScoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def n_rows(self) -> int:
        """Rows in the parts that follow each other from row 0 on."""
        n = 0
        while n in self._found:
            n += self._found[n][0]
        return n

    def holds(self, start: int, digests: Sequence[str]) -> bool:
        """Whether there is a part that begins at row `start` and is of exactly these rows, in their order."""
        return self._found.get(start) == (len(digests), hash_digests(digests))

    def write(
        self, start: int, digests: Sequence[str], reasons: Sequence[str | None], columns: Mapping[str, np.ndarray]
    ) -> None:
        """Writes a part, whole or not at all: see `Part`.

        Parts that have rows in common with it go. Those after it stay, even where rows between are missing then: one
        is used again only where `holds` says that it is of the rows that the data set has there.

        Raises:
            ValueError: what `Part` raises.
            OSError: it cannot be written; what is there stays, and a run that is started again goes on from it.
        """
        cleaned = [None if reason is None else printable(reason) for reason in reasons]
        part = Part(start, list(digests), cleaned, {name: np.asarray(column) for name, column in columns.items()})
        if "n_rows" in self._manifest:  # no longer finished
            del self._manifest["n_rows"], self._manifest["metadata"]
            self._write_manifest()
        for other, (n, _) in list(self._found.items()):
            if other != start and other < part.end and start < other + n:
                self._remove_part(other)
        try:
            part.write(self._file(start), self._identity)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(
                error.errno,
                f"rows {start:,} to {part.end - 1:,} cannot be written to {self.folder} ({why}): what is there stays, "
                "and a run that is started again goes on from it",
            ) from error
        self._found[start] = len(part.digests), hash_digests(part.digests)

    def parts(self) -> Iterator[Part]:
        """The parts that follow each other from row 0 on, one in memory at a time.

        Raises:
            ValueError: one has been damaged since the writer was opened.
        """
        start = 0
        while start in self._found:
            part = read_part(self._file(start), self._identity)
            yield part
            start = part.end

    def finish(self, n_rows: int, metadata: Mapping[str, Any]) -> None:
        """Says that all rows are there: from now on `ForValueScores.load` reads the folder.

        Args:
            n_rows: rows of the data set. All other parts, those of a data set that was longer among them, go.
            metadata: of the scores, JSON-able.

        Raises:
            ValueError: rows are missing.
        """
        for start in [start for start in self._found if start >= n_rows]:
            self._remove_part(start)
        if self.n_rows != n_rows:
            raise ValueError(f"{self.folder} holds {self.n_rows:,} of {n_rows:,} rows")
        for start in set(_starts(self.folder)) - set(self._found):  # damaged ones
            self._remove_part(start)
        self._manifest.update(n_rows=n_rows, metadata=as_json(dict(metadata)))
        self._write_manifest()

    def remove(self) -> None:
        """Deletes what a writer has put into the folder, and the folder if it is empty then; closes the writer."""
        _remove_files(self.folder)
        self.close()
        with contextlib.suppress(OSError):  # not empty, or gone
            self.folder.rmdir()

    def close(self) -> None:
        """Lets go of the folder. What has been written stays, unless the folder is a temporary one."""
        if self._held is not None:
            held, self._held = self._held, None
            try:
                with contextlib.suppress(OSError):
                    (self.folder / LOCK).unlink()  # while it is held, so that it is nobody else's
            finally:
                release(held)
        if self._is_temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, start: int) -> Path:
        return part_file(self.folder, start)

    def _look(self) -> dict[int, tuple[int, str]]:
        """The parts that are of use, by their first rows: how many rows, and the hash of their digests."""
        found: dict[int, tuple[int, str]] = {}
        unusable, end = [], 0
        for start in _starts(self.folder):
            try:
                part = read_part(self._file(start), self._identity)
                if part.start != start or start < end:
                    raise ValueError(f"{self._file(start)} is of rows that other parts hold")
            except ValueError as error:
                unusable.append(str(error))
                continue
            found[start] = len(part.digests), hash_digests(part.digests)
            end = part.end
        if unusable:
            logger.warning("%d parts of the scores are made anew, the first: %s", len(unusable), unusable[0])
        return found

    def _write_manifest(self) -> None:
        with whole_file(self.folder / MANIFEST) as file:
            file.write_text(json.dumps(self._manifest, indent=1) + "\n", encoding="utf-8")

    def _remove_part(self, start: int) -> None:
        self._file(start).unlink(missing_ok=True)
        self._found.pop(start, None)


def open_writer(
    folder: str | os.PathLike[str] | None, provenance: Mapping[str, Any], settings: Mapping[str, Any]
) -> ScoreWriter:
    """A writer that goes on with what is there, or, where that was made of something else, begins anew."""
    try:
        return ScoreWriter(folder, provenance, settings)
    except OtherProvenanceError as error:
        logger.warning("%s: everything is scored anew", error.what)
        return ScoreWriter(folder, provenance, settings, anew=True)


def parts_folder(path: str | os.PathLike[str]) -> Path:
    """Where the parts of scores lie while they are made, beside their file."""
    return Path(f"{path}.parts")


def remove_parts(path: str | os.PathLike[str]) -> None:
    """Deletes the parts of scores that are whole, which a killed run has left, unless another process writes them."""
    folder = parts_folder(path)
    with contextlib.suppress(FileNotFoundError):  # there are none, or another process has removed them since
        if (held := open_locked(folder / LOCK)) is not None:
            _remove_files(folder)
            (folder / LOCK).unlink()
            release(held)
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None where there is none.

    Raises:
        ValueError: it is not one that a `ScoreWriter` has written.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as the manifest of scores: give another folder.") from error
    if not isinstance(manifest, dict) or "forvalue_scores" not in manifest:
        raise ValueError(f"{file} is not the manifest of scores: give another folder.")
    return manifest


def read_finished(folder: Path) -> tuple[dict[str, Any], Iterator[Part]]:
    """The manifest of a folder that `ScoreWriter.finish` has finished, and its parts, one in memory at a time.

    Raises:
        ValueError: there is no such folder, or it is not finished; from the iterator: rows are missing or damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(
            f"{folder} is a folder without {MANIFEST}, so not one of scores: give the file or its folder."
        )
    if manifest["forvalue_scores"] != FORMAT:
        raise ValueError(
            f"{folder} is of the format {manifest['forvalue_scores']}, this version reads {FORMAT}: score again."
        )
    if "n_rows" not in manifest:
        raise ValueError(f"the scores in {folder} are not finished: start the run that makes them again, it goes on.")

    def parts() -> Iterator[Part]:
        start, n_rows = 0, manifest["n_rows"]
        while start < n_rows:
            if not part_file(folder, start).is_file():
                raise ValueError(f"{folder} holds {start:,} of {n_rows:,} rows: start the run that makes them again")
            part = read_part(part_file(folder, start), identity(manifest))
            yield part
            start = part.end

    return manifest, parts()


def identity(manifest: Mapping[str, Any]) -> str:
    """What a part must be made of to be of use under a manifest."""
    made_of = [manifest[key] for key in ("forvalue_scores", "version", "provenance")]
    return xxhash.xxh3_128_hexdigest(json.dumps(made_of, sort_keys=True).encode())


def part_file(folder: Path, start: int) -> Path:
    """Where the part is that begins at row `start`."""
    return folder / f"part-{start:012d}.parquet"


def _starts(folder: Path) -> list[int]:
    """First rows of the parts that are there, by their names."""
    return sorted(int(match[1]) for path in folder.iterdir() if (match := PART.fullmatch(path.name)))


def _remove_files(folder: Path) -> None:
    """The last part first and the manifest after all of them: what a kill leaves there can be gone on with."""
    for start in reversed(_starts(folder)):
        part_file(folder, start).unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    remove_leftovers(folder)


def _refuse_other(found: dict[str, Any], mine: dict[str, Any], folder: Path) -> None:
    other = []
    if (found["forvalue_scores"], found.get("version")) != (mine["forvalue_scores"], mine["version"]):
        other.append(f"version of the package ({found.get('version')})")
    provenance = found.get("provenance", {})
    other += differing(provenance, {**dict.fromkeys(provenance), **mine["provenance"]})
    if other:
        raise OtherProvenanceError(f"what is kept in {folder} was made with other {' and other '.join(other)}")
