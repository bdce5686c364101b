"""Counting GPUs as CUDA does, CPU cores and memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.config.machine import Machine
from launcher.launch.this_machine import (
    SHORT_WAITS,
    existing_gpus,
    memory_here,
    share_cores,
    this_machine,
    visible_gpus,
)


def test_visible_gpus(subtests: pytest.Subtests) -> None:
    for setting, existing, visible in [
        (None, 0, 0),
        (None, 8, 8),
        ("", 8, 0),
        ("-1", 8, 0),
        ("NoDevFiles", 8, 0),
        ("0", 8, 1),
        ("0,1,2,3", 8, 4),
        (" 3, 1 ", 8, 2),
        ("0,-1,1", 8, 1),  # CUDA ignores everything after an invalid name
        ("0,9,1", 8, 1),
        ("0,0", 8, 0),  # CUDA sees no GPU if a name is repeated
        ("0,1", 0, 0),
        ("GPU-8932f937-d72c,GPU-1f22a253", 8, 2),
        ("MIG-a,MIG-b", 1, 1),
    ]:
        with subtests.test(str(setting)):
            environ = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
            assert visible_gpus(environ, existing) == visible


def test_existing_gpus_counts_numbered_device_nodes(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    assert existing_gpus(tmp_path) == 3


def test_existing_gpus_falls_back_to_the_driver_list(tmp_path: Path) -> None:
    assert existing_gpus(tmp_path) == 0
    for address in ("0000:17:00.0", "0000:65:00.0"):
        (tmp_path / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
    assert existing_gpus(tmp_path) == 2


def test_this_machine_respects_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    machine = this_machine()
    assert machine == Machine(0, machine.cores, memory_here())
    assert machine.cores >= 1


def test_launch_imports_neither_torch_nor_deepspeed_nor_hydra() -> None:
    loaded = "[name for name in ('torch', 'deepspeed', 'hydra') if name in sys.modules]"
    code = f"import sys; from launcher.launch import environment, local, this_machine; print({loaded})"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert process.stdout.strip() == "[]"


class TestMemory:
    def test_is_the_smaller_of_machine_memory_and_container_limit(self, tmp_path: Path) -> None:
        here = memory_here(tmp_path)
        assert here is not None
        assert here > 10**8
        limits = tmp_path / "sys" / "fs" / "cgroup"
        limits.mkdir(parents=True)
        (limits / "memory.max").write_text("max\n")
        assert memory_here(tmp_path) == here
        (limits / "memory.max").write_text("123456789\n")
        assert memory_here(tmp_path) == 123456789


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, SHORT_WAITS),
        ({"GOMP_SPINCOUNT": "7"}, {**SHORT_WAITS, "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_wait_briefly_unless_the_user_has_chosen(
    given: dict[str, str], found: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    share_cores(2, 8)
    assert os.environ == {**found, "OMP_NUM_THREADS": "4"}
