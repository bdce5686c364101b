"""Check the dropout masks of a layout.

Masks depend on the layout by design, so no tensor can be compared with the reference. Three properties are
checked instead: which ranks draw the same masks, whether recomputation repeats the mask of the forward pass,
and which share of the elements is dropped.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from math import inf, sqrt
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from launcher.config.layout import Layout
from launcher.config.schema import ActivationCheckpointing, RunConfig
from launcher.parallel.mesh import MeshShape
from launcher.parity.differences import Difference

_States = dict[str, list[str]]  # hashes of the random states of a rank's draws, by kind of mask
DRAWS, NEXT_DRAWS = "draws", "next-draws"  # files of the masks of two consecutive steps
DEVIATIONS = 5.0  # standard deviations of a binomial: a false alarm once in a few million runs

MEANINGS = {
    "attention masks are shared by tensor ranks": "every tensor rank drops the same attention weights in "
    "its heads: each rank needs its own random state there",
    "hidden masks differ between tensor ranks": "activations that all tensor ranks hold are dropped "
    "differently on each rank: the ranks must share a random state there",
    "hidden masks are shared by tensor ranks": "under sequence parallelism every sequence shard is dropped "
    "at the same places: each rank needs its own random state there",
    "masks are shared by data ranks": "data ranks drop the same places in different samples: their random "
    "states are equal",
    "masks are shared by stages": "pipeline stages draw from the same random state",
    "masks are drawn twice": "two layers or micro-batches of one rank drop the same places: a random state "
    "is used twice",
    "masks repeat in the next step": "a step draws the masks of the step before: the seeds do not depend on "
    "the step",
    "recomputed masks differ": "activation checkpointing recomputes with other masks than the forward pass "
    "used",
    "attention masks are missing": "a layer drops no attention weights",
    "the share dropped is not model.dropout": "dropout uses another probability, or is missing from a layer",
}


@dataclass(frozen=True)
class Draw:
    """One drawn mask. Two draws with the same random state and size are the same mask."""

    kind: str  # hidden or attention
    state: str  # hash of the random state before the draw
    dropped: int
    size: int


@contextmanager
def recorded_draws() -> Iterator[list[Draw]]:
    """Record every dropout mask that this process draws while the context is open."""
    draws: list[Draw] = []
    functional: Any = F
    dropout, attention = functional.dropout, functional.scaled_dot_product_attention

    def recording_dropout(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        state = _state()
        y: Tensor = dropout(x, *arguments, **options)
        # Attention with a soft cap drops weights (B, heads, T, T) itself.
        kind = "attention" if x.dim() == 4 else "hidden"
        draws.append(Draw(kind, state, int((y == 0).sum() - (x == 0).sum()), x.numel()))
        return y

    def recording_attention(*inputs: Tensor, dropout_p: float = 0.0, **options: Any) -> Tensor:
        if dropout_p:
            draws.append(Draw("attention", _state(), 0, 0))
        return cast(Tensor, attention(*inputs, dropout_p=dropout_p, **options))

    functional.dropout, functional.scaled_dot_product_attention = recording_dropout, recording_attention
    try:
        yield draws
    finally:
        functional.dropout, functional.scaled_dot_product_attention = dropout, attention


def _state() -> str:
    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()


def write_draws(draws: list[Draw], path: Path) -> None:
    """Gather the draws of all ranks; rank 0 writes them to `path`. Collective over the world."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, [asdict(draw) for draw in draws])
    if dist.get_rank() == 0:
        path.write_text(json.dumps(by_rank))


def read_draws(path: Path) -> list[list[Draw]]:
    """Return the draws of each rank."""
    return [[Draw(**draw) for draw in draws] for draws in json.loads(path.read_text())]


def compare_draws(run: RunConfig, layout: Layout, draws: list[list[Draw]]) -> list[Difference]:
    """Return one difference per property of the masks, given the draws of each rank.

    A violated property has an infinite difference; the dropped share has a measured one.
    """
    states = [
        {kind: [draw.state for draw in rank_draws if draw.kind == kind] for kind in ("hidden", "attention")}
        for rank_draws in draws
    ]
    # Reported in this order, before the others.
    names = ["masks are drawn twice", "recomputed masks differ", "attention masks are missing"]
    names += ["masks are shared by data ranks"] if layout.gradient_ranks > 1 else []
    names += ["masks are shared by stages"] if layout.pipeline > 1 else []
    violations: Counter[str] = Counter(dict.fromkeys(names, 0))
    _count_shared_masks(run, layout, states, violations)
    _count_repeated_masks(run, layout, states, violations)
    violations["attention masks are missing"] += _pipelines_without_masks(run, layout, states)
    share = Difference(1, "dropout", "the share dropped is not model.dropout", *_share(run, draws))
    measured = {name: inf if count else 0.0 for name, count in violations.items()}
    return [*(Difference(1, "dropout", name, value, 1.0) for name, value in measured.items()), share]


