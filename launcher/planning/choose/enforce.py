"""Choose the layout of `parallelism=auto`, and refuse a run that does not fit into memory. Pure."""

from dataclasses import fields

from launcher.config.errors import ConfigError, as_typed, value_of
from launcher.config.schema import ParallelismConfig, RunConfig
from launcher.config.world import World
from launcher.planning.choose.changes import changed, helpful
from launcher.planning.choose.limits import settings_in_words
from launcher.planning.choose.search import Candidate, Search, freed, peaks, search, smallest
from launcher.planning.cost.geometry import pipeline_ranks
from launcher.planning.cost.run_plan import Plan
from launcher.text import size

NO_CHECK = "plan.enforce=false (no check)"
SMALLER = "a smaller model, more ranks, hardware with more memory"


def chosen(run: RunConfig, world: World) -> tuple[RunConfig, Search]:
    """Return the run in the layout that `parallelism=auto` chooses, and the search.

    Raises ConfigError if no layout fits; with plan.enforce=false the layout that comes closest is chosen.
    """
    result = search(run, world)
    if result.fitting:
        return result.fitting[0].run, result
    closest = smallest(result.candidates)
    if not run.plan.enforce:
        return closest.run, result
    raise _too_large(run, result, closest)


def _too_large(run: RunConfig, result: Search, closest: Candidate) -> ConfigError:
    if closest.fits_device and closest.host_budget is not None:
        why = (
            f"none of {len(result.candidates)} layouts on {result.world.ranks} ranks fits; the smallest "
            f"needs {size(closest.host)} of host memory per rank, and {size(closest.host_budget)} exist"
        )
        at_once = ["checkpoint.asynchronous=false"] if _fits_without_copies(closest) else []
        return ConfigError("parallelism.auto", True, why, " or ".join([*at_once, SMALLER, NO_CHECK]))
    assert closest.budget is not None
    why = (
        f"none of {len(result.candidates)} layouts on {result.world.ranks} ranks fits; the smallest needs "
        f"{size(closest.peak)} per rank, and {size(closest.budget)} are available "
        f"({closest.layout.describe()}, {settings_in_words(closest.run)})"
    )
    remedy = f"{SMALLER}, a shorter data.sequence_length or {NO_CHECK}"
    return ConfigError("parallelism.auto", True, why, remedy)


def _fits_without_copies(candidate: Candidate) -> bool:
    """Return whether the host has enough memory if checkpoints are written while training waits."""
    run = changed(candidate.run, {"checkpoint.asynchronous": False})
    _, host = peaks(run, candidate.layout, pipeline_ranks(run, candidate.layout))
    return candidate.host_budget is not None and host <= candidate.host_budget


def refuse_too_large(plan: Plan) -> None:
    """Raise ConfigError if the plan needs more memory than a rank has, unless plan.enforce=false."""
    if plan.fits or not plan.run.plan.enforce:
        return
    if not plan.shortages:
        raise _too_large_for_host(plan)
    remedies = [change.settings for change in helpful(plan, most=2)] or _elsewhere(plan) or [SMALLER]
    value, remedy = plan.run.hardware.memory_bytes, " or ".join([*remedies, NO_CHECK])
    if value is None:
        raise ConfigError("model", None, _shortage(plan), remedy)
    raise ConfigError("hardware.memory_bytes", f"{value:g}", _shortage(plan), remedy)


def _too_large_for_host(plan: Plan) -> ConfigError:
    assert plan.host_budget is not None
    remedies = [change.settings for change in helpful(plan, most=2)] or _elsewhere(plan) or [SMALLER]
    why = (
        f"each rank needs {size(plan.host)} of its node's memory ({size(plan.host - plan.host_budget)} too "
        f"much), for offloaded states and copies of checkpoints, but has {size(plan.host_budget)}"
    )
    typed = f"{plan.run.hardware.host_memory_bytes:g}"
    return ConfigError("hardware.host_memory_bytes", typed, why, " or ".join([*remedies, NO_CHECK]))


def _shortage(plan: Plan) -> str:
    assert plan.budget is not None
    is_set = plan.run.hardware.memory_bytes is not None
    has = f"{'each rank has' if is_set else 'each rank of this machine has'} {size(plan.budget)}"
    missing = [
        f"stage {stage} needs {size(plan.stages[stage].memory.total)} ({size(short)} too much)"
        for stage, short in plan.shortages.items()
    ]
    shown = missing if len(missing) <= 4 else [*missing[:3], f"and {len(missing) - 3} more stages"]
    fullest = plan.stages[max(plan.shortages, key=lambda stage: plan.shortages[stage])].memory
    return f"{', '.join(shown)}, but {has}; the peak is during the {fullest.moment}"


def _elsewhere(plan: Plan) -> list[str]:
    """Return the settings of the fastest layout on the same ranks that fits, when no single change does."""
    try:
        fitting = search(freed(plan.run), plan.world, budget=plan.budget).fitting
    except ConfigError:
        return []
    if not fitting:
        return []
    # Also the fields that the search leaves at their defaults, which the user may have typed.
    layout_fields = (f"parallelism.{field.name}" for field in fields(ParallelismConfig))
    values = {
        name: value_of(fitting[0].run, name) for name in dict.fromkeys((*fitting[0].settings, *layout_fields))
    }
    changes = [(name, value) for name, value in values.items() if value_of(plan.run, name) != value]
    return [" ".join(f"{name}={as_typed(value)}" for name, value in changes)]
