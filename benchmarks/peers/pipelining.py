"""torch.distributed.pipelining with the 1F1B schedule; a rank holds one stage."""

import torch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.contest.job import AfterStep, Job
from benchmarks.peers.batches import initial_weights, micro_batches
from benchmarks.peers.model import built, cross_entropy
from benchmarks.peers.optimizer import adamw, clip_sharded
from benchmarks.peers.ranks import join


def train(job: Job, rank: int, after_step: AfterStep) -> None:
    join(job, rank)
    model = built(job, initial_weights(job), stage=rank, stages=job.ranks)
    stage = PipelineStage(model, rank, job.ranks, torch.device(job.device))

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, labels, job.sizes.vocabulary)

    schedule = Schedule1F1B(stage, job.accumulation, loss_fn=loss_of)
    optimizer = adamw(job, model.parameters())
    for batches in micro_batches(job, data_rank=0):
        tokens, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        losses: list[torch.Tensor] = []
        inputs = (tokens,) if rank == 0 else ()
        schedule.step(*inputs, target=labels if stage.is_last else None, losses=losses)
        gradients = {p.grad: True for p in model.parameters() if p.grad is not None}
        clip_sharded(gradients, job.adamw.clipping, None)
        optimizer.step()
        optimizer.zero_grad()
        after_step(torch.stack(losses).mean() if stage.is_last else None)
