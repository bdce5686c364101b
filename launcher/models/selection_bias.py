"""Balancing without a loss: a bias of each expert, for the choice alone (DeepSeek-V3, arXiv 2412.19437).

After each optimizer step the bias of an expert that fewer tokens than the mean chose grows by a fixed amount,
and that of the others shrinks (arXiv 2408.15664). It has no gradient, and is part of no weighted sum.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor


class SelectionBias:
    """The biases of the experts of a layer (E,), in fp32 and alike on all ranks of a pipeline stage.

    It is no parameter and no buffer: DeepSpeed would cast it to bf16, in which small steps are lost.
    """

    def __init__(self, name: str, experts: int, speed: float, device: torch.device) -> None:
        self.logical, self.speed = LogicalTensor(name, (experts,)), speed
        self.value = torch.zeros(experts, device=device)
        self._uses = torch.zeros(experts, device=device)  # of this rank since the last update

    @torch.no_grad()
    def record(self, chosen: Tensor) -> None:
        """Count the chosen experts (B, T, k). A recomputed block counts twice, for all experts alike."""
        self._uses.scatter_add_(0, chosen.flatten(), self._uses.new_ones(()).expand(chosen.numel()))

    def take_uses(self) -> Tensor:
        uses, self._uses = self._uses, torch.zeros_like(self._uses)
        return uses


def selection_biases(module: nn.Module) -> Iterator[SelectionBias]:
    """Yield the biases of all layers of a module that have them."""
    for each in module.modules():
        if isinstance(bias := getattr(each, "selection_bias", None), SelectionBias):
            yield bias


@torch.no_grad()
def balance(module: nn.Module, data: Axis, is_kept: Tensor) -> None:
    """Update all biases after an optimizer step; not after a skipped step, in which `is_kept` is 0.

    Collective over the data group: one all-reduce of the uses of all experts of this stage.
    """
    biases = list(selection_biases(module))
    if not biases:
        return
    uses = torch.stack([bias.take_uses() for bias in biases])
    if data.size > 1:
        dist.all_reduce(uses, group=data.group)
    for bias, of_layer in zip(biases, uses, strict=True):
        bias.value += bias.speed * is_kept * torch.sign(of_layer.mean() - of_layer)
