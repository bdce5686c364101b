"""From a validated run to its ranks: our own on this machine or node, or those torchrun or srun started.

Imports torch and deepspeed inside functions only: the parent of spawned ranks has no use for them.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.launch.environment import NodeEnvironment, RankEnvironment
from launcher.launch.local import RankFailure, Stopped, run_local_ranks
from launcher.launch.machine import share_cores, share_cores_with_tasks
from launcher.launch.rank import STOPPED_EXIT_CODE, StopRequest, failure_of
from launcher.launch.records import RankEndKind, all_recorded, record_end
from launcher.runtime.run_dir import LOGS, RunDir, claimed_run_dir, run_path, stop_grace

# Until what only lost another rank says so: by then that one has, and srun or torchrun has ended all.
_CONSEQUENCE_WAITS = 15.0  # seconds


@dataclass(frozen=True)
class _Own:
    """A rank's place."""

    rank: int
    local_rank: int
    init_method: str


def launch_on_this_machine(run: RunConfig, layout: Layout, *, cores: int, multirun_index: int | None) -> None:
    """Start the ranks, wait for them, raise what they raise (see run_local_ranks)."""
    with claimed_run_dir(run, layout, multirun_index=multirun_index) as (directory, notes):
        announce(layout, directory, notes)
        share_cores(layout.world_size, cores)
        if layout.device == "cpu":
            # Ranks of one machine meet on the loopback interface, whatever its host name resolves to.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
            preload(layout.device)
        own = range(layout.world_size)
        with _answered_for(own), tempfile.TemporaryDirectory(prefix="launcher-") as meeting:
            store = Path(meeting) / "store"
            run_local_ranks(
                partial(local_rank, run=run, layout=layout, directory=directory, meeting=store),
                layout.world_size,
                log_dir=directory.logs,
                start_method=_start_method(layout),
                save_grace=stop_grace(run),
            )


def launch_on_this_node(run: RunConfig, layout: Layout, node: NodeEnvironment, *, cores: int) -> None:
    """Start the ranks of this node, one of several; wait for them, raise what they raise."""
    share_cores(node.ranks_per_node, cores)
    if layout.device == "cpu":
        preload(layout.device)
    os.environ.update(MASTER_ADDR=node.master_addr, MASTER_PORT=str(node.master_port))
    with _answered_for(node.ranks):
        try:
            run_local_ranks(
                partial(node_rank, run=run, layout=layout, first=node.ranks.start),
                layout.world_size,
                local_ranks=node.ranks,
                log_dir=run_path(run) / LOGS,
                start_method=_start_method(layout),
                save_grace=stop_grace(run),
            )
        except RankFailure as failure:
            if failure.secondary:
                time.sleep(_CONSEQUENCE_WAITS)
            raise


@contextmanager
def _answered_for(ranks: range) -> Iterator[None]:
    """Around the ranks that this process starts, perhaps for a job that asks how they ended."""
    try:
        yield
    except RankFailure as failure:
        if not failure.secondary:
            record_end(failure.rank, RankEndKind.failed, str(failure))  # a killed one has left no word
        raise
    except Stopped:
        if not all_recorded(ranks):
            raise
        # To srun any code but 0 is a crash, for which it ends the tasks that are still at it.


def _start_method(layout: Layout) -> Literal["fork", "spawn"]:
    # Forked ranks share the imports: eight start as fast as one. CUDA cannot be forked safely.
    return "fork" if layout.device == "cpu" else "spawn"


def preload(device: str) -> None:
    """Import all that a rank needs, before it is forked."""
    from launcher.engine.distributed import prepare_deepspeed

    prepare_deepspeed(device)
    import launcher.runtime.train  # noqa: F401


def local_rank(rank: int, *, run: RunConfig, layout: Layout, directory: RunDir, meeting: Path) -> None:
    """What one rank started by us does, where all are on this machine."""
    own = _Own(rank, local_rank=rank, init_method=f"file://{meeting}")
    with _recorded_end(rank):
        _run_rank(run, layout, own, nullcontext(directory), stop=None)


