"""Reads the .wandb files that W&B keeps of a run, a file for each start.

A file is a W&B header and a LevelDB log: blocks of 32 KiB, each record in one or several pieces, each piece
with a checksum, a length and a type. Records are protobuf. The file of a killed run may end anywhere.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 32768, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def fragments(run_dir: Path) -> list[Path]:
    """Return the .wandb files of a run in the order of its starts."""
    files = (run_dir / "wandb").glob("*run-*-*/run-*.wandb")
    return sorted(files, key=lambda path: path.parent.name.partition("run-")[2])


def steps_in(fragment: Path) -> list[int]:
    """Return the optimizer steps that a start logged, as far as they reached the disk."""
    return [record.history.step.num for record in records(fragment) if record.HasField("history")]


def has_ended(fragment: Path) -> bool:
    return any(record.HasField("exit") for record in records(fragment))


def records(fragment: Path) -> Iterator[Any]:
    data, position, partial = fragment.read_bytes(), _HEADER, b""
    while position + _HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, piece_type = struct.unpack_from("<IHB", data, position)
        piece = data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        partial = piece if piece_type in (_WHOLE, _FIRST) else partial + piece
        if piece_type in (_WHOLE, _LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                record.ParseFromString(partial)
            except DecodeError:
                return  # the run was killed in the middle of this record
            yield record
