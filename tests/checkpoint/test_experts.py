"""Checkpoints of models with experts: any number of ranks that share the experts to any other."""

from pathlib import Path

import pytest
import torch

from launcher.checkpoint.manifest import read_manifest
from launcher.checkpoint.read import CheckpointReader
from launcher.config.layout import Layout, resolve_layout
from launcher.config.schema import CheckpointConfig, RunConfig
from launcher.config.world import World
from launcher.parallel.boxes import whole
from launcher.parallel.sharding import WEIGHT
from tests.checkpoint.saving import MOMENTUM, assert_close, load_and_save, saved, train
from tests.parity.running import small_run

SAVE = CheckpointConfig()
LAYOUTS = {
    "single": ["parallelism=single"],
    "expert 4": ["parallelism.data=4", "parallelism.expert=4"],
    "tensor 2": ["parallelism.tensor=2", "parallelism.data=1"],
    "expert 2 of data 4, ZeRO-1": [
        "parallelism.data=4", "parallelism.expert=2", "parallelism.zero_stage=1",
    ],
    "ZeRO-3": ["parallelism.data=2", "parallelism.zero_stage=3"],
    "expert 2, tensor 2, ZeRO-2": [
        "parallelism.data=2", "parallelism.expert=2", "parallelism.tensor=2", "parallelism.zero_stage=2",
    ],
    "expert 2, pipeline 2": ["parallelism.data=2", "parallelism.expert=2", "parallelism.pipeline=2"],
    "expert 4 of data 2 x context 2, ZeRO-1": [
        "parallelism.data=2", "parallelism.context=2", "parallelism.expert=4", "parallelism.zero_stage=1",
    ],
}  # fmt: skip
# From expert 4 to expert 1 x tensor 2 and back, and on.
QUICK = ["expert 4", "tensor 2", "expert 4"]
CHAIN = [
    *QUICK, "expert 2 of data 4, ZeRO-1", "ZeRO-3", "expert 2, tensor 2, ZeRO-2",
    "expert 4 of data 2 x context 2, ZeRO-1", "expert 2, pipeline 2",
]  # fmt: skip


def run_in(layout: str) -> tuple[RunConfig, Layout]:
    run = small_run("model=moe_tiny", *MOMENTUM, *LAYOUTS[layout], steps=8)
    m = run.model
    m.num_layers, m.num_heads, m.num_kv_heads, m.hidden_size = 4, 4, 2, 32
    m.experts.count, m.experts.ffn_hidden_size = 8, 20
    m.experts.bias_balancing = 0.05  # large: if the biases were lost, other experts would be chosen
    m.vocab_size, m.max_sequence_length, run.data.sequence_length = 257, 16, None
    run.training.global_batch_size, run.training.micro_batch_size = 8, 1
    return run, resolve_layout(run, World("cpu", 8, 8))


@pytest.mark.parametrize("chain", [QUICK, pytest.param(CHAIN, marks=pytest.mark.slow)])
def test_changing_the_layout_after_every_step_matches_one_process(chain: list[str], tmp_path: Path) -> None:
    run, layout = run_in("single")
    uninterrupted = train(run, layout, tmp_path / "uninterrupted", last=len(chain))
    before: Path | None = None
    for number, name in enumerate(chain, 1):
        run, layout = run_in(name)
        folder = tmp_path / str(number)
        outcome = train(run, layout, folder, first=number, last=number, restore=before, save=SAVE)
        before = saved(folder, number)
        assert outcome.losses[0] == pytest.approx(uninterrupted.losses[number - 1], rel=2e-6), name
        assert outcome.norms[0] == pytest.approx(uninterrupted.norms[number - 1], rel=2e-5), name
    assert_close(outcome, uninterrupted, 1e-5)


def test_resume_in_the_same_layout_is_bitwise_equal(tmp_path: Path) -> None:
    run, layout = run_in("expert 2 of data 4, ZeRO-1")
    uninterrupted = train(run, layout, tmp_path / "uninterrupted", last=3)
    train(run, layout, tmp_path / "half", last=2, save=SAVE)
    resumed = train(run, layout, tmp_path / "on", first=3, last=3, restore=saved(tmp_path / "half", 2))
    assert resumed.losses == uninterrupted.losses[2:]
    for name, tensor in resumed.tensors.items():
        assert torch.equal(tensor, uninterrupted.tensors[name]), name


def test_a_run_begins_from_weights_without_biases_for_the_choice(tmp_path: Path) -> None:
    """Their source was trained without balancing by biases: they are 0, as in a run from its beginning."""
    run, layout = run_in("single")
    run.model.experts.bias_balancing = 0.0
    source = train(run, layout, tmp_path / "source", last=1, save=SAVE)
    run, _ = run_in("expert 4")
    begun = load_and_save(run, saved(tmp_path / "source", 1), tmp_path / "begun")
    manifest = read_manifest(begun)
    reader, weights = CheckpointReader(begun, manifest), {}
    for name, stored in manifest.tensors[WEIGHT].items():
        weights[name] = torch.empty(stored.shape)
        reader.fill(WEIGHT, name, whole(stored.shape), weights[name])
    biases = [name for name in weights if name.endswith(".router.bias")]
    assert len(biases) == run.model.num_layers
    assert not any(weights.pop(name).any() for name in biases)
    assert {f"weight/{name}" for name in weights} == {n for n in source.tensors if n.startswith("weight/")}
    for name, tensor in weights.items():
        assert torch.equal(tensor, source.tensors[f"weight/{name}"]), name
