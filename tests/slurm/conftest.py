"""Fixture: one Slurm cluster for all tests."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, NoSlurm, install


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    try:
        install()
    except NoSlurm as why:
        pytest.skip(f"NO SLURM CLUSTER, so nothing of Slurm is tested here: {why}")
    found = Cluster(nodes=4)
    try:
        found.up()
        yield found
    finally:
        found.down()
