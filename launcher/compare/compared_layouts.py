"""Named layouts for any number of ranks, and the run planned in each of them. Pure."""

import difflib
from dataclasses import dataclass, replace
from math import gcd

from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import ParallelismConfig, RunConfig
from launcher.config.world import World
from launcher.planning.cost.run_plan import Plan

AxisSizes = dict[str, int]  # fields of the parallelism group; a missing one has its value of _SINGLE

_SINGLE: AxisSizes = {"data": 1, "context": 1, "tensor": 1, "pipeline": 1, "expert": 1, "zero_stage": 0}
FIELDS_OF_LAYOUTS = tuple(f"parallelism.{name}" for name in _SINGLE)


def named_layouts(ranks: int, experts: int = 0) -> dict[str, AxisSizes]:
    """Return the fields that each named layout sets, for this number of ranks and of experts of a layer."""
    half = ranks // 2
    layouts: dict[str, AxisSizes]
    layouts = {"single": {}, "dp": {"data": ranks}, "tp": {"tensor": ranks}, "pp": {"pipeline": ranks}}
    layouts["cp"] = {"context": ranks}
    layouts |= {f"zero{stage}": {"data": ranks, "zero_stage": stage} for stage in (1, 2, 3)}
    if ranks % 2 == 0 and half > 1:
        layouts |= {"dp_tp": {"data": half, "tensor": 2}, "dp_pp": {"data": half, "pipeline": 2}}
        layouts["tp_pp"] = {"tensor": 2, "pipeline": half}
    if ranks % 4 == 0 and ranks > 4:
        layouts["dp_tp_pp"] = {"data": ranks // 4, "tensor": 2, "pipeline": 2}
    if (shared := gcd(ranks, experts)) > 1 and experts:
        layouts["ep"] = {"data": ranks, "expert": shared}
    return layouts


@dataclass(frozen=True)
class ComparedLayout:
    """A layout to compare and its plan; `error` is the reason why it is not trained."""

    name: str
    run: RunConfig
    layout: Layout | None
    plan: Plan | None
    error: ConfigError | None = None

    @property
    def refused(self) -> str:
        """Return why the layout is not trained; empty if it is."""
        if self.error is None:
            return ""
        is_too_large = self.plan is not None  # whatever setting would need less memory
        setting = "" if is_too_large else f"{self.error.field}={self.error.value}: "
        return f"{setting}{self.error.why}"


def chosen_layouts(names: list[str], ranks: int, experts: int = 0) -> dict[str, AxisSizes]:
    """Return the layouts with these names, or all without names. Raises ConfigError for an unknown name."""
    known = named_layouts(ranks, experts)
    for name in names:
        if name not in known:
            why = f"unknown layout; with compare.ranks={ranks} there are: {', '.join(known)}"
            close = difflib.get_close_matches(name, known, n=1) or ["single", "dp"]
            raise ConfigError("compare.layouts", name, why, f"compare.layouts=[{','.join(close)}]")
    return {name: known[name] for name in names or known}


def in_layout(run: RunConfig, sizes: AxisSizes, world: World) -> RunConfig:
    """Return the run in that layout, on ranks that each compute on one core and save nothing.

    Sequence parallelism and the schedule of a pipeline are kept in the layouts that have the axis; all other
    options of the parallelism group are kept in each layout.
    """
    hardware = run.hardware
    parallelism = replace(run.parallelism, **{**_SINGLE, **sizes})  # type: ignore[arg-type]
    if parallelism.tensor == 1:
        parallelism = replace(parallelism, sequence_parallel=False)
    if parallelism.pipeline == 1:
        parallelism = replace(parallelism, pipeline_schedule=ParallelismConfig.pipeline_schedule)
    if world.device == "cpu":
        # Only the rates of ranks that had one core each, also for a single rank.
        measured = [rates for rates in hardware.measured if rates.ranks >= world.ranks]
        hardware = replace(hardware, measured=measured or hardware.measured)
    unsaved = replace(run.checkpoint, enabled=False)
    return replace(run, parallelism=parallelism, hardware=hardware, checkpoint=unsaved)
