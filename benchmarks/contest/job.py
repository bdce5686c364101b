"""The settings of a contestant, as the driver writes them for the contestant's ranks. Imports no torch."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]  # where `python -m benchmarks...` is found
WEIGHTS, BATCHES = "weights.safetensors", "batches.npy"

AfterStep = Callable[[Any], None]  # takes this rank's loss, or None on a rank that computes no loss


@dataclass(frozen=True)
class Sizes:
    """The sizes of a GPT-2 or Llama model, as the peers build it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    length: int
    is_llama: bool  # RMSNorm, rotary positions, SwiGLU and no biases; else the parts of GPT-2
    is_tied: bool
    rope_theta: float
    norm_epsilon: float


@dataclass(frozen=True)
class AdamW:
    lr: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float  # of matrices; vectors are not decayed
    clipping: float


@dataclass(frozen=True)
class Job:
    """A contestant in one class: which peer, on which model, data and ranks."""

    label: str
    peer: str  # the module of benchmarks.peers
    options: dict[str, Any]
    overrides: list[str]  # of the launcher
    sizes: Sizes
    adamw: AdamW
    ranks: int
    data_ranks: int
    micro_batch: int
    accumulation: int
    device: str  # "cpu" or "cuda"
    precision: str  # "fp32" or "bf16"
    folder: str  # holds WEIGHTS and BATCHES
    counts_memory: bool = False
    times_operators: bool = False
    store: str = field(default="")  # the file over which the ranks meet

    @property
    def tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.data_ranks * self.micro_batch * self.accumulation * self.sizes.length

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Job":
        values = json.loads(path.read_text())
        adamw = {**values["adamw"], "betas": tuple(values["adamw"]["betas"])}
        return cls(**{**values, "sizes": Sizes(**values["sizes"]), "adamw": AdamW(**adamw)})
