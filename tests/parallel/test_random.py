"""Seeds of dropout: equal and different masks over ranks, and the masks of a recomputation."""

from collections.abc import Callable
from contextlib import suppress
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from launcher.parallel.random import DropoutRandom, seeded
from tests.distributed import pool

Mask = tuple[float, ...]
Kind = Callable[[DropoutRandom], int]
CPU = torch.device("cpu")

kinds = pytest.mark.parametrize("kind", [DropoutRandom.shared, DropoutRandom.local])


def state(*, seed: int = 1, stage: int = 0, data: int = 0, tensor: int = 0) -> DropoutRandom:
    return DropoutRandom(seed, stage=stage, data_rank=data, tensor_rank=tensor)


def draw(seed: int) -> Mask:
    with seeded(seed, CPU):
        return tuple(F.dropout(torch.ones(64), 0.5).tolist())


def mask(kind: Kind, **place: int) -> Mask:
    """Return the first mask of the rank at `place`."""
    return draw(kind(state(**place)))


def test_shared_masks_are_equal_over_tensor_ranks() -> None:
    assert len({mask(DropoutRandom.shared, tensor=tensor) for tensor in range(4)}) == 1


def test_local_masks_differ_over_tensor_ranks() -> None:
    assert len({mask(DropoutRandom.local, tensor=tensor) for tensor in range(4)}) == 4


@kinds
@pytest.mark.parametrize("axis", ["data", "stage", "seed"])
def test_masks_differ_over(axis: str, kind: Kind) -> None:
    assert len({mask(kind, **{axis: index}) for index in range(4)}) == 4


def test_local_masks_of_all_ranks_differ() -> None:
    places = [{"stage": s, "data": d, "tensor": t} for s in range(2) for d in range(2) for t in range(2)]
    masks = {mask(kind, **place) for kind in (DropoutRandom.local, DropoutRandom.shared) for place in places}
    assert len(masks) == 8 + 4


@kinds
def test_a_step_repeats_its_masks_and_draws_advance(kind: Kind) -> None:
    random = state()
    random.begin_step(7)
    first, second = kind(random), kind(random)
    random.begin_step(8)
    other = kind(random)
    random.begin_step(7)
    assert kind(random) == first
    assert len({first, second, other}) == 3


def test_local_draws_do_not_change_the_shared_seeds() -> None:
    random = state(tensor=3)
    random.local()
    assert draw(random.shared()) == mask(DropoutRandom.shared)


def test_a_seeded_region_leaves_the_default_generator_as_it_was() -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    with suppress(ZeroDivisionError), seeded(1, CPU):
        draw(2)
        raise ZeroDivisionError
    assert torch.equal(torch.rand(3), expected)


def dropped(x: Tensor, first: int, second: int) -> Tensor:
    """Apply dropout twice, so that the gradient depends on the masks."""
    for seed in (first, second):
        with seeded(seed, CPU):
            x = F.dropout(x, 0.5) * x
    return x


def test_recomputation_repeats_masks() -> None:
    """Two forward passes come before two backward passes, as in a pipeline."""
    seeds = Random(3)
    pairs = [(seeds.getrandbits(63), seeds.getrandbits(63)) for _ in range(2)]
    gradients: list[list[Tensor | None]] = []
    for recomputed in (False, True):
        inputs = [torch.linspace(1, 2, 64, requires_grad=True) for _ in pairs]
        outputs = [
            checkpoint(dropped, x, *pair, use_reentrant=False, preserve_rng_state=False)
            if recomputed
            else dropped(x, *pair)
            for x, pair in zip(inputs, pairs, strict=True)
        ]
        for y in outputs:
            y.sum().backward()
        gradients.append([x.grad for x in inputs])
    (first, second), again = gradients
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)
    assert all(b is not None and torch.equal(a, b) for a, b in zip((first, second), again, strict=True))


def masks_of_rank(rank: int, world: int) -> tuple[Mask, Mask]:
    return mask(DropoutRandom.shared, tensor=rank), mask(DropoutRandom.local, tensor=rank)


def test_masks_on_separate_processes() -> None:
    [(shared_0, local_0), (shared_1, local_1)] = pool(2).run(masks_of_rank)
    assert shared_0 == shared_1
    assert local_0 != local_1
