"""An evaluation has no dropout and changes nothing, and each step is judged once, in every kind of engine."""

from typing import NamedTuple

import numpy as np
import pytest

from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.config.validate import validate
from launcher.config.world import World
from tests.config.composing import run_of
from tests.distributed import run_fresh

SMALL = [
    "hardware=cpu", "model=gpt_tiny", "model.hidden_size=64", "model.ffn_hidden_size=128",
    "model.num_layers=2", "model.dropout=0.5", "data.sequence_length=16", "training.micro_batch_size=2",
    "training.global_batch_size=8",
]  # fmt: skip
STEPS = 3


class Facts(NamedTuple):
    evaluated: list[float]  # before the first step, twice, and after each step, twice
    trained: list[float]
    counts: list[list[int]]  # of the guard, after each step


def facts(rank: int, world: int, init_method: str, run: RunConfig) -> Facts:
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    prepare_deepspeed("cpu")
    from launcher.engine.build import build_engine

    layout = validate(run, World("cpu", world, world))
    device = join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=init_method)
    engine = build_engine(run, layout, device)
    random = np.random.default_rng(5 + engine.mesh.data.rank)
    shape = run.training.micro_batch_size, sequence_length(run) + 1
    batches = [random.integers(run.model.vocab_size, size=shape) for _ in range(layout.accumulation)]

    def evaluated() -> list[float]:
        return [float(engine.eval_batch(iter(batches))) for _ in range(2)]

    scores, losses, counts = evaluated(), [], []
    for step in range(1, STEPS + 1):
        engine.random.begin_step(step)
        losses.append(engine.mean_loss(engine.train_batch(iter(batches)).loss))
        counts.append(engine.guard.counts.tolist())
        scores += evaluated()
    leave()
    return Facts(scores, losses, counts)


@pytest.mark.parametrize("layout", ["dp", "zero1", "pp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_an_evaluation_has_no_dropout_and_a_step_is_judged_once(layout: str) -> None:
    run = run_of(*SMALL, f"parallelism={layout}", f"parallelism.data={1 if layout == 'pp2' else 2}")
    found = run_fresh(facts, 2, run)[0]
    assert found.evaluated[::2] == found.evaluated[1::2]
    assert abs(found.trained[0] - found.evaluated[0]) > 1e-3, "training has dropout, at the same weights"
    assert found.evaluated[-1] < found.evaluated[0]
    assert found.counts == [[0, 0, step] for step in range(1, STEPS + 1)]
