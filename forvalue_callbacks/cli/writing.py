"""Rows in files again, as they came."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.files import Source
from ..scores.files import whole_file


def write_rows(
    source: Source, path: Path, rows: Sequence[int], changed: Mapping[int, Mapping[str, Any]] | None = None
) -> None:
    """Writes some rows as they came, all or nothing."""
    if source.suffix:
        with whole_file(path) as file:
            source.write(file, rows, changed)
        return
    new = path.with_name(f".{path.name}.forvalue")
    shutil.rmtree(new, ignore_errors=True)
    source.write(new, rows, changed)
    shutil.rmtree(path, ignore_errors=True)
    new.rename(path)
