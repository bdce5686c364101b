"""Counts of operations in a step: tables are made once, and attention copies nothing."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.config.schema import ActivationCheckpointing, PositionKind
from launcher.models.architecture import FlatModel
from launcher.models.rotary import RotaryTables
from tests.models.small import PARTS, batch, build, small


class Operations(TorchDispatchMode):
    """Counts torch's operations by name, while entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function).split(".")[1]] += 1
        return function(*args, **(kwargs or {}))


def step(model: FlatModel) -> tuple[Counter[str], Counter[str]]:
    """Return the operations of a forward and of a backward pass."""
    tokens, labels = batch(61)
    with Operations() as forward:
        loss = model(tokens, labels)
    with Operations() as backward:
        loss.backward()
    return forward.counts, backward.counts


@pytest.mark.parametrize("checkpointing", ActivationCheckpointing)
def test_rotary_tables_are_made_once(checkpointing: ActivationCheckpointing) -> None:
    model = build(small("llama"), checkpointing=checkpointing)
    forward, backward = step(model)
    assert (forward["cos"], forward["sin"], backward["cos"]) == (1, 1, 0)
    forward, _ = step(model)
    assert (forward["cos"], forward["sin"]) == (0, 0)
    assert not any("cos" in name for name in model.state_dict())


def test_a_shorter_sequence_uses_the_same_tables() -> None:
    tables = RotaryTables(small("llama"))
    x = torch.zeros(1)
    longest, shorter = tables.of(9, x), tables.of(4, x)
    assert all(torch.equal(whole[:4], part) for whole, part in zip(longest, shorter, strict=True))
    assert shorter[0].data_ptr() == longest[0].data_ptr()
    assert len(tables.of(12, x)[0]) == 12


@pytest.mark.parametrize("parts", list(PARTS)[:4])
def test_attention_copies_nothing(parts: str) -> None:
    """The kernel reads views of the projection. One join of gradients per block goes back to it."""
    model = build(small(parts))
    rotates = PARTS[parts]["positions"] is PositionKind.rope
    forward, backward = step(model)
    layers = 2
    for counts in (forward, backward):
        assert counts["clone"] == 0, counts
    # Rotation joins the halves of queries and of keys.
    assert forward["cat"] == (2 * layers if rotates else 0)
    assert backward["cat"] >= layers


def test_the_count_sees_a_copy() -> None:
    with Operations() as operations:
        x: Tensor = torch.zeros(2, 3, 4).transpose(1, 2)
        x.flatten(1)
    assert operations.counts["clone"] == 1
