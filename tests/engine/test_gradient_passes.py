"""Gradients that are accumulated and reduced in fewer passes are those that DeepSpeed itself would make."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.config.validate import validate
from launcher.config.world import World
from tests.config.composing import run_of
from tests.distributed import run_fresh

SMALL = [
    "hardware=cpu", "model=gpt_tiny", "model.hidden_size=64", "model.ffn_hidden_size=128",
    "model.num_layers=2", "training.micro_batch_size=2", "optimizer.gradient_clipping=null",
]  # fmt: skip


# Several buckets, which DeepSpeed's own passes do not have: of one large weight, and of several small ones.
BUCKETS = "deepspeed.zero_optimization.reduce_bucket_size=10000"


class Steps(NamedTuple):
    losses: list[float]
    weights: dict[str, torch.Tensor]
    left: float  # the largest gradient of a step without a backward pass
    reductions: int


def steps(rank: int, world: int, init_method: str, run: RunConfig, lightened: bool) -> Steps:
    """Take three steps, with DeepSpeed's own passes unless `lightened`."""
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    prepare_deepspeed("cpu")
    import torch.distributed as dist
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    from launcher.engine import base
    from launcher.engine.build import build_engine

    if not lightened:
        base.lighten = lambda engine: None  # type: ignore[assignment]
    layout = validate(run, World("cpu", world, world))
    device = join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=init_method)
    engine = build_engine(run, layout, device)
    random, losses = np.random.default_rng(rank), []
    size = run.training.micro_batch_size, sequence_length(run) + 1
    for _ in range(3):
        batches = [random.integers(run.model.vocab_size, size=size) for _ in range(layout.accumulation)]
        losses.append(float(engine.train_batch(batches).loss))
    left = 0.0
    if isinstance(zero := engine.deepspeed.optimizer, BF16_Optimizer):
        zero.get_grads_for_reduction()
        left = max(float(gradient.abs().max()) for gradient in zero.non_expert_gradients)
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *given, **named: (calls.append(1), all_reduce(*given, **named))[1]  # type: ignore[assignment]
    engine.deepspeed.allreduce_and_copy([torch.ones(3)], engine.mesh.data.group)
    reductions = len(calls)
    weights = {logical.name: weight for logical, weight in engine.full_weights()}
    leave()
    return Steps(losses, weights, left, reductions)


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(("parallelism=dp",), marks=pytest.mark.slow), ("parallelism=zero1", "precision=bf16")],
)
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_they_are_deepspeeds_own(overrides: tuple[str, ...], accumulation: int) -> None:
    run = run_of(*SMALL, *overrides, BUCKETS, f"training.global_batch_size={4 * accumulation}")
    ours, theirs = (run_fresh(steps, 2, run, lightened)[0] for lightened in (True, False))
    assert ours.losses == theirs.losses
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in ours.weights.items():
        assert torch.equal(weight, theirs.weights[name]), name
    assert ours.left == 0.0  # nothing of an older step
    assert ours.reductions == 1


@pytest.mark.slow
def test_one_data_rank_reduces_nothing() -> None:
    """DeepSpeed rounds the sums of one rank to bf16 all the same; without it they keep their digits."""
    run = run_of(*SMALL, "parallelism=zero1", "precision=bf16", "training.global_batch_size=4")
    ours, theirs = (run_fresh(steps, 1, run, lightened)[0] for lightened in (True, False))
    assert ours.reductions == 0
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)
    assert ours.left == 0.0
