"""Joins a rank of a peer to the others."""

import torch.distributed as dist

from benchmarks.contest.job import Job


def join(job: Job, rank: int) -> None:
    backend = "nccl" if job.device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{job.store}", rank=rank, world_size=job.ranks)
