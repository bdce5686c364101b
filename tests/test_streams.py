"""Output that is lost ends no run; a command whose purpose is its output ends without a traceback."""

import os
import pty
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from launcher import streams

PROGRAM = """
import os, sys, time
from launcher.streams import open_standard_streams, outlive_output
open_standard_streams()
outlive_output()
for number in range(2000):
    print("line", number)
print("\\u00fc", file=sys.stderr)
file = open("work", "w")
assert file.fileno() > 2
file.write("done")
"""


def run(redirected: str, folder: Path, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    """Run the program with its output redirected as in a shell."""
    command = ["bash", "-c", f'"$0" -c "$1" {redirected}', sys.executable, program]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


def test_a_program_outlives_every_loss_of_its_output(tmp_path: Path) -> None:
    for redirected, reported in {
        ">/dev/full": "standard output is lost (No space left on device)",
        "2>/dev/full >/dev/null": "",
        ">/dev/full 2>/dev/full": "",
        ">&-": "",
        "2>&-": "",
        ">&- 2>&- <&-": "",
        "| head -1; exit ${PIPESTATUS[0]}": "standard output is lost (Broken pipe)",
    }.items():
        done = run(redirected, tmp_path)
        assert done.returncode == 0, (redirected, done.stderr)
        assert (tmp_path / "work").read_text() == "done"
        assert done.stderr.count("is lost") == bool(reported), (redirected, done.stderr)
        assert reported in done.stderr
        (tmp_path / "work").unlink()


def test_a_reader_that_stops_reading_costs_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_PATIENCE", 0.2)
    monkeypatch.setitem(streams._NAMES, writing := os.pipe()[1], "a pipe")
    stream = streams.StandardStream(writing, strict=False)
    begun = time.monotonic()
    for _ in range(100):
        stream.write(b"x" * 4096)
    assert 0.2 < time.monotonic() - begun < 2.0


def test_a_terminal_that_is_stopped_with_ctrl_s_does_not_stop_the_program() -> None:
    ours, theirs = pty.openpty()
    termios.tcflow(theirs, termios.TCOOFF)
    program = (
        "from launcher import streams\nstreams._PATIENCE = 0.1\nstreams.open_standard_streams()\n"
        "streams.outlive_output()\nfor _ in range(5): print('x')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=theirs, stderr=subprocess.PIPE, text=True
    )
    _, error = process.communicate(timeout=30)
    assert process.returncode == 0
    assert error.count("standard output is lost (nothing reads it)") == 1
    os.close(ours)
    os.close(theirs)


def test_a_command_for_its_output_ends_quietly_at_a_closed_pipe_and_says_that_a_disk_is_full(
    tmp_path: Path,
) -> None:
    program = "from launcher import __main__\n__main__.main()\n"
    quiet = run("generate --help | head -0; exit ${PIPESTATUS[0]}", tmp_path, program)
    assert (quiet.returncode, quiet.stderr) == (141, "")
    full = run("--version >/dev/full", tmp_path, program)
    assert full.returncode == 1
    assert full.stderr == "launcher: the output cannot be written: No space left on device\n"
    refused = run("--version 2>/dev/full >/dev/null; exit $?", tmp_path, program)
    assert refused.returncode == 0
    refused = run("trian >/dev/null 2>/dev/full", tmp_path, program)
    assert refused.returncode == 2
