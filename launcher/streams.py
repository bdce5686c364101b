"""Standard output and standard error of the command and of its ranks.

A run must outlive its output: a reader such as `head` ends, a disk is full, a terminal is closed or stopped
with Ctrl-S, a descriptor was closed by whoever started the command. Imports nothing heavy.
"""

import errno
import io
import os
import select
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PATIENCE = 10.0  # seconds to wait for a reader that does not read
_NAMES = {1: "standard output", 2: "standard error"}


class OutputLost(SystemExit):
    """Raised if standard output cannot be written, in commands whose purpose is their output.

    No Exception: Hydra prints the help of a command, and reports every Exception as a wrong command line.
    """

    def __init__(self, error: OSError) -> None:
        self.is_reader_gone, self.why = error.errno == errno.EPIPE, error.strerror
        super().__init__(128 + signal.SIGPIPE if self.is_reader_gone else 1)  # as other programs end there


class StandardStream(io.RawIOBase):
    """Standard output or error. A strict stream raises OutputLost; others report it once and continue."""

    def __init__(self, descriptor: int, *, strict: bool) -> None:
        self.strict = strict
        self._descriptor, self._lost, self._patience = descriptor, False, _PATIENCE
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, data: "ReadableBuffer", /) -> int:
        # A pipe that poll reports as writable takes PIPE_BUF bytes without blocking.
        piece = memoryview(data)[: select.PIPE_BUF]
        try:
            if not self.strict and not self._poll.poll(1000 * self._patience):
                self._patience = 0.0  # once: a run must not wait at every line
                raise OSError(errno.EAGAIN, "nothing reads it")
            written = os.write(self._descriptor, piece)
        except OSError as error:
            if self.strict:
                raise OutputLost(error) from None
            self._report(error)
            return len(piece)
        self._patience = _PATIENCE
        return written

    def _report(self, error: OSError) -> None:
        if self._lost:
            return
        self._lost = True
        name, other = _NAMES[self._descriptor], 2 if self._descriptor == 1 else 1
        text = f"launcher: {name} is lost ({error.strerror}); the command continues\n"
        with suppress(OSError):
            if select.select([], [other], [], 0)[1]:
                os.write(other, text.encode())

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


def standard_stream(descriptor: int, *, strict: bool = False) -> TextIO:
    """Return a stream that writes each line at once; characters that it cannot encode are escaped."""
    encoding = getattr(sys.__stdout__ if descriptor == 1 else sys.__stderr__, "encoding", None) or "utf-8"
    buffer = io.BufferedWriter(StandardStream(descriptor, strict=strict))
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)


def open_standard_streams() -> None:
    """Replace sys.stdout and sys.stderr; until `outlive_output`, only the loss of stderr is ignored."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Otherwise the next file that is opened, such as a checkpoint, would be written by print().
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = standard_stream(1, strict=True), standard_stream(2)


def outlive_output() -> None:
    """From now on ignore the loss of standard output: the purpose of the command is its work."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, StandardStream):
        raw.strict = False


def discard_output() -> None:
    """Send the text that is still buffered for standard output to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
