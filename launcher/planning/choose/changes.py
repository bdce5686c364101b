"""Find single changes of a run's settings that make the run fit, or make it faster. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from launcher.config import shape
from launcher.config.errors import ConfigError, as_typed
from launcher.config.layout import Layout
from launcher.config.schema import ActivationCheckpointing, PipelineSchedule, RunConfig
from launcher.config.validate import validate
from launcher.planning.cost.run_plan import Plan, make_plan

WORTH_SAYING = 0.02  # smallest share of the step's time to gain
WORTH_SAVING = 0.1  # smallest share of the peak memory to save
# Factors of the tensor and pipeline sizes to try, in this order.
AXIS_FACTORS = (
    (2, 1),
    (1, 2),
    (4, 1),
    (1, 4),
    (8, 1),
    (2, 2),
    (2, 4),
    (4, 2),
    (4, 4),
    (8, 8),
    (0.5, 1),
    (1, 0.5),
    (0.25, 1),
    (1, 0.25),
    (2, 0.5),
    (0.5, 2),
)
CONTEXT_FACTORS = (2, 4, 8, 0.5)
# Settings with which a command on a CPU may choose another number of data ranks.
MOVES_DATA = {
    "training.micro_batch_size", "parallelism.tensor", "parallelism.pipeline", "parallelism.context",
}  # fmt: skip
# Fewest tokens of a sequence per context rank: with fewer, the exchanges take longer than they save.
LEAST_TOKENS = 2048


@dataclass(frozen=True)
class Change:
    """Overrides to type, and the plan of the run with them."""

    settings: str
    plan: Plan


def helpful(plan: Plan, most: int = 3) -> list[Change]:
    """Return changes that make the run fit or, if it fits already, that make it faster; the best first.

    If the speed is not known, the order is that of `_settings`: the cheapest change first.
    """
    fitting = [change for change in single_changes(plan) if change.plan.fits]
    if plan.time is None:
        return [] if plan.fits else fitting[:most]
    by_time = sorted(fitting, key=lambda change: _seconds(change.plan))
    limit = _seconds(plan) * (1 - WORTH_SAYING) if plan.fits else float("inf")
    return [change for change in by_time if _seconds(change.plan) < limit][:most]


def smaller(plan: Plan, most: int = 3) -> list[Change]:
    """Return changes that reduce the peak memory per rank, the cheapest first."""
    limit = (1 - WORTH_SAVING) * plan.peak
    return [change for change in single_changes(plan) if change.plan.peak <= limit][:most]


def _seconds(plan: Plan) -> float:
    assert plan.time is not None
    return plan.time.total


def single_changes(plan: Plan) -> Iterator[Change]:
    """Yield each legal change of one setting or group of settings; ranks and batch stay."""
    seen = set()
    for settings in _settings(plan.run, plan.layout):
        run = changed(plan.run, settings)
        try:
            layout = validate(run, plan.world)
        except ConfigError:
            continue
        if _chooses_data(plan) and MOVES_DATA & settings.keys():
            settings["parallelism.data"] = layout.data
            run = changed(run, settings)
        typed = " ".join(f"{name}={as_typed(value)}" for name, value in settings.items())
        if typed not in seen:
            seen.add(typed)
            yield Change(typed, make_plan(run, layout, budget=plan.budget))


def _chooses_data(plan: Plan) -> bool:
    """Return whether a command, which starts the ranks of this machine, chooses the number of data ranks."""
    hardware, is_open = plan.run.hardware, plan.run.parallelism.data is None
    on_cores = plan.layout.device == "cpu" and hardware.nodes == 1 and hardware.accelerators_per_node is None
    return is_open and on_cores


def changed(run: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """Return a copy of `run` with these fields replaced; names have the form section.field."""
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, field = name.split(".")
        by_section.setdefault(section, {})[field] = value
    return replace(
        run, **{name: replace(getattr(run, name), **fields) for name, fields in by_section.items()}
    )


def _settings(run: RunConfig, layout: Layout) -> Iterator[dict[str, Any]]:
    """Yield settings to try, roughly from cheap to expensive."""
    p, micro = run.parallelism, run.training.micro_batch_size
    yield {"checkpoint.asynchronous": False}
    yield {"parallelism.zero_stage": 1}
    yield {"training.micro_batch_size": 2 * micro}
    yield {"training.micro_batch_size": micro // 2}
    yield {"training.micro_batch_size": 1}
    if not p.sequence_parallel:
        yield {"parallelism.sequence_parallel": True}
    for kind in ActivationCheckpointing:
        yield {"parallelism.activation_checkpointing": kind}
    yield {"parallelism.zero_stage": 2}
    for tensor, pipeline in AXIS_FACTORS:
        yield from _axes(run, layout, p.tensor * tensor, p.pipeline * pipeline)
    for context in CONTEXT_FACTORS:
        yield from _contexts(run, layout, int(p.context * context))
    if p.pipeline_schedule is not PipelineSchedule.dualpipev:
        yield {"parallelism.pipeline_schedule": PipelineSchedule.dualpipev}
    yield {"parallelism.zero_stage": 3}
    yield {"parallelism.offload_optimizer": True}
    offload = {"parallelism.offload_optimizer": True, "parallelism.offload_parameters": True}
    yield {"parallelism.zero_stage": 3, **offload}


def _axes(run: RunConfig, layout: Layout, tensor: float, pipeline: float) -> Iterator[dict[str, Any]]:
    p = run.parallelism
    if (
        tensor < 1
        or pipeline < 1
        or tensor % 1
        or pipeline % 1
        or layout.world_size % (tensor * pipeline * p.context)
    ):
        return
    axes: dict[str, Any] = {}
    if int(tensor) != p.tensor:
        axes["parallelism.tensor"] = int(tensor)
        if tensor == 1 and p.sequence_parallel:
            axes["parallelism.sequence_parallel"] = False
    if int(pipeline) != p.pipeline:
        axes["parallelism.pipeline"] = int(pipeline)
        if p.zero_stage > 1 and pipeline > 1:
            axes["parallelism.zero_stage"] = 1
    if p.data is not None:
        axes["parallelism.data"] = layout.world_size // int(tensor * pipeline * p.context)
    if axes:
        yield axes


def _contexts(run: RunConfig, layout: Layout, context: int) -> Iterator[dict[str, Any]]:
    """Yield other numbers of context ranks with enough tokens each; the number of data ranks changes too."""
    p, others = run.parallelism, layout.tensor * layout.pipeline
    enough = context <= p.context or shape.sequence_length(run) // max(1, context) >= LEAST_TOKENS
    if context < 1 or not enough or layout.world_size % (others * context):
        return
    axes: dict[str, Any] = {"parallelism.context": context}
    if p.data is not None:
        axes["parallelism.data"] = layout.world_size // (others * context)
    yield axes
