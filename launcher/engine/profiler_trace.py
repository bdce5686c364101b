"""Record steps of this rank with torch's profiler. engine/trace_parts.py reads the trace."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.engine.base import Engine
from launcher.engine.measuring import group_names
from launcher.engine.stopwatch import Stopwatch
from launcher.engine.trace_parts import COLLECTIVE, GROUPS, OPTIMIZER, STEP, collective_name
from launcher.files import replacing


class ProfilerTrace:
    """A trace of consecutive steps, between `start` and `stop`. Nothing is changed or recorded outside."""

    def __init__(self, engine: Engine, collectives: Stopwatch) -> None:
        self._engine, self._collectives = engine, collectives
        assert dist.group.WORLD is not None
        self._names = {dist.group.WORLD.group_name: "world", **group_names(engine)}
        self._model_step: Callable[..., Any] = engine.deepspeed._take_model_step
        activities = [ProfilerActivity.CPU]
        if engine.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its messages would go to the terminal
        self._profile = profile(activities=activities)

    def start(self) -> None:
        # Preparing starts the tracing of the device, which takes a second; the first step must not.
        self._profile.prepare_trace()
        self._synchronise()
        self._profile.start_trace()
        self._profile.add_metadata_json(GROUPS, json.dumps(self._names))
        self._collectives.label = self._label
        self._engine.deepspeed._take_model_step = self._optimizer_step

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record the step; on a GPU wait for its end, so that its kernels belong to it."""
        with record_function(f"{STEP}{number}"):
            yield
            self._synchronise()

    def stop(self) -> None:
        self._engine.deepspeed._take_model_step = self._model_step
        self._collectives.label = None
        self._profile.stop_trace()

    def write(self, path: Path) -> None:
        """Write the trace as Chrome's JSON. Call it once, after `stop`. Raises OSError."""
        with replacing(path) as aside:
            self._profile.export_chrome_trace(str(aside))

    def _label(self, name: str, group: dist.ProcessGroup | None) -> str:
        group = group or dist.group.WORLD
        assert group is not None
        return f"{COLLECTIVE}{collective_name(name, self._names.get(group.group_name))}"

    def _optimizer_step(self, *arguments: Any, **options: Any) -> Any:
        with record_function(OPTIMIZER):
            return self._model_step(*arguments, **options)

    def _synchronise(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
