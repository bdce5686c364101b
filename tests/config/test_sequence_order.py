"""Which tokens each context rank holds: all tokens once, and causal work that is balanced."""

import pytest

from launcher.config.schema import ContextMethod
from launcher.config.sequence_order import Part, part_of


def scores(part: Part) -> int:
    """Return how many scores a rank computes under causal attention."""
    return sum(position + 1 for each in part for position in each)


@pytest.mark.parametrize("method", ContextMethod)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_the_ranks_hold_each_token_once(ranks: int, method: ContextMethod) -> None:
    length = 16 * ranks
    parts = [part_of(length, rank, ranks, method) for rank in range(ranks)]
    held = [position for part in parts for each in part for position in each]
    assert sorted(held) == list(range(length))
    assert {sum(map(len, part)) for part in parts} == {length // ranks}


@pytest.mark.parametrize("method", [ContextMethod.ring, ContextMethod.gather])
def test_every_rank_computes_as_many_scores(method: ContextMethod) -> None:
    assert len({scores(part_of(96, rank, 4, method)) for rank in range(4)}) == 1


def test_zigzag() -> None:
    assert part_of(16, 0, 4, ContextMethod.ring) == (range(0, 2), range(14, 16))
    assert part_of(16, 3, 4, ContextMethod.ring) == (range(6, 8), range(8, 10))
    assert part_of(16, 3, 4, ContextMethod.ulysses) == (range(12, 16),)
