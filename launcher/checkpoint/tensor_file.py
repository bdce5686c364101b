"""Write tensors to a safetensors file that is as readable as other new files."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from launcher.files import sync


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and sync it to the disk. A crash leaves a part of it: rename it afterwards."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)  # safetensors makes its files readable by their owner alone
    sync(path)
