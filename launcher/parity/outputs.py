"""Record the output of each layer and the loss of each micro-batch with forward hooks."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.config.schema import ContextMethod
from launcher.engine.base import Engine
from launcher.models.blocks import TransformerBlock
from launcher.models.norms import Norm
from launcher.models.positions import LearnedPositions
from launcher.models.vision import PatchEmbedding
from launcher.parallel import layers
from launcher.parallel.context import context_of
from launcher.parallel.sharding import LogicalTensor, logical_of, merge
from launcher.parity.choices import ChoiceRecorder
from launcher.parity.step_trace import Weights

_PARALLEL = (layers.VocabParallelEmbedding, layers.ColumnParallelLinear, layers.RowParallelLinear)
RECORDED = (*_PARALLEL, PatchEmbedding, LearnedPositions, Norm)


class OutputRecorder:
    """Records each layer's output for the first micro-batch of a step; not inside compiled blocks.

    A layer is named after its weight, without `.weight`. The projection to the vocabulary is named `head`,
    whether or not the embeddings are tied.
    """

    def __init__(self, engine: Engine, sequence_parallel: bool, method: ContextMethod) -> None:
        self.mesh, self.sequence_parallel = engine.mesh, sequence_parallel
        self.context = context_of(engine.mesh.context, method)
        self.chosen = ChoiceRecorder(engine, self.context)
        self._outputs: Weights = {}
        self._splits: dict[str, LogicalTensor] = {}  # of outputs that are sharded by columns
        self._losses: list[float] = []
        # A compiled body does not run the hooks of the modules inside it.
        blocks = [m for m in engine.module.modules() if isinstance(m, TransformerBlock)]
        hidden = {m for block in blocks for m in block.modules()} if engine.layout.compiled else set()
        for module in engine.module.modules():
            if isinstance(module, RECORDED) and module not in hidden:
                module.register_forward_hook(self._keep, with_kwargs=True)
            if isinstance(module, layers.VocabParallelEmbedding):
                # Before forward and after DeepSpeed's own hook: ZeRO-3 has gathered the weight.
                module.register_forward_pre_hook(self._keep_logits, with_kwargs=True)
        self._loss = getattr(engine.module, engine.loss_name)
        setattr(engine.module, engine.loss_name, self._keep_loss)

    def start(self) -> None:
        """Discard the records of the previous step."""
        self._outputs, self._losses = {}, []
        self.chosen.start()

    def outputs(self) -> tuple[Weights, dict[str, float]]:
        """Return full outputs, and the spread of replicated outputs.

        All-gathers over the tensor group and the context group.
        """
        full, spreads = {}, {}
        axis = self.mesh.tensor
        for name, local in self._outputs.items():
            pieces = [local]
            if axis.size > 1:
                pieces = [torch.empty_like(local) for _ in range(axis.size)]
                dist.all_gather(pieces, local.contiguous(), group=axis.group)
            if name in self._splits:
                full[name] = merge(pieces, self._splits[name])
            elif self.sequence_parallel:
                full[name] = torch.cat(pieces, dim=1)
            else:
                full[name] = pieces[0]
                if axis.size > 1:
                    spreads[name] = spread_of(pieces, local)
        if self.context is not None:
            full = {name: self.context.whole(part) for name, part in full.items()}
        return full, spreads

    def losses(self) -> list[list[float]]:
        """Return losses[data rank][micro-batch], if any on this stage. All-gathers over the data group."""
        gathered: list[list[float]] = [[] for _ in range(self.mesh.data.size)]
        dist.all_gather_object(gathered, self._losses, group=self.mesh.data.group)
        # The loss of a micro-batch is the mean over its context ranks, each with its part of the labels.
        size = self.mesh.context.size
        by_samples = [gathered[first : first + size] for first in range(0, len(gathered), size)]
        return [[sum(parts) / size for parts in zip(*of_ranks, strict=True)] for of_ranks in by_samples]

    def _keep(self, module: nn.Module, _inputs: Any, options: dict[str, Any], output: Tensor) -> None:
        assert isinstance(module.weight, Tensor)
        logical = logical_of(module.weight)
        if "labels" in options or isinstance(module, layers.VocabParallelHead):
            return  # see _keep_logits
        is_split = isinstance(module, layers.ColumnParallelLinear)
        self._record(module, logical.name.removesuffix(".weight"), output, logical if is_split else None)

    def _keep_logits(self, module: nn.Module, inputs: tuple[Tensor], options: dict[str, Any]) -> None:
        """Record the logits that the head projects to; the loss itself never holds them all."""
        if "labels" in options:
            assert isinstance(module, layers.VocabParallelEmbedding)
            with torch.no_grad():
                logits = module.logits(inputs[0])
            self._record(module, "head", logits, logical_of(module.weight))

    def _record(
        self, module: nn.Module, name: str, output: Tensor, split_by_columns: LogicalTensor | None
    ) -> None:
        # Activation checkpointing calls a layer again to recompute it. Validation is not recorded.
        if name in self._outputs or not module.training:
            return
        self._outputs[name] = output.detach().float().cpu()
        if split_by_columns is not None:
            shape = (*output.shape[:2], split_by_columns.shape[0])
            self._splits[name] = replace(split_by_columns, shape=shape, split_dim=2)

    def _keep_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self._loss(x, labels)
        if torch.is_grad_enabled():
            self._losses.append(float(loss.detach()))
        return loss


def spread_of(pieces: list[Tensor], own: Tensor) -> float:
    """Return the largest distance of `own` from the same output of all ranks; NaN if it is anywhere NaN."""
    return float(torch.stack([(piece - own).abs().max() for piece in pieces]).max())
