"""Start ranks that measure this machine in several rounds, and take the medians."""

import json
from collections.abc import Iterable
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from launcher.calibrate.engine_overhead import rounded, with_engine
from launcher.config.schema import MeasuredCollective, MeasuredProducts, MeasuredRates, Point
from launcher.engine.distributed import join, leave, prepare_deepspeed
from launcher.engine.watchdog import MEASURING_MINUTES, Watchdog
from launcher.launch.local import run_local_ranks, start_method_for
from launcher.launch.scratch import scratch_directory
from launcher.text import plural

if TYPE_CHECKING:
    import torch

MOST_TRAINED = 3  # rounds in which small models are trained: starting an engine takes seconds
ProbeResults = dict[str, Any]  # results of probes.py by name, of one round with one number of ranks


def measure(rank_counts: Iterable[int], *, rounds: int, cores: int) -> list[MeasuredRates]:
    """Return the rates of a CPU rank for each number of ranks. Every round measures all numbers of ranks."""
    samples: dict[int, list[ProbeResults]] = {count: [] for count in rank_counts}
    for number in range(rounds):
        for count, rounds_of in samples.items():
            print(f"round {number + 1} of {rounds}: {plural(count, 'rank')}", flush=True)
            rounds_of.append(sample(count, cores=cores))
    measured = [combined(count, rounds_of) for count, rounds_of in samples.items()]
    # Without a core each, ranks take turns and have the overhead of ranks with a core each.
    with_cores = [rates for rates in measured if rates.ranks <= cores]
    trained = with_engine(with_cores, cores=cores, rounds=min(rounds, MOST_TRAINED))
    return [*trained, *(rates for rates in measured if rates.ranks > cores)]


def sample(ranks: int, *, cores: int) -> ProbeResults:
    """Start `ranks` processes that measure at the same time; return the results of rank 0."""
    with scratch_directory() as folder:
        target = partial(_rank, ranks=ranks, threads=max(1, cores // ranks), folder=folder)
        run_local_ranks(target, ranks, log_dir=folder / "logs", start_method=start_method_for("cpu"))
        rank_0: ProbeResults = json.loads((folder / "sample.json").read_text())
        return rank_0


def _rank(rank: int, *, ranks: int, threads: int, folder: Path) -> None:
    prepare_deepspeed("cpu")
    import torch

    torch.set_num_threads(threads)
    store = f"file://{folder / 'store'}"
    joined = join(
        rank=rank,
        world_size=ranks,
        local_rank=rank,
        device="cpu",
        init_method=store,
        timeout_minutes=MEASURING_MINUTES,
    )
    with Watchdog(folder / "logs", MEASURING_MINUTES) as watchdog:
        results = probe_results(rank, ranks, joined, watchdog)
        if rank == 0:
            (folder / "sample.json").write_text(json.dumps(results))
        leave()


def probe_results(rank: int, ranks: int, device: "torch.device", watchdog: Watchdog) -> ProbeResults:
    """Run all probes, and return their results by name. Collective over the world."""
    import torch.distributed as dist

    from launcher.calibrate import probes

    def begin(probe: str) -> None:
        # All ranks begin each probe at the same moment, because they share the machine.
        watchdog.at(probe)
        dist.barrier()

    results: ProbeResults = {"products": {}, "collectives": {}}
    for dtype in probes.MEASURED_DTYPES:
        begin(f"the probe of {dtype} products")
        results["products"][dtype] = []
        for point in probes.products(dtype, device):
            results["products"][dtype].append(point)
            watchdog.at(f"the probe of {dtype} products")
    begin("the probe of single operations")
    results["operation_s"] = probes.operation(device)
    begin("the probe of elementwise operations")
    results["elementwise"] = list(probes.elementwise(device, results["operation_s"]))
    begin("the probe of memory bandwidth")
    results["stream"] = probes.stream(device)
    for size in (2**power for power in range(1, 11) if ranks % 2**power == 0):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
        begin(f"the probe of collectives of {size} ranks")
        group = groups[rank // size]
        assert group is not None
        results["collectives"][str(size)] = probes.collectives(group, size, device)
    return results


def combined(ranks: int, samples: list[ProbeResults]) -> MeasuredRates:
    """Return the medians over the rounds."""

    def points(*keys: str) -> list[Point]:
        rounds = [reduce(getitem, keys, sample) for sample in samples]
        matching = zip(*rounds, strict=True)
        return [Point(curve[0][0], rounded(median(per_s for _, per_s in curve))) for curve in matching]

    by_size = samples[0]["collectives"].items()
    return MeasuredRates(
        ranks=ranks,
        products=MeasuredProducts(**{dtype: points("products", dtype) for dtype in samples[0]["products"]}),
        elementwise=points("elementwise"),
        stream=rounded(median(sample["stream"] for sample in samples)),
        operation_s=rounded(median(sample["operation_s"] for sample in samples)),
        collectives=[
            MeasuredCollective(kind, int(ranks), points("collectives", ranks, kind))
            for ranks, kinds in by_size
            for kind in kinds
        ],
    )
