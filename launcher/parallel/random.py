"""Seeds of dropout masks: equal on tensor ranks that hold the same activations, else independent."""

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import torch

from launcher.parallel.sharding import seed_of


class DropoutRandom:
    """Two sequences of seeds per rank, a seed for each mask: `shared` by the tensor ranks, and `local`.

    Activations between tensor-parallel regions are equal on all tensor ranks, so their dropout masks must be
    equal too. Inside a region (attention heads), and on a shard of the sequence, each tensor rank needs a
    different mask. Both sequences differ between data-parallel ranks and between pipeline stages. Both begin
    anew in every step, so a resumed run has no random state to restore. A recomputation gets the seed of the
    forward pass as an argument, so it draws the same mask.
    """

    def __init__(self, seed: int, *, stage: int, data_rank: int, tensor_rank: int) -> None:
        self.seed, self.step = seed, 0
        self._replica, self._tensor_rank = (stage, data_rank), tensor_rank
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Begin the seeds of the optimizer step `step`."""
        self.step = step
        parts = (self.seed, "dropout", *self._replica, step)
        self._shared = Random(seed_of(*parts))
        self._local = Random(seed_of(*parts, "tensor", self._tensor_rank))

    def shared(self) -> int:
        """Return the seed of the next mask that all tensor ranks draw alike."""
        return self._shared.getrandbits(63)

    def local(self) -> int:
        """Return the seed of the next mask of this tensor rank alone."""
        return self._local.getrandbits(63)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context manager in which torch's default generator of `device` draws from `seed`."""
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        torch.cuda.default_generators[device.index].manual_seed(seed)
    else:
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
