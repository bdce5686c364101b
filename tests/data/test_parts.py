"""A context rank reads its part of each sample: of the inputs, and of the labels, which come one later."""

import numpy as np
import pytest

from launcher.config.schema import ContextMethod
from launcher.config.sequence_order import part_of
from launcher.data.blend import Blend, Segment
from launcher.data.sampler import Samples
from launcher.data.windows import Stretch, Windows

LENGTH = 12


class Counted:
    """Tokens that count how many of them are read."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.read = tokens, 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> np.ndarray:
        self.read += len(self.tokens[part])
        return self.tokens[part]


def windows(seed: int = 0) -> tuple[Windows, Counted]:
    tokens = Counted(np.random.default_rng(seed).permutation(20 * LENGTH + 1))
    return Windows([Stretch(tokens)], LENGTH), tokens  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ContextMethod)
def test_parts_make_up_the_sample_with_labels_shifted_before(method: ContextMethod) -> None:
    items, tokens = windows()
    places = np.array([3, 0, 17])
    whole = items.read(places)
    assert isinstance(whole, np.ndarray)
    for rank in range(2):
        part, tokens.read = part_of(LENGTH, rank, 2, method), 0
        order = [position for each in part for position in each]
        inputs, labels = items.read(places, part)
        assert (inputs == whole[:, :-1][:, order]).all()
        assert (labels == whole[:, 1:][:, order]).all()
        assert tokens.read == len(places) * (LENGTH // 2 + len(part))  # and no token of other parts


def test_parts_of_a_blend() -> None:
    sources = {name: Samples(windows(seed)[0], None) for seed, name in enumerate(("a", "b"))}
    blend = Blend(sources, [Segment(0, {"a": 2.0, "b": 1.0})])
    indices, part = np.arange(6), part_of(LENGTH, 1, 2, ContextMethod.ring)
    whole = blend.take(indices)
    assert isinstance(whole, np.ndarray)
    order = [position for each in part for position in each]
    inputs, labels = blend.take(indices, part)
    assert (inputs == whole[:, :-1][:, order]).all()
    assert (labels == whole[:, 1:][:, order]).all()
