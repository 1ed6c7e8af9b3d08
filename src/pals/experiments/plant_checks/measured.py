"""Where the measured data lie, and reading them; a missing file or column is an error that names it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pals.core.errors import ConfigError
from pals.plant.columnar import Columns, read_columns

Table = Columns


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
    return read_columns(path, columns, what="the measured data")
