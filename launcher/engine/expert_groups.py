"""Tell DeepSpeed which ranks hold the same experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import deepspeed.runtime.engine
from deepspeed.utils import groups

from launcher.models.experts import Experts
from launcher.parallel.initializer import EXPERTS
from launcher.parallel.mesh import ProcessMesh


@contextmanager
def shared_experts(mesh: ProcessMesh) -> Iterator[None]:
    """Context manager in which deepspeed.initialize treats our experts as its own.

    DeepSpeed reduces the gradients of parameters with `allreduce=False` over the ranks that hold the same
    experts, divided by all data ranks, only if a module of the model is of its class MoE; otherwise it
    averages different experts, silently (DeepSpeed 0.19.8, engine.py, _configure_distributed_model).
    """
    if mesh.expert.size == 1:
        yield
        return
    groups._EXPERT_PARALLEL_GROUP[EXPERTS] = mesh.expert.group
    groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = mesh.holders_of_experts.group
    with patch.object(deepspeed.runtime.engine, "MoE", Experts):
        yield
