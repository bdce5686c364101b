"""Reads the .wandb files that W&B keeps of a run, a file for each start.

A file is a W&B header and a LevelDB log: blocks of 32 KiB, each record in one or several pieces, each piece
with a checksum, a length and a type. Records are protobuf. The file of a killed run may end anywhere, and a
file may be damaged: its records are read up to there, as W&B reads them.
"""

import glob
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 32768, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def fragments(run_dir: Path, run_id: str | None = None) -> list[Path]:
    """Return the .wandb files of a run in the order of its starts.

    A copied directory has files of another run too; without `run_id` they are included.
    """
    name = "*" if run_id is None else glob.escape(run_id)
    paths = (run_dir / "wandb").glob(f"*run-*-{name}/run-{name}.wandb")
    files = [path for path in paths if path.is_file()]
    return sorted(files, key=lambda path: path.parent.name.partition("run-")[2])


def is_online(fragment: Path) -> bool:
    """Return whether W&B sent the records to its server while it wrote this file."""
    return not fragment.parent.name.startswith("offline-run-")


def is_sent(fragment: Path) -> bool:
    """Return whether the server has confirmed the steps of this file.

    `wandb sync` makes an empty mark even if the server answered nonsense: an empty mark proves nothing.
    """
    try:
        return _sent_mark(fragment).stat().st_size > 0
    except OSError:
        return False


def mark_as_sent(fragments: list[Path]) -> None:
    """Note that the server has confirmed the steps, where `wandb sync` makes its mark."""
    with suppress(OSError):  # without the mark, `launcher sync` asks the server
        for fragment in fragments:
            _sent_mark(fragment).write_text("confirmed by the server\n")


def remove_sent_marks(fragments: list[Path]) -> None:
    """Let `wandb sync` send these files. Raises OSError."""
    for fragment in fragments:
        _sent_mark(fragment).unlink(missing_ok=True)


def _sent_mark(fragment: Path) -> Path:
    return fragment.with_name(f"{fragment.name}.synced")


def known_steps(fragments: list[Path]) -> set[int]:
    """Return the optimizer steps in the files."""
    return {step for fragment in fragments for step in steps_in(fragment)}


def steps_in(fragment: Path) -> list[int]:
    """Return the optimizer steps that a start logged, as far as they reached the disk."""
    return [record.history.step.num for record in records(fragment) if record.HasField("history")]


def has_ended(fragment: Path) -> bool:
    return any(record.HasField("exit") for record in records(fragment))


def records(fragment: Path) -> Iterator[Any]:
    """Yield the records up to the first that is damaged, cut short or cannot be read."""
    partial = b""
    for piece_type, piece in _pieces(fragment):
        partial = piece if piece_type in (_WHOLE, _FIRST) else partial + piece
        if piece_type in (_WHOLE, _LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                record.ParseFromString(partial)
            except DecodeError:
                return
            yield record


def _pieces(fragment: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the type and the content of each piece, up to the first whose checksum does not match."""
    try:
        with fragment.open("rb") as file:
            first = True
            while block := file.read(_BLOCK):
                position, first = _HEADER if first else 0, False
                while position + _HEADER <= len(block):
                    checksum, length, piece_type = struct.unpack_from("<IHB", block, position)
                    piece = block[position + _HEADER : position + _HEADER + length]
                    if len(piece) < length or checksum != zlib.crc32(bytes([piece_type]) + piece):
                        return
                    yield piece_type, piece
                    position += _HEADER + length
    except OSError:
        return  # it is the file of another user, or the disk fails
