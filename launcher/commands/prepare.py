"""The command `launcher prepare`: turn text into token files."""

import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launcher.commands.path_arguments import is_path, typed_path
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError, typed_text
from launcher.config.paths import free_path, path_argument
from launcher.config.schema import EndInText, PrepareConfig
from launcher.config.validate import validate_prepare
from launcher.data.dataset_card import end_of_document_of, vocab_size_of
from launcher.data.input_files import LeftOut, listed
from launcher.data.preparation import InputFile, Preparation, PrepareProgress, bad_lines_path, find_inputs
from launcher.data.token_file import bin_path, index_path
from launcher.data.tokenizer import USUAL_ENDS
from launcher.launch.this_machine import this_machine
from launcher.text import whole

_LINE_INTERVAL = 30.0  # seconds between two progress lines if the output is not a terminal


def main(arguments: list[str]) -> int:
    """Run `launcher prepare`; return the exit code. Raises ConfigError."""
    paths = [argument for argument in arguments if is_path(argument, PrepareConfig)]
    overrides = [argument for argument in arguments if argument not in paths]
    jobs = compose_jobs("prepare", PrepareConfig, overrides)
    if not jobs:
        return 0  # --help
    if len(paths) < 2 or len(jobs) > 1:
        why = "the command needs at least one SOURCE to read and the TARGET to write"
        raise ConfigError(" ".join(["prepare", *arguments]), None, why, "launcher prepare SOURCE TARGET")
    *sources, target = (path_argument("prepare", path) for path in paths)
    if target.suffix in (".bin", ".idx"):
        target = target.with_suffix("")
    if not target.name or target.name == "..":
        remedy = _command(sources, target / "web", overrides)
        raise ConfigError("TARGET", target, "the token files need a name", remedy)
    validate_prepare(jobs[0].config)
    inputs, left_out = find_inputs(sources)
    workers = jobs[0].config.workers or this_machine().cores
    job = Preparation(inputs, target, jobs[0].config, workers)
    existing = [path for path in job.outputs() if path.exists()]
    # A stop between the final renames leaves some of the files and TARGET.partial/, from which the command
    # continues. If the .idx exists, the token files are complete.
    if existing and (index_path(target) in existing or not job.folder.exists()):
        why = f"{existing[-1]} already exists, and `launcher prepare` does not overwrite files"
        remedy = _command(sources, free_path(target), overrides)
        raise ConfigError("TARGET", target, why, remedy)
    signal.signal(signal.SIGTERM, _stop)
    try:
        _report(_run_with_progress(job, inputs), job, sources, left_out)
    except OSError as error:
        why = f"{error.filename or target} cannot be written: {error.strerror}"
        remedy = "a TARGET in a directory that you may write to, on a disk with enough free space"
        raise ConfigError("TARGET", target, why, remedy) from None
    except KeyboardInterrupt:
        print("\nlauncher: interrupted; run the same command again to continue", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _command(sources: list[Path], target: Path, overrides: list[str]) -> str:
    return shlex.join(["launcher", "prepare", *map(typed_path, [*sources, target]), *overrides])


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    # An exception, so that the worker processes are ended before this process exits.
    raise SystemExit(128 + number)


def _run_with_progress(job: Preparation, inputs: list[InputFile]) -> PrepareProgress:
    total, started = sum(file.bytes for file in inputs), time.monotonic()
    if not sys.stdout.isatty():
        last = started

        def line(progress: PrepareProgress, done: int) -> None:
            nonlocal last
            if time.monotonic() - last > _LINE_INTERVAL:
                last = time.monotonic()
                print(f"{done / max(1, total):.0%}  {_speed(progress, started)}", flush=True)

        return job.run(line)
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    # auto_refresh would start a thread, and the worker processes are forked from this process.
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, auto_refresh=False) as bar:
        task = bar.add_task("starting", total=total)

        def show(progress: PrepareProgress, done: int) -> None:
            bar.update(task, completed=done, description=_speed(progress, started), refresh=True)

        return job.run(show)


def _speed(progress: PrepareProgress, started: float) -> str:
    rate = progress.tokens / max(time.monotonic() - started, 1e-9)
    bad = f"  bad lines: {whole(progress.bad_lines)}" if progress.bad else ""
    documents, tokens = whole(progress.documents), whole(progress.tokens)
    return f"{documents} documents  {tokens} tokens  {whole(rate)} tokens/s{bad}"


def _report(progress: PrepareProgress, job: Preparation, sources: list[Path], left_out: LeftOut) -> None:
    """Print what was read and written, and what was left out by reason."""
    if job.note:
        print(f"note     {job.note}")
    print(f"prepared {bin_path(job.target)}")
    for name, value in _rows(progress, job, sources, left_out):
        print(f"  {name:<20}{value}")
    train, size = typed_text("data.train", str(job.target)), vocab_size_of(job.target)
    source = "chat" if job.template else "tokens"
    end = f" data.end_of_document={end_of_document_of(job.target)}" if job.template else ""
    print(f"train    launcher data={source} {train}{end} model.vocab_size={size}")


def _rows(
    progress: PrepareProgress, job: Preparation, sources: list[Path], left_out: LeftOut
) -> Iterator[tuple[str, str]]:
    yield "read from", ", ".join(map(str, sources))
    without = f" (without text: {whole(progress.files_without_text)})" if progress.files_without_text else ""
    yield "files", f"{whole(len(job.inputs))}{without}"
    yield "files left out", listed(left_out) or "0"
    empty = f" (empty texts left out: {whole(progress.empty)})" if progress.empty else ""
    yield "documents", f"{whole(progress.documents)}{empty}"
    yield "tokens", whole(progress.tokens)
    bad = listed(progress.bad)
    yield "bad lines left out", f"{bad} (in {bad_lines_path(job.target)})" if bad else "0"
    yield "end of a document", f"{job.end}, from {_origin_of_end(job)}"
    if progress.spelled:
        effect = {
            EndInText.escape: "kept as text, or a bad line",
            EndInText.refuse: "a bad line",
            EndInText.count: "each ends a document",
        }[job.config.end_of_document_in_text]
        yield "end in the text", f"{whole(progress.spelled)} ({effect})"


def _origin_of_end(job: Preparation) -> str:
    t = job.config.tokenizer
    if t.end_of_document is not None:
        return "tokenizer.end_of_document"
    if t.path is not None:
        return f"{t.path} (the first of {', '.join(USUAL_ENDS)} that it has)"
    return "the trained tokenizer" if t.train else "the byte tokenizer"
