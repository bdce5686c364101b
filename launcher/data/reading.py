"""Files of text as batches of records: what `launcher prepare` reads, a little at a time.

A position in a file is the number of bytes before it (decompressed), or of rows in a Parquet file.
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


class Kind(Enum):
    """A record of `lines` is a JSON object, one of `rows` a text; those of `text` are pieces of one text."""

    lines = "lines"
    text = "text"
    rows = "rows"


KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), Kind.lines),
    ".txt": Kind.text,
    ".parquet": Kind.rows,
}
COMPRESSED = (".gz", ".zst")


class Damaged(Exception):
    """A file that cannot be read on; says why."""


_DAMAGE = (EOFError, OSError, zlib.error, Damaged)  # what reading one raises


@dataclass(frozen=True)
class Place:
    """Where reading goes on: a file by its number, the position in it, and that line's number from 1."""

    file: int = 0
    position: int = 0
    line: int = 1


@dataclass(frozen=True)
class Batch:
    """Records that are tokenised together. The same batches come of the same files, whoever tokenises them.

    A record of None is a line that is too long. `damage` says why the file ends with this batch.
    """

    file: Path
    kind: Kind
    first_line: int
    records: list[bytes | str | None]
    lines: list[int]  # that each record takes
    ends_document: bool  # with its last record: not within a text
    after: Place
    bytes_read: int  # of the file as it lies on disk, so far
    damage: str | None = None


def kind_of(path: Path) -> Kind | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        kind = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if kind is Kind.rows else kind
    return KINDS.get(suffixes[-1]) if suffixes else None


def batches(files: list[Path], start: Place, text_field: str, max_line: int) -> Iterator[Batch]:
    """All batches of the files in order, from `start` on."""
    for number in range(start.file, len(files)):
        place = start if number == start.file else Place(number)
        kind = kind_of(files[number])
        assert kind is not None
        if kind is Kind.rows:
            yield from _rows(files[number], place, text_field)
        else:
            yield from _lines(files[number], place, kind, max_line)


def _lines(path: Path, place: Place, kind: Kind, max_line: int) -> Iterator[Batch]:
    line, position = place.line, place.position
    try:
        raw = path.open("rb")
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
        yield Batch(path, kind, line, [], [], True, Place(place.file + 1), 0, why)
        return
    with raw, _opened(path, raw) as file:
        damage = _skip(file, raw, path, position)
        while True:
            records: list[bytes | str | None] = []
            lines: list[int] = []
            size = 0
            while size < BATCH_BYTES and damage is None:
                try:
                    record, length, newlines = _next(file, kind, max_line)
                except _DAMAGE as error:
                    damage = f"is damaged: {error}"
                    break
                if not length:
                    break
                records.append(record)
                lines.append(newlines)
                size += length
            at_end = size < BATCH_BYTES
            position += size
            after = Place(place.file + 1) if at_end else Place(place.file, position, line + sum(lines))
            yield Batch(path, kind, line, records, lines, _ends(kind, at_end), after, raw.tell(), damage)
            line += sum(lines)
            if at_end:
                return


def _ends(kind: Kind, at_end: bool) -> bool:
    return at_end or kind is not Kind.text


def _next(file: IO[bytes], kind: Kind, max_line: int) -> tuple[bytes | None, int, int]:
    """The next record, its bytes (0 at the end) and its lines. Of text, a line or a part of one."""
    if kind is Kind.text:
        record = file.readline(BATCH_BYTES)
        record += file.read(_missing(record))
        return record, len(record), int(record.endswith(b"\n"))
    record = file.readline(max_line + 1)
    length = len(record)
    if length <= max_line or record.endswith(b"\n"):
        return record, length, 1 if record else 0
    while record and not record.endswith(b"\n"):
        record = file.readline(BATCH_BYTES)
        length += len(record)
    return None, length, 1


def _missing(record: bytes) -> int:
    """The bytes of UTF-8 that its last character lacks."""
    for back, byte in enumerate(reversed(record[-4:])):
        if byte & 0xC0 != 0x80:
            return max(0, (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0) - back)
    return 0


def _skip(file: IO[bytes], raw: IO[bytes], path: Path, position: int) -> str | None:
    if path.suffix.lower() not in COMPRESSED:
        raw.seek(position)
        return None
    try:
        while position > 0:
            position -= len(file.read(min(position, BATCH_BYTES))) or position
    except _DAMAGE as error:
        return f"is damaged: {error}"
    return None


def _opened(path: Path, raw: IO[bytes]) -> Any:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BATCH_BYTES)
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstandard(raw), BATCH_BYTES)
    return raw


class _Zstandard(io.RawIOBase):
    """Frames decompressed one after the other. The library's own reader takes any end for the right one."""

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
                    raise Damaged("it ends in the middle of a zstd frame")
                return 0
            self._inside = True
            try:
                self._ready = self._frame.decompress(chunk)
            except self._library.ZstdError as error:
                raise Damaged(str(error)) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _rows(path: Path, place: Place, text_field: str) -> Iterator[Batch]:
    import pyarrow
    import pyarrow.parquet as parquet

    row, size = place.position, path.stat().st_size

    def batch(records: list[bytes | str | None], damage: str | None, last: bool) -> Batch:
        after = (
            Place(place.file + 1) if last else Place(place.file, row + len(records), row + len(records) + 1)
        )
        share = size if last else size * (row + len(records)) // max(1, total)
        return Batch(path, Kind.rows, row + 1, records, [1] * len(records), True, after, share, damage)

    total = 0
    try:
        with parquet.ParquetFile(path) as file:
            total = file.metadata.num_rows
            if text_field not in file.schema_arrow.names:
                raise Damaged(f"has no column {text_field!r}, but {', '.join(file.schema_arrow.names)}")
            skip, groups = row, list(range(file.metadata.num_row_groups))
            while groups and skip >= file.metadata.row_group(groups[0]).num_rows:
                skip -= file.metadata.row_group(groups.pop(0)).num_rows
            found = file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[text_field])
            for rows in found if groups else ():
                texts = rows.column(0).to_pylist()[skip:]
                skip = max(0, skip - len(rows))
                if texts:
                    yield batch(texts, None, last=False)
                    row += len(texts)
    except Damaged as error:
        yield batch([], str(error), last=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield batch([], f"is damaged: {str(error).splitlines()[0]}", last=True)
    else:
        yield batch([], None, last=True)
