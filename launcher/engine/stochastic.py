"""AdamW and SGD on bf16 weights and states: fp32 arithmetic in chunks, stochastic rounding of the results.

bf16 keeps 8 significant bits. Rounded to nearest, an update below half the distance between two such numbers
is lost in every step. Stochastic rounding adds random bits below the kept bits and then cuts off. The
probability of rounding up is the distance to the lower neighbour divided by the distance of the neighbours,
so the mean over the steps is exact.

The random bits are a function of the run's seed, the step, the tensor and the element, whichever rank holds
the element. So copies of a weight stay equal, and a resumed run has no random state to restore.
"""

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from launcher.models.arithmetic import update_chunk
from launcher.parallel.compiling import first_line
from launcher.parallel.sharding import seed_of

DROPPED_BITS = 16  # of an fp32 number; an element's 64 random bits are enough for a weight and three states
_LOWER_BITS = (1 << DROPPED_BITS) - 1

# New weight and states, all in fp32, from gradient, weight, states and the numbers of the step.
UpdateFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class CounterRange:
    """Consecutive elements of a partition; `counter` is the number of the first in the model."""

    numel: int
    counter: int


@dataclass(frozen=True)
class UpdateSlice:
    """Consecutive elements of a partition that lie in one counter range and in one piece of the gradients."""

    start: int  # in the partition
    numel: int
    counter: int  # of the first element
    piece: int
    start_in_piece: int


@dataclass
class Conditions:
    """The facts of a step that the engine knows, and the place of each partition's elements in the model."""

    seed: int
    step: Callable[[], int]  # the number of the step that is being taken
    kept: Callable[[], Tensor]  # whether the step may change weights and states
    factor: Callable[[], Tensor]  # scales the gradients, to clip them
    counter_ranges: dict[Tensor, list[CounterRange]]
    # Gradients in pieces, in the order of the partition; of other partitions `grad` is used.
    pieces: dict[Tensor, list[Tensor]] = field(default_factory=dict)
    compiled: bool = False


