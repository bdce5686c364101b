"""Bounds for the pages of a Parquet file, which its page headers state before anything is decompressed.

A page expands to at most 2 GiB, and a value that a dictionary page holds once may stand in every row. Readers
allocate what the headers state. https://parquet.apache.org/docs/file-format/ has the format, and
parquet.thrift the structures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from launcher.text import whole

MOST_ROWS = 64  # rows per batch
_LARGE_PAGE = 2**27  # decompressed bytes of a page above which its compression is checked
_MOST_COMPRESSION = 100  # text is compressed by a factor of 3 to 20
_MOST_DICTIONARY = 2**30  # decompressed bytes of a dictionary page; writers end dictionaries at about 1 MiB
_MOST_ELEMENTS = 2**24  # list elements of a row group, all of which may belong to one row
_BATCH_BYTES = 2**28  # of the decoded rows of a batch, if each row holds the largest value
_MOST_HEADER_BYTES = 2**24  # of a page header; pyarrow reads no longer ones
_DICTIONARY_PAGE = 2  # PageType of parquet.thrift
_MOST_DEPTH = 8  # of structures within a page header


class UnboundedPages(Exception):
    """Raised for a row group that needs too much memory; the message names the row group and the limit."""


@dataclass(frozen=True)
class Page:
    """The sizes that a page header states."""

    is_dictionary: bool
    bytes: int  # decompressed
    compressed_bytes: int
    values: int  # with nulls and the elements of lists


def rows_per_batch(path: Path, metadata: Any, schema: Any, group: int, column: str) -> int:
    """Return how many rows of a row group fit into a batch. Raises UnboundedPages, ValueError, OSError.

    `metadata` and `schema` are pyarrow's of the Parquet file; the column may have several leaves.
    """
    largest, row_group = 0, metadata.row_group(group)
    with path.open("rb") as file:
        for number in range(row_group.num_columns):
            chunk = row_group.column(number)
            if not f"{chunk.path_in_schema}.".startswith(f"{column}."):
                continue
            elements = 0
            for page in _pages(file, chunk):
                _check_page(page, group, column)
                largest = max(largest, page.bytes)
                elements += 0 if page.is_dictionary else page.values
            if schema.column(number).max_repetition_level and elements > _MOST_ELEMENTS:
                lists = f"lists with {whole(elements)} elements, more than the {whole(_MOST_ELEMENTS)}"
                raise UnboundedPages(f"{_place(group, column)} holds {lists} that are read")
    return max(1, min(MOST_ROWS, _BATCH_BYTES // max(1, largest)))


def _place(group: int, column: str) -> str:
    return f"row group {group}, column {column!r},"


def _check_page(page: Page, group: int, column: str) -> None:
    kind = "dictionary page" if page.is_dictionary else "page"
    stated = f"{_place(group, column)} holds a {kind} of {whole(page.bytes)} bytes"
    if page.is_dictionary and page.bytes > _MOST_DICTIONARY:
        raise UnboundedPages(f"{stated}, more than the limit of {whole(_MOST_DICTIONARY)}")
    if page.bytes > max(_LARGE_PAGE, _MOST_COMPRESSION * page.compressed_bytes):
        compressed = f"compressed to {whole(page.compressed_bytes)}"
        limit = f"{_MOST_COMPRESSION} times is the limit above {whole(_LARGE_PAGE)} bytes"
        raise UnboundedPages(f"{stated}, {compressed}: {limit}")


def _pages(file: IO[bytes], chunk: Any) -> Iterator[Page]:
    """Yield the pages of a column chunk. Raises ValueError if a header is damaged."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    end = start + chunk.total_compressed_size
    file.seek(start)
    while file.tell() < end:
        fields = _Header(file).structure()
        # Numbers of the fields in PageHeader: 5, 7 and 8 are the headers of the kinds of pages.
        kind, size, compressed = (_number(fields, field) for field in (1, 2, 3))
        of_kinds = [fields[field] for field in (5, 7, 8) if isinstance(fields.get(field), dict)]
        values = max((_number(of_kind, 1) for of_kind in of_kinds), default=0)
        yield Page(kind == _DICTIONARY_PAGE, size, compressed, values)
        file.seek(compressed, 1)


def _number(fields: dict[int, Any], field: int) -> int:
    value = fields.get(field)
    if not isinstance(value, int) or not 0 <= value < 2**31:  # pyarrow drops the higher bits
        raise ValueError("a page header states no size")
    return value


class _Header:
    """Reads a structure in Thrift's compact protocol; raises ValueError if it is damaged."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._end = file, file.tell() + _MOST_HEADER_BYTES

    def structure(self, depth: int = 0) -> dict[int, Any]:
        """Return the values of a structure by the numbers of the fields; texts and lists are None."""
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._integer()
            if number in fields or not 0 <= number < 2**15:  # readers differ on such a field
                raise ValueError("a page header is damaged")
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MOST_DEPTH:
            raise ValueError("a page header is nested too deeply")
        if kind in (1, 2):
            return None  # a boolean, which the kind states
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 12:
            return self.structure(depth + 1)
        if kind in (9, 10):
            head = self._byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self._unsigned()):
                # In a list a boolean takes a byte.
                self._value(3 if head & 15 in (1, 2) else head & 15, depth + 1)
            return None
        size = {3: 1, 7: 8}.get(kind)
        if size is None and kind != 8:
            raise ValueError("a page header is damaged")
        self._skip(self._unsigned() if size is None else size)
        return None

    def _skip(self, size: int) -> None:
        self._file.seek(size, 1)
        if self._file.tell() > self._end:
            raise ValueError("a page header is too long")

    def _byte(self) -> int:
        read = self._file.read(1)
        if not read or self._file.tell() > self._end:
            raise ValueError("a page header is not complete")
        return read[0]

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a page header holds a number that is too large")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
