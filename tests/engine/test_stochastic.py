"""Stochastic rounding: no bias, the same bits for the same element, and arithmetic equal to torch's."""

import pytest
import torch
from torch import Tensor

from launcher.engine import stochastic
from launcher.engine.allocations import Allocations
from launcher.engine.stochastic import (
    Conditions,
    CounterRange,
    StochasticAdamW,
    StochasticOptimizer,
    StochasticSGD,
    UpdateSlice,
    adamw,
    compiled_update,
    random_bits,
    rounded,
    slices_of,
    update_,
)
from launcher.models.arithmetic import update_chunk
from launcher.planning.cost.zero_states import UPDATE_BYTES

MANY = 200_000


def conditions(partitions: list[Tensor], *, skipped: bool = False, factor: float = 1.0) -> Conditions:
    number = iter(range(1_000_000))
    return Conditions(
        seed=7,
        step=lambda: next(number),
        kept=lambda: torch.tensor(not skipped),
        factor=lambda: torch.tensor(factor),
        counter_ranges={partition: [CounterRange(partition.numel(), 1 << 40)] for partition in partitions},
    )


def bf16_weights(value: float, count: int = MANY) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((count,), value, dtype=torch.bfloat16))


def stepped(optimizer: StochasticOptimizer, weight: torch.nn.Parameter, gradient: float, steps: int) -> None:
    optimizer.conditions = conditions([weight])
    for _ in range(steps):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()


def test_updates_below_half_the_distance_of_two_numbers_move_the_mean_as_they_should() -> None:
    """A weight of 1.0 has neighbours 2**-8 below and 2**-7 above; an update of 1e-4 to nearest is lost."""
    weight = bf16_weights(1.0)
    nearest = weight.detach().clone()
    stepped(StochasticSGD([weight], lr=1e-4, momentum=0.0), weight, 1.0, steps=20)
    for _ in range(20):
        nearest -= 1e-4
    assert float((nearest == 1.0).float().mean()) == 1.0
    moved = 1.0 - float(weight.detach().double().mean())
    deviation = 20**0.5 * (1e-4 * 2**-8) ** 0.5 / MANY**0.5  # of the mean of that many roundings
    assert moved == pytest.approx(20e-4, abs=5 * deviation)


@pytest.mark.parametrize("value", [1.001, -3.1415926, 1e-30, -65504.7])
def test_rounding_has_no_bias_and_takes_neighbours_only(value: float) -> None:
    exact = torch.full((MANY,), value)
    bits = random_bits(torch.arange(MANY))
    for lowest in (0, 16, 32):
        result = rounded(exact.clone(), bits >> lowest)
        assert torch.equal(result, result.bfloat16().float())
        lower, upper = (float(end) for end in (result.min(), result.max()))
        assert lower < float(exact[0]) < upper
        assert len(result.unique()) == 2
        error = float(result.double().mean() - exact[0].double())
        assert abs(error) < 5 * (upper - lower) / 2 / MANY**0.5
    special = torch.tensor([0.0, 1.5, -torch.inf])
    assert torch.equal(rounded(special.clone(), bits[:3]), special)


def test_bits_are_those_of_the_published_generator() -> None:
    """The first numbers of SplitMix64 from the state 0, as its reference code prints them."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [bits % 2**64 for bits in random_bits(torch.arange(1, 4)).tolist()] == published


def test_the_three_roundings_of_an_element_are_independent() -> None:
    bits = random_bits(torch.arange(MANY))
    fields = torch.stack([((bits >> lowest) & 0xFFFF).double() for lowest in (0, 16, 32)])
    correlation = torch.corrcoef(torch.cat([fields, fields.roll(1, 1)]))  # and of neighbours
    assert float((correlation - torch.eye(6)).abs().max()) < 5 / MANY**0.5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_up_to_rounding(momentum: float) -> None:
    compare_with_torch(StochasticSGD, torch.optim.SGD, lr=0.1, momentum=momentum, weight_decay=0.1)


def test_adamw_is_torchs_up_to_rounding() -> None:
    compare_with_torch(
        StochasticAdamW, torch.optim.AdamW, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )


def compare_with_torch(ours: type, theirs: type, **options: float) -> None:
    """Each step starts from the same bf16 weights and states, and may differ by one rounding of each."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(70_000, generator=generator).bfloat16())
    optimizer = ours([weight], **options)
    optimizer.conditions = conditions([weight], factor=0.5)
    for _ in range(4):
        exact = torch.nn.Parameter(weight.detach().float())
        reference = theirs([exact], **options)
        reference.state[exact] = {
            name: value.detach().clone().float() for name, value in optimizer.state[weight].items()
        }
        gradient = torch.randn(70_000, generator=generator).bfloat16()
        # In pieces, the second of which is longer than a chunk.
        optimizer.conditions.pieces[weight] = [gradient[:1000].view(10, 100), gradient[1000:]]
        exact.grad = gradient.float() * 0.5
        optimizer.step()
        reference.step()
        assert_one_rounding(weight.detach(), exact.detach())
        for name, value in reference.state[exact].items():
            if value.numel() > 1:
                assert_one_rounding(optimizer.state[weight][name], value)


