"""Attention within documents agrees, in every kind of layout, with processing each document separately.

tests/parity/matrix.py covers more layouts: document attention is one of its variations.
"""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.models import documents, masks
from launcher.models.documents import Documents
from tests.parity.running import plain_sgd_pass, small_run, worst

LAYOUTS = {
    "tp sp": "model=gpt_tiny parallelism=tp2 parallelism.data=1 parallelism.sequence_parallel=true",
    "pp recomputed": "model=llama_tiny parallelism=pp2 parallelism.data=1 "
    "parallelism.activation_checkpointing=full",
    "dualpipev": "model=gpt_tiny model.num_layers=8 parallelism=pp2 parallelism.data=1 "
    "parallelism.pipeline_schedule=dualpipev training.micro_batch_size=1 "
    "parallelism.activation_checkpointing=selective",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_agrees_with_the_reference(layout: str) -> None:
    result = plain_sgd_pass(small_run("data.document_attention=true", *LAYOUTS[layout].split(), steps=1))
    assert result.ok, (result.diagnosis, worst(result))


def no_boundaries_on_later_stages() -> None:
    begin = Documents.begin

    def on_the_first_stage(self: Documents, tokens: Tensor) -> None:
        if dist.get_rank() < dist.get_world_size() // 2:
            begin(self, tokens)

    Documents.begin = on_the_first_stage  # type: ignore[method-assign]


def boundaries_of_the_previous_micro_batch() -> None:
    begin = Documents.begin
    last: list[Tensor] = []

    def late(self: Documents, tokens: Tensor) -> None:
        last.append(tokens)
        begin(self, last[max(0, len(last) - 2)])

    Documents.begin = late  # type: ignore[method-assign]


def the_end_belongs_to_the_next_document() -> None:
    right = masks.attention_mask
    masks.attention_mask = lambda ends: right(ends.roll(-1, 1))


def positions_continue_across_documents() -> None:
    documents.positions_in_documents = lambda ends: ends.cumsum(1) * 0 + torch.arange(ends.shape[1])


@pytest.mark.parametrize(
    ("fault", "layout"),
    [
        (no_boundaries_on_later_stages, "pp recomputed"),
        (boundaries_of_the_previous_micro_batch, "pp recomputed"),
        (the_end_belongs_to_the_next_document, "tp sp"),
        (positions_continue_across_documents, "tp sp"),
    ],
)
def test_a_fault_is_detected(fault: Callable[[], None], layout: str) -> None:
    small = small_run("data.document_attention=true", *LAYOUTS[layout].split(), steps=1)
    assert not plain_sgd_pass(small, fault).ok
