"""Map a logical (unsharded) tensor to the shards of the tensor ranks, and back.

Every parameter of a model carries a LogicalTensor: name, global shape and split. Weights are initialized,
saved, compared and counted by their LogicalTensor, in any layout. Only this module computes the mapping.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from launcher.parallel.mesh import Axis

WEIGHT = "weight"  # names a parameter itself, as "exp_avg" and so on name its optimizer states


@dataclass(frozen=True)
class LogicalTensor:
    """Name, global shape and split of the unsharded tensor behind a parameter.

    With `split_dim` None every tensor rank holds the whole tensor. Otherwise `segments` are lengths along
    split_dim whose sum is shape[split_dim], for example query, key and value of a fused projection. Each
    segment is split evenly over the tensor ranks, and a shard is the concatenation of a rank's parts of all
    segments. `padded` is the length of split_dim with padding rows, which belong to no logical row; it needs
    a single segment.
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
    """Return this tensor rank's shard of `full`, which has logical.shape. Padding rows are zero."""
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
    """Return the logical tensor (logical.shape) from all shards, in the order of the tensor ranks."""
    if logical.split_dim is None:
        return shards[0]
    dim, ranks = logical.split_dim, len(shards)
    if logical.padded is not None:
        return torch.cat(list(shards), dim=dim).narrow(dim, 0, logical.shape[dim])
    by_rank = [shard.split([length // ranks for length in logical.segments], dim=dim) for shard in shards]
    return torch.cat([torch.cat(pieces, dim=dim) for pieces in zip(*by_rank, strict=True)], dim=dim)


# draw(shape, generator) returns a full logical tensor in fp32 on the CPU.
DrawFunction = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Initializer:
    """Draws each parameter from the run seed and its logical name alone: weights are equal in all layouts."""

    seed: int
    axis: Axis

    def parameter(self, logical: LogicalTensor, draw: DrawFunction) -> nn.Parameter:
        """Return this rank's shard in fp32 on the CPU; `draw` makes the full logical tensor."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, logical.name))
        parameter = nn.Parameter(split(draw(logical.shape, generator), logical, self.axis).clone())
        parameter.logical = logical  # type: ignore[attr-defined]
        # DeepSpeed adds the shards of all tensor ranks to the gradient norm only if this attribute is set.
        # Without it the norm is too small, without a warning.
        parameter.tensor_model_parallel = logical.is_split and self.axis.size > 1  # type: ignore[attr-defined]
        return parameter


def logical_of(parameter: Tensor) -> LogicalTensor:
    """Return the LogicalTensor that Initializer attached to a parameter."""
    logical = parameter.logical  # type: ignore[attr-defined]
    assert isinstance(logical, LogicalTensor)
    return logical


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed computed from the values, equal on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def normal(std: float) -> DrawFunction:
    """Return a function that draws from a normal distribution with mean 0 and standard deviation `std`."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        # Use torch.normal: DeepSpeed's zero.Init replaces torch.empty and torch.randn by versions in the
        # training dtype, which would draw other numbers in bf16 than in fp32.
        return torch.normal(0.0, std, shape, generator=generator, dtype=torch.float32, device="cpu")

    return draw


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape, device="cpu")


def ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape, device="cpu")
