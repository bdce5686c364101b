"""From a validated run to its ranks: our own on this machine, or those torchrun or srun started.

Imports torch and deepspeed inside functions only: the parent of spawned ranks has no use for them.
"""

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Literal

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.launch.environment import RankEnvironment
from launcher.launch.local import run_local_ranks
from launcher.launch.machine import share_cores
from launcher.runtime.run_dir import RunDir, claim_run_dir, stop_grace


def train_on_this_machine(run: RunConfig, layout: Layout, *, cores: int, multirun_index: int | None) -> None:
    """Start the ranks, wait for them, raise what they raise (see run_local_ranks)."""
    directory = claim_run_dir(run, layout, multirun_index=multirun_index)
    announce(layout, directory)
    share_cores(layout.world_size, cores)
    if layout.device == "cpu":
        # Ranks of one machine meet on the loopback interface, whatever its host name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        preload(layout.device)
    with tempfile.TemporaryDirectory(prefix="launcher-") as meeting:
        target = partial(
            local_rank, run=run, layout=layout, directory=directory, meeting=Path(meeting) / "store"
        )
        # Forked ranks share the imports above: eight start as fast as one. CUDA cannot be forked safely.
        start_method: Literal["fork", "spawn"] = "fork" if layout.device == "cpu" else "spawn"
        run_local_ranks(
            target,
            layout.world_size,
            log_dir=directory.logs,
            start_method=start_method,
            save_grace=stop_grace(run),
        )


def preload(device: str) -> None:
    """Import all that a rank needs, before it is forked."""
    from launcher.engine.distributed import prepare_deepspeed

    prepare_deepspeed(device)
    import launcher.runtime.train  # noqa: F401


def local_rank(rank: int, *, run: RunConfig, layout: Layout, directory: RunDir, meeting: Path) -> None:
    """What one rank started by us does."""
    _train(run, layout, directory, rank=rank, local_rank=rank, init_method=f"file://{meeting}")


def train_as_joined_rank(run: RunConfig, layout: Layout, ranks: RankEnvironment) -> None:
    """What one rank started by torchrun or srun does. The first rank claims the run directory for all."""
    os.environ.update(MASTER_ADDR=ranks.master_addr, MASTER_PORT=str(ranks.master_port))
    _train(run, layout, None, rank=ranks.rank, local_rank=ranks.local_rank, init_method="env://")


def _train(
    run: RunConfig, layout: Layout, directory: RunDir | None, *, rank: int, local_rank: int, init_method: str
) -> None:
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    prepare_deepspeed(layout.device)
    from launcher.runtime.train import train

    device = join(
        rank=rank,
        world_size=layout.world_size,
        local_rank=local_rank,
        device=layout.device,
        init_method=init_method,
    )
    train(run, layout, directory or _agreed_run_dir(run, layout, rank), device)
    leave()


def _agreed_run_dir(run: RunConfig, layout: Layout, rank: int) -> RunDir:
    """Collective over the world: rank 0 makes the directory and tells the others."""
    from torch.distributed import broadcast_object_list

    agreed: list[RunDir | Exception | None] = [None]
    if rank == 0:
        try:
            directory = claim_run_dir(run, layout)
            announce(layout, directory)
            agreed[0] = directory
        except Exception as error:  # told to the others too, or they would wait for it
            agreed[0] = error
    broadcast_object_list(agreed)
    if isinstance(agreed[0], Exception):
        raise agreed[0]
    assert agreed[0] is not None
    return agreed[0]


def announce(layout: Layout, directory: RunDir) -> None:
    for note in layout.notes:
        print(f"note     {note}")
    print(f"layout   {layout.describe()}")
    print(f"run      {directory.path}", flush=True)
