"""A rank of a contestant: `python -m benchmarks.contest.worker JOB.json RANK`.

The rank trains, and takes its turns from standard input: each line is a number of steps that are not timed,
and a number of steps that are. After each turn it writes a line of JSON with the start and the end of the
timed steps and their losses. The turn ends when the device has finished and the losses are read. Other output
goes to standard error.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from benchmarks.contest.job import Job
from benchmarks.contest.operators import OperatorTimes


class EndOfTraining(BaseException):
    """Raised in a peer's loop when there are no more turns. Not an Exception, so that no peer catches it."""


class Turns:
    """Called by a peer after each step; waits there for the next turn."""

    def __init__(self, job: Job, replies: IO[str]) -> None:
        from benchmarks.contest.memory import PeakMemory

        self.memory, self.operators = PeakMemory(job), OperatorTimes(job)
        self._cuda, self._replies = job.device == "cuda", replies
        self._losses: list[Any] = []
        self._settling, self._left, self._started = 0, 1, time.monotonic()
        self._steps = 0  # after the first turn

    def after_step(self, loss: Any) -> None:
        if self._settling:
            self._settling -= 1
        else:
            self._losses.append(loss)
            self._left -= 1
        if self._left == 0:
            self._end_turn()
            self._settling, self._left = self._next_turn()
            self._steps += self._settling + self._left
        if not self._settling and not self._losses:
            self._synchronise()
            self._started = time.monotonic()

    def _end_turn(self) -> None:
        losses = [None if loss is None else float(loss) for loss in self._losses]
        self._losses.clear()
        self._synchronise()
        turn = {"started": self._started, "ended": time.monotonic(), "losses": losses}
        self._reply({**turn, "peak_bytes": self.memory.peak_on_gpu()})
        self.operators.begin()
        self.memory.begin()  # the first turn is one step, which makes the states of the optimizer
        if self._cuda:
            import torch

            torch.cuda.empty_cache()  # the contestants that wait share the memory of the GPU

    def _next_turn(self) -> tuple[int, int]:
        line = sys.stdin.readline()
        if not line.strip():
            raise EndOfTraining
        settling, timed = map(int, line.split())
        return settling, timed

    def end(self) -> None:
        operators = self.operators.end(self._steps)
        self._reply({"peak_bytes": self.memory.end(), "operators": operators})

    def _reply(self, values: dict[str, Any]) -> None:
        print(json.dumps(values), file=self._replies, flush=True)

    def _synchronise(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.synchronize()


def main(path: str, rank: int) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job.read(Path(path))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(job.ranks), LOCAL_RANK=str(rank))
    os.environ.pop("LOCAL_SIZE", None)  # DeepSpeed would allocate shared memory for it
    turns = Turns(job, replies)
    try:
        importlib.import_module(f"benchmarks.peers.{job.peer}").train(job, rank, turns.after_step)
    except EndOfTraining:
        turns.end()
    replies.flush()
    # Without the destructors of process groups and threads, which wait for ranks that have ended.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
