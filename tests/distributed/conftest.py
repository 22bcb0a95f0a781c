"""A module's `follow`, run on two ranks once for all its tests."""

from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_distributed

_LEFT_S = 20  # of a test's limit, to say which rank has not ended


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the module's runs."""
    return tmp_path_factory.mktemp(request.module.__name__.rpartition("_")[2])


@pytest.fixture(scope="module")
def followed(request: pytest.FixtureRequest, root: Path) -> dict[str, dict[str, Any]]:
    """Job -> what rank 0 of two found."""
    limit = request.node.get_closest_marker("timeout")
    assert limit is not None
    function, timeout_s = f"{request.module.__name__}:follow", limit.args[0] - _LEFT_S
    of_rank_0: dict[str, dict[str, Any]]
    of_rank_0, _ = run_distributed(function, world_size=2, timeout_s=timeout_s, root=str(root))
    return of_rank_0
