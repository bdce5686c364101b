"""Stages, schedules and buffers against DeepSpeed's code; the bubble against its simulation."""

from collections import Counter
from itertools import pairwise

import pytest

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.engine.distributed import prepare_deepspeed
from launcher.models.arithmetic import parameters
from launcher.parallel.buckets import FILLED
from launcher.planning.cost.buffers import ALL_REDUCE_BUCKET, BufferSizes
from launcher.planning.cost.geometry import blocks_of_stages, pipeline_ranks
from launcher.planning.cost.memory import in_flight
from launcher.planning.cost.pipeline_schedule import Event, order, simulate
from launcher.planning.cost.run_plan import make_plan
from launcher.planning.cost.zero_states import Prefetched, reduced_buckets, states_of
from tests.config.composing import run_of

prepare_deepspeed("cpu")

from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE  # noqa: E402  (after DeepSpeed is made quiet)
from deepspeed.runtime.pipe import schedule as deepspeed_schedule  # noqa: E402
from deepspeed.runtime.utils import partition_balanced  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402


def layout_of(pipeline: int, micro_batches: int, stages_per_rank: int = 1) -> Layout:
    return Layout(pipeline, 1, 1, "cuda", micro_batches, 1, stages_per_rank)


def test_blocks_are_assigned_to_stages_as_deepspeed_does(subtests: pytest.Subtests) -> None:
    """With embedding and positions before the blocks, and final norm and head after them."""
    for blocks in range(1, 14):
        for before in [1, 2]:
            with subtests.test(f"{blocks} {before}"):
                weights = [0] * before + [1] * blocks + [0, 0]
                for stages in range(1, blocks + 1):
                    parts = partition_balanced(weights, stages)
                    theirs = [sum(weights[start:stop]) for start, stop in pairwise(parts)]
                    assert blocks_of_stages(blocks, stages) == theirs
                    assert stages == 1 or (parts[1] > before and parts[-2] <= before + blocks)


def passes(commands: object) -> list[tuple[bool, int]]:
    """Return (is forward, phase) of every pass in a DeepSpeed schedule."""
    kinds = {"ForwardPass": True, "BackwardPass": False}
    return [
        (kinds[type(one).__name__], one.kwargs.get("phase", 0))
        for step in commands  # type: ignore[attr-defined]
        for one in step
        if type(one).__name__ in kinds
    ]


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 1), (2, 2), (2, 5), (3, 7), (4, 3), (4, 16)])
def test_1f1b_runs_in_deepspeeds_order(ranks: int, micro_batches: int) -> None:
    for rank in range(ranks):
        theirs = passes(deepspeed_schedule.TrainSchedule(micro_batches, ranks, rank))
        assert list(order(layout_of(ranks, micro_batches), rank, micro_batches)) == theirs
        assert most_in_flight(theirs) == in_flight(layout_of(ranks, micro_batches), rank)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (2, 7), (3, 6), (4, 8), (4, 13)])
def test_dualpipev_runs_in_deepspeeds_order(ranks: int, micro_batches: int) -> None:
    for rank in range(ranks):
        theirs = passes(deepspeed_schedule.DualPipeVSchedule(micro_batches, ranks, rank))
        layout = layout_of(ranks, micro_batches, 2)
        assert list(order(layout, rank, micro_batches)) == theirs
        assert most_in_flight(theirs) == in_flight(layout, rank)


def most_in_flight(tasks: list[tuple[bool, int]]) -> tuple[int, ...]:
    """Return the micro-batches in flight by phase, when their sum is largest."""
    live: Counter[int] = Counter()
    fullest: tuple[int, ...] = ()
    for forward, phase in tasks:
        live[phase] += 1 if forward else -1
        now = tuple(live[one] for one in range(max(live) + 1))
        fullest = max(fullest, now, key=sum)
    return fullest


def idle(events: list[Event], busy: float) -> float:
    return max(event.end for event in events) - busy


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 4), (2, 4), (4, 8), (8, 16)])
def test_the_bubble_of_1f1b(ranks: int, micro_batches: int) -> None:
    """(p - 1) / m of the time without it: Narayanan et al., arXiv 2104.04473, section 2.2."""
    layout = layout_of(ranks, micro_batches)
    events = simulate(layout, [1.0] * ranks, [2.0] * ranks, micro_batches)
    assert len(events) == 2 * ranks * micro_batches
    assert idle(events, 3.0 * micro_batches) == pytest.approx((ranks - 1) * 3.0)


# Where stages are unequal, some of the idle time of the slowest hides in that of the others.
PIPELINES = [
    ([], 0.03),
    (["model.num_layers=14"], 0.03),
    (["parallelism.pipeline_schedule=dualpipev"], 0.05),
]


@pytest.mark.parametrize(("overrides", "within"), PIPELINES)
def test_the_bubble_of_a_plan_equals_the_simulated_bubble(overrides: list[str], within: float) -> None:
    run: RunConfig = run_of(
        "model=gpt2_xl", "model.num_layers=16", "hardware=a100_80gb", "precision=bf16",
        "parallelism.pipeline=4", "parallelism.data=1", "training.global_batch_size=64",
        "training.micro_batch_size=4", *overrides,
    )  # fmt: skip
    layout = validate(run, World("cuda", 8, 8))
    plan = make_plan(run, layout)
    assert plan.time is not None
    forward = [stage.forward.total + stage.sending / 2 for stage in plan.time.stages]
    backward = [stage.backward.total + stage.sending / 2 for stage in plan.time.stages]
    events = simulate(layout, forward, backward, layout.accumulation)
    time = plan.time
    planned = time.compute + time.tensor + time.pipeline + time.bubble
    assert max(event.end for event in events) == pytest.approx(planned, rel=within)


