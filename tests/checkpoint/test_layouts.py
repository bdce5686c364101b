"""A run that changes its layout on the way is the run that did not."""

from collections import Counter
from itertools import chain, permutations, product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import flat_ranges, load
from launcher.checkpoint.manifest import read_manifest
from launcher.config.schema import CheckpointConfig
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor
from launcher.planning.cost.geometry import pipeline_ranks
from launcher.planning.cost.zero_states import checkpoint_bytes
from tests.checkpoint.saving import GPT, LAYOUTS, LLAMA, MOMENTUM, STEPS, Outcome, run_in, saved, train

# Every kind of partition is both left and entered, and the pipeline cut, padded and tied vocabulary with it.
CHAIN = ["single", "zero3", "tp2_pp2", "zero2", "dualpipev", "zero1_tp2", "dp", "tp2"]
RUNS = {
    "momentum": [*GPT, *MOMENTUM],
    "adamw, bf16": [*LLAMA, "precision=bf16"],
}
LOSS = {"momentum": 2e-6, "adamw, bf16": 2e-2}  # relative
SAVE = CheckpointConfig()


def test_a_layout_per_step(tmp_path: Path) -> None:
    """Plain SGD with momentum in fp32: what comes of each step is compared with a run in one process."""
    run, layout = run_in("single", *RUNS["momentum"])
    whole = train(run, layout, tmp_path / "whole")
    before: Path | None = None
    for number, name in enumerate(CHAIN, 1):
        run, layout = run_in(name, *RUNS["momentum"])
        folder = tmp_path / str(number)
        found = train(run, layout, folder, first=number, last=number, restore=before, save=SAVE)
        before = saved(folder, number)
        assert found.losses[0] == pytest.approx(whole.losses[number - 1], rel=2e-6), name
        assert found.norms[0] == pytest.approx(whole.norms[number - 1], rel=2e-5), name
    assert number == STEPS
    assert_close(found, whole, 1e-5)


