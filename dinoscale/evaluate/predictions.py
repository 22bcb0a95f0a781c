"""Files of predictions: what a classifier answered for each image, `.npz` or `.csv`.

Without torch, since a comparison reads them before it measures anything.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoscale.errors import ConfigError, DataError
from dinoscale.runtime.outputs import atomic_write

FORMATS = (".npz", ".csv")
COLUMNS = ("image", "class", "answer", "correct")


def write_predictions(path: Path, columns: Mapping[str, NDArray[np.generic]]) -> None:
    """Write `COLUMNS`, (M,) each of M images, in the format of the file extension.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with atomic_write(path) as beside:
            if path.suffix == ".npz":
                np.savez_compressed(beside, allow_pickle=False, **columns)
                return
            with beside.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                rows = zip(*(column.tolist() for column in columns.values()), strict=True)
                writer.writerows((*row[:-1], int(row[-1])) for row in rows)
    except OSError as error:
        raise ConfigError(f"predictions: {path}: {error.strerror or error}") from error


def read_correct(path: Path) -> tuple[list[str], NDArray[np.bool_]]:
    """The images in a file of predictions, and whether the answer for each is right.

    Raises:
        DataError: it cannot be read, or is no such file.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return arrays["image"].tolist(), arrays["correct"].astype(np.bool_)
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"columns are not {', '.join(COLUMNS)}")
            rows = list(reader)
        return [row["image"] for row in rows], np.array([row["correct"] == "1" for row in rows])
    except (OSError, ValueError, KeyError, EOFError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as predictions ({error})") from error
