"""Counts of a step in real ranks: reads of the device, and reductions of gradients."""

import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo  # some of torch is imported at the first operation under a dispatch mode
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.engine.allocations import CollectiveCall
from launcher.engine.distributed import join, leave, prepare_deepspeed
from tests.config.composing import run_of
from tests.distributed import run_fresh

prepare_deepspeed("cpu")
torch.set_num_threads(1)  # a dispatch mode sees its own thread only

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402  (made quiet above)

from launcher.engine import flat  # noqa: E402
from launcher.engine.base import MicroBatches  # noqa: E402
from launcher.engine.build import build_engine  # noqa: E402
from launcher.engine.measuring import RankMeasurement  # noqa: E402
from launcher.engine.overlapped_reduction import OverlappedReduction  # noqa: E402
from launcher.engine.update_guard import UpdateGuard  # noqa: E402

SMALL = [
    "hardware=cpu", "model=gpt_tiny", "model.hidden_size=64", "model.ffn_hidden_size=128",
    "model.num_layers=2", "training.global_batch_size=8", "training.micro_batch_size=2",
]  # fmt: skip


class Reads(TorchDispatchMode):
    """Counts, by file, what waits for the device: .item(), float(), bool(), int() of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.by_file: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function) == "aten._local_scalar_dense.default":
            self.by_file[caller()] += 1
        return function(*args, **(kwargs or {}))


def caller() -> str:
    """Return the file of the launcher or of DeepSpeed that reads a value."""
    frame: Any = sys._getframe(2)
    while not {"launcher", "deepspeed"} & set(Path(frame.f_code.co_filename).parts[:-1]):
        frame = frame.f_back
    return Path(frame.f_code.co_filename).name


Fault = Callable[[], None]


class Counts(NamedTuple):
    """Counts of a step on a rank."""

    reads: Counter[str]  # by file
    collectives: dict[CollectiveCall, int]
    ready: list[int]  # elements of the gradients of all micro-batches, in the order in which they are ready
    reduced_after: list[int]  # of each reduction within a backward pass: the gradients that were ready before


def counted_step(
    rank: int, world: int, init_method: str, run: RunConfig, layout: Layout, fault: Fault | None
) -> Counts:
    """Count the third step of a run."""
    device = join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=init_method)
    if fault is not None:
        fault()
    engine = build_engine(run, layout, device)
    measurement, reads = RankMeasurement(), Reads()
    measurement.name_groups(engine)
    ready: list[int] = []
    for parameter in engine.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: ready.append(p.numel()))
    for _ in range(2):
        engine.train_batch(batches(run, layout))
    ready.clear()
    reduced_after: list[int] = []

    def noted(reduce: Callable[..., Any], *arguments: Any, async_op: bool = False, **options: Any) -> Any:
        if async_op:
            reduced_after.append(len(ready))
        return reduce(*arguments, async_op=async_op, **options)

    dist.all_reduce = partial(noted, dist.all_reduce)
    dist.all_reduce_coalesced = partial(noted, dist.all_reduce_coalesced)
    with measurement.tensors, reads:
        engine.train_batch(batches(run, layout))
    leave()
    return Counts(reads.by_file, measurement.collectives(), ready, reduced_after)


def batches(run: RunConfig, layout: Layout) -> MicroBatches:
    shape = (run.training.micro_batch_size, sequence_length(run) + 1)
    return iter([np.zeros(shape, dtype=np.int64)] * layout.accumulation)


@cache
def counts(settings: str, fault: Fault | None = None) -> tuple[Counts, int]:
    """Return the counts of the first of two ranks, and its micro-batches per step."""
    run = run_of(*SMALL, *settings.split())
    layout = validate(run, World("cpu", 2, 2))
    assert layout.world_size == 2
    return run_fresh(counted_step, 2, run, layout, fault)[0], layout.accumulation


BUCKET = 20_000  # elements; the largest gradient has 16384
BUCKETS = f"deepspeed.zero_optimization.reduce_bucket_size={BUCKET}"
DP = "parallelism=dp parallelism.data=2"
ZERO_1_BF16 = "parallelism=zero1 parallelism.data=2 precision=bf16"
ZERO_2 = f"parallelism=zero2 parallelism.data=2 {BUCKETS}"

# DeepSpeed decides in Python whether to update: the guard reads the norm once, and DeepSpeed's utils.py
# reads what the guard hands it, which is in host memory on every device. BF16_Optimizer is not asked.
NO_READS: dict[str, int] = {}
READS = {
    DP: NO_READS,
    "parallelism=tp2 parallelism.data=1": NO_READS,
    ZERO_1_BF16: NO_READS,
    ZERO_2: {"update_guard.py": 1, "utils.py": 3},
}
MORE_READS = {
    "parallelism=zero1 parallelism.data=2": {"update_guard.py": 1, "utils.py": 3},
    "parallelism=zero3 parallelism.data=2": {"update_guard.py": 1, "utils.py": 1},
    "parallelism=pp2 parallelism.data=1": {"update_guard.py": 1, "utils.py": 3},
    "parallelism=pp2 parallelism.data=1 precision=bf16": NO_READS,
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [*READS.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_READS.items())],
)
def test_the_engine_reads_the_device_only_where_deepspeed_decides(
    settings: str, expected: dict[str, int]
) -> None:
    assert counts(settings)[0].reads == expected


def reads_every_norm() -> None:
    judge = UpdateGuard.judge

    def judged(self: UpdateGuard, norm: Tensor) -> None:
        judge(self, norm)
        float(self.norm)

    UpdateGuard.judge = judged  # type: ignore[method-assign]


def test_a_read_too_many_is_counted() -> None:
    # The caller is this file, which is neither the launcher's nor DeepSpeed's: the next frame counts.
    assert counts(DP, reads_every_norm)[0].reads == {"flat.py": 1}


def buckets(gradients: list[int], most: int) -> list[int]:
    """Return the elements of each bucket that is filled with the gradients in their order."""
    filled = [0]
    for elements in gradients:
        if filled[-1] + elements > most:
            filled.append(0)
        filled[-1] += elements
    return filled


def reductions(found: Counts) -> Counter[int]:
    """Return how often gradients of a number of bytes were reduced over the data group."""
    kinds = ("all_reduce", "reduce_scatter")
    return Counter(
        {
            call.size: times
            for call, times in found.collectives.items()
            if call.group == "data" and call.kind in kinds
        }
    )


def test_gradients_are_reduced_once_per_step() -> None:
    """Also in buckets without a pipeline, once each, within the backward pass of the last micro-batch."""
    for settings, element in ((DP, 4), (ZERO_1_BF16, 2)):
        for bucket in ("", BUCKETS):
            found, accumulation = counts(f"{settings} {bucket}".strip())
            of_a_micro_batch = found.ready[: len(found.ready) // accumulation]
            assert accumulation == 2
            assert sum(s * n for s, n in reductions(found).items()) == element * sum(of_a_micro_batch)
            assert reductions(found).total() == (len(found.reduced_after) if bucket else 1), settings


def reduced_in_one_go(self: OverlappedReduction, parameter: torch.nn.Parameter) -> None:
    """Reduce nothing before the end of the backward pass."""


def reduces_late() -> None:
    OverlappedReduction._arrived = reduced_in_one_go  # type: ignore[method-assign]


@pytest.mark.parametrize("settings", [DP, pytest.param(ZERO_1_BF16, marks=pytest.mark.slow)])
def test_a_bucket_is_reduced_as_soon_as_its_gradients_exist(settings: str) -> None:
    found, accumulation = counts(f"{settings} {BUCKETS}")
    each = len(found.ready) // accumulation
    begun = found.reduced_after
    assert len(begun) > 3
    # All but the last, which has the embedding, before the last gradient, and none in the first micro-batch.
    assert each < begun[0] < begun[-2] < begun[-1] == 2 * each - 1
    assert begun == sorted(begun)


def test_a_reduction_that_waits_for_the_end_of_the_backward_pass_is_seen() -> None:
    found, _ = counts(f"{DP} {BUCKETS}", reduces_late)
    assert set(found.reduced_after) == {len(found.ready)}


def expected_reductions(found: Counts, accumulation: int) -> Counter[int]:
    """Return the reductions of one per bucket and micro-batch."""
    each = len(found.ready) // accumulation
    starts = range(0, len(found.ready), each)
    return Counter(
        4 * size for start in starts for size in buckets(found.ready[start : start + each], BUCKET)
    )


def test_each_bucket_is_reduced_once_in_every_micro_batch() -> None:
    found, accumulation = counts(ZERO_2)
    expected = expected_reductions(found, accumulation)
    assert expected.total() > 2 * accumulation  # several buckets
    assert reductions(found) == expected


def reduces_twice() -> None:
    reduce = DeepSpeedZeroOptimizer.average_tensor

    def twice(self: Any, *arguments: Any) -> Any:
        reduce(self, *arguments)
        return reduce(self, *arguments)

    DeepSpeedZeroOptimizer.average_tensor = twice


def test_a_second_reduction_of_a_bucket_is_counted() -> None:
    found, accumulation = counts(ZERO_2, reduces_twice)
    expected = expected_reductions(found, accumulation)
    assert reductions(found).total() == 2 * expected.total()


# Nothing is gathered ahead, no weight stays whole, and a released weight is gathered again.
EACH_WHEN_USED = " ".join(
    f"deepspeed.zero_optimization.stage3_{name}=0"
    for name in ("prefetch_bucket_size", "param_persistence_threshold", "max_reuse_distance")
)
ZERO_3 = f"parallelism=zero3 parallelism.data=2 {EACH_WHEN_USED}"


def gathers(found: Counts) -> int:
    calls = found.collectives.items()
    return sum(times for call, times in calls if (call.group, call.kind) == ("data", "all_gather"))


def without_leaf_modules() -> None:
    flat.set_z3_leaf_modules = lambda model, kinds: None


def test_zero_3_gathers_a_block_at_once() -> None:
    """Forward and backward pass each gather two blocks; and tokens, positions, the last norm and the head."""
    found, accumulation = counts(ZERO_3)
    assert gathers(found) == accumulation * 2 * (2 + 4)


def test_gathers_of_each_module_of_a_block_are_counted() -> None:
    """A block's modules with weights are two norms and four projections."""
    found, accumulation = counts(ZERO_3, without_leaf_modules)
    assert gathers(found) == accumulation * 2 * (2 * 6 + 4)
