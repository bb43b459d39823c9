"""Rows of Parquet files and of `datasets`, and some of them written again with their values and schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .files import DataError, Source


class Parquet(Source):
    """Parquet files of one schema, which the rows keep."""

    def __init__(self, name: str, files: Sequence[Path]):
        super().__init__(name, "Parquet", ".parquet")
        try:
            self._files = [pq.ParquetFile(file) for file in files]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{name} cannot be read as Parquet: {error}.") from None
        self.schema = self._files[0].schema_arrow
        for path, file in zip(files, self._files, strict=True):
            if not file.schema_arrow.equals(self.schema):
                raise DataError(f"{path} has another schema than {files[0]}: make them alike.")

    def __len__(self) -> int:
        return sum(file.metadata.num_rows for file in self._files)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for file in self._files:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()

    def write(self, path: Path, rows: Sequence[int], changed: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        keep, start, changed = np.zeros(len(self), dtype=bool), 0, changed or {}
        keep[np.asarray(rows, dtype=np.int64)] = True
        groups = self._files[0].metadata
        codec = groups.row_group(0).column(0).compression if groups.num_row_groups and groups.num_columns else "SNAPPY"
        with pq.ParquetWriter(path, self.schema, compression="NONE" if codec == "UNCOMPRESSED" else codec) as out:
            for file in self._files:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    places = start + np.flatnonzero(keep[start : start + len(table)])
                    chosen = table.take(places - start)
                    if not changed.keys().isdisjoint(places.tolist()):
                        found = [
                            changed.get(i, row) for i, row in zip(places.tolist(), chosen.to_pylist(), strict=True)
                        ]
                        chosen = pa.Table.from_pylist(found, schema=self.schema)
                    if len(chosen):
                        out.write_table(chosen)
                    start += len(table)


class OfDatasets(Source):
    """A `datasets.Dataset`, from a folder or from the hub."""

    def __init__(self, name: str, kind: str, rows: Any):
        super().__init__(name, kind, "")
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def pick(self, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
        return {row: self.rows[row] for row in rows}

    def write(self, path: Path, rows: Sequence[int], changed: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        """A folder, or a file where `suffix` has been set to that of Parquet."""
        chosen = self.rows.select(rows)
        if changed:
            features, again = self.rows.features, dict(enumerate(changed.get(row) for row in rows))
            chosen = chosen.map(
                lambda row, i: again[i] or row, with_indices=True, features=features, load_from_cache_file=False
            )
        if self.suffix:
            chosen.to_parquet(path)
        else:
            chosen.save_to_disk(path)
