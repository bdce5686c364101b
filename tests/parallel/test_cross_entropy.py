"""The projection and cross-entropy in chunks against F.linear and F.cross_entropy of the full logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import InternalTorchDynamoError

from launcher.config.numbers import IGNORED_LABEL
from launcher.engine.allocations import Allocations
from launcher.parallel import compiling, cross_entropy, loss_kernels, vocabulary
from launcher.parallel.compiling import Function
from launcher.parallel.cross_entropy import linear_cross_entropy, mean_loss
from launcher.parallel.loss_kernels import EAGER, LossKernels
from launcher.parallel.mesh import Axis
from launcher.parallel.vocabulary import CHUNK_LOGITS, CHUNK_TOKENS, chunk_sizes, padded_length
from tests.compiling import forget_graphs
from tests.distributed import mesh, pool

BATCH, LENGTH, HIDDEN = 3, 6, 8
WORLDS = [1, 2, 4]


@dataclass(frozen=True)
class Case:
    vocabulary: int = 16
    scale: float = 1.0
    ignored: str = "none"  # labels that are IGNORED_LABEL: none, some, all
    dtype: torch.dtype = torch.float32
    bias: bool = False
    chunk: int = 5  # tokens; 18 tokens have a last chunk of 3
    upstream: float = 1.0
    cap: float | None = None

    def labels(self) -> Tensor:
        labels = torch.randint(self.vocabulary, (BATCH, LENGTH))
        labels.view(-1)[: self.vocabulary] = torch.arange(self.vocabulary)[: BATCH * LENGTH]
        share = {"none": 0.0, "some": 0.4, "all": 1.0}[self.ignored]
        return labels.masked_fill(torch.rand(labels.shape) < share, IGNORED_LABEL)


CASES = {
    "vocabulary divides": Case(),
    "a single chunk": Case(chunk=512),
    "a chunk per token": Case(chunk=1),
    "padding": Case(vocabulary=13, bias=True),
    "shard of padding only": Case(vocabulary=5),
    "some labels ignored": Case(ignored="some", bias=True),
    "all labels ignored": Case(vocabulary=13, ignored="all"),
    "huge logits": Case(vocabulary=13, scale=1e4, ignored="some"),
    "scaled loss": Case(vocabulary=13, upstream=2.0**16),
    "soft cap": Case(vocabulary=13, cap=2.0, ignored="some"),
    "bf16": Case(vocabulary=1021, ignored="some", dtype=torch.bfloat16),
    "bf16 with bias": Case(vocabulary=77, dtype=torch.bfloat16, bias=True, upstream=1 / 3),
    "fp16 with a loss scale": Case(vocabulary=77, dtype=torch.float16, upstream=2.0**10),
}


@dataclass(frozen=True)
class Comparison:
    mean: float
    expected_mean: float
    gradients: dict[str, Tensor]
    expected: dict[str, Tensor]


class Uncompiled(LossKernels):
    """Runs the passes that are compiled elsewhere as they are written."""

    def __call__(self, function: Function, *arguments: object) -> Tensor:
        return function(*arguments)


def compare(rank: int, world: int, case: Case, kernels: LossKernels = EAGER) -> Comparison:
    """Return mean loss and gradients of this rank, each beside the results for the full logits in fp64."""
    axis = mesh(tensor=world).tensor if world > 1 else Axis()
    padded = padded_length(case.vocabulary, world)
    x = torch.randn(BATCH, LENGTH, HIDDEN)
    weight = torch.randn(padded, HIDDEN).mul(case.scale / HIDDEN**0.5)
    bias = torch.randn(padded)
    # Padding has the highest logits: its probability must still be zero.
    weight[case.vocabulary :], bias[case.vocabulary :] = 0.0, 1e4
    labels = case.labels()
    x, weight, bias = (tensor.to(case.dtype) for tensor in (x, weight, bias))

    full = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    logits = F.linear(full[0], full[1], full[2] if case.bias else None)
    real = logits[..., : case.vocabulary].flatten(0, 1)
    real = real if case.cap is None else case.cap * (real / case.cap).tanh()
    expected = F.cross_entropy(real, labels.flatten(), reduction="sum", ignore_index=IGNORED_LABEL)
    expected_mean = expected / max(1, int((labels != IGNORED_LABEL).sum()))
    (expected_mean * case.upstream).backward()

    size = padded // world
    shard = slice(rank * size, (rank + 1) * size)
    ours = [x.clone(), weight[shard].clone(), bias[shard].clone()]
    for tensor in ours:
        tensor.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vocabulary.CHUNK_TOKENS, "cpu", case.chunk)
        bias_or_none = ours[2] if case.bias else None
        arguments = bias_or_none, labels, case.vocabulary, axis, "cpu", case.cap, kernels
        counted = max(1, int((labels != IGNORED_LABEL).sum()))
        mean = mean_loss(linear_cross_entropy(ours[0], ours[1], *arguments), labels, counted)
        with torch.no_grad():  # without gradients: the same loss
            again = mean_loss(linear_cross_entropy(ours[0], ours[1], *arguments), labels, counted)
            assert torch.equal(mean, again)
    (mean * case.upstream).backward()
    assert torch.equal(ours[0], x)  # not changed in place
    assert mean.dtype is torch.float32
    found = {"x": _gradient(ours[0]).float(), "weight": _gradient(ours[1])}
    if world > 1:
        dist.all_reduce(found["x"], group=axis.group)
    right = {"x": _gradient(full[0]), "weight": _gradient(full[1])[shard]}
    if case.bias:
        found["bias"], right["bias"] = _gradient(ours[2]), _gradient(full[2])[shard]
    assert all(gradient.dtype is case.dtype for name, gradient in found.items() if name != "x")
    return Comparison(mean.item(), expected_mean.item(), found, right)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


# A logit of up to 4 is rounded by up to 4 half units, and so changes its probability by that share.
ERRORS = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def assert_equal(comparisons: list[Comparison], dtype: torch.dtype) -> None:
    """Check the loss, and gradients relative to the largest: the logits and their gradients are rounded."""
    exact = dtype is torch.float32
    for comparison in comparisons:
        rel = 1e-6 if exact else ERRORS[dtype]
        assert comparison.mean == pytest.approx(comparison.expected_mean, rel=rel, abs=1e-6)
        for name, right in comparison.expected.items():
            error = (comparison.gradients[name].double() - right).abs().max()
            assert error <= ERRORS[dtype] * right.abs().max().clamp(min=1e-30), (name, "not close", error)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_equals_cross_entropy_of_full_logits(world: int, name: str) -> None:
    assert_equal(pool(world).run(compare, CASES[name]), CASES[name].dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_the_fused_passes_equal_it_too(world: int, name: str) -> None:
    kernels = Uncompiled(is_compiled=True)
    assert_equal(pool(world).run(compare, CASES[name], kernels), CASES[name].dtype)


@pytest.mark.slow
def test_the_fused_passes_compile_without_a_break(subtests: pytest.Subtests) -> None:
    for name, case in CASES.items():
        with subtests.test(name):
            forget_graphs()
            kernels = LossKernels(is_compiled=True, strict=True)
            assert_equal([compare(0, 1, case, kernels)], case.dtype)
            assert kernels.seconds > 0


def test_a_failing_compiler_leaves_the_loss_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> NoReturn:
        raise InternalTorchDynamoError("no space left for kernels")

    monkeypatch.setattr(compiling, "compiled", lambda _: failing)
    kernels = LossKernels(is_compiled=True)
    assert_equal([compare(0, 1, CASES["padding"], kernels)], torch.float32)
    assert not kernels.is_on
    assert kernels.failure == "InternalTorchDynamoError: no space left for kernels"
    with pytest.raises(InternalTorchDynamoError):
        compare(0, 1, CASES["padding"], LossKernels(is_compiled=True, strict=True))


def test_a_rank_that_cannot_compile_keeps_the_chunks_of_the_other_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each chunk has collectives over the tensor ranks, and a fused loss has larger chunks on a GPU."""

    def failing(*_: object, **__: object) -> NoReturn:
        raise InternalTorchDynamoError("no space left for kernels")

    fused: list[bool] = []

    def recorded(*arguments: Any, **options: bool) -> list[int]:
        fused.append(options["fused"])
        return chunk_sizes(*arguments, **options)

    monkeypatch.setattr(compiling, "compiled", lambda _: failing)
    monkeypatch.setattr(cross_entropy, "chunk_sizes", recorded)
    kernels = LossKernels(is_compiled=True)
    for _ in range(2):
        compare(0, 1, CASES["padding"], kernels)
    assert not kernels.is_on
    assert fused == [True] * 4  # with and without gradients
    assert max(chunk_sizes(9000, 2**18, "cuda", fused=True)) > max(chunk_sizes(9000, 2**18, "cuda"))


