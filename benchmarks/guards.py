"""Measure the cost of the guards: times of steps with and without them, alternating in one run.

`python -m benchmarks.guards [OVERRIDES]` trains `gpt_mini` in several layouts on this machine, for 16 minutes
on two cores, and prints ratios. "Without" leaves out the decision on each update (the norm is computed all
the same, because clipping needs it). Steps are compared in pairs, one with and one without the guard, in
changing order. It prints the median of the ratios and the 95% interval of the median, which is narrow only on
an idle machine. One comparison of the replicas is timed alone and divided by its interval.
"""

import sys
import tempfile
import time
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median

from launcher.config.compose import compose_jobs
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.validate import validate
from launcher.config.world import world_of_machine
from launcher.launch.local import run_local_ranks, start_method_for
from launcher.launch.this_machine import share_cores, this_machine

PAIRS, WARM_UP = 300, 8
LAYOUTS = ["parallelism=single", "parallelism=dp parallelism.data=2", "parallelism=tp2", "parallelism=zero1"]
BASE = ["model=gpt_mini", "training.global_batch_size=16", "training.micro_batch_size=4", "logging=local"]


def main(overrides: list[str]) -> None:
    print(f"{'layout':44} {'update guard (95%)':>27} {'replicas, one':>14} {'per step':>9}")
    for layout in LAYOUTS:
        [job] = compose_jobs("config", RunConfig, [*BASE, *layout.split(), *overrides])
        machine = this_machine()
        resolved = validate(job.config, world_of_machine(job.config, machine))
        share_cores(resolved.world_size, machine.cores)
        with tempfile.TemporaryDirectory() as folder:
            target = partial(measure, run=job.config, layout=resolved, folder=Path(folder))
            method = start_method_for(resolved.device)
            run_local_ranks(target, resolved.world_size, log_dir=Path(folder), start_method=method)


def measure(rank: int, *, run: RunConfig, layout: Layout, folder: Path) -> None:
    """Print the ratios of one layout on rank 0. Collective over the world."""
    from launcher.engine.build import build_engine
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    prepare_deepspeed(layout.device)
    from launcher.data.open import blend_of, open_data
    from launcher.engine.replicas import disagreements
    from launcher.runtime.batches import rank_batches

    device = join(
        rank=rank, world_size=layout.world_size, local_rank=rank, device=layout.device,
        init_method=f"file://{folder / 'store'}",
    )  # fmt: skip
    engine, blend = build_engine(run, layout, device), open_data(run).blend([blend_of(run)])
    batches = list(rank_batches(run, engine, blend, 0))
    judge = engine.guard.judge

    def undecided(norm):  # type: ignore[no-untyped-def]
        engine.guard.norm = norm

    def step_seconds(guarded: bool) -> float:
        engine.guard.judge = judge if guarded else undecided  # type: ignore[method-assign]
        started = time.perf_counter()
        float(engine.train_batch(batches).loss)
        return time.perf_counter() - started

    for _ in range(WARM_UP):
        step_seconds(guarded=True)
    without, ratios = [], []
    for pair in range(PAIRS):
        first = pair % 2 == 0
        seconds = {guarded: step_seconds(guarded) for guarded in (first, not first)}
        without.append(seconds[False])
        ratios.append(seconds[True] / seconds[False] - 1)
    comparisons = []
    for _ in range(5):
        started = time.perf_counter()
        disagreements(engine, {})
        comparisons.append(time.perf_counter() - started)
    once = median(comparisons) / median(without)
    if rank == 0:
        every = once / run.guard.replica_interval
        low, high = interval_of_median(ratios)
        cost = f"{median(ratios):+.2%} ({low:+.2%} to {high:+.2%})"
        print(f"{layout.describe():44.44} {cost:>27} {once:14.2%} {every:9.3%}", flush=True)
    leave()


def interval_of_median(values: list[float]) -> tuple[float, float]:
    """Return the 95% interval of the median, from order statistics: no assumption on the distribution."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    middle = (len(values) - 1) / 2
    return ordered[max(0, int(middle - half))], ordered[min(len(values) - 1, ceil(middle + half))]


if __name__ == "__main__":
    main(sys.argv[1:])
