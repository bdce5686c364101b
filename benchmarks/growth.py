"""Measure how the cost of a step grows: `python -m benchmarks.growth`, about 15 minutes on two idle cores.

Each series changes one size of the CPU benchmark's model and trains all its points in alternating turns, so
that a machine that slows down slows all of them. The last series takes 3,000 steps of one run, and measures
the time and the resident memory of each hundred. It writes `growth.json`, `growth.md` and `growth.png`.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contest.classes import BenchmarkModel, Class, jobs_of, overrides_of
from benchmarks.contest.command import RESULTS, say
from benchmarks.contest.inputs import tokens_needed, write_tokens
from benchmarks.contest.job import Job
from benchmarks.contest.machine import machine
from benchmarks.contest.ranks import ContestantFailed, Ranks
from benchmarks.contest.rounds import Timing, measure_memory, measure_times, running
from benchmarks.cpu import CPU
from launcher.config.compose import compose_jobs
from launcher.config.schema import RunConfig
from launcher.launch.scratch import scratch_directory
from launcher.launch.this_machine import this_machine

STEPS, BLOCK = 3000, 100
_TOKENS = 2048  # of a step, where the sequence grows


@dataclass(frozen=True)
class Point:
    """One model and layout of a series; `value` is the size that the series changes."""

    value: int
    overrides: tuple[str, ...] = ()
    micro_batch: int = 4
    accumulation: int = 1
    data_ranks: int = 1


@dataclass(frozen=True)
class Series:
    title: str
    points: tuple[Point, ...]


@dataclass
class Cost:
    """The cost of a point: median seconds of a step, tokens of a step, peak bytes of the fullest rank."""

    value: int
    step_s: float
    tokens: int
    peak_bytes: int


@dataclass
class Steps:
    """Seconds per step and resident bytes of each block of steps of one run."""

    step_s: list[float] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)


def series_for(cores: int) -> list[Series]:
    """Return the series; data ranks grow up to the number of cores."""
    layers = [Point(n, (f"model.num_layers={n}",)) for n in (2, 4, 8, 16)]
    lengths = [_of_length(n) for n in (128, 256, 512, 1024, 2048)]
    vocabularies = [Point(n, (f"model.vocab_size={n}",)) for n in (2048, 8192, 32768, 131072)]
    accumulations = [Point(n, accumulation=n) for n in (1, 2, 4, 8)]
    ranks = [_of_ranks(n) for n in (1, 2, 4, 8) if n <= cores]
    return [
        Series("layers", tuple(layers)),
        Series(f"sequence length, {_TOKENS:,} tokens a step", tuple(lengths)),
        Series("vocabulary", tuple(vocabularies)),
        Series("accumulated micro-batches", tuple(accumulations)),
        Series("data ranks, one core each", tuple(ranks)),
    ]


def _shortened(series: Series) -> Series:
    return Series(series.title, series.points[:2])


def _of_length(length: int) -> Point:
    return Point(length, (f"model.max_sequence_length={length}",), micro_batch=_TOKENS // length)


def _of_ranks(ranks: int) -> Point:
    return Point(ranks, ("parallelism=dp", f"parallelism.data={ranks}"), data_ranks=ranks)


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    model = CPU.tiny if options.quick else CPU.models[0]
    rounds, steps, block = (2, 20, 10) if options.quick else (9, STEPS, BLOCK)
    found: dict[str, list[Cost]] = {}
    series = series_for(this_machine().cores)
    for part in [_shortened(series[0])] if options.quick else series:
        say(part.title)
        found[part.title] = measured(part, model, rounds)
    say(f"{steps} steps of one run")
    flat = steps_of_one_run(CPU.tiny, steps, block)
    write(options.results, found, flat, block)
    print((options.results / "growth.md").read_text())
    return 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two points of one series: a trial")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    return parser.parse_args(arguments)


def measured(series: Series, model: BenchmarkModel, rounds: int) -> list[Cost]:
    """Train all points of a series in turns; then measure the memory of each. Raises ContestantFailed."""
    most = max(point.data_ranks for point in series.points)
    threads = max(1, this_machine().cores // most)
    with scratch_directory() as folder:
        jobs = [job_of(point, model, folder / str(point.value)) for point in series.points]
        timing = Timing(time.monotonic(), rounds, rounds, turn_s=0.3, settling=0)
        times = measure_times(jobs, threads, timing, resident=True, failed=_fail)
        return [
            Cost(point.value, median(result.seconds), job.tokens, measure_memory(job, threads))
            for point, job, result in zip(series.points, jobs, times, strict=True)
        ]


def job_of(point: Point, model: BenchmarkModel, folder: Path) -> Job:
    """Return the launcher's job of a point, with the tokens that it reads."""
    folder.mkdir()
    model = BenchmarkModel(model.name, (*model.overrides, *point.overrides), point.micro_batch)
    shape = Class(
        str(point.value), (), (), ranks=point.data_ranks, data_ranks=point.data_ranks,
        accumulation=point.accumulation,
    )  # fmt: skip
    overrides = overrides_of(model, shape, "cpu", str(folder / "tokens"))
    [composed] = compose_jobs("config", RunConfig, overrides)
    vocabulary = composed.config.model.vocab_size
    write_tokens(folder / "tokens", vocabulary=vocabulary, tokens=tokens_needed(composed.config))
    [job] = jobs_of(composed.config, model, shape, "cpu", str(folder), overrides)
    return job


