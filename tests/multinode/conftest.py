"""Two hosts for all tests, made once; where they cannot be made, the tests say why and skip."""

from collections.abc import Iterator

import pytest

from tests.multinode.cluster import Cluster, NotPermittedError, require_permission


@pytest.fixture(scope="session")
def _hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        require_permission()
        cluster = Cluster(tmp_path_factory.mktemp("cluster"), size=2)
    except NotPermittedError as error:
        pytest.skip(f"no hosts can be made here: {error}")
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(_hosts: Cluster) -> Iterator[Cluster]:
    """Two idle hosts on one network."""
    yield _hosts
    _hosts.clear()
