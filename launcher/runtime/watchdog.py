"""Ends a run in which nothing goes on any more, and says which ranks the others wait for.

Each rank watches itself, in a thread: its main thread hangs in a collective, or on a dead disk.
"""

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from launcher.launch.records import RankEndKind, record_end
from launcher.runtime.run_dir import LOGS

HUNG = 124  # the exit code of timeout(1)
_REPORT, _PART = "hang.txt", "hang_rank_*.json"

# Where a rank waits for others or, on a GPU, for a kernel that does: in torch.distributed itself, or in a
# line that waits for a handle or a number.
_WAITS = re.compile(r"\.(wait|item|tolist|cpu|synchronize)\(|\bfloat\(")


@dataclass(frozen=True)
class Standing:
    """Where one rank stands after a long time without news from it."""

    rank: int
    at: str
    waits: bool  # for others, as far as can be told
    stack: str


class Watchdog:
    """Entered on every rank, and told with `at` of what begins. Collective: gathers host names."""

    def __init__(self, run_dir: Path, timeout_minutes: float) -> None:
        self.timeout = 60 * timeout_minutes
        self._minutes, self._run_dir = timeout_minutes, run_dir
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._hosts = [""] * self._world
        dist.all_gather_object(self._hosts, socket.gethostname())
        self._at, self._idle = "the start", 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        for path in (self._run_dir / LOGS).glob(_PART.replace("*", str(self._rank))):
            path.unlink()  # an earlier start's
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def at(self, what: str) -> None:
        """What this rank does from now on, such as `step 57`."""
        self._at, self._idle = what, 0.0

    def _watch(self) -> None:
        # Added up, not read off a clock: a job that is suspended as a whole is not hung when it goes on.
        pause = min(1.0, self.timeout / 10)
        while not self._ended.wait(pause):
            self._idle += pause
            if self._idle > self.timeout:
                self._end()

    def _end(self) -> None:
        own = self._standing()
        path = self._run_dir / LOGS / _PART.replace("*", str(self._rank))
        # Not files.write_text, whose fsync would wait for a disk that is dead.
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(own)))
        aside.rename(path)
        # The others have waited about as long: not longer apart than a step takes.
        time.sleep(min(30.0, 2.0 + self.timeout / 5))
        standing = _standings(self._run_dir / LOGS)
        if min(one.rank for one in standing) == self._rank:
            told = report(standing, self._hosts, self._minutes)
            print(f"launcher: {told}", file=sys.stderr, flush=True)
            (self._run_dir / _REPORT).write_text(told + "\n")
            record_end(self._rank, RankEndKind.failed, told)
        else:
            time.sleep(2.0)  # who ends first ends all under srun and torchrun: let it be the one that tells
        os._exit(HUNG)

    def _standing(self) -> Standing:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        stack = traceback.extract_stack(frame)
        innermost = stack[-1]
        waits = "/torch/distributed/" in innermost.filename or bool(_WAITS.search(innermost.line or ""))
        return Standing(self._rank, self._at, waits, "".join(traceback.format_list(stack)))


def _standings(logs: Path) -> list[Standing]:
    return [Standing(**json.loads(path.read_text())) for path in logs.glob(_PART)]


def report(standing: list[Standing], hosts: list[str], minutes: float) -> str:
    """Who waits, who did not arrive and where that is, who does not even answer. Pure; names come first."""
    found = {one.rank: one for one in standing}
    silent = [rank for rank in range(len(hosts)) if rank not in found]
    absent = [one for one in standing if not one.waits]
    missing = sorted([*silent, *(one.rank for one in absent)])
    who = f"{_ranks(missing, hosts)} did not arrive" if missing else "all ranks wait"
    lines = [f"the run hangs: {who} (nothing has ended for launch.timeout_minutes={minutes:g})"]
    for place in sorted({one.at for one in standing if one.waits}):
        waiting = sorted(one.rank for one in standing if one.waits and one.at == place)
        lines.append(f"at {place}, waiting for others: {_ranks(waiting, hosts)}")
    for one in sorted(absent, key=lambda one: one.rank):
        lines += [f"at {one.at}: {_ranks([one.rank], hosts)}, in", one.stack.rstrip()]
    if silent:
        why = "stopped, stuck in the kernel, or on a node that is gone"
        lines.append(f"no answer from {_ranks(silent, hosts)}: {why}")
    if not missing:
        lines += ["they wait in different places:", *_stacks(standing)]
    return "\n".join(lines)


def _stacks(standing: list[Standing]) -> Iterator[str]:
    for stack in dict.fromkeys(one.stack for one in standing):
        yield f"ranks {', '.join(str(one.rank) for one in standing if one.stack == stack)}:\n{stack.rstrip()}"


def _ranks(ranks: list[int], hosts: list[str]) -> str:
    shown = [f"{rank} on {hosts[rank]}" for rank in ranks[:8]]
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(shown)}{more}"
