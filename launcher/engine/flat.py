"""The engine without a pipeline: data and tensor parallelism, ZeRO-0 to 3."""

from itertools import chain

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.engine.base import Engine, MicroBatches, StepResult, to_inputs
from launcher.engine.ds_config import deepspeed_config
from launcher.engine.optimizer import build_optimizer
from launcher.models.blocks import BlockContext
from launcher.models.language import FlatModel, Layer, Loss
from launcher.parallel.mesh import ProcessMesh
from launcher.parallel.sharding import logical_of

CLIP_EPSILON = 1e-6  # DeepSpeed's and torch's own


class FlatEngine(Engine):
    """A DeepSpeed engine around one flat module."""

    def __init__(
        self,
        run: RunConfig,
        layout: Layout,
        mesh: ProcessMesh,
        layers: list[Layer],
        loss: Loss,
        context: BlockContext,
        device: torch.device,
    ) -> None:
        config = deepspeed_config(run, layout)
        with zero_init(config, mesh, enabled=layout.zero_stage == 3):
            model = FlatModel(layers, loss, context.documents)
        optimizer = build_optimizer(run.optimizer, model.parameters())
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=mesh, dist_init_required=False
        )
        super().__init__(model, optimizer, mesh, layout.zero_stage)
        self.device = device
        self.clip_at = run.optimizer.gradient_clipping

    def train_batch(self, batches: MicroBatches) -> StepResult:
        self.deepspeed.train()
        losses = []
        for batch in batches:
            loss = self.deepspeed(*to_inputs(batch, self.device))
            self.deepspeed.backward(loss)
            own_norm = self._clip() if self.zero_stage == 0 and self._at_boundary() else None
            self.deepspeed.step()
            losses.append(loss.detach())
        norm = self.deepspeed.get_global_grad_norm() if own_norm is None else own_norm
        return StepResult(self._mean_over_data(losses), float(norm))

    def eval_batch(self, batches: MicroBatches) -> float:
        self.deepspeed.eval()
        with torch.no_grad():
            return self._mean_over_data([self.deepspeed(*to_inputs(batch, self.device)) for batch in batches])

    def _at_boundary(self) -> bool:
        return bool(self.deepspeed.is_gradient_accumulation_boundary())

    def _mean_over_data(self, losses: list[Tensor]) -> float:
        mean = torch.stack(losses).float().mean()
        if self.mesh.data.size > 1:
            dist.all_reduce(mean, group=self.mesh.data.group)
            mean /= self.mesh.data.size
        return float(mean)

    def _clip(self) -> Tensor:
        """The global gradient norm under ZeRO-0, whose gradients are by now averaged over the data ranks."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = global_norm(parameters, self.mesh)
        if self.clip_at is not None:
            scale = (self.clip_at / (norm + CLIP_EPSILON)).clamp(max=1.0)
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(scale)
        return norm


def global_norm(parameters: list[nn.Parameter], mesh: ProcessMesh) -> Tensor:
    """The L2 norm of the logical gradients; those held by all tensor ranks count once. A scalar tensor.

    Collective over the tensor group: one all-reduce of a scalar.
    """
    split: list[Tensor] = []
    whole: list[Tensor] = []
    for parameter in parameters:
        assert parameter.grad is not None
        (split if logical_of(parameter).is_split else whole).append(parameter.grad)
    mine = split if mesh.tensor.rank else list(chain(split, whole))
    # fp64: a norm over a whole model adds up more terms than fp32 can keep apart.
    squares = torch.stack([torch.linalg.vector_norm(grad).double() ** 2 for grad in mine]).sum()
    if mesh.tensor.size > 1:
        dist.all_reduce(squares, group=mesh.tensor.group)
    return squares.sqrt().float()


def zero_init(config: dict, mesh: ProcessMesh, *, enabled: bool):  # type: ignore[no-untyped-def, type-arg]
    """ZeRO-3's context: each module's weights are partitioned as soon as it is built."""
    # Not `mpu=`: with it zero.Init partitions over the wrong ranks under tensor parallelism, silently.
    return deepspeed.zero.Init(
        data_parallel_group=mesh.data.group, config_dict_or_path=config, enabled=enabled
    )
