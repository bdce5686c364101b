"""Attention and positions that stop at the end of a document give the results of documents run separately."""

import pytest
import torch
from torch import Tensor

from launcher.config.schema import ActivationCheckpointing, CorpusSource, DataConfig
from launcher.models.architecture import FlatModel
from launcher.models.documents import Documents, attention_mask, positions_in_documents
from tests.models.small import PARTS, build, by_name, gradients, relative_error, small

END = 7
# Two samples of 16 tokens: one ends inside its fourth document, the other holds nothing but one, cut short.
PACKED = torch.tensor(
    [
        [1, 2, 3, END, 4, END, END, 5, 6, 1, 2, 3, 4, END, 9, 9],
        [8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15],
    ]
)
SPANS = [(0, 0, 4), (0, 4, 6), (0, 6, 7), (0, 7, 14), (0, 14, 16), (1, 0, 16)]  # (sample, start, end)


def test_a_mask_by_hand() -> None:
    ends = torch.tensor([[False, True, False, False, True]])
    assert attention_mask(ends).int().tolist() == [
        [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]]
    ]
    assert positions_in_documents(ends).tolist() == [[0, 1, 0, 1, 2]]


def test_positions_by_hand() -> None:
    assert positions_in_documents(PACKED == END).tolist() == [
        [0, 1, 2, 3, 0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 0, 1],
        list(range(16)),
    ]


def test_without_an_end_there_are_none() -> None:
    documents = Documents(None)
    documents.begin(PACKED)
    assert documents.ends is None
    assert documents.positions is None


def with_documents(architecture: str, checkpointing: ActivationCheckpointing) -> FlatModel:
    data = DataConfig(source=CorpusSource.tokens, document_attention=True, end_of_document=END)
    return build(small(architecture), checkpointing=checkpointing, data=data)


@pytest.mark.parametrize("checkpointing", list(ActivationCheckpointing), ids=lambda value: value.name)
@pytest.mark.parametrize("architecture", PARTS)
def test_is_as_if_documents_were_run_one_by_one(
    architecture: str, checkpointing: ActivationCheckpointing
) -> None:
    packed, alone = with_documents(architecture, checkpointing), build(small(architecture))
    labels = PACKED.roll(-1, 1)
    _, found = gradients(packed, PACKED, labels)
    total = sum(
        alone(PACKED[row, start:end][None], labels[row, start:end][None]) * (end - start) / PACKED.numel()
        for row, start, end in SPANS
    )
    assert isinstance(total, Tensor)
    total.backward()
    for name, parameter in by_name(alone).items():
        assert parameter.grad is not None
        assert relative_error(found[name], parameter.grad) < 1e-4, name
    with torch.no_grad():
        whole = packed.logits(PACKED)
        for row, start, end in SPANS:
            one = alone.logits(PACKED[row, start:end][None])[0]
            assert relative_error(whole[row, start:end], one) < 1e-4


@pytest.mark.parametrize("architecture", PARTS)
def test_makes_a_difference(architecture: str) -> None:
    with torch.no_grad():
        packed = with_documents(architecture, ActivationCheckpointing.none).logits(PACKED)
        joined = build(small(architecture)).logits(PACKED)
    assert relative_error(packed[0, :4], joined[0, :4]) < 1e-4
    assert relative_error(packed[0, 4:], joined[0, 4:]) > 0.1
    assert relative_error(packed[1], joined[1]) < 1e-4
