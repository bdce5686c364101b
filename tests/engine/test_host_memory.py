"""A process that keeps freed memory does not ask the kernel for it again."""

import subprocess
import sys

import pytest

# Page faults while a tensor of 40 MB, more than glibc ever keeps by default, is made and freed ten times,
# after the heap has grown to its size.
PROGRAM = """
import resource, sys, torch
from launcher.engine.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def use():
    torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults = [use() for _ in range(40)]
print(faults[-1] - faults[-11])
"""
PAGES = 10 * 40_000_000 // 4096


def faults(argument: str) -> int:
    command = [sys.executable, "-c", PROGRAM, argument]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_freed_tensors_cost_no_page_faults() -> None:
    assert faults("keep") < PAGES / 100


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_the_count_can_fail() -> None:
    # Transparent huge pages may make each fault larger.
    assert faults("default") > PAGES / 1000
