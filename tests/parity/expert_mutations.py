"""Deliberate faults of experts, as in mutations.py. `words` are in the name of a quantity that goes wrong."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import launcher.engine.flat as flat
import launcher.engine.gradient_passes as gradient_passes
import launcher.engine.update_guard as update_guard
import launcher.models.expert_losses as expert_losses
import launcher.models.experts as experts
import launcher.models.grouped as grouped
from launcher.config.schema import RouterKind
from launcher.parallel.mesh import Axis, ProcessMesh
from launcher.parallel.sharding import LogicalTensor, logical_of
from tests.parity.mutations import Mutation


def router_gradient_not_reduced() -> None:
    """Under sequence parallelism: the router's weight gets the gradient of one shard of the sequence."""

    def forward(self: experts.Router, x: Tensor) -> Tensor:
        return experts.gather_copies_region(F.linear(x, self.weight), self.tp.axis)

    experts.Router.forward = forward  # type: ignore[method-assign]


def weight_gradients_not_reduced() -> None:
    """The weights of the chosen experts get the gradients of one tensor rank's columns."""
    experts.copy_region = lambda x, axis: x


def gathered_logits_reduced_backward() -> None:
    """The gradients of the gathered logits are added up, although every tensor rank has all of them."""
    experts.gather_copies_region = experts_gather


def experts_gather(x: Tensor, axis: Axis) -> Tensor:
    from launcher.parallel.collectives import gather_sequence_region

    return gather_sequence_region(x, axis)


def losses_of_every_micro_batch_whole() -> None:
    """Gradient accumulation multiplies the auxiliary losses."""

    def whole(self: experts.Experts, x: Tensor, loss: Tensor, factor: float) -> Tensor:
        return expert_losses.with_loss(x, loss * factor)

    experts.Experts._with_loss = whole  # type: ignore[method-assign]


def losses_left_out() -> None:
    experts.with_loss = lambda x, loss: x


def balance_over_the_micro_batch() -> None:
    """The product of means over all sequences of a micro-batch, which depends on its size."""
    right = expert_losses.load_balancing_loss

    def joined(shares: Tensor, chosen: Tensor, _context: Axis) -> Tensor:
        return right(shares.flatten(0, 1)[None], chosen.flatten(0, 1)[None])

    experts.load_balancing_loss = joined


