"""Which tokens of a sequence each context-parallel rank holds. Pure arithmetic.

Under ring and gather a sequence is cut into 2C chunks for C ranks, and rank r holds chunks r and 2C-1-r, in
this order (zigzag): under causal attention every rank then computes the same number of scores. Under ulysses
each rank computes attention over whole sequences for some heads, and rank r holds the r-th of C chunks.
"""

from launcher.config.schema import ContextMethod

Part = tuple[range, ...]  # positions of a sequence, in the order in which a rank holds them


def chunks_per_rank(method: ContextMethod) -> int:
    return 1 if method is ContextMethod.ulysses else 2


def chunks_of(rank: int, ranks: int, method: ContextMethod) -> tuple[int, ...]:
    """Return the chunks that a context rank holds, in its order; chunks count from the sequence's start."""
    return (rank,) if method is ContextMethod.ulysses else (rank, 2 * ranks - 1 - rank)


def part_of(length: int, rank: int, ranks: int, method: ContextMethod) -> Part:
    """Return the positions of a sequence of `length` tokens that a context rank holds."""
    chunks = ranks * chunks_per_rank(method)
    assert length % chunks == 0, "validated with the config"
    size = length // chunks
    return tuple(range(chunk * size, (chunk + 1) * size) for chunk in chunks_of(rank, ranks, method))
