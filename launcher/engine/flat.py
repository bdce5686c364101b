"""The engine without a pipeline: data and tensor parallelism, ZeRO-0 to 3."""

from itertools import chain

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.engine.base import Engine, MicroBatches, StepResult, mean_over, to_inputs
from launcher.engine.ds_config import deepspeed_config
from launcher.engine.optimizer import build_optimizer
from launcher.models.architecture import FlatModel, model_layers, model_loss
from launcher.models.context import BlockContext
from launcher.parallel.mesh import ProcessMesh
from launcher.parallel.sharding import logical_of

CLIP_EPSILON = 1e-6  # the same as in DeepSpeed and torch


class FlatEngine(Engine):
    def __init__(
        self, run: RunConfig, layout: Layout, mesh: ProcessMesh, context: BlockContext, device: torch.device
    ) -> None:
        layers, loss = model_layers(run.model, context), model_loss(run.model, context)
        config = deepspeed_config(run, layout)
        with zero_init(config, mesh, enabled=layout.zero_stage == 3):
            model = FlatModel(layers, loss, context.documents)
        optimizer = build_optimizer(run.optimizer, model.parameters())
        deepspeed_engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=mesh, dist_init_required=False
        )
        super().__init__(deepspeed_engine, model, optimizer, layout, mesh, loss, context.random, device)
        self.clip_at = run.optimizer.gradient_clipping

    @property
    def loss_share(self) -> tuple[int, int]:
        return self.mesh.data.rank, self.mesh.data.size

    def train_batch(self, batches: MicroBatches) -> StepResult:
        self.deepspeed.train()
        losses = []
        for batch in batches:
            loss = self.deepspeed(*to_inputs(batch, self.device))
            self.deepspeed.backward(loss)
            at_boundary = self.deepspeed.is_gradient_accumulation_boundary()
            clipped_norm = self._clip() if self.zero_stage == 0 and at_boundary else None
            self.deepspeed.step()
            losses.append(loss.detach())
        norm = self.deepspeed.get_global_grad_norm() if clipped_norm is None else clipped_norm
        return StepResult(_mean(losses), norm)

    def eval_batch(self, batches: MicroBatches) -> Tensor:
        self.deepspeed.eval()
        with torch.no_grad():
            losses = [self.deepspeed(*to_inputs(batch, self.device)) for batch in batches]
            return mean_over(_mean(losses), self.mesh.data)

    def _clip(self) -> Tensor:
        """Clip the gradients under ZeRO-0, already averaged over the data ranks; return their global norm."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = global_norm(parameters, self.mesh)
        if self.clip_at is not None:
            scale = (self.clip_at / (norm + CLIP_EPSILON)).clamp(max=1.0)
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(scale)
        return norm


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).float().mean()


def global_norm(parameters: list[nn.Parameter], mesh: ProcessMesh) -> Tensor:
    """Return the L2 norm of the logical gradients. Collective: one all-reduce of a scalar (tensor group)."""
    split: list[Tensor] = []
    whole: list[Tensor] = []
    for parameter in parameters:
        assert parameter.grad is not None
        (split if logical_of(parameter).is_split else whole).append(parameter.grad)
    counted = split if mesh.tensor.rank else list(chain(split, whole))
    # fp64: a norm over a whole model adds up more terms than fp32 can keep apart.
    squares = torch.stack([torch.linalg.vector_norm(grad).double() ** 2 for grad in counted]).sum()
    if mesh.tensor.size > 1:
        dist.all_reduce(squares, group=mesh.tensor.group)
    return squares.sqrt().float()


def zero_init(config: dict, mesh: ProcessMesh, *, enabled: bool):  # type: ignore[no-untyped-def, type-arg]
    """Return the context in which ZeRO-3 partitions each module's weights as soon as it is built."""
    # Not `mpu=`: with it zero.Init partitions over the wrong ranks under tensor parallelism, silently.
    group = mesh.data.group
    return deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=config, enabled=enabled)
