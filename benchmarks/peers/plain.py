"""A plain training loop in one process, eager or compiled; in bf16 with autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch

from benchmarks.contest.job import AfterStep, Job
from benchmarks.peers.batches import initial_weights, micro_batches
from benchmarks.peers.model import built
from benchmarks.peers.optimizer import adamw


def train(job: Job, rank: int, after_step: AfterStep) -> None:
    torch.set_float32_matmul_precision("high")
    model = built(job, initial_weights(job))
    step_loss = torch.compile(model, dynamic=False) if job.options.get("compile") else model
    optimizer = adamw(job, model.parameters())
    for batches in micro_batches(job, data_rank=0):
        [(tokens, labels)] = batches
        with autocast(job):
            loss = step_loss(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.adamw.clipping)
        optimizer.step()
        optimizer.zero_grad()
        after_step(loss.detach())


def autocast(job: Job) -> AbstractContextManager[object]:
    return torch.autocast(job.device, torch.bfloat16) if job.precision == "bf16" else nullcontext()
