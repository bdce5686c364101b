"""Attention over context ranks against torch's attention of one process, forward and backward.

Every rank draws the whole sequences from the same seed, and compares its part of the results.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.config.schema import ContextMethod
from launcher.config.sequence_order import part_of
from launcher.models.attention_kernel import Kernel
from launcher.models.attention_pairs import Pair, _lacks_cuda_kernel, attend_pair, pair_gradients
from launcher.models.context_attention import context_attention
from launcher.parallel.context import ContextParallel
from tests.distributed import mesh, pool
from tests.models.small import relative_error

BATCH, LENGTH, SIZE = 2, 24, 4
HEADS = [(4, 4), (8, 2), (8, 1), (12, 3)]
METHODS = [method.name for method in ContextMethod]


def context_of(world: int, method: str) -> ContextParallel:
    return ContextParallel(mesh(context=world).context, ContextMethod[method])


def firsts(kind: str) -> Tensor | None:
    """Return the first position that each query sees, (B, T)."""
    places = torch.arange(LENGTH).expand(BATCH, LENGTH)
    if kind == "documents":
        starts = torch.tensor([[0, 5, 6, 17], [0, 1, 14, 23]])
        return torch.stack([row[torch.searchsorted(row, places[0], right=True) - 1] for row in starts])
    return (places - 6).clamp(min=0) if kind == "window" else None


def weights_of(q: Tensor, k: Tensor, first: Tensor | None, cap: float | None, scale: float) -> Tensor:
    """Return the softmax (B, N, T, T) of causal attention by its definition, in one process."""
    q, k = (x.transpose(1, 2) for x in (q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)))
    scores = q @ k.transpose(2, 3) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    sees = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if first is not None:
        sees = sees & (torch.arange(LENGTH) >= first[:, None, :, None])
    return scores.masked_fill(~sees, float("-inf")).softmax(-1)


def mixed(weights: Tensor, v: Tensor) -> Tensor:
    """Return the values (B, T, K, D) mixed by weights (B, N, T, T), (B, T, N, D)."""
    v = v.repeat_interleave(weights.shape[1] // v.shape[2], 2).transpose(1, 2)
    return (weights @ v).transpose(1, 2)


def errors(rank: int, world: int, method: str, cap: float | None, dtype: torch.dtype) -> dict[str, float]:
    """Return the largest errors of this rank, by case, of the result and of the gradients."""
    context, found = context_of(world, method), {}
    part = [place for each in part_of(LENGTH, rank, world, context.method) for place in each]
    for heads, kv_heads in HEADS:
        for kind in ("causal", "documents", "window"):
            whole = [torch.randn(BATCH, LENGTH, n, SIZE) for n in (heads, kv_heads, kv_heads)]
            whole = [x.to(dtype).float().requires_grad_() for x in whole]
            gradient = torch.randn(BATCH, LENGTH, heads, SIZE).to(dtype)
            first, scale = firsts(kind), 0.7
            expected = mixed(weights_of(*whole[:2], first, cap, scale), whole[2])
            expected.backward(gradient.float())
            local = [x.detach()[:, part].to(dtype).requires_grad_() for x in whole]
            if first is not None and context.method is not ContextMethod.ulysses:
                first = first[:, part]
            kernel = Kernel(True, scale, cap, "cpu")
            result = context_attention(*local, first, 0.0, None, kernel, context)
            result.backward(gradient[:, part])
            pairs = {"result": (result, expected)} | {
                name: (mine.grad, of_whole.grad)
                for name, mine, of_whole in zip("qkv", local, whole, strict=True)
            }
            for name, (mine, of_whole) in pairs.items():
                assert mine is not None
                assert of_whole is not None
                assert mine.dtype is dtype
                error = (mine.float() - of_whole[:, part]).abs().max()
                found[f"{heads}/{kv_heads} {kind} {name}"] = float(error)
    return found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_result_and_gradients(method: str, world: int, cap: float | None) -> None:
    for by_case in pool(world).run(errors, method, cap, torch.float32):
        assert all(error < 1e-5 for error in by_case.values()), by_case


@pytest.mark.parametrize("method", METHODS)
def test_in_bf16(method: str) -> None:
    for by_case in pool(2).run(errors, method, None, torch.bfloat16):
        assert all(error < 0.1 for error in by_case.values()), by_case


@pytest.mark.parametrize("size", [12, 264])
def test_heads_that_no_kernel_on_gpus_takes_are_computed_row_by_row(size: int) -> None:
    """FlashAttention of CUDA does not run on a CPU, so that a call would fail here."""
    q, gradient = (torch.randn(BATCH, 4, LENGTH, size).bfloat16() for _ in range(2))
    k, v = (torch.randn(BATCH, 2, LENGTH, size).bfloat16() for _ in range(2))
    results = []
    for device in ("cuda", "cpu"):
        pair = Pair(Kernel(True, None, None, device), is_diagonal=True)
        mixed, sums = attend_pair(q, k, v, pair)
        results.append([mixed, sums, *pair_gradients(gradient, q, k, v, mixed, sums, pair)])
    for of_gpu, of_cpu in zip(*results, strict=True):
        assert relative_error(of_gpu.float(), of_cpu.float()) < 0.02


@pytest.mark.parametrize(
    ("size", "dtype", "expected"),
    [
        (8, torch.bfloat16, False),
        (64, torch.bfloat16, False),
        (256, torch.float16, False),
        (64, torch.float32, True),
        (20, torch.float16, True),
        (272, torch.bfloat16, True),
    ],
)
def test_the_kernel_on_gpus_takes_some_head_sizes(size: int, dtype: torch.dtype, expected: bool) -> None:
    q, kernel = torch.empty(1, 1, 1, size, dtype=dtype), Kernel(True, None, None, "cuda")
    assert _lacks_cuda_kernel(q, Pair(kernel, is_diagonal=False)) == expected
    assert not _lacks_cuda_kernel(q, Pair(kernel._replace(device="cpu"), is_diagonal=False))


DROPOUT = 0.25


def with_dropout(rank: int, world: int, method: str, kind: str, cap: float | None) -> dict[str, float]:
    """Return the largest errors of this rank, by tensor, and the share of the weights that were dropped.

    Attention is linear in the values: with a one-hot value for each key, its result is the weights after
    dropout. Their quotients by the weights before are the masks, with which one process computes the same.
    """
    context, heads, kv_heads, scale = context_of(world, method), 8, 2, 0.2
    part = [place for each in part_of(LENGTH, rank, world, context.method) for place in each]
    q, k, v = (torch.randn(BATCH, LENGTH, n, LENGTH).requires_grad_() for n in (heads, kv_heads, kv_heads))
    gradient, first = torch.randn(BATCH, LENGTH, heads, LENGTH), firsts(kind)
    of_rank = first if first is None or context.method is ContextMethod.ulysses else first[:, part]

    def attended(*whole: Tensor) -> tuple[list[Tensor], Tensor]:
        local = [x.detach()[:, part].requires_grad_() for x in whole]
        rules = of_rank, DROPOUT, 100 + rank, Kernel(True, scale, cap, "cpu"), context
        return local, context_attention(*local, *rules)

    one_hot = torch.eye(LENGTH).view(1, LENGTH, 1, LENGTH).expand(BATCH, LENGTH, kv_heads, LENGTH)
    weights = weights_of(q, k, first, cap, scale)
    sees = weights > 0
    quotients = context.whole(attended(q, k, one_hot)[1].detach()).transpose(1, 2) / weights.detach()
    kept = sees & (quotients > 0.5)
    masks = kept / (1 - DROPOUT)
    assert not torch.equal(kept[:, 0], kept[:, 1]), "query heads of a group have masks of their own"

    expected = mixed(weights * masks, v)
    expected.backward(gradient)
    local, result = attended(q, k, v)
    result.backward(gradient[:, part])
    distances = {"masks": float((quotients - masks)[sees].abs().max())}
    distances["result"] = float((result - expected[:, part]).abs().max())
    for name, mine, of_whole in zip("qkv", local, (q, k, v), strict=True):
        assert mine.grad is not None
        assert of_whole.grad is not None
        distances[name] = float((mine.grad - of_whole.grad[:, part]).abs().max())
    return distances | {"share": 1 - float(kept.sum() / sees.sum())}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_dropout_of_the_softmax_and_its_gradients(method: str, world: int) -> None:
    """The backward pass draws the masks of the forward pass again, on every rank for its own queries."""
    for kind, cap in (("causal", None), ("documents", 3.0)):
        for distances in pool(world).run(with_dropout, method, kind, cap):
            assert distances.pop("share") == pytest.approx(DROPOUT, abs=0.05)
            assert distances.pop("masks") < 1e-3
            assert all(error < 1e-5 for error in distances.values()), distances


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest storage that is made while entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        sizes = [tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in tensors]
        self.elements = max(self.elements, *sizes, 0)
        return result


LONG, MANY, FEW = 256, 8, 2  # tokens, query heads, key/value heads


def largest(rank: int, world: int, method: str, kind: str) -> int:
    """Return the elements of the largest tensor of attention on this rank, forward and backward."""
    context = context_of(world, method)
    part = [place for each in part_of(LONG, rank, world, context.method) for place in each]
    places = torch.arange(LONG)[None] if context.method is ContextMethod.ulysses else torch.tensor([part])
    first = {"causal": None, "documents": places // 100 * 100, "window": (places - 6).clamp(min=0)}[kind]
    q, k, v = (torch.randn(1, len(part), n, SIZE, requires_grad=True) for n in (MANY, FEW, FEW))
    with LargestTensor() as made:
        result = context_attention(q, k, v, first, 0.0, None, Kernel(True, None, None, "cpu"), context)
        result.backward(torch.ones_like(result))
    return made.elements


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["causal", "documents", "window"])
def test_no_rank_holds_a_whole_sequence_or_its_scores(method: str, kind: str) -> None:
    """The largest tensor is at most half of the queries of a sequence; its scores would be 8 times all."""
    whole = LONG * MANY * SIZE
    assert 8 * whole == LONG**2
    for elements in pool(4).run(largest, method, kind):
        assert 0 < elements <= whole // 2
