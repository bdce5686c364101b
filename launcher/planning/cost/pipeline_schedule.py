"""Simulate DeepSpeed's pipeline schedules: when each stage runs which micro-batch. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.config.layout import Layout

Task = tuple[bool, int]  # whether it is a forward pass, and the index of the stage on its rank


@dataclass(frozen=True)
class Event:
    """A pass of a micro-batch through a stage, in seconds from the start of the step."""

    rank: int
    stage: int
    micro_batch: int
    forward: bool
    start: float
    end: float


def order(layout: Layout, rank: int, micro_batches: int) -> Iterator[Task]:
    """Return the tasks of a pipeline rank in their order."""
    if layout.stages_per_rank == 1:
        return _one_forward_one_backward(layout.pipeline, rank, micro_batches)
    return _dualpipev(layout.pipeline, rank, micro_batches)


def _one_forward_one_backward(ranks: int, rank: int, micro_batches: int) -> Iterator[Task]:
    """Yield the 1F1B order (Narayanan et al., arXiv 2104.04473, figure 4)."""
    ahead = min(ranks - rank - 1, micro_batches)
    yield from [(True, 0)] * ahead
    yield from [(True, 0), (False, 0)] * (micro_batches - ahead)
    yield from [(False, 0)] * ahead


def _dualpipev(ranks: int, rank: int, micro_batches: int) -> Iterator[Task]:
    """Yield half of DeepSeek-V3's order: a rank has a stage on the way out (0) and on the way back (1)."""
    after = ranks - rank - 1
    out, back = (True, 0), (True, 1)
    d_out, d_back = (False, 0), (False, 1)
    yield from [out] * (2 * after)
    yield from [out, back] * (rank + 1)
    yield from [d_back, back] * after
    yield from [out, d_back, back, d_out] * (micro_batches - 2 * ranks + rank + 1)
    yield from [d_back, back, d_out] * after
    yield from [d_back, d_out] * (rank + 1)
    yield from [d_out] * after


def simulate(
    layout: Layout, forward: Sequence[float], backward: Sequence[float], micro_batches: int
) -> list[Event]:
    """Start every pass when its rank is free and its input has arrived; arguments are seconds by stage."""
    stages, last = len(forward), len(forward) - 1
    waiting = [list(order(layout, rank, micro_batches)) for rank in range(layout.pipeline)]
    place = [0] * layout.pipeline
    counts = [[0, 0] for _ in range(stages)]  # forward and backward passes begun, by stage
    ready: dict[tuple[int, int, bool], float] = {}  # when a pass ended
    free = [0.0] * layout.pipeline
    events: list[Event] = []
    while any(place[rank] < len(waiting[rank]) for rank in range(layout.pipeline)):
        progressed = False
        for rank in range(layout.pipeline):
            while place[rank] < len(waiting[rank]):
                is_forward, chunk = waiting[rank][place[rank]]
                stage = rank if chunk == 0 else stages - 1 - rank
                batch = counts[stage][not is_forward]
                needs = (stage - 1, batch, True) if is_forward else (stage + 1, batch, False)
                if not is_forward and stage == last:
                    needs = (stage, batch, True)
                begins = 0.0 if is_forward and stage == 0 else ready.get(needs)
                if begins is None:
                    break
                start = max(begins, free[rank])
                end = start + (forward[stage] if is_forward else backward[stage])
                events.append(Event(rank, stage, batch, is_forward, start, end))
                ready[stage, batch, is_forward] = free[rank] = end
                counts[stage][not is_forward] += 1
                place[rank] += 1
                progressed = True
        assert progressed, "the orders of the ranks fit together"
    return events
