"""Count the processes that the kernel has killed because memory ran out."""

import re
from pathlib import Path


def memory_kills(root: Path = Path("/")) -> int | None:
    """Return the out-of-memory kills in this process's control group so far; None if they are not counted."""
    for counter in _counters(root):
        try:
            counted = re.search(r"^oom_kill (\d+)$", counter.read_text(), re.MULTILINE)
        except OSError:
            continue
        if counted:
            return int(counted[1])
    return None


def _counters(root: Path) -> list[Path]:
    """Return the files that may hold the counter, of control groups version 2 and 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for controllers, group in (line.split(":", 2)[1:] for line in lines):
        if not controllers:
            place, name = root / "sys/fs/cgroup", "memory.events"
        elif "memory" in controllers.split(","):
            place, name = root / "sys/fs/cgroup/memory", "memory.oom_control"
        else:
            continue
        # In a container the file system may show the group of this process as the root.
        files += [place / group.lstrip("/") / name, place / name]
    return files
