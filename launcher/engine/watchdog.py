"""Ends ranks that hang, and reports which ranks the others wait for, and in which collective.

Each rank watches itself in a thread: its main thread may hang in a collective, or on a dead disk.
"""

import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from launcher.engine.distributed import active_collectives, gathered_hosts
from launcher.text import ranks_on_hosts

HUNG = 124  # the exit code of timeout(1)
MEASURING_MINUTES = 10.0  # for ranks that verify or calibrate starts: their steps and probes are short
REPORT = "hang.txt"  # beside the directory of the logs
_PART = "hang_rank_*.json"

# A rank waits for other ranks in torch.distributed, or in a line that waits for a handle or for a value from
# the GPU, whose kernels may wait for other ranks.
_WAITS = re.compile(r"\.(wait|item|tolist|cpu|synchronize|_cuda_synchronize)\(|\bfloat\(")
_TORCH_DISTRIBUTED = "/torch/distributed/"
# Frames between the caller of a collective and torch: the stopwatch and DeepSpeed's wrappers.
_BETWEEN = ("/torch/", "/deepspeed/comm/", "/deepspeed/utils/", "/launcher/engine/stopwatch.py")
_RECORDER_PATIENCE = 2.0  # seconds


@dataclass(frozen=True)
class RankPosition:
    """The position of a rank in the program when the run has hung."""

    rank: int
    at: str
    waits: bool  # for other ranks, judged by its innermost line
    stack: str
    collective: str = ""  # that the rank waits in, if known


class Watchdog:
    """Ends the process if a phase outlasts the timeout; `at` begins a phase. Creation is collective.

    All ranks write to the directory `logs`. The reporting rank calls `on_hang` with its report. `setting` is
    the field of the timeout, if there is one.
    """

    def __init__(
        self,
        logs: Path,
        timeout_minutes: float,
        *,
        setting: str | None = None,
        on_hang: Callable[[str], None] = lambda report: None,
    ) -> None:
        self.timeout = 60 * timeout_minutes
        self._limit = f"{setting}={timeout_minutes:g}" if setting else f"{timeout_minutes:g} minutes"
        self._logs, self._on_hang = logs, on_hang
        self._rank, self.hosts = dist.get_rank(), gathered_hosts()
        self._at, self._idle = "the start", 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        for path in self._logs.glob(_PART.replace("*", str(self._rank))):
            with suppress(OSError):
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
        path = self._logs / _PART.replace("*", str(self._rank))
        with suppress(OSError):  # a full disk must not keep a hung run alive
            # Not files.write_text, whose fsync would wait for a disk that is dead.
            aside = path.with_suffix(".tmp")
            aside.write_text(json.dumps(asdict(position)))
            aside.rename(path)
        # The other ranks write theirs within about the time of a step.
        time.sleep(min(30.0, 2.0 + self.timeout / 5))
        positions = _positions(self._logs) or [position]
        if min(position.rank for position in positions) == self._rank:
            text = report(positions, self.hosts, self._limit)
            print(f"launcher: {text}", file=sys.stderr, flush=True)
            with suppress(OSError):
                (self._logs.parent / REPORT).write_text(text + "\n")
            self._on_hang(text)
        else:
            time.sleep(2.0)  # srun and torchrun end all ranks after the first: let it be the reporting rank
        os._exit(HUNG)

    def _position(self) -> RankPosition:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        stack = traceback.extract_stack(frame)
        innermost = stack[-1]
        waits = _TORCH_DISTRIBUTED in innermost.filename or bool(_WAITS.search(innermost.line or ""))
        collective = "; ".join([*_collective_in(stack), *self._unfinished()]) if waits else ""
        return RankPosition(self._rank, self._at, waits, "".join(traceback.format_list(stack)), collective)

    def _unfinished(self) -> list[str]:
        """Return the unfinished collectives, unless the recorder hangs too."""
        answer: list[str] = []
        asking = threading.Thread(target=lambda: answer.extend(active_collectives()), daemon=True)
        asking.start()
        asking.join(_RECORDER_PATIENCE)
        return answer


def _positions(logs: Path) -> list[RankPosition]:
    """Return the positions in the ranks' files, without files that are damaged."""
    positions = []
    for path in logs.glob(_PART):
        with suppress(OSError, ValueError, TypeError):
            positions.append(RankPosition(**json.loads(path.read_text())))
    return positions


def _collective_in(stack: Sequence[traceback.FrameSummary]) -> Iterator[str]:
    """Yield the collective that the stack stands in and its caller, if there is one."""
    inner = [frame for frame in stack if frame.filename.endswith(f"{_TORCH_DISTRIBUTED}distributed_c10d.py")]
    callers = [frame for frame in stack if not any(part in frame.filename for part in _BETWEEN)]
    if inner and callers:
        place = "/".join(Path(callers[-1].filename).parts[-3:])
        yield f"{inner[0].name}, called by {callers[-1].name} ({place}:{callers[-1].lineno})"


def report(positions: list[RankPosition], hosts: Sequence[str], limit: str) -> str:
    """Return a text that names the ranks that did not arrive, that wait, and that do not answer. Pure."""
    answered = {position.rank for position in positions}
    silent = [rank for rank in range(len(hosts)) if rank not in answered]
    absent = [position for position in positions if not position.waits]
    missing = sorted([*silent, *(position.rank for position in absent)])
    who = f"{ranks_on_hosts(missing, hosts)} did not arrive" if missing else "all ranks wait"
    lines = [f"the run hangs: {who} (nothing has ended for {limit})"]
    for place, collective in sorted({(p.at, p.collective) for p in positions if p.waits}):
        waiting = sorted(p.rank for p in positions if p.waits and (p.at, p.collective) == (place, collective))
        where = f" in {collective}" if collective else ""
        lines.append(f"at {place}, waiting for others{where}: {ranks_on_hosts(waiting, hosts)}")
    for position in sorted(absent, key=lambda position: position.rank):
        lines += [f"at {position.at}: {ranks_on_hosts([position.rank], hosts)}, in", position.stack.rstrip()]
    if silent:
        why = "stopped, stuck in the kernel, or on a node that is gone"
        lines.append(f"no answer from {ranks_on_hosts(silent, hosts)}: {why}")
    if not missing:
        lines += ["they wait in different places:", *_stacks(positions)]
    return "\n".join(lines)


def _stacks(positions: list[RankPosition]) -> Iterator[str]:
    for stack in dict.fromkeys(position.stack for position in positions):
        ranks = ", ".join(str(position.rank) for position in positions if position.stack == stack)
        yield f"ranks {ranks}:\n{stack.rstrip()}"
