"""Token files, compared with recorded bytes and with megatron-core's own reader and writer."""

import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.data.token_file import (
    DTYPES,
    TokenFileError,
    bin_path,
    index_path,
    open_token_file,
    smallest_dtype,
    write_index,
)
from tests.data.token_files import write_documents

Documents = list[npt.NDArray[Any]]
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values())


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings that Apex and Transformer Engine are missing
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def documents_of(dtype: str) -> Documents:
    """Return documents of lengths 1, 0 and others, with the lowest and highest value of the dtype."""
    generator = np.random.default_rng(7)
    number_type = np.dtype(dtype)
    if number_type.kind == "f":
        return [generator.normal(size=n).astype(number_type) for n in (5, 1, 0, 300)]
    limits = np.iinfo(number_type)
    extremes = np.array([limits.min, limits.max], number_type)
    return [extremes, *(generator.integers(limits.min, limits.max, n, number_type) for n in (1, 0, 300))]


def test_writes_the_recorded_bytes(tmp_path: Path) -> None:
    """The bytes follow megatron-core 0.16.1, _IndexWriter.write: three documents, uint16."""
    write_documents(tmp_path / "x", [np.array(d, np.uint16) for d in ([1, 2, 3], [], [258])])
    assert bin_path(tmp_path / "x").read_bytes() == bytes([1, 0, 2, 0, 3, 0, 2, 1])
    assert index_path(tmp_path / "x").read_bytes() == b"".join(
        [
            b"MMIDIDX\x00\x00", struct.pack("<Q", 1), b"\x08", struct.pack("<QQ", 3, 4),
            struct.pack("<3i", 3, 0, 1), struct.pack("<3q", 0, 6, 6), struct.pack("<4q", 0, 1, 2, 3),
        ]
    )  # fmt: skip


def test_reads_the_recorded_bytes(tmp_path: Path) -> None:
    """Two documents, the first with two sequences; the index has modes, as in a multimodal dataset."""
    bin_path(tmp_path / "x").write_bytes(struct.pack("<6i", 10, 11, 12, 13, 14, 15))
    index_path(tmp_path / "x").write_bytes(
        b"".join(
            [
                b"MMIDIDX\x00\x00", struct.pack("<Q", 1), b"\x04", struct.pack("<QQ", 3, 3),
                struct.pack("<3i", 1, 2, 3), struct.pack("<3q", 0, 4, 12), struct.pack("<3q", 0, 2, 3),
                b"\x00\x01\x00",
            ]
        )
    )  # fmt: skip
    file = open_token_file(tmp_path / "x")
    assert file.tokens.tolist() == [10, 11, 12, 13, 14, 15]
    assert file.num_documents == 2
    assert [file.document(n).tolist() for n in range(2)] == [[10, 11, 12], [13, 14, 15]]


@each_dtype
def test_megatron_reads_our_files(dtype: str, tmp_path: Path, megatron: Any) -> None:
    documents = documents_of(dtype)
    write_documents(tmp_path / "x", documents, dtype)
    dataset = megatron.IndexedDataset(str(tmp_path / "x"))
    assert len(dataset) == len(documents)
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    for written, read in zip(documents, (dataset[n] for n in range(len(dataset))), strict=True):
        assert read.dtype == np.dtype(dtype)
        assert read.tobytes() == written.tobytes()


@each_dtype
def test_we_read_megatrons_files(dtype: str, tmp_path: Path, megatron: Any) -> None:
    documents = documents_of(dtype)
    _written_by(megatron, tmp_path / "x", documents)
    file = open_token_file(tmp_path / "x")
    assert file.tokens.dtype == np.dtype(dtype)
    assert file.tokens.tobytes() == b"".join(document.tobytes() for document in documents)
    assert [file.document(n).tobytes() for n in range(file.num_documents)] == [d.tobytes() for d in documents]


@each_dtype
def test_megatron_and_we_write_the_same_bytes(dtype: str, tmp_path: Path, megatron: Any) -> None:
    documents = documents_of(dtype)
    write_documents(tmp_path / "ours", documents, dtype)
    _written_by(megatron, tmp_path / "theirs", documents)
    for path in (bin_path, index_path):
        assert path(tmp_path / "ours").read_bytes() == path(tmp_path / "theirs").read_bytes()


def test_documents_of_several_sequences(tmp_path: Path, megatron: Any) -> None:
    builder = megatron.IndexedDatasetBuilder(str(bin_path(tmp_path / "x")), dtype=np.int32)
    builder.add_document([1, 2, 3, 4, 5], [2, 3])
    builder.add_document([6], [1])
    builder.finalize(str(index_path(tmp_path / "x")))
    file = open_token_file(tmp_path / "x")
    assert [file.document(n).tolist() for n in range(file.num_documents)] == [[1, 2, 3, 4, 5], [6]]


def _written_by(megatron: Any, prefix: Path, documents: Documents) -> None:
    builder = megatron.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=documents[0].dtype.type)
    for document in documents:
        builder.add_document(document.tolist(), [len(document)])
    builder.finalize(str(index_path(prefix)))


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40), token=st.integers(0, 400))
def test_boundary_near_returns_the_closest_document_boundary(
    lengths: list[int], token: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not sum(lengths):
        return
    prefix = tmp_path_factory.mktemp("x") / "x"
    write_documents(prefix, [np.zeros(length, np.uint8) for length in lengths])
    starts: Sequence[int] = np.cumsum([0, *lengths]).tolist()
    boundary = open_token_file(prefix).boundary_near(token)
    assert boundary in starts
    assert abs(boundary - token) == min(abs(start - token) for start in starts)


def test_an_index_written_in_chunks_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(0, 50, 1000, np.int32)
    write_index(tmp_path / "whole.idx", lengths, np.dtype("<u2"))
    monkeypatch.setattr("launcher.data.token_file._CHUNK", 7)
    write_index(tmp_path / "pieces.idx", lengths, np.dtype("<u2"))
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "pieces.idx").read_bytes()


@pytest.mark.parametrize("place", [0, 1, 500, 998])
def test_an_index_of_many_sequences_is_checked_in_stretches(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stretches cover the first and last sequence, and some of those between them."""
    write_documents(tmp_path / "x", [np.zeros(3, np.uint8)] * 1000)
    content = bytearray(index_path(tmp_path / "x").read_bytes())
    struct.pack_into("<i", content, 34 + 4 * place, 2)
    index_path(tmp_path / "x").write_bytes(content)
    monkeypatch.setattr("launcher.data.token_file._STRETCHES", 3)
    monkeypatch.setattr("launcher.data.token_file._STRETCH", 9)
    with pytest.raises(TokenFileError, match=f"sequence {place} does not end where the next sequence begins"):
        open_token_file(tmp_path / "x")


def test_the_smallest_dtype_is_megatrons_or_one_byte_for_bytes(megatron: Any) -> None:
    assert smallest_dtype(256) == np.uint8
    for size in (257, 50257, 65499, 65500, 128256):
        assert smallest_dtype(size) == megatron.DType.optimal_dtype(size)


@pytest.mark.parametrize("prefix", ["/", ".", ".."])
def test_a_prefix_without_a_name_has_files_that_do_not_exist(prefix: str) -> None:
    assert not index_path(Path(prefix)).exists()
    assert not bin_path(Path(prefix)).exists()
