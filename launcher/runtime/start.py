"""Starts the ranks of a validated run on this machine or node, or joins ranks of torchrun or srun.

launch_on_this_machine -> local_rank \
launch_on_this_node    -> node_rank   > run_rank -> train.training_run -> train.optimizer_step
join_ranks             ------------- /

Imports torch and deepspeed inside functions only: the parent of spawned ranks does not use them.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from launcher.checkpoint.resume_choice import RunFinished
from launcher.config.errors import NotJoined
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.launch.environment import NodeEnvironment, RankEnvironment, missing_ranks
from launcher.launch.local import RankFailure, Stopped, run_local_ranks, start_method_for
from launcher.launch.rank import STOPPED_EXIT_CODE, StopRequest, failure_of
from launcher.launch.records import RankEndKind, all_recorded, record_end
from launcher.launch.scratch import remove_abandoned, scratch_directory
from launcher.launch.stopping import stop_grace
from launcher.launch.this_machine import share_cores, share_cores_with_tasks
from launcher.runtime.restarts import Restarts, memory_advice
from launcher.runtime.run_dir import LOGS, RunDir, claimed_run_dir, run_path

# Delay in seconds before a rank that only lost a peer reports: the root cause is printed first, and srun or
# torchrun has ended all ranks by then.
_CONSEQUENCE_WAITS = 15.0
_MEETING_NOTE = 30.0  # seconds until a rank says that it waits for the others


def launch_on_this_machine(
    run: RunConfig,
    layout: Layout,
    *,
    cores: int,
    multirun_index: int | None,
    on_directory: Callable[[Path], None] = lambda path: None,
) -> None:
    """Start all ranks and wait for them; start them again if launch.max_restarts says so.

    Calls `on_directory` with the run directory before the ranks start, or if the run is finished already.
    Raises as run_local_ranks does.
    """
    remove_abandoned()  # a run that has finished although its launcher was killed starts no ranks again
    if run.run.dir is not None:
        on_directory(run_path(run, multirun_index=multirun_index))
    with (
        reporting_finished_run(),
        claimed_run_dir(run, layout, multirun_index=multirun_index) as (directory, notes),
    ):
        if run.run.dir is None:
            on_directory(run_path(run).parent / directory.path.name)
        announce(layout, directory, notes)
        share_cores(layout.world_size, cores)
        if layout.device == "cpu":
            # Use the loopback interface: the host name may resolve to an address that ranks cannot reach.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
            preload(layout.device)
        restarts = Restarts(run)
        while True:
            try:
                with scratch_directory() as folder:
                    meeting = folder / "store"
                    target = partial(local_rank, run=run, layout=layout, directory=directory, meeting=meeting)
                    _run_ranks(target, run, layout, range(layout.world_size), directory.logs)
                return
            except RankFailure as failure:
                directory = restarts.directory_after(failure, directory)


def launch_on_this_node(run: RunConfig, layout: Layout, node: NodeEnvironment, *, cores: int) -> None:
    """Start the ranks of this node of several and wait for them; raise as run_local_ranks does."""
    share_cores(node.local_size, cores)
    if layout.device == "cpu":
        preload(layout.device)
    os.environ.update(MASTER_ADDR=node.master_addr, MASTER_PORT=str(node.master_port))
    target = partial(node_rank, run=run, layout=layout, first=node.ranks.start)
    try:
        _run_ranks(target, run, layout, node.ranks, run_path(run) / LOGS)
    except RankFailure as failure:
        if failure.secondary:
            time.sleep(_CONSEQUENCE_WAITS)
        raise


def _run_ranks(
    target: Callable[[int], None], run: RunConfig, layout: Layout, ranks: range, log_dir: Path
) -> None:
    """Run the ranks. Record the end of a killed rank for the Slurm job that may have started them.

    The RankFailure of a rank that the kernel killed for its memory says which settings need less.
    """
    try:
        run_local_ranks(
            target,
            layout.world_size,
            log_dir=log_dir,
            start_method=start_method_for(layout.device),
            local_ranks=ranks,
            save_grace=stop_grace(run),
            stopped_limit=60 * run.launch.timeout_minutes,
        )
    except RankFailure as failure:
        if not failure.secondary:  # a killed rank has not recorded its end
            record_end(
                failure.rank, RankEndKind.halted if failure.halted else RankEndKind.failed, str(failure)
            )
        if failure.out_of_memory:
            raise failure.with_advice(memory_advice(run, layout)) from None
        raise
    except Stopped:
        if not all_recorded(ranks):
            raise
        # Exit with 0: for any other code srun ends the tasks that are still saving.


def preload(device: str) -> None:
    from launcher.engine.distributed import prepare_deepspeed

    prepare_deepspeed(device)
    import launcher.runtime.training  # noqa: F401


def local_rank(rank: int, *, run: RunConfig, layout: Layout, directory: RunDir, meeting: Path) -> None:
    with _recorded_end(rank):
        run_rank(run, layout, rank, rank, f"file://{meeting}", nullcontext(directory), stop=None)


def node_rank(rank: int, *, run: RunConfig, layout: Layout, first: int) -> None:
    """Train as a rank that launch_on_this_node started; `first` is the first rank of the node."""
    with _recorded_end(rank):
        run_rank(run, layout, rank, rank - first, "env://", _agreed_run_dir(run, layout, rank), stop=None)


def join_ranks(run: RunConfig, layout: Layout, ranks: RankEnvironment) -> None:
    """Train as a rank of torchrun or srun. Raises RankFailure, ConfigError, and SystemExit after a stop."""
    share_cores_with_tasks(ranks.local_size)
    os.environ.update(MASTER_ADDR=ranks.master_addr, MASTER_PORT=str(ranks.master_port))
    claimed, stop = _agreed_run_dir(run, layout, ranks.rank), StopRequest()
    try:
        # Listen from start to end: a signal before the first step or a second signal must not end it.
        with _recorded_end(ranks.rank), stop if stop_grace(run) else nullcontext():
            run_rank(run, layout, ranks.rank, ranks.local_rank, "env://", claimed, stop)
    except SystemExit:
        if not all_recorded([ranks.rank]):
            raise
        # Exit with 0: for any other code srun ends the tasks that are still saving.
    except Exception as error:
        raise joined_rank_error(ranks, error, stop_asked=stop.asked) from None


def joined_rank_error(ranks: RankEnvironment, error: Exception, *, stop_asked: bool) -> BaseException:
    """Return the exception to end with. A rank that only lost a peer waits, or is silent after a stop."""
    failure = failure_of(ranks.rank, error)
    if failure.secondary or (failure.refusal and ranks.rank > 0):
        if stop_asked:  # by srun or torchrun, which saw the first rank end
            return SystemExit(STOPPED_EXIT_CODE)
        time.sleep(_CONSEQUENCE_WAITS)
    return error if failure.refusal else RankFailure(ranks.rank, ranks.world_size, failure.detail)


def run_rank(
    run: RunConfig,
    layout: Layout,
    rank: int,
    local_rank: int,
    init_method: str,
    claimed: AbstractContextManager[RunDir],
    stop: StopRequest | None,
) -> None:
    """Join the other ranks, train, leave; `stop` listens already. Raises SystemExit after a stop."""
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    prepare_deepspeed(layout.device)
    from launcher.engine.work_time import work_time
    from launcher.runtime.training import training_run

    work, finished = work_time(layout.device), True
    with work.collectives.timing_collectives():
        with _meeting(init_method, rank, local_rank, layout.world_size):
            device = join(
                rank=rank,
                world_size=layout.world_size,
                local_rank=local_rank,
                device=layout.device,
                init_method=init_method,
                timeout_minutes=run.launch.timeout_minutes,
            )
        with reporting_finished_run(quiet=rank > 0), claimed as directory:
            finished = training_run(run, layout, directory, device, work, stop)
        leave()
    if not finished:
        raise SystemExit(STOPPED_EXIT_CODE)


@contextmanager
def _meeting(init_method: str, rank: int, local_rank: int, world_size: int) -> Iterator[None]:
    """Say what a rank waits for if the others do not come soon. Raises NotJoined if they never come."""
    from torch.distributed import DistError

    def say() -> None:
        waits = missing_ranks(os.environ, rank, world_size)
        print(f"launcher: since {_MEETING_NOTE:.0f} s, {waits}", file=sys.stderr, flush=True)

    note = threading.Timer(_MEETING_NOTE, say)
    note.daemon = True
    if local_rank == 0 and init_method == "env://":
        note.start()
    try:
        yield
    except DistError as error:
        if init_method != "env://":
            raise
        raise NotJoined(missing_ranks(os.environ, rank, world_size, str(error))) from None
    finally:
        note.cancel()


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
        kind = RankEndKind.lost if failure.secondary else RankEndKind.failed
        kind = RankEndKind.halted if failure.halted else kind
        record_end(rank, RankEndKind.refused if failure.refusal else kind, error)
        raise


@contextmanager
def _agreed_run_dir(run: RunConfig, layout: Layout, rank: int) -> Iterator[RunDir]:
    """Make and hold the directory on rank 0; yield it on all ranks. Entering is collective over the world."""
    from torch.distributed import broadcast_object_list

    agreed: list[RunDir | Exception | None] = [None]
    with ExitStack() as stack:
        if rank == 0:
            try:
                directory, notes = stack.enter_context(claimed_run_dir(run, layout))
                announce(layout, directory, notes)
                agreed[0] = directory
            except Exception as error:  # sent to the other ranks too, which wait for the directory
                agreed[0] = error
        broadcast_object_list(agreed)
        if isinstance(agreed[0], Exception):
            raise agreed[0]
        assert agreed[0] is not None
        yield agreed[0]


@contextmanager
def reporting_finished_run(*, quiet: bool = False) -> Iterator[None]:
    """Context manager that prints that the run is finished, instead of raising RunFinished."""
    try:
        yield
    except RunFinished as finished:
        if not quiet:
            print(f"finished {finished}", flush=True)


def announce(layout: Layout, directory: RunDir, notes: Sequence[str] = ()) -> None:
    for note in (*layout.notes, *notes):
        print(f"note     {note}")
    print(f"layout   {layout.describe()}")
    print(f"run      {directory.path}", flush=True)
