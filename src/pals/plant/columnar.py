"""Parquet files as columns; the only place that knows pyarrow, which is optional."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pals.core.errors import INSTALL, ConfigError

Columns = dict[str, Any]  # by name: numpy arrays of one length


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as e:
        raise ConfigError(f"pyarrow is not installed; {INSTALL}") from e
    return pyarrow


def read_columns(path: Path, columns: Sequence[str], *, what: str) -> Columns:
    """Columns of a CSV (also .gz) or Parquet file as numpy arrays; `what` it holds, for messages.

    Raises:
        ConfigError: the file is missing or broken, or lacks a column; or pyarrow is not installed.
    """
    pa = _pyarrow()
    if not path.is_file():
        raise ConfigError(f"cannot read {what}: there is no file {path}")
    try:
        table = pa.parquet.read_table(path) if path.suffix == ".parquet" else pa.csv.read_csv(path)
    except (OSError, pa.ArrowException) as e:
        raise ConfigError(f"cannot read {what} {path}: {e}") from e
    lacking = [c for c in columns if c not in table.column_names]
    if lacking:
        raise ConfigError(f"{path} lacks the columns {', '.join(lacking)}; it has {', '.join(table.column_names)}")
    return {c: table[c].to_numpy(zero_copy_only=False) for c in columns}


def row_count(path: Path) -> int:
    """Rows of a Parquet file."""
    with _pyarrow().parquet.ParquetFile(path) as file:
        return int(file.metadata.num_rows)


def row_groups(path: Path, columns: Sequence[str]) -> Iterator[Columns]:
    """A Parquet file's columns as numpy arrays, one group of rows after the other; null is NaN."""
    with _pyarrow().parquet.ParquetFile(path) as file:
        for i in range(file.num_row_groups):
            table = file.read_row_group(i, columns=list(columns))
            yield {c: table[c].to_numpy() for c in columns}


class ParquetWriter:
    """Writes tables of the same columns one after another into one file; a part of them is there when it is closed early.

    Types are fixed by `kinds`, so that an empty table, or one of unknown values alone, has the same ones.
    """

    def __init__(self, path: Path, kinds: Mapping[str, str], metadata: Mapping[str, str]) -> None:
        """`kinds`: by column, one of "float64", "float32", "int64", "int32", "bool_", "string"; null stands for unknown."""
        self._pa = pa = _pyarrow()
        types = {"string": pa.dictionary(pa.int16(), pa.string())}
        self._schema = pa.schema(
            [(name, types.get(kind) or getattr(pa, kind)()) for name, kind in kinds.items()], metadata=dict(metadata)
        )
        self._writer = pa.parquet.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, columns: Mapping[str, Any]) -> None:
        """Append rows: every column as a sequence or numpy array of one length; NaN is written as null."""
        arrays = [self._pa.array(columns[f.name], type=f.type, from_pandas=True) for f in self._schema]
        self._writer.write_table(self._pa.Table.from_arrays(arrays, schema=self._schema))

    def append_file(self, path: Path) -> None:
        """Append the rows of a file that another writer of these columns wrote."""
        with self._pa.parquet.ParquetFile(path) as file:
            for i in range(file.num_row_groups):
                self._writer.write_table(file.read_row_group(i).cast(self._schema))

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()
