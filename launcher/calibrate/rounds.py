"""Start ranks that measure this machine in several rounds, and take the medians."""

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

Sample = dict[str, Any]  # results of probes.py by name, of one round with one number of ranks


def measure(rank_counts: Iterable[int], *, rounds: int, cores: int, device: str) -> list[MeasuredRates]:
    """Return the rates of a rank for each number of ranks. Every round measures all numbers of ranks."""
    samples: dict[int, list[Sample]] = {count: [] for count in rank_counts}
    for number in range(rounds):
        for count, rounds_of in samples.items():
            print(f"round {number + 1} of {rounds}: {plural(count, 'rank')}", flush=True)
            rounds_of.append(sample(count, cores=cores, device=device))
    measured = [combined(count, rounds_of) for count, rounds_of in samples.items()]
    print("training small models, to measure the overhead of a step", flush=True)
    # More ranks than cores take turns, and have the overhead of those with a core each.
    is_gpu = device == "cuda"
    return [
        with_engine(rates, threads=max(1, cores // rates.ranks), device=device)
        if is_gpu or rates.ranks <= cores
        else rates
        for rates in measured
    ]


def sample(ranks: int, *, cores: int, device: str) -> Sample:
    """Return the sample of rank 0 after `ranks` processes have measured at the same time."""
    with tempfile.TemporaryDirectory(prefix="launcher-calibrate-") as name:
        folder = Path(name)
        target = partial(_rank, ranks=ranks, threads=max(1, cores // ranks), device=device, folder=folder)
        start_method: Literal["fork", "spawn"] = "fork" if device == "cpu" else "spawn"
        run_local_ranks(target, ranks, log_dir=folder / "logs", start_method=start_method)
        rank_0: Sample = json.loads((folder / "sample.json").read_text())
        return rank_0


def _rank(rank: int, *, ranks: int, threads: int, device: str, folder: Path) -> None:
    prepare_deepspeed(device)
    import torch
    import torch.distributed as dist

    from launcher.calibrate import probes

    torch.set_num_threads(threads)
    joined = join(rank, ranks, rank, device, f"file://{folder / 'store'}")
    results: Sample = {}
    # All ranks begin each probe at the same moment, because they share the machine.
    dist.barrier()
    results["products"] = {dtype: list(probes.products(dtype, joined)) for dtype in probes.DTYPES}
    dist.barrier()
    results["elementwise"] = list(probes.elementwise(joined))
    dist.barrier()
    results["stream"] = probes.stream(joined)
    dist.barrier()
    results["operation_s"] = probes.operation(joined)
    results["collectives"] = {}
    for size in _group_sizes(ranks):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
        dist.barrier()
        group = groups[rank // size]
        assert group is not None
        results["collectives"][str(size)] = probes.collectives(group, size, joined)
    if rank == 0:
        (folder / "sample.json").write_text(json.dumps(results))
    leave()


def _group_sizes(ranks: int) -> list[int]:
    """Return the powers of two from 2 on that divide the number of ranks."""
    return [size for size in (2**power for power in range(1, 11)) if ranks % size == 0]


def combined(ranks: int, samples: list[Sample]) -> MeasuredRates:
    """Return the medians over the rounds."""
    first = samples[0]
    return MeasuredRates(
        ranks=ranks,
        products=MeasuredProducts(
            **{
                dtype: _points([sample["products"][dtype] for sample in samples])
                for dtype in first["products"]
            }
        ),
        elementwise=_points([sample["elementwise"] for sample in samples]),
        stream=rounded(median(sample["stream"] for sample in samples)),
        operation_s=rounded(median(sample["operation_s"] for sample in samples)),
        collectives=[
            MeasuredCollective(
                kind, int(size), _points([sample["collectives"][size][kind] for sample in samples])
            )
            for size, kinds in first["collectives"].items()
            for kind in kinds
        ],
    )


def _points(rounds: list[list[list[float]]]) -> list[Point]:
    return [
        Point(points[0][0], rounded(median(per_s for _, per_s in points)))
        for points in zip(*rounds, strict=True)
    ]