def compare_next(draws: list[list[Draw]], following: list[list[Draw]]) -> Difference:
    """Return whether a rank draws a mask of the step before again."""
    pairs = zip(draws, following, strict=True)
    repeats = any({d.state for d in first} & {d.state for d in second} for first, second in pairs)
    return Difference(2, "dropout", "masks repeat in the next step", inf if repeats else 0.0, 1.0)


def _count_shared_masks(
    run: RunConfig, layout: Layout, states: list[_States], violations: Counter[str]
) -> None:
    """Count the pairs of ranks that share masks but should not, and the reverse."""
    shape = MeshShape.of(layout)
    for first, second in combinations(range(shape.world_size), 2):
        (stage, data, _), (other_stage, other_data, _) = shape.coordinates(first), shape.coordinates(second)
        a, b = states[first], states[second]
        shared = {kind: not set(a[kind]).isdisjoint(b[kind]) for kind in a}
        if stage != other_stage:
            violations["masks are shared by stages"] += any(shared.values())
        elif data != other_data:
            violations["masks are shared by data ranks"] += any(shared.values())
        else:
            violations["attention masks are shared by tensor ranks"] += shared["attention"]
            if run.parallelism.sequence_parallel:
                violations["hidden masks are shared by tensor ranks"] += shared["hidden"]
            else:
                violations["hidden masks differ between tensor ranks"] += a["hidden"] != b["hidden"]


def _draws_per_mask(checkpointing: ActivationCheckpointing, layout: Layout) -> int:
    """Return how often a step draws an attention mask: again for each recomputation of the attention.

    In a compiled block, attention with dropout draws its mask again in the backward pass
    (launcher/models/dropout.py), and selective recomputation adds no draw. Attention over context ranks draws
    its mask again too (models/context_attention.py).
    """
    if layout.context > 1:
        is_selective = checkpointing is ActivationCheckpointing.selective and not layout.compiled
        return 2 + (is_selective or checkpointing is ActivationCheckpointing.full)
    recomputes = checkpointing is not ActivationCheckpointing.none
    if not layout.compiled:
        return 1 + recomputes
    return 2 + (checkpointing is ActivationCheckpointing.full)


def _count_repeated_masks(
    run: RunConfig, layout: Layout, states: list[_States], violations: Counter[str]
) -> None:
    """Count ranks that draw an attention mask too often or, under recomputation, not often enough."""
    draws_per_mask = _draws_per_mask(run.parallelism.activation_checkpointing, layout)
    for rank_states in states:
        times = Counter(rank_states["attention"]).values()
        violations["masks are drawn twice"] += any(count > draws_per_mask for count in times)
        violations["recomputed masks differ"] += any(count < draws_per_mask for count in times)


def _pipelines_without_masks(run: RunConfig, layout: Layout, states: list[_States]) -> int:
    """Return how many pipelines draw fewer attention masks than one per layer and micro-batch."""
    shape, drawn = MeshShape.of(layout), Counter[tuple[int, int]]()
    for rank, rank_states in enumerate(states):
        _, data, tensor = shape.coordinates(rank)
        drawn[data, tensor] += len(set(rank_states["attention"]))
    return sum(masks < run.model.num_layers * layout.accumulation for masks in drawn.values())


def _share(run: RunConfig, draws: list[list[Draw]]) -> tuple[float, float]:
    """Return the distance of the dropped share from model.dropout, and its bound. Each mask counts once."""
    unique = {d.state: d for rank_draws in draws for d in rank_draws if d.kind == "hidden"}.values()
    size, p = sum(d.size for d in unique), run.model.dropout
    if size == 0:
        return inf, 1.0
    return abs(sum(d.dropped for d in unique) / size - p), DEVIATIONS * sqrt(p * (1 - p) / size)
