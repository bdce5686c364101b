"""A resumed run equals a run that never stopped: bitwise in its layout, within rounding in another."""

from collections import Counter
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import load
from launcher.checkpoint.manifest import read_manifest
from launcher.config.schema import CheckpointConfig
from launcher.parallel import sharding
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor
from launcher.planning.cost.geometry import pipeline_ranks
from launcher.planning.cost.zero_states import checkpoint_bytes
from tests.checkpoint.saving import (
    GPT,
    LAYOUTS,
    LLAMA,
    MOMENTUM,
    RUNS,
    STEPS,
    Outcome,
    assert_close,
    run_in,
    saved,
    train,
)

# Saves from and restores into every kind of partition, with padded, tied and pipelined vocabularies.
CHAIN = ["single", "cp4", "zero3_cp2", "tp2_pp2", "zero2", "dualpipev", "zero1_tp2", "dp"]
SAVE = CheckpointConfig()


@pytest.mark.slow
def test_changing_the_layout_after_every_step_matches_one_process(tmp_path: Path) -> None:
    """SGD with momentum in fp32: compare each step with a run in one process."""
    run, layout = run_in("single", *RUNS["momentum"])
    uninterrupted = train(run, layout, tmp_path / "uninterrupted")
    before: Path | None = None
    for number, name in enumerate(CHAIN, 1):
        run, layout = run_in(name, *RUNS["momentum"])
        folder = tmp_path / str(number)
        outcome = train(run, layout, folder, first=number, last=number, restore=before, save=SAVE)
        before = saved(folder, number)
        assert outcome.losses[0] == pytest.approx(uninterrupted.losses[number - 1], rel=2e-6), name
        assert outcome.norms[0] == pytest.approx(uninterrupted.norms[number - 1], rel=2e-5), name
    assert number == STEPS
    assert_close(outcome, uninterrupted, 1e-5)


