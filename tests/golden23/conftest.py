"""Loaders of golden numbers of DINOv2 and DINOv3; DINOSCALE_GOLDEN23 points at another folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture(scope="session")
def golden23_dir() -> Path:
    return Path(os.environ.get("DINOSCALE_GOLDEN23", Path(__file__).parent / "data"))


@pytest.fixture(scope="session")
def golden23_tensors(golden23_dir: Path) -> Callable[[str], dict[str, Tensor]]:
    """File stem -> tensors by name."""
    return lambda stem: load_file(golden23_dir / f"{stem}.safetensors")


@pytest.fixture(scope="session")
def golden23_json(golden23_dir: Path) -> Callable[[str], dict[str, Any]]:
    """File stem -> parsed JSON."""

    def load(stem: str) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads((golden23_dir / f"{stem}.json").read_text())
        return parsed

    return load
