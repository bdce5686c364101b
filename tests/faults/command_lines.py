"""Random command lines: each is accepted or refused with one message, in bounded time and memory."""

import shlex

from tests.config.command_lines import random_command_line
from tests.faults.campaign import Family, Try
from tests.forked_commands import light

MOST_MEMORY = 3 * 2**30  # bytes more than the command line itself
LIMIT = 60.0
# Commands check their arguments, and end where their work would begin.
PROGRAM = f"""
import pathlib, resource, sys
from tests.config.command_lines import Started, nothing_starts
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {MOST_MEMORY},) * 2)
from launcher.__main__ import main
try:
    with nothing_starts():
        main()
except Started:
    sys.exit(0)
"""


def attempt(this: Try) -> None:
    arguments = random_command_line(this.rng)
    this.case = f"launcher {shlex.join(arguments)[:300]!a}"
    (this.folder / "README.md").write_text("text\n" * 100)
    # A program cannot be started with such an argument.
    arguments = [argument.replace("\0", "\ufffd") for argument in arguments]
    done = this.run(*arguments, program=PROGRAM, server=light, limit=LIMIT)
    message, *remedies = done.error.removeprefix("launcher: ").split("\n  try: ")
    if done.code == 2:
        this.expect(bool(message.strip()), "silent", f"no message: {done.brief}")
        this.expect(sum(map(bool, map(str.strip, remedies))) <= 1, "silent", f"two remedies: {done.brief}")
    else:
        this.expect(done.code == 0 or (done.code == 1 and bool(done.said)), "silent", done.brief)


FAMILY = Family("command_lines", 10_000, attempt)
