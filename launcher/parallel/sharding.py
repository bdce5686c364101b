"""How a logical (unsharded) tensor maps to one tensor rank's shard, and back. The one place that says.

Every parameter of a model carries a LogicalTensor: its name, its global shape and its split. Weights are
drawn, written, compared and counted in those terms, whatever the layout.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from launcher.parallel.mesh import Axis

WEIGHT = "weight"  # the kind of a parameter itself, beside torch's names of its optimizer states


@dataclass(frozen=True)
class LogicalTensor:
    """What a parameter is a shard of.

    `split_dim` None: every tensor rank holds all of it. Otherwise each of `segments` (lengths along
    split_dim, adding up to its global size; e.g. query, key and value of a fused projection) is split
    evenly over the tensor ranks, and a rank's shard is its pieces side by side. `padded` is the split
    dimension's length including padding that belongs to no logical row: only of a single segment.
    """

    name: str
    shape: tuple[int, ...]
    split_dim: int | None = None
    segments: tuple[int, ...] = ()
    padded: int | None = None

    def __post_init__(self) -> None:
        if self.split_dim is not None:
            assert sum(self.segments) == self.shape[self.split_dim], self
            assert self.padded is None or len(self.segments) == 1, self

    @property
    def is_split(self) -> bool:
        return self.split_dim is not None


def split(full: Tensor, logical: LogicalTensor, axis: Axis) -> Tensor:
    """The shard of `full` (logical.shape) that this tensor rank holds; padding is zero."""
    assert tuple(full.shape) == logical.shape, (logical, full.shape)
    if logical.split_dim is None or (axis.size == 1 and logical.padded is None):
        return full
    dim = logical.split_dim
    lengths = logical.segments if logical.padded is None else (logical.padded,)
    assert all(length % axis.size == 0 for length in lengths), (logical, axis.size)
    if logical.padded is not None:
        rows = list(full.shape)
        rows[dim] = logical.padded - full.shape[dim]
        full = torch.cat([full, full.new_zeros(rows)], dim=dim)
        return full.chunk(axis.size, dim=dim)[axis.rank].contiguous()
    pieces = [
        segment.chunk(axis.size, dim=dim)[axis.rank] for segment in full.split(logical.segments, dim=dim)
    ]
    return torch.cat(pieces, dim=dim)


def merge(shards: Sequence[Tensor], logical: LogicalTensor) -> Tensor:
    """The logical tensor that `shards`, one per tensor rank in order, are the pieces of."""
    if logical.split_dim is None:
        return shards[0]
    dim, ranks = logical.split_dim, len(shards)
    if logical.padded is not None:
        return torch.cat(list(shards), dim=dim).narrow(dim, 0, logical.shape[dim])
    by_rank = [shard.split([length // ranks for length in logical.segments], dim=dim) for shard in shards]
    return torch.cat([torch.cat(pieces, dim=dim) for pieces in zip(*by_rank, strict=True)], dim=dim)


Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Initializer:
    """Draws every parameter from (run seed, logical name) alone, so that no layout changes a weight."""

    seed: int
    axis: Axis

    def parameter(self, logical: LogicalTensor, draw: Draw) -> nn.Parameter:
        """This rank's shard, in fp32 on the CPU. Holds one full parameter while doing so, never more.

        `draw(shape, generator)` makes the full logical tensor.
        """
        generator = torch.Generator().manual_seed(seed_of(self.seed, logical.name))
        parameter = nn.Parameter(split(draw(logical.shape, generator), logical, self.axis).clone())
        parameter.logical = logical  # type: ignore[attr-defined]
        # DeepSpeed's mark: count every rank's shard in the gradient norm. Left off, the norm is
        # silently too small.
        parameter.tensor_model_parallel = logical.is_split and self.axis.size > 1  # type: ignore[attr-defined]
        return parameter


def logical_of(parameter: Tensor) -> LogicalTensor:
    """The LogicalTensor that Initializer attached."""
    logical = parameter.logical  # type: ignore[attr-defined]
    assert isinstance(logical, LogicalTensor)
    return logical


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def normal(std: float) -> Draw:
    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        # torch.normal, as DeepSpeed's zero.Init replaces torch.empty and torch.randn by versions in the
        # training dtype, and would draw other numbers in bf16 than in fp32.
        return torch.normal(0.0, std, shape, generator=generator, dtype=torch.float32, device="cpu")

    return draw


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape, device="cpu")


def ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape, device="cpu")


def padded_length(length: int, ranks: int) -> int:
    """The least multiple of `ranks` that is at least `length`."""
    return -(-length // ranks) * ranks
