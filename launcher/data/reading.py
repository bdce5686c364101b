"""Read text files for `launcher prepare` as batches of records of about 1 MiB.

A position in a file is a number of bytes of its text as UTF-8, or a number of rows in a Parquet file.
The first bytes of a file decide how it is compressed and encoded, because endings are often wrong.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import IO, Any

from launcher.data.parquet_pages import UnboundedPages, rows_per_batch

BATCH_BYTES = 2**20
# Compressed bytes that are decompressed at once. 4 bytes of zstd can stand for 128 KiB, so 2 KiB for 64 MiB.
_ZSTANDARD_PIECE = 2**11
_ZSTANDARD_WINDOW = 2**27  # bytes that a frame may refer back to; `zstd --ultra --long` alone writes more


class FileFormat(Enum):
    """The format of an input file, which decides what a record is."""

    json_lines = "json_lines"  # a record is a JSON object, on a line or in an array; its text is a document
    plain_text = "plain_text"  # the file is one document; a record is a line or a piece of a long line
    parquet = "parquet"  # a record is the text of a row, which is a document


FORMATS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), FileFormat.json_lines),
    ".txt": FileFormat.plain_text,
    ".parquet": FileFormat.parquet,
}
COMPRESSED = (".gz", ".zst")

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of a frame without text, which pzstd writes first
_NOT_READ = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\x04\x22\x4d\x18": "lz4"}
# The longer marks first: that of UTF-16 is also the beginning of that of UTF-32.
_MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
JSON_ARRAY = "begins a JSON array or an object over several lines, and one object per line is read"
_HEAD = 4096  # bytes of text that are looked at to tell JSON lines from an array of JSON objects


class DamagedFile(Exception):
    """Raised when the rest of a file cannot be read; the message says why."""


# Raised by reading a damaged file.
_READ_ERRORS = (EOFError, OSError, zlib.error, UnicodeError, DamagedFile)

# Returns the next record, its length in bytes (0 at the end of the file) and its number of lines.
# The record is None for a line of JSON that is longer than max_line bytes.
NextRecord = Callable[[], tuple[bytes | None, int, int]]


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
    records: list[Any]  # bytes; None for a line longer than max_line; str or a dict of a Parquet row
    line_counts: list[int]  # lines of each record
    ends_document: bool  # whether a document ends with the last record
    next_place: Place  # where the next batch begins
    bytes_read: int  # bytes of the file on disk that have been read so far
    damage: str | None = None  # why the rest of the file cannot be read
    fields: tuple[str, ...] = ()  # of a Parquet file: columns, or fields in them, that contain text


def format_of(path: Path) -> FileFormat | None:
    """Return the format that the file name's ending states, or None for an unknown ending."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        file_format = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if file_format is FileFormat.parquet else file_format
    return FORMATS.get(suffixes[-1]) if suffixes else None


def batches(
    files: list[Path], start: Place, text_field: str, max_line: int, json_arrays: bool = False
) -> Iterator[RecordBatch]:
    """Yield the batches of the files in order, from `start` on. A line above `max_line` bytes gives None.

    With `json_arrays`, JSON files may contain arrays, and objects that span lines.
    """
    for number in range(start.file, len(files)):
        place = start if number == start.file else Place(number)
        file_format = format_of(files[number])
        assert file_format is not None
        if file_format is FileFormat.parquet:
            yield from _parquet_batches(files[number], place, text_field)
        else:
            yield from _line_batches(files[number], place, file_format, max_line, json_arrays)


def _line_batches(
    path: Path, place: Place, file_format: FileFormat, max_line: int, json_arrays: bool
) -> Iterator[RecordBatch]:
    line, position = place.line, place.position
    try:
        raw = path.open("rb")
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
        yield RecordBatch(path, file_format, line, [], [], True, Place(place.file + 1), 0, why)
        return
    with raw:
        next_record, damage = _record_reader(raw, file_format, position, max_line, json_arrays)
        at_end = False
        while not at_end:
            records: list[bytes | None] = []
            line_counts: list[int] = []
            size = 0
            while size < BATCH_BYTES and damage is None:
                try:
                    record, length, lines = next_record()
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


def _record_reader(
    raw: IO[bytes], file_format: FileFormat, position: int, max_line: int, json_arrays: bool
) -> tuple[NextRecord, str | None]:
    """Return a function that reads the records from `position` on; or why the file cannot be read."""
    try:
        file, head = _text_stream(raw, position)
    except _READ_ERRORS as error:
        return lambda: (None, 0, 0), f"is damaged: {error}"
    if file_format is FileFormat.plain_text:
        return lambda: _next_piece(file), None
    if _spans_lines(head):
        closed = position == 0 or not head.startswith(b"[")
        values = _JsonValues(file, max_line, closed)
        return values, None if json_arrays else JSON_ARRAY
    return lambda: _next_line(file, max_line), None


