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
from launcher.engine.base import Engine, MicroBatches, StepResult, to_inputs
from launcher.engine.ds_config import deepspeed_config
from launcher.engine.optimizer import build_optimizer
from launcher.models.blocks import BlockContext, TransformerBlock
from launcher.models.language import Layer, Loss
from launcher.parallel.mesh import ProcessMesh


class PipelineEngine(Engine):
    """A DeepSpeed pipeline engine; this rank holds one stage, or two under DualPipeV."""

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
        topology = PipeModelDataParallelTopology(
            num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data
        )
        module = (StagedModule if layout.stages_per_rank == 1 else DualPipeVModule)(
            layers=[_spec(layer) for layer in layers],
            topology=topology,
            loss_fn=loss,
            # Blocks are dealt out evenly, one more to some stages where they do not divide; the
            # embedding stays with the first, the final norm and the head with the last.
            partition_method=f"type:{TransformerBlock.__name__}",
        )
        optimizer = build_optimizer(run.optimizer, module.parameters())
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(run, layout), dist_init_required=False
        )
        super().__init__(module, optimizer, mesh, layout.zero_stage)
        self.device, self.micro_batches = device, layout.accumulation
        self.documents = context.documents
        # By phase: of the one stage a rank holds, or of the two under DualPipeV.
        self._tokens: list[Iterator[Tensor]] = []
        if self.documents.end_of_document is not None:
            module.register_forward_pre_hook(self._begin)

    @property
    def reads_data(self) -> bool:
        ends = self.mesh.stage in (0, self.mesh.shape.pipeline - 1)
        return ends or self.documents.end_of_document is not None

    def train_batch(self, batches: MicroBatches) -> StepResult:
        loss = self.deepspeed.train_batch(self._inputs(batches))
        return StepResult(float(loss), float(self.deepspeed.get_global_grad_norm()))

    def eval_batch(self, batches: MicroBatches) -> float:
        return float(self.deepspeed.eval_batch(self._inputs(batches), num_micro_batches=self.micro_batches))

    def _inputs(self, batches: MicroBatches) -> Iterator[tuple[Tensor, Tensor]]:
        # The first stage takes the tokens and the last the labels, each from its own iterator.
        if self.documents.end_of_document is None:
            return (to_inputs(batch, self.device) for batch in batches)
        inputs = [to_inputs(batch, self.device) for batch in batches]
        self._tokens = [iter([tokens for tokens, _ in inputs]) for _ in range(2)]
        return iter(inputs)

    def _begin(self, module: nn.Module, _inputs: Any) -> None:
        # Each stage passes micro-batches forward in their order, whatever the schedule does in between.
        self.documents.begin(next(self._tokens[getattr(module, "active_phase", 0)]))


class StagedModule(PipelineModule):  # type: ignore[misc]  # DeepSpeed ships no types
    """DeepSpeed's module of one stage."""

    def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
        """The tied weights whose gradients DeepSpeed sums over their stages.

        It looks for them in `grad` and skips a weight that has none. ZeRO-1 in low precision, as CPU offload
        runs it, accumulates in `grad_accum` instead, and every stage would update its own copy, without a
        word (DeepSpeed 0.19.8, pipe/engine.py, _exec_reduce_tied_grads).
        """
        return [(_with_gradient(weight), group) for weight, group in super().get_tied_weights_and_groups()]


def _with_gradient(weight: nn.Parameter) -> Any:
    accumulated = getattr(weight, "grad_accum", None)
    return weight if accumulated is None else SimpleNamespace(grad=accumulated)


def _spec(layer: Layer) -> LayerSpec:
    if layer.tied is None:
        return LayerSpec(layer.module, *layer.arguments)
    forward = _project if layer.project else None
    return TiedLayerSpec(
        layer.tied, layer.module, *layer.arguments, forward_fn=forward, tied_weight_attr="weight"
    )


def _project(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, project=True)  # type: ignore[no-any-return]
