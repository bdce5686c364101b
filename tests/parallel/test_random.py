"""Random states of dropout: equal and different masks over ranks, and the masks of a recomputation."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from launcher.parallel.random import DropoutRandom
from tests.distributed import pool

Mask = tuple[float, ...]
Region = Callable[[DropoutRandom], AbstractContextManager[None]]


def shared(_: DropoutRandom) -> AbstractContextManager[None]:
    return nullcontext()


def local(random: DropoutRandom) -> AbstractContextManager[None]:
    return random.local()


def state(*, seed: int = 1, stage: int = 0, data: int = 0, tensor: int = 0) -> DropoutRandom:
    return DropoutRandom(seed, stage=stage, data_rank=data, tensor_rank=tensor, device=torch.device("cpu"))


def draw() -> Mask:
    return tuple(F.dropout(torch.ones(64), 0.5).tolist())


def mask(region: Region, **place: int) -> Mask:
    """Return the first mask of the rank at `place`."""
    random = state(**place)
    with region(random):
        return draw()


def test_shared_masks_are_equal_over_tensor_ranks() -> None:
    assert len({mask(shared, tensor=tensor) for tensor in range(4)}) == 1


def test_local_masks_differ_over_tensor_ranks() -> None:
    assert len({mask(local, tensor=tensor) for tensor in range(4)}) == 4


@pytest.mark.parametrize("region", [shared, local])
@pytest.mark.parametrize("axis", ["data", "stage", "seed"])
def test_masks_differ_over(axis: str, region: Region) -> None:
    assert len({mask(region, **{axis: index}) for index in range(4)}) == 4


def test_local_masks_of_all_ranks_differ() -> None:
    places = [{"stage": s, "data": d, "tensor": t} for s in range(2) for d in range(2) for t in range(2)]
    masks = {mask(local, **place) for place in places} | {mask(shared, **place) for place in places}
    assert len(masks) == 8 + 4


@pytest.mark.parametrize("region", [shared, local])
def test_same_seed_repeats_masks_and_draws_advance(region: Region) -> None:
    random = state()
    with region(random):
        first = draw()
    with region(random):
        second = draw()
    assert first == mask(region)
    assert first != second


def test_local_draws_do_not_change_the_shared_state() -> None:
    random = state(tensor=3)
    with random.local():
        draw()
    assert draw() == mask(shared)


def test_exception_inside_local_restores_both_states() -> None:
    random = state()
    with suppress(ZeroDivisionError), random.local():
        first = draw()
        raise ZeroDivisionError
    assert draw() == mask(shared)
    with random.local():
        assert draw() not in (first, mask(shared))


def dropped(x: Tensor, random: DropoutRandom) -> Tensor:
    """Apply shared and local dropout, so that the gradient depends on the masks."""
    x = F.dropout(x, 0.5) * x
    with random.local():
        x = F.dropout(x, 0.5) * x
    return F.dropout(x, 0.5)


def input_gradients(recomputed: bool) -> list[list[float]]:
    """Return the input gradients of two forwards followed by two backwards, as in a pipeline; twice."""
    random = state()
    gradients = []
    for _ in range(2):
        inputs = [torch.linspace(1, 2, 64, requires_grad=True) for _ in range(2)]
        outputs = []
        for x in inputs:
            if recomputed:
                outputs.append(
                    checkpoint(dropped, x, random, use_reentrant=False, context_fn=random.checkpoint_contexts)
                )
            else:
                outputs.append(dropped(x, random))
        for x, y in zip(inputs, outputs, strict=True):
            y.sum().backward()
            assert x.grad is not None
            gradients.append(x.grad.tolist())
    return gradients


def test_recomputation_repeats_masks_and_restores_states() -> None:
    expected = input_gradients(recomputed=False)
    assert len({tuple(gradient) for gradient in expected}) == 4
    assert input_gradients(recomputed=True) == expected


def test_comparison_detects_new_masks_in_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DropoutRandom, "checkpoint_contexts", lambda _: (nullcontext(), nullcontext()))
    assert input_gradients(recomputed=True) != input_gradients(recomputed=False)


def masks_of_rank(rank: int, world: int) -> tuple[Mask, Mask]:
    return mask(shared, tensor=rank), mask(local, tensor=rank)


def test_masks_on_separate_processes() -> None:
    [(shared_0, local_0), (shared_1, local_1)] = pool(2).run(masks_of_rank)
    assert shared_0 == shared_1
    assert local_0 != local_1
