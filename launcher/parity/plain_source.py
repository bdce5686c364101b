"""A source of samples as the reference reads it: one sample after the other, by its place in the file."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Sample = tuple[
    Tensor, Tensor
]  # inputs and labels: tokens (T,) twice, or an image (C, S, S) and its class (1,)


@dataclass(frozen=True)
class PlainSource:
    """The samples of an epoch and the validation samples: functions that read a place, and their numbers."""

    train: Callable[[int], Sample]
    samples: int  # of an epoch
    validation: Callable[[int], Sample]
    held_out: int
