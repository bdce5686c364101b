"""Check once, before a job is submitted, that the installed versions compute this kind of layout right.

The check is `launcher verify` on the smallest run of the kind (see kind.py), in a process of its own. A
success is recorded in the user's cache directory, under the versions and the kind. Imports no torch.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.files import write_text
from launcher.launch.installed import Installed, NotInstalled, installed_for, installed_here
from launcher.parity.kind import kind_of, overrides_of, sections_of
from launcher.parity.shrink import MOST_RANKS

LIMIT = 300.0  # seconds; the check takes less than 40 on two idle cores
# Ranks share the modules of the process that forks them.
_MEGABYTES_OF_A_RANK, _MEGABYTES_OF_VERIFY = 250, 700
_FORMAT = 1  # of a record; raise it when the meaning of a record changes
# Messages of failures whose cause is this machine, not the layout.
_OF_THE_MACHINE = re.compile(
    r"Resource temporarily unavailable|Cannot allocate memory|can't start new thread|No space left on device"
    r"|cannot open shared object file|MemoryError|ModuleNotFoundError|Too many open files|Disk quota exceeded"
)
# Variables of other launchers of ranks: removed, because the check starts its own ranks.
_FOREIGN = re.compile(r"(SLURM|PMI|OMPI|TORCHELASTIC)_|(WORLD_SIZE|RANK|LOCAL_RANK|LOCAL_WORLD_SIZE)$")


class Verdict(Enum):
    """`unknown`: the check could not be made on this machine."""

    passed = "passed"
    failed = "failed"
    unknown = "unknown"


@dataclass(frozen=True)
class Preflight:
    """The verdict on one kind of layout; `why` is the reason, or for `passed` the date and the duration."""

    verdict: Verdict
    why: str
    installed: Installed | None = None
    command: str = ""  # repeats the check and prints the whole comparison
    entry: Path | None = None  # the record of a success


def preflight(run: RunConfig, layout: Layout) -> Preflight:
    """Return the verdict on this kind of layout with the versions that the job will use.

    Prints a line if the check is made now. A second process that asks for the same kind waits for the first.
    """
    if run.slurm.container:
        return Preflight(
            Verdict.unknown, "the job runs in a container (slurm.container), and this shell does not"
        )
    try:
        installed = installed_for(run.slurm.python) if run.slurm.python else installed_here()
    except NotInstalled as error:
        return Preflight(Verdict.unknown, str(error))
    kind = kind_of(run, layout)
    key = {"format": _FORMAT, "installed": asdict(installed), "kind": sections_of(kind)}
    entry = _entry_of(key)
    with _claimed(entry):
        if (known := _read(entry, key)) is not None:
            return Preflight(Verdict.passed, known, installed, entry=entry)
        result = _check(kind, run.slurm.python or sys.executable, installed)
        if result.verdict is Verdict.passed:
            _keep(entry, key, result.why)
    return result


def _check(kind: RunConfig, python: str, installed: Installed) -> Preflight:
    p = kind.parallelism
    assert p.data is not None
    ranks = min(MOST_RANKS, p.pipeline * p.data * p.context * p.tensor)  # verify shrinks four axes further
    overrides = overrides_of(kind)
    command = "launcher verify " + " ".join(
        f"'{word}'" if set(word) & set("{[ ") else word for word in overrides
    )
    if lack := _lack_of_memory(ranks):
        return Preflight(Verdict.unknown, lack, installed, command)
    print(
        f"preflight  checks this kind of layout once with {installed}: {ranks} small CPU ranks",
        file=sys.stderr,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="launcher-preflight-") as folder:
        report = Path(folder) / "report.json"
        arguments = [python, "-P", "-m", "launcher", "verify", *overrides, f"verify.report={report}"]
        code, output = _run(arguments, Path(folder))
        verdict, why = _judge(code, output, _report(report))
    if verdict is Verdict.passed:
        why = f"checked on {time.strftime('%Y-%m-%d')} in {time.monotonic() - started:.0f} s"
    return Preflight(verdict, why, installed, command)


def _lack_of_memory(ranks: int) -> str | None:
    """Return why the ranks do not fit into the free memory, as a clause; None if they fit."""
    needed = _MEGABYTES_OF_VERIFY + ranks * _MEGABYTES_OF_A_RANK
    with suppress(OSError):
        free = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if free and int(free[1]) // 1024 < needed:
            return (
                f"{ranks} small ranks need {needed:,} MB, and {int(free[1]) // 1024:,} MB of memory are free"
            )
    return None


def _run(arguments: list[str], folder: Path) -> tuple[int | None, str]:
    """Return the exit code, None after LIMIT seconds, and the last output. Ends the process and its ranks."""
    environment = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            arguments, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()[-20_000:]


def _report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _judge(code: int | None, output: str, report: dict[str, Any]) -> tuple[Verdict, str]:
    """Return the verdict, and why. Pure."""
    message = _message(output)
    if code == 0 and report.get("ok") is True:
        return Verdict.passed, ""
    if code is None:
        return Verdict.failed, f"`launcher verify` of this kind of layout does not end within {LIMIT:.0f} s"
    for result in report.get("passes") or []:
        if not result.get("ok") and result.get("diagnosis"):
            diagnosis = result["diagnosis"]
            return (
                Verdict.failed,
                f"{result['title']}: {diagnosis['shape']}; usual cause: {diagnosis['meaning']}",
            )
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Verdict.unknown, f"the check was ended by {name}, perhaps because of a limit of this machine"
    if code == 2 or _OF_THE_MACHINE.search(output):
        return Verdict.unknown, message
    return Verdict.failed, message


def _message(output: str) -> str:
    """Return the launcher's message in one line, or the last line of a traceback."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines:
        return "`launcher verify` ended without a message"
    message = next((line for line in lines if line.startswith("launcher: ")), None)
    if message is None or "Traceback" in output:
        return lines[-1]
    return message.removeprefix("launcher: ")


def cache_directory() -> Path:
    """Return the directory of the records. Raises RuntimeError if the user has no home directory."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if base.startswith("/") else Path.home() / ".cache"  # as the XDG specification says
    return folder / "launcher" / "preflight"


def _entry_of(key: dict[str, Any]) -> Path | None:
    """Return the file of this key; None if the cache directory cannot be written."""
    name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    try:
        folder = cache_directory()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder / f"{name}.json" if os.access(folder, os.W_OK | os.X_OK) else None


def _read(entry: Path | None, key: dict[str, Any]) -> str | None:
    """Return when the check succeeded; None if the record is missing, damaged or of another key."""
    if entry is None:
        return None
    try:
        content = json.loads(entry.read_bytes())
        when = content.pop("when")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    return when if content == key and isinstance(when, str) else None


def _keep(entry: Path | None, key: dict[str, Any], when: str) -> None:
    """Write the record whole or not at all; the caller holds its lock. Errors are ignored: no record."""
    if entry is not None:
        with suppress(OSError):
            write_text(entry, json.dumps({**key, "when": when}, indent=1))


@contextmanager
def _claimed(entry: Path | None) -> Iterator[None]:
    """Hold the lock of a record. If the file system has no locks or is full, two checks may run at once."""
    if entry is None:
        yield
        return
    try:
        lock = entry.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
