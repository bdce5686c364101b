"""The choices of a router since they were last read: tokens by expert, entropy, and auxiliary losses."""

import torch
from torch import Tensor


class RoutingRecord:
    """Sums over the tokens of training steps, on the device of the router.

    A block that is recomputed is recorded twice. The means and ratios stay the same, and a missing
    row of the block is counted twice.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._sums: Tensor | None = None
        self._rows = 0

    @torch.no_grad()
    def add(self, shares: Tensor, chosen: Tensor, balance: Tensor | float, z: Tensor | float) -> None:
        """Add a micro-batch: shares of the scores (B, T, E), chosen experts (B, T, k), and the two losses."""
        tokens = shares.shape[0] * shares.shape[1]
        entropy = torch.special.entr(shares).sum()
        uses = torch.zeros(self.experts, dtype=torch.float64, device=shares.device)
        uses.scatter_add_(0, chosen.flatten(), uses.new_ones(()).expand(chosen.numel()))
        others = [entropy, torch.as_tensor(tokens), torch.as_tensor(balance), torch.as_tensor(z)]
        others = [number.to(shares.device, torch.float64) for number in (*others, torch.as_tensor(1))]
        added = torch.cat([uses, torch.stack(others)])
        self._sums = added if self._sums is None else self._sums + added

    def add_rows(self, rows: int) -> None:
        """Add a number of rows that the experts of this rank compute, for tokens of all ranks."""
        self._rows += rows

    def take(self, device: torch.device) -> Tensor:
        """Return the sums (E + 6,), and reset them.

        The sums are uses, entropy, tokens, balance loss, z-loss, calls, and rows that experts of this rank
        computed.
        """
        sums, self._sums = self._sums, None
        rows, self._rows = torch.tensor([self._rows], dtype=torch.float64, device=device), 0
        if sums is None:
            sums = torch.zeros(self.experts + 5, dtype=torch.float64, device=device)
        return torch.cat([sums, rows])
