"""The layouts that are compared: by name, for any number of ranks. Pure."""

import difflib
from dataclasses import dataclass, replace

from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import HardwareConfig, ParallelismConfig, RunConfig
from launcher.config.validate import validate
from launcher.planning.choose.enforce import refuse_too_large
from launcher.planning.cost.plan import Plan, make_plan, memory_budget

Sizes = dict[str, int]


def named_layouts(ranks: int) -> dict[str, Sizes]:
    """Each by its name: what of the parallelism group it sets."""
    half = ranks // 2
    found: dict[str, Sizes] = {
        "single": {},
        "dp": {"data": ranks},
        "tp": {"tensor": ranks},
        "pp": {"pipeline": ranks},
        **{f"zero{stage}": {"data": ranks, "zero_stage": stage} for stage in (1, 2, 3)},
    }
    if ranks % 2 == 0 and half > 1:
        found |= {
            "dp_tp": {"data": half, "tensor": 2},
            "dp_pp": {"data": half, "pipeline": 2},
            "tp_pp": {"tensor": 2, "pipeline": half},
        }
    if ranks % 4 == 0 and ranks > 4:
        found["dp_tp_pp"] = {"data": ranks // 4, "tensor": 2, "pipeline": 2}
    return found


@dataclass(frozen=True)
class Compared:
    """One layout to compare; `refused` says why it is not trained."""

    name: str
    run: RunConfig
    layout: Layout | None
    plan: Plan | None
    refused: str = ""


def chosen_layouts(names: list[str], ranks: int) -> dict[str, Sizes]:
    """Those that were asked for; without any, all. Raises ConfigError for a name that there is not."""
    known = named_layouts(ranks)
    for name in names:
        if name not in known:
            why = f"with compare.ranks={ranks} there are {', '.join(known)}"
            close = difflib.get_close_matches(name, known, n=1) or ["single", "dp"]
            raise ConfigError("compare.layouts", name, why, f"compare.layouts=[{','.join(close)}]")
    return {name: known[name] for name in names or known}


def in_layout(
    run: RunConfig, name: str, sizes: Sizes, *, gpus: int, cores: int, memory: int | None
) -> Compared:
    """The run in that layout, planned: on ranks that each compute on one core. Raises nothing."""
    kept = run.parallelism
    parallelism = ParallelismConfig(
        data=sizes.get("data", 1),
        tensor=sizes.get("tensor", 1),
        pipeline=sizes.get("pipeline", 1),
        zero_stage=sizes.get("zero_stage", 0),
        sequence_parallel=kept.sequence_parallel and sizes.get("tensor", 1) > 1,
        activation_checkpointing=kept.activation_checkpointing,
    )
    unsaved = replace(run.checkpoint, enabled=False)
    one = replace(run, parallelism=parallelism, hardware=_with_a_core_each(run, cores), checkpoint=unsaved)
    try:
        layout = validate(one, gpus=gpus, cores=cores)
    except ConfigError as error:
        return Compared(name, one, None, None, f"{error.field}={error.value}: {error.why}")
    budget = memory_budget(one, max(sizes.values(), default=1), memory)
    plan = make_plan(one, layout, budget=budget)
    try:
        refuse_too_large(one, layout, budget)
    except ConfigError as error:
        return Compared(name, one, layout, plan, error.why)
    return Compared(name, one, layout, plan)


def _with_a_core_each(run: RunConfig, cores: int) -> HardwareConfig:
    """Rates as they were measured of ranks with one core each, for one rank too."""
    measured = [one for one in run.hardware.measured if one.ranks >= cores]
    return replace(run.hardware, measured=measured or run.hardware.measured)
