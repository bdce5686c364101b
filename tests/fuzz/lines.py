"""Record which lines of the launcher a process and the ranks that it forks execute."""

import mmap
import sys
from collections.abc import Callable
from itertools import pairwise
from types import FrameType
from typing import Any

from tests.fuzz.mutants import PACKAGE, files


class Lines:
    """A byte for each line of the mutated files, in memory that forked processes share."""

    def __init__(self) -> None:
        self._start: dict[str, int] = {}
        size = 1
        for file in files():
            path = PACKAGE / file
            self._start[str(path)] = size
            size += len(path.read_bytes().splitlines()) + 2
        self._seen = mmap.mmap(-1, size)
        self._size = size

    def begin(self) -> None:
        """Trace this thread from now on, and the processes that it forks."""
        start, seen = self._start, self._seen

        def of_file(first: int) -> Callable[..., Any]:
            def line(frame: FrameType, event: str, _: object) -> Any:
                if event == "line":
                    seen[first + frame.f_lineno] = 1
                return line

            return line

        tracers = {path: of_file(first) for path, first in start.items()}

        def call(frame: FrameType, _: str, __: object) -> Any:
            return tracers.get(frame.f_code.co_filename)

        sys.settrace(call)

    def executed(self) -> dict[str, set[int]]:
        """Return the executed lines of each file, below launcher/."""
        starts = [*self._start.items(), ("", self._size)]
        return {
            path.removeprefix(f"{PACKAGE}/"): {
                index - first for index in range(first, after) if self._seen[index]
            }
            for (path, first), (_, after) in pairwise(starts)
        }
