"""Mixture of experts without dropped tokens: a router, the experts that it chooses, and shared experts.

Each token runs through the `top_k` experts that its router scores highest (Shazeer et al., arXiv 1701.06538).
Tokens are sorted by expert, so that each expert multiplies a stretch of them; no expert has a capacity.

Shapes: B batch, T sequence, N = B T tokens, H hidden, F columns of an expert, E experts, k experts of each
token, tp tensor-parallel size. A tensor rank holds F/tp columns of every expert. The router is whole on every
tensor rank: it scores the rank's part of the sequence, and the scores are gathered.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.config.schema import ModelConfig, RouterKind
from launcher.config.shape import is_gated
from launcher.models.block_context import BlockContext, residual_draw
from launcher.models.expert_losses import load_balancing_loss, with_loss, z_loss
from launcher.models.grouped import (
    Order,
    collect,
    exchanged_rows,
    grouped_linear,
    sorted_by_expert,
    spread,
    unsorted,
)
from launcher.models.mlp import MLP, activated
from launcher.models.routing_record import RoutingRecord
from launcher.models.selection_bias import SelectionBias
from launcher.parallel.collectives import copy_region, gather_copies_region
from launcher.parallel.initializer import normal
from launcher.parallel.layers import TensorParallel
from launcher.parallel.mesh import ONE_RANK
from launcher.parallel.sharding import LogicalTensor


class Router(nn.Module):
    """The logits of all experts in fp32: (B, T, H) or (B, T/tp, H) -> (B, T, E), alike on all tensor ranks.

    Under sequence parallelism the logits are all-gathered forward. Backward needs no collective for them,
    since every tensor rank has the gradients of all logits; the weight's gradient is all-reduced.
    """

    def __init__(self, name: str, model: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        logical = LogicalTensor(f"{name}.weight", (model.experts.count, model.hidden_size))
        self.weight = tp.initializer.parameter(logical, normal(model.init_std))

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x.float(), self.tp.replicated(self.weight).float())
        return gather_copies_region(logits, self.tp.axis) if self.tp.sequence_parallel else logits


class Experts(nn.Module):
    """The experts of a layer, in place of its MLP: (B, T, H) or (B, T/tp, H) -> the same.

    The weights of all experts are two tensors: rows e R to (e + 1) R belong to expert e, with R = 2F or F
    rows of `experts.gate_up` or `experts.up`, and R = H rows of `experts.down`.
    Collectives over the tensor group are those of an MLP, those of the router, and an all-reduce of the
    gradients of the weights of the chosen experts (B, T, k) backward. Shared experts add those of an MLP.
    Over the context group: an all-reduce of the uses of the experts (B, E). Over the expert group: those of
    grouped.Exchange.
    """

    def __init__(self, name: str, model: ModelConfig, context: BlockContext) -> None:
        super().__init__()
        experts, tp = model.experts, context.tp
        self.model, self.tp, self.micro_batches = model, tp, context.micro_batches
        h, f, gated = model.hidden_size, experts.ffn_hidden_size, is_gated(model)
        self.router = Router(f"{name}.router", model, tp)
        up, segments = (f"{name}.experts.gate_up", (f, f)) if gated else (f"{name}.experts.up", (f,))
        rows, part = segments * experts.count, (context.expert.rank, context.expert.size)
        self.expert, self.num_experts = context.expert, experts.count
        self.context = ONE_RANK if context.cp is None else context.cp.axis
        make = tp.initializer.parameter
        first = LogicalTensor(f"{up}.weight", (sum(rows), h), 0, rows, part=part)
        self.up = make(first, normal(model.init_std))
        down = LogicalTensor(f"{name}.experts.down.weight", (experts.count * h, f), 1, (f,), part=part)
        self.down = make(down, residual_draw(model))
        columns = experts.shared * f
        self.layer, self.record = int(name.split(".")[1]), RoutingRecord(experts.count)
        self.selection_bias: SelectionBias | None = None
        if experts.bias_balancing:
            sizes = experts.count, experts.bias_balancing
            self.selection_bias = SelectionBias(f"{name}.router.bias", *sizes, tp.initializer.device)
        self.shared = MLP(f"{name}.shared", model, context, columns) if columns else None

    def forward(self, x: Tensor) -> Tensor:
        experts, tp = self.model.experts, self.tp
        weights, chosen = self._route(self.router(x))
        # Each tensor rank computes a part of the sum over columns, and so a part of these gradients.
        weights = copy_region(weights, tp.axis).flatten(0, 1)
        order = sorted_by_expert(chosen.flatten(0, 1), experts.count)
        y = spread(tp.enter(x).flatten(0, 1), order)
        if self.expert.size == 1:
            y = self._run(y, order)
        else:
            exchange = exchanged_rows(order, experts.count, self.expert, y.device)
            y = spread(exchange.dispatch(y), exchange.order)
            y = exchange.combine(unsorted(self._run(y, exchange.order), exchange.order))
        y = tp.leave(collect(y, weights, order).view(len(x), -1, x.shape[-1]))
        return y if self.shared is None else y + self.shared(x)

    def _run(self, rows: Tensor, order: Order) -> Tensor:
        """Run sorted rows through this rank's experts."""
        if self._trains:
            self.record.add_rows(len(rows))
        y = grouped_linear(rows, self.up, order)
        return grouped_linear(activated(self.model, y), self.down, order)

    @property
    def _trains(self) -> bool:
        """Whether this is the forward pass of a training step."""
        return torch.is_grad_enabled() and self.training

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and numbers of the chosen experts, (B, T, k) each, from logits (B, T, E)."""
        experts, trains = self.model.experts, self._trains
        z = z_loss(logits) if trains else 0.0
        logits = self._with_loss(logits, z, experts.z_loss)
        is_softmax = experts.router is RouterKind.softmax
        scores = logits.softmax(-1) if is_softmax else logits.sigmoid()
        bias = self.selection_bias
        ranked = scores.detach() if bias is None else scores.detach() + bias.value
        chosen = ranked.topk(experts.top_k, dim=-1).indices
        if trains and bias is not None:
            bias.record(chosen)
        if trains:
            shares = scores if is_softmax else scores / scores.sum(-1, keepdim=True)
            balance = load_balancing_loss(shares, chosen, self.context)
            self.record.add(shares.detach(), chosen, balance, z)
            scores = self._with_loss(scores, balance, experts.auxiliary_loss)
        weights = scores.gather(-1, chosen)
        if experts.normalize_top_k:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights if experts.scaling == 1.0 else weights * experts.scaling, chosen

    def _with_loss(self, x: Tensor, loss: Tensor | float, factor: float) -> Tensor:
        """Return x; its backward pass also adds the gradient of `loss` times `factor`.

        A step's loss is the mean over its micro-batches, data and context ranks, as the language loss is.
        """
        if factor == 0.0 or not isinstance(loss, Tensor):
            return x
        return with_loss(x, loss * (factor / self.micro_batches))
