"""Random command lines are accepted or refused with one message, in seconds and in bounded memory."""

import contextlib
import io
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.command_line import run_command
from tests.config.command_lines import Started, nothing_starts, random_command_line

MOST_SECONDS, MOST_MEMORY = 20, 3 * 2**30


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise TimeoutError after MOST_SECONDS of processor time, and MemoryError above MOST_MEMORY."""

    def late(*_: object) -> None:
        raise TimeoutError

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGVTALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, previous)


def ended(arguments: list[str]) -> tuple[int, str]:
    """Return the exit code and the standard error of a command that starts nothing; 0 if it would start."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            code = run_command(arguments)
        except Started:
            code = 0
        except SystemExit as end:  # --version
            code = int(end.code or 0)
    return code, error.getvalue()


def check(arguments: list[str]) -> None:
    with limited():
        code, error = ended(arguments)
    assert "Traceback" not in error
    if code == 2:
        message, *remedy = error.removeprefix("launcher: ").split("\n  try: ")
        assert message
        assert [text for text in remedy if text.strip()] == remedy[:1], error
    else:
        assert code in (0, 1)


# Each seed gives 50 command lines; more of them are a variation.
SEEDS = [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 24))]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_command_lines_end_well(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "README.md").write_text("text\n" * 100)
    rng = random.Random(seed)
    with nothing_starts():
        for _ in range(50):
            arguments = random_command_line(rng)
            try:
                check(arguments)
            except BaseException as error:
                error.add_note(f"launcher {[argument[:200] for argument in arguments]}")
                raise
