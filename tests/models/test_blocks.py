"""The whole model in every tensor-parallel layout, recomputation, causality, rotary positions, dropout."""

from collections import Counter
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

import launcher.models.dropout as dropout
from launcher.config.schema import ActivationCheckpointing, ModelConfig
from launcher.engine.allocations import Allocations
from launcher.models.attention import Attention
from launcher.models.block_context import HiddenDropout
from launcher.models.blocks import TransformerBlock
from launcher.models.rotary import plain_frequencies, rotate, tables
from launcher.parallel.layers import TensorParallel
from launcher.parallel.sharding import LogicalTensor, logical_of, merge
from tests.distributed import mesh, pool
from tests.models.small import BATCH, LENGTH, PARTS, batch, build, by_name, gradients, relative_error, small

TOLERANCE = 2e-5  # of a gradient's largest value, in fp32

Gradients = tuple[float, dict[str, Tensor]]
architectures = pytest.mark.parametrize("architecture", PARTS)
layouts = pytest.mark.parametrize(
    ("world", "sequence_parallel"), [(2, False), (2, True), (4, False), (4, True)]
)


# Tensor-parallel layouts against one process.


def of_rank(
    rank: int, world: int, model: ModelConfig, sequence_parallel: bool, checkpointing: ActivationCheckpointing
) -> tuple[Gradients, dict[str, LogicalTensor]]:
    ours = build(model, mesh(tensor=world), sequence_parallel=sequence_parallel, checkpointing=checkpointing)
    logicals = {name: logical_of(parameter) for name, parameter in by_name(ours).items()}
    return gradients(ours, *batch(model.vocab_size)), logicals


def differences(
    model: ModelConfig, found: list[tuple[Gradients, dict[str, LogicalTensor]]]
) -> dict[str, float]:
    """Return differences of the loss and every logical gradient from a single process."""
    loss, expected = gradients(build(model), *batch(model.vocab_size))
    logicals = found[0][1]
    shards = [rank[0][1] for rank in found]
    assert all(shard.keys() == expected.keys() for shard in shards)
    worst = {"loss": max(abs(rank[0][0] - loss) / loss for rank in found)}
    for name, logical in logicals.items():
        if logical.is_split:
            worst[name] = relative_error(merge([shard[name] for shard in shards], logical), expected[name])
        else:  # each rank's own copy has to have the whole gradient
            worst[name] = max(relative_error(shard[name], expected[name]) for shard in shards)
    return worst


@architectures
@layouts
def test_loss_and_every_gradient_are_those_of_one_process(
    world: int, sequence_parallel: bool, architecture: str
) -> None:
    model = small(architecture)
    found = pool(world).run(of_rank, model, sequence_parallel, ActivationCheckpointing.none)
    worst = differences(model, found)
    assert all(error <= TOLERANCE for error in worst.values()), worst


@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture_is_tied_or_untied(tied: bool) -> None:
    for architecture in PARTS:
        model = small(architecture, tie_embeddings=tied)
        worst = differences(model, pool(2).run(of_rank, model, True, ActivationCheckpointing.none))
        assert ("head.weight" in worst) == (not tied)
        assert all(error <= TOLERANCE for error in worst.values()), worst


def without_replicated(rank: int, world: int, model: ModelConfig) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorParallel, "replicated", lambda self, weight: weight)
        return of_rank(rank, world, model, True, ActivationCheckpointing.none)


@architectures
def test_the_comparison_sees_gradients_of_one_stretch_only(architecture: str) -> None:
    """Without their all-reduce, only the gradients between the parallel regions are wrong."""
    model = small(architecture)
    found = pool(2).run(without_replicated, model)
    wrong = {name for name, error in differences(model, found).items() if not error <= 0.01}
    between = {name for name, logical in found[0][1].items() if not logical.is_split}
    # Norms of heads are within the parallel region, and all-reduce their gradients in every layout. Biases of
    # row-parallel layers have the gradient of the whole sequence on every rank.
    others = ("query_norm", "key_norm", "output.bias", "down.bias")
    assert wrong == {name for name in between if not any(other in name for other in others)}
    assert wrong


