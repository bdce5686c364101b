"""Measure a rank: peak memory of its tensors, collectives by group, and seconds by part of a step.

Only this module knows which functions and groups of DeepSpeed must be measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config.layout import STEP_PARTS, GroupName
from launcher.engine.allocations import Allocations, CollectiveCall
from launcher.engine.base import Engine
from launcher.engine.stopwatch import Stopwatch

NOISE = 64  # bytes: norms, flags and losses are reduced too


class RankMeasurement:
    """Use in order: enter `timing_collectives`, join, build the engine, `name_groups`, enter `tensors`."""

    def __init__(self) -> None:
        self._names: dict[str, GroupName] = {}
        self._stopwatch = Stopwatch(self._group_waited_for)
        self.timing_collectives = self._stopwatch.timing_collectives
        self.restart_clock = self._stopwatch.restart
        self.tensors = Allocations(lambda group: self._names.get(group.group_name), waits=True)

    @contextmanager
    def timing_optimizer(self, engine: Engine) -> Iterator[None]:
        """Count the time of DeepSpeed's optimizer step, without its collectives, as `optimizer`."""
        step = engine.deepspeed._take_model_step
        engine.deepspeed._take_model_step = self._stopwatch.timed("optimizer", step)
        try:
            yield
        finally:
            engine.deepspeed._take_model_step = step

    def name_groups(self, engine: Engine) -> None:
        self._names = group_names(engine)

    def seconds(self, elapsed: float) -> dict[str, float]:
        """Return `elapsed` seconds since restart_clock by part; computation is the time not waited."""
        waits = {part: self._stopwatch.seconds.get(part, 0.0) for part in STEP_PARTS if part != "compute"}
        return {"compute": elapsed - sum(waits.values()), **waits}

    def collectives(self) -> dict[CollectiveCall, int]:
        """Return how often each collective was called since tensors.restart, very small ones left out."""
        calls: dict[CollectiveCall, int] = {}
        for call, times in self.tensors.collectives.items():
            if call.size > NOISE:
                # The gradient of a tied weight is reduced between two ranks: each sends the full gradient.
                sent = call._replace(kind="send") if call.group == "pipeline" else call
                calls[sent] = calls.get(sent, 0) + times
        return calls

    def _group_waited_for(self, group: dist.ProcessGroup | None) -> GroupName:
        name = self._names.get(group.group_name) if group is not None else None
        # Without a group it is the whole world: a pipeline's sends, or a number that all ranks agree on.
        return name or ("pipeline" if "pipeline" in self._names.values() else "data")


class PeakMemory:
    """Peak bytes of this process's tensors while entered, in `size` after that.

    On CPU every tensor is counted, which slows the steps inside; on a GPU `size` is what torch's allocator
    reports since the process started.
    """

    def __init__(self, device: torch.device) -> None:
        self.size = 0
        self.excluded: list[Tensor] = []  # tensors that do not count, set before the context is entered
        self._device = device
        self._allocations: Allocations | None = None

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cpu":
            self._allocations = Allocations()
            self._allocations.count_existing(self.excluded)
            self.excluded = []
            self._allocations.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._allocations is None:
            self.size = torch.cuda.max_memory_allocated(self._device)
            return
        self._allocations.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self.size = self._allocations.peak
        self._allocations = None  # holds weak references to every storage


def group_names(engine: Engine) -> dict[str, GroupName]:
    """Return the name of the axis by torch's group name, for our groups and DeepSpeed's."""
    names: dict[str, GroupName] = {}
    grid = getattr(engine.deepspeed, "grid", None)
    if grid is not None:
        assert dist.group.WORLD is not None
        names[dist.group.WORLD.group_name] = "pipeline"  # stages send to each other over the world group
        names[grid.get_data_parallel_group().group_name] = "data"
        for tied in engine.module.tied_comms.values():  # type: ignore[operator]
            if len(tied["ranks"]) > 1:  # under DualPipeV both ends are on one rank
                names[tied["group"].group_name] = "pipeline"
    tensor, data, context = engine.mesh.tensor.group, engine.mesh.data.group, engine.mesh.context.group
    assert tensor is not None
    assert data is not None
    if context is not None:
        names[context.group_name] = "context"
    names |= {tensor.group_name: "tensor", data.group_name: "data"}
    if engine.mesh.expert.size > 1:
        assert engine.mesh.expert.group is not None
        holders = engine.mesh.holders_of_experts.group
        assert holders is not None
        names |= {engine.mesh.expert.group.group_name: "expert", holders.group_name: "expert_data"}
    return names
