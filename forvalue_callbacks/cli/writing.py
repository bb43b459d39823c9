"""Rows in files again, as they came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..data.files import DataError, Source
from ..scores.files import open_locked, release, whole_file, whole_folder
from .options import beside


@contextmanager
def alone(out: str) -> Iterator[None]:
    """While what belongs to a result is written: two runs at once would leave the kept rows of one beside the dropped
    rows of the other.

    Raises:
        DataError: another process is at it.
    """
    lock = beside(out, "run", ".lock")
    held = open_locked(lock)
    if held is None:
        raise DataError(f"another process is writing {out}: wait until it has ended, or give another file.")
    with ExitStack() as stack:
        stack.callback(release, held)
        stack.callback(lock.unlink, missing_ok=True)  # while it is held, so that it is nobody else's
        yield


def write_rows(
    source: Source, path: Path, rows: Sequence[int], changed: Mapping[int, Mapping[str, Any]] | None = None
) -> None:
    """Writes some rows as they came, all or nothing."""
    with (whole_file if source.suffix else whole_folder)(path) as new:
        source.write(new, rows, changed)
