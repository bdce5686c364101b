"""The processes of a contestant, as the driver sees them."""

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.contest.job import ROOT, Job
from launcher.launch.this_machine import SHORT_WAITS

_PATIENCE_S = 900.0  # for a turn: a first step may compile


class ContestantFailed(Exception):
    """A rank of a contestant ended or did not answer. The message ends with the end of its log."""


@dataclass(frozen=True)
class Turn:
    """Steps that all ranks took; seconds from the first rank's start to the last rank's end."""

    started: float  # time.monotonic(), which all processes of a machine share
    ended: float
    losses: list[float]  # of each step, over all ranks
    peak_bytes: int | None  # of the rank with the highest peak

    @property
    def seconds(self) -> float:
        """Seconds per step."""
        return (self.ended - self.started) / len(self.losses)


class Ranks:
    """Starts all ranks of a job. Use `first_step`, then `turn` any number of times, then `end`."""

    def __init__(self, job: Job, folder: Path, threads: int) -> None:
        self.job, self._launched = job, time.monotonic()
        self._logs = [folder / f"rank-{rank}.log" for rank in range(job.ranks)]
        path = folder / "job.json"
        replace(job, store=str(folder / "store")).write(path)
        self._processes = [self._start(path, rank, threads) for rank in range(job.ranks)]

    def _start(self, path: Path, rank: int, threads: int) -> "subprocess.Popen[str]":
        environment = {
            **os.environ,
            # As the launcher sets them: ranks that wait for their turn must not spin.
            "OMP_NUM_THREADS": str(threads),
            **SHORT_WAITS,
            # Gloo must not look for an interface.
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            "MASTER_ADDR": "127.0.0.1",
        }
        command = [sys.executable, "-m", "benchmarks.contest.worker", str(path), str(rank)]
        with self._logs[rank].open("w") as log:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                cwd=ROOT, text=True,
            )  # fmt: skip

    def first_step(self) -> tuple[Turn, float]:
        """Wait for the first step; return it, and the seconds since the ranks were started."""
        turn = _turn([self._reply(rank) for rank in range(self.job.ranks)])
        return turn, turn.ended - self._launched

    def turn(self, steps: int, *, settling: int = 0) -> Turn:
        """Let all ranks take `settling` steps, then `steps` timed steps."""
        for process in self._processes:
            assert process.stdin is not None
            try:
                print(settling, steps, file=process.stdin, flush=True)
            except BrokenPipeError:
                break  # the reply below raises with the log
        return _turn([self._reply(rank) for rank in range(self.job.ranks)])

    def end(self) -> list[dict[str, Any]]:
        """End all ranks; return what each reports: the peak of its tensors and its operators, if measured."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        replies = [self._reply(rank) for rank in range(self.job.ranks)]
        self.kill()
        return replies

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _reply(self, rank: int) -> dict[str, Any]:
        process = self._processes[rank]
        assert process.stdout is not None
        answers, _, _ = select.select([process.stdout], [], [], _PATIENCE_S)
        line = process.stdout.readline() if answers else ""
        if not line:
            log = self._logs[rank].read_text(errors="replace")
            self.kill()
            raise ContestantFailed(f"{self.job.label}: rank {rank} failed\n{log[-3000:]}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def _turn(replies: list[dict[str, Any]]) -> Turn:
    steps = zip(*(reply["losses"] for reply in replies), strict=True)
    peaks = [reply["peak_bytes"] for reply in replies if reply["peak_bytes"] is not None]
    return Turn(
        started=min(reply["started"] for reply in replies),
        ended=max(reply["ended"] for reply in replies),
        losses=[fmean(loss for loss in step if loss is not None) for step in steps],
        peak_bytes=max(peaks, default=None),
    )
