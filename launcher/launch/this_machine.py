"""Count the GPUs, CPU cores and memory of this machine, without importing torch."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from launcher.config.machine import Machine

# A waiting thread looks for work 1000 times before it sleeps. Only GNU's OpenMP reads GOMP_SPINCOUNT; torch
# has it on Linux.
SHORT_WAITS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def this_machine() -> Machine:
    """Return the GPUs, CPU cores and memory that this process may use. GPUs are not detected under WSL 2."""
    gpus = visible_gpus(os.environ, existing_gpus())
    return Machine(gpus=gpus, cores=_usable_cores(), memory_bytes=memory_here())


def existing_gpus(root: Path = Path("/")) -> int:
    """Return the number of NVIDIA GPUs that the driver offers, including those CUDA_VISIBLE_DEVICES hides."""
    nodes = [path for path in root.glob("dev/nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    # In a container, /proc lists every GPU of the host, but /dev lists only the container's: try /dev first.
    return len(nodes) or len(list(root.glob("proc/driver/nvidia/gpus/*")))


def visible_gpus(environ: Mapping[str, str], existing: int) -> int:
    """Return how many existing GPUs CUDA_VISIBLE_DEVICES leaves visible, by the rules of the CUDA runtime."""
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return existing
    named: list[str] = []
    for device in (part.strip() for part in setting.split(",")):
        if device in named:
            return 0
        exists = int(device) < existing if device.isdecimal() else device.startswith(("GPU-", "MIG-"))
        if not exists:
            break  # CUDA ignores everything after the first unknown name
        named.append(device)
    return min(len(named), existing)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_here(root: Path = Path("/")) -> int | None:
    """Return the memory of the machine or the limit of the container, the smaller; None if unknown."""
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (ValueError, OSError):
        return None
    for limit in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = (root / limit).read_text().strip() if (root / limit).is_file() else ""
        sizes += [int(text)] if text.isdecimal() else []
    return min(sizes) if min(sizes) > 0 else None


def share_cores_with_tasks(tasks: int) -> None:
    """Share the cores among this node's `tasks`, unless each task is bound to its own cores already."""
    usable = _usable_cores()
    share_cores(tasks if usable == os.cpu_count() else 1, usable)


def share_cores(processes: int, cores: int) -> None:
    """Set OMP_NUM_THREADS to a share of `cores`, unless the user has. Call before torch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    wait_briefly()


def wait_briefly() -> None:
    """Let threads spin for microseconds, then sleep, unless the user has chosen; before torch is imported.

    If they sleep at once, a step of a small model on two cores takes 25% longer. If they spin as long as they
    do by default, it takes many times longer as soon as another process uses a core.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update({**SHORT_WAITS, **os.environ})
