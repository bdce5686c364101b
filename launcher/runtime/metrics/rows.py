"""metrics.jsonl: a line of JSON for each logged step. Does not import wandb.

The file is read as a stream, and lines that are not rows never end a run. JSON has no NaN and no infinity:
such a value is null in the file and NaN in a row.
"""

import errno
import json
import math
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from launcher.files import replacing
from launcher.text import json_text, size

Row = dict[str, float | int]

# A line as rows are written. Matching takes half the time of parsing.
_USUAL_LINE = re.compile(
    rb'\{"step": (\d{1,18})(?:, "[\w/.-]++": (?:-?\d++(?:\.\d++)?+(?:e[+-]\d++)?+|null))*+\}\n', re.ASCII
)
_LONGEST_LINE = 1 << 20  # bytes; more without a line break is damage
_BLOCK = 1 << 16  # bytes that are read at a time from the end of the file
_WAITING_ROWS = 10_000


_Line = tuple[bytes, int | None]  # the text, and the step of its row; None if the line is not a row


def rows_in(path: Path, end: int | None = None, *, start: int = 0) -> Iterator[Row]:
    """Yield the rows in the bytes from `start` to `end`, or to the end of the file; none without a file."""
    for text, step in _lines(path, end, start=start):
        if step is not None:
            yield _row_of(text)


def rows_backwards(path: Path, most_bytes: int | None = None) -> Iterator[Row]:
    """Yield the rows from the last to the first, of the last `most_bytes` of the file or of all of it."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        position = _end_of_data(file)
        end = 0 if most_bytes is None else max(0, position - most_bytes)
        rest = b""  # the end of a line whose begin is in an earlier block
        while position > end:
            start = max(end, position - _BLOCK)
            file.seek(start)
            lines = (file.read(position - start) + rest).split(b"\n")
            position = start
            rest = lines.pop(0) if start > 0 else b""
            rest = rest if len(rest) <= _LONGEST_LINE else b""
            for text in reversed(lines):
                if text and _step_of(text + b"\n") is not None:
                    yield _row_of(text)


def last_step(path: Path) -> int:
    """Return the step of the last row, or 0."""
    return int(next(rows_backwards(path), {"step": 0})["step"])


def count_and_last_step(path: Path) -> tuple[int, int]:
    """Return the number of rows, and the step of the last row or 0."""
    count = last = 0
    for _, step in _lines(path):
        if step is not None:
            count, last = count + 1, step
    return count, last


def drop_rows_from(step: int, path: Path) -> list[str]:
    """Drop the rows from `step` on and move lines that are not rows to a file beside; return notes.

    Raises OSError.
    """
    notes = _without_hole(path)
    kept_end, position, is_ordered, damaged = 0, 0, True, 0
    for text, line_step in _lines(path):
        position += len(text)
        if line_step is None:
            damaged += 1
        elif line_step < step:
            is_ordered = is_ordered and kept_end + len(text) == position and text.endswith(b"\n")
            kept_end = position
    if is_ordered and not damaged:
        if kept_end < position:
            os.truncate(path, kept_end)
        return notes
    aside = path.with_name(f"{path.name}.damaged")
    with replacing(path) as new, new.open("wb") as kept, aside.open("ab") as removed:
        for text, line_step in _lines(path):
            if line_step is None or line_step < step:
                (removed if line_step is None else kept).write(text.rstrip(b"\n") + b"\n")
    return notes + ([f"{damaged} lines of {path} are not rows; they are now in {aside}"] if damaged else [])


def _without_hole(path: Path) -> list[str]:
    """Remove the hole at the end of a file, which may take terabytes of reading; return a note."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        end = _end_of_data(file)
        unwritten = os.fstat(file.fileno()).st_size - end
    if not unwritten:
        return []
    os.truncate(path, end)
    return [f"{path} ended in {size(unwritten)} that were never written; they are removed"]


def _end_of_data(file: BinaryIO) -> int:
    """Return where the data of a file ends: at its end, or at a hole that takes all of the rest."""
    end = os.fstat(file.fileno()).st_size
    begin, hole = 0, end
    try:
        while begin < end:
            hole = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            begin = os.lseek(file.fileno(), hole, os.SEEK_DATA) if hole < end else end
    except OSError as error:
        return hole if error.errno == errno.ENXIO else end  # some file systems cannot tell
    return end


class RowFile:
    """Appends rows to metrics.jsonl. Rows that cannot be written wait in memory for the next row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._waiting: deque[bytes] = deque(maxlen=_WAITING_ROWS)
        self._is_lost = False

    def append(self, row: Row) -> list[str]:
        """Write the row; return notes to the user if that begins to fail, or succeeds again."""
        self._waiting.append(json_text(row).encode() + b"\n")
        try:
            self._write_waiting()
        except OSError as error:
            was_lost, self._is_lost = self._is_lost, True
            why = f"{self._path} cannot be written ({error.strerror}); training continues"
            return [] if was_lost else [f"{why}, and rows wait in memory"]
        was_lost, self._is_lost = self._is_lost, False
        return [f"{self._path} is written again, with the rows that waited"] if was_lost else []

    def close(self) -> list[str]:
        """Return a note if rows are lost."""
        if self._file is not None:
            self._file.close()
        return [f"{self._path} lacks the last {len(self._waiting)} rows"] if self._waiting else []

    def _write_waiting(self) -> None:
        if self._file is None:
            self._file = _open_to_append(self._path)
        while self._waiting:
            end = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(self._waiting[0]) < len(self._waiting[0]):
                    raise OSError(None, "the disk is full")
            except OSError:
                self._file.truncate(end)  # the next row must not continue a part of this one
                raise
            self._waiting.popleft()


def _open_to_append(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        raise OSError(None, "not a file")  # opening a pipe would wait for its reader
    return path.open("ab", buffering=0)


def _lines(path: Path, end: int | None = None, *, start: int = 0) -> Iterator[_Line]:
    """Yield the lines that begin from `start` on and before `end`."""
    if not path.exists():
        return
    if not path.is_file():
        raise OSError(None, "not a file")
    with path.open("rb") as file:
        if end is None:
            end = _end_of_data(file)
        file.seek(start)
        while file.tell() < end and (text := file.readline(_LONGEST_LINE)):
            yield text, _step_of(text)


def _row_of(line: bytes) -> Row:
    return {name: math.nan if value is None else value for name, value in json.loads(line).items()}


def _step_of(line: bytes) -> int | None:
    """Return the step of a row, or None if the line is not a row."""
    if match := _USUAL_LINE.fullmatch(line):
        return int(match[1])
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int and 0 <= step < 2**63 else None
