"""The command `launcher prepare`."""

import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.schema import PrepareConfig
from launcher.config.validate import validate_prepare
from launcher.data.prepare import Input, Preparation, bad_lines_path, find_inputs
from launcher.data.prepare import Progress as Prepared
from launcher.data.token_file import bin_path, index_path
from launcher.launch.machine import this_machine
from launcher.text import whole

_LINE_EVERY = 30.0  # seconds between lines where there is no terminal


def main(arguments: list[str]) -> int:
    """Run `launcher prepare`; the exit code. Raises ConfigError."""
    paths = [argument for argument in arguments if not argument.startswith("-") and "=" not in argument]
    jobs = compose_jobs("prepare", PrepareConfig, [one for one in arguments if one not in paths])
    if not jobs:
        return 0  # --help
    if len(paths) < 2 or len(jobs) > 1:
        why = "takes what to read, and the name of what to write"
        raise ConfigError(" ".join(["prepare", *arguments]), None, why, "launcher prepare SOURCE TARGET")
    *sources, target = (Path(path).expanduser() for path in paths)
    validate_prepare(jobs[0].config)
    inputs, others = find_inputs(sources)
    workers = jobs[0].config.workers or this_machine().cores
    job = Preparation(inputs, target, jobs[0].config, workers)
    taken = [path for path in job.places() if path.exists()]
    # A stop in the last moment leaves some, with the folder to go on from; with the .idx all is there.
    if taken and (index_path(target) in taken or not job.folder.exists()):
        why = f"{taken[-1]} is there already, and nothing is overwritten"
        again = shlex.join(["launcher", "prepare", *map(str, sources), f"{target}-2"])
        raise ConfigError("TARGET", target, why, again)
    if others:
        print(f"note     {others} files of other kinds are left out")
    signal.signal(signal.SIGTERM, _stop)
    try:
        _report(_shown(job, inputs), job)
    except OSError as error:
        where = error.filename or target
        raise ConfigError(
            "TARGET", target, f"{where} cannot be written: {error.strerror}", "a disk with room for it"
        ) from None
    except KeyboardInterrupt:
        print("\nlauncher: interrupted: the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    # So that the worker processes are ended on the way out.
    raise SystemExit(128 + number)


def _shown(job: Preparation, inputs: list[Input]) -> Prepared:
    total, started = sum(one.bytes for one in inputs), time.monotonic()
    if not sys.stdout.isatty():
        last = started

        def line(progress: Prepared, done: int) -> None:
            nonlocal last
            if time.monotonic() - last > _LINE_EVERY:
                last = time.monotonic()
                print(f"{done / max(1, total):.0%}  {_speed(progress, started)}", flush=True)

        return job.run(line)
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    # No thread of its own: the worker processes are forked from this one.
    bar = Progress(
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        auto_refresh=False,
    )
    with bar:
        task = bar.add_task("starting", total=total)

        def show(progress: Prepared, done: int) -> None:
            bar.update(task, completed=done, description=_speed(progress, started), refresh=True)

        return job.run(show)


def _speed(progress: Prepared, started: float) -> str:
    rate = progress.tokens / max(time.monotonic() - started, 1e-9)
    bad = f"  {whole(progress.bad)} bad lines" if progress.bad else ""
    documents, tokens = whole(progress.documents), whole(progress.tokens)
    return f"{documents} documents  {tokens} tokens  {whole(rate)} tokens/s{bad}"


def _report(progress: Prepared, job: Preparation) -> None:
    if progress.bad:
        listed = bad_lines_path(job.target)
        print(f"note     {whole(progress.bad)} bad lines are left out: {listed} lists them")
    if job.resumed:
        print("note     went on from where an earlier start stopped")
    documents, tokens = whole(progress.documents), whole(progress.tokens)
    print(f"prepared {documents} documents, {tokens} tokens: {bin_path(job.target)}")
    print(f"train    launcher data=tokens {shlex.quote(f'data.train={job.target}')} MODEL")
