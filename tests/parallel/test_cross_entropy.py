"""The vocabulary-parallel cross-entropy against F.cross_entropy over whole logits."""

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
    "divides": Case(),
    "padding": Case(vocabulary=13),
    "a shard of padding alone": Case(vocabulary=5),
    "some labels ignored": Case(ignored="some"),
    "all labels ignored": Case(vocabulary=13, ignored="all"),
    "huge logits": Case(vocabulary=13, scale=1e4, ignored="some"),
    "bf16": Case(vocabulary=1021, scale=3.0, ignored="some", dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class Found:
    losses: Tensor
    expected_losses: Tensor
    gradient: Tensor
    expected_gradient: Tensor
    mean: float
    expected_mean: float


def compared(rank: int, world: int, case: Case) -> Found:
    """Losses, their mean and the logits' gradient, with those of F.cross_entropy for this rank's logits."""
    axis = mesh(tensor=world).tensor
    padded = padded_length(case.vocabulary, world)
    # Padding gets the highest logits of all: no probability may go there.
    logits = torch.randn(BATCH, LENGTH, padded).mul(case.scale)
    logits[..., case.vocabulary :] = 2 * case.scale
    logits, labels, upstream = logits.to(case.dtype), case.labels(), torch.rand(BATCH, LENGTH)

    whole = logits.float().requires_grad_()
    real = whole[..., : case.vocabulary].flatten(0, 1)
    expected = F.cross_entropy(real, labels.flatten(), reduction="none").view_as(labels)
    [expected_gradient] = torch.autograd.grad(expected, whole, upstream)
    counted = expected[labels != IGNORED_LABEL]
    expected_mean = counted.mean().item() if len(counted) else 0.0

    own = padded // world
    columns = slice(rank * own, (rank + 1) * own)
    ours = logits[..., columns].clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(ours, labels, case.vocabulary, axis)
    [gradient] = torch.autograd.grad(losses, ours, upstream)
    assert torch.equal(ours, logits[..., columns])  # not changed in place
    return Found(
        losses.detach(),
        expected.detach(),
        gradient,
        expected_gradient[..., columns],
        mean_loss(losses, labels).item(),
        expected_mean,
    )


def assert_equal(found: list[Found], dtype: torch.dtype) -> None:
    for rank in found:
        assert rank.losses.dtype is torch.float32
        assert rank.gradient.dtype is dtype
        torch.testing.assert_close(rank.losses, rank.expected_losses, rtol=1e-6, atol=1e-6)
        assert rank.mean == pytest.approx(rank.expected_mean, rel=1e-6, abs=1e-7)
        # In bf16: the fp32 gradient, rounded once.
        rtol = 1e-5 if dtype is torch.float32 else 2**-8
        torch.testing.assert_close(rank.gradient.float(), rank.expected_gradient, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_is_that_of_whole_logits(world: int, name: str) -> None:
    assert_equal(pool(world).run(compared, CASES[name]), CASES[name].dtype)


@pytest.mark.parametrize("world", WORLDS)
def test_padding_is_never_predicted(world: int) -> None:
    """The losses above are those of real logits alone; here, no gradient reaches padding either."""
    case = CASES["a shard of padding alone"]
    gradient = torch.cat([found.gradient for found in pool(world).run(compared, case)], dim=-1)
    assert not gradient[..., case.vocabulary :].any()
    assert gradient[..., : case.vocabulary].any()


def test_all_labels_ignored_is_a_loss_of_zero_without_gradient() -> None:
    for found in pool(2).run(compared, CASES["all labels ignored"]):
        assert found.mean == 0.0
        assert not found.losses.any()
        assert not found.gradient.any()


def traffic(rank: int, world: int) -> list[tuple[str, int]]:
    """(collective, elements) of a forward and a backward pass."""
    sent: list[tuple[str, int]] = []

    def spied(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
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
                patch.setattr(dist, name, spied(name, getattr(dist, name)))
        losses = vocab_parallel_cross_entropy(logits, Case(vocabulary=100).labels(), 100, axis)
        losses.sum().backward()
    return sent


def test_logits_are_never_gathered() -> None:
    assert pool(2).run(traffic) == [[("all_reduce", BATCH * LENGTH)] * 3] * 2


def with_reductions(rank: int, world: int, kind: str) -> Found:
    reduced = layers._all_reduce_
    mutants = {
        "none": lambda x, operation, axis: x,
        "bf16": lambda x, operation, axis: reduced(x.bfloat16(), operation, axis).float(),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_all_reduce_", mutants[kind])
        return compared(rank, world, CASES["bf16"])


@pytest.mark.parametrize("kind", ["none", "bf16"])
def test_the_comparison_sees_reductions(kind: str) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_equal(pool(2).run(with_reductions, kind), torch.bfloat16)
