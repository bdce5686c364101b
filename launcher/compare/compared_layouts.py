"""The layouts that are compared: by name, for any number of ranks. Pure."""

import difflib
from dataclasses import dataclass, replace

from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import HardwareConfig, ParallelismConfig, RunConfig
from launcher.config.world import World
from launcher.planning.cost.plan import Plan

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


def in_layout(run: RunConfig, sizes: Sizes, world: World) -> RunConfig:
    """Return the run in that layout, on ranks that each compute on one core and save nothing."""
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
    hardware = _with_a_core_each(run.hardware, world) if world.device == "cpu" else run.hardware
    return replace(run, parallelism=parallelism, hardware=hardware, checkpoint=unsaved)


def _with_a_core_each(hardware: HardwareConfig, world: World) -> HardwareConfig:
    """Rates as they were measured of ranks with one core each, for one rank too."""
    measured = [rates for rates in hardware.measured if rates.ranks >= world.ranks]
    return replace(hardware, measured=measured or hardware.measured)
