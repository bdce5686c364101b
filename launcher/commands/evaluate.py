"""`launcher evaluate`: perplexity of a run or checkpoint, and tasks of lm-evaluation-harness."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from launcher.commands.report_files import check_files_differ, writable_report
from launcher.config.arguments import check_no_bare_directory
from launcher.config.compose import compose_jobs
from launcher.config.layout import Layout
from launcher.config.schema import EvaluateConfig, RunConfig
from launcher.config.shape import sequence_length
from launcher.config.validate import validate_evaluate
from launcher.evaluation.results import REPORT_KEY, Results, lines, numbers, read_results, write_report
from launcher.evaluation.subject import Subject, data_to_score, known_tokenizer, run_to_evaluate, subject_of
from launcher.evaluation.tasks import check_harness, task_manager_of
from launcher.launch.local import run_local_ranks, start_method_for
from launcher.launch.scratch import scratch_directory
from launcher.launch.this_machine import share_cores, this_machine


def main(arguments: list[str]) -> int:
    check_no_bare_directory(arguments)
    jobs = compose_jobs("evaluate", EvaluateConfig, arguments)
    check_files_differ([job.config for job in jobs], "report")
    for job in jobs:
        job.announce()
        _evaluate(job.config)
    return 0


def _evaluate(config: EvaluateConfig) -> None:
    path, machine = Path(validate_evaluate(config)).expanduser(), this_machine()
    report = writable_report(config.report, "report", key=REPORT_KEY)
    check_harness(config)
    subject = subject_of(config, path)
    run, layout = run_to_evaluate(config, subject, machine)
    data_to_score(config, subject)
    if config.tasks:
        known_tokenizer(config, subject, "tasks")
    manager = task_manager_of(config) if config.tasks else None
    print(f"layout   {layout.describe()}")
    print(f"weights  {subject.weights.path}", flush=True)
    results = _on_ranks(config, subject, run, layout, manager, cores=machine.cores)
    print("\n".join(lines(results)), flush=True)
    if report:
        write_report(report, _about(config, subject, run, layout), results)
        print(f"report   {report}")
    if config.wandb:
        _to_wandb(subject, results)


def _on_ranks(
    config: EvaluateConfig, subject: Subject, run: RunConfig, layout: Layout, manager: Any, *, cores: int
) -> Results:
    share_cores(layout.world_size, cores)
    from launcher.runtime.start import preload

    if layout.device == "cpu":
        preload(layout.device)
    from launcher.evaluation.ranks import evaluate_rank

    with scratch_directory() as folder:
        target = partial(
            evaluate_rank, config=config, subject=subject, run=run, layout=layout, task_manager=manager,
            folder=folder,
        )  # fmt: skip
        run_local_ranks(
            target,
            layout.world_size,
            log_dir=folder,
            start_method=start_method_for(layout.device),
            stopped_limit=60 * run.launch.timeout_minutes,
        )
        return read_results(folder)


def _about(config: EvaluateConfig, subject: Subject, run: RunConfig, layout: Layout) -> dict[str, Any]:
    return {
        "weights": str(subject.weights.path),
        "sequence_length": sequence_length(run),
        "stride": config.stride or sequence_length(run),
        "limit": config.limit,
        "dtype": run.precision.dtype.name,
        "layout": asdict(layout),
    }


def _to_wandb(subject: Subject, results: Results) -> None:
    """Add the results to the summary of the run's W&B run. A failure is a note."""
    from launcher.runtime.metrics.summary import add_to_summary

    with scratch_directory() as temporary:
        for line in add_to_summary(subject.run_dir, numbers(results), temporary):
            print(line)
