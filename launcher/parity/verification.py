"""Compare a small run in its layout with one process of plain torch: the passes of `launcher verify`."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from launcher.config.layout import Layout, effective_zero_stage, is_compiled, resolve_layout
from launcher.config.schema import (
    Dtype,
    OptimizerConfig,
    OptimizerName,
    PrecisionConfig,
    RunConfig,
    StatesDtype,
)
from launcher.config.shape import sequence_length
from launcher.config.world import World
from launcher.engine.distributed import prepare_deepspeed
from launcher.engine.watchdog import REPORT as HANG
from launcher.launch.local import RankFailure, run_local_ranks, start_method_for
from launcher.launch.scratch import scratch_directory
from launcher.parity.diagnose import Diagnosis, diagnose, diagnose_lost_rank
from launcher.parity.differences import Difference, applied_gradients, compare, kept_momentum
from launcher.parity.dropout import DRAWS, MEANINGS, NEXT_DRAWS, compare_draws, compare_next, read_draws
from launcher.parity.perturb import perturbed
from launcher.parity.plain_data import use_files, write_files
from launcher.parity.plain_source import PlainSource
from launcher.parity.recording import ENGINE, count_labels, record_dropout, record_rank
from launcher.parity.reference import (
    GlobalBatch,
    arithmetic_of,
    initial_weights,
    probe_batches,
    reference_trace,
)
from launcher.parity.rounding import equivalent
from launcher.parity.shrink import LayoutAxes
from launcher.parity.step_trace import StepTrace, read_traces
from launcher.parity.tolerance import (
    Tolerance,
    loss_distance,
    measured_tolerance,
    norm_distance,
    tolerance,
)
from launcher.parity.whole import (
    EVALUATION,
    STEPS,
    compare_restored,
    expected_evaluation,
    other_layout,
    rate_of,
    record_whole,
    whole_batches,
    whole_run,
)

Mutation = Callable[[], None]  # a fault of the tests; each rank calls it before it builds its engine
PROBE = OptimizerConfig(name=OptimizerName.sgd, lr=0.1, momentum=0.0)
# With bf16 weights an update does not show its gradient: the weight's rounding is larger. The momentum does.
PROBE_OF_BF16_STATES = replace(PROBE, momentum=0.5)


@dataclass(frozen=True)
class VerifyPass:
    """The result of training with one optimizer in one precision: all differences, and why it failed.

    `engine` names the layout that ran, and the engine and optimizers that its ranks built.
    """

    title: str
    differences: list[Difference]
    diagnosis: Diagnosis | None
    engine: str = ""

    @property
    def ok(self) -> bool:
        return all(difference.ok for difference in self.differences)

    @property
    def lost_a_rank(self) -> bool:
        """Whether a rank failed or hung, so that nothing could be compared."""
        return any(difference.kind == "rank" for difference in self.differences)


class PassPlan(NamedTuple):
    """A pass to run: its title, the run that it trains, and whether plain SGD replaces the optimizer."""

    title: str
    run: RunConfig
    plain_sgd: bool


def verify(
    small: RunConfig,
    *,
    run: RunConfig | None = None,
    more: Sequence[RunConfig | None] = (),
    mutation: Mutation | None = None,
) -> Iterator[VerifyPass]:
    """Yield the result of each pass of a shrunk run as soon as the pass ends; a lost rank ends all passes.

    `run` is the run before it was shrunk; if it is given, a pass of the whole run follows. `more` are the
    arguments of more_passes.

    The caller must have called prepare_deepspeed. Raises ConfigError, KeyboardInterrupt and Stopped.
    """
    plans = [*passes(small), *more_passes(*more)]
    calls: list[Callable[[], VerifyPass]] = [partial(run_pass, *plan, mutation) for plan in plans]
    if run is not None:
        calls.append(partial(whole_pass, whole_run(run, small), mutation))
    if small.model.dropout > 0.0:
        calls += [partial(dropout_pass, each, mutation, words) for each, words in _eager_and_compiled(small)]
    for call in calls:
        result = call()
        yield result
        if result.lost_a_rank:
            return


def passes(small: RunConfig) -> list[PassPlan]:
    """Return the passes of a shrunk run: first in fp32, then in bf16 if the run uses it.

    Plain SGD exposes every gradient and every error of scale, which Adam hides. The run's own optimizer
    exposes errors in optimizer states and updates. All passes have the ZeRO stage of the run in its own
    precision. A run with compiled blocks is verified eager first, where the output of every layer can be
    read. The last pass has all settings of the run: optimizer, precision, ZeRO stage, schedule, compilation.
    """
    small = copy.deepcopy(small)
    # In fp32 alone ZeRO-0 would stay ZeRO-0, which is another engine than that of the run in bf16.
    small.parallelism.zero_stage = effective_zero_stage(small)[0]
    own_precision = [small.precision] if small.precision.dtype is Dtype.bf16 else []
    plans = []
    for precision in (PrecisionConfig(Dtype.fp32), *own_precision):
        has_bf16_states = precision.states is StatesDtype.bf16
        probe = PROBE_OF_BF16_STATES if has_bf16_states else PROBE
        probe = replace(probe, gradient_clipping=small.optimizer.gradient_clipping)
        own = (small.optimizer.name.name, small.optimizer, False)
        words_of_precision = precision.dtype.name + (" states" if has_bf16_states else "")
        # In bf16 the momentum of the run's own optimizer shows the gradients too.
        needs_probe = precision.dtype is Dtype.fp32 or has_bf16_states or kept_momentum(own[1]) is None
        for title, optimizer, plain in [("plain SGD", probe, True)] * needs_probe + [own]:
            run = copy.deepcopy(small)
            run.precision, run.optimizer = copy.copy(precision), optimizer
            run.model.dropout = 0.0  # masks depend on the layout: see dropout_pass
            run.finetune.lora.dropout = 0.0
            plans += [
                PassPlan(f"{title}, {words_of_precision}{words}", each, plain)
                for each, words in _eager_and_compiled(run)
                if plain or not each.training.compile or precision is small.precision or not own_precision
            ]
    return plans


def more_passes(
    inner: RunConfig | None = None, long: RunConfig | None = None, *other_axes: RunConfig | None
) -> list[PassPlan]:
    """Return passes of other small runs: with inner pipeline stages, with long samples, on other axes."""
    plans = []
    if inner is not None:
        plans += [plan._replace(title=f"{plan.title}, inner stages") for plan in first_passes(inner)]
    if long is not None:
        words = f"{sequence_length(long)} positions"
        plans += [plan._replace(title=f"{plan.title}, {words}") for plan in first_passes(long)]
    for other in filter(None, other_axes):
        plan = passes(other)[0]
        plans.append(plan._replace(title=f"{plan.title}, {LayoutAxes.of(_layout(other))}"))
    return plans


def first_passes(run: RunConfig) -> list[PassPlan]:
    """Return the first eager pass in fp32, which shows every gradient, and that in the run's precision."""
    eager = [plan for plan in passes(run) if not plan.run.training.compile]
    return [*{plan.run.precision.dtype: plan for plan in reversed(eager)}.values()][::-1]


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
        if lost := _run_ranks(record_rank, run, layout, folder, mutation):
            return VerifyPass(title, *lost, layout.describe())
        engine = engine_of(layout, folder)
        trace = read_traces([folder / f"stage-{stage}" for stage in range(layout.pipeline)])
    expected, allowed = _reference(run, layout, trace, list(probe_batches(run)))
    if layout.compiled:
        leave_out_blocks(expected)
    applied_gradients(run, trace, plain_sgd=plain_sgd)
    differences = compare(run, trace, expected, allowed, plain_sgd=plain_sgd)
    failed = [difference for difference in differences if not difference.ok]
    diagnosis = diagnose(run, layout, failed, trace, expected) if failed else None
    return VerifyPass(title, differences, diagnosis, engine)


