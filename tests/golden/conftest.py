"""Loaders of a folder of golden numbers; DINOSCALE_GOLDEN points at another one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return Path(os.environ.get("DINOSCALE_GOLDEN", Path(__file__).parent))


@pytest.fixture(scope="session")
def golden_tensors(golden_dir: Path) -> Callable[[str], dict[str, Tensor]]:
    """File stem -> tensors by name."""
    return lambda stem: load_file(golden_dir / f"{stem}.safetensors")


@pytest.fixture(scope="session")
def golden_json(golden_dir: Path) -> Callable[[str], dict[str, Any]]:
    """File stem -> parsed JSON."""

    def load(stem: str) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads((golden_dir / f"{stem}.json").read_text())
        return parsed

    return load
