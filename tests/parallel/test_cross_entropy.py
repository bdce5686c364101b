"""The vocabulary-parallel cross-entropy against F.cross_entropy of the full logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from launcher.parallel import layers
from launcher.parallel.layers import IGNORED_LABEL, mean_loss, vocab_parallel_cross_entropy
from launcher.parallel.sharding import padded_length
from tests.distributed import mesh, pool

BATCH, LENGTH = 3, 6
WORLDS = [1, 2, 4]


@dataclass(frozen=True)
class Case:
    vocabulary: int = 16
    scale: float = 1.0
    ignored: str = "none"  # labels that are IGNORED_LABEL: none, some, all
    dtype: torch.dtype = torch.float32

    def labels(self) -> Tensor:
        labels = torch.randint(self.vocabulary, (BATCH, LENGTH))
        labels.view(-1)[: self.vocabulary] = torch.arange(self.vocabulary)[: BATCH * LENGTH]
        share = {"none": 0.0, "some": 0.4, "all": 1.0}[self.ignored]
        return labels.masked_fill(torch.rand(labels.shape) < share, IGNORED_LABEL)


CASES = {
    "vocabulary divides": Case(),
    "padding": Case(vocabulary=13),
    "shard of padding only": Case(vocabulary=5),
    "some labels ignored": Case(ignored="some"),
    "all labels ignored": Case(vocabulary=13, ignored="all"),
    "huge logits": Case(vocabulary=13, scale=1e4, ignored="some"),
    "bf16": Case(vocabulary=1021, scale=3.0, ignored="some", dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class Comparison:
    losses: Tensor
    expected_losses: Tensor
    gradient: Tensor
    expected_gradient: Tensor
    mean: float
    expected_mean: float


def compare(rank: int, world: int, case: Case) -> Comparison:
    """Return losses, mean loss and this rank's logit gradient, each beside the result of F.cross_entropy."""
    axis = mesh(tensor=world).tensor
    padded = padded_length(case.vocabulary, world)
    # Padding has the highest logits: its probability must still be zero.
    logits = torch.randn(BATCH, LENGTH, padded).mul(case.scale)
    logits[..., case.vocabulary :] = 2 * case.scale
    logits, labels, upstream = logits.to(case.dtype), case.labels(), torch.rand(BATCH, LENGTH)

    whole = logits.float().requires_grad_()
    real = whole[..., : case.vocabulary].flatten(0, 1)
    expected = F.cross_entropy(real, labels.flatten(), reduction="none").view_as(labels)
    [expected_gradient] = torch.autograd.grad(expected, whole, upstream)
    counted = expected[labels != IGNORED_LABEL]
    expected_mean = counted.mean().item() if len(counted) else 0.0

    size = padded // world
    columns = slice(rank * size, (rank + 1) * size)
    ours = logits[..., columns].clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(ours, labels, case.vocabulary, axis)
    [gradient] = torch.autograd.grad(losses, ours, upstream)
    assert torch.equal(ours, logits[..., columns])  # not changed in place
    return Comparison(
        losses.detach(),
        expected.detach(),
        gradient,
        expected_gradient[..., columns],
        mean_loss(losses, labels).item(),
        expected_mean,
    )


def assert_equal(comparisons: list[Comparison], dtype: torch.dtype) -> None:
    for comparison in comparisons:
        assert comparison.losses.dtype is torch.float32
        assert comparison.gradient.dtype is dtype
        torch.testing.assert_close(comparison.losses, comparison.expected_losses, rtol=1e-6, atol=1e-6)
        assert comparison.mean == pytest.approx(comparison.expected_mean, rel=1e-6, abs=1e-7)
        # The bf16 gradient is the fp32 gradient, rounded once.
        rtol = 1e-5 if dtype is torch.float32 else 2**-8
        torch.testing.assert_close(
            comparison.gradient.float(), comparison.expected_gradient, rtol=rtol, atol=1e-7
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_equals_cross_entropy_of_full_logits(world: int, name: str) -> None:
    assert_equal(pool(world).run(compare, CASES[name]), CASES[name].dtype)


@pytest.mark.parametrize("world", WORLDS)
def test_padding_gets_no_gradient(world: int) -> None:
    """The tests above check the losses without padding; this test checks the gradient."""
    case = CASES["shard of padding only"]
    gradient = torch.cat([comparison.gradient for comparison in pool(world).run(compare, case)], dim=-1)
    assert not gradient[..., case.vocabulary :].any()
    assert gradient[..., : case.vocabulary].any()


def test_ignoring_all_labels_gives_zero_loss_and_gradient() -> None:
    for comparison in pool(2).run(compare, CASES["all labels ignored"]):
        assert comparison.mean == 0.0
        assert not comparison.losses.any()
        assert not comparison.gradient.any()


def traffic(rank: int, world: int) -> list[tuple[str, int]]:
    """Return (collective, elements) of each collective in a forward and a backward pass."""
    sent: list[tuple[str, int]] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            sent.append((name, tensor.numel() if isinstance(tensor, Tensor) else -1))
            return function(tensor, *args, **kwargs)

        return call

    axis = mesh(tensor=world).tensor
    logits = torch.randn(BATCH, LENGTH, 50, requires_grad=True)
    collectives = ("all_gather", "all_reduce", "reduce_scatter", "gather", "all_to_all", "broadcast", "send")
    with pytest.MonkeyPatch.context() as patch:
        for name in dir(dist):
            if name.startswith(collectives) and callable(getattr(dist, name)):
                patch.setattr(dist, name, recorded(name, getattr(dist, name)))
        losses = vocab_parallel_cross_entropy(logits, Case(vocabulary=100).labels(), 100, axis)
        losses.sum().backward()
    return sent


def test_three_all_reduces_and_no_gather() -> None:
    assert pool(2).run(traffic) == [[("all_reduce", BATCH * LENGTH)] * 3] * 2


def compare_with_mutant(rank: int, world: int, kind: str) -> Comparison:
    reduced = layers._reduced
    mutants = {
        "none": lambda x, operation, axis: x,
        "bf16": lambda x, operation, axis: reduced(x.bfloat16(), operation, axis).float(),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_reduced", mutants[kind])
        return compare(rank, world, CASES["bf16"])


@pytest.mark.parametrize("kind", ["none", "bf16"])
def test_comparison_detects_wrong_reductions(kind: str) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_equal(pool(2).run(compare_with_mutant, kind), torch.bfloat16)
