"""Compare safetensors files with their manifest: every byte is hashed, every header checked. No torch."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from math import prod
from pathlib import Path

from launcher.checkpoint.manifest import Manifest, StoredFiles, UnusableCheckpoint, read_manifest, sizes_of
from launcher.checkpoint.sealed import Malformed, fields, parsed, shown, table
from launcher.files import open_regular, what_is_wrong

DAMAGED = "is damaged: its SHA-256 differs from the one in the manifest"
_HEADER_LENGTH = 8  # bytes: a little-endian integer
_MOST_HEADER = 10**8  # bytes, the limit of safetensors


def check_files(stored: StoredFiles, names: Iterable[str]) -> None:
    """Check SHA-256 and header of the files `names`. Reads them whole. Raises UnusableCheckpoint."""
    for name in names:
        try:
            with open_regular(stored.path / name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != stored.files[name].sha256:
                    raise Malformed(DAMAGED)
                _check_header(file, stored.shapes[name])
        except OSError as error:
            raise UnusableCheckpoint(stored.path, name, what_is_wrong(error)) from None
        except Malformed as malformed:
            raise UnusableCheckpoint(stored.path, name, str(malformed)) from None


def read_intact_manifest(path: Path) -> Manifest:
    """Return the manifest of a checkpoint after checking every file. Raises UnusableCheckpoint."""
    manifest = read_manifest(path)
    check_files(manifest.stored(path), sorted(manifest.files))
    return manifest


@contextmanager
def unchanged(stored: StoredFiles) -> Iterator[None]:
    """Raise UnusableCheckpoint at the end of the block if a file was changed or replaced in the block.

    Within the block the files are hashed and then read, so the bytes that were read are those hashed.
    """
    before = {name: _version(stored.path / name) for name in stored.files}
    yield
    for name, version in before.items():
        if _version(stored.path / name) != version:
            raise UnusableCheckpoint(stored.path, name, "was changed while it was read")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(path: Path) -> tuple[int, ...] | None:
    """Return numbers of which at least one differs after the file was written to or replaced."""
    try:
        state = os.lstat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _check_header(file: BufferedReader, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that the file holds exactly these fp32 tensors, one after another. Raises Malformed."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(_HEADER_LENGTH), "little")
    if length > min(_MOST_HEADER, size - _HEADER_LENGTH):
        raise Malformed("is damaged: its header is longer than the file or than 100 MB")
    header = table(parsed(file.read(length)), "the header")
    header.pop("__metadata__", None)
    if header.keys() != shapes.keys():
        name = min(header.keys() ^ shapes.keys())
        raise Malformed(f"{'lacks' if name in shapes else 'has'} {shown(name)}, unlike its manifest")
    spans = sorted(_span(header[name], name, shape) for name, shape in shapes.items())
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != size - _HEADER_LENGTH - length:
        raise Malformed("is damaged: its tensors overlap or leave a gap")


def _span(entry: object, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the first byte of a tensor in the data of its file, and the byte after its last."""
    values = fields(entry, name, {"dtype", "shape", "data_offsets"})
    stored = sizes_of(values["shape"], f"the shape of {name}")
    if values["dtype"] != "F32" or stored != shape:
        raise Malformed(f"has {name} as {shown(values['dtype'])} of {stored} instead of fp32 of {shape}")
    offsets = sizes_of(values["data_offsets"], f"the offsets of {name}", least=0)
    if len(offsets) != 2 or offsets[1] - offsets[0] != 4 * prod(shape):
        raise Malformed(f"has {name} at bytes {offsets}, which are not {4 * prod(shape)}")
    return offsets[0], offsets[1]
