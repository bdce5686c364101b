"""State that all layers of a model share: tensor-parallel group, dropout, recomputation, documents.

Context parallelism is parallel/context.py and models/context_attention.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from launcher.config.schema import ActivationCheckpointing, LoraConfig, ModelConfig, PositionKind, RunConfig
from launcher.config.shape import end_of_document, has_lora, vocabulary_multiple
from launcher.models.compiled import BlockRunner
from launcher.models.documents import Documents
from launcher.models.dropout import Seed, dropout
from launcher.models.masks import AttentionMasks
from launcher.models.rotary import RotaryTables
from launcher.parallel.context import ContextParallel, context_of
from launcher.parallel.initializer import DrawFunction, Initializer, normal
from launcher.parallel.layers import TensorParallel
from launcher.parallel.loss_kernels import LossKernels
from launcher.parallel.mesh import ONE_RANK, Axis, ProcessMesh
from launcher.parallel.random import DropoutRandom

PositionTables = tuple[Tensor | None, Tensor | None, Tensor | None]  # mask, cosines, sines


@dataclass(frozen=True)
class BlockContext:
    """State shared by the layers of a model on one rank, besides the config."""

    tp: TensorParallel
    random: DropoutRandom
    checkpointing: ActivationCheckpointing
    documents: Documents
    masks: AttentionMasks
    rotary: RotaryTables | None  # None without rotary positions
    blocks: BlockRunner
    lora: LoraConfig | None = None  # None: no adapters
    micro_batches: int = 1  # micro-batches per optimizer step and data rank
    expert: Axis = ONE_RANK  # the data ranks that share the experts of each layer
    cp: ContextParallel | None = None  # None: each rank holds whole sequences

    @classmethod
    def create(
        cls,
        run: RunConfig,
        mesh: ProcessMesh,
        initializer: Initializer,
        *,
        compiled: bool = False,
        strict: bool = False,
        micro_batches: int = 1,
    ) -> "BlockContext":
        """Return the context of this rank; `strict` raises an error of the compiler (see BlockRunner)."""
        random = DropoutRandom(
            run.training.seed,
            stage=mesh.stage,
            data_rank=mesh.data.rank,
            tensor_rank=mesh.tensor.rank,
        )
        device = initializer.device.type
        kernels = LossKernels(is_compiled=compiled, strict=strict)
        tp = TensorParallel(
            mesh.tensor,
            run.parallelism.sequence_parallel,
            initializer,
            device,
            kernels,
            vocabulary_multiple(run, device),
        )
        cp = context_of(mesh.context, run.parallelism.context_method)
        documents = Documents(end_of_document(run) if run.data.document_attention else None, cp)
        return cls(
            tp,
            random,
            run.parallelism.activation_checkpointing,
            documents,
            AttentionMasks(run.model, documents, cp),
            rotary_tables(run.model, cp),
            BlockRunner(mesh.tensor, mesh.context, kernels, is_compiled=compiled, strict=strict),
            lora_of(run),
            micro_batches,
            mesh.expert,
            cp,
        )

    def positions(self, x: Tensor, window: int | None = None) -> PositionTables:
        """Return the mask, cosines and sines for the positions of x, a block's input.

        The layers get them as arguments: when a block is recomputed, `documents` already holds another
        micro-batch.
        """
        length = x.shape[1] * (self.tp.axis.size if self.tp.sequence_parallel else 1)
        length *= 1 if self.cp is None else self.cp.axis.size
        mask = self.masks.of(length, window, x)
        if self.rotary is None:
            return mask, None, None
        return mask, *self.rotary.of(length, x, has_window=window is not None)


def lora_of(run: RunConfig) -> LoraConfig | None:
    """Return the settings of the run's adapters; None if it trains the whole model."""
    return run.finetune.lora if has_lora(run) else None


def rotary_tables(model: ModelConfig, context: ContextParallel | None = None) -> RotaryTables | None:
    return RotaryTables(model, context) if model.positions is PositionKind.rope else None


class HiddenDropout(nn.Module):
    """Dropout between the parallel regions: one mask for all tensor ranks, or one per sequence shard."""

    def __init__(self, probability: float, context: BlockContext) -> None:
        super().__init__()
        self.probability, self.context = probability, context

    def seed(self) -> int | None:
        """Return the seed of the next mask; None without dropout."""
        if not self.training or self.probability == 0.0:
            return None
        random = self.context.random
        return random.local() if self.context.tp.sequence_parallel else random.shared()

    def forward(self, x: Tensor, seed: Seed | None) -> Tensor:
        return x if seed is None else dropout(x, self.probability, seed)


def run_once(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Return function(*inputs), without recomputation."""
    return function(*inputs)


def recompute(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Run `function(*inputs)`, keep only the inputs, and run it again in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    # ZeRO-3 gathers each weight again for the second run: its metadata differs, its values do not. Seeds of
    # dropout are inputs: no random state has to be restored.
    return checkpoint(  # type: ignore[no-any-return]
        function, *inputs, use_reentrant=False, determinism_check="none", preserve_rng_state=False
    )


def residual_draw(model: ModelConfig) -> DrawFunction:
    """Return the draw of projections into the residual stream: std init_std / sqrt(2 layers), as GPT-2."""
    return normal(model.init_std / (2 * model.num_layers) ** 0.5)