def _spans_lines(head: bytes) -> bool:
    """Return whether a file that begins with `head` is a JSON array, or objects that span lines."""
    first, _, rest = head.partition(b"\n")
    if head.startswith(b"[") and rest.strip():
        with suppress(ValueError):
            json.loads(first)
            return False  # lines, and the first of them is an array
    return head.startswith(b"[") or (first.strip() == b"{" and rest.lstrip()[:1] in (b'"', b"}"))


def _next_piece(file: IO[bytes]) -> tuple[bytes, int, int]:
    """Return the next line of plain text, or a piece of a long line."""
    record = file.readline(BATCH_BYTES)
    record += file.read(_missing_bytes(record))
    return record, len(record), int(record.endswith(b"\n"))


def _next_line(file: IO[bytes], max_line: int) -> tuple[bytes | None, int, int]:
    """Return the next line of JSON, or None for a line longer than `max_line` bytes."""
    record = file.readline(max_line + 1)
    length = len(record)
    if length <= max_line or record.endswith(b"\n"):
        return record, length, 1 if record else 0
    while record and not record.endswith(b"\n"):
        record = file.readline(BATCH_BYTES)
        length += len(record)
    return None, length, 1


class _JsonValues:
    """Reads JSON values that span lines: the elements of an array, or objects one after the other.

    Text between two values is returned as a blank record.
    """

    def __init__(self, file: IO[bytes], max_line: int, closed: bool) -> None:
        self._file, self._max_line = file, max_line
        self._closed = closed  # whether the array is closed so far; True outside an array
        # surrogateescape keeps bytes that are not UTF-8, so that only their value is a bad line.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder()
        self._text, self._start = "", 0

    def __call__(self) -> tuple[bytes, int, int]:
        start = self._start
        while True:
            while self._start < len(self._text) and self._text[self._start] in " \t\r\n,[]\ufeff":
                character = self._text[self._start]
                self._closed = character == "]" or (self._closed and character != "[")
                self._start += 1
            if self._start > start:
                between = self._text[start : self._start]
                return b"", len(between.encode()), between.count("\n")
            if self._start < len(self._text):
                return self._value()
            if not self._more():
                if not self._closed:
                    raise DamagedFile("the file ends before its JSON array is closed")
                return b"", 0, 0
            start = self._start

    def _value(self) -> tuple[bytes, int, int]:
        while True:
            try:
                _, end = self._json.raw_decode(self._text, self._start)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._start > self._max_line:
                    limit = f"max_line_mb={self._max_line / 1e6:g}"
                    raise DamagedFile(f"a JSON value is not valid, or longer than {limit}") from None
                if not self._more():
                    raise DamagedFile(f"a JSON value is not valid: {error}") from None
                continue
            value = self._text[self._start : end]
            self._start = end
            record = value.encode(errors="surrogateescape")
            return record, len(record), value.count("\n")

    def _more(self) -> bool:
        """Read as much text again as there is, at least a batch; return False at the end of the file."""
        chunk = self._file.read(max(BATCH_BYTES, len(self._text) - self._start))
        more = self._decoder.decode(chunk, final=not chunk)
        self._text, self._start = self._text[self._start :] + more, 0
        return bool(chunk)


def _missing_bytes(record: bytes) -> int:
    """Return how many bytes are missing from the last UTF-8 character of `record`."""
    for back, byte in enumerate(reversed(record[-4:])):
        if byte & 0xC0 != 0x80:
            return max(0, (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0) - back)
    return 0


def _text_stream(raw: IO[bytes], position: int) -> tuple[IO[bytes], bytes]:
    """Return the file's text as UTF-8 without a byte order mark, from `position` on, and how it begins.

    Raises one of _READ_ERRORS for a damaged file.
    """
    start = _decompressed(raw).read(_HEAD)
    encoding, mark = encoding_of(start)
    head = start.decode(encoding, errors="ignore").encode().removeprefix(codecs.BOM_UTF8).lstrip()
    file = _decompressed(raw)
    if encoding != "utf-8":
        file = io.BufferedReader(_Transcoded(file, encoding), BATCH_BYTES)
    elif file is raw:
        raw.seek(mark + position)
        return raw, head
    else:
        file.read(mark)
    while position > 0:
        position -= len(file.read(min(position, BATCH_BYTES))) or position
    return file, head


