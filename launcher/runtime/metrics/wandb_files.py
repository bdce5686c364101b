"""Reads the .wandb files that W&B keeps of a run, a file for each start.

A file is a W&B header and a LevelDB log: blocks of 32 KiB, each record in one or several pieces, each piece
with a checksum, a length and a type. Records are protobuf. The file of a killed run may end anywhere, and a
file may be damaged: its records are read up to there, as W&B reads them.
"""

import glob
import itertools
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from wandb.proto import wandb_internal_pb2

from launcher.files import replacing

_BLOCK, _HEADER = 32768, 7  # bytes of a block; of the header of the file, and of the header of a piece
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


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
    """Record that the server has confirmed the steps, in the file in which `wandb sync` records it."""
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


def drop_steps_from(step: int, fragments: list[Path]) -> None:
    """Remove the optimizer steps from `step` on from the offline files that were never sent. Raises OSError.

    A start that takes steps back logs them again, and W&B keeps the first values of a step that it receives.
    Files of which W&B may have sent a part are left as they are.
    """
    for fragment in fragments:
        was_sent = is_online(fragment) or _sent_mark(fragment).exists()
        if not was_sent and max(steps_in(fragment), default=-1) >= step:
            kept = [
                record.SerializeToString()
                for record in records(fragment)
                if not (record.HasField("history") and record.history.step.num >= step)
            ]
            write_records(fragment, kept)


def write_records(fragment: Path, contents: list[bytes]) -> None:
    """Replace the records of a file; its header stays. Raises OSError."""
    with fragment.open("rb") as file:
        header = file.read(_HEADER)
    with replacing(fragment) as new:
        new.write_bytes(header + b"".join(_as_pieces(contents)))


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


def _as_pieces(contents: list[bytes]) -> Iterator[bytes]:
    """Yield the pieces of records for a file that has its header already: no piece crosses a block's end."""
    position = _HEADER
    for content in contents:
        for number in itertools.count():
            left = _BLOCK - position % _BLOCK
            if left < _HEADER:
                yield bytes(left)
                position, left = position + left, _BLOCK
            piece, content = content[: left - _HEADER], content[left - _HEADER :]
            is_first, is_last = number == 0, not content
            piece_type = (_WHOLE if is_first else _LAST) if is_last else (_FIRST if is_first else _MIDDLE)
            checksum = zlib.crc32(bytes([piece_type]) + piece)
            yield struct.pack("<IHB", checksum, len(piece), piece_type) + piece
            position += _HEADER + len(piece)
            if is_last:
                break
