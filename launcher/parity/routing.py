"""Routers of the reference: the experts that each token chooses, and the losses of a router.

If two experts have nearly equal scores, rounding decides which of them a token chooses, and the output
depends on this choice. So the reference uses the choices of the layout, and checks each of them: the layout
may choose another expert than the reference only if rounding can exchange the order of their scores.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from launcher.config.schema import ModelConfig
from launcher.parity.step_trace import Weights


@dataclass
class Routing:
    """The routers of a model, by name ("blocks.0.mlp.router"). Starts without a bias for any expert."""

    model: ModelConfig
    biases: Weights = field(default_factory=dict)  # of each expert, for the choice
    losses: list[Tensor] = field(default_factory=list)  # of the current micro-batch, with their factors
    _followed: Weights = field(default_factory=dict)  # experts that the layout chose, (G, T, k)
    _scores: dict[str, list[Tensor]] = field(default_factory=dict)  # by micro-batch
    _uses: Weights = field(default_factory=dict)  # of each expert in this step
    _first: int = 0  # the place of the current micro-batch among the samples of the step

    def begin_step(self, followed: Weights) -> None:
        """Begin a step with the experts that the layout chose for its samples; empty: choose by scores."""
        self._followed, self._scores, self._uses = followed, {}, {}

    def begin_micro_batch(self, first: int) -> None:
        self._first, self.losses = first, []

    def scores(self) -> Weights:
        """Return the scores, with biases, by which each token of the step chose its experts, (G, T, E)."""
        return {name: torch.cat(parts) for name, parts in self._scores.items()}

    def choose(self, name: str, scores: Tensor) -> Tensor:
        """Return 1 for the chosen experts of each token and 0 for the others, from scores (B, T, E)."""
        ranked = scores.detach() + self.biases.get(name, 0.0)
        self._scores.setdefault(name, []).append(ranked)
        best = ranked.argsort(-1, descending=True)[..., : self.model.experts.top_k]
        followed = self._followed.get(name, best[:0])[self._first : self._first + len(best)]
        chosen = torch.zeros_like(ranked).scatter(-1, followed if followed.shape == best.shape else best, 1.0)
        self._uses[name] = self._uses.get(name, torch.zeros(len(chosen[0, 0]))) + chosen.sum((0, 1))
        return chosen

    def balance(self) -> Weights:
        """Move each bias by the uses of the step; return copies of the biases by their logical names."""
        speed = self.model.experts.bias_balancing
        for name, uses in self._uses.items() if speed else ():
            bias = self.biases.get(name, torch.zeros_like(uses)).clone()
            for expert in range(len(uses)):
                is_less, is_more = uses[expert] < uses.mean(), uses[expert] > uses.mean()
                bias[expert] += speed * (int(is_less) - int(is_more))
            self.biases[name] = bias
        return {f"{name}.bias": bias.clone() for name, bias in self.biases.items()}

    def add_losses(self, logits: Tensor, scores: Tensor, chosen: Tensor) -> None:
        """Add the mean over sequences of DeepSeek-V3's balance loss, and the z-loss, with their factors."""
        e, balance = self.model.experts, torch.zeros(())
        for of_tokens, uses in zip(scores, chosen, strict=True):
            shares = of_tokens / of_tokens.sum(-1, keepdim=True)
            for expert in range(e.count):
                f = uses[:, expert].sum() * e.count / (e.top_k * len(uses))
                balance = balance + f * shares[:, expert].mean() / len(scores)
        z = torch.log(torch.exp(logits).sum(-1)).square().mean()
        self.losses += [e.auxiliary_loss * balance, e.z_loss * z]


def biases_in(states: Weights) -> Weights:
    """Return the biases of all routers in the states of a step, by router."""
    ending = ".router.bias"
    return {name.removesuffix(".bias"): bias for name, bias in states.items() if name.endswith(ending)}


def shortfall(scores: Tensor, chosen: Tensor) -> float:
    """Return the largest difference by which an expert that was left out beats a chosen expert; 0: none does.

    From scores (G, T, E) of the reference and chosen experts (G, T, k); infinite if a token did not choose k
    different experts.
    """
    if chosen.shape[:2] != scores.shape[:2]:
        return torch.inf
    is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
    if bool((is_chosen.sum(-1) != chosen.shape[-1]).any()):
        return torch.inf
    worst_chosen = scores.masked_fill(~is_chosen, torch.inf).amin(-1)
    best_left = scores.masked_fill(is_chosen, -torch.inf).amax(-1)
    return float((best_left - worst_chosen).clamp(min=0.0).max())
