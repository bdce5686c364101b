"""Compare a small run in its layout with one process of plain torch: the passes of `launcher verify`."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.config.layout import Layout, is_compiled, resolve_layout
from launcher.config.schema import (
    Dtype,
    OptimizerConfig,
    OptimizerName,
    PrecisionConfig,
    RunConfig,
    StatesDtype,
)
from launcher.config.world import World
from launcher.engine.distributed import prepare_deepspeed
from launcher.launch.local import run_local_ranks, start_method_for
from launcher.launch.scratch import scratch_directory
from launcher.parity.diagnose import Diagnosis, diagnose
from launcher.parity.differences import Difference, applied_gradients, compare
from launcher.parity.dropout import MEANINGS, compare_draws, read_draws
from launcher.parity.recording import record_dropout, record_rank
from launcher.parity.reference import initial_weights, probe_batches, reference_trace
from launcher.parity.step_trace import StepTrace, read_traces
from launcher.parity.tolerance import tolerance

Mutation = Callable[[], None]  # a fault of the tests; each rank calls it before it builds its engine
PROBE = OptimizerConfig(name=OptimizerName.sgd, lr=0.1, momentum=0.0)
# With bf16 weights an update does not show its gradient: the weight's rounding is larger. The momentum does.
PROBE_OF_BF16_STATES = replace(PROBE, momentum=0.5)


@dataclass(frozen=True)
class VerifyPass:
    """The result of training with one optimizer in one precision: all differences, and why it failed."""

    title: str
    differences: list[Difference]
    diagnosis: Diagnosis | None

    @property
    def ok(self) -> bool:
        return all(difference.ok for difference in self.differences)


def verify(small: RunConfig, *, mutation: Mutation | None = None) -> Iterator[VerifyPass]:
    """Yield the result of each pass of a shrunk run as soon as the pass ends.

    The caller must have called prepare_deepspeed. Raises the errors of run_local_ranks.
    """
    for title, run, plain_sgd in passes(small):
        yield run_pass(title, run, plain_sgd, mutation)
    if small.model.dropout > 0.0:
        for run, title in _eager_and_compiled(small):
            yield dropout_pass(run, mutation, title)


def passes(small: RunConfig) -> list[tuple[str, RunConfig, bool]]:
    """Return (title, run, whether it uses plain SGD) of each pass: first fp32, then bf16 if the run uses it.

    Plain SGD exposes every gradient and every error of scale, which Adam hides. The run's own optimizer
    exposes errors in optimizer states and updates. A run with compiled blocks is verified eager, where the
    output of every layer can be read, and with plain SGD also compiled. Bf16 states replace the bf16 passes.
    """
    variants = []
    own_precision = [small.precision] if small.precision.dtype is Dtype.bf16 else []
    for precision in (PrecisionConfig(Dtype.fp32), *own_precision):
        has_bf16_states = precision.states is StatesDtype.bf16
        probe = PROBE_OF_BF16_STATES if has_bf16_states else PROBE
        probe = replace(probe, gradient_clipping=small.optimizer.gradient_clipping)
        own = (small.optimizer.name.name, small.optimizer, False)
        words_of_precision = precision.dtype.name + (" states" if has_bf16_states else "")
        for title, optimizer, plain in (("plain SGD", probe, True), own):
            run = copy.deepcopy(small)
            run.precision, run.optimizer = copy.copy(precision), optimizer
            run.model.dropout = 0.0  # masks depend on the layout: see dropout_pass
            run.finetune.lora.dropout = 0.0
            variants += [
                (f"{title}, {words_of_precision}{words}", each, plain)
                for each, words in _eager_and_compiled(run)
                if plain or not each.training.compile
            ]
    return variants


def _eager_and_compiled(run: RunConfig) -> list[tuple[RunConfig, str]]:
    """Return the run with eager blocks, and with compiled blocks if it has them, each with words for it."""
    eager, compiled = copy.deepcopy(run), copy.deepcopy(run)
    eager.training.compile, compiled.training.compile = False, True
    is_on = is_compiled(run, run.hardware.device.name)
    return [(eager, ""), (compiled, ", compiled")] if is_on else [(eager, "")]


def run_pass(title: str, run: RunConfig, plain_sgd: bool, mutation: Mutation | None = None) -> VerifyPass:
    """Run one of `passes` in its layout and in the reference, and return all differences."""
    layout = _layout(run)
    with scratch_directory() as folder:
        _run_ranks(record_rank, run, layout, folder, mutation)
        trace = read_traces([folder / f"stage-{stage}" for stage in range(layout.pipeline)])
    batches = list(probe_batches(run))
    expected = reference_trace(run, initial_weights(run), batches, follow=None if plain_sgd else trace)
    if layout.compiled:
        leave_out_blocks(expected)
    if plain_sgd:
        applied_gradients(run, trace)
    differences = compare(run, trace, expected, tolerance(run), plain_sgd=plain_sgd)
    failed = [difference for difference in differences if not difference.ok]
    return VerifyPass(title, differences, diagnose(run, layout, failed, trace, expected) if failed else None)


def leave_out_blocks(trace: list[StepTrace]) -> None:
    """Drop the outputs inside blocks, which a compiled block does not show. Modifies `trace`."""
    for step in trace:
        step.outputs = {name: x for name, x in step.outputs.items() if not name.startswith("blocks.")}


def dropout_pass(small: RunConfig, mutation: Mutation | None = None, words: str = "") -> VerifyPass:
    """Train one step with the run's dropout, and check the masks only."""
    run = copy.deepcopy(small)
    run.precision, run.finetune.lora.dropout = PrecisionConfig(Dtype.fp32), 0.0
    layout = _layout(run)
    with scratch_directory() as folder:
        _run_ranks(record_dropout, run, layout, folder, mutation)
        differences = compare_draws(run, layout, read_draws(folder / "draws"))
    failed = [difference.name for difference in differences if not difference.ok]
    diagnosis = Diagnosis(failed[0], MEANINGS[failed[0]]) if failed else None
    return VerifyPass(f"masks of dropout {run.model.dropout}{words}", differences, diagnosis)


def _layout(run: RunConfig) -> Layout:
    p = run.parallelism
    assert p.data is not None
    ranks = p.pipeline * p.data * p.context * p.tensor  # checked against this machine when verify started
    return resolve_layout(run, World(run.hardware.device.name, ranks, ranks, fixed=True))


def _run_ranks(
    record: Callable[..., None], run: RunConfig, layout: Layout, folder: Path, mutation: Mutation | None
) -> None:
    target = partial(_rank, record=record, run=run, layout=layout, folder=folder, mutation=mutation)
    # CUDA does not survive a fork; on CPU a forked rank starts with all modules already imported.
    start_method = start_method_for(layout.device)
    run_local_ranks(target, layout.world_size, log_dir=folder / "logs", start_method=start_method)


def _rank(
    rank: int, *, record: Callable[..., None], mutation: Mutation | None, layout: Layout, **arguments: Any
) -> None:
    prepare_deepspeed(layout.device)  # needed again in a spawned process
    if mutation is not None:
        mutation()
    record(rank, layout=layout, **arguments)
