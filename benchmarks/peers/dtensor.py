"""torch's DTensor tensor parallelism, with or without sequence parallelism; the loss stays sharded."""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.contest.job import AfterStep, Job
from benchmarks.peers.batches import initial_weights, micro_batches
from benchmarks.peers.model import Transformer, built, cross_entropy
from benchmarks.peers.optimizer import adamw, clip_sharded
from benchmarks.peers.ranks import join
from benchmarks.peers.tensor_shards import with_rows_by_rank


def train(job: Job, rank: int, after_step: AfterStep) -> None:
    join(job, rank)
    mesh = init_device_mesh(job.device, (job.ranks,))
    weights = with_rows_by_rank(initial_weights(job), job.sizes, job.ranks)
    splits_sequence = job.options["sequence_parallel"]
    model = parallelized(built(job, weights), mesh, splits_sequence=splits_sequence)
    optimizer = adamw(job, model.parameters())
    for [(tokens, labels)] in micro_batches(job, data_rank=0):
        with loss_parallel():
            loss = cross_entropy(model(tokens), labels, job.sizes.vocabulary)
            loss.backward()
        clip(model, job.adamw.clipping, rank)
        optimizer.step()
        optimizer.zero_grad()
        after_step(loss.detach().full_tensor())


def parallelized(model: Transformer, mesh: DeviceMesh, *, splits_sequence: bool) -> Transformer:
    between = Shard(1) if splits_sequence else Replicate()
    rowwise = RowwiseParallel(output_layouts=between)
    lookup = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    head = ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False)
    ends: dict[str, ParallelStyle] = {"embedding": lookup, "head": head}
    block: dict[str, ParallelStyle] = {
        "attention.qkv": ColwiseParallel(), "attention.output": rowwise,
        "mlp.up": ColwiseParallel(), "mlp.down": rowwise,
    }  # fmt: skip
    if splits_sequence:
        # The positions (T, H) have the sequence first.
        by_position = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0))
        ends |= {"positions": by_position, "final_norm": SequenceParallel()}
        gathered = PrepareModuleInput(
            input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
        )
        block |= {"attention_norm": SequenceParallel(), "mlp_norm": SequenceParallel(), "attention": gathered}
        block["mlp"] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    for layer in model.blocks.values():
        parallelize_module(layer, mesh, block)
    return parallelize_module(model, mesh, ends)


def clip(model: Transformer, limit: float, rank: int) -> None:
    """Clip the gradients; first sum the partial gradients of replicated weights over the ranks."""
    gradients: dict[torch.Tensor, bool] = {}
    for parameter in model.parameters():
        assert parameter.grad is not None
        counts = rank == 0
        if isinstance(parameter, DTensor):
            grad = parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
            gradients[grad.to_local()] = counts or any(place.is_shard() for place in parameter.placements)
        else:
            gradients[parameter.grad] = counts
    clip_sharded(gradients, limit, None)
