"""Repeat a step without its update, and find its first value that is not finite or far too large.

The repeated step reads each layer's output and gradient back from the device, so it is slow. It changes
nothing: not the weights, not the optimizer states, not fp16's loss scale.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.engine.base import Engine, MicroBatches
from launcher.engine.optimizer import is_trained
from launcher.engine.update_guard import LARGEST_NORM
from launcher.parallel.sharding import logical_of


@dataclass(frozen=True)
class BadValue:
    """The first value of a step that is not usable, on one rank."""

    name: str  # such as "the output of blocks.1.mlp.up"
    micro_batch: int  # of this data rank, from 0
    is_gradient: bool
    stage: int
    data_rank: int  # with the context ranks: see ProcessMesh.data
    rank: int

    @property
    def order(self) -> tuple[int, bool, int, int]:
        """Sorts the bad values of several ranks as they arose: forwards through the stages, then back."""
        return self.micro_batch, self.is_gradient, -self.stage if self.is_gradient else self.stage, self.rank


def first_bad_value(
    engine: Engine, step: int, batches: MicroBatches, labels: int | None = None
) -> BadValue | None:
    """Repeat a step with this data rank's micro-batches; return the first bad value. Collective, world.

    `labels` as in Engine.train_batch.
    """
    observer = _Observer(engine)
    engine.random.begin_step(step)
    try:
        with engine.guard.rehearsal(), engine.blocks.eager():
            engine.train_batch(batches, labels)
    finally:
        observer.remove()
    bad_values: list[BadValue | None] = [None] * dist.get_world_size()
    dist.all_gather_object(bad_values, observer.first)
    return min((bad for bad in bad_values if bad), key=lambda bad: bad.order, default=None)


class _Observer:
    """Looks at the output, the output's gradient and the weight's gradient of each layer with a weight."""

    def __init__(self, engine: Engine) -> None:
        self.first: BadValue | None = None
        self._mesh, self._seen = engine.mesh, Counter[tuple[str, bool]]()
        self._hooks = []
        for module in engine.module.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter):
                name = logical_of(weight).name
                hook = self._at_output(name.removesuffix(".weight"))
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        for parameter in filter(is_trained, engine.module.parameters()):
            at_gradient = self._at_gradient(f"the gradient of {logical_of(parameter).name}")
            self._hooks.append(parameter.register_hook(at_gradient))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _at_output(self, layer: str) -> Callable[[nn.Module, Any, dict[str, Any], Tensor], None]:
        def look(_module: nn.Module, _inputs: Any, options: dict[str, Any], output: Tensor) -> None:
            # A tied embedding runs twice in a micro-batch, the second time as the head.
            name = f"the output of {'head' if 'labels' in options else layer}"
            # Activation checkpointing runs a layer first without, then with gradients: two separate counts.
            self._look(output, name, f"{name} {torch.is_grad_enabled()}", is_gradient=False)
            if output.requires_grad:
                output.register_hook(self._at_gradient(f"the gradient of {name}"))

        return look

    def _at_gradient(self, name: str) -> Callable[[Tensor], None]:
        return lambda gradient: self._look(gradient, name, name, is_gradient=True)

    def _look(self, value: Tensor, name: str, counter: str, *, is_gradient: bool) -> None:
        micro_batch = self._seen[counter, is_gradient]
        self._seen[counter, is_gradient] += 1
        if self.first is None and not torch.linalg.vector_norm(value.detach().float()) <= LARGEST_NORM:
            mesh = self._mesh
            self.first = BadValue(name, micro_batch, is_gradient, mesh.stage, mesh.data.rank, mesh.rank)


def micro_batch_losses(
    engine: Engine, step: int, batches: MicroBatches, labels: int | None = None
) -> tuple[list[float], float]:
    """Repeat a step; return the loss of each of this rank's micro-batches, and the gradient norm. Collective.

    Ranks of a pipeline stage that computes no loss return no losses. `labels` as in Engine.train_batch.
    """
    losses, right = [], getattr(engine.module, engine.loss_name)

    def kept(x: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = right(x, labels)
        losses.append(float(loss.detach()))
        return loss

    setattr(engine.module, engine.loss_name, kept)
    engine.random.begin_step(step)
    try:
        with engine.guard.rehearsal():
            result = engine.train_batch(batches, labels)
    finally:
        setattr(engine.module, engine.loss_name, right)
    return losses, float(result.grad_norm)
