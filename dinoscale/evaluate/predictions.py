"""Files of predictions: what a classifier answered for each image, `.npz` or `.csv`.

Without torch, since a comparison reads them before it measures anything.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

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


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file of predictions, which its report names; empty if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return ""


def read_correct(path: Path, *, sha256: str | None = None) -> tuple[list[str], NDArray[np.bool_]]:
    """The images in a file of predictions, and whether the answer for each is right.

    Args:
        path: of the file.
        sha256: its digest in the report of these predictions; None takes any file.

    Raises:
        DataError: it cannot be read, is no such file, or was overwritten since the report.
    """
    try:
        data = path.read_bytes()
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("they are not those of the report, another run has overwritten them")
        if path.suffix == ".npz":
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return arrays["image"].tolist(), arrays["correct"].astype(np.bool_)
        reader = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""))
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"columns are not {', '.join(COLUMNS)}")
        rows = list(reader)
        return [row["image"] for row in rows], np.array([row["correct"] == "1" for row in rows])
    except (OSError, ValueError, KeyError, EOFError, csv.Error, BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as predictions ({error})") from error
