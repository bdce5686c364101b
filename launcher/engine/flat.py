"""The engine without a pipeline: data and tensor parallelism, ZeRO-0 to 3."""

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.engine.base import Engine, MicroBatches, StepResult, mean_over
from launcher.engine.ds_config import deepspeed_config
from launcher.engine.expert_groups import shared_experts
from launcher.engine.optimizer import build_optimizer
from launcher.engine.partitioned import PartitionedInit
from launcher.engine.update_guard import clip, norm_of_whole
from launcher.models.architecture import FlatModel, model_layers, model_loss
from launcher.models.arithmetic import gathers_whole_blocks
from launcher.models.block_context import BlockContext
from launcher.models.blocks import TransformerBlock
from launcher.parallel.mesh import ProcessMesh


class FlatEngine(Engine):
    def __init__(
        self, run: RunConfig, layout: Layout, mesh: ProcessMesh, context: BlockContext, device: torch.device
    ) -> None:
        layers, loss = model_layers(run.model, context), model_loss(run.model, context)
        config = deepspeed_config(run, layout)
        # Not `mpu=`: with it zero.Init partitions over the wrong ranks under tensor parallelism, silently.
        with PartitionedInit(
            data_parallel_group=mesh.data.group, config_dict_or_path=config, enabled=layout.zero_stage == 3
        ):
            model = FlatModel(layers, loss, context.documents)
        if layout.zero_stage == 3 and gathers_whole_blocks(run, layout):
            # A compiled body calls no module whose hook would gather the weights. The hooks of all modules
            # take 7% of a step on a CPU (docs/benchmarks.md).
            set_z3_leaf_modules(model, [TransformerBlock])
        optimizer = build_optimizer(run.optimizer, model.parameters(), run.precision.states)
        with shared_experts(mesh, model):
            deepspeed_engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, mpu=mesh, dist_init_required=False
            )
        super().__init__(deepspeed_engine, model, optimizer, layout, mesh, loss, context, device)
        self.clip_at = run.optimizer.gradient_clipping
        self._parameters = list(model.parameters())

    @property
    def loss_share(self) -> tuple[int, int]:
        return self.mesh.data.rank, self.mesh.data.size

    def train_batch(self, batches: MicroBatches, labels: int | None = None) -> StepResult:
        if not self.module.training:  # it visits every module
            self.deepspeed.train()
        self._count(labels)
        losses = []
        for batch in batches:
            loss = self.deepspeed(*self._to_device(batch))
            self.deepspeed.backward(loss)
            at_boundary = self.deepspeed.is_gradient_accumulation_boundary()
            if self.zero_stage == 0 and at_boundary:
                self._judge()
            self.deepspeed.step()
            losses.append(loss.detach())
        self._balance_experts()
        return StepResult(_mean(losses), self.guard.norm, self.guard.skipped, labels)

    def eval_batch(self, batches: MicroBatches, labels: int | None = None) -> Tensor:
        self.deepspeed.eval()
        self._count(labels)
        with torch.no_grad():
            losses = [self.deepspeed(*self._to_device(batch)) for batch in batches]
            return mean_over(_mean(losses), self.mesh.data)

    def _judge(self) -> None:
        """Clip the gradients under ZeRO-0, already averaged over the data ranks, and judge them."""
        self.guard.judge(global_norm(self._parameters, self.mesh))
        if self.clip_at is not None:
            clip(self.optimizer, self.guard.norm, self.clip_at)
        self.optimizer.found_inf = self.guard.skipped  # type: ignore[attr-defined]  # as GradScaler sets it


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).float().mean()


def global_norm(parameters: list[nn.Parameter], mesh: ProcessMesh) -> Tensor:
    """Return the L2 norm of the logical gradients. Collective: see norm_of_whole."""
    gradients = ((p, p.grad) for p in parameters if p.grad is not None)
    group = mesh.tensor.group if mesh.tensor.size > 1 else None
    return norm_of_whole(gradients, mesh, group, parameters[0].device)
