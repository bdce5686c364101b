"""Refine a hardware config from the step times of finished runs. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from launcher.config.layout import Layout
from launcher.config.schema import HardwareConfig, RunConfig
from launcher.planning.cost.run_plan import make_plan
from launcher.planning.cost.step_time import StepTime

# Bounds of one refinement. A run outside them was slow for a reason that no rate explains.
LEAST, MOST = 0.25, 4.0


@dataclass(frozen=True)
class FinishedRun:
    """A run with its layout and the median seconds of its steps."""

    name: str
    run: RunConfig
    layout: Layout
    seconds: float

    def planned(self, hardware: HardwareConfig) -> StepTime | None:
        """Return the planned time of its step with the rates of `hardware`; None without known rates."""
        ranks = self.run.hardware
        configured = replace(hardware, nodes=ranks.nodes, accelerators_per_node=ranks.accelerators_per_node)
        return make_plan(replace(self.run, hardware=configured), self.layout).time


def refined(hardware: HardwareConfig, runs: Sequence[FinishedRun]) -> HardwareConfig:
    """Return `hardware` with the scale of computation of the median run.

    Communication and the optimizer keep their rates; the pipeline's bubble grows with the computation.
    """
    scales = []
    for finished in runs:
        time = finished.planned(hardware)
        assert time is not None, "the caller checks that the rates are known"
        computing = time.compute + time.bubble
        scales.append((finished.seconds - (time.total - computing)) / computing)
    scale = min(MOST, max(LEAST, median(scales)))
    return replace(hardware, compute_scale=float(f"{hardware.compute_scale * scale:.4g}"))
