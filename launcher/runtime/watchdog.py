"""Ends a run that hangs, and reports which ranks the others wait for.

Each rank watches itself in a thread: its main thread may hang in a collective, or on a dead disk.
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

import torch.distributed as dist

from launcher.launch.records import RankEndKind, record_end
from launcher.runtime.run_dir import LOGS

HUNG = 124  # the exit code of timeout(1)
_REPORT, _PART = "hang.txt", "hang_rank_*.json"

# A rank waits for other ranks in torch.distributed, or in a line that waits for a handle or for a value from
# the GPU, whose kernels may wait for other ranks.
_WAITS = re.compile(r"\.(wait|item|tolist|cpu|synchronize|_cuda_synchronize)\(|\bfloat\(")


@dataclass(frozen=True)
class RankPosition:
    """The position of a rank in the program when the run has hung."""

    rank: int
    at: str
    waits: bool  # for other ranks, judged by its innermost line
    stack: str


class Watchdog:
    """Ends the process if a phase outlasts the timeout; `at` begins a phase. Creation is collective."""

    def __init__(self, run_dir: Path, timeout_minutes: float) -> None:
        self.timeout = 60 * timeout_minutes
        self._minutes, self._run_dir = timeout_minutes, run_dir
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self.hosts = [""] * self._world
        dist.all_gather_object(self.hosts, socket.gethostname())
        self._at, self._idle = "the start", 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        for path in (self._run_dir / LOGS).glob(_PART.replace("*", str(self._rank))):
            path.unlink()  # left by an earlier start
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def at(self, place: str) -> None:
        """Note what this rank does from now on, such as `step 57`."""
        self._at, self._idle = place, 0.0

    def _watch(self) -> None:
        # Count pauses instead of reading a clock: a job that was suspended as a whole is not hung.
        pause = min(1.0, self.timeout / 10)
        while not self._ended.wait(pause):
            self._idle += pause
            if self._idle > self.timeout:
                self._end()

    def _end(self) -> None:
        position = self._position()
        path = self._run_dir / LOGS / _PART.replace("*", str(self._rank))
        # Not files.write_text, whose fsync would wait for a disk that is dead.
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(position)))
        aside.rename(path)
        # The other ranks write theirs within about the time of a step.
        time.sleep(min(30.0, 2.0 + self.timeout / 5))
        positions = _positions(self._run_dir / LOGS)
        if min(position.rank for position in positions) == self._rank:
            text = report(positions, self.hosts, self._minutes)
            print(f"launcher: {text}", file=sys.stderr, flush=True)
            (self._run_dir / _REPORT).write_text(text + "\n")
            record_end(self._rank, RankEndKind.failed, text)
        else:
            time.sleep(2.0)  # srun and torchrun end all ranks after the first: let it be the reporting rank
        os._exit(HUNG)

    def _position(self) -> RankPosition:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        stack = traceback.extract_stack(frame)
        innermost = stack[-1]
        waits = "/torch/distributed/" in innermost.filename or bool(_WAITS.search(innermost.line or ""))
        return RankPosition(self._rank, self._at, waits, "".join(traceback.format_list(stack)))


def _positions(logs: Path) -> list[RankPosition]:
    return [RankPosition(**json.loads(path.read_text())) for path in logs.glob(_PART)]


def report(positions: list[RankPosition], hosts: list[str], minutes: float) -> str:
    """Return a text that names the ranks that did not arrive, that wait, and that do not answer. Pure."""
    answered = {position.rank for position in positions}
    silent = [rank for rank in range(len(hosts)) if rank not in answered]
    absent = [position for position in positions if not position.waits]
    missing = sorted([*silent, *(position.rank for position in absent)])
    who = f"{_ranks(missing, hosts)} did not arrive" if missing else "all ranks wait"
    lines = [f"the run hangs: {who} (nothing has ended for launch.timeout_minutes={minutes:g})"]
    for place in sorted({position.at for position in positions if position.waits}):
        waiting = sorted(p.rank for p in positions if p.waits and p.at == place)
        lines.append(f"at {place}, waiting for others: {_ranks(waiting, hosts)}")
    for position in sorted(absent, key=lambda position: position.rank):
        lines += [f"at {position.at}: {_ranks([position.rank], hosts)}, in", position.stack.rstrip()]
    if silent:
        why = "stopped, stuck in the kernel, or on a node that is gone"
        lines.append(f"no answer from {_ranks(silent, hosts)}: {why}")
    if not missing:
        lines += ["they wait in different places:", *_stacks(positions)]
    return "\n".join(lines)


def _stacks(positions: list[RankPosition]) -> Iterator[str]:
    for stack in dict.fromkeys(position.stack for position in positions):
        ranks = ", ".join(str(position.rank) for position in positions if position.stack == stack)
        yield f"ranks {ranks}:\n{stack.rstrip()}"


def _ranks(ranks: list[int], hosts: list[str]) -> str:
    shown = [f"{rank} on {hosts[rank]}" for rank in ranks[:8]]
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(shown)}{more}"
