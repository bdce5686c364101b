"""Score windows of tokens on all ranks of an engine, in any layout."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch.distributed as dist

from launcher.config.context_rules import length_multiple
from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import RunConfig
from launcher.data.evaluated import Window
from launcher.data.sampler import part_of_pair
from launcher.engine.base import Engine
from launcher.engine.scoring import TokenScores, token_scores
from launcher.parallel.context import context_of

Batch = tuple[np.ndarray, np.ndarray]  # tokens and labels (B, T)


@dataclass(frozen=True)
class Score:
    """The scored labels of a window."""

    loss: float  # nats, summed
    labels: int
    is_greedy: bool  # whether each label is the likeliest token
    likeliest: int  # token after the last input


class Scorer:
    """Scores windows in rounds: a round is a micro-batch for each data rank and pipeline stage."""

    def __init__(self, engine: Engine, run: RunConfig) -> None:
        self._engine, self._micro_batch = engine, run.training.micro_batch_size
        self._batches = engine.layout.accumulation
        self._context = context_of(engine.mesh.context, run.parallelism.context_method)
        # Sequence and context parallelism divide the tokens of a window among ranks.
        self._multiple = length_multiple(run)

    def scores(self, windows: Iterable[Window]) -> list[Score]:
        """Return the score of each window, on every rank. Every rank gives the same windows. Collective."""
        size = self._micro_batch * self._batches * self._engine.mesh.batch.size
        scores: dict[int, Score] = {}
        for number, batch in enumerate(_groups(windows, size)):
            scores |= {number * size + place: score for place, score in self._round(batch).items()}
        gathered: list[dict[int, Score]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, scores)
        everything = {place: score for part in gathered for place, score in part.items()}
        return [everything[place] for place in range(len(everything))]

    def _round(self, windows: Sequence[Window]) -> dict[int, Score]:
        """Return the scores of this rank's share of the windows, by place. Collective over the world."""
        length = max(len(window.tokens) for window in windows) - 1
        length = -(-length // self._multiple) * self._multiple
        axis = self._engine.mesh.batch
        places = np.arange(self._batches * axis.size * self._micro_batch)
        shares = places.reshape(self._batches, axis.size, self._micro_batch)[:, axis.rank]
        batches = [_batch(windows, share, length) for share in shares]
        scores: dict[int, Score] = {}
        for share, (losses, likeliest), (_, labels) in zip(
            shares, self._token_scores(batches, length), batches, strict=False
        ):
            # All tensor and context ranks have the same scores.
            if self._engine.mesh.tensor.rank == self._engine.mesh.context.rank == 0:
                rows = zip(
                    share.tolist(),
                    losses.double().cpu().numpy(),
                    likeliest.cpu().numpy(),
                    labels,
                    strict=True,
                )
                scores |= {row[0]: _score(windows[row[0]], *row[1:]) for row in rows if row[0] < len(windows)}
        return scores

    def _token_scores(self, batches: list[Batch], length: int) -> list[TokenScores]:
        """Return losses and likeliest tokens (B, T) of each micro-batch. Collective over the world."""
        context = self._context
        if context is None:
            return token_scores(self._engine, batches)
        parts = [part_of_pair(*batch, context.part(length)) for batch in batches]
        scores = token_scores(self._engine, parts)
        return [(context.whole(losses), context.whole(likeliest)) for losses, likeliest in scores]


def _groups(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    iterator = iter(windows)
    while group := list(islice(iterator, size)):
        yield group


def _batch(windows: Sequence[Window], places: np.ndarray, length: int) -> Batch:
    """Return tokens and labels (B, T) of the windows at `places`; labels that are not scored are ignored.

    Padding stands at the end, where no scored position attends to it.
    """
    tokens = np.zeros((len(places), length), np.int64)
    labels = np.full((len(places), length), IGNORED_LABEL, np.int64)
    for row, place in enumerate(places.tolist()):
        if place < len(windows):
            window = windows[place]
            count = len(window.tokens) - 1
            tokens[row, :count] = window.tokens[:-1]
            labels[row, window.first : count] = window.tokens[window.first + 1 :]
            if window.learned is not None:
                labels[row, :count][~window.learned] = IGNORED_LABEL
    return tokens, labels


def _score(window: Window, losses: np.ndarray, likeliest: np.ndarray, labels: np.ndarray) -> Score:
    count = len(window.tokens) - 1
    scored = np.flatnonzero(labels[:count] != IGNORED_LABEL)
    return Score(
        loss=float(losses[scored].sum()),
        labels=len(scored),
        is_greedy=bool((likeliest[scored] == labels[scored]).all()),
        likeliest=int(likeliest[count - 1]),
    )
