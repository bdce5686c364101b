"""The ring sends while attention computes, as torch's profiler records it. No time is asserted.

Calls and waits have the labels that `profile=true` puts into a trace (engine/stopwatch.py).
"""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import launcher.models.context_attention as context_attention_module
from launcher.config.schema import ContextMethod
from launcher.engine.stopwatch import Stopwatch
from launcher.models.attention_kernel import Kernel
from launcher.models.context_attention import context_attention
from launcher.parallel.context import ContextParallel, Transfer, finish, pass_on_start
from tests.distributed import mesh, pool
from tests.ring_order import BACKWARD, FORWARD, order

BATCH, LENGTH, HEADS, SIZE = 1, 32, 2, 4
LABEL = "exchange"


def waits_at_once(x: torch.Tensor, axis: Any) -> Transfer:
    """Start an exchange and wait for it: a fault that hides nothing behind attention."""
    return finish(pass_on_start(x, axis)), []


def recorded(rank: int, world: int, at_once: bool) -> tuple[str, str]:
    """Return the order of this rank's work in the forward and in the backward pass of one layer."""
    context = ContextParallel(mesh(context=world).context, ContextMethod.ring)
    q, k, v = (torch.randn(BATCH, LENGTH // world, HEADS, SIZE, requires_grad=True) for _ in range(3))
    watch, passes = Stopwatch(lambda _: "context"), []
    watch.label = lambda function, group: LABEL
    with pytest.MonkeyPatch.context() as patch, watch.timing_collectives():
        if at_once:
            patch.setattr(context_attention_module, "pass_on_start", waits_at_once)
        with profile(activities=[ProfilerActivity.CPU]) as forward:
            result = context_attention(q, k, v, None, 0.0, None, Kernel(True, None, None, "cpu"), context)
        with profile(activities=[ProfilerActivity.CPU]) as backward:
            result.sum().backward()
    for each in (forward, backward):
        events = each.events() or []
        passes.append(order(((e.time_range.start, e.time_range.end, e.name) for e in events), LABEL))
    return passes[0], passes[1]


@pytest.mark.parametrize("world", [2, 4])
def test_each_step_of_the_ring_sends_before_its_attention_and_waits_after_it(world: int) -> None:
    for forward, backward in pool(world).run(recorded, False):
        assert forward == FORWARD[world]
        assert backward == BACKWARD[world]
        assert (forward.count("P"), backward.count("P")) == (world - 1, 2 * (world - 1))


def test_a_ring_that_waits_at_once_is_noticed() -> None:
    for forward, backward in pool(2).run(recorded, True):
        assert forward == "Pwa"
        assert backward == "PwaPw"
