"""Rules of context parallelism. Pure, like validate.py."""

import math

from launcher.config import shape
from launcher.config.errors import refusal, settings
from launcher.config.schema import ContextMethod, InputKind, RunConfig
from launcher.config.sequence_order import chunks_per_rank
from launcher.config.world import World

_OFF = "parallelism.context=1"


def check_context(run: RunConfig) -> None:
    """Check that the run's sequences and, under ulysses, its heads can be split over the context ranks."""
    p = run.parallelism
    if p.context == 1:
        return
    if run.model.inputs is InputKind.patches:
        why = "image classifiers cannot use context ranks: their sequences are short"
        raise refusal(run, "parallelism.context", why, _OFF)
    _check_heads(run)
    _check_length(run)


def _check_heads(run: RunConfig) -> None:
    p, heads = run.parallelism, run.model.num_heads // run.parallelism.tensor
    if p.context_method is not ContextMethod.ulysses or heads % p.context == 0:
        return
    why = f"{heads} attention heads of a tensor rank cannot be split over {p.context} context ranks"
    fewer = [size for size in shape.divisors(heads) if 1 < size < p.context]
    remedies = "parallelism.context_method=ring", *settings("parallelism.context", fewer[-1:])
    raise refusal(run, "parallelism.context_method", why, *remedies)


def _check_length(run: RunConfig) -> None:
    p, length, longest = run.parallelism, shape.sequence_length(run), run.model.max_sequence_length
    multiple = length_multiple(run)
    if length % multiple == 0:
        return
    parts = f"{p.context} context ranks"
    if chunks_per_rank(p.context_method) > 1:
        parts += f", each with {chunks_per_rank(p.context_method)} chunks of the sequence"
    if p.sequence_parallel:
        parts += f", with sequence parallelism over {p.tensor} tensor ranks"
    lengths = [n for n in shape.multiples_around(length, multiple) if n <= longest]
    fitting = [
        size
        for size in range(2, p.context)
        if length % (multiple // p.context * size) == 0 and _splits_heads(run, size)
    ]
    remedies = [*settings("data.sequence_length", lengths), *settings("parallelism.context", fitting[-1:])]
    why = f"the sequence length {length} is not a multiple of {multiple}: {parts}"
    raise refusal(run, "parallelism.context", why, *(remedies or [_OFF]))


def _splits_heads(run: RunConfig, context: int) -> bool:
    if run.parallelism.context_method is not ContextMethod.ulysses:
        return True
    return run.model.num_heads // run.parallelism.tensor % context == 0


def length_multiple(run: RunConfig) -> int:
    """Return the number that must divide the sequence length under context and sequence parallelism.

    Each chunk has whole tokens, and sequence parallelism splits the tokens of a context rank again.
    """
    p = run.parallelism
    chunks = 1 if p.context == 1 else chunks_per_rank(p.context_method)
    return p.context * (math.lcm(chunks, p.tensor) if p.sequence_parallel else chunks)


def check_context_on_nodes(run: RunConfig, world: World) -> None:
    """Check that each context group is on one node: its ranks exchange keys and values in every layer."""
    p, per_node = run.parallelism, world.ranks_per_node
    together = p.context * p.tensor
    if p.context == 1 or world.nodes == 1 or per_node % together == 0:
        return
    ranks = f"context {p.context} x tensor {p.tensor} = {together} ranks"
    why = f"{ranks} do not fit into nodes of {per_node} ranks"
    fewer = [n for n in shape.divisors(p.context) if 1 < n < p.context and per_node % (n * p.tensor) == 0]
    tensor = [n for n in shape.divisors(p.tensor)[:-1] if per_node % (n * p.context) == 0]
    if p.sequence_parallel:
        tensor = [n for n in tensor if n > 1]
    remedies = [*settings("parallelism.context", fewer[-1:]), *settings("parallelism.tensor", tensor[-1:])]
    raise refusal(run, "parallelism.context", why, *(remedies or [_OFF]))
