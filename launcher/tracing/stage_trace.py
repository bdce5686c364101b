"""Trace a rank of any world in this process: its real modules with fake tensors and a fake process group.

Nothing is computed and nothing is sent, but every allocation, product and collective is counted.
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
from launcher.config.schema import InputKind, RunConfig
from launcher.config.shape import end_of_document, has_lora, sequence_length, vocabulary_multiple
from launcher.engine.allocations import Allocations
from launcher.models import grouped
from launcher.models.architecture import FlatModel, model_layers, model_loss
from launcher.models.block_context import BlockContext, lora_of, rotary_tables
from launcher.models.blocks import TransformerBlock
from launcher.models.compiled import BlockRunner
from launcher.models.documents import Documents
from launcher.models.masks import AttentionMasks
from launcher.parallel import all_reduce, collectives
from launcher.parallel.context import ContextParallel, context_of
from launcher.parallel.dtypes import TORCH_DTYPES
from launcher.parallel.initializer import Initializer
from launcher.parallel.layers import TensorParallel
from launcher.parallel.loss_kernels import EAGER
from launcher.parallel.mesh import Axis, MeshShape, ProcessMesh
from launcher.parallel.random import DropoutRandom
from launcher.planning.cost.geometry import Rank
from launcher.planning.cost.operations import Collective


@dataclass(frozen=True)
class StageTrace:
    """Costs of one micro-batch in one stage on one rank. Sizes are in bytes."""

    parameters: int
    flops: int  # executed, forward and backward
    saved: int  # between the forward and the backward pass
    peak: int  # without the weights and their accumulated gradients
    traffic: Counter[Collective]  # over the tensor group
    exchange: Counter[Collective]  # over the context group

    def bytes_by(self, kind: str, group: str) -> int:
        """Return the bytes of a kind of collective over the "tensor" or the "context" group."""
        calls = self.traffic if group == "tensor" else self.exchange
        return sum(call.size * count for call, count in calls.items() if call.kind == kind)


def trace_stage(run: RunConfig, layout: Layout, rank: Rank, chunk: int = 0) -> StageTrace:
    """Trace the stage `rank.chunks[chunk]` on the last tensor rank, which is the rank that cuts off padding.

    The kernels are those of the CPU; for a run on CUDA, kernels that save other tensors there are replaced
    (_cuda_kernels). Must not be called after torch.distributed is initialised.
    """
    shape = MeshShape.of(layout)
    global_rank = shape.rank(rank.stage, layout.context - 1, layout.tensor - 1)
    with ExitStack() as stack:
        mesh = stack.enter_context(_fake_world(shape, global_rank))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(patch.object(grouped, "rows_of_each", _even_rows))
        if layout.device == "cuda":
            stack.enter_context(_cuda_kernels())
        names = {axis.group: name for name, axis in (("tensor", mesh.tensor), ("context", mesh.context))}
        with Allocations(names.get) as allocations:
            module = _stage(run, rank, chunk, mesh, layout.device)
            for parameter in (each for each in module.parameters() if each.requires_grad):
                parameter.grad = torch.empty_like(parameter)
            weights_and_gradients = allocations.live
            allocations.restart()
            saved = _one_micro_batch(run, module, rank, chunk, allocations)
        # A second pass, because the counter keeps references to tensors.
        with FlopCounterMode(display=False, custom_mapping=_flops()) as counter:
            _one_micro_batch(run, module, rank, chunk, Allocations())
        return StageTrace(
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            flops=int(counter.get_total_flops()),
            saved=saved - weights_and_gradients,
            peak=allocations.peak - weights_and_gradients,
            traffic=_calls(allocations, "tensor"),
            exchange=_calls(allocations, "context"),
        )


def _calls(allocations: Allocations, group: str) -> Counter[Collective]:
    calls = allocations.collectives.items()
    return Counter({Collective(call.kind, call.size): n for call, n in calls if call.group == group})


def _one_micro_batch(
    run: RunConfig, module: FlatModel, rank: Rank, chunk: int, allocations: Allocations
) -> int:
    """Run forward and backward, and return the bytes that are alive between the two."""
    stage, p = rank.chunks[chunk], run.parallelism
    batch, length = run.training.micro_batch_size, sequence_length(run) // p.context
    if stage.has_embedding:
        inputs = _inputs(run)
    else:
        local_length = length // p.tensor if p.sequence_parallel else length
        shape = batch, local_length, run.model.hidden_size
        inputs = torch.empty(shape, dtype=TORCH_DTYPES[run.precision.dtype], requires_grad=True)
    if stage.has_head:
        labels = torch.empty(batch, 1 if run.model.inputs is InputKind.patches else length, dtype=torch.long)
        output = module(inputs, labels)
        saved = allocations.live
        output.backward()
    else:
        output = module.hidden(inputs)
        saved = allocations.live - output.untyped_storage().nbytes()
        output.backward(torch.empty_like(output))
    return saved


def _inputs(run: RunConfig) -> Tensor:
    """Return the input of the first stage: token ids or images."""
    batch, m = run.training.micro_batch_size, run.model
    if m.inputs is InputKind.patches:
        return torch.empty(batch, m.image_channels, m.image_size, m.image_size, dtype=torch.uint8)
    return torch.empty(batch, sequence_length(run) // run.parallelism.context, dtype=torch.long)


def _stage(run: RunConfig, rank: Rank, chunk: int, mesh: ProcessMesh, target: str) -> FlatModel:
    """Return the layers of one stage in the run's precision, as they run on the device `target`."""
    p, axis = run.parallelism, mesh.tensor
    cp = context_of(mesh.context, p.context_method)
    multiple = vocabulary_multiple(run, target)
    initializer = Initializer(0, axis, TORCH_DTYPES[run.precision.dtype], drawn=False, frozen=has_lora(run))
    tp = TensorParallel(axis, p.sequence_parallel, initializer, target, vocabulary_multiple=multiple)
    random = DropoutRandom(0, stage=0, data_rank=0, tensor_rank=axis.rank)
    documents = _Documents(run, cp)
    rotary, masks = rotary_tables(run.model, cp), AttentionMasks(run.model, documents, cp)
    runner = BlockRunner(axis, mesh.context, EAGER, is_compiled=False)
    context = BlockContext(
        tp, random, p.activation_checkpointing, documents, masks, rotary, runner, lora_of(run), cp=cp
    )
    layers = model_layers(run.model, context)
    stage = rank.chunks[chunk]
    front = next(index for index, layer in enumerate(layers) if layer.module is TransformerBlock)
    start = 0 if stage.has_embedding else front + stage.first_block
    stop = len(layers) if stage.has_head else front + stage.first_block + stage.blocks
    return FlatModel(layers[start:stop], model_loss(run.model, context), documents)


