"""Time gloo's collectives beside one exchange of messages: `python -m benchmarks.exchange [RANKS]`.

With an exchange each rank sends a part to each other rank (all_to_all_single) and adds up what it gets. Two
ranks all-reduce as the launcher does.
The table shows why tensor and sequence parallelism wait on a CPU: docs/benchmarks.md.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from launcher.launch.scratch import scratch_directory
from launcher.launch.this_machine import this_machine
from launcher.parallel.all_reduce import all_reduce_

SIZES = {"1 KB": 2**10, "64 KB": 2**16, "1 MB": 2**20}  # of the whole tensor in fp32
ROUNDS, WARM_UP = 200, 20
WIDTH = 512  # of a product before each call, so that ranks do not arrive at the same moment


def all_reduce(x: Tensor, ranks: int) -> Tensor:
    if ranks == 2:
        all_reduce_(x, None)
        return x
    received = torch.empty(ranks * x.numel())
    dist.all_to_all_single(received, x.expand(ranks, -1).contiguous().view(-1))
    return received.view(ranks, -1).sum(0)


def reduce_scatter(x: Tensor, ranks: int) -> Tensor:
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x)
    return received.view(ranks, -1).sum(0)


def all_gather(part: Tensor, ranks: int) -> Tensor:
    received = torch.empty(ranks * part.numel())
    dist.all_to_all_single(received, part.expand(ranks, -1).contiguous().view(-1))
    return received


def calls(size: int, ranks: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return gloo's collective and the exchange with the same result, by name."""
    x, part, whole = torch.ones(size // 4), torch.ones(size // 4 // ranks), torch.empty(size // 4)
    gathered = part.numel() * ranks
    return {
        "all-reduce": (lambda: dist.all_reduce(x), partial(all_reduce, x, ranks)),
        "reduce-scatter": (
            lambda: dist.reduce_scatter_tensor(part, x[:gathered]),
            partial(reduce_scatter, x[:gathered], ranks),
        ),
        "all-gather": (
            lambda: dist.all_gather_into_tensor(whole[:gathered], part),
            partial(all_gather, part, ranks),
        ),
    }


def measure(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    operand = torch.randn(WIDTH, WIDTH)
    for label, size in SIZES.items():
        named = calls(size, ranks)
        taken: dict[tuple[str, int], list[float]] = {(name, way): [] for name in named for way in (0, 1)}
        for _ in range(ROUNDS):
            for name, way in taken:
                operand @ operand
                started = time.perf_counter()
                named[name][way]()
                taken[name, way].append(1e6 * (time.perf_counter() - started))
        for name in named if rank == 0 else ():
            gloo, exchange = (median(taken[name, way][WARM_UP:]) for way in (0, 1))
            print(f"| {name}, {label} | {gloo:.0f} | {exchange:.0f} | {gloo / exchange:.1f} |", flush=True)
    dist.destroy_process_group()


def main(ranks: int) -> None:
    print(f"{ranks} ranks with a thread each, {this_machine().cores} cores, torch {torch.__version__}\n")
    print("| collective | gloo, us | exchange, us | ratio |\n|---|---|---|---|", flush=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with scratch_directory() as folder:
        mp.spawn(measure, (ranks, str(Path(folder) / "store")), nprocs=ranks)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 2)
