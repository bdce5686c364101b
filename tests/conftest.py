"""Settings of all tests."""

import gc
import os

# Ranks share the machine's cores, and a fork deadlocks in OpenMP's threads. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings

# By default an example of more than 0.2 s is a failure: on a busy machine, at random.
settings.register_profile("launcher", deadline=None)
settings.load_profile("launcher")


def pytest_collection_finish() -> None:
    """Leave the modules out of garbage collection, which would walk them and, in a fork, copy their pages."""
    gc.collect()
    gc.freeze()
