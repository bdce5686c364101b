"""Experts in one process: routing, products, losses, and routers that leave experts without tokens."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from launcher.config.schema import ExpertsConfig, ModelConfig, RouterKind, RunConfig
from launcher.models import grouped
from launcher.models.block_context import BlockContext
from launcher.models.expert_losses import load_balancing_loss, with_loss, z_loss
from launcher.models.experts import Experts
from launcher.models.grouped import collect, grouped_linear, sorted_by_expert, spread
from launcher.models.selection_bias import balance
from launcher.parallel.initializer import Initializer
from launcher.parallel.mesh import ProcessMesh
from tests.distributed import mesh, pool
from tests.models.small import BATCH, LENGTH, relative_error, small

COUNT, TOP_K, WIDTH = 5, 2, 20


def model_with(**experts: object) -> ModelConfig:
    settings = {"count": COUNT, "top_k": TOP_K, "ffn_hidden_size": WIDTH, **experts}
    return small("llama", experts=ExpertsConfig(**settings))  # type: ignore[arg-type]


def layer_of(model: ModelConfig) -> Experts:
    initializer = Initializer(7, ProcessMesh.single().tensor)
    context = BlockContext.create(RunConfig(model=model), ProcessMesh.single(), initializer)
    return Experts("blocks.0.mlp", model, context)


def inputs_of(model: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, LENGTH, model.hidden_size, generator=generator).requires_grad_()


def plain(layer: Experts, model: ModelConfig, x: Tensor) -> Tensor:
    """Return the output of the layer, token by token."""
    e = model.experts
    ups, downs = layer.up.chunk(e.count), layer.down.chunk(e.count)
    rows = []
    for token in x.flatten(0, 1):
        logits = layer.router.weight @ token
        scores = logits.softmax(0) if e.router is RouterKind.softmax else logits.sigmoid()
        best = sorted(range(e.count), key=lambda expert: -scores[expert].item())[: e.top_k]
        total = sum(scores[expert] for expert in best) if e.normalize_top_k else 1.0
        row = torch.zeros_like(token)
        for expert in best:
            gate, up = (ups[expert] @ token).chunk(2)
            row = row + e.scaling * scores[expert] / total * (downs[expert] @ (F.silu(gate) * up))
        rows.append(row if layer.shared is None else row + layer.shared(token[None, None])[0, 0])
    return torch.stack(rows).view_as(x)


def test_frozen_experts_keep_no_rows_and_get_no_gradient() -> None:
    model = model_with()
    layer, frozen = layer_of(model), layer_of(model).requires_grad_(False)
    x, same = inputs_of(model), inputs_of(model)
    output = frozen(same)
    output.square().sum().backward()
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert same.grad is not None
    torch.testing.assert_close(same.grad, x.grad)
    assert all(weight.grad is None for weight in frozen.parameters())
    rows = torch.randn(6, 4, requires_grad=True)
    order = sorted_by_expert(torch.zeros(6, 1, dtype=torch.long), 2)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        grouped_linear(rows, torch.randn(2, 3, 4), order)
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 3, 4)]


def test_a_weight_that_is_freed_after_the_forward_pass_keeps_no_memory() -> None:
    """ZeRO-3 frees the weights of a layer after its forward pass, and gathers them for the backward pass."""
    model = model_with()
    layer, x = layer_of(model), inputs_of(model)
    weights = [layer.up, layer.down]
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *weights])
    loss = layer(x).square().sum()
    values = [weight.detach().clone() for weight in weights]
    storages = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
    for weight in weights:
        weight.data = torch.empty(0)
    assert all(storage.expired() for storage in storages)
    for weight, value in zip(weights, values, strict=True):
        weight.data = value
    gradients = torch.autograd.grad(loss, [x, *weights])
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, right)


KINDS = [*product(RouterKind, (True, False), (0,)), (RouterKind.sigmoid, True, 2)]


@pytest.mark.parametrize(("router", "normalized", "shared"), KINDS)
def test_the_layer_is_the_sum_over_the_chosen_experts(
    router: RouterKind, normalized: bool, shared: int
) -> None:
    model = model_with(router=router, normalize_top_k=normalized, shared=shared, scaling=1.5)
    layer, x = layer_of(model), inputs_of(model)
    torch.testing.assert_close(layer(x), plain(layer, model, x))
    weights = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), weights)
    theirs = torch.autograd.grad(plain(layer, model, x).square().sum(), weights)
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) < 1e-5


def test_a_router_that_sends_everything_to_one_expert() -> None:
    """The other experts have no token: their gradients are zero, no number is a NaN, no token is dropped."""
    model = model_with(top_k=1, auxiliary_loss=0.1, z_loss=0.1)
    layer = layer_of(model)
    x = inputs_of(model).detach().abs().requires_grad_()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[3] = 1.0
    y = layer(x)
    torch.testing.assert_close(y, plain(layer, model, x))
    y.square().sum().backward()
    for weight in layer.parameters():
        assert weight.grad is not None
        assert bool(weight.grad.isfinite().all())
    by_expert = layer.up.grad.view(COUNT, -1).abs().sum(1)  # type: ignore[union-attr]
    assert by_expert.nonzero().flatten().tolist() == [3]
    by_expert = layer.down.grad.view(COUNT, -1).abs().sum(1)  # type: ignore[union-attr]
    assert by_expert.nonzero().flatten().tolist() == [3]


def test_rows_are_sorted_and_brought_back() -> None:
    chosen = torch.tensor([[4, 0], [0, 1], [4, 1]])
    order = sorted_by_expert(chosen, COUNT)
    assert order.sizes == [2, 2, 0, 0, 2]
    tokens = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    rows = spread(tokens, order)
    assert rows.flatten().tolist() == [1.0, 2.0, 2.0, 3.0, 1.0, 3.0]
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.5]], requires_grad=True)
    assert collect(rows, weights, order).flatten().tolist() == [1.0, 2.0, 2.25]
    collect(rows, weights, order).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.flatten().tolist() == [1.0, 1.0, 0.75]


def test_grouped_products_have_the_gradients_of_a_loop() -> None:
    order = sorted_by_expert(torch.tensor([[0], [2], [2], [4]]), COUNT)
    x, weights = torch.randn(4, 3, requires_grad=True), torch.randn(COUNT, 6, 3, requires_grad=True)
    experts = torch.tensor([0, 2, 2, 4])
    loop = torch.stack([weights[expert] @ row for expert, row in zip(experts, x, strict=True)])
    torch.testing.assert_close(grouped_linear(x, weights, order), loop)
    target = torch.randn(4, 6)
    ours = torch.autograd.grad((grouped_linear(x, weights, order) * target).sum(), [x, weights])
    theirs = torch.autograd.grad((loop * target).sum(), [x, weights])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_losses_are_means_over_sequences() -> None:
    """Of two halves of a batch the mean is that of the batch, as of micro-batches and data ranks."""
    scores = torch.randn(4, LENGTH, COUNT).softmax(-1)
    chosen = scores.topk(TOP_K).indices
    halves = [load_balancing_loss(s, c) for s, c in zip(scores.chunk(2), chosen.chunk(2), strict=True)]
    torch.testing.assert_close(sum(halves) / 2, load_balancing_loss(scores, chosen))
    logits = scores.log()
    torch.testing.assert_close(z_loss(logits), torch.zeros(()), atol=1e-9, rtol=0)


ALIGNED = 8  # columns of bf16 in 16 bytes
ROUTES = {"all experts": [[0], [1], [2], [3], [4], [0]], "empty experts": [[1], [3], [3], [1], [1], [3]]}


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_grouped_product_is_the_loop(
    routes: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs torch's function runs too; the launcher uses it where torch has a kernel."""
    kernel = grouped.grouped_kernel()
    order = sorted_by_expert(torch.tensor(ROUTES[routes]), COUNT)
    x = torch.randn(6, ALIGNED, dtype=dtype, requires_grad=True)
    weights = torch.randn(COUNT, 2 * ALIGNED, ALIGNED, dtype=dtype, requires_grad=True)
    target = torch.randn(6, 2 * ALIGNED, dtype=dtype)
    results = []
    for chosen in (None, kernel):
        monkeypatch.setattr(grouped, "_kernel_for", lambda *_, chosen=chosen: chosen)
        y = grouped_linear(x, weights, order)
        results.append([y, *torch.autograd.grad((y * target).sum(), [x, weights])])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(theirs.float(), ours.float()) < (1e-6 if dtype is torch.float32 else 1e-2)
    if routes == "empty experts":
        assert not results[1][2][[0, 2, 4]].any()


