"""One rank of any world, traced here: its real modules under fake tensors and a fake process group.

Nothing is computed and nothing is sent; every allocation, product and collective is seen as it would happen.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from launcher.config.layout import Layout
from launcher.config.schema import Dtype, Family, RunConfig
from launcher.config.shape import end_of_document, sequence_length
from launcher.models.blocks import BlockContext, TransformerBlock
from launcher.models.documents import Documents
from launcher.models.language import FlatModel
from launcher.models.model import model_layers, model_loss
from launcher.parallel.layers import TensorParallel
from launcher.parallel.mesh import Axis, MeshShape
from launcher.parallel.random import DropoutRandom
from launcher.parallel.sharding import DrawFunction, Initializer, LogicalTensor
from launcher.planning.cost.geometry import Rank
from launcher.planning.cost.operations import Collective
from launcher.tracing.allocations import Allocations

DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}


@dataclass(frozen=True)
class Traced:
    """One micro-batch of one stage on one rank, in bytes."""

    parameters: int
    flops: int  # executed, forward and backward
    saved: int  # between the forward and the backward pass
    peak: int  # beside the weights and their accumulated gradients
    traffic: Counter[Collective]  # over the tensor group


def trace_stage(run: RunConfig, layout: Layout, rank: Rank, chunk: int = 0) -> Traced:
    """The stage `rank.chunks[chunk]` on the last tensor rank, which is the one to cut off padding.

    Runs the CPU's kernels; for a run on CUDA those of them that keep something else are replaced by what
    CUDA's keep (_cuda_kernels). Not to be called where torch.distributed is initialised.
    """
    shape = MeshShape(layout.pipeline, layout.data, layout.tensor)
    global_rank = shape.rank(rank.stage, 0, layout.tensor - 1)
    with ExitStack() as stack:
        group = stack.enter_context(_fake_world(shape, global_rank))
        stack.enter_context(FakeTensorMode())
        if layout.device == "cuda":
            stack.enter_context(_cuda_kernels())
        axis = Axis(layout.tensor - 1, layout.tensor, group)
        with Allocations() as allocations:
            module = _stage(run, rank, chunk, axis)
            for parameter in module.parameters():
                parameter.grad = torch.empty_like(parameter)
            weights_and_gradients = allocations.live
            allocations.restart()
            saved = _one_micro_batch(run, module, rank, chunk, allocations)
        # A pass of its own: the counter holds on to tensors.
        with FlopCounterMode(display=False, custom_mapping=_attention_flops()) as counter:
            _one_micro_batch(run, module, rank, chunk, Allocations())
        return Traced(
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            flops=int(counter.get_total_flops()),
            saved=saved - weights_and_gradients,
            peak=allocations.peak - weights_and_gradients,
            traffic=Counter({one: count for (_, one), count in allocations.collectives.items()}),
        )


def _one_micro_batch(
    run: RunConfig, module: FlatModel, rank: Rank, chunk: int, allocations: Allocations
) -> int:
    """Forward and backward; what is alive between the two."""
    stage, p = rank.chunks[chunk], run.parallelism
    batch, length = run.training.micro_batch_size, sequence_length(run)
    if stage.has_embedding:
        inputs = _inputs(run)
    else:
        own = length // p.tensor if p.sequence_parallel else length
        shape = batch, own, run.model.hidden_size
        inputs = torch.empty(shape, dtype=DTYPES[run.precision.dtype], requires_grad=True)
    if stage.has_head:
        labels = torch.empty(batch, 1 if run.model.family is Family.vit else length, dtype=torch.long)
        output = module(inputs, labels)
        saved = allocations.live
        output.backward()
    else:
        output = module.logits(inputs)
        saved = allocations.live - output.untyped_storage().nbytes()
        output.backward(torch.empty_like(output))
    return saved


def _inputs(run: RunConfig) -> Tensor:
    """Of the first stage: token ids or images."""
    batch, m = run.training.micro_batch_size, run.model
    if m.family is Family.vit:
        return torch.empty(batch, m.image_channels, m.image_size, m.image_size, dtype=torch.uint8)
    return torch.empty(batch, sequence_length(run), dtype=torch.long)


def _stage(run: RunConfig, rank: Rank, chunk: int, axis: Axis) -> FlatModel:
    """The layers of one stage, in the run's precision."""
    device, p = torch.device("cpu"), run.parallelism
    tp = TensorParallel(axis, p.sequence_parallel, _Undrawn(0, axis))
    random = DropoutRandom(0, stage=0, data_rank=0, tensor_rank=axis.rank, device=device)
    documents = _Documents(run)
    context = BlockContext(tp, random, p.activation_checkpointing, documents)
    layers = model_layers(run.model, context)
    stage = rank.chunks[chunk]
    front = next(index for index, layer in enumerate(layers) if layer.module is TransformerBlock)
    start = 0 if stage.has_embedding else front + stage.first_block
    stop = len(layers) if stage.has_head else front + stage.first_block + stage.blocks
    # Not `.to()`, which fake parameters refuse.
    torch.set_default_dtype(DTYPES[run.precision.dtype])
    try:
        return FlatModel(layers[start:stop], model_loss(run.model, context), documents)
    finally:
        torch.set_default_dtype(torch.float32)


class _Documents(Documents):
    """Of tokens of its own: later stages are given them beside their input."""

    def __init__(self, run: RunConfig) -> None:
        super().__init__(end_of_document(run) if run.data.document_attention else None)
        self.tokens = torch.empty(run.training.micro_batch_size, sequence_length(run), dtype=torch.long)

    def begin(self, tokens: Tensor) -> None:
        super().begin(self.tokens)


class _Undrawn(Initializer):
    """Parameters of the right shape, in the default dtype, without values."""

    def parameter(self, logical: LogicalTensor, draw: DrawFunction) -> Any:
        return super().parameter(logical, lambda shape, generator: torch.empty(shape))


def _attention_flops() -> dict[Any, Callable[..., int]]:
    """Products of the CPU's fused attention, which torch does not count: two forward, five backward."""

    def forward(query: Any, key: Any, *_: Any, **__: Any) -> int:
        batch, heads, length, size = query
        return 2 * 2 * int(batch * heads * length * key[2] * size)

    def backward(gradient: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
        return forward(query, key) // 2 * 5

    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


@contextmanager
def _fake_world(shape: MeshShape, rank: int) -> Iterator[dist.ProcessGroup]:
    """This rank's tensor group in a world that nobody else is in."""
    dist.init_process_group("fake", rank=rank, world_size=shape.world_size, store=FakeStore())
    try:
        stage, data, _ = shape.coordinates(rank)
        yield dist.new_group([shape.rank(stage, data, tensor) for tensor in range(shape.tensor)])
    finally:
        dist.destroy_process_group()


@contextmanager
def _cuda_kernels() -> Iterator[None]:
    """Three functions of torch, keeping what their CUDA kernels keep.

    RMSNorm's keeps its input and one number per row; dropout's a byte per element; attention's fused one
    draws its dropout mask again instead of keeping it.
    """
    attention = F.scaled_dot_product_attention

    def without_mask(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **{**kwargs, "dropout_p": 0.0})

    def dropout(x: Tensor, probability: float) -> Tensor:
        return torch.native_dropout(x, probability, True)[0]

    with (
        patch.object(F, "rms_norm", _RmsNorm.apply),
        patch.object(F, "dropout", dropout),
        patch.object(F, "scaled_dot_product_attention", without_mask),
    ):
        yield


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None
