"""Record the experts that each token chooses in the training steps of a layout."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.engine.base import Engine
from launcher.models.experts import Experts
from launcher.parallel.context import ContextParallel
from launcher.parity.step_trace import Weights


class ChoiceRecorder:
    """Records the choices of every router of this stage, in all micro-batches of a step."""

    def __init__(self, engine: Engine, context: ContextParallel | None) -> None:
        self.mesh, self.context = engine.mesh, context
        self._chosen: dict[str, list[Tensor]] = {}
        for layer in (module for module in engine.module.modules() if isinstance(module, Experts)):
            name = f"blocks.{layer.layer}.mlp.router"
            layer.record.add = partial(self._add, name, layer.record.add)  # type: ignore[method-assign]

    def start(self) -> None:
        """Discard the records of the previous step."""
        self._chosen = {}

    def choices(self) -> Weights:
        """Return the chosen experts (G, T, k) of the global batch. All-gathers over the data group."""
        return {name: self._whole(torch.stack(parts)) for name, parts in sorted(self._chosen.items())}

    def _add(self, name: str, right: Any, shares: Tensor, chosen: Tensor, *losses: Any) -> None:
        if torch._C._current_graph_task_id() < 0:  # else a backward pass runs, and recomputes the block
            self._chosen.setdefault(name, []).append(chosen.cpu())
        right(shares, chosen, *losses)

    def _whole(self, chosen: Tensor) -> Tensor:
        """Return (G, T, k) of the global batch, from the choices (micro-batches, B, T/C, k) of all ranks."""
        size = self.mesh.context.size
        by_rank: list[Tensor] = [chosen] * self.mesh.data.size
        dist.all_gather_object(by_rank, chosen, group=self.mesh.data.group)
        of_samples = [torch.stack(by_rank[i : i + size]) for i in range(0, len(by_rank), size)]
        whole = [
            parts[0] if self.context is None else self.context.in_order(parts, 2) for parts in of_samples
        ]
        # Micro-batch m of data rank r is the (m D + r)-th of the global batch, of D data ranks.
        return torch.stack(whole, 1).flatten(0, 2)
