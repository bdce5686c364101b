"""The rounded arithmetic of the reference makes the roundings of torch's bf16 kernels, and only those."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.models.block_context import BlockContext
from launcher.models.experts import Experts
from launcher.parallel.initializer import Initializer
from launcher.parallel.mesh import ProcessMesh
from launcher.parallel.sharding import logical_of
from launcher.parity import reference as plain
from launcher.parity.rounding import BF16, EXACT, Arithmetic, to_bf16
from launcher.parity.routing import Routing
from tests.config.composing import run_of
from tests.parity.running import small_run

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


@pytest.mark.parametrize("is_row", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_has_the_bits_of_the_kernel(has_bias: bool, is_row: bool) -> None:
    low, high = both(numbers(40, 32), numbers(48, 32), numbers(48))
    kernel = F.linear(low[0], low[1], low[2] if has_bias else None)
    x, weight, bias = (BF16.rounded(tensor) for tensor in high)
    result = BF16.with_bias(x, weight, bias if has_bias else None, splits_inputs=is_row)
    tensors = 3 if has_bias else 2
    assert_alike(kernel, result, low[:tensors], high[:tensors], 0.02)


def test_several_tensor_ranks_add_the_bias_of_a_row_layer_to_rounded_products() -> None:
    x, weight, bias = to_bf16(numbers(8, 32)), to_bf16(numbers(16, 32)), to_bf16(numbers(16))
    alone, several = (
        plain.arithmetic_of(run_of("hardware=cpu", "precision=bf16", f"parallelism.tensor={size}"))
        for size in (1, 2)
    )
    assert torch.equal(
        several.with_bias(x, weight, bias, splits_inputs=True), to_bf16(to_bf16(x @ weight.T) + bias)
    )
    assert torch.equal(alone.with_bias(x, weight, bias, splits_inputs=True), to_bf16(x @ weight.T + bias))


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


@pytest.mark.parametrize("more", [[], ["model.experts.router=sigmoid", "model.experts.shared=1"]])
def test_experts_have_nearly_the_bits_of_the_layer(more: list[str]) -> None:
    """With auxiliary losses, whose gradients are fp32; the reference follows the choices of the layer."""
    losses = ["model.experts.auxiliary_loss=0.1", "model.experts.z_loss=0.1", "model.experts.scaling=1.5"]
    run = run_of("model=moe_tiny", "model.hidden_size=32", "model.experts.ffn_hidden_size=24", *losses, *more)
    initializer = Initializer(7, ProcessMesh.single().tensor, torch.bfloat16)
    layer = Experts("blocks.0.mlp", run.model, BlockContext.create(run, ProcessMesh.single(), initializer))
    chosen: list[Tensor] = []
    layer.record.add = lambda shares, experts, *_: chosen.append(experts)  # type: ignore[method-assign,assignment]
    low, high = both(numbers(2, 24, 32))
    kernel, names = layer(low[0]), [logical_of(parameter).name for parameter in layer.parameters()]
    weights = [parameter.detach().float().requires_grad_() for parameter in layer.parameters()]
    used = {name: BF16.rounded(weight) for name, weight in zip(names, weights, strict=True)}
    routing = Routing(run.model)
    routing.begin_step({"blocks.0.mlp.router": chosen[0]})
    x = BF16.rounded(high[0])
    rounded = plain._experts(used, "blocks.0.mlp", run.model, x, {}, routing, BF16)
    gradient = numbers(*kernel.shape).bfloat16()
    kernel.backward(gradient)
    ((rounded * gradient.float()).sum() + sum(routing.losses)).backward()
    pairs = [(kernel, rounded), (low[0].grad, high[0].grad)]
    pairs += [(p.grad, w.grad) for p, w in zip(layer.parameters(), weights, strict=True)]
    for ours, right in pairs:
        assert ours is not None
        assert right is not None
        error = float((ours.detach().float() - right.detach()).norm() / right.detach().norm())
        assert error < 2**-8, [tuple(ours.shape), error]


def test_data_ranks_add_rounded_gradients() -> None:
    gradients = list(torch.randn(6, 50, generator=torch.Generator().manual_seed(1)))
    first, second = (sum(gradients[rank + 2 :: 2], gradients[rank]).bfloat16() for rank in (0, 1))
    assert torch.equal(BF16.total(gradients, 2), (first + second).float())
    assert not torch.equal(BF16.total(gradients, 1), BF16.total(gradients, 2))
    assert torch.equal(EXACT.total(gradients, 2), sum(gradients[1:], gradients[0]))


def test_the_reference_rounds_what_is_sent_unless_fp32_is_sent() -> None:
    def gradient(*overrides: str) -> Tensor:
        run = small_run("model=gpt_tiny", "parallelism.data=2", "precision=bf16", *overrides)
        batch = next(iter(plain.probe_batches(run)))
        trace = plain.reference_trace(run, plain.initial_weights(run), [batch], arithmetic=BF16)
        return trace[1].gradients["embedding.weight"]

    rounded, exact = gradient(), gradient("deepspeed.communication_data_type=fp32")
    assert torch.equal(rounded, to_bf16(rounded))
    assert not torch.equal(exact, to_bf16(exact))
