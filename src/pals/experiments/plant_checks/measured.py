"""Where the measured data lie, and reading them; a missing file or column is an error that names it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pals.core.errors import ConfigError

Table = dict[str, Any]  # columns by name: numpy arrays of one length


def data_folder(given: Path | None = None) -> Path:
    """`given`, else `data/` of the checkout this package is installed from.

    Raises:
        ConfigError: it is not there.
    """
    folder = given or Path(__file__).resolve().parents[4] / "data"
    if not folder.is_dir():
        raise ConfigError(
            f"the measured data are not in {folder}; they come with the checkout, not with a wheel: name them with --data DIR"
        )
    return folder


def read_table(path: Path, columns: Sequence[str]) -> Table:
    """Columns of a CSV (also .gz) or Parquet file as numpy arrays.

    Raises:
        ConfigError: the file is missing or broken, or lacks a column.
    """
    import pyarrow
    from pyarrow import csv, parquet

    try:
        table = parquet.read_table(path) if path.suffix == ".parquet" else csv.read_csv(path)
    except (OSError, pyarrow.ArrowException) as e:
        raise ConfigError(f"cannot read the measured data {path}: {e}") from e
    lacking = [c for c in columns if c not in table.column_names]
    if lacking:
        raise ConfigError(f"{path} lacks the columns {', '.join(lacking)}; it has {', '.join(table.column_names)}")
    return {c: table[c].to_numpy(zero_copy_only=False) for c in columns}