def whole_pass(run: RunConfig, mutation: Mutation | None = None) -> VerifyPass:
    """Train, evaluate and save a run that `whole_run` returned; restore it in another layout; compare all."""
    run = copy.deepcopy(run)
    run.model.dropout = run.finetune.lora.dropout = 0.0
    title = f"whole run, {run.optimizer.name.name}, {run.precision.dtype.name}"
    layout, other = _layout(run), other_layout(run)
    with scratch_directory() as folder:
        use_files(run, folder)
        other.data = run.data
        sources = write_files(run, folder)
        for each in (run, other):
            if lost := _run_ranks(record_whole, each, _layout(each), folder, mutation):
                return VerifyPass(title, *lost, _layout(each).describe())
            (folder / "store").unlink(missing_ok=True)
        engine = engine_of(layout, folder)
        trace = read_traces([folder / f"stage-{stage}" for stage in range(layout.pipeline)])
        restored, last = read_traces([folder / "after-0"])
        loss = json.loads((folder / EVALUATION).read_text())
        differences, expected = _compared_whole(run, layout, [*trace, last], sources, loss)
    differences += compare_restored(trace[-1], restored)
    differences.sort(key=lambda difference: difference.step)
    failed = [difference for difference in differences if not difference.ok]
    at_last = bool(failed) and failed[0].step > STEPS
    places = (other, _layout(other)) if at_last else (run, layout)
    diagnosis = diagnose(*places, failed, [*trace, last], expected) if failed else None
    return VerifyPass(title, differences, diagnosis, engine)


