"""Draw tries from a seed, run real commands, and count the rules that each try breaks.

A try has a directory, random numbers of its own and a TMPDIR of its own. Every rule of `KINDS` holds for it.
"""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.forked_commands import LAUNCHER, Command, CommandServer, environment, heavy

KINDS = {
    "lost": "a step, a row or a good checkpoint is lost, or the run cannot be started again",
    "silent": "an exit code or message that does not name the problem",
    "traceback": "a traceback that is not a rank's own error",
    "hang": "a command that does not end within its limit",
    "orphan": "a process or a temporary file that stays behind",
    "exposed": "a secret that is shown, or code of the user's directory that ran",
}
LIMIT = 90.0  # seconds for a command
_ENDING = 10.0  # seconds for the processes of a command that has ended, or was killed
_TORCH_CACHE = "torchinductor_"  # and the user's name: a cache that all of the user's processes share
# The server that forks has chosen a temporary directory already.
_OWN_TMPDIR = "import tempfile\ntempfile.tempdir = None\n"


class Ended(NamedTuple):
    code: int
    out: str
    error: str

    @property
    def said(self) -> str:
        return self.out + self.error

    @property
    def brief(self) -> str:
        """The exit code and the end of what was said."""
        return f"exit code {self.code}, {self.said.strip()[-600:]!r}"


class Abandoned(Exception):
    """Raised to end a try early, after a broken rule was recorded."""


@dataclass
class Shared:
    """The parts that the tries of a campaign share, each made when it is first needed."""

    folder: Path
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the directory of this name, filled by `make`."""
        with self._lock:
            folder = self.folder / name
            if not folder.exists():
                folder.mkdir()
                make(folder)
            return folder


@dataclass
class Try:
    """A try of a family: `case` describes it, `broken` lists the rules that it broke."""

    folder: Path
    rng: random.Random
    shared: Shared
    case: str = ""
    broken: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.temporary.mkdir(parents=True)

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def run_dir(self) -> Path:
        return self.folder / "r"

    def expect(self, holds: bool, kind: str, message: str) -> None:
        """Record a broken rule of this kind unless the condition holds."""
        assert kind in KINDS
        if not holds:
            self.broken.append((kind, message))

    def run(
        self,
        *arguments: str,
        program: str = LAUNCHER,
        server: Callable[[], CommandServer] = heavy,
        limit: float = LIMIT,
        tracebacks: int = 0,
        **extra: str,
    ) -> Ended:
        """Run `launcher ARGUMENTS` to its end; raise Abandoned if it does not end within `limit`."""
        surroundings = environment(TMPDIR=str(self.temporary), CUDA_VISIBLE_DEVICES="", **extra)
        options = {"cwd": self.folder, "environment": surroundings, "program": _OWN_TMPDIR + program}
        return self.ended(server().start(list(arguments), **options), limit, tracebacks)

    def ended(self, process: Command | subprocess.Popen[str], limit: float, tracebacks: int) -> Ended:
        """Wait for the end of a command, and check its output."""
        try:
            out, error = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as late:
            self.expect(False, "hang", f"no end within {limit:.0f} s: {late.output!r} {late.stderr!r}")
            raise Abandoned from None
        assert process.returncode is not None
        result = Ended(process.returncode, out, error)
        count = result.said.count("Traceback (most recent call last)")
        self.expect(count <= tracebacks, "traceback", result.said[-1500:])
        return result

    def check_processes(self) -> None:
        """Check that no process of a command that has ended, or was killed, lives on."""
        deadline = time.monotonic() + _ENDING
        while (left := processes_in(self.folder)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid, command in left.items():
            self.expect(False, "orphan", f"process {pid}: {command}")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def finish(self) -> None:
        """Check that no process and no temporary file is left."""
        self.check_processes()
        if any(kind == "hang" for kind, _ in self.broken):
            return  # its processes were killed, and could not remove their files
        paths = (str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*"))
        files = sorted(path for path in paths if not path.startswith(_TORCH_CACHE))
        self.expect(not files, "orphan", f"left in TMPDIR: {files[:5]}")


@dataclass(frozen=True)
class Family:
    """`attempt` runs the commands of a try and checks them; `count` is the number of tries in a full run."""

    name: str
    count: int
    attempt: Callable[[Try], None]


@dataclass(frozen=True)
class Outcome:
    family: str
    index: int
    case: str
    seconds: float
    broken: list[tuple[str, str]]

    def lines(self, seed: int) -> Iterator[str]:
        """Yield a line per broken rule, with the arguments that repeat the try."""
        for kind, message in self.broken:
            shown = message.replace("\n", "\n        ")
            yield f"{kind:<9} --seed {seed} --only {self.family}:{self.index}  [{self.case}]\n        {shown}"


def processes_in(folder: Path) -> dict[int, str]:
    """Return the command lines, by process id, of the processes whose working directory is `folder`."""
    left = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # A link of /proc to a directory that was deleted says so at its end.
            if os.readlink(process / "cwd").removesuffix(" (deleted)") == str(folder):
                left[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")[:200]
    return left


def attempted(family: Family, seed: int, index: int, shared: Shared) -> Outcome:
    """Run one try. The same seed, family and index give the same case."""
    folder = shared.folder / f"{family.name}-{index}"
    this, started = Try(folder, random.Random(f"{seed}/{family.name}/{index}"), shared), time.monotonic()
    try:
        family.attempt(this)
    except Abandoned:
        pass
    except Exception:
        # Such as a file of the run that cannot be read.
        this.expect(False, "lost", traceback.format_exc())
    this.finish()
    shutil.rmtree(folder)
    return Outcome(family.name, index, this.case, time.monotonic() - started, this.broken)


@contextmanager
def shared_directory() -> Iterator[Shared]:
    """Yield what tries share, in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name).resolve()
        yield Shared(folder)


def outcomes(tries: list[tuple[Family, int]], seed: int, jobs: int) -> Iterator[Outcome]:
    """Run the tries, `jobs` at a time, and yield their outcomes in order."""
    heavy()  # the first call starts the server, and must not be made by two threads
    with shared_directory() as shared, ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda pair: attempted(pair[0], seed, pair[1], shared), tries)


def report(results: list[Outcome]) -> str:
    """Return a table of counts per family. A try that breaks several rules counts once for each."""
    head = ["family", "tries", "as expected", *KINDS, "seconds per try"]
    rows = [head, ["---"] * len(head)]
    for name in dict.fromkeys(result.family for result in results):
        family = [result for result in results if result.family == name]
        counts = Counter(kind for result in family for kind in {kind for kind, _ in result.broken})
        seconds = sum(result.seconds for result in family) / len(family)
        good = sum(not result.broken for result in family)
        kinds = (str(counts[kind]) for kind in KINDS)
        rows.append([name, f"{len(family):,}", f"{good:,}", *kinds, f"{seconds:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
