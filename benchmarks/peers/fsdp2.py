"""torch's FSDP2: option `reshard` frees the gathered weights after the forward pass, as ZeRO-3 does."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.contest.job import AfterStep, Job
from benchmarks.peers.batches import initial_weights, micro_batches
from benchmarks.peers.model import Transformer, built
from benchmarks.peers.optimizer import adamw
from benchmarks.peers.ranks import join


def train(job: Job, rank: int, after_step: AfterStep) -> None:
    join(job, rank)
    model = sharded(job, built(job, initial_weights(job)))
    optimizer = adamw(job, model.parameters())
    for [(tokens, labels)] in micro_batches(job, rank):
        loss = model(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.adamw.clipping)
        optimizer.step()
        optimizer.zero_grad()
        after_step(loss.detach())


def sharded(job: Job, model: Transformer) -> Transformer:
    mesh, reshard = init_device_mesh(job.device, (job.ranks,)), job.options["reshard"]
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    for module in [model, *model.blocks.values()]:
        module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    return model
