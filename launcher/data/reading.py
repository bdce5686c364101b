"""Read text files for `launcher prepare` as batches of records of about 1 MiB.

A position in a file is a number of decompressed bytes, or a number of rows in a Parquet file.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

BATCH_BYTES = 2**20
PARQUET_ROWS = 64


class FileFormat(Enum):
    """The format of an input file, which decides what a record is."""

    json_lines = "json_lines"  # a record is a line with a JSON object, whose text is a document
    plain_text = "plain_text"  # the file is one document; a record is a line or a piece of a long line
    parquet = "parquet"  # a record is the text of a row, which is a document


FORMATS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), FileFormat.json_lines),
    ".txt": FileFormat.plain_text,
    ".parquet": FileFormat.parquet,
}
COMPRESSED = (".gz", ".zst")


class DamagedFile(Exception):
    """Raised when the rest of a file cannot be read; the message says why."""


_READ_ERRORS = (EOFError, OSError, zlib.error, DamagedFile)  # raised by reading a damaged file


@dataclass(frozen=True)
class Place:
    """The position in the input files where reading continues."""

    file: int = 0  # index of the file
    position: int = 0  # in the file: decompressed bytes, or rows
    line: int = 1  # line number at the position, counted from 1


@dataclass(frozen=True)
class RecordBatch:
    """Records of one file that are tokenised together; the number of workers does not change the split."""

    file: Path
    format: FileFormat
    first_line: int
    records: list[bytes | str | None]  # None: a line longer than max_line, or a null in a Parquet column
    line_counts: list[int]  # lines of each record
    ends_document: bool  # whether a document ends with the last record
    next_place: Place  # where the next batch begins
    bytes_read: int  # bytes of the file on disk that have been read so far
    damage: str | None = None  # why the rest of the file cannot be read


def format_of(path: Path) -> FileFormat | None:
    """Return the format that the file name's ending states, or None for an unknown ending."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        file_format = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if file_format is FileFormat.parquet else file_format
    return FORMATS.get(suffixes[-1]) if suffixes else None


def batches(files: list[Path], start: Place, text_field: str, max_line: int) -> Iterator[RecordBatch]:
    """Yield the batches of the files in order, from `start` on. A line above `max_line` bytes gives None."""
    for number in range(start.file, len(files)):
        place = start if number == start.file else Place(number)
        file_format = format_of(files[number])
        assert file_format is not None
        if file_format is FileFormat.parquet:
            yield from _parquet_batches(files[number], place, text_field)
        else:
            yield from _line_batches(files[number], place, file_format, max_line)


def _line_batches(path: Path, place: Place, file_format: FileFormat, max_line: int) -> Iterator[RecordBatch]:
    line, position = place.line, place.position
    try:
        raw = path.open("rb")
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
        yield RecordBatch(path, file_format, line, [], [], True, Place(place.file + 1), 0, why)
        return
    with raw, _decompressed(path, raw) as file:
        damage, at_end = _seek(file, raw, path, position), False
        while not at_end:
            records: list[bytes | str | None] = []
            line_counts: list[int] = []
            size = 0
            while size < BATCH_BYTES and damage is None:
                try:
                    record, length, lines = _next_record(file, file_format, max_line)
                except _READ_ERRORS as error:
                    damage = f"is damaged: {error}"
                    break
                if not length:
                    break
                records.append(record)
                line_counts.append(lines)
                size += length
            at_end = size < BATCH_BYTES
            position += size
            next_line = line + sum(line_counts)
            next_place = Place(place.file + 1) if at_end else Place(place.file, position, next_line)
            ends = at_end or file_format is not FileFormat.plain_text
            yield RecordBatch(
                path, file_format, line, records, line_counts, ends, next_place, raw.tell(), damage
            )
            line = next_line


def _next_record(file: IO[bytes], file_format: FileFormat, max_line: int) -> tuple[bytes | None, int, int]:
    """Return the next record, its length in bytes (0 at the end of the file) and its number of lines.

    The record is None for a line of JSON longer than `max_line` bytes.
    """
    if file_format is FileFormat.plain_text:
        record = file.readline(BATCH_BYTES)
        record += file.read(_missing_bytes(record))
        return record, len(record), int(record.endswith(b"\n"))
    record = file.readline(max_line + 1)
    length = len(record)
    if length <= max_line or record.endswith(b"\n"):
        return record, length, 1 if record else 0
    while record and not record.endswith(b"\n"):
        record = file.readline(BATCH_BYTES)
        length += len(record)
    return None, length, 1


def _missing_bytes(record: bytes) -> int:
    """Return how many bytes are missing from the last UTF-8 character of `record`."""
    for back, byte in enumerate(reversed(record[-4:])):
        if byte & 0xC0 != 0x80:
            return max(0, (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0) - back)
    return 0


def _seek(file: IO[bytes], raw: IO[bytes], path: Path, position: int) -> str | None:
    """Move to `position`; a compressed file is read up to there. Return why that failed, or None."""
    if path.suffix.lower() not in COMPRESSED:
        raw.seek(position)
        return None
    try:
        while position > 0:
            position -= len(file.read(min(position, BATCH_BYTES))) or position
    except _READ_ERRORS as error:
        return f"is damaged: {error}"
    return None


def _decompressed(path: Path, raw: IO[bytes]) -> Any:
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return raw
    return io.BufferedReader(gzip.GzipFile(fileobj=raw) if suffix == ".gz" else _Zstandard(raw), BATCH_BYTES)


class _Zstandard(io.RawIOBase):
    """Decompresses all zstd frames of a file, one after the other.

    The zstandard library's reader accepts a file that ends inside a frame. This reader raises DamagedFile.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw, self._library = raw, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready, self._inside = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            pending = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._inside = self._library.ZstdDecompressor().decompressobj(), False
            chunk = pending or self._raw.read(2**17)
            if not chunk:
                if self._inside:
                    raise DamagedFile("the file ends in the middle of a zstd frame")
                return 0
            self._inside = True
            try:
                self._ready = self._frame.decompress(chunk)
            except self._library.ZstdError as error:
                raise DamagedFile(str(error)) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _parquet_batches(path: Path, place: Place, text_field: str) -> Iterator[RecordBatch]:
    import pyarrow
    import pyarrow.parquet as parquet

    row, size = place.position, path.stat().st_size

    def batch(records: list[bytes | str | None], damage: str | None, last: bool) -> RecordBatch:
        next_row = row + len(records)
        next_place = Place(place.file + 1) if last else Place(place.file, next_row, next_row + 1)
        read = size if last else size * next_row // max(1, total)  # estimated
        lines = [1] * len(records)
        return RecordBatch(path, FileFormat.parquet, row + 1, records, lines, True, next_place, read, damage)

    total = 0
    try:
        with parquet.ParquetFile(path) as file:
            total = file.metadata.num_rows
            if text_field not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise DamagedFile(f"has no column {text_field!r}; its columns are {columns}")
            skip, groups = row, list(range(file.metadata.num_row_groups))
            while groups and skip >= file.metadata.row_group(groups[0]).num_rows:
                skip -= file.metadata.row_group(groups.pop(0)).num_rows
            row_batches = file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[text_field])
            for rows in row_batches if groups else ():
                texts = rows.column(0).to_pylist()[skip:]
                skip = max(0, skip - len(rows))
                if texts:
                    yield batch(texts, None, last=False)
                    row += len(texts)
    except DamagedFile as error:
        yield batch([], str(error), last=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield batch([], f"is damaged: {str(error).splitlines()[0]}", last=True)
    else:
        yield batch([], None, last=True)
