"""Compare planned and measured step times in twelve layouts of 1 to 4 ranks.

`python -m benchmarks.calibration [--folder FOLDER] [--rounds N]` calibrates this machine and trains, in five
rounds of 4 to 9 minutes. Nothing is fitted to these runs. Each round calibrates again, because the speed of a
shared machine changes within minutes; the table has the medians of the plans and of the steps. FOLDER keeps
the hardware configs and the runs (default: a temporary folder). Progress is printed on standard error.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median

from benchmarks.arguments import at_least_one
from launcher.config.compose import compose_jobs
from launcher.config.schema import PlannedRunConfig
from launcher.config.validate import validate
from launcher.config.world import world_of_machine
from launcher.launch.this_machine import this_machine
from launcher.planning.cost.run_plan import Plan, make_plan

STEPS = 13
CLEAR = 0.15  # least difference of two measured times, beyond the noise, for which their order counts
MODEL = [
    "model=gpt_mini", "training.global_batch_size=16", "training.micro_batch_size=2",
    "training.validation_interval=0", f"training.steps={STEPS}", "logging=local",
    "checkpoint.interval_minutes=null",
]  # fmt: skip
LAYOUTS: dict[str, dict[str, int | str]] = {
    "single": {},
    "data 2": {"data": 2},
    "tensor 2": {"tensor": 2},
    "tensor 2, sequence parallel": {"tensor": 2, "sequence_parallel": "true"},
    "pipeline 2": {"pipeline": 2},
    "ZeRO-1, data 2": {"data": 2, "zero_stage": 1},
    "ZeRO-2, data 2": {"data": 2, "zero_stage": 2},
    "ZeRO-3, data 2": {"data": 2, "zero_stage": 3},
    "data 4": {"data": 4},
    "tensor 4": {"tensor": 4},
    "pipeline 4": {"pipeline": 4},
    "data 2 x tensor 2": {"data": 2, "tensor": 2},
}


def main(folder: Path, rounds: int) -> None:
    started = time.monotonic()
    taken: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    plans: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for number in range(1, rounds + 1):
        config = folder / f"round-{number}"
        launcher("calibrate", f"dir={config}", "rounds=1")
        report(f"round {number} of {rounds}: calibrated", started)
        for name, sizes in LAYOUTS.items():
            overrides = [f"--config-dir={config}", "hardware=this_machine", *MODEL, *typed(sizes)]
            directory = config / "runs" / name
            launcher("train", *overrides, f'run.dir="{directory}"')
            taken[name] += step_times(directory)
            plans[name].append(planned(overrides))
        report(f"round {number} of {rounds}: trained", started)
    print(table({name: (median(plans[name]), median(taken[name])) for name in LAYOUTS}))


def report(stage: str, started: float) -> None:
    print(f"{stage}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def typed(sizes: dict[str, int | str]) -> list[str]:
    return [f"parallelism.{name}={size}" for name, size in {"data": 1, "zero_stage": 0, **sizes}.items()]


def launcher(*arguments: str) -> None:
    """Run a command of the launcher; exit with its output if it fails.

    Without OMP_NUM_THREADS of the caller, each run shares the cores among its ranks, as calibration does.
    """
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        text=True,
        capture_output=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def step_times(directory: Path) -> list[float]:
    """Return seconds without the first two steps: one starts cold, and ZeRO-3 learns for the other."""
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row["perf/step_time_s"] for row in rows][2:]


def planned(overrides: list[str]) -> float:
    time = plan_of(overrides).time
    assert time is not None
    return time.total


def plan_of(overrides: list[str]) -> Plan:
    [job] = compose_jobs("plan", PlannedRunConfig, overrides)
    return make_plan(job.config, validate(job.config, world_of_machine(job.config, this_machine())))


def table(found: dict[str, tuple[float, float]]) -> str:
    lines = ["| layout | measured, ms | planned, ms | error |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {taken * 1e3:.0f} | {plan * 1e3:.0f} | {plan / taken - 1:+.1%} |"
        for name, (plan, taken) in found.items()
    ]
    errors = [abs(plan / taken - 1) for plan, taken in found.values()]
    order = spearman(*zip(*found.values(), strict=True))
    mean, worst = sum(errors) / len(errors), max(errors)
    lines += ["", f"Mean error {mean:.1%}, the largest {worst:.1%}. Spearman's rank correlation {order:.2f}."]
    return "\n".join([*lines, *order_of_pairs(found)])


def order_of_pairs(found: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return lines about the planned order of the pairs of layouts whose measured times differ clearly."""
    clear = [
        sorted(pair, key=lambda name: found[name][1])
        for pair in combinations(found, 2)
        if abs(found[pair[0]][1] - found[pair[1]][1]) > CLEAR * min(found[name][1] for name in pair)
    ]
    wrong = [(fast, slow) for fast, slow in clear if found[fast][0] >= found[slow][0]]
    right = f"{len(clear) - len(wrong)} of {len(clear)} pairs"
    lines = [f"The plan has {right} in the right order (measured times more than {CLEAR:.0%} apart)."]
    return lines + [f"Planned in the other order: {fast} is faster than {slow}." for fast, slow in wrong]


def spearman(*columns: tuple[float, ...]) -> float:
    """Return the rank correlation of two columns without ties."""
    ranks = [[sorted(column).index(one) for one in column] for column in columns]
    n = len(ranks[0])
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n**2 - 1))


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=at_least_one, default=5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parsed(sys.argv[1:])
    with tempfile.TemporaryDirectory() as temporary:
        main(options.folder or Path(temporary), options.rounds)
