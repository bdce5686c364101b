"""The loss is the sum over all labels of the global batch that count over their number, in every layout."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.parity.reference import GlobalBatch, documents, forward, initial_weights
from tests.config.composing import run_of
from tests.distributed import run_fresh

SMALL = [
    "hardware=cpu", "model=gpt_tiny", "model.hidden_size=64", "model.ffn_hidden_size=128",
    "model.num_layers=2", "data.sequence_length=16", "training.micro_batch_size=2",
    "training.global_batch_size=8", "optimizer.lr=1e-3", "optimizer.gradient_clipping=0.5",
    "optimizer.epsilon=1e-5",  # of a gradient near 0 the update would be its rounding error
]  # fmt: skip
LAYOUTS = ["dp", "tp2", "pp2", "cp2", "zero1", "zero2", "zero3"]


class Trained(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]


def batches(run: RunConfig) -> list[GlobalBatch]:
    """Return five global batches of 8 samples with unequal masks.

    Micro-batches of 2: with two data ranks, samples 0, 1, 4 and 5 are of the first rank. With two context
    ranks, the tokens 4 to 11 of 16 are of the second rank.
    """
    generator = torch.Generator().manual_seed(7)
    made = []
    for step in range(5):
        tokens = torch.randint(run.model.vocab_size, (8, sequence_length(run) + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        shares = torch.linspace(0.05, 0.95, 8)[:, None]
        labels[torch.rand(labels.shape, generator=generator) < shares] = IGNORED_LABEL
        if step == 1:
            labels[4:6] = IGNORED_LABEL  # a micro-batch
        if step == 2:
            labels[[2, 3, 6, 7]] = IGNORED_LABEL  # a data rank
        if step == 3:
            labels[:] = IGNORED_LABEL
        if step == 4:
            labels[:, 4:12] = IGNORED_LABEL  # a context rank
        made.append((tokens[:, :-1], labels))
    return made


def plain_loop(run: RunConfig) -> Trained:
    """Train in one process, each global batch in one piece, with torch's loss, clipping and optimizer."""
    weights = {name: weight.requires_grad_() for name, weight in initial_weights(run).items()}
    o = run.optimizer
    groups = [
        {"params": [w for w in weights.values() if w.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [w for w in weights.values() if w.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.epsilon)  # type: ignore[arg-type]
    losses = []
    for inputs, labels in batches(run):
        logits = forward(weights, run.model, inputs, {}, documents(run, inputs)).flatten(0, 1)
        total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        loss = total / max(1, int((labels != IGNORED_LABEL).sum()))
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        assert o.gradient_clipping is not None
        torch.nn.utils.clip_grad_norm_(weights.values(), o.gradient_clipping)
        optimizer.step()
        losses.append(loss.item())
    return Trained(losses, {name: weight.detach() for name, weight in weights.items()})


def engine_loop(rank: int, world: int, init_method: str, run: RunConfig) -> tuple[Trained, list[float]]:
    """Train with an engine; return the weights and losses of this rank, and the losses in evaluation."""
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    prepare_deepspeed("cpu")
    from launcher.engine.build import build_engine
    from launcher.parity.recording import rank_batches

    layout = validate(run, World("cpu", world, world))
    device = join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=init_method)
    engine = build_engine(run, layout, device)
    evaluated, losses = [], []
    for step, batch in enumerate(batches(run), 1):
        labels = int((batch[1] != IGNORED_LABEL).sum())
        evaluated.append(float(engine.eval_batch(iter(list(rank_batches(run, engine, batch))), labels)))
        engine.set_learning_rate(run.optimizer.lr)
        engine.random.begin_step(step)
        result = engine.train_batch(iter(list(rank_batches(run, engine, batch))), labels)
        losses.append(engine.mean_loss(result.loss))
    weights = {logical.name: weight.clone() for logical, weight in engine.full_weights()}
    leave()
    return Trained(losses, weights), evaluated


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unequal_masks_train_as_in_a_plain_loop(layout: str) -> None:
    data = 1 if layout in ("tp2", "pp2", "cp2") else 2
    run = run_of(*SMALL, f"parallelism={layout}", f"parallelism.data={data}")
    expected = plain_loop(run)
    ranks = run_fresh(engine_loop, 2, run)
    for trained, evaluated in ranks:
        assert trained.losses == pytest.approx(expected.losses, abs=1e-5)
        # Evaluated before the step, so with the same weights.
        assert evaluated == pytest.approx(expected.losses, abs=1e-5)
    weights = {name: weight for trained, _ in ranks for name, weight in trained.weights.items()}
    assert weights.keys() == expected.weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=1e-5, atol=1e-5, msg=name)


def forgotten(rank: int, world: int, init_method: str, run: RunConfig) -> str:
    from launcher.engine.distributed import join, prepare_deepspeed

    prepare_deepspeed("cpu")
    from launcher.engine.build import build_engine
    from launcher.parity.recording import rank_batches

    layout = validate(run, World("cpu", world, world))
    device = join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=init_method)
    engine = build_engine(run, layout, device)
    with pytest.raises(AssertionError) as error:
        engine.train_batch(rank_batches(run, engine, batches(run)[0]))
    return str(error.value)


def test_masked_labels_whose_number_is_not_passed_are_an_error() -> None:
    run = run_of(*SMALL, "parallelism=single")
    assert run_fresh(forgotten, 1, run) == ["the caller must pass the number of labels that count"]