def buffers(*overrides: str) -> BufferSizes:
    """Return the buffer sizes of a run on 8 GPUs."""
    run = run_of(
        *overrides, "hardware=h100_80gb", "training.global_batch_size=64", "training.micro_batch_size=1"
    )
    return BufferSizes.of(run, validate(run, World("cuda", 8, 8)))


def test_defaults_are_deepspeeds() -> None:
    theirs, ours = DeepSpeedZeroConfig(), buffers("model=llama3_8b", "parallelism=zero3")
    assert ours.reduce_bucket == theirs.reduce_bucket_size
    small = run_of("model=gpt_tiny")
    assert buffers("model=gpt_tiny", "parallelism=zero2").reduce_bucket == parameters(small.model)
    assert buffers("model=llama3_8b", "parallelism=dp").reduce_bucket == FILLED["cuda"]
    for of_deepspeed in ("prescale_gradients=true", "gradient_predivide_factor=2"):
        divided_before = buffers("model=llama3_8b", "parallelism=dp", f"deepspeed.{of_deepspeed}")
        assert divided_before.reduce_bucket == theirs.reduce_bucket_size
    assert ours.sub_group == theirs.sub_group_size
    of_tiny = buffers("model=gpt_tiny", "parallelism=zero3")
    assert of_tiny.prefetch_bucket == theirs.prefetch_bucket_size
    assert of_tiny.max_live == theirs.max_live_parameters
    assert ours.persistence_threshold == theirs.param_persistence_threshold
    assert ours.model_persistence == theirs.model_persistence_threshold
    assert ours.max_live == theirs.max_live_parameters
    assert ours.max_reuse == theirs.max_reuse_distance
    assert ALL_REDUCE_BUCKET == MEMORY_OPT_ALLREDUCE_SIZE


def test_buffer_sizes_are_read_from_the_deepspeed_keys_of_the_run() -> None:
    tuned = buffers(
        "deepspeed.zero_optimization.reduce_bucket_size=1e6",
        "deepspeed.zero_optimization.overlap_comm=true",
        "deepspeed.zero_optimization.stage3_max_live_parameters=7",
        "parallelism=zero2",
    )
    assert (tuned.reduce_bucket, tuned.reduce_buffers, tuned.max_live) == (1_000_000, 2, 7)


def test_a_cpu_sends_most_gradients_of_a_small_model_before_the_last_one() -> None:
    """`make bench` trains this model, which has 5.9 million parameters."""
    model = ["model=gpt_mini", "model.num_layers=6", "model.vocab_size=2048", "model.tie_embeddings=false"]
    run = run_of(*model, "parallelism=dp", "training.global_batch_size=8", "training.micro_batch_size=4")
    layout = validate(run, World("cpu", 2, 2))
    [rank] = pipeline_ranks(run, layout)
    *early, _ = reduced_buckets(rank, BufferSizes.of(run, layout).reduce_bucket)
    assert sum(early) > rank.trained_parameters / 2


def ahead(*overrides: str) -> Prefetched:
    """Return the buffers of weights that one of two ranks gathers ahead under ZeRO-3."""
    wide = ["model=gpt_tiny", "model.hidden_size=256", "model.ffn_hidden_size=1024"]
    run = run_of(*wide, "parallelism=zero3", "training.global_batch_size=8", *overrides)
    layout = validate(run, World("cpu", 2, 2))
    [rank] = pipeline_ranks(run, layout)
    return states_of(run, layout, rank, BufferSizes.of(run, layout)).prefetched


def test_weights_that_are_gathered_ahead_stay_until_the_last_module_takes_its_own() -> None:
    """That is the last block, or a head with a large weight of its own."""
    large, untied = "model.vocab_size=4096", "model.tie_embeddings=false"
    for overrides in ([], [untied], [large], [large, untied]):
        found = ahead(*overrides)
        assert found == Prefetched(found.blocks, found.blocks if len(overrides) == 2 else 0, 0), overrides
        assert found.blocks > 0
    settings = ("max_reuse_distance", "prefetch_bucket_size")
    few = ahead(*(f"deepspeed.zero_optimization.stage3_{name}=1000" for name in settings))
    assert few.blocks == few.last_block == few.loss > 0
    assert ahead("deepspeed.zero_optimization.stage3_prefetch_bucket_size=0") == Prefetched()


def test_a_rank_of_dualpipev_holds_both_ends() -> None:
    run = run_of("parallelism.pipeline=2", "parallelism.pipeline_schedule=dualpipev", "parallelism.data=1")
    first, second = pipeline_ranks(run, validate(run, World("cpu", 2, 2)))
    assert [(chunk.first_block, chunk.blocks) for chunk in first.chunks] == [(0, 1), (3, 1)]
    assert [(chunk.first_block, chunk.blocks) for chunk in second.chunks] == [(1, 1), (2, 1)]
    assert first.shares_tied_weight
    assert not second.copies_tied_weight