def node_rank(rank: int, *, run: RunConfig, layout: Layout, first: int) -> None:
    """What one rank started by the launcher of its node does."""
    own = _Own(rank, local_rank=rank - first, init_method="env://")
    with _recorded_end(rank):
        _run_rank(run, layout, own, _agreed_run_dir(run, layout, rank), stop=None)


def join_ranks(run: RunConfig, layout: Layout, ranks: RankEnvironment) -> None:
    """What one rank started by torchrun or srun does. The first rank claims the run directory for all.

    Raises RankFailure, ConfigError; SystemExit, where it was told to stop and is saved or lost the others.
    """
    share_cores_with_tasks(ranks.local_size)
    os.environ.update(MASTER_ADDR=ranks.master_addr, MASTER_PORT=str(ranks.master_port))
    own = _Own(ranks.rank, local_rank=ranks.local_rank, init_method="env://")
    stop = StopRequest()
    try:
        # To the very end: a second signal while it is saved, or one before it has begun, does no harm.
        with _recorded_end(own.rank), stop if stop_grace(run) else nullcontext():
            _run_rank(run, layout, own, _agreed_run_dir(run, layout, own.rank), stop)
    except SystemExit:
        if not all_recorded([own.rank]):
            raise
        # To srun any code but 0 is a crash, for which it ends the tasks that are still at it.
    except Exception as error:
        raise _told(ranks, error, told_to_stop=stop.asked) from None


def _told(ranks: RankEnvironment, error: Exception, *, told_to_stop: bool) -> BaseException:
    """What a rank without a parent of ours has to say: the first to end is the one that is heard."""
    failure = failure_of(ranks.rank, error)
    if failure.secondary or (failure.refusal and ranks.rank > 0):
        if told_to_stop:  # by srun or torchrun, which saw the first one end
            return SystemExit(STOPPED_EXIT_CODE)
        time.sleep(_CONSEQUENCE_WAITS)
    return error if failure.refusal else RankFailure(ranks.rank, ranks.world_size, failure.detail)


def _run_rank(
    run: RunConfig,
    layout: Layout,
    own: _Own,
    claimed: AbstractContextManager[RunDir],
    stop: StopRequest | None,
) -> None:
    """`stop` is one that the caller listens with already. Raises SystemExit after a stop."""
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    prepare_deepspeed(layout.device)
    from launcher.runtime.train import training_run

    device = join(
        rank=own.rank,
        world_size=layout.world_size,
        local_rank=own.local_rank,
        device=layout.device,
        init_method=own.init_method,
        timeout_minutes=run.launch.timeout_minutes,
    )
    with claimed as directory:
        finished = training_run(run, layout, directory, device, stop)
    leave()
    if not finished:
        raise SystemExit(STOPPED_EXIT_CODE)


@contextmanager
def _recorded_end(rank: int) -> Iterator[None]:
    try:
        yield
    except SystemExit as end:
        if end.code == STOPPED_EXIT_CODE:
            record_end(rank, RankEndKind.stopped)
        raise
    except Exception as error:
        failure = failure_of(rank, error)
        kind = (
            RankEndKind.refused
            if failure.refusal
            else RankEndKind.lost
            if failure.secondary
            else RankEndKind.failed
        )
        record_end(rank, kind, error)
        raise


@contextmanager
def _agreed_run_dir(run: RunConfig, layout: Layout, rank: int) -> Iterator[RunDir]:
    """Rank 0 makes and holds the directory, and tells the others. Entering is collective over the world."""
    from torch.distributed import broadcast_object_list

    agreed: list[RunDir | Exception | None] = [None]
    with ExitStack() as stack:
        if rank == 0:
            try:
                directory, notes = stack.enter_context(claimed_run_dir(run, layout))
                announce(layout, directory, notes)
                agreed[0] = directory
            except Exception as error:  # told to the others too, or they would wait for it
                agreed[0] = error
        broadcast_object_list(agreed)
        if isinstance(agreed[0], Exception):
            raise agreed[0]
        assert agreed[0] is not None
        yield agreed[0]


def announce(layout: Layout, directory: RunDir, notes: Sequence[str] = ()) -> None:
    for note in (*layout.notes, *notes):
        print(f"note     {note}")
    print(f"layout   {layout.describe()}")
    print(f"run      {directory.path}", flush=True)
