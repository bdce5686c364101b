"""The engine with a pipeline: DeepSpeed's 1F1B or DualPipeV schedule over stages of the same layers."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.engine.base import Engine, MicroBatches, StepResult
from launcher.engine.ds_config import deepspeed_config
from launcher.engine.expert_groups import shared_experts
from launcher.engine.optimizer import build_optimizer, is_trained
from launcher.models.architecture import Layer, model_layers, model_loss
from launcher.models.block_context import BlockContext
from launcher.models.blocks import TransformerBlock
from launcher.parallel.mesh import ProcessMesh


class PipelineEngine(Engine):
    """A DeepSpeed pipeline engine; this rank holds one stage, or two under DualPipeV."""

    loss_name = "loss_fn"  # as DeepSpeed's PipelineModule calls it

    def __init__(
        self, run: RunConfig, layout: Layout, mesh: ProcessMesh, context: BlockContext, device: torch.device
    ) -> None:
        layers, loss = model_layers(run.model, context), model_loss(run.model, context)
        topology = PipeModelDataParallelTopology(
            num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.gradient_ranks
        )
        module = (StagedModule if layout.stages_per_rank == 1 else DualStagedModule)(
            layers=[_spec(layer) for layer in layers],
            topology=topology,
            loss_fn=loss,
            # Every stage gets the same number of blocks, or some stages one more; the first also gets the
            # embedding, the last the final norm and the head.
            partition_method=f"type:{TransformerBlock.__name__}",
        )
        # DeepSpeed builds only the layers of this rank's stages.
        for head in (built for built in module.modules() if type(built) is layers[-1].module):
            loss.head = head
        optimizer = build_optimizer(run.optimizer, module.parameters(), run.precision.states)
        with shared_experts(mesh, module):
            deepspeed_engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_config(run, layout),
                dist_init_required=False,
            )
        super().__init__(deepspeed_engine, module, optimizer, layout, mesh, loss, context, device)
        self.micro_batches, self.documents = layout.accumulation, context.documents
        # The tokens of the micro-batches by phase: a rank runs one phase, or two under DualPipeV.
        self._tokens: list[Iterator[Tensor]] = []
        if self.documents.end_of_document is not None:
            module.register_forward_pre_hook(self._begin)

    @property
    def reads_data(self) -> bool:
        ends = self.mesh.stage in (0, self.mesh.shape.pipeline - 1)
        return ends or self.documents.end_of_document is not None

    @property
    def loss_share(self) -> tuple[int, int]:
        return 0, 1  # DeepSpeed averages the loss over the data ranks and sends it to every stage

    def train_batch(self, batches: MicroBatches, labels: int | None = None) -> StepResult:
        self._count(labels)
        loss = self.deepspeed.train_batch(self._inputs(batches))
        self._balance_experts()
        return StepResult(loss, self.guard.norm, self.guard.skipped, labels)

    def eval_batch(self, batches: MicroBatches, labels: int | None = None) -> Tensor:
        self._count(labels)
        loss: Tensor = self.deepspeed.eval_batch(self._inputs(batches), num_micro_batches=self.micro_batches)
        return loss

    def begin_shape(self) -> None:
        self.deepspeed.reset_activation_shape()

    def _inputs(self, batches: MicroBatches) -> Iterator[tuple[Tensor, Tensor]]:
        # The first stage reads the tokens and the last stage the labels, each from an iterator of its rank.
        if self.documents.end_of_document is None:
            return map(self._to_device, batches)
        inputs = [self._to_device(batch) for batch in batches]
        self._tokens = [iter([tokens for tokens, _ in inputs]) for _ in range(2)]
        return iter(inputs)

    def _begin(self, module: nn.Module, _inputs: Any) -> None:
        # Each stage runs its forward passes in the order of the micro-batches, in every schedule.
        self.documents.begin(next(self._tokens[getattr(module, "active_phase", 0)]))


class _TiedWeights:
    """Tied weights of a PipelineModule."""

    def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
        """Return the tied weights whose gradients DeepSpeed sums over their stages; none that is frozen.

        DeepSpeed reads `grad` and skips a weight without one. ZeRO-1 in low precision, as CPU offload runs
        it, accumulates in `grad_accum` instead: every stage would silently update a different copy
        (DeepSpeed 0.19.8, pipe/engine.py, _exec_reduce_tied_grads).
        """
        tied = super().get_tied_weights_and_groups()  # type: ignore[misc]
        return [(_with_gradient(weight), group) for weight, group in tied if is_trained(weight)]


class StagedModule(_TiedWeights, PipelineModule):  # type: ignore[misc]  # DeepSpeed ships no types
    """DeepSpeed's module of one pipeline stage."""


class DualStagedModule(_TiedWeights, DualPipeVModule):  # type: ignore[misc]
    """DeepSpeed's module of the two stages of a rank under DualPipeV."""


def _with_gradient(weight: nn.Parameter) -> Any:
    accumulated = getattr(weight, "grad_accum", None)
    return weight if accumulated is None else SimpleNamespace(grad=accumulated)


def _spec(layer: Layer) -> LayerSpec:
    if layer.tied is None:
        return LayerSpec(layer.module, *layer.arguments)
    forward = _unchanged if layer.is_head else None
    return TiedLayerSpec(
        layer.tied, layer.module, *layer.arguments, forward_fn=forward, tied_weight_attr="weight"
    )


def _unchanged(_module: nn.Module, x: Tensor) -> Tensor:
    """Return the input of a tied head, which the loss runs with the labels."""
    return x