def assert_one_rounding(result: Tensor, exact: Tensor) -> None:
    assert result.dtype == torch.bfloat16
    assert bool(((result.float() - exact).abs() <= 2**-7 * exact.abs() + 1e-7).all())
    assert not torch.equal(result, exact.bfloat16())  # to nearest


def test_a_skipped_step_changes_no_bit() -> None:
    weight = bf16_weights(1.0, 100)
    optimizer = StochasticAdamW([weight], lr=0.1)
    stepped(optimizer, weight, 1.0, steps=2)
    before = [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]
    optimizer.conditions = conditions([weight], skipped=True)
    weight.grad = torch.full_like(weight, torch.nan)
    optimizer.step()
    after = [weight.detach(), *optimizer.state[weight].values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_an_update_needs_memory_for_a_chunk_only() -> None:
    weight = bf16_weights(1.0, 20 * update_chunk("cpu"))
    optimizer = StochasticAdamW([weight], lr=0.1)
    stepped(optimizer, weight, 1.0, steps=1)
    optimizer.conditions.pieces[weight] = [torch.ones_like(weight)]
    with Allocations() as allocations:
        optimizer.step()
    held = 4 * weight.nbytes  # with two states and the gradient
    planned = UPDATE_BYTES * update_chunk("cpu")
    assert 0.8 * planned < allocations.peak - held < 1.05 * planned


def test_a_partition_is_cut_where_a_gradient_or_a_counter_range_begins() -> None:
    assert slices_of([4, 6], [CounterRange(3, 100), CounterRange(1, 0), CounterRange(6, 200)]) == [
        UpdateSlice(0, 3, 100, 0, 0),
        UpdateSlice(3, 1, 0, 0, 3),
        UpdateSlice(4, 6, 200, 1, 0),
    ]
    assert [part.counter for part in slices_of([4, 6], [CounterRange(10, 7)])] == [7, 11]


@pytest.mark.slow
def test_a_compiled_update_is_the_eager_one() -> None:
    """Up to a fused multiplication and addition, which may turn a rounding."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.tensor(x) for x in (0.999, 0.1, 0.95, 0.05, 1e-8, 1e-3, 0.5)]
    for count in (1000, 777):
        gradient, weight, mean = (torch.randn(count, generator=generator).bfloat16() for _ in range(3))
        results = []
        for update in (update_, compiled_update()):
            tensors = [weight.clone(), mean.clone(), mean.square()]
            update(
                adamw,
                tensors,
                gradient,
                torch.tensor(1 << 40),
                torch.tensor(True),
                torch.tensor(0.5),
                numbers,
            )
            results.append(torch.stack(tensors))
        assert float((results[0] == results[1]).float().mean()) > 0.999


def test_the_bits_belong_to_the_element_not_to_its_place_in_a_partition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stochastic, "update_chunk", lambda device: 64)
    whole, part = bf16_weights(1.0, 300), bf16_weights(1.0, 250)
    for weight, ranges in (
        (whole, [CounterRange(200, 1 << 40), CounterRange(100, 1 << 50)]),
        (part, [CounterRange(10, 0), CounterRange(150, (1 << 40) + 50), CounterRange(90, 1 << 50)]),
    ):
        optimizer = StochasticSGD([weight], lr=1e-3, momentum=0.0)
        optimizer.conditions = conditions([weight])
        optimizer.conditions.counter_ranges[weight] = ranges
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(whole[50:200], part[10:160])
    assert torch.equal(whole[200:290], part[160:])
    assert 0 < int((whole != 1.0).sum()) < 300