def encoding_of(start: bytes) -> tuple[str, int]:
    """Return the encoding that the first bytes of a text state, and the length of their byte order mark."""
    mark = next((mark for mark in _MARKS if start.startswith(mark)), b"")
    return _MARKS.get(mark, "utf-8"), len(mark)


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
    """Return the decompressed content of a file from its beginning; `raw` itself if it is not compressed."""
    raw.seek(0)
    magic = raw.read(6)
    raw.seek(0)
    for start, name in _NOT_READ.items():
        if magic.startswith(start):
            raise DamagedFile(f"the file is compressed with {name}, and only gzip and zstd are read")
    if magic.startswith(_GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BATCH_BYTES)
    if magic.startswith(_ZSTD) or (magic[1:4] == _ZSTD_SKIPPABLE and magic[0] & 0xF0 == 0x50):
        return io.BufferedReader(_Zstandard(raw), BATCH_BYTES)
    return raw


class _Transcoded(io.RawIOBase):
    """Reads text of another encoding, with its byte order mark, as UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding, newline="")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._ready = self._ready or self._text.read(2**16).encode()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class _Zstandard(io.RawIOBase):
    """Decompresses all zstd frames of a file, one after the other, in bounded memory.

    The zstandard library's reader accepts a file that ends inside a frame. This reader raises DamagedFile.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw, self._library = raw, zstandard
        self._frame, self._inside = self._new_frame(), False
        self._ready = memoryview(b"")

    def _new_frame(self) -> Any:
        return self._library.ZstdDecompressor(max_window_size=_ZSTANDARD_WINDOW).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            pending = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._inside = self._new_frame(), False
            chunk = pending or self._raw.read(_ZSTANDARD_PIECE)
            if not chunk:
                if self._inside:
                    raise DamagedFile("the file ends in the middle of a zstd frame")
                return 0
            self._inside = True
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._library.ZstdError as error:
                raise DamagedFile(str(error)) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _parquet_batches(path: Path, place: Place, text_field: str) -> Iterator[RecordBatch]:
    import pyarrow
    import pyarrow.parquet as parquet

    row, size, total = place.position, path.stat().st_size, 0
    fields: tuple[str, ...] = ()

    def batch(records: list[Any], damage: str | None, last: bool) -> RecordBatch:
        next_row = row + len(records)
        next_place = Place(place.file + 1) if last else Place(place.file, next_row, next_row + 1)
        read = size if last else size * next_row // max(1, total)  # estimated
        lines, parquet = [1] * len(records), FileFormat.parquet
        return RecordBatch(path, parquet, row + 1, records, lines, True, next_place, read, damage, fields)

    try:
        with parquet.ParquetFile(path) as file:
            total = file.metadata.num_rows
            fields = tuple(islice(_text_columns(file.schema_arrow), 5))
            column = _column(file.schema_arrow.names, text_field)
            if column is None:
                names = ", ".join(file.schema_arrow.names)
                why = f"has no column {text_field!r}; its columns are {names}"
                yield batch([], why, last=True)
                return
            skip, groups = row, list(range(file.metadata.num_row_groups))
            while groups and skip >= file.metadata.row_group(groups[0]).num_rows:
                skip -= file.metadata.row_group(groups.pop(0)).num_rows
            for group in groups:
                count = rows_per_batch(path, file.metadata, file.schema, group, column)
                for rows in file.iter_batches(count, row_groups=[group], columns=[column]):
                    records = [_parquet_record(row, text_field) for row in rows.to_pylist()[skip:]]
                    skip = max(0, skip - len(rows))
                    if records:
                        yield batch(records, None, last=False)
                        row += len(records)
    except UnboundedPages as error:
        yield batch([], f"cannot be read in bounded memory: {error}", last=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield batch([], f"is damaged: {str(error).splitlines()[0]}", last=True)
    else:
        yield batch([], None, last=True)


def _parquet_record(row: dict[str, Any], text_field: str) -> Any:
    """Return the text of the row, or the row if the text is in a part of it, or missing."""
    value = row.get(text_field)
    return value if isinstance(value, str | bytes) else row


def _column(names: list[str], text_field: str) -> str | None:
    """Return the column that contains the field: the field itself, or the longest part of it before a dot."""
    parts = text_field.split(".")
    beginnings = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in beginnings if name in names), None)


def _text_columns(schema: Any) -> Iterator[str]:
    """Yield the columns of an Arrow schema, or the fields in them, that contain text."""
    import pyarrow.types as types

    def fields(name: str, kind: Any) -> Iterator[str]:
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind):
            yield name
        elif types.is_struct(kind):
            for field in kind:
                yield from fields(f"{name}.{field.name}", field.type)
        elif types.is_list(kind) or types.is_large_list(kind):
            yield from fields(f"{name}.*", kind.value_type)

    for field in schema:
        yield from fields(field.name, field.type)
