"""Two hosts for all tests, made once; where they cannot be made, the tests say why and skip."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.multinode.cluster import Cluster, Host, NotPermittedError, require_permission
from tests.multinode.slurm import slurm_on


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


@pytest.fixture
def login(cluster: Cluster) -> Iterator[Host]:
    """The host from which jobs are given to a Slurm of both hosts."""
    with ExitStack() as stack:
        try:
            require_permission(slurm=True)
            host = stack.enter_context(slurm_on(cluster))
        except NotPermittedError as error:
            pytest.skip(f"Slurm does not run here: {error}")
        yield host
