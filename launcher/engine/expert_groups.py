"""Tell DeepSpeed which ranks hold the same experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import deepspeed.runtime.engine
from deepspeed.utils import groups
from torch import nn

from launcher.engine.optimizer import is_trained
from launcher.models.experts import Experts
from launcher.parallel.initializer import EXPERTS
from launcher.parallel.mesh import ProcessMesh
from launcher.parallel.sharding import logical_of


@contextmanager
def shared_experts(mesh: ProcessMesh, model: nn.Module) -> Iterator[None]:
    """Context manager in which deepspeed.initialize treats our experts as its own.

    DeepSpeed reduces the gradients of parameters with `allreduce=False` over the ranks that hold the same
    experts, divided by all data ranks, only if a module of the model is of its class MoE; otherwise it
    averages different experts, silently (DeepSpeed 0.19.8, engine.py, _configure_distributed_model).
    If all experts are frozen (LoRA), their groups are enough: by them DeepSpeed broadcasts each expert among
    the ranks that hold it. With a module of its class MoE, ZeRO-1 and 2 demand a parameter group of experts.
    """
    if mesh.expert.size == 1:
        yield
        return
    groups._EXPERT_PARALLEL_GROUP[EXPERTS] = mesh.expert.group
    groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = mesh.holders_of_experts.group
    if not any(logical_of(weight).is_part and is_trained(weight) for weight in model.parameters()):
        yield
        return
    with patch.object(deepspeed.runtime.engine, "MoE", Experts):
        yield
