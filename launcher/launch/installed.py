"""Identify the installed torch, DeepSpeed and launcher, without importing torch or DeepSpeed.

As a program, `python -P -m launcher.launch.installed` prints them as JSON: for the Python of a job.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

# The parts of DeepSpeed that train, and of the launcher that `launcher verify` runs: the others may change.
_OF_DEEPSPEED = ("__init__.py", "runtime", "comm", "utils", "ops/adam", "accelerator")
_OF_LAUNCHER = ("engine", "models", "parallel", "parity", "config", "data", "launch")
_SECONDS = 60.0  # for another Python: a file server can make its start slow


@dataclass(frozen=True)
class Installed:
    """The versions that a run uses, and fingerprints of the code: equal ones compute the same."""

    torch: str
    deepspeed: str
    code: str  # of torch (its place and version), DeepSpeed (sizes and times of files) and the launcher

    def __str__(self) -> str:
        return f"torch {self.torch} and deepspeed {self.deepspeed}"


class NotInstalled(Exception):
    """Raised if a package, or the Python of the job, cannot be used; the message is a clause."""


def installed_here() -> Installed:
    """Return what this Python has installed. Raises NotInstalled if a package is missing."""
    torch, deepspeed = _place("torch"), _place("deepspeed")
    launcher = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256(f"{torch} {_version('torch')} {deepspeed}".encode())
    for path in (torch / "version.py", *_files(deepspeed, _OF_DEEPSPEED)):
        status = path.stat()
        digest.update(f"{path}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    for path in _files(launcher, _OF_LAUNCHER):
        digest.update(f"{path.relative_to(launcher)}\n".encode() + path.read_bytes())
    return Installed(_version("torch"), _version("deepspeed"), digest.hexdigest())


def installed_for(python: str) -> Installed:
    """Return the versions that another Python has installed. Raises NotInstalled."""
    command = [python, "-P", "-m", "launcher.launch.installed"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
        return Installed(**json.loads(done.stdout))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{python} cannot be started here: {error}") from None
    except (ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NotInstalled(f"{python} cannot run the launcher here: {last}") from None


def _place(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise NotInstalled(f"the package {package} is not installed here")
    return Path(spec.origin).parent


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _files(package: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    for part in parts:
        path = package / part
        if path.is_file():
            yield path
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(set(folders) - {"__pycache__"})
            yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(installed_here())))
    except NotInstalled as error:
        raise SystemExit(str(error)) from None
