"""Join a rank to the others: initialise torch.distributed, then DeepSpeed on top of it."""

import json
import logging
import os
import socket
import warnings
from collections.abc import Iterable, Mapping
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from launcher.engine.host_memory import keep_freed_memory

_MOST_COLLECTIVES = 3  # in a message: a GPU may have many collectives queued behind the first

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def prepare_deepspeed(device: str) -> None:
    """Import deepspeed for "cpu" or "cuda", silent and without slow compilations; once per process."""
    # DeepSpeed's own detection warns on every machine without a GPU, and selects the GPU for a CPU run.
    os.environ["DS_ACCELERATOR"] = device
    # If LOCAL_SIZE is set, DeepSpeed's shared-memory module takes 69 MB per rank in /dev/shm and never frees
    # them.
    os.environ.pop("LOCAL_SIZE", None)
    import deepspeed.ops

    # The first step of an optimizer would import this: 2 s in every forked rank.
    import torch._dynamo  # noqa: F401
    from deepspeed.utils import logger

    _import_muon()
    logger.setLevel(logging.ERROR)
    # Marked incompatible, this operation is not JIT-compiled by init_distributed: that takes 20 s, and gloo
    # does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.13 warns at every all_gather_into_tensor and reduce_scatter_tensor, which DeepSpeed calls, and
    # at every all_reduce_coalesced.
    several = r".*(all_gather|reduce_scatter|all_reduce_coalesced).*"
    warnings.filterwarnings("ignore", category=FutureWarning, message=several)
    # The pipeline sends activations by broadcast and returns their gradients itself, so autograd's
    # warning about broadcast does not apply.
    warnings.filterwarnings("ignore", category=UserWarning, message=r"c10d::broadcast_: an autograd kernel")


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer, which the first engine would import, without a compiler.

    It compiles its functions when it is imported, and so imports torch._inductor: a fifth of the time of all
    imports. No run of the launcher calls them.
    """
    import deepspeed.runtime.compiler as compiler

    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_


def join(
    *, rank: int, world_size: int, local_rank: int, device: str, init_method: str, timeout_minutes: float = 30
) -> torch.device:
    """Initialise torch.distributed and DeepSpeed; return the device. Collective over the world."""
    import deepspeed

    # The pipeline and accelerator code of DeepSpeed read these variables.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    if device == "cpu":
        rank_device = torch.device("cpu")
        keep_freed_memory()
    else:
        # If each Slurm task sees only its own GPU, that GPU has the index 0.
        rank_device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
        torch.cuda.set_device(rank_device)
    # The watchdog reports a hang in more detail, after half of this time.
    timeout = timedelta(minutes=2 * timeout_minutes)
    dist.init_process_group(BACKENDS[device], init_method, timeout, world_size, rank)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return rank_device


def set_timeouts(timeout_minutes: float) -> None:
    """Set the timeout of `join` on all process groups: groups that DeepSpeed creates have torch's default."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(minutes=2 * timeout_minutes), group)


def gathered_hosts() -> list[str]:
    """Return the host name of each rank. Collective over the world."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts


def active_collectives() -> list[str]:
    """Return the oldest unfinished collectives of this rank in words, by torch's flight recorder."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)  # private, and new in torch 2.9
    if dump is None:
        return []
    return collectives_in_words(json.loads(dump(includeCollectives=True)).get("entries", ()))


def collectives_in_words(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return descriptions of the first entries of a flight recorder that are not finished. Pure."""
    unfinished = [entry for entry in entries if not entry["retired"]]
    return [
        f"{entry['profiling_name']} of {_tensors(entry['input_sizes'])} in group {entry['process_group'][0]} "
        f"(number {entry['collective_seq_id']} of the group)"
        for entry in unfinished[:_MOST_COLLECTIVES]
    ]


def _tensors(sizes: list[list[int]]) -> str:
    """Return the sizes of a few tensors, and of more only how many elements they have."""
    if len(sizes) <= 2:
        return f"sizes {sizes}"
    return f"{len(sizes)} tensors with {sum(map(prod, sizes))} elements"


def leave() -> None:
    """Wait for all ranks, so that none loses its peers, then destroy the process group. Collective."""
    dist.barrier()
    dist.destroy_process_group()