@pytest.mark.parametrize("layout", ["zero1_tp2", "zero3"])
@pytest.mark.parametrize("overrides", [[*GPT, "model.dropout=0.1"], [*LLAMA, "precision=bf16"]])
def test_the_same_layout_goes_on_bit_by_bit(layout: str, overrides: list[str], tmp_path: Path) -> None:
    goes_on_bit_by_bit(layout, overrides, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("overrides", [[*GPT, "model.dropout=0.1"], [*LLAMA, "precision=bf16"], MOMENTUM])
def test_every_layout_goes_on_bit_by_bit(layout: str, overrides: list[str], tmp_path: Path) -> None:
    model = [] if "model" in overrides[0] else GPT
    goes_on_bit_by_bit(layout, [*model, *overrides], tmp_path)


def goes_on_bit_by_bit(layout: str, overrides: list[str], tmp_path: Path) -> None:
    run, resolved = run_in(layout, *overrides)
    whole = train(run, resolved, tmp_path / "whole", last=4)
    train(run, resolved, tmp_path / "half", last=2, save=SAVE)
    again = train(run, resolved, tmp_path / "again", first=3, last=4, restore=saved(tmp_path / "half", 2))
    assert again.losses == whole.losses[2:]
    assert again.norms == whole.norms[2:]
    assert again.tensors.keys() == whole.tensors.keys()
    for name, tensor in again.tensors.items():
        assert torch.equal(tensor, whole.tensors[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_from_any_layout_to_any_other(source: str, kind: str, tmp_path: Path) -> None:
    """Ten steps in one layout, ten more in each other one: what one process does in twenty."""
    run, layout = run_in("single", *RUNS[kind], steps=20)
    whole = train(run, layout, tmp_path / "whole", last=20)
    run, layout = run_in(source, *RUNS[kind], steps=20)
    train(run, layout, tmp_path / "half", last=10, save=SAVE)
    targets = [target for one, target in permutations(LAYOUTS, 2) if one == source]
    assert len(targets) == len(LAYOUTS) - 1
    for target in targets:
        run, layout = run_in(target, *RUNS[kind], steps=20)
        half = saved(tmp_path / "half", 10)
        found = train(run, layout, tmp_path / target, first=11, last=20, restore=half)
        assert found.losses == pytest.approx(whole.losses[10:], rel=LOSS[kind]), target
        if kind == "momentum":
            assert_close(found, whole, 1e-5)


def test_each_rank_reads_what_it_holds_and_no_more(tmp_path: Path) -> None:
    run, layout = run_in("single", *GPT)
    train(run, layout, tmp_path / "from", last=1, save=SAVE)
    whole = train(run, layout, tmp_path / "one", first=2, last=2, restore=saved(tmp_path / "from", 1))
    run, layout = run_in("zero3_tp2", *GPT)
    parts = train(run, layout, tmp_path / "four", first=2, last=2, restore=saved(tmp_path / "from", 1))
    [all_of_it] = whole.bytes_read
    assert all_of_it == sum(tensor.nbytes for tensor in whole.tensors.values())
    # Data ranks share every weight; tensor ranks share all but the norms and the like.
    assert sum(parts.bytes_read) == pytest.approx(all_of_it, rel=0.05)
    assert max(parts.bytes_read) < 0.3 * all_of_it


@pytest.mark.parametrize("layout", ["dp", "zero3_tp2", "tp2_pp2", "zero1_tp2"])
def test_each_rank_writes_what_the_plan_says_it_copies(layout: str, tmp_path: Path) -> None:
    run, resolved = run_in(layout, *GPT)
    train(run, resolved, tmp_path, last=1, save=SAVE)
    written: Counter[int] = Counter()
    for by_name in read_manifest(saved(tmp_path, 1)).tensors.values():
        for piece in chain.from_iterable(stored.pieces for stored in by_name.values()):
            written[int(piece.file[:5])] += 4 * prod(piece.sizes)
    assert len(written) == resolved.world_size
    most_of_all = max(checkpoint_bytes(run, resolved, rank) for rank in pipeline_ranks(run, resolved))
    # Partitions end within weights.
    assert max(written.values()) == pytest.approx(most_of_all, rel=0.02)


def forget_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = load.Reader.fill

    def weights_only(self: load.Reader, kind: str, *where: Any) -> None:
        if kind == "weight":
            fill(self, kind, *where)

    monkeypatch.setattr(load.Reader, "fill", weights_only)


def forget_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    make = load.make_states
    monkeypatch.setattr(load, "make_states", lambda engine, keys, updates: make(engine, keys, 0))


def swap_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    stretches = flat_ranges._stretches

    def swapped(logical: LogicalTensor, axis: Axis) -> list[tuple[int, int, int]]:
        return stretches(logical, Axis(axis.size - 1 - axis.rank, axis.size, axis.group))

    monkeypatch.setattr(flat_ranges, "_stretches", swapped)


def take_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "take_up", lambda engine: None)


FAULTS = {
    "none": lambda monkeypatch: None,
    "working weights are not those that were read": take_up_nothing,
    "optimizer states are left out": forget_kinds,
    "Adam's count of steps is left out": forget_updates,
    "shards are swapped": swap_stretches,
}


@pytest.fixture(scope="module")
def adam(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A checkpoint of step 2, written by one process, and what it does in the two steps after."""
    folder = tmp_path_factory.mktemp("adam")
    run, layout = run_in("single", *GPT, "optimizer.lr=1e-2")
    train(run, layout, folder / "half", last=2, save=SAVE)
    whole = train(run, layout, folder / "whole", last=4)
    return saved(folder / "half", 2), whole


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_restoring_shows(
    fault: str, adam: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    half, whole = adam
    FAULTS[fault](monkeypatch)
    run, layout = run_in("zero1_tp2", *GPT, "optimizer.lr=1e-2")
    found = train(run, layout, tmp_path, first=3, last=4, restore=half)
    same = found.losses == pytest.approx(whole.losses[2:], rel=1e-5)
    assert same is (fault == "none"), (found.losses, whole.losses)


def assert_close(found: Outcome, whole: Outcome, relative: float) -> None:
    assert found.tensors.keys() == whole.tensors.keys()
    for name, tensor in found.tensors.items():
        distance = float((tensor - whole.tensors[name]).norm())
        # A key's bias has a gradient of rounding alone, and so has its momentum.
        assert distance <= relative * float(whole.tensors[name].norm()) + 1e-6, name


def test_the_chain_covers_every_kind_of_partition() -> None:
    kinds = {"single", "dp", "zero1", "zero2", "zero3", "tp2", "pp2", "dualpipev"}
    assert {part for name, part in product(CHAIN, kinds) if part in name} == kinds
