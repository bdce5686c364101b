"""Starts ranks that measure this machine, in several rounds, and takes the medians."""

import json
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

from launcher.calibrate.engine_overhead import rounded, with_engine
from launcher.config.schema import MeasuredCollective, MeasuredProducts, MeasuredRates, Point
from launcher.engine.distributed import join, leave, prepare_deepspeed
from launcher.launch.local import run_local_ranks
from launcher.text import plural

Sample = dict[str, Any]  # one round of one number of ranks: what probes.py found, by name


def measure(rank_counts: Iterable[int], *, rounds: int, cores: int, device: str) -> list[MeasuredRates]:
    """What each of so many ranks has of the machine. The rounds go over all counts, one after the other."""
    samples: dict[int, list[Sample]] = {count: [] for count in rank_counts}
    for number in range(rounds):
        for count, rounds_of in samples.items():
            print(f"round {number + 1} of {rounds}: {plural(count, 'rank')}", flush=True)
            rounds_of.append(sample(count, cores=cores, device=device))
    found = [combined(count, rounds_of) for count, rounds_of in samples.items()]
    print("training small models, for what a step takes besides", flush=True)
    alone = [one for one in found if one.ranks <= cores or device == "cuda"]  # others take turns as these do
    return [
        with_engine(one, threads=max(1, cores // one.ranks), device=device) if one in alone else one
        for one in found
    ]


def sample(ranks: int, *, cores: int, device: str) -> Sample:
    """One round: `ranks` processes measure at the same time; what the first of them saw."""
    with tempfile.TemporaryDirectory(prefix="launcher-calibrate-") as name:
        folder = Path(name)
        target = partial(_rank, ranks=ranks, threads=max(1, cores // ranks), device=device, folder=folder)
        start_method: Literal["fork", "spawn"] = "fork" if device == "cpu" else "spawn"
        run_local_ranks(target, ranks, log_dir=folder / "logs", start_method=start_method)
        found: Sample = json.loads((folder / "sample.json").read_text())
        return found


def _rank(rank: int, *, ranks: int, threads: int, device: str, folder: Path) -> None:
    prepare_deepspeed(device)
    import torch
    import torch.distributed as dist

    from launcher.calibrate import probes

    torch.set_num_threads(threads)
    own = join(
        rank=rank, world_size=ranks, local_rank=rank, device=device, init_method=f"file://{folder / 'store'}"
    )
    found: Sample = {}
    # All begin each probe together: what a rank has of a machine is what the others leave it.
    dist.barrier()
    found["products"] = {dtype: list(probes.products(dtype, own)) for dtype in probes.DTYPES}
    dist.barrier()
    found["elementwise"] = list(probes.elementwise(own))
    dist.barrier()
    found["stream"] = probes.stream(own)
    dist.barrier()
    found["operation_s"] = probes.operation(own)
    found["collectives"] = {}
    for size in _group_sizes(ranks):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
        dist.barrier()
        mine = groups[rank // size]
        assert mine is not None
        found["collectives"][str(size)] = probes.collectives(mine, size, own)
    if rank == 0:
        (folder / "sample.json").write_text(json.dumps(found))
    leave()


def _group_sizes(ranks: int) -> list[int]:
    """2, 4, 8 and so on, that the ranks divide into."""
    return [size for size in (2**power for power in range(1, 11)) if ranks % size == 0]


def combined(ranks: int, samples: list[Sample]) -> MeasuredRates:
    """The medians over the rounds."""
    one = samples[0]
    return MeasuredRates(
        ranks=ranks,
        products=MeasuredProducts(
            **{dtype: _points([sample["products"][dtype] for sample in samples]) for dtype in one["products"]}
        ),
        elementwise=_points([sample["elementwise"] for sample in samples]),
        stream=rounded(median(sample["stream"] for sample in samples)),
        operation_s=rounded(median(sample["operation_s"] for sample in samples)),
        collectives=[
            MeasuredCollective(
                kind, int(size), _points([sample["collectives"][size][kind] for sample in samples])
            )
            for size, kinds in one["collectives"].items()
            for kind in kinds
        ],
    )


def _points(rounds: list[list[list[float]]]) -> list[Point]:
    return [
        Point(points[0][0], rounded(median(per_s for _, per_s in points)))
        for points in zip(*rounds, strict=True)
    ]
