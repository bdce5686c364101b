"""The machine and the versions that results belong to."""

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launcher.launch.this_machine import this_machine

_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "accelerate")


def machine(device: str) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": this_machine().cores,
        "processor": _processor(),
        "load_at_end": os.getloadavg()[0],
        "gpu": _card() if device == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: _installed(name) for name in _PACKAGES},
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor(path: Path = Path("/proc/cpuinfo")) -> str:
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _card() -> str | None:
    """Return the name of the GPU; asked of the driver, because torch would allocate memory on it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader".split()
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