def scores_not_normalized() -> None:
    right = experts.Experts._route

    def route(self: experts.Experts, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = right(self, logits)
        scores = logits.softmax(-1) if self.model.experts.router is RouterKind.softmax else logits.sigmoid()
        return weights * scores.gather(-1, chosen).sum(-1, keepdim=True), chosen

    experts.Experts._route = route  # type: ignore[method-assign]


def tokens_over_a_capacity_dropped() -> None:
    """Each expert computes at most the mean number of rows, as with a capacity factor of 1."""
    right = experts.grouped_linear

    def capped(x: Tensor, weights: Tensor, order: grouped.Order) -> Tensor:
        capacity, kept = len(x) // len(order.sizes), []
        for size in order.sizes:
            kept += [row < capacity for row in range(size)]
        return right(x, weights, order) * torch.tensor(kept)[:, None]

    experts.grouped_linear = capped


def expert_gradients_averaged_over_their_holders() -> None:
    """The gradients of experts are divided by the ranks that hold them: too large by the expert size."""
    lighten = gradient_passes.lighten

    def lightened(engine: Any) -> None:
        lighten(engine)
        right: Callable[..., None] = engine.allreduce_and_copy
        engine.allreduce_and_copy = lambda bucket, group, *_: right(bucket, group, dist.get_world_size(group))

    import launcher.engine.base as base

    base.lighten = lightened


def norm_of_the_experts_of_one_rank() -> None:
    """Each rank's norm has the experts that it holds, and lacks the others."""

    def norm(gradients: Any, mesh: ProcessMesh, group: Any, device: torch.device) -> Tensor:
        counted = [gradient for weight, gradient in gradients if update_guard.is_counted(weight, mesh)]
        return update_guard.combined(update_guard.norms_of(counted), group, device)

    flat.norm_of_whole = update_guard.norm_of_whole = norm


def norms_of_experts_averaged() -> None:
    """The norms of experts are averaged over the ranks, as DeepSpeed does."""
    right = update_guard.combined

    def norm(gradients: Any, mesh: ProcessMesh, group: Any, device: torch.device) -> Tensor:
        counted = [(w, g) for w, g in gradients if update_guard.is_counted(w, mesh)]
        of_experts = [g for w, g in counted if logical_of(w).is_part]
        others = update_guard.norms_of(g for w, g in counted if not logical_of(w).is_part)
        mean = right(update_guard.norms_of(of_experts), None, device) / mesh.expert.size
        dist.all_reduce(mean, group=mesh.expert.group)
        return right([*others, mean], group, device)

    flat.norm_of_whole = update_guard.norm_of_whole = norm


def every_rank_holds_the_first_experts() -> None:
    LogicalTensor.rows = property(  # type: ignore[assignment]
        lambda self: (0, self.shape[0] // self.part[1])
    )


def results_not_brought_back_in_order() -> None:
    experts.unsorted = lambda y, order: y


def experts_reduced_as_dense_weights() -> None:
    """Experts are not marked: DeepSpeed averages different experts over all data ranks, silently."""
    build = flat.build_optimizer

    def unmarked(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build(*arguments)
        for group in optimizer.param_groups:
            group.pop("moe", None)
            for parameter in group["params"]:
                parameter.allreduce = True
        return optimizer

    flat.build_optimizer = unmarked
    flat.shared_experts = lambda *_: nullcontext()


def biases_by_the_tokens_of_one_rank() -> None:
    """Each data rank balances its own tokens, so that ranks choose by different biases."""
    import launcher.engine.base as base

    right = base.balance
    base.balance = lambda module, data, is_kept: right(module, Axis(), is_kept)


def balance_of_a_part_of_the_sequence() -> None:
    """Each context rank balances its own part of a sequence: the mean of their losses is another loss."""
    right = expert_losses.load_balancing_loss
    experts.load_balancing_loss = lambda shares, chosen, context: right(shares, chosen)


def biases_left_out_of_the_choice() -> None:
    """Biases are balanced, and no router adds them to its scores."""
    right = experts.Experts._route

    def route(self: experts.Experts, logits: Tensor) -> tuple[Tensor, Tensor]:
        assert self.selection_bias is not None
        balanced, self.selection_bias.value = self.selection_bias.value, torch.zeros(self.num_experts)
        routed = right(self, logits)
        self.selection_bias.value = balanced
        return routed

    experts.Experts._route = route  # type: ignore[method-assign]


MOE = "model=moe_tiny"
DATA, TENSOR = "parallelism.data=2", "parallelism.tensor=2 parallelism.data=1"
SEQUENCE = f"{TENSOR} parallelism.sequence_parallel=true"
PIPELINE = "parallelism.pipeline=2 parallelism.data=1"
EXPERT = "parallelism.data=2 parallelism.expert=2"
CONTEXT = "parallelism.context=2 parallelism.data=1"
LARGE = "model.experts.auxiliary_loss=1 model.experts.z_loss=1"

EXPERT_MUTATIONS = {
    "router's gradient not reduced over sequence shards": Mutation(
        router_gradient_not_reduced, f"{MOE} {SEQUENCE}", ("router.weight",)
    ),
    "gradients of the experts' weights not reduced over tensor ranks": Mutation(
        weight_gradients_not_reduced, f"{MOE} {TENSOR}", ("router.weight",)
    ),
    "gradients of gathered logits added up": Mutation(
        gathered_logits_reduced_backward, f"{MOE} {SEQUENCE}", ("router.weight",)
    ),
    "auxiliary losses multiplied by gradient accumulation": Mutation(
        losses_of_every_micro_batch_whole, f"{MOE} {DATA} {LARGE}", ("router.weight",)
    ),
    "auxiliary losses left out on a pipeline stage": Mutation(
        losses_left_out, f"{MOE} {PIPELINE} {LARGE}", ("router.weight",)
    ),
    "load balancing over the micro-batch": Mutation(
        balance_over_the_micro_batch, f"{MOE} {DATA} {LARGE}", ("router.weight",)
    ),
    "load balancing over a part of the sequence": Mutation(
        balance_of_a_part_of_the_sequence, f"{MOE} {CONTEXT} {LARGE}", ("router.weight",)
    ),
    "weights of the chosen experts not normalised": Mutation(
        scores_not_normalized, f"{MOE} {TENSOR}", ("mlp_norm",)
    ),
    "biases for the choice by the tokens of one rank": Mutation(
        biases_by_the_tokens_of_one_rank,
        f"{MOE} {DATA} model.experts.bias_balancing=0.1 training.micro_batch_size=1",
        ("router",),
    ),
    "biases left out of the choice": Mutation(
        biases_left_out_of_the_choice, f"{MOE} {DATA} model.experts.bias_balancing=0.1", ("router",)
    ),
    "tokens over a capacity dropped": Mutation(tokens_over_a_capacity_dropped, f"{MOE} {DATA}", ("experts",)),
    "expert gradients too large by the expert-parallel size": Mutation(
        expert_gradients_averaged_over_their_holders, f"{MOE} {EXPERT}", ("experts",)
    ),
    "norm without the experts of other ranks": Mutation(
        norm_of_the_experts_of_one_rank, f"{MOE} {EXPERT}", ("grad_norm",)
    ),
    "norms of experts averaged over ranks": Mutation(
        norms_of_experts_averaged, f"{MOE} {EXPERT}", ("grad_norm",)
    ),
    "every rank holds the first experts": Mutation(
        every_rank_holds_the_first_experts, f"{MOE} {EXPERT}", ("experts",)
    ),
    "results of experts brought back in another order": Mutation(
        results_not_brought_back_in_order, f"{MOE} {EXPERT}", ("head",)
    ),
    "experts reduced as dense weights": Mutation(
        experts_reduced_as_dense_weights, f"{MOE} {EXPERT} parallelism.zero_stage=1", ("experts",)
    ),
}
