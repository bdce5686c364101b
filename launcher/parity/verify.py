"""`launcher verify`: a layout, made small, against one process of plain torch."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from launcher.config.layout import Layout, resolve_layout
from launcher.config.schema import Dtype, OptimizerConfig, OptimizerName, RunConfig
from launcher.config.world import World
from launcher.engine.distributed import prepare_deepspeed
from launcher.launch.local import run_local_ranks
from launcher.models.blocks import BlockContext
from launcher.models.model import flat_model
from launcher.parallel.mesh import ProcessMesh
from launcher.parallel.sharding import logical_of
from launcher.parity.diagnose import Diagnosis, diagnose
from launcher.parity.differences import Difference, applied_gradients, compare
from launcher.parity.dropout import compare_draws, diagnose_draws, read_draws
from launcher.parity.recording import record_dropout, record_rank
from launcher.parity.reference import probe_batches, reference_trace
from launcher.parity.shrink import single
from launcher.parity.step_trace import StepTrace, Weights, read_traces
from launcher.parity.tolerance import tolerance

PROBE = OptimizerConfig(name=OptimizerName.sgd, lr=0.1, momentum=0.0)


@dataclass(frozen=True)
class Pass:
    """One optimizer in one precision: what was compared, and what a failure looks like."""

    title: str
    differences: list[Difference]
    diagnosis: Diagnosis | None

    @property
    def ok(self) -> bool:
        return all(difference.ok for difference in self.differences)


def verify(small: RunConfig, *, mutation: Callable[[], None] | None = None) -> Iterator[Pass]:
    """Each pass of a shrunk run as it ends. `mutation` is called in each rank first: how tests inject faults.

    The caller has imported DeepSpeed (prepare_deepspeed). Raises what run_local_ranks raises.
    """
    for title, run, plain_sgd in passes(small):
        yield run_pass(title, run, plain_sgd, mutation)
    if small.model.dropout > 0.0:
        yield dropout_pass(small, mutation)


def passes(small: RunConfig) -> list[tuple[str, RunConfig, bool]]:
    """(title, run, whether it is the plain-SGD probe): fp32 first, then bf16 where that is the run's own.

    Plain SGD shows every gradient and every error of scale, which Adam hides; the run's own optimizer
    shows its states and updates.
    """
    found = []
    for dtype in (Dtype.fp32, Dtype.bf16) if small.precision.dtype is Dtype.bf16 else (Dtype.fp32,):
        for title, optimizer, plain in (
            ("plain SGD", _probe(small), True),
            (small.optimizer.name.name, small.optimizer, False),
        ):
            run = copy.deepcopy(small)
            run.precision.dtype, run.optimizer = dtype, optimizer
            run.model.dropout = 0.0  # another layout draws other masks: see dropout_pass
            found.append((f"{title}, {dtype.name}", run, plain))
    return found


def _probe(small: RunConfig) -> OptimizerConfig:
    probe = copy.deepcopy(PROBE)
    probe.gradient_clipping = small.optimizer.gradient_clipping
    return probe


def run_pass(title: str, run: RunConfig, plain_sgd: bool, mutation: Callable[[], None] | None = None) -> Pass:
    """One of `passes`."""
    layout = _layout(run)
    trace = layout_trace(run, layout, mutation)
    batches = list(probe_batches(run))
    expected = reference_trace(run, initial_weights(run), batches, follow=None if plain_sgd else trace)
    allowed = tolerance(run)
    if plain_sgd:
        applied_gradients(run, trace)
    differences = compare(run, trace, expected, allowed, plain_sgd=plain_sgd)
    failed = [difference for difference in differences if not difference.ok]
    return Pass(title, differences, diagnose(run, layout, failed, trace, expected) if failed else None)


def dropout_pass(small: RunConfig, mutation: Callable[[], None] | None = None) -> Pass:
    """One step with the run's dropout: its masks, not its numbers."""
    run = copy.deepcopy(small)
    run.precision.dtype = Dtype.fp32
    layout = _layout(run)
    with tempfile.TemporaryDirectory(prefix="launcher-verify-") as name:
        _run_ranks(record_dropout, run, layout, Path(name), mutation)
        differences = compare_draws(run, layout, read_draws(Path(name) / "draws"))
    failed = [difference for difference in differences if not difference.ok]
    return Pass(
        f"masks of dropout {run.model.dropout}", differences, diagnose_draws(failed) if failed else None
    )


def _layout(run: RunConfig) -> Layout:
    p = run.parallelism
    assert p.data is not None
    # As many ranks as the layout takes: that the machine has them was checked at the start.
    ranks = p.pipeline * p.data * p.tensor
    return resolve_layout(run, World(run.hardware.device.name, ranks, ranks, fixed=True))


def initial_weights(run: RunConfig) -> Weights:
    """What one process starts from, rounded to the run's dtype as DeepSpeed's master weights are."""
    context = BlockContext.create(single(run), ProcessMesh.single(), torch.device("cpu"))
    model = flat_model(run.model, context)
    dtype = torch.bfloat16 if run.precision.dtype is Dtype.bf16 else torch.float32
    return {logical_of(p).name: p.detach().to(dtype).float() for p in model.parameters()}


def layout_trace(run: RunConfig, layout: Layout, mutation: Callable[[], None] | None) -> list[StepTrace]:
    """The trace of real ranks over gloo."""
    with tempfile.TemporaryDirectory(prefix="launcher-verify-") as name:
        folder = Path(name)
        _run_ranks(record_rank, run, layout, folder, mutation)
        return read_traces([folder / f"stage-{stage}" for stage in range(layout.pipeline)])


def _run_ranks(
    record: Callable[..., None],
    run: RunConfig,
    layout: Layout,
    folder: Path,
    mutation: Callable[[], None] | None,
) -> None:
    target = partial(_rank, record=record, run=run, layout=layout, folder=folder, mutation=mutation)
    # CUDA cannot be forked safely; on CPU a fork shares what is imported.
    start_method: Literal["fork", "spawn"] = "fork" if layout.device == "cpu" else "spawn"
    run_local_ranks(target, layout.world_size, log_dir=folder / "logs", start_method=start_method)


def _rank(
    rank: int,
    *,
    record: Callable[..., None],
    mutation: Callable[[], None] | None,
    layout: Layout,
    **arguments: Any,
) -> None:
    prepare_deepspeed(layout.device)  # again, where this process was spawned
    if mutation is not None:
        mutation()
    record(rank, layout=layout, **arguments)