def _compared_whole(
    run: RunConfig, layout: Layout, trace: list[StepTrace], sources: dict[str, PlainSource], loss: float
) -> tuple[list[Difference], list[StepTrace]]:
    """Return the differences of all steps and of the evaluation, and the trace of the reference."""
    rates = [rate_of(run, number + 1) for number in range(len(trace) - 1)]
    expected, allowed = _reference(run, layout, trace, whole_batches(run, sources), rates)
    applied_gradients(run, trace, plain_sgd=False)
    differences = compare(run, trace, expected, allowed, plain_sgd=False)
    right = expected_evaluation(run, trace[STEPS], sources, arithmetic_of(run))
    measured = abs(loss - right) / right
    return [
        *differences,
        Difference(STEPS, "evaluation", "validation loss", measured, allowed[1].loss),
    ], expected


def _reference(
    run: RunConfig,
    layout: Layout,
    trace: list[StepTrace],
    batches: list[GlobalBatch],
    rates: list[float] | None = None,
) -> tuple[list[StepTrace], list[Tolerance]]:
    """Return the trace of the reference, which starts each step from that of `trace`, and bounds by step."""
    arithmetic = arithmetic_of(run)
    weights = perturbed(run, initial_weights(run))
    expected = reference_trace(run, weights, batches, trace, arithmetic, rates)
    if not arithmetic.is_rounded:
        return expected, [tolerance(run)] * len(expected)
    others = [
        reference_trace(run, weights, batches, trace, way, rates)[1:]
        for way in equivalent(arithmetic, layout)
    ]
    of_norms, of_losses = norm_distance(expected[1:], others), loss_distance(expected[1:], others)
    micro_batches = run.training.global_batch_size // run.training.micro_batch_size
    measured = [
        measured_tolerance(right, list(same), max(1.0, labels / micro_batches), of_norms, of_losses)
        for labels, right, *same in zip(map(count_labels, batches), expected[1:], *others, strict=True)
    ]
    return expected, [tolerance(run), *measured]


def engine_of(layout: Layout, folder: Path) -> str:
    """Return the layout in words, with the engine and optimizers that the ranks built."""
    return f"{layout.describe()}; {(folder / ENGINE).read_text()}"


def leave_out_blocks(trace: list[StepTrace]) -> None:
    """Drop the outputs inside blocks, which a compiled block does not show. Modifies `trace`."""
    for step in trace:
        step.outputs = {name: x for name, x in step.outputs.items() if not name.startswith("blocks.")}


def dropout_pass(small: RunConfig, mutation: Mutation | None = None, words: str = "") -> VerifyPass:
    """Take two steps with the run's dropout, and check the masks only."""
    run = copy.deepcopy(small)
    run.finetune.lora.dropout = 0.0
    layout, title = _layout(run), f"masks of dropout {run.model.dropout}, {run.precision.dtype.name}{words}"
    with scratch_directory() as folder:
        if lost := _run_ranks(record_dropout, run, layout, folder, mutation):
            return VerifyPass(title, *lost, layout.describe())
        engine = engine_of(layout, folder)
        draws = read_draws(folder / DRAWS)
        differences = compare_draws(run, layout, draws)
        differences.append(compare_next(draws, read_draws(folder / NEXT_DRAWS)))
    failed = [difference.name for difference in differences if not difference.ok]
    diagnosis = Diagnosis(failed[0], MEANINGS[failed[0]]) if failed else None
    return VerifyPass(title, differences, diagnosis, engine)


def _layout(run: RunConfig) -> Layout:
    p = run.parallelism
    assert p.data is not None
    ranks = p.pipeline * p.data * p.context * p.tensor  # checked against this machine when verify started
    return resolve_layout(run, World(run.hardware.device.name, ranks, ranks, fixed=True))


def _run_ranks(
    record: Callable[..., None], run: RunConfig, layout: Layout, folder: Path, mutation: Mutation | None
) -> tuple[list[Difference], Diagnosis] | None:
    """Run the ranks; return the verdict if a rank failed or hung.

    Raises ConfigError, KeyboardInterrupt and Stopped.
    """
    target = partial(_rank, record=record, run=run, layout=layout, folder=folder, mutation=mutation)
    # CUDA does not survive a fork; on CPU a forked rank starts with all modules already imported.
    start_method = start_method_for(layout.device)
    try:
        run_local_ranks(target, layout.world_size, log_dir=folder / "logs", start_method=start_method)
    except RankFailure as failure:
        diagnosis = diagnose_lost_rank(str(failure), _text(folder / HANG))
        return [Difference(0, "rank", f"rank {failure.rank} of {failure.world_size}", inf, 1.0)], diagnosis
    return None


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def _rank(
    rank: int, *, record: Callable[..., None], mutation: Mutation | None, layout: Layout, **arguments: Any
) -> None:
    prepare_deepspeed(layout.device)  # needed again in a spawned process
    if mutation is not None:
        mutation()
    record(rank, layout=layout, **arguments)
