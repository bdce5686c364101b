"""What each layer of an engine's model gave out, and each micro-batch's loss, caught by forward hooks."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.engine.base import Engine
from launcher.models.blocks import Norm
from launcher.models.language import LearnedPositions
from launcher.models.vision import PatchEmbedding
from launcher.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from launcher.parallel.sharding import LogicalTensor, logical_of, merge
from launcher.parity.step_trace import Weights

RECORDED = (
    VocabParallelEmbedding,
    PatchEmbedding,
    LearnedPositions,
    Norm,
    ColumnParallelLinear,
    RowParallelLinear,
)


class OutputRecorder:
    """Keeps each layer's output in the first micro-batch of a step, by its weight's name without `.weight`.

    The projection to the vocabulary is `head`, tied or not.
    """

    def __init__(self, engine: Engine, sequence_parallel: bool) -> None:
        self.mesh, self.sequence_parallel = engine.mesh, sequence_parallel
        self._outputs: Weights = {}
        self._splits: dict[str, LogicalTensor] = {}  # of outputs split by columns
        self._losses: list[float] = []
        for module in engine.module.modules():
            if isinstance(module, RECORDED):
                module.register_forward_hook(self._keep, with_kwargs=True)
        # The flat model's name for it, and that of DeepSpeed's pipeline.
        name = "loss" if hasattr(engine.module, "loss") else "loss_fn"
        self._loss = getattr(engine.module, name)
        setattr(engine.module, name, self._keep_loss)

    def start(self) -> None:
        """Of a step."""
        self._outputs, self._losses = {}, []

    def outputs(self) -> tuple[Weights, dict[str, float]]:
        """The logical outputs, and of those that all tensor ranks hold how far they differ.

        Collective over the tensor group.
        """
        whole, spreads = {}, {}
        axis = self.mesh.tensor
        for name, own in self._outputs.items():
            pieces = [torch.empty_like(own) for _ in range(axis.size)]
            if axis.size > 1:
                dist.all_gather(pieces, own.contiguous(), group=axis.group)
            else:
                pieces = [own]
            if name in self._splits:
                whole[name] = merge(pieces, self._splits[name])
            elif self.sequence_parallel:
                whole[name] = torch.cat(pieces, dim=1)
            else:
                whole[name] = pieces[0]
                if axis.size > 1:
                    spreads[name] = max(float((piece - own).abs().max()) for piece in pieces)
        return whole, spreads

    def losses(self) -> list[list[float]]:
        """[data rank][micro-batch] of the last stage; empty on others. Collective over the data group."""
        gathered: list[list[float]] = [[] for _ in range(self.mesh.data.size)]
        dist.all_gather_object(gathered, self._losses, group=self.mesh.data.group)
        return gathered

    def _keep(self, module: nn.Module, _inputs: Any, options: dict[str, Any], output: Tensor) -> None:
        assert isinstance(module.weight, Tensor)
        logical = logical_of(module.weight)
        name = logical.name.removesuffix(".weight")
        if isinstance(module, VocabParallelHead) or options.get("project"):
            name = "head"
        # Recomputed under activation checkpointing, layers are called again; validation does not count.
        if name in self._outputs or not module.training:
            return
        self._outputs[name] = output.detach().float().cpu()
        if name == "head" or isinstance(module, ColumnParallelLinear):
            shape = (*output.shape[:2], logical.shape[0])
            self._splits[name] = replace(logical, shape=shape, split_dim=2)

    def _keep_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self._loss(logits, labels)
        if torch.is_grad_enabled():
            self._losses.append(float(loss.detach()))
        return loss