class StochasticOptimizer(torch.optim.Optimizer):
    """An optimizer of flat bf16 partitions with states of the same dtype."""

    conditions: Conditions  # set by the engine, see engine/bf16_states.py

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Slices and, on the device, their counters, by partition and the sizes of its pieces.
        self._slices: dict[tuple[Tensor, tuple[int, ...]], tuple[list[UpdateSlice], Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update each partition that has a gradient."""
        assert closure is None
        kept, factor = self.conditions.kept(), self.conditions.factor()
        for group in self.param_groups:
            for partition in group["params"]:
                pieces = self.conditions.pieces.pop(partition, [partition.grad])
                self._step_partition(group, partition, [p.reshape(-1) for p in pieces], kept, factor)

    def _step_partition(
        self, group: dict[str, Any], partition: Tensor, pieces: list[Tensor], kept: Tensor, factor: Tensor
    ) -> None:
        state, names, c = self.state[partition], self.state_names(group), self.conditions
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(partition)
        arithmetic, numbers = self.arithmetic(group, state, kept)
        tensors = [partition.detach(), *(state[name] for name in names)]
        slices, counters = self._slices_of(partition, pieces)
        counters = counters + signed(seed_of(c.seed, "rounding", c.step()))
        for part, counter in zip(slices, counters.unbind(), strict=True):
            held = [tensor.narrow(0, part.start, part.numel) for tensor in tensors]
            gradient = pieces[part.piece].narrow(0, part.start_in_piece, part.numel)
            self._update_slice(arithmetic, held, gradient, counter, kept, factor, numbers)

    def _slices_of(self, partition: Tensor, pieces: list[Tensor]) -> tuple[list[UpdateSlice], Tensor]:
        """Return the slices of a partition and the counters of their first elements, on the device."""
        key = partition, tuple(len(piece) for piece in pieces)
        if key not in self._slices:
            slices = slices_of(key[1], self.conditions.counter_ranges[partition])
            counters = torch.tensor([signed(part.counter) for part in slices], device=partition.device)
            self._slices[key] = slices, counters
        return self._slices[key]

    def _update_slice(
        self,
        arithmetic: UpdateFunction,
        tensors: list[Tensor],
        gradient: Tensor,
        counter: Tensor,
        *others: Any,
    ) -> None:
        """Update a slice: compiled in one pass, or in chunks. If the compiler fails, nothing has changed."""
        if self.conditions.compiled:
            from torch._dynamo import exc

            try:
                return compiled_update()(arithmetic, tensors, gradient, counter, *others)
            except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
                self.conditions.compiled = False
                warn_of_eager_update(error)
        size = update_chunk(gradient.device.type)
        chunks = zip(*(tensor.split(size) for tensor in (gradient, *tensors)), strict=True)
        for index, (part, *chunk) in enumerate(chunks):
            update_(arithmetic, chunk, part, counter + index * size, *others)

    def state_names(self, group: dict[str, Any]) -> list[str]:
        """Return the names of the states of a weight, besides the number of updates."""
        raise NotImplementedError

    def arithmetic(
        self, group: dict[str, Any], state: dict[str, Any], kept: Tensor
    ) -> tuple[UpdateFunction, list[Tensor]]:
        """Return the function that updates a partition with `state`, and the numbers of this step."""
        raise NotImplementedError


class StochasticAdamW(StochasticOptimizer, torch.optim.AdamW):
    """torch's AdamW (arXiv 1711.05101)."""

    def state_names(self, group: dict[str, Any]) -> list[str]:
        return ["exp_avg", "exp_avg_sq"]

    def arithmetic(
        self, group: dict[str, Any], state: dict[str, Any], kept: Tensor
    ) -> tuple[UpdateFunction, list[Tensor]]:
        if "step" not in state:
            state["step"] = torch.zeros((), device=kept.device)
        arithmetic = adamw_arithmetic(group, state["step"], kept.device)
        state["step"] += kept
        return arithmetic


class StochasticSGD(StochasticOptimizer, torch.optim.SGD):
    """torch's SGD, with or without momentum."""

    def state_names(self, group: dict[str, Any]) -> list[str]:
        return ["momentum_buffer"] if group["momentum"] else []

    def arithmetic(
        self, group: dict[str, Any], state: dict[str, Any], kept: Tensor
    ) -> tuple[UpdateFunction, list[Tensor]]:
        return sgd_arithmetic(group, kept.device)


def warn_of_eager_update(error: BaseException) -> None:
    """Warn that the optimizer could not be compiled."""
    text = "torch.compile failed for the optimizer, which now runs eager and slower"
    warnings.warn(f"{text}: {first_line(error)}; try: training.compile=false", stacklevel=2)


def update_(
    arithmetic: UpdateFunction,
    tensors: list[Tensor],
    gradient: Tensor,
    counter: Tensor,
    kept: Tensor,
    factor: Tensor,
    numbers: list[Tensor],
) -> None:
    """Update a weight and its states, `tensors`, in place, if `kept`; `counter` is the first element's."""
    exact = arithmetic(gradient.float() * factor, *(tensor.float() for tensor in tensors), *numbers)
    bits = random_bits(torch.arange(gradient.numel(), device=gradient.device) + counter)
    for index, (tensor, value) in enumerate(zip(tensors, exact, strict=True)):
        new = rounded(value, bits >> index * DROPPED_BITS).bfloat16()
        tensor.copy_(torch.where(kept, new, tensor))


@cache
def compiled_update() -> Callable[..., None]:
    """Return update_, compiled to one pass over memory for slices of any size."""
    return torch.compile(update_, fullgraph=True, dynamic=True)


def adamw_arithmetic(
    group: dict[str, Any], updates: Tensor, device: torch.device
) -> tuple[UpdateFunction, list[Tensor]]:
    """Return the function of AdamW and its constants in update number `updates` + 1."""
    (beta1, beta2), lr, number = group["betas"], group["lr"], updates.double() + 1
    constants = 1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, group["eps"]
    rate, root = lr / (1 - beta1**number), (1 - beta2**number).sqrt()
    return adamw, [*(_number(value, device) for value in constants), rate.float(), root.float()]


def sgd_arithmetic(group: dict[str, Any], device: torch.device) -> tuple[UpdateFunction, list[Tensor]]:
    """Return the function of SGD, with or without momentum, and its constants."""
    constants = group["lr"], group["weight_decay"], group["momentum"]
    numbers = [_number(value, device) for value in constants]
    return (sgd_with_momentum, numbers) if group["momentum"] else (sgd, numbers[:2])


def adamw(
    gradient: Tensor,
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    shrink: Tensor,
    share1: Tensor,
    beta2: Tensor,
    share2: Tensor,
    epsilon: Tensor,
    rate: Tensor,
    root: Tensor,
) -> tuple[Tensor, ...]:
    """Return weight and moments after a step of AdamW; `rate` and `root` correct the bias of the moments."""
    mean = mean + (gradient - mean) * share1
    square = square * beta2 + gradient * gradient * share2
    return weight * shrink - mean / (square.sqrt() / root + epsilon) * rate, mean, square


def sgd(gradient: Tensor, weight: Tensor, rate: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """Return the weight after a step of SGD."""
    return (weight - (gradient + weight * decay) * rate,)


def sgd_with_momentum(
    gradient: Tensor, weight: Tensor, mean: Tensor, rate: Tensor, decay: Tensor, momentum: Tensor
) -> tuple[Tensor, ...]:
    """Return weight and momentum after a step of SGD with momentum."""
    mean = mean * momentum + gradient + weight * decay
    return weight - mean * rate, mean


def _number(value: float, device: torch.device) -> Tensor:
    """Return the value as a tensor: no constant of a compiled update, and made without waiting for a GPU."""
    return torch.full((), value, device=device)


def rounded(exact: Tensor, bits: Tensor) -> Tensor:
    """Return `exact`, in fp32, rounded to bf16 numbers by the lowest 16 of `bits`."""
    words = exact.view(torch.int32) + (bits & _LOWER_BITS).int()
    return (words & ~_LOWER_BITS).view(torch.float32)


def random_bits(counters: Tensor) -> Tensor:
    """Return 64 random bits per counter: SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = counters * -7046029254386353131
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * -4658895280553007687  # `>>` fills with the sign: cut off
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * -7723592293110705685
    return x ^ ((x >> 31) & (1 << 33) - 1)


def slices_of(pieces: Iterable[int], ranges: Iterable[CounterRange]) -> list[UpdateSlice]:
    """Cut a partition where a counter range or a piece of the gradients begins; `pieces` are sizes."""
    ranges = list(ranges)
    starts = [0, *accumulate(each.numel for each in ranges)]
    piece_starts = [0, *accumulate(pieces)]
    assert starts[-1] == piece_starts[-1]
    slices = []
    for start, end in pairwise(sorted({*starts, *piece_starts})):
        index, piece = bisect_right(starts, start) - 1, bisect_right(piece_starts, start) - 1
        counter = ranges[index].counter + start - starts[index]
        slices.append(UpdateSlice(start, end - start, counter, piece, start - piece_starts[piece]))
    return slices


def signed(number: int) -> int:
    """Return the number modulo 2**64 as a signed 64-bit integer."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