@pytest.mark.parametrize("layout", ["zero3", pytest.param("zero1_tp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([*GPT, "model.dropout=0.1"], marks=pytest.mark.slow),
        pytest.param([*LLAMA, "precision=bf16"], marks=pytest.mark.slow),
        [*LLAMA, "precision=bf16_states"],
    ],
)
def test_resume_in_the_same_layout_is_bitwise_equal(
    layout: str, overrides: list[str], tmp_path: Path
) -> None:
    assert_resume_is_bitwise_equal(layout, overrides, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("overrides", [[*GPT, "model.dropout=0.1"], [*LLAMA, "precision=bf16"], MOMENTUM])
def test_resume_in_every_layout_is_bitwise_equal(layout: str, overrides: list[str], tmp_path: Path) -> None:
    model = [] if "model" in overrides[0] else GPT
    assert_resume_is_bitwise_equal(layout, [*model, *overrides], tmp_path)


def test_context_4_resumes_at_tensor_2_x_pipeline_2_and_back(tmp_path: Path) -> None:
    run, layout = run_in("single", *RUNS["momentum"])
    uninterrupted = train(run, layout, tmp_path / "uninterrupted", last=3)
    before: Path | None = None
    for number, name in enumerate(("cp4", "tp2_pp2", "cp4"), 1):
        run, layout = run_in(name, *RUNS["momentum"])
        folder = tmp_path / str(number)
        outcome = train(run, layout, folder, first=number, last=number, restore=before, save=SAVE)
        before = saved(folder, number)
        assert outcome.losses[0] == pytest.approx(uninterrupted.losses[number - 1], rel=2e-6), name
    assert_close(outcome, uninterrupted, 1e-5)


def assert_resume_is_bitwise_equal(layout: str, overrides: list[str], tmp_path: Path) -> None:
    run, resolved = run_in(layout, *overrides)
    uninterrupted = train(run, resolved, tmp_path / "uninterrupted", last=4)
    train(run, resolved, tmp_path / "half", last=2, save=SAVE)
    half = saved(tmp_path / "half", 2)
    resumed = train(run, resolved, tmp_path / "resumed", first=3, last=4, restore=half)
    assert resumed.losses == uninterrupted.losses[2:]
    assert resumed.norms == uninterrupted.norms[2:]
    assert resumed.tensors.keys() == uninterrupted.tensors.keys()
    for name, tensor in resumed.tensors.items():
        assert torch.equal(tensor, uninterrupted.tensors[name]), name


def test_each_rank_reads_only_the_slices_it_holds(tmp_path: Path) -> None:
    run, layout = run_in("single", *GPT)
    train(run, layout, tmp_path / "from", last=1, save=SAVE)
    single = train(run, layout, tmp_path / "single", first=2, last=2, restore=saved(tmp_path / "from", 1))
    run, layout = run_in("zero3_tp2", *GPT)
    sharded = train(run, layout, tmp_path / "sharded", first=2, last=2, restore=saved(tmp_path / "from", 1))
    [total] = single.bytes_read
    assert total == sum(tensor.nbytes for tensor in single.tensors.values())
    # Every weight is sharded over the data ranks, and over the tensor ranks too, except for norms and biases.
    assert sum(sharded.bytes_read) == pytest.approx(total, rel=0.05)
    assert max(sharded.bytes_read) < 0.3 * total


@pytest.mark.parametrize("layout", ["dp", "zero3_tp2", "tp2_pp2", "zero1_tp2"])
def test_each_rank_writes_as_many_bytes_as_planned(layout: str, tmp_path: Path) -> None:
    run, resolved = run_in(layout, *GPT)
    train(run, resolved, tmp_path, last=1, save=SAVE)
    written: Counter[int] = Counter()
    for by_name in read_manifest(saved(tmp_path, 1)).tensors.values():
        for piece in chain.from_iterable(stored.pieces for stored in by_name.values()):
            written[int(piece.file[:5])] += 4 * prod(piece.sizes)
    assert len(written) == resolved.world_size
    planned = max(checkpoint_bytes(run, resolved, rank) for rank in pipeline_ranks(run, resolved))
    # Partition boundaries fall within weights, so the shares differ slightly.
    assert max(written.values()) == pytest.approx(planned, rel=0.02)


def restore_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = load.CheckpointReader.fill

    def weights_only(self: load.CheckpointReader, kind: str, *where: Any) -> None:
        if kind == "weight":
            fill(self, kind, *where)

    monkeypatch.setattr(load.CheckpointReader, "fill", weights_only)


def restore_no_update_count(monkeypatch: pytest.MonkeyPatch) -> None:
    make = load.make_states
    monkeypatch.setattr(load, "make_states", lambda engine, keys, updates: make(engine, keys, 0))


def swap_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = sharding.split_segments

    def swapped(logical: LogicalTensor, axis: Axis) -> list[tuple[int, int, int]]:
        return segments(logical, Axis(axis.size - 1 - axis.rank, axis.size, axis.group))

    monkeypatch.setattr(sharding, "split_segments", swapped)


def keep_old_model_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "update_model_weights", lambda engine: None)


FAULTS = {
    "none": lambda monkeypatch: None,
    "the model weights are not refreshed": keep_old_model_weights,
    "optimizer states are not restored": restore_weights_only,
    "Adam's update count is not restored": restore_no_update_count,
    "shards are swapped": swap_shards,
}


@pytest.fixture(scope="module")
def adam(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Return a checkpoint of step 2, written by one process, and the outcome of training to step 4."""
    folder = tmp_path_factory.mktemp("adam")
    run, layout = run_in("single", *GPT, "optimizer.lr=1e-2")
    train(run, layout, folder / "half", last=2, save=SAVE)
    uninterrupted = train(run, layout, folder / "uninterrupted", last=4)
    return saved(folder / "half", 2), uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_restoring_changes_the_losses(
    fault: str, adam: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    half, uninterrupted = adam
    FAULTS[fault](monkeypatch)
    run, layout = run_in("zero1_tp2", *GPT, "optimizer.lr=1e-2")
    resumed = train(run, layout, tmp_path, first=3, last=4, restore=half)
    same = resumed.losses == pytest.approx(uninterrupted.losses[2:], rel=1e-5)
    assert same is (fault == "none"), (resumed.losses, uninterrupted.losses)


def test_the_chain_covers_every_kind_of_partition() -> None:
    kinds = {"single", "dp", "cp4", "zero1", "zero2", "zero3", "tp2", "pp2", "dualpipev"}
    assert {part for name, part in product(CHAIN, kinds) if part in name} == kinds
