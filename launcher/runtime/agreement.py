"""The one all-reduce of a logged step: loss, stop and save requests, memory, step time and work time."""

import resource
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.parallel.all_reduce import all_reduce_

_RANK_BITS = 24
_NO_SHARE = -(1 << 62)  # below the bits of any float


@dataclass(frozen=True)
class RankValues:
    """The values that one rank contributes. All but loss and work are reduced to their maximum."""

    loss: Tensor  # this rank's share, still on the device
    loss_share: tuple[int, int]  # as Engine.loss_share
    skips: Tensor  # as UpdateGuard.counts, alike on all ranks, still on the device
    stop_requested: bool = False
    save_due: bool = False
    step_seconds: float = 0.0
    work_seconds: float = 0.0  # per step, without waiting for other ranks
    allocated_bytes: int = 0
    compile_failed: bool = False


@dataclass(frozen=True)
class WorldValues:
    loss: float  # of the global batch
    skips: tuple[int, int, int]  # steps skipped in this start, in a row until now, steps since the last
    stop_requested: bool
    save_due: bool
    step_seconds: float
    work_seconds: list[float]  # of each rank
    allocated_bytes: int
    compile_failed: bool
    peak_bytes: int
    peak_rank: int


def exchange(values: RankValues) -> WorldValues:
    """Reduce every rank's values. Collective over the world: one all-reduce, one read of its result.

    Each share of the loss has a place in the reduced tensor and is sent as its bits: the maximum of floats
    could drop a NaN. Every rank then adds the shares in the same order.
    """
    device, (index, count) = values.loss.device, values.loss_share
    rank, world_size = dist.get_rank(), dist.get_world_size()
    numbers = [
        int(values.stop_requested),
        int(values.save_due),
        round(1e9 * values.step_seconds),
        values.allocated_bytes,
        int(values.compile_failed),
        (peak_memory(device) << _RANK_BITS) + rank,
    ]
    work = [0] * world_size
    work[rank] = round(1e9 * values.work_seconds)
    packed = torch.tensor([*numbers, 0, 0, 0, *work, *[_NO_SHARE] * count], dtype=torch.int64, device=device)
    first = len(numbers)
    packed[first : first + 3] = values.skips
    packed[first + 3 + world_size + index] = values.loss.detach().float().view(torch.int32)
    all_reduce_(packed, None, dist.ReduceOp.MAX)
    stop_requested, save_due, nanoseconds, allocated, compile_failed, peak, *rest = packed.tolist()
    (total, in_row, since), by_rank = rest[:3], rest[3:]
    shares = np.array(by_rank[world_size:], np.int32).view(np.float32)
    return WorldValues(
        loss=float(shares.sum() / np.float32(count)),
        skips=(total, in_row, since),
        stop_requested=bool(stop_requested),
        save_due=bool(save_due),
        step_seconds=nanoseconds / 1e9,
        work_seconds=[each / 1e9 for each in by_rank[:world_size]],
        allocated_bytes=allocated,
        compile_failed=bool(compile_failed),
        peak_bytes=peak >> _RANK_BITS,
        peak_rank=peak & ((1 << _RANK_BITS) - 1),
    )


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of this process: allocated CUDA memory, or the resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
