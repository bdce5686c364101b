"""Random state for dropout: equal on tensor ranks that hold the same activations, else independent."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from launcher.parallel.sharding import seed_of


class DropoutRandom:
    """Two random states per rank: `shared` by the tensor ranks (torch's default generator) and `local`.

    Activations between tensor-parallel regions are equal on all tensor ranks, so their dropout masks must be
    equal too. Inside a region (attention heads), and on a shard of the sequence, each tensor rank needs a
    different mask. Both states differ between data-parallel ranks and between pipeline stages. Both are
    seeded again for every step, so a resumed run has no random state to restore.
    """

    def __init__(
        self, seed: int, *, stage: int, data_rank: int, tensor_rank: int, device: torch.device
    ) -> None:
        self._seed, self._replica, self._tensor_rank = seed, (stage, data_rank), tensor_rank
        self._device = device
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Seed both states for the optimizer step `step`."""
        parts = (self._seed, "dropout", *self._replica, step)
        torch.manual_seed(seed_of(*parts))
        local = torch.Generator(self._device)
        local.manual_seed(seed_of(*parts, "tensor", self._tensor_rank))
        self._local = local.get_state()

    @contextmanager
    def local(self) -> Iterator[None]:
        """Context manager in which dropout draws from this tensor rank's local state."""
        shared = self._get()
        self._set(self._local)
        try:
            yield
        finally:
            self._local = self._get()
            self._set(shared)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts of forward and recomputation: equal local masks (torch restores the shared)."""
        return nullcontext(), self._rewound(self._local)

    @contextmanager
    def _rewound(self, state: torch.Tensor) -> Iterator[None]:
        current = self._local
        self._local = state
        try:
            yield
        finally:
            self._local = current

    def _get(self) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state()

    def _set(self, state: torch.Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)
