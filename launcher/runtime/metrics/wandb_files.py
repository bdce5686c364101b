"""What W&B keeps of a run on disk: a folder with one .wandb file for each start.

Such a file is a LevelDB log after a header of its own: blocks of 32 KiB, each record in one piece or several,
each piece with a checksum, a length and a kind; the records are protobuf. A killed run's ends anywhere.
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
    """The .wandb files of a run, in the order of its starts."""
    found = (run_dir / "wandb").glob("*run-*-*/run-*.wandb")
    return sorted(found, key=lambda path: path.parent.name.partition("run-")[2])


def steps_in(fragment: Path) -> list[int]:
    """The optimizer steps that one start has logged, as far as they reached the disk."""
    return [record.history.step.num for record in records(fragment) if record.HasField("history")]


def has_ended(fragment: Path) -> bool:
    """Whether W&B was told of the end of that start."""
    return any(record.HasField("exit") for record in records(fragment))


def records(fragment: Path) -> Iterator[Any]:
    data, position, partial = fragment.read_bytes(), _HEADER, b""
    while position + _HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        partial = piece if kind in (_WHOLE, _FIRST) else partial + piece
        if kind in (_WHOLE, _LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                record.ParseFromString(partial)
            except DecodeError:
                return  # it was killed in the middle of this one
            yield record
