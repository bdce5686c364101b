"""Start-up of real ranks: the numbers that each draws, and its peak of host memory, against the plan."""

import pytest
import torch
import torch._dynamo  # some of torch is imported at the first operation under a dispatch mode
from torch import Tensor

from launcher.config.layout import Layout, resolve_layout
from launcher.config.schema import RunConfig
from launcher.config.world import World
from launcher.engine.allocations import Allocations
from launcher.engine.distributed import join, prepare_deepspeed
from launcher.parallel import initializer
from launcher.planning.cost.geometry import pipeline_ranks
from launcher.planning.cost.memory import BLOCK_BYTES, start_up_bytes
from tests.config.composing import run_of
from tests.distributed import run_fresh

prepare_deepspeed("cpu")
torch.set_num_threads(1)  # a dispatch mode sees its own thread only

import deepspeed  # noqa: E402  (after DeepSpeed is made quiet)

from launcher.engine.build import build_engine  # noqa: E402

# Each share of a rank ends at the ends of blocks, so that the numbers drawn are those held.
MODEL = [
    "model=gpt_tiny", "model.hidden_size=1024", "model.ffn_hidden_size=1024", "model.num_heads=8",
    "model.vocab_size=512", "model.max_sequence_length=256", "model.num_layers=2",
    "training.global_batch_size=8", "training.micro_batch_size=1",
]  # fmt: skip
MATRICES = 2 * 6 * 1024 * 1024  # of both blocks: split over tensor ranks, stages and ZeRO-3 partitions
EMBEDDING, POSITIONS = 512 * 1024, 256 * 1024

LAYOUTS = {
    "parallelism=zero1 parallelism.data=2": [MATRICES + EMBEDDING + POSITIONS] * 2,
    "parallelism=tp2": [(MATRICES + EMBEDDING) // 2 + POSITIONS] * 2,
    "parallelism=pp2": [MATRICES // 2 + EMBEDDING + POSITIONS, MATRICES // 2 + EMBEDDING],  # a tied embedding
    "parallelism=zero3 parallelism.data=2": [(MATRICES + EMBEDDING + POSITIONS) // 2] * 2,
    "parallelism=zero3 parallelism.data=2 parallelism.tensor=2": [
        (MATRICES + EMBEDDING) // 4 + POSITIONS // 2
    ] * 4,
}  # fmt: skip


class Built(Exception):
    """Raised in place of DeepSpeed's own start: the model is built."""


def start_up(rank: int, world: int, init_method: str, run: RunConfig, layout: Layout) -> tuple[int, int]:
    """Return the numbers that a rank draws and its peak of bytes until its model is built."""
    device = join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=init_method)
    drawn, draw_block = 0, initializer.draw_block

    def draw(seed: int, std: float, sizes: tuple[int, ...]) -> Tensor:
        nonlocal drawn
        block = draw_block(seed, std, sizes)
        drawn += block.numel()
        return block

    def built(**_: object) -> None:
        raise Built

    initializer.draw_block, deepspeed.initialize = draw, built
    with Allocations() as memory, pytest.raises(Built):
        build_engine(run, layout, device)
    return drawn, memory.peak


@pytest.mark.parametrize("settings", LAYOUTS)
def test_a_rank_draws_its_share_and_holds_no_more(settings: str) -> None:
    run = run_of("hardware=cpu", "precision=bf16", *MODEL, *settings.split())
    expected = LAYOUTS[settings]
    layout = resolve_layout(run, World("cpu", len(expected), len(expected)))
    found = run_fresh(start_up, layout.world_size, run, layout)
    assert [drawn for drawn, _ in found] == expected
    ranks = pipeline_ranks(run, layout)
    for index, (_, peak) in enumerate(found):
        planned = start_up_bytes(run, layout, ranks[index * len(ranks) // len(found)])
        assert peak == pytest.approx(planned, rel=0.01)


def test_the_plan_knows_the_size_of_a_block() -> None:
    assert BLOCK_BYTES == initializer.BLOCK_BYTES