# Recomputation. Dropout is on: the same masks have to be drawn again.


def with_dropout(
    rank: int, world: int, model: ModelConfig, sequence_parallel: bool, checkpointing: ActivationCheckpointing
) -> list[Gradients]:
    """Run two steps, whose masks differ."""
    ours = build(model, mesh(tensor=world), sequence_parallel=sequence_parallel, checkpointing=checkpointing)
    steps = []
    for _ in range(2):
        ours.zero_grad()
        steps.append(gradients(ours, *batch(model.vocab_size)))
    return steps


def steps_differ(one: list[Gradients], other: list[Gradients]) -> bool:
    return any(
        a_loss != b_loss or any(not torch.equal(a[name], b[name]) for name in a)
        for (a_loss, a), (b_loss, b) in zip(one, other, strict=True)
    )


RECOMPUTING = [ActivationCheckpointing.selective, ActivationCheckpointing.full]
recomputing = pytest.mark.parametrize("checkpointing", RECOMPUTING, ids=lambda mode: mode.name)


@architectures
@recomputing
@pytest.mark.parametrize(("world", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_recomputation_changes_nothing(
    world: int, sequence_parallel: bool, checkpointing: ActivationCheckpointing, architecture: str
) -> None:
    model = small(architecture, dropout=0.3)
    kept = pool(world).run(with_dropout, model, sequence_parallel, ActivationCheckpointing.none)
    again = pool(world).run(with_dropout, model, sequence_parallel, checkpointing)
    assert not any(map(steps_differ, kept, again))
    assert kept[0][0][0] != kept[0][1][0]  # two steps, two masks


def with_other_masks(
    rank: int, world: int, model: ModelConfig, checkpointing: ActivationCheckpointing
) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        right, draws = dropout.seeded, count()
        patch.setattr(dropout, "seeded", lambda seed, device: right(seed ^ next(draws), device))
        return with_dropout(rank, world, model, False, checkpointing)


@recomputing
def test_the_comparison_sees_masks_drawn_anew(checkpointing: ActivationCheckpointing) -> None:
    model = small("gpt", dropout=0.3)
    kept = pool(2).run(with_dropout, model, False, ActivationCheckpointing.none)
    again = pool(2).run(with_other_masks, model, checkpointing)
    assert all(map(steps_differ, kept, again))


@pytest.mark.parametrize(
    ("checkpointing", "runs"),
    [
        (ActivationCheckpointing.none, {"attention core": 1, "block": 1}),
        (ActivationCheckpointing.selective, {"attention core": 2, "block": 1}),
        (ActivationCheckpointing.full, {"attention core": 2, "block": 2}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_recomputed(
    monkeypatch: pytest.MonkeyPatch, checkpointing: ActivationCheckpointing, runs: dict[str, int]
) -> None:
    counts: Counter[str] = Counter()
    for kind, name, what in ((Attention, "_core", "attention core"), (TransformerBlock, "_body", "block")):
        original = getattr(kind, name)

        def counted(self: Any, *x: Tensor, original: Any = original, what: str = what) -> Tensor:
            counts[what] += 1
            return original(self, *x)  # type: ignore[no-any-return]

        monkeypatch.setattr(kind, name, counted)
    model = small("gpt")
    gradients(build(model, checkpointing=checkpointing), *batch(model.vocab_size))
    assert counts == {what: times * model.num_layers for what, times in runs.items()}


# Dropout over tensor ranks.


@architectures
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_keeps_replicated_weights_equal(sequence_parallel: bool, architecture: str) -> None:
    """Losses and gradients of replicated weights are bitwise equal on all ranks; else copies would drift."""
    model = small(architecture, dropout=0.3)
    ranks = pool(4).run(with_dropout, model, sequence_parallel, ActivationCheckpointing.none)
    replicated = [n for n, p in by_name(build(model)).items() if not logical_of(p).is_split]
    for steps in ranks[1:]:
        for (loss, own), (first_loss, first) in zip(steps, ranks[0], strict=True):
            assert loss == first_loss
            assert all(torch.equal(own[name], first[name]) for name in replicated)


def masks(rank: int, world: int, sequence_parallel: bool) -> tuple[list[float], list[float]]:
    """Return the dropout of ones, between the regions and in the attention of equal heads."""
    model = small("llama", dropout=0.5)
    ours = build(model, mesh(tensor=world), sequence_parallel=sequence_parallel)
    block = next(m for m in ours.modules() if isinstance(m, TransformerBlock))
    hidden = block.dropout(torch.ones(1, 4, 8), block.dropout.seed())
    equal = torch.ones(1, block.attention.heads, 4, 4)
    keys = torch.ones(1, block.attention.kv_heads, 4, 4)
    dropped = block.attention._core(equal, keys, keys, None, None, None, block.attention.seed())
    return hidden.flatten().tolist(), dropped.flatten().tolist()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_masks_over_tensor_ranks(sequence_parallel: bool) -> None:
    [(hidden_0, attention_0), (hidden_1, attention_1)] = pool(2).run(masks, sequence_parallel)
    assert (hidden_0 == hidden_1) == (not sequence_parallel)
    assert attention_0 != attention_1


@architectures
def test_evaluation_has_no_dropout(architecture: str) -> None:
    tokens, labels = batch(61)
    dropping, plain = build(small(architecture, dropout=0.5)), build(small(architecture))
    assert dropping(tokens, labels) != plain(tokens, labels)
    assert dropping.eval()(tokens, labels) == plain(tokens, labels)


def test_hidden_dropout_keeps_the_mean() -> None:
    context = next(m for m in build(small("gpt")).modules() if isinstance(m, HiddenDropout)).context
    mean = float(HiddenDropout(0.25, context)(torch.ones(100_000), 7).mean())
    assert mean == pytest.approx(1.0, abs=0.02)


# Causality and positions.


@architectures
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_later_tokens_do_not_change_earlier_logits(dropout: float, architecture: str) -> None:
    model, (tokens, _) = small(architecture, dropout=dropout), batch(61)

    def logits(tokens: Tensor) -> Tensor:
        return build(model).logits(tokens).detach()  # built anew, it draws the same masks

    before = logits(tokens)
    for at in (1, 7, 15):
        changed = tokens.clone()
        changed[:, at] = (tokens[:, at] + 1) % 61
        difference = (logits(changed) - before).abs().amax(dim=(0, 2))
        assert float(difference[:at].max()) <= 1e-5
        assert float(difference[at:].max()) > 1e-3


@architectures
def test_a_shorter_sequence_has_the_same_logits(architecture: str) -> None:
    model, (tokens, _) = build(small(architecture)), batch(61)
    torch.testing.assert_close(model.logits(tokens[:, :5]), model.logits(tokens)[:, :5], rtol=1e-5, atol=1e-5)


@architectures
def test_order_matters(architecture: str) -> None:
    """Without positions, the last logits would not depend on the order of tokens."""
    model, (tokens, _) = build(small(architecture, num_layers=1)), batch(61)
    swapped = tokens.clone()
    swapped[:, [2, 9]] = tokens[:, [9, 2]]
    assert (model.logits(swapped) - model.logits(tokens))[:, -1].abs().max() > 1e-3


def rotated(vector: Tensor, positions: int = 12, theta: float = 100.0) -> Tensor:
    """Return (D,) rotated at each position: (T, D)."""
    x = vector.expand(1, positions, 1, -1)
    return rotate(x, *tables(torch.arange(positions), plain_frequencies(len(vector), theta), 1.0, x))[0, :, 0]


def test_rotary_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    products = rotated(q) @ rotated(k).T
    for distance in range(-11, 12):
        same = products.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-5, atol=1e-5)
    assert products[:, 0].std() > 0.1


def test_rotary_positions_turn_complex_numbers() -> None:
    x = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    numbers = torch.complex(x[:4], x[4:])
    angles = torch.arange(12).double()[:, None] / 100.0 ** (torch.arange(4).double() / 4)
    turned = numbers * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(rotated(x), expected, rtol=1e-5, atol=1e-5)


def test_rotary_angles_are_of_fp32_in_bf16() -> None:
    """Angles rounded to bf16 would be off by whole turns at later positions."""
    x = torch.ones(1, 2000, 1, 8)
    low = x.bfloat16()
    plain = plain_frequencies(8, 1e4)
    found = rotate(low, *tables(torch.arange(2000), plain, 1.0, low)).float()
    assert (found - rotate(x, *tables(torch.arange(2000), plain, 1.0, x))).abs().max() < 0.02


# Initial weights.


@architectures
def test_initial_weights(architecture: str) -> None:
    model = small(architecture, hidden_size=128, ffn_hidden_size=256, num_layers=8, init_std=0.02)
    for name, weight in by_name(build(model)).items():
        kind = name.rsplit(".", 2)[-2]
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in kind:
            assert bool((weight == 1).all()), name
        else:
            expected = 0.02 / 4 if kind in ("output", "down") else 0.02  # sqrt(2 x 8 layers)
            assert float(weight.detach().std()) == pytest.approx(expected, rel=0.05), name


@architectures
def test_every_parameter_has_a_name_of_its_own(architecture: str) -> None:
    model = build(small(architecture))
    assert len(by_name(model)) == len(list(model.parameters()))


# Collectives of a block.


def traffic_of_a_block(
    rank: int, world: int, sequence_parallel: bool, reduced_twice: bool = False
) -> list[dict[tuple[str, int], int]]:
    """Return how often a block's forward and backward pass call each collective, by kind and bytes."""
    model = small("gpt")
    ours = build(model, mesh(tensor=world), sequence_parallel=sequence_parallel)
    block = next(module for module in ours.modules() if isinstance(module, TransformerBlock))
    own_length = LENGTH // world if sequence_parallel else LENGTH
    x = torch.randn(BATCH, own_length, model.hidden_size, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch, Allocations() as counted:
        if reduced_twice:
            leave = TensorParallel.leave
            patch.setattr(TensorParallel, "leave", lambda tp, partial: leave(tp, leave(tp, partial)))
        y = block(x)
        passes = [dict(counted.collectives)]
        counted.restart()
        y.backward(torch.ones_like(y))
        passes.append(dict(counted.collectives))
    return [{(call.kind, call.size): times for call, times in calls.items()} for calls in passes]


ACTIVATION = BATCH * LENGTH * small("gpt").hidden_size * 4  # bytes of (B, T, H) in fp32


def sent(calls: dict[tuple[str, int], int], world: int) -> float:
    """Return the bytes of activations that a rank sends in rings."""
    kinds = {"all_reduce": 2, "all_gather": 1, "all_to_all": 1}
    return sum(
        kinds[kind] * size * (world - 1) / world * times
        for (kind, size), times in calls.items()
        if size == ACTIVATION
    )


def test_a_block_makes_two_all_reduces_in_each_direction() -> None:
    twice = {("all_reduce", ACTIVATION): 2}
    assert pool(2).run(traffic_of_a_block, False) == [[twice, twice]] * 2
    forward, _ = pool(2).run(traffic_of_a_block, False, True)[0]
    assert forward == {("all_reduce", ACTIVATION): 4}  # the count can fail


def test_sequence_parallelism_sends_as_many_bytes() -> None:
    forward, backward = pool(2).run(traffic_of_a_block, True)[0]
    # On a CPU a reduce-scatter is an all-to-all, which sends as much.
    assert forward == {("all_gather", ACTIVATION): 2, ("all_to_all", ACTIVATION): 2}
    # A column layer keeps its own stretch of its input and gathers the input again, as arXiv 2205.05198 does.
    gathered_again = 2
    assert backward[("all_to_all", ACTIVATION)] == 2
    assert backward[("all_gather", ACTIVATION)] == 2 + gathered_again
    # The rest is the gradients of two norms, weight and bias together.
    rest = {call: times for call, times in backward.items() if call[1] != ACTIVATION}
    vector = 4 * small("gpt").hidden_size
    assert rest == {("all_reduce", 2 * vector): 2}
    plain, _ = pool(2).run(traffic_of_a_block, False)[0]
    assert sent(forward, 2) == sent(plain, 2)
    assert sent(backward, 2) - gathered_again * ACTIVATION / 2 == sent(plain, 2)
