"""Settings of all tests."""

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Ranks share the machine's cores, and a fork deadlocks in OpenMP's threads. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import settings

# By default an example of more than 0.2 s is a failure: on a busy machine, at random.
settings.register_profile("launcher", deadline=None)
settings.load_profile("launcher")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker, run the longest files first, so that no long file is left for one worker at the end."""
    if not hasattr(config, "workerinput"):
        return
    weights = Counter[Path]()
    for item in items:
        weights[item.path] += 20 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -weights[item.path])


def pytest_collection_finish() -> None:
    """Leave the modules out of garbage collection, which would walk them and, in a fork, copy their pages."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def ranks_end_with_their_file() -> Iterator[None]:
    yield
    if "tests.distributed" in sys.modules:  # it imports torch, which most tests of config never need
        sys.modules["tests.distributed"].close_pools()
