"""Tests keep what they cache among their own files."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("DINOSCALE_CACHE")
    os.environ["DINOSCALE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["DINOSCALE_CACHE"]
    else:
        os.environ["DINOSCALE_CACHE"] = before
