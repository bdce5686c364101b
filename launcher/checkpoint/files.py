"""Files that are there whole or not at all, and readable as other new files are."""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and sync it to disk.

    Other processes can see it half written: write to a temporary name, then rename.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)  # safetensors creates files that only their owner can read
    sync(path)


def replace_file(path: Path, text: str) -> None:
    """Write `text`, so that the file has all of it or is as it was."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Onto the disk: a file's content, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
