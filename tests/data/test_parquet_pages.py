"""Small Parquet files that expand to gigabytes are refused or read in small batches."""

import io
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from launcher.data import parquet_pages
from launcher.data.parquet_pages import rows_per_batch
from launcher.data.reading import Place, RecordBatch, batches

LARGE = 2**27 + 1


def written(path: Path, column: Any, **options: Any) -> Path:
    table = pyarrow.table({"id": range(len(column)), "text": column})
    pyarrow.parquet.write_table(table, path, compression="zstd", **options)
    return path


def read(path: Path, field: str = "text") -> list[RecordBatch]:
    return list(batches([path], Place(), field, 2**20))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "a dictionary page"),
        ({"use_dictionary": False}, "a page"),
        ({"use_dictionary": False, "data_page_version": "2.0"}, "a page"),
        ({"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}, "a page"),
    ],
)
def test_a_page_that_is_compressed_beyond_reason_is_refused(
    options: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.parquet", ["a" * LARGE], **options)
    assert path.stat().st_size < 2**20
    [batch] = read(path)
    assert batch.records == []
    assert batch.damage is not None
    assert batch.damage.startswith(
        f"cannot be read in bounded memory: row group 0, column 'text', holds {kind} of 134,217,7"
    )
    assert "100 times is the limit above 134,217,728 bytes" in batch.damage


def test_the_row_groups_before_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_pages, "_LARGE_PAGE", 2**14)
    path = written(tmp_path / "a.parquet", ["one", "two", "a" * 2**20], row_group_size=2)
    *good, bad = read(path)
    assert [batch.records for batch in good] == [["one", "two"]]
    assert bad.damage is not None
    assert "row group 1," in bad.damage


def test_a_dictionary_above_the_absolute_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_pages, "_MOST_DICTIONARY", 1000)
    path = written(tmp_path / "a.parquet", ["".join(map(str, range(500)))])
    [batch] = read(path)
    assert str(batch.damage).endswith("bytes, more than the limit of 1,000")


def test_a_large_value_in_many_rows_is_read_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds the value once, and each row of a batch would be a copy."""
    monkeypatch.setattr(parquet_pages, "_BATCH_BYTES", 2**22)
    path = written(tmp_path / "a.parquet", ["a" * 2**20] * 9)
    assert [len(batch.records) for batch in read(path)] == [3, 3, 3, 0]
    path = written(tmp_path / "b.parquet", ["b"] * 130)
    assert [len(batch.records) for batch in read(path)] == [64, 64, 2, 0]


@pytest.mark.parametrize("field", ["text", "text.parts"])
def test_a_row_with_a_long_list_is_refused(field: str, tmp_path: Path) -> None:
    count = 2**24 + 1
    column: Any = pyarrow.ListArray.from_arrays([0, count], pyarrow.nulls(count, pyarrow.string()))
    if field == "text.parts":
        column = pyarrow.StructArray.from_arrays([column], ["parts"])
    path = written(tmp_path / "a.parquet", column)
    assert path.stat().st_size < 2**20
    [batch] = read(path, field)
    assert "lists with 16,777,217 elements, more than the 16,777,216" in str(batch.damage)


def test_other_columns_may_have_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_pages, "_LARGE_PAGE", 2**14)
    table = pyarrow.table({"text": ["x"], "texts": ["a" * 2**20], "textile.text": ["b" * 2**20]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert [batch.records for batch in read(tmp_path / "a.parquet")] == [["x"], []]


def test_large_pages_of_ordinary_compression_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_pages, "_LARGE_PAGE", 2**10)
    texts = [" ".join(map(str, range(1000 * n, 1000 * n + 200))) for n in range(200)]
    path = written(tmp_path / "a.parquet", texts, use_dictionary=False, row_group_size=90)
    assert [record for batch in read(path) for record in batch.records] == texts


def header(*fields: tuple[int, int, int]) -> bytes:
    """Return a structure with (field number step, type, integer) fields in Thrift's compact protocol."""

    def varint(value: int) -> bytes:
        value, out = value << 1, b""
        while value > 127:
            value, out = value >> 7, out + bytes([value & 127 | 128])
        return out + bytes([value])

    return b"".join(bytes([step << 4 | kind]) + varint(value) for step, kind, value in fields) + b"\0"


def twisted(step: int, kind: int, value: int) -> bytes:
    return header((1, 5, 0), (1, 5, 100), (1, 5, 50), (step, kind, value))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x15",
        b"\x15" + b"\xff" * 20,
        b"\x1f\0",
        b"\x1c" * 100,
        header((1, 5, 0), (1, 5, 100)),  # no compressed size
        header((1, 5, 0), (1, 5, 2**32 + 5), (1, 5, 50)),  # pyarrow reads 5
        twisted(0, 5, 2) + b"\x04",  # the number of a field that was there
        b"\x18\xff\xff\xff\xff\x0f",  # a text that is longer than the file
    ],
)  # fmt: skip
def test_a_damaged_page_header_is_damage(content: bytes) -> None:
    class Chunk:
        data_page_offset, has_dictionary_page, total_compressed_size = 0, False, 200

    with pytest.raises(ValueError, match="a page header"):
        list(parquet_pages._pages(io.BytesIO(content), Chunk))


def test_a_file_with_damaged_page_headers_is_damaged(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", ["one"])
    content = bytearray(path.read_bytes())
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content[chunk.dictionary_page_offset] = 0
    path.write_bytes(content)
    [batch] = read(path)
    assert str(batch.damage).startswith("is damaged: a page header ")


def test_rows_of_a_batch_depend_on_the_largest_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.parquet", ["".join(map(str, range(1000)))])
    file = pyarrow.parquet.ParquetFile(path)
    for budget, rows in ((2**30, 64), (30_000, 10), (1, 1)):
        monkeypatch.setattr(parquet_pages, "_BATCH_BYTES", budget)
        assert rows_per_batch(path, file.metadata, file.schema, 0, "text") == rows