def test_the_loss_runs_eager_where_every_operation_must_be_visible() -> None:
    """torch compiles nothing under a dispatch mode, such as the one that measures a step's memory on CPU."""
    kernels = LossKernels(is_compiled=True, strict=True)
    with Allocations():
        assert not kernels.is_on
        assert_equal([compare(0, 1, CASES["padding"], kernels)], torch.float32)
    assert kernels.is_on
    assert kernels.failure is None


def test_a_wrong_fused_pass_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the label's 1 in the gradient."""
    right = loss_kernels.gradient_
    wrong = lambda logits, column, *rest: right(logits, torch.full_like(column, -1), *rest)  # noqa: E731
    monkeypatch.setattr(cross_entropy, "gradient_", wrong)
    with pytest.raises(AssertionError, match="not close"):
        assert_equal([compare(0, 1, Case(), Uncompiled(is_compiled=True))], torch.float32)


@pytest.mark.parametrize("world", WORLDS)
def test_padding_gets_no_gradient(world: int) -> None:
    case = CASES["shard of padding only"]
    shards = [comparison.gradients["weight"] for comparison in pool(world).run(compare, case)]
    gradient = torch.cat(shards)
    assert not gradient[case.vocabulary :].any()
    assert gradient[: case.vocabulary].any()


