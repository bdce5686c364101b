"""torch's DistributedDataParallel."""

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contest.job import AfterStep, Job
from benchmarks.peers.batches import initial_weights, micro_batches
from benchmarks.peers.model import built
from benchmarks.peers.optimizer import adamw
from benchmarks.peers.ranks import join


def train(job: Job, rank: int, after_step: AfterStep) -> None:
    join(job, rank)
    model = DistributedDataParallel(built(job, initial_weights(job)), gradient_as_bucket_view=True)
    optimizer = adamw(job, model.parameters())
    for [(tokens, labels)] in micro_batches(job, rank):
        loss = model(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.adamw.clipping)
        optimizer.step()
        optimizer.zero_grad()
        after_step(loss.detach())
