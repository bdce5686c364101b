"""Dropout's masks. Another layout draws others by design, so no tensor can be compared: what is checked is
which ranks draw alike, whether a recomputed mask is the one of the forward pass, and how much is dropped.
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
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from launcher.config.layout import Layout
from launcher.config.schema import ActivationCheckpointing, RunConfig
from launcher.parallel.mesh import MeshShape
from launcher.parity.diagnose import Diagnosis
from launcher.parity.differences import Difference

DEVIATIONS = 5.0  # of a binomial: false once in a few million runs

MEANINGS = {
    "attention masks are shared by tensor ranks": "every tensor rank drops the same weights of its heads: it "
    "needs a random state of its own there",
    "hidden masks differ between tensor ranks": "what all tensor ranks hold alike is dropped differently on "
    "each: it needs a state that they share",
    "hidden masks are shared by tensor ranks": "under sequence parallelism every stretch of the sequence is "
    "dropped alike: it needs a state of its own",
    "masks are shared by data ranks": "data ranks drop the same places of their different samples",
    "masks are shared by stages": "pipeline stages draw from the same random state",
    "masks are drawn twice": "layers or micro-batches of one rank drop the same places",
    "recomputed masks differ": "activation checkpointing recomputes with other masks than the forward pass's",
    "the share dropped is not model.dropout": "another probability, or dropout left out of training",
}


@dataclass(frozen=True)
class Draw:
    """One mask: two draws of one state and size are the same mask."""

    kind: str  # hidden or attention
    state: str
    dropped: int
    size: int


@contextmanager
def recorded_draws() -> Iterator[list[Draw]]:
    """Every dropout of this process, as it happens."""
    draws: list[Draw] = []
    functional: Any = F
    dropout, attention = functional.dropout, functional.scaled_dot_product_attention

    def recording_dropout(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        state = _state()
        y: Tensor = dropout(x, *arguments, **options)
        draws.append(Draw("hidden", state, int((y == 0).sum() - (x == 0).sum()), x.numel()))
        return y

    def recording_attention(*inputs: Tensor, dropout_p: float = 0.0, **options: Any) -> Tensor:
        if dropout_p:
            draws.append(Draw("attention", _state(), 0, 0))
        mixed: Tensor = attention(*inputs, dropout_p=dropout_p, **options)
        return mixed

    functional.dropout, functional.scaled_dot_product_attention = recording_dropout, recording_attention
    try:
        yield draws
    finally:
        functional.dropout, functional.scaled_dot_product_attention = dropout, attention


def _state() -> str:
    return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()


def write_draws(draws: list[Draw], path: Path) -> None:
    """Those of all ranks, by rank 0. Collective over the world."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [asdict(draw) for draw in draws])
    if dist.get_rank() == 0:
        path.write_text(json.dumps(every))


def read_draws(path: Path) -> list[list[Draw]]:
    """By rank."""
    return [[Draw(**draw) for draw in draws] for draws in json.loads(path.read_text())]


def compare_draws(run: RunConfig, layout: Layout, draws: list[list[Draw]]) -> list[Difference]:
    """What is wrong is infinitely far beyond its bound; the share that is dropped is measured."""
    shape = MeshShape(layout.pipeline, layout.data, layout.tensor)
    checkpointing = run.parallelism.activation_checkpointing
    found: Counter[str] = Counter(dict.fromkeys(_expected(run, layout), 0))
    states = [
        {kind: [d.state for d in own if d.kind == kind] for kind in ("hidden", "attention")} for own in draws
    ]
    for one, other in combinations(range(shape.world_size), 2):
        (stage, data, _), (other_stage, other_data, _) = shape.coordinates(one), shape.coordinates(other)
        shared = {kind: not set(states[one][kind]).isdisjoint(states[other][kind]) for kind in states[one]}
        if stage != other_stage:
            found["masks are shared by stages"] += any(shared.values())
        elif data != other_data:
            found["masks are shared by data ranks"] += any(shared.values())
        else:
            found["attention masks are shared by tensor ranks"] += shared["attention"]
            if run.parallelism.sequence_parallel:
                found["hidden masks are shared by tensor ranks"] += shared["hidden"]
            else:
                found["hidden masks differ between tensor ranks"] += (
                    states[one]["hidden"] != states[other]["hidden"]
                )
    recomputed = 1 if checkpointing is ActivationCheckpointing.none else 2
    for own in states:
        times = Counter(own["attention"]).values()
        found["masks are drawn twice"] += any(count > recomputed for count in times)
        found["recomputed masks differ"] += any(count < recomputed for count in times)
    share = Difference(1, "dropout", "the share dropped is not model.dropout", *_share(run, draws))
    return [Difference(1, "dropout", name, inf if wrong else 0.0, 1.0) for name, wrong in found.items()] + [
        share
    ]


def _expected(run: RunConfig, layout: Layout) -> list[str]:
    names = ["masks are drawn twice", "recomputed masks differ"]
    names += ["masks are shared by data ranks"] if layout.data > 1 else []
    names += ["masks are shared by stages"] if layout.pipeline > 1 else []
    return names


def _share(run: RunConfig, draws: list[list[Draw]]) -> tuple[float, float]:
    """(how far the dropped share is from the probability, how far it may be). Each mask counts once."""
    unique = {d.state: d for own in draws for d in own if d.kind == "hidden"}.values()
    size, p = sum(d.size for d in unique), run.model.dropout
    if size == 0:
        return inf, 1.0
    return abs(sum(d.dropped for d in unique) / size - p), DEVIATIONS * sqrt(p * (1 - p) / size)


def diagnose_draws(failed: list[Difference]) -> Diagnosis:
    return Diagnosis(failed[0].name, MEANINGS[failed[0].name])