def test_ignoring_all_labels_gives_zero_loss_and_gradient() -> None:
    for comparison in pool(2).run(compare, CASES["all labels ignored"]):
        assert comparison.mean == 0.0
        assert not any(gradient.any() for gradient in comparison.gradients.values())


def test_the_gradient_keeps_its_digits_where_the_probability_is_close_to_1() -> None:
    """In bf16 a probability of 0.999 is 1, and 1 minus 1 is no gradient."""
    logits = torch.tensor([[8.0, 0.0, 0.0]], dtype=torch.bfloat16)
    right = F.softmax(logits.double(), -1)[0, 0] - 1
    scores = torch.empty(1, 3)
    cross_entropy.cross_entropy_(logits, scores, torch.tensor([0]), 3, Axis(), with_gradients=True)
    assert float(logits[0, 0]) == pytest.approx(float(right), rel=2**-8)


def traffic(rank: int, world: int, kernels: LossKernels) -> list[tuple[str, int]]:
    """Return (collective, elements) of each collective in a forward and a backward pass."""
    sent: list[tuple[str, int]] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            sent.append((name, tensor.numel() if isinstance(tensor, Tensor) else -1))
            return function(tensor, *args, **kwargs)

        return call

    axis = mesh(tensor=world).tensor
    x = torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True)
    weight = torch.randn(50, HIDDEN, requires_grad=True)
    collectives = ("all_gather", "all_reduce", "reduce_scatter", "gather", "all_to_all", "broadcast", "send")
    with pytest.MonkeyPatch.context() as patch:
        for name in dir(dist):
            if name.startswith(collectives) and callable(getattr(dist, name)):
                patch.setattr(dist, name, recorded(name, getattr(dist, name)))
        patch.setitem(vocabulary.CHUNK_TOKENS, "cpu", 9)
        labels = Case(vocabulary=100).labels()
        linear_cross_entropy(x, weight, None, labels, 100, axis, "cpu", None, kernels).backward()
    return sent


@pytest.mark.parametrize("kernels", [EAGER, Uncompiled(is_compiled=True)])
def test_two_all_reduces_per_chunk_and_no_gather(kernels: LossKernels) -> None:
    # Two ranks on a CPU all-reduce by sending each other the whole tensor.
    assert pool(2).run(traffic, kernels) == [[("all_to_all_single", 9), ("all_to_all_single", 18)] * 2] * 2


def peak_beside_weight(tokens: int, columns: int) -> int:
    """Return the peak bytes of a forward and a backward pass, without x, weight and their gradients."""
    x, weight = torch.randn(tokens, 2, requires_grad=True), torch.randn(columns, 2, requires_grad=True)
    with Allocations() as allocations:
        labels = torch.randint(columns, (tokens,))
        linear_cross_entropy(x[None], weight, None, labels[None], columns, Axis(), "cpu").backward()
    return allocations.peak - 2 * 4 * (weight.numel() + x.numel())


def test_memory_does_not_grow_with_the_vocabulary_or_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vocabulary.CHUNK_TOKENS, "cpu", 64)
    monkeypatch.setitem(vocabulary.CHUNK_LOGITS, "cpu", 2**16)
    stated = 2 * 4 * 2**16  # logits twice in fp32
    for tokens, columns in ((64, 1024), (512, 1024), (512, 4096), (2048, 16384)):
        # Beside the logits: labels, numbers per token, and a chunk's hidden states.
        assert peak_beside_weight(tokens, columns) <= stated + 100 * tokens, (tokens, columns)


def test_chunks_cover_the_tokens_and_respect_both_limits() -> None:
    for device, tokens, columns in [
        ("cpu", 1024, 32000), ("cpu", 1, 10), ("cpu", 1500, 2048), ("cuda", 32768, 50304),
        ("cuda", 16384, 128256), ("cpu", 7, 2**25),
    ]:  # fmt: skip
        sizes = chunk_sizes(tokens, columns, device)
        assert sum(sizes) == tokens
        assert max(sizes) <= CHUNK_TOKENS[device]
        assert max(sizes) == 1 or max(sizes) * columns <= CHUNK_LOGITS[device]
        assert max(sizes) - min(sizes) < len(sizes)


def compare_with_mutant(rank: int, world: int, kind: str) -> Comparison:
    reduced = cross_entropy._reduced
    mutants = {
        "none": lambda x, operation, axis: x,
        "bf16": lambda x, operation, axis: reduced(x.bfloat16(), operation, axis).float(),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_reduced", mutants[kind])
        return compare(rank, world, Case(vocabulary=1021))


@pytest.mark.parametrize("kind", ["none", "bf16"])
def test_comparison_detects_wrong_reductions(kind: str) -> None:
    with pytest.raises(AssertionError):
        assert_equal(pool(2).run(compare_with_mutant, kind), torch.float32)
