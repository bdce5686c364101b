"""The rounded arithmetic of the reference makes the roundings of torch's bf16 kernels, and only those."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.parity.rounding import BF16, EXACT, Arithmetic, to_bf16

GENERATOR = torch.Generator().manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def both(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return leaves in bf16, and equal leaves in fp32."""
    low = [tensor.bfloat16().requires_grad_() for tensor in tensors]
    return low, [tensor.detach().float().requires_grad_() for tensor in low]


def assert_alike(
    kernel: Tensor, rounded: Tensor, low: list[Tensor], high: list[Tensor], share: float
) -> None:
    """Compare results and gradients: all but `share` of the elements have the same bits."""
    gradient = numbers(*kernel.shape).bfloat16()
    kernel.backward(gradient)
    rounded.backward(gradient.float())
    pairs = [(kernel, rounded), *((a.grad, b.grad) for a, b in zip(low, high, strict=True))]
    for ours, reference in pairs:
        assert ours is not None
        assert reference is not None
        assert float((ours.detach().float() != to_bf16(reference.detach())).float().mean()) <= share


def test_layer_norm_has_the_bits_of_the_kernel() -> None:
    low, high = both(numbers(2, 24, 32), 1 + 0.2 * numbers(32), numbers(32))
    kernel = F.layer_norm(low[0], (32,), low[1], low[2], 1e-5)
    x, weight, bias = (BF16.rounded(tensor) for tensor in high)
    assert_alike(kernel, BF16.layer_norm(x, weight, bias, 1e-5), low, high, 0.01)


def test_attention_has_nearly_the_bits_of_the_kernel() -> None:
    low, high = both(*(numbers(4, 16, 8) for _ in range(3)))
    kernel = F.scaled_dot_product_attention(*(tensor.unsqueeze(0) for tensor in low), is_causal=True)[0]
    q, k, v = (BF16.rounded(tensor) for tensor in high)
    future = torch.ones(16, 16, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(future, float("-inf"))
    assert_alike(kernel, BF16.mixed(scores, v), low, high, 0.15)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_has_the_bits_of_the_kernel(has_bias: bool) -> None:
    low, high = both(numbers(40, 32), numbers(48, 32), numbers(48))
    kernel = F.linear(low[0], low[1], low[2] if has_bias else None)
    x, weight, bias = (BF16.rounded(tensor) for tensor in high)
    result = BF16.with_bias(x, weight, bias if has_bias else None, splits_inputs=False)
    tensors = 3 if has_bias else 2
    assert_alike(kernel, result, low[:tensors], high[:tensors], 0.02)


def test_a_sum_in_parts_rounds_each_part() -> None:
    x, weight = to_bf16(numbers(8, 32)), to_bf16(numbers(16, 32))
    halves = [to_bf16(x[:, part] @ weight[:, part].T) for part in (slice(0, 16), slice(16, 32))]
    in_two = Arithmetic(is_rounded=True, parts=2)
    assert torch.equal(in_two.product(x, weight, splits_inputs=True), to_bf16(halves[0] + halves[1]))
    assert not torch.equal(in_two.product(x, weight, splits_inputs=True), BF16.product(x, weight))


def test_exact_arithmetic_rounds_nothing() -> None:
    x, weight = numbers(8, 32), numbers(16, 32)
    assert EXACT.rounded(x) is x
    assert torch.equal(EXACT.product(x, weight), x @ weight.T)
    scores, values = numbers(2, 8, 8), numbers(2, 8, 4)
    assert torch.equal(EXACT.mixed(scores, values), scores.softmax(-1) @ values)