def _even_rows(experts: Tensor, count: int) -> list[int]:
    """Return the rows of each expert if the router chooses all experts alike; fake scores choose none."""
    each, more = divmod(len(experts), count)
    return [each + (expert < more) for expert in range(count)]


class _Documents(Documents):
    """Uses tokens made here; in a real run, later stages receive them beside their input."""

    def __init__(self, run: RunConfig, context: ContextParallel | None) -> None:
        super().__init__(end_of_document(run) if run.data.document_attention else None, context)
        shape = run.training.micro_batch_size, sequence_length(run) // run.parallelism.context
        self.tokens = torch.empty(shape, dtype=torch.long)

    def begin(self, tokens: Tensor) -> None:
        super().begin(self.tokens)


def _flops() -> dict[Any, Callable[..., int]]:
    """Count FLOPs where torch does not.

    In the CPU's fused attention, two products forward and five backward; in a product that is added to a sum
    of another type.
    """

    def forward(query: Any, key: Any, *_: Any, **__: Any) -> int:
        batch, heads, length, size = query
        return 2 * 2 * int(batch * heads * length * key[2] * size)

    def backward(gradient: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
        return forward(query, key) // 2 * 5

    def product(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
        return 2 * int(left[0] * left[1] * right[1])

    return {
        torch.ops.aten.addmm: product,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


@contextmanager
def _fake_world(shape: MeshShape, rank: int) -> Iterator[ProcessMesh]:
    """Yield this rank's mesh in a world without other processes, with its tensor and context groups."""
    dist.init_process_group("fake", rank=rank, world_size=shape.world_size, store=FakeStore())
    try:
        stage, data, tensor = shape.coordinates(rank)
        [of_tensor] = (group for group in shape.tensor_groups() if rank in group)
        [of_context] = (group for group in shape.context_groups() if rank in group)
        yield ProcessMesh(
            shape,
            rank,
            Axis(tensor, shape.tensor, dist.new_group(of_tensor)),
            Axis(data, shape.data),
            stage,
            context=Axis(data % shape.context, shape.context, dist.new_group(of_context)),
        )
    finally:
        dist.destroy_process_group()


@contextmanager
def _cuda_kernels() -> Iterator[None]:
    """Let a CPU do what a GPU does: save the same tensors as torch's CUDA kernels, and scatter as NCCL.

    RMSNorm saves its input and one number per row; dropout saves a byte per element; fused attention draws
    its dropout mask again instead of saving it.
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
        patch.object(collectives, "is_exchanged", lambda x: False),
        patch.object(all_reduce, "sends_whole", lambda x, group: False),
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
