"""Builds the engine of a run: with a pipeline, or flat."""

import io
from contextlib import redirect_stdout

import torch

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.shape import has_lora
from launcher.engine.base import Engine
from launcher.engine.distributed import set_timeouts
from launcher.engine.flat import FlatEngine
from launcher.engine.pipeline import PipelineEngine
from launcher.models.block_context import BlockContext
from launcher.parallel.dtypes import TORCH_DTYPES
from launcher.parallel.initializer import Initializer
from launcher.parallel.mesh import MeshShape, ProcessMesh


def build_engine(
    run: RunConfig, layout: Layout, device: torch.device, *, drawn: bool = True, strict: bool = False
) -> Engine:
    """Return the engine of a run, with zeros for weights unless `drawn`. Collective over the world.

    With `strict` an error of the compiler is raised; else blocks then run eager. Call it once per process.
    """
    mesh = ProcessMesh.create(MeshShape.of(layout))
    initializer = Initializer(
        run.training.seed,
        mesh.tensor,
        TORCH_DTYPES[run.precision.dtype],
        device,
        drawn=drawn,
        frozen=has_lora(run),
        draws_adapters=has_lora(run),
        partitioned=layout.zero_stage == 3,
    )
    context = BlockContext.create(
        run,
        mesh,
        initializer,
        compiled=layout.compiled,
        strict=strict,
        micro_batches=layout.accumulation,
    )
    engine_type = PipelineEngine if layout.pipeline > 1 else FlatEngine
    # DeepSpeed prints memory tables and settings that the launcher does not use.
    with redirect_stdout(io.StringIO()):
        engine = engine_type(run, layout, mesh, context, device)
    set_timeouts(run.launch.timeout_minutes)
    return engine
