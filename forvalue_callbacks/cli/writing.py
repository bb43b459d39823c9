"""Rows in files again, as they came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.files import Source
from ..scores.files import whole_file, whole_folder


def write_rows(
    source: Source, path: Path, rows: Sequence[int], changed: Mapping[int, Mapping[str, Any]] | None = None
) -> None:
    """Writes some rows as they came, all or nothing."""
    with (whole_file if source.suffix else whole_folder)(path) as new:
        source.write(new, rows, changed)
