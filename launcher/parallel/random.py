"""Random state for dropout: equal where tensor ranks hold the same activations, independent where not."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from launcher.parallel.sharding import seed_of


class DropoutRandom:
    """Two random states per rank: `shared` over the tensor ranks (the default generator) and `local`.

    Activations between the parallel regions are equal on all tensor ranks, so their masks must be too;
    inside a region (attention heads) and on a sequence-parallel stretch each rank needs a mask of its own.
    Both states differ between data-parallel ranks and pipeline stages, and begin anew with every step: a run
    that is resumed has no random state to restore.
    """

    def __init__(
        self, seed: int, *, stage: int, data_rank: int, tensor_rank: int, device: torch.device
    ) -> None:
        self._seed, self._shared_by, self._tensor_rank = seed, (stage, data_rank), tensor_rank
        self._device = device
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Seed both states for optimizer step `step`."""
        parts = (self._seed, "dropout", *self._shared_by, step)
        torch.manual_seed(seed_of(*parts))
        local = torch.Generator(self._device)
        local.manual_seed(seed_of(*parts, "tensor", self._tensor_rank))
        self._local = local.get_state()

    @contextmanager
    def local(self) -> Iterator[None]:
        """Dropout inside draws from this tensor rank's own state."""
        shared = self._get()
        self._set(self._local)
        try:
            yield
        finally:
            self._local = self._get()
            self._set(shared)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """(forward, recompute) for torch.utils.checkpoint: the recomputation draws the same local masks.

        torch restores the default generator by itself.
        """
        return nullcontext(), self._rewound(self._local)

    @contextmanager
    def _rewound(self, state: torch.Tensor) -> Iterator[None]:
        ahead = self._local
        self._local = state
        try:
            yield
        finally:
            self._local = ahead

    def _get(self) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state()

    def _set(self, state: torch.Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)
