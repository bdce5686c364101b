"""Megatron-LM's indexed dataset, as GPT-NeoX and NeMo read it too: token ids on disk, memory-mapped.

NAME.bin is the token ids, sequence after sequence. NAME.idx, little-endian, says where they begin
(megatron/core/datasets/indexed_dataset.py):

    MMIDIDX\\0\\0       9 bytes
    version           uint64: 1
    dtype             uint8: a key of DTYPES
    sequences         uint64: n
    documents         uint64: m, one more than there are
    lengths           int32 (n,): tokens of each sequence
    pointers          int64 (n,): the byte of NAME.bin where each begins
    document indices  int64 (m,): the first sequence of each document, and n at the end
    modes             int8 (n,): of multimodal sets only, not read
"""

import hashlib
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.files import sync

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
DTYPES: dict[int, str] = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16",
}  # fmt: skip
_HEADER = struct.Struct("<9sQBQQ")
_STRETCHES, _STRETCH = 64, 2**12  # of neighbours in the index that are compared: all of up to 262,144
_CHUNK = 2**20  # sequences of which the index is written at a time

Array = npt.NDArray[Any]


class TokenFileError(Exception):
    """A token file that cannot be used: the file to blame, and what is wrong with it."""

    def __init__(self, path: Path, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(f"{path} {why}")


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class TokenFile:
    """Both files, mapped: opening reads a few pages whatever their size, and nothing is copied.

    Shapes: tokens (total,), lengths and pointers (sequences,), documents (documents + 1,).
    """

    prefix: Path  # of both names
    tokens: Array
    lengths: Array
    pointers: Array
    documents: Array

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def document_start(self, document: int) -> int:
        """Its first token; the number of all tokens for the document after the last."""
        sequence = int(self.documents[document])
        if sequence == len(self.pointers):
            return len(self.tokens)
        return int(self.pointers[sequence]) // self.tokens.itemsize

    def document(self, document: int) -> Array:
        """Its tokens (length,)."""
        return self.tokens[self.document_start(document) : self.document_start(document + 1)]

    def boundary_near(self, token: int) -> int:
        """The document's beginning that is closest to `token`; the number of all tokens is one too.

        Twenty look-ups or so, however many documents there are.
        """
        after = bisect_left(range(self.num_documents), token, key=self.document_start)
        candidates = [self.document_start(document) for document in (max(after - 1, 0), after)]
        return min(candidates, key=lambda start: abs(start - token))

    def digest(self) -> str:
        """Of the sizes, the index's first and last 64 KiB, and 64 stretches of 4 KiB of the tokens.

        384 KiB are read, whatever the size: a change of a few tokens may pass.
        """
        found = hashlib.sha256()
        for path, stretches, length in (
            (index_path(self.prefix), 2, 2**16),
            (bin_path(self.prefix), 64, 2**12),
        ):
            size = path.stat().st_size
            found.update(f"{size}/".encode())
            with path.open("rb") as file:
                for number in range(stretches):
                    file.seek(max(0, size - length) * number // (stretches - 1))
                    found.update(file.read(length))
        return found.hexdigest()[:16]


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.bin")


def index_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.idx")


def open_token_file(prefix: Path) -> TokenFile:
    """Map NAME.bin and NAME.idx. Raises TokenFileError where one is missing, cut short, or of the other's.

    That sequences follow each other is checked for 262,144, in stretches evenly spread; all else wholly.
    """
    index, tokens = index_path(prefix), bin_path(prefix)
    try:
        with index.open("rb") as file:
            header = file.read(_HEADER.size)
        index_size, bin_size = os.path.getsize(index), os.path.getsize(tokens)
        if not os.access(tokens, os.R_OK):
            raise TokenFileError(tokens, "cannot be read: permission denied")
    except OSError as error:
        raise TokenFileError(Path(error.filename), f"cannot be read: {error.strerror}") from None
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise TokenFileError(index, "is not the index of a Megatron indexed dataset")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != VERSION:
        raise TokenFileError(index, f"is of version {version}, and {VERSION} is the one known")
    if code not in DTYPES:
        raise TokenFileError(index, f"names dtype {code}, and those known are 1 to {max(DTYPES)}")
    plain = _HEADER.size + 12 * sequences + 8 * documents
    if index_size not in (plain, plain + sequences):
        why = f"has {index_size} bytes; {sequences} sequences and {documents} document indices take {plain}"
        raise TokenFileError(index, why)
    if sequences == 0 or documents < 2:
        raise TokenFileError(index, "holds no sequence")
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    mapped = np.memmap(index, np.uint8, mode="r")

    def part(start: int, count: int, kind: str) -> Array:
        return mapped[start : start + count * np.dtype(kind).itemsize].view(kind)

    found = TokenFile(
        prefix,
        _map_for_single_reads(tokens, dtype)
        if bin_size and bin_size % dtype.itemsize == 0
        else np.empty(0, dtype),
        lengths=part(_HEADER.size, sequences, "<i4"),
        pointers=part(_HEADER.size + 4 * sequences, sequences, "<i8"),
        documents=part(_HEADER.size + 12 * sequences, documents, "<i8"),
    )
    end = int(found.pointers[-1]) + int(found.lengths[-1]) * dtype.itemsize
    if end != bin_size:
        raise TokenFileError(tokens, f"has {bin_size} bytes, and {index.name} describes {end}")
    if bin_size == 0:
        raise TokenFileError(tokens, "holds no tokens")
    _check_order(found)
    return found


def _map_for_single_reads(path: Path, dtype: np.dtype[Any]) -> Array:
    """Mapped so that a page brings no neighbours along: windows are read here and there (`fetch`)."""
    tokens = np.memmap(path, dtype, mode="r")
    tokens._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return tokens


def fetch(tokens: Array, first: int, count: int) -> None:
    """Begin to read `count` tokens from place `first` of the file that `tokens` are mapped from.

    Without it each page is waited for by itself. Tokens that are not mapped are in memory already.
    """
    mapping = getattr(tokens, "_mmap", None)
    if mapping is not None:
        start, end = first * tokens.itemsize, (first + count) * tokens.itemsize
        aligned = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_WILLNEED, aligned, end - aligned)


def _check_order(found: TokenFile) -> None:
    index, itemsize = index_path(found.prefix), np.int64(found.tokens.itemsize)
    for here in _some_of(len(found.lengths) - 1):
        ends = found.pointers[here] + found.lengths[here] * itemsize
        after = found.pointers[here.start + 1 : here.stop + 1]
        wrong = ((ends != after) | (found.lengths[here] < 0)).nonzero()[0]
        if wrong.size:
            sequence = here.start + int(wrong[0])
            why = f"disagrees with itself: sequence {sequence} does not end where the next begins"
            raise TokenFileError(index, why)
    sequences, rising = len(found.lengths), True
    for here in _some_of(len(found.documents) - 1):
        rising &= bool((found.documents[here] <= found.documents[here.start + 1 : here.stop + 1]).all())
    if int(found.pointers[0]) != 0 or found.lengths[-1] < 0:
        raise TokenFileError(index, "disagrees with itself: its first sequence does not begin at 0")
    if int(found.documents[0]) != 0 or int(found.documents[-1]) != sequences or not rising:
        raise TokenFileError(index, f"has document indices that are not 0 to {sequences} in rising order")


def _some_of(count: int) -> list[slice]:
    """All places below `count`, or stretches of them, evenly spread, the first and the last among them."""
    if count <= _STRETCHES * _STRETCH:
        return [slice(0, count)]
    starts = np.linspace(0, count - _STRETCH, _STRETCHES).astype(np.int64).tolist()
    return [slice(start, start + _STRETCH) for start in starts]


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's choice, and one byte for bytes."""
    return np.dtype("<u1" if vocab_size <= 2**8 else "<u2" if vocab_size < 65500 else "<i4")


def write_index(path: Path, lengths: Array, dtype: np.dtype[Any]) -> None:
    """Write an .idx of documents of one sequence each, from their lengths (documents,) int32.

    A stretch of them at a time, so that `lengths` may be a mapped file of any size. Synced to disk.
    """
    code = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)
    with path.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
        for chunk in _chunks(lengths):
            file.write(chunk.astype("<i4").tobytes())
        start = 0
        for chunk in _chunks(lengths):
            ends = start + np.cumsum(chunk, dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes())
            start = int(ends[-1])
        for first in range(0, len(lengths) + 1, _CHUNK):
            file.write(np.arange(first, min(first + _CHUNK, len(lengths) + 1), dtype="<i8").tobytes())
    sync(path)


def _chunks(lengths: Array) -> Iterator[Array]:
    return (lengths[first : first + _CHUNK] for first in range(0, len(lengths), _CHUNK))
