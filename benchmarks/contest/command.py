"""The command line of a benchmark: choose classes and models, run them, print and write the results."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.arguments import at_least_one
from benchmarks.contest.classes import BenchmarkModel, Class, jobs_of, overrides_of
from benchmarks.contest.figure import draw
from benchmarks.contest.inputs import tokens_needed, write_batches, write_tokens, write_weights
from benchmarks.contest.job import WEIGHTS, Job
from benchmarks.contest.machine import machine
from benchmarks.contest.ranks import ContestantFailed
from benchmarks.contest.results import ClassResult, Measured, as_json
from benchmarks.contest.rounds import Timing, measure_memory, measure_operators, measure_times
from benchmarks.contest.startup import first_step_of_command
from benchmarks.contest.table import tables
from launcher.config.compose import compose_jobs
from launcher.config.schema import RunConfig
from launcher.launch.scratch import scratch_directory
from launcher.launch.this_machine import this_machine

T = TypeVar("T")
RESULTS = Path(__file__).parents[1] / "results"
USUAL = ("time", "memory", "start")
MEASURES = (*USUAL, "operators")
_QUICK = Timing(deadline=0.0, least_rounds=2, most_rounds=2, turn_s=0.0, settling=0)


@dataclass(frozen=True)
class Benchmark:
    """A named set of classes and models; the file names of the results begin with the name."""

    name: str
    models: tuple[BenchmarkModel, ...]
    tiny: BenchmarkModel  # for a trial on any machine
    classes: tuple[Class, ...]
    device: str
    turn_s: float
    settling: int  # steps at the start of a turn that are not timed
    least_rounds: int
    most_rounds: int
    minutes: float
    resident_models: frozenset[str]  # models of which all contestants fit the memory together


def main(benchmark: Benchmark, arguments: Sequence[str]) -> int:
    """Run the chosen classes; return 1 if a peer failed or its first losses differ from ours."""
    options = parsed(benchmark, arguments)
    names = {model.name: model for model in (*benchmark.models, benchmark.tiny)}
    models = [names[name] for name in options.model or [model.name for model in benchmark.models]]
    classes = [shape for shape in benchmark.classes if not options.only or shape.name in options.only]
    deadline = time.monotonic() + options.minutes * 60
    results: list[ClassResult] = []
    failures: list[str] = []  # classes in which we failed ourselves
    options.results.mkdir(parents=True, exist_ok=True)
    for model in models:
        with scratch_directory() as folder:
            for shape in classes:
                now = time.monotonic()
                share = (deadline - now) / (len(models) * len(classes) - len(results) - len(failures))
                place = folder / shape.name
                place.mkdir()
                try:
                    results.append(ClassRun(benchmark, options, model, shape, place, now + share).result())
                except ContestantFailed as error:
                    say(error)
                    failures.append(f"{model.name}, {shape.name}: {str(error).splitlines()[0]}")
                    continue
                write(benchmark, options, results)
    return report(results, failures)


def parsed(benchmark: Benchmark, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}", description="See docs/benchmarks.md."
    )
    classes = [shape.name for shape in benchmark.classes]
    models = [model.name for model in (*benchmark.models, benchmark.tiny)]
    add = parser.add_argument
    add("--only", action="append", choices=classes, metavar="CLASS", help=f"one of: {', '.join(classes)}")
    add("--model", action="append", choices=models, metavar="MODEL", help=f"one of: {', '.join(models)}")
    add("--peer", action="append", metavar="PEER", help="a module in benchmarks/peers or a name in the table")
    add("--measure", nargs="+", choices=MEASURES, default=USUAL, help=f"default: {' '.join(USUAL)}")
    add("--minutes", type=float, default=benchmark.minutes, help=f"default: {benchmark.minutes:g}")
    at_least = "at least so many; default: %(default)s"
    add("--rounds", type=at_least_one, default=benchmark.least_rounds, help=at_least)
    add("--quick", action="store_true", help="two rounds of one step: a trial, no measurement")
    add("--device", choices=("cpu", "cuda"), default=benchmark.device)
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class ClassRun:
    """A class on one model, measured until about `deadline`."""

    benchmark: Benchmark
    options: argparse.Namespace
    model: BenchmarkModel
    shape: Class
    folder: Path
    deadline: float  # time.monotonic()

    def result(self) -> ClassResult:
        say(f"{self.model.name}, {self.shape.name}")
        shape, peers = self.shape, self.options.peer
        if peers:
            kept = tuple(peer for peer in shape.peers if {peer.module, peer.label} & set(peers))
            shape = Class(**{**vars(shape), "peers": kept})
        overrides = overrides_of(self.model, shape, self.options.device, str(self.folder / "tokens"))
        [composed] = compose_jobs("config", RunConfig, overrides)
        run = composed.config
        jobs = jobs_of(run, self.model, shape, self.options.device, str(self.folder), overrides)
        tokens = tokens_needed(run)
        write_tokens(self.folder / "tokens", vocabulary=run.model.vocab_size, tokens=tokens)
        write_batches(run, self.folder)
        self._provide_weights(jobs[0])
        return ClassResult(self.model.name, shape, self.model.precision, jobs[0].tokens, self._measured(jobs))

    def _provide_weights(self, job: Job) -> None:
        """Write the weights, or link to those that another class of the model has left."""
        shared = self.folder.parent / WEIGHTS
        if not shared.exists():
            write_weights(single(job, self.options.device, self.model, self.folder)).rename(shared)
        (self.folder / WEIGHTS).symlink_to(shared)

    def _measured(self, jobs: list[Job]) -> list[Measured]:
        threads = max(1, this_machine().cores // self.shape.ranks)
        measures, peaks, operators = self.options.measure, dict[str, int](), dict[str, dict[str, float]]()
        failures: dict[str, str] = {}
        if "memory" in measures and self.options.device == "cpu":
            peaks, failures = each(jobs, threads, measure_memory)
        if "operators" in measures:
            operators, others = each(jobs, threads, measure_operators)
            failures |= others
        measured = [Measured(job.label) for job in jobs]
        if "time" in measures:
            resident = self.model.name in self.benchmark.resident_models
            measured = measure_times(jobs, threads, self._timing(), resident=resident, failed=say)
        # Ours is the first step of the whole command, which also plans the run and starts the ranks.
        wanted = "start" in measures
        measured[0].first_step_s = first_step_of_command(jobs[0].overrides, self.folder) if wanted else None
        for contestant in measured:
            contestant.peak_bytes = peaks.get(contestant.label, contestant.peak_bytes)
            contestant.operators = operators.get(contestant.label, {})
            contestant.failed = contestant.failed or failures.get(contestant.label, "")
        return measured

    def _timing(self) -> Timing:
        if self.options.quick:
            return _QUICK
        b = self.benchmark
        return Timing(self.deadline, self.options.rounds, b.most_rounds, b.turn_s, b.settling)


def each(
    jobs: list[Job], threads: int, measure: Callable[[Job, int], T]
) -> tuple[dict[str, T], dict[str, str]]:
    """Measure each contestant in ranks of its own; return the results by label, and why a peer has none."""
    found, failures = dict[str, T](), dict[str, str]()
    for job in jobs:
        try:
            found[job.label] = measure(job, threads)
        except ContestantFailed as error:
            if job is jobs[0]:
                raise
            say(error)
            failures[job.label] = str(error)
    return found, failures


def single(job: Job, device: str, model: BenchmarkModel, folder: Path) -> Job:
    """Return our job on one rank, for the initial weights."""
    alone = Class("weights", ("parallelism=single",), ())
    overrides = overrides_of(model, alone, device, str(folder / "tokens"))
    return Job(**{**vars(job), "ranks": 1, "data_ranks": 1, "overrides": overrides})


def say(message: object) -> None:
    print(message, file=sys.stderr, flush=True)


def write(benchmark: Benchmark, options: argparse.Namespace, results: list[ClassResult]) -> None:
    """Write the results so far: every value as JSON, the tables, and the figure."""
    path = options.results / benchmark.name
    values = {"machine": machine(options.device), "classes": [as_json(result) for result in results]}
    path.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables(results) + "\n")
    if "time" in options.measure:
        draw(results, path.with_suffix(".png"))


def report(results: list[ClassResult], failures: Sequence[str] = ()) -> int:
    """Print tables and errors; return 1 if there are errors."""
    print(tables(results))
    problems = [*failures, *(problem for result in results for problem in result.problems())]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0
