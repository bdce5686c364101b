"""Make the parameters of a rank, and draw their initial values: the same weights in every layout.

A logical tensor is drawn in blocks. The numbers of a block depend on the run's seed, the tensor's name and
the index of the block alone, so that a rank draws only the blocks that its shard or its ZeRO-3 partition
touches. Padding belongs to no block.

A block is 64 rows of 512 columns, or 32,768 numbers of a vector; the last blocks of a tensor are smaller.

- 64 rows: tensor ranks and ZeRO-3 partitions hold ranges of rows. They draw at most 63 rows too many at each
  end, and none if ranges are whole KV heads of 64 or 128 rows.
- 512 columns: each of 8 tensor ranks of a row-parallel layer holds 512 columns if the hidden size is 4096.
- 32,768 numbers: seeding a generator is a small part of drawing them, and they fit a core's cache. torch
  copies them without threads of its own, so that several threads can draw blocks.

torch's generator for the CPU uses 32 bits of its seed. Among the 2.1 million blocks of 70 billion weights
about 500 pairs are expected to be equal, which no training notices.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from launcher.parallel.boxes import Box
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor, logical_views, seed_of

BLOCK = (64, 512)
BLOCK_BYTES = 4 * BLOCK[0] * BLOCK[1]
CPU = torch.device("cpu")
EXPERTS = "experts"  # the name of the groups of ranks that hold the same experts, and of their parameters

LogicalView = tuple[Box, Tensor]  # a box of a logical tensor, and the tensor of the same sizes that holds it
BlockIndex = tuple[int, ...]

# draw(seed, logical, pieces) writes the initial values of each piece, which lies on the CPU, in any dtype.
DrawFunction = Callable[[int, LogicalTensor, Sequence[LogicalView]], None]


@dataclass(frozen=True)
class InitialValues:
    """The initial values of a tensor rank's shard; zeros without a `draw`."""

    seed: int
    logical: LogicalTensor
    axis: Axis
    draw: DrawFunction | None

    @torch.no_grad()
    def fill(self, flat: Tensor, start: int = 0) -> None:
        """Write elements start .. start + numel of the flattened shard into `flat` (numel,), on any device.

        On a GPU, host memory holds these elements temporarily.
        """
        if self.draw is None:
            flat.zero_()
            return
        host = flat if flat.device == CPU else torch.empty_like(flat, device=CPU)
        if self.logical.padded is not None:
            host.zero_()
        shape = self.logical.shard_shape(self.axis.size)
        self.draw(self.seed, self.logical, list(logical_views(host, start, shape, self.logical, self.axis)))
        if host is not flat:
            flat.copy_(host)


@dataclass(frozen=True)
class Initializer:
    """Makes each parameter of a rank in its final dtype on its final device, one after the other.

    Host memory therefore never holds more of the model than one shard, beside what stays there.
    """

    seed: int
    axis: Axis
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    drawn: bool = True  # False: zeros, for weights that are read from files next
    frozen: bool = False  # only adapters (LoRA) are trained
    draws_adapters: bool = False  # also where other weights are read from files
    partitioned: bool = False  # ZeRO-3 fills only this data rank's partition: see engine/partitioned.py

    def parameter(
        self, logical: LogicalTensor, draw: DrawFunction, *, is_adapter: bool = False
    ) -> nn.Parameter:
        """Return this tensor rank's shard, without values if they are `partitioned`."""
        drawn = self.drawn or (is_adapter and self.draws_adapters)
        make = torch.empty if drawn or self.partitioned else torch.zeros
        shape = logical.shard_shape(self.axis.size)
        values = make(shape, dtype=self.dtype, device=self.device)
        parameter = nn.Parameter(values, requires_grad=is_adapter or not self.frozen)
        initial = InitialValues(self.seed, logical, self.axis, draw if drawn else None)
        if self.partitioned:
            parameter.initial = initial  # type: ignore[attr-defined]
        elif drawn:
            initial.fill(parameter.detach().view(-1))
        parameter.logical = logical  # type: ignore[attr-defined]
        if logical.is_part:
            # DeepSpeed reduces its gradient over the ranks that hold the same part (engine/expert_groups.py).
            parameter.allreduce, parameter.group_name = False, EXPERTS  # type: ignore[attr-defined]
        # DeepSpeed adds the shards of all tensor ranks to the gradient norm only if this attribute is set.
        # Without it the norm is too small, without a warning.
        parameter.tensor_model_parallel = logical.is_split and self.axis.size > 1  # type: ignore[attr-defined]
        return parameter


def normal(std: float) -> DrawFunction:
    """Return a function that draws from a normal distribution with mean 0 and standard deviation `std`."""

    def draw(seed: int, logical: LogicalTensor, pieces: Sequence[LogicalView]) -> None:
        touched: dict[BlockIndex, list[LogicalView]] = defaultdict(list)
        for piece in pieces:
            for index in _blocks_of(logical.shape, piece[0]):
                touched[index].append(piece)

        def write(index: BlockIndex) -> None:
            block = _block(logical.shape, index)
            numbers = draw_block(seed_of(seed, logical.name, *index), std, block.sizes)
            for box, tensor in touched[index]:
                common = box.overlap(block)
                assert common is not None
                tensor[common.within(box)].copy_(numbers[common.within(block)])

        threads = min(torch.get_num_threads(), len(touched))
        if threads < 2:
            for index in touched:
                write(index)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, touched))

    return draw


def draw_block(seed: int, std: float, sizes: tuple[int, ...]) -> Tensor:
    """Return the numbers of a block, in fp32 on the CPU."""
    # Use torch.normal: DeepSpeed's zero.Init replaces torch.empty and torch.randn by versions in the
    # training dtype, which would draw other numbers in bf16 than in fp32.
    generator = torch.Generator().manual_seed(seed)
    return torch.normal(0.0, std, sizes, generator=generator, dtype=torch.float32, device="cpu")


def zeros(seed: int, logical: LogicalTensor, pieces: Sequence[LogicalView]) -> None:
    for _, tensor in pieces:
        tensor.zero_()


def ones(seed: int, logical: LogicalTensor, pieces: Sequence[LogicalView]) -> None:
    for _, tensor in pieces:
        tensor.fill_(1.0)


def _lengths(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the lengths of a block of a vector or matrix."""
    assert len(shape) in (1, 2), shape
    return BLOCK if len(shape) == 2 else (BLOCK[0] * BLOCK[1],)


def _blocks_of(shape: tuple[int, ...], box: Box) -> Iterator[BlockIndex]:
    """Yield the index of each block that overlaps `box`."""
    spans = zip(box.offsets, box.sizes, _lengths(shape), strict=True)
    yield from product(
        *(range(start // length, -(-(start + size) // length)) for start, size, length in spans)
    )


def _block(shape: tuple[int, ...], index: BlockIndex) -> Box:
    offsets = tuple(number * length for number, length in zip(index, _lengths(shape), strict=True))
    ends = zip(shape, offsets, _lengths(shape), strict=True)
    return Box(offsets, tuple(min(length, size - offset) for size, offset, length in ends))
