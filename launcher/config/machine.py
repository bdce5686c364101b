"""The facts about a machine that decide how many ranks it can have. Imports nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """The GPUs and CPU cores that this process may use, and the bytes of memory (None: not known)."""

    gpus: int
    cores: int
    memory_bytes: int | None = None
