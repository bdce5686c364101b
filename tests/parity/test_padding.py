"""The vocabulary padded to a forced multiple: never predicted, never saved, and no weight changes."""

from pathlib import Path

import pytest
import torch

from launcher.config.schema import CheckpointConfig, RunConfig
from launcher.config.shape import vocabulary_multiple
from launcher.models.architecture import FlatModel, flat_model
from launcher.models.block_context import BlockContext
from launcher.parallel.initializer import Initializer
from launcher.parallel.mesh import ProcessMesh
from launcher.parallel.sharding import LogicalTensor, logical_of, merge
from launcher.planning.cost.geometry import pipeline_ranks
from tests.checkpoint.saving import GPT, MOMENTUM, run_in, saved, train
from tests.config.composing import run_of
from tests.parity.mutations import padding_predicted
from tests.parity.running import plain_sgd_pass, small_run, worst

MULTIPLE = ["parallelism.vocabulary_multiple=48", "model.vocab_size=259"]
LAYOUTS = {
    "tp2, sequence": ["model=llama_tiny", "parallelism=tp2", "parallelism.sequence_parallel=true"],
    "zero3": ["model=gpt_tiny", "parallelism=zero3", "parallelism.data=2"],
    "tied stages": ["model=gpt_tiny", "parallelism=pp2", "parallelism.data=1"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_padded_vocabulary_agrees_with_the_reference(layout: str) -> None:
    result = plain_sgd_pass(small_run(*LAYOUTS[layout], *MULTIPLE, steps=1))
    assert result.ok, (result.diagnosis, worst(result))


def test_predicted_padding_is_detected_and_named() -> None:
    result = plain_sgd_pass(small_run(*LAYOUTS["zero3"], *MULTIPLE, steps=1), padding_predicted)
    assert result.diagnosis is not None
    assert "the padding of the vocabulary enters the softmax" in result.diagnosis.meaning


def model_of(*overrides: str) -> FlatModel:
    run = run_of("model=llama_tiny", "model.vocab_size=259", *overrides)
    mesh = ProcessMesh.single()
    return flat_model(run.model, BlockContext.create(run, mesh, Initializer(0, mesh.tensor)))


def test_the_initial_weights_and_the_loss_do_not_depend_on_the_padding() -> None:
    plain, padded = model_of(), model_of("parallelism.vocabulary_multiple=128")
    for ours, theirs in zip(padded.parameters(), plain.parameters(), strict=True):
        logical: LogicalTensor = logical_of(ours)
        if "embedding" in logical.name or "head" in logical.name:
            assert (len(theirs), len(ours)) == (259, 384)
            assert not ours[259:].any()
        assert torch.equal(merge([ours], logical), theirs)
    tokens = torch.arange(64).view(2, 32) % 259
    losses = [model(tokens, tokens) for model in (plain, padded)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    losses[1].backward()
    gradients = [p.grad for p in padded.parameters() if len(p) == 384]
    assert len(gradients) == 2
    assert all(grad is not None and not grad[259:].any() and grad[:259].any() for grad in gradients)


@pytest.mark.slow
def test_padding_is_not_saved(tmp_path: Path) -> None:
    """Train with padding, save, and go on without: equal to a run that never had any."""
    run, layout = run_in("tp2", *GPT, *MOMENTUM)
    plain = train(run, layout, tmp_path / "plain", last=4)
    padded_run, layout = run_in("tp2", *GPT, *MOMENTUM, "parallelism.vocabulary_multiple=128")
    assert pipeline_ranks(padded_run, layout)[0].outputs == 256
    half = train(padded_run, layout, tmp_path / "half", last=2, save=CheckpointConfig())
    assert half.tensors["weight/embedding.weight"].shape == (257, 32)
    resumed = train(run, layout, tmp_path / "resumed", first=3, last=4, restore=saved(tmp_path / "half", 2))
    assert resumed.losses == pytest.approx(plain.losses[2:], rel=2e-6)
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(resumed.tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_cuda_pads_to_128_columns_and_cpu_as_before() -> None:
    def multiples(run: RunConfig) -> tuple[int, int]:
        return vocabulary_multiple(run, "cpu"), vocabulary_multiple(run, "cuda")

    assert multiples(run_of("model=gpt_tiny")) == (1, 128)
    assert multiples(run_of("model=gpt_tiny", "parallelism.vocabulary_multiple=8")) == (8, 8)
    assert multiples(run_of("model=vit_tiny", "data=digits", "parallelism.vocabulary_multiple=8")) == (1, 1)
