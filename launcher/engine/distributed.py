"""Joining the ranks: torch.distributed first, then DeepSpeed on top of it."""

import logging
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def prepare_deepspeed(device: str) -> None:
    """Import deepspeed for "cpu" or "cuda", quietly, without its slow or leaking habits. Once per process."""
    # Its own detection warns on every machine without a GPU, and takes one for a CPU run on a GPU machine.
    os.environ["DS_ACCELERATOR"] = device
    # With LOCAL_SIZE set DeepSpeed's shared-memory module takes 69 MB a rank in /dev/shm and keeps it.
    os.environ.pop("LOCAL_SIZE", None)
    import deepspeed.ops

    # The first engine would import this, and with it torch._inductor: 2 s in every forked rank.
    import deepspeed.runtime.zero.muon.muon_optimizer
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # Said to be incompatible, it is not JIT-compiled at init_distributed: 20 s, for what gloo does too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.13 says it at every all_gather_into_tensor and reduce_scatter_tensor of DeepSpeed's.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*(all_gather|reduce_scatter).*")
    # The pipeline sends activations by broadcast, and their gradients back itself.
    warnings.filterwarnings("ignore", category=UserWarning, message=r"c10d::broadcast_: an autograd kernel")


def join(
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    device: str,
    init_method: str,
    timeout_minutes: float = 30.0,
) -> torch.device:
    """Collective over the world: initialise the process group and DeepSpeed; return this rank's device.

    A collective that takes longer than twice `timeout_minutes` fails: by then the watchdog has told more.
    """
    import deepspeed

    # DeepSpeed's pipeline and accelerator code read these and nothing else.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    if device == "cpu":
        own = torch.device("cpu")
    else:
        # Where each task is given a GPU of its own, that is its number 0.
        own = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(own)
    dist.init_process_group(
        BACKENDS[device],
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=2 * timeout_minutes),
    )
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return own


def set_timeouts(timeout_minutes: float) -> None:
    """As join, of every group made since: DeepSpeed makes its own with torch's defaults."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(minutes=2 * timeout_minutes), group)


def leave() -> None:
    """Collective: end the process group, so that no rank is cut off by a peer that exits first."""
    dist.barrier()
    dist.destroy_process_group()
