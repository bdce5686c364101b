"""Memory, collectives and seconds as a rank measures them."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

import launcher.engine.allocations as allocations_module
from launcher.config.layout import STEP_PARTS
from launcher.engine.allocations import Allocations, CollectiveCall
from launcher.engine.base import Engine
from launcher.engine.measuring import PeakMemory, RankMeasurement, group_names


class TestAllocations:
    def test_counts_a_storage_once_and_until_it_is_gone(self) -> None:
        with Allocations() as allocations:
            whole = torch.zeros(1000)
            view = whole.view(10, 100)
            assert allocations.live == 4000
            del whole
            assert allocations.live == 4000
            del view
            assert (allocations.live, allocations.peak) == (0, 4000)

    def test_counts_tensors_made_by_the_backward_pass(self) -> None:
        with Allocations() as allocations:
            x = torch.ones(1000, requires_grad=True)
            y = (x * x).sum()
            before = allocations.live
            y.backward()
            assert allocations.live == before + 4000  # the gradient
            allocations.restart()
            assert allocations.peak == allocations.live

    def test_counts_an_existing_tensor_until_it_is_gone(self) -> None:
        old = torch.zeros(500)
        with Allocations() as allocations:
            allocations.count(old)
            assert allocations.live == 2000
            old = torch.zeros(1)
            assert allocations.live == 4
        del old


class TestPeakMemory:
    def test_counts_existing_tensors_with_gradients_and_not_what_was_freed(self) -> None:
        with PeakMemory(torch.device("cpu")) as before:
            pass
        weight = torch.zeros(1_000_000, requires_grad=True)
        weight.grad = torch.zeros(1_000_000)
        with PeakMemory(torch.device("cpu")) as peak:
            weight.grad = None
            (weight * 2.0).sum()
        # The weight, and its gradient or the product: never all three.
        assert peak.size - before.size == pytest.approx(8e6, rel=0.01)


@pytest.fixture
def groups(tmp_path: Path) -> Iterator[dict[str, dist.ProcessGroup]]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield {"world": dist.group.WORLD, **{name: dist.new_group([0]) for name in ("tensor", "data", "tied")}}
    dist.destroy_process_group()


def engine_of(groups: dict[str, dist.ProcessGroup], *, pipeline: bool, step: Any = None) -> Engine:
    """Return the part of an engine that is measured: its groups and its optimizer step."""
    grid = SimpleNamespace(get_data_parallel_group=lambda: groups["data"])
    tied = {"embedding": {"ranks": [0, 1], "group": groups["tied"]}}
    engine = SimpleNamespace(
        deepspeed=SimpleNamespace(_take_model_step=step, **({"grid": grid} if pipeline else {})),
        module=SimpleNamespace(tied_comms=tied),
        mesh=SimpleNamespace(
            tensor=SimpleNamespace(group=groups["tensor"]),
            data=SimpleNamespace(group=groups["data"]),
            context=SimpleNamespace(group=None),
            expert=SimpleNamespace(size=1),
        ),
    )
    return cast(Engine, engine)


def test_groups_are_named_with_and_without_a_pipeline(groups: dict[str, dist.ProcessGroup]) -> None:
    names = {name: group.group_name for name, group in groups.items()}
    flat = {names["tensor"]: "tensor", names["data"]: "data"}
    assert group_names(engine_of(groups, pipeline=False)) == flat
    staged = flat | {names["world"]: "pipeline", names["tied"]: "pipeline"}
    assert group_names(engine_of(groups, pipeline=True)) == staged


def test_collectives_are_counted_by_group_without_small_ones(groups: dict[str, dist.ProcessGroup]) -> None:
    measurement = RankMeasurement()
    engine = engine_of(groups, pipeline=True)
    with measurement.tensors:
        dist.all_reduce(torch.ones(100), group=groups["tensor"])  # before the groups have names
        measurement.name_groups(engine)
        for _ in range(3):
            dist.all_reduce(torch.ones(100), group=groups["tensor"])
        dist.all_reduce(torch.ones(16), group=groups["data"])
        dist.all_reduce(torch.ones(50), group=groups["tied"])
        expected = {
            CollectiveCall("tensor", "all_reduce", 400): 3,
            CollectiveCall("pipeline", "send", 200): 1,
        }
        assert measurement.collectives() == expected
        measurement.tensors.restart()
        assert measurement.collectives() == {}


@pytest.mark.parametrize("waits", [True, False])
def test_a_new_peak_after_a_collective_waits_for_the_threads_that_hold_its_tensors(
    groups: dict[str, dist.ProcessGroup], monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    held: list[torch.Tensor] = []  # as by a thread
    waited: list[float] = []

    def let_go(seconds: float) -> None:
        waited.append(seconds)
        held.clear()

    monkeypatch.setattr(allocations_module, "sleep", let_go)
    with Allocations(waits=waits) as allocations:
        sent = torch.ones(1000)
        held.append(torch.ones(1000))
        assert waited == []  # before a collective nothing is held
        dist.all_reduce(sent, group=groups["data"])
        allocations.restart()
        more = torch.ones(900)
        assert len(waited) == waits
        assert allocations.peak == (8000 if waits else 11600)
        other = torch.ones(700)
        assert len(waited) == waits  # once after each collective
        assert allocations.peak == (10400 if waits else 14400)
        del sent, more, other


def test_seconds_of_a_step_are_split_into_parts(groups: dict[str, dist.ProcessGroup]) -> None:
    def slow_step() -> None:
        time.sleep(0.02)
        dist.all_reduce(torch.ones(1), group=groups["data"])

    engine = engine_of(groups, pipeline=False, step=slow_step)
    original = engine.deepspeed._take_model_step
    measurement = RankMeasurement()
    with measurement.timing_collectives():
        measurement.name_groups(engine)
        with measurement.timing_optimizer(engine):
            measurement.restart_clock()
            engine.deepspeed._take_model_step()
            dist.all_reduce(torch.ones(1), group=groups["tensor"])
    assert engine.deepspeed._take_model_step is original
    seconds = measurement.seconds(1.0)
    assert tuple(seconds) == STEP_PARTS
    assert 0.02 <= seconds["optimizer"] < 0.2
    assert all(0 < seconds[group] < 0.2 for group in ("tensor", "data"))
    assert seconds["pipeline"] == 0
    assert sum(seconds.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(("pipeline", "group"), [(False, "data"), (True, "pipeline")])
def test_waiting_for_the_whole_world_counts_for_the_outermost_group(
    groups: dict[str, dist.ProcessGroup], pipeline: bool, group: str
) -> None:
    measurement = RankMeasurement()
    with measurement.timing_collectives():
        measurement.name_groups(engine_of(groups, pipeline=pipeline))
        dist.all_reduce(torch.ones(1))
    assert [part for part in STEP_PARTS[1:] if measurement.seconds(1.0)[part]] == [group]
