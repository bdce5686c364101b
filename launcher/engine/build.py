"""Builds the engine of a run: with a pipeline, or flat."""

import io
from contextlib import redirect_stdout

import torch

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.engine.base import Engine
from launcher.engine.distributed import set_timeouts
from launcher.engine.flat import FlatEngine
from launcher.engine.pipeline import PipelineEngine
from launcher.models.context import BlockContext
from launcher.parallel.mesh import MeshShape, ProcessMesh


def build_engine(run: RunConfig, layout: Layout, device: torch.device) -> Engine:
    """Return the engine of a run. Collective over the world; call it once per process."""
    mesh = ProcessMesh.create(MeshShape(layout.pipeline, layout.data, layout.tensor))
    context = BlockContext.create(run, mesh, device)
    engine_type = PipelineEngine if layout.pipeline > 1 else FlatEngine
    # DeepSpeed prints memory tables and settings that the launcher does not use.
    with redirect_stdout(io.StringIO()):
        engine = engine_type(run, layout, mesh, context, device)
    set_timeouts(run.launch.timeout_minutes)
    return engine
