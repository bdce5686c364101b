"""Gloo ranks for tests: `pool(world).run(...)` for kept ranks, `run_fresh(...)` for new ones.

Ranks are forked from the pytest process, where torch is imported already: a pool of two starts in a few
hundredths of a second. They meet through a file, so no test can lose a race for a port.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launcher.launch.orphans import die_with
from launcher.parallel.mesh import MeshShape, ProcessMesh

T = TypeVar("T")

# A fork does not take OpenMP's threads along, and deadlocks in them: start none.
torch.set_num_threads(1)


def run_fresh(function: Callable[..., T], world: int, *args: Any, timeout: float = 120) -> list[T]:
    """Call function(rank, world, init_method, *args) in `world` new processes; their results in rank order.

    `init_method` is the file:// URL for init_process_group. What a rank raises is raised here, with its
    traceback as a note; after `timeout` seconds, TimeoutError says where each rank hangs. Any callable
    will do; results travel by pickle.
    """
    with tempfile.TemporaryDirectory() as folder:

        def once(rank: int, connection: Connection) -> None:
            connection.send_bytes(_answer(function, rank, world, f"file://{folder}/store", *args))
            signal.pause()  # the parent ends all ranks at once, so that none loses a peer that was quicker

        ranks = _Ranks(once, world, Path(folder))
        try:
            return ranks.results(timeout)
        finally:
            ranks.kill()


_POOLS: dict[int, "RankPool"] = {}


def pool(world: int) -> "RankPool":
    """The ranks of this world size, started at their first use and kept for the tests of a file."""
    if world not in _POOLS:
        _POOLS[world] = RankPool(world)
    return _POOLS[world]


def close_pools() -> None:
    """End all ranks: gloo's threads of a waiting rank wake a hundred times a second."""
    for each in _POOLS.values():
        each.close()


class RankPool:
    """Ranks with an initialised gloo group. After a failure they are replaced by new ones."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._folder = tempfile.TemporaryDirectory()
        self._ranks: _Ranks | None = None

    def run(self, function: Callable[..., T], *args: Any, timeout: float = 120) -> list[T]:
        """Call function(rank, world, *args) on each rank; their results in rank order.

        `function` and `args` travel by pickle: a function at module level. See run_fresh for failures.
        Each call starts with torch's default generator seeded alike. Use `mesh` for process groups.
        """
        if self._ranks is None:
            self._ranks = self._start()
        call = pickle.dumps((function, args))
        try:
            for rank in self._ranks.members:
                rank.connection.send_bytes(call)
            return self._ranks.results(timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.kill()
            self._ranks = None

    def _start(self) -> "_Ranks":
        folder = tempfile.mkdtemp(dir=self._folder.name)

        def serve(rank: int, connection: Connection) -> None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=self.world,
                timeout=timedelta(hours=1),  # the parent's is the one that tells where
            )
            while True:
                function, args = pickle.loads(connection.recv_bytes())
                torch.manual_seed(0)
                connection.send_bytes(_answer(function, rank, self.world, *args))

        return _Ranks(serve, self.world, Path(folder), daemon=True)


@cache
def mesh(tensor: int = 1, data: int = 1, pipeline: int = 1, context: int = 1, expert: int = 1) -> ProcessMesh:
    """The mesh of a pool's rank, made once per shape: every new group costs gloo threads and sockets."""
    return ProcessMesh.create(MeshShape(pipeline, data * context, tensor, expert, context))


@dataclass(frozen=True)
class _Rank:
    process: BaseProcess
    connection: Connection
    stacks: Path


class _Ranks:
    """`world` forked processes, each running body(rank, connection).

    Daemons end with the session by themselves, but may not have children of their own.
    """

    def __init__(
        self, body: Callable[[int, Connection], None], world: int, folder: Path, *, daemon: bool = False
    ) -> None:
        fork = multiprocessing.get_context("fork")
        self.members: list[_Rank] = []
        for rank in range(world):
            ours, theirs = fork.Pipe()
            stacks = folder / f"stacks.{rank}"
            process = fork.Process(
                target=_begin,
                args=(body, rank, theirs, stacks, os.getpid()),
                name=f"rank {rank} of {world}",
                daemon=daemon,
            )
            process.start()
            theirs.close()  # so that a rank which dies is an end of file here
            self.members.append(_Rank(process, ours, stacks))

    def results(self, timeout: float) -> list[Any]:
        """One answer of each rank, or the first failure raised."""
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < len(self.members):
            waiting = {m.connection: rank for rank, m in enumerate(self.members) if rank not in results}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(self._where_they_hang(sorted(waiting.values()), timeout))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                results[rank] = self._result(rank, connection)
        return [results[rank] for rank in range(len(self.members))]

    def kill(self) -> None:
        for member in self.members:
            member.process.kill()
        for member in self.members:
            member.process.join()
            member.connection.close()

    def _result(self, rank: int, connection: Connection) -> Any:
        try:
            result, error, trace = pickle.loads(connection.recv_bytes())
        except EOFError:
            process = self.members[rank].process
            process.join(5)
            raise RuntimeError(f"{process.name} died with exit code {process.exitcode}") from None
        if error is not None:
            error.add_note(f"\nOn rank {rank} of {len(self.members)}:\n{trace}")
            raise error
        return result

    def _where_they_hang(self, ranks: Sequence[int], timeout: float) -> str:
        for rank in ranks:
            os.kill(self.members[rank].process.pid or 0, signal.SIGUSR1)
        time.sleep(0.5)
        stacks = "\n".join(f"rank {rank}:\n{self.members[rank].stacks.read_text()}" for rank in ranks)
        return f"ranks {list(ranks)} of {len(self.members)} did not answer within {timeout} s\n{stacks}"


def _begin(
    body: Callable[[int, Connection], None], rank: int, connection: Connection, stacks: Path, parent: int
) -> None:
    die_with(parent)
    with stacks.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.manual_seed(0)
        body(rank, connection)


def _answer(function: Callable[..., Any], *args: Any) -> bytes:
    """(result, None, "") or (None, exception, its traceback), pickled."""
    try:
        return pickle.dumps((function(*args), None, ""))
    except BaseException as error:
        return pickle.dumps((None, _portable(error), traceback.format_exc()))


def _portable(error: BaseException) -> BaseException:
    """The exception itself, if it survives pickling."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        return error if type(copy) is type(error) else RuntimeError(repr(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
