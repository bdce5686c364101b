"""Settings of all tests."""

import gc
import os

# Ranks share the machine's cores, and a fork deadlocks in OpenMP's threads. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import settings

# By default an example of more than 0.2 s is a failure: on a busy machine, at random.
settings.register_profile("launcher", deadline=None)
settings.load_profile("launcher")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each file on one worker, and all of tests/slurm together: a machine has room for one cluster.

    The Slurm tests come first, because they take longest.
    """
    items.sort(key=lambda item: "slurm" not in item.path.parts)
    for item in items:
        group = "slurm" if "slurm" in item.path.parts else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """Leave the modules out of garbage collection, which would walk them and, in a fork, copy their pages."""
    gc.collect()
    gc.freeze()
