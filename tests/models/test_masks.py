"""Masks by hand, and that all layers share them."""

import pytest
import torch

from launcher.config.schema import ContextMethod
from launcher.models.documents import Documents
from launcher.models.masks import AttentionMasks, additive
from launcher.parallel.context import ContextParallel
from launcher.parallel.mesh import Axis
from tests.models.small import small

INF = float("inf")


def test_a_window_by_hand() -> None:
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    assert additive(allowed, 2, torch.float32).tolist() == [
        [0, -INF, -INF, -INF],
        [0, 0, -INF, -INF],
        [-INF, 0, 0, -INF],
        [-INF, -INF, 0, 0],
    ]


def test_a_window_within_documents_by_hand() -> None:
    documents = Documents(7)
    documents.begin(torch.tensor([[1, 7, 2, 3, 4]]))
    mask = AttentionMasks(small("llama"), documents).of(5, 2, torch.zeros(1))
    assert mask is not None
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_the_kernel_makes_a_plain_causal_mask_itself() -> None:
    masks, x = AttentionMasks(small("llama"), Documents(None)), torch.zeros(1)
    assert masks.of(8, None, x) is None
    assert masks.of(8, 8, x) is None
    assert masks.of(8, 7, x) is not None
    capped = AttentionMasks(small("llama", attention_soft_cap=1.0), Documents(None)).of(8, None, x)
    assert capped is not None
    assert (capped == 0).equal(torch.ones(8, 8, dtype=torch.bool).tril())


def test_layers_share_a_mask_and_shorter_sequences_its_values() -> None:
    masks, x = AttentionMasks(small("llama"), Documents(None)), torch.zeros(1)
    whole, shorter = masks.of(8, 3, x), masks.of(5, 3, x)
    assert whole is not None
    assert shorter is not None
    assert masks.of(8, 3, x).data_ptr() == whole.data_ptr()  # type: ignore[union-attr]
    assert torch.equal(shorter, whole[:5, :5])


@pytest.mark.parametrize(
    ("method", "lengths"),
    [
        # The second of two ranks holds the chunks 1 and 2 of 4. A window has 3 tokens.
        ("ring", {8: [0, 1, 2, 3], 12: [1, 2, 3, 4, 5, 6]}),
        ("ulysses", {8: [0, 0, 0, 1, 2, 3, 4, 5], 4: [0, 0, 0, 1]}),
    ],
)
def test_context_ranks_know_what_queries_see_in_sequences_of_any_length(
    method: str, lengths: dict[int, list[int]]
) -> None:
    context = ContextParallel(Axis(1, 2), ContextMethod[method])
    masks, x = AttentionMasks(small("llama"), Documents(None, context), context), torch.zeros(1)
    for length, expected in [*lengths.items(), *lengths.items()]:
        first = masks.of(length, 3, x)
        assert first is not None
        assert first.tolist() == [expected]


def test_each_micro_batch_has_masks_of_its_own() -> None:
    documents, x = Documents(7), torch.zeros(1)
    masks = AttentionMasks(small("llama"), documents)
    documents.begin(torch.tensor([[1, 7, 2]]))
    first = masks.of(3, None, x)
    assert masks.of(3, None, x) is first
    documents.begin(torch.tensor([[1, 2, 3]]))
    second = masks.of(3, None, x)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)