def test_the_loop_multiplies_on_cpus_and_rows_of_odd_lengths() -> None:
    aligned, odd = torch.empty(2, 16, 8, dtype=torch.bfloat16), torch.empty(2, 15, 8, dtype=torch.bfloat16)
    x = torch.empty(4, 8, dtype=torch.bfloat16)
    assert grouped._is_aligned(x, aligned)
    assert not grouped._is_aligned(x, odd)
    assert not grouped._is_aligned(torch.empty(33, dtype=torch.bfloat16)[1:].view(4, 8), aligned)
    assert grouped._kernel_for(x, aligned) is None


def balance_of_a_part(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Return this context rank's share of the balance loss, and its gradients."""
    context = mesh(context=world).context
    logits, chosen = (each.chunk(world, 1)[rank] for each in skewed_routes())
    logits = logits.clone().requires_grad_()
    loss = load_balancing_loss(logits.softmax(-1), chosen, context)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def skewed_routes() -> tuple[Tensor, Tensor]:
    """Return logits (B, T, E) and chosen experts of sequences whose halves prefer other experts."""
    logits = torch.randn(3, 8, COUNT, generator=torch.Generator().manual_seed(5))
    logits[:, :4, 0] += 3
    return logits, logits.topk(TOP_K).indices


def test_the_balance_loss_of_context_ranks_is_that_of_whole_sequences() -> None:
    logits, chosen = skewed_routes()
    whole = logits.clone().requires_grad_()
    loss = load_balancing_loss(whole.softmax(-1), chosen)
    loss.backward()
    losses, gradients = zip(*pool(2).run(balance_of_a_part), strict=True)
    torch.testing.assert_close(sum(losses) / 2, loss.detach())
    torch.testing.assert_close(torch.cat(gradients, 1) / 2, whole.grad)
    pairs = zip(logits.softmax(-1).chunk(2, 1), chosen.chunk(2, 1), strict=True)
    alone = sum(float(load_balancing_loss(*pair)) for pair in pairs) / 2
    assert abs(alone - float(loss.detach())) > 0.01  # if each rank counted the uses of its part alone


def test_the_balance_loss_is_1_if_experts_are_alike_and_more_if_one_is_preferred() -> None:
    even = torch.full((1, COUNT, COUNT), 1 / COUNT)
    turns = torch.arange(COUNT)[:, None].add(torch.arange(TOP_K)).remainder(COUNT)[None]
    torch.testing.assert_close(load_balancing_loss(even, turns), torch.tensor(1.0))
    skewed = torch.tensor([0.96, 0.01, 0.01, 0.01, 0.01]).expand(1, COUNT, COUNT)
    first = skewed.topk(TOP_K).indices
    assert float(load_balancing_loss(skewed, first)) > 2.4


def test_a_loss_reaches_the_gradients_beside_the_output() -> None:
    x, y = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0])
    with_loss(x, (x * x).sum()).mul(y).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0 + 4.0]


def test_a_bias_grows_for_the_experts_that_few_tokens_chose() -> None:
    model = model_with(top_k=1, bias_balancing=0.25)
    layer = layer_of(model)
    bias = layer.selection_bias
    assert bias is not None
    x = inputs_of(model).detach().abs()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[3] = 0.01
    layer(x.requires_grad_())
    kept = torch.ones(())
    balance(layer, ProcessMesh.single().data, 0 * kept)  # a skipped step
    assert bias.value.tolist() == [0.0] * COUNT
    layer(x)
    balance(layer, ProcessMesh.single().data, kept)
    assert bias.value.tolist() == [0.25, 0.25, 0.25, -0.25, 0.25]
    layer.record.take(x.device)
    layer(x)
    after = layer.record.take(x.device)[:COUNT]
    assert after[3] == 0
    layer.eval()
    layer(x)
    balance(layer, ProcessMesh.single().data, kept)  # of the training step alone
    assert bias.value[3] == 0.0