def steps_of_one_run(model: BenchmarkModel, steps: int, block: int) -> Steps:
    """Take `steps` steps, and measure each block of them. Raises ContestantFailed."""
    result = Steps()
    with scratch_directory() as folder:
        job = job_of(Point(steps, micro_batch=model.micro_batch), model, folder / "run")
        with running(job, this_machine().cores) as ranks:
            ranks.first_step()
            for _ in range(steps // block):
                result.step_s.append(ranks.turn(block).seconds)
                result.resident_bytes.append(_resident_bytes(ranks))
    return result


def _resident_bytes(ranks: Ranks) -> int:
    [pid] = ranks.pids()
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [size] = [line.split()[1] for line in lines if line.startswith("VmRSS")]
    return int(size) * 1024


def _fail(error: ContestantFailed) -> None:
    raise error


def write(folder: Path, found: dict[str, list[Cost]], flat: Steps, block: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "machine": machine("cpu"),
        "series": {title: [asdict(cost) for cost in costs] for title, costs in found.items()},
        "steps": {**asdict(flat), "block": block},
    }
    (folder / "growth.json").write_text(json.dumps(values, indent=1) + "\n")
    (folder / "growth.md").write_text("\n".join(table(found, flat, block)) + "\n")
    draw(found, flat, block, folder / "growth.png")


def table(found: dict[str, list[Cost]], flat: Steps, block: int) -> list[str]:
    """Return the lines of a Markdown table of all series."""
    lines = ["| grows | value | ms a step | us a token | peak, MB |", "|---|---|---|---|---|"]
    for title, costs in found.items():
        for cost in costs:
            step, token, peak = cost.step_s * 1e3, cost.step_s / cost.tokens * 1e6, cost.peak_bytes / 1e6
            lines.append(f"| {title} | {cost.value:,} | {step:.1f} | {token:.1f} | {peak:.0f} |")
    for number in sorted({0, len(flat.step_s) // 2, len(flat.step_s) - 1}):
        steps = f"{number * block + 1:,} to {(number + 1) * block:,}"
        step, resident = flat.step_s[number] * 1e3, flat.resident_bytes[number] / 1e6
        lines.append(f"| steps taken | {steps} | {step:.2f} | | {resident:.0f} resident |")
    return lines


def draw(found: dict[str, list[Cost]], flat: Steps, block: int, path: Path) -> None:
    """Draw a panel per series: time of a step on the left axis, memory on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.4), layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    for panel, (title, costs) in zip(panels, found.items(), strict=False):
        values, times = [c.value for c in costs], [c.step_s * 1e3 for c in costs]
        _panel(panel, title, values, times, [c.peak_bytes / 1e6 for c in costs], "peak of tensors, MB")
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [f"{value:,}" for value in values])
    taken = [block * (number + 1) for number in range(len(flat.step_s))]
    memory = [size / 1e6 for size in flat.resident_bytes]
    times = [seconds * 1e3 for seconds in flat.step_s]
    _panel(panels[-1], "steps taken in one run (small model)", taken, times, memory, "resident, MB")
    figure.savefig(path, dpi=100)


def _panel(axes: Any, title: str, x: list[int], ms: list[float], mb: list[float], memory: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.plot(x, ms, "o-", color="#4c72b0", markersize=4)
    axes.set_ylabel("ms a step", color="#4c72b0", fontsize=9)
    axes.set_ylim(0, 1.15 * max(ms))
    right = axes.twinx()
    right.plot(x, mb, "s--", color="#dd8452", markersize=4)
    right.set_ylabel(memory, color="#dd8452", fontsize=9)
    right.set_ylim(0, 1.15 * max(mb))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
