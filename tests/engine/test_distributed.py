"""Timeouts of process groups."""

from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.engine.distributed import join, leave, prepare_deepspeed, set_timeouts
from tests.distributed import run_fresh

prepare_deepspeed("cpu")


def _timeouts(rank: int, world: int, meeting: str) -> list[timedelta]:
    join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=meeting, timeout_minutes=5)
    groups = [dist.group.WORLD, dist.new_group([0]), dist.new_group([0, 1])]

    def timeouts() -> list[timedelta]:
        backends = [
            group._get_backend(torch.device("cpu"))
            for group in groups
            if isinstance(group, dist.ProcessGroup)
        ]
        return [backend.options._timeout for backend in backends]

    before = timeouts()
    set_timeouts(5)
    after = timeouts()
    leave()
    return [*before, *after]


def test_every_group_has_the_configured_timeout() -> None:
    [first, _] = run_fresh(_timeouts, 2)
    configured, default = timedelta(minutes=10), timedelta(minutes=30)
    assert first == [configured, default, default, configured, configured, configured]
