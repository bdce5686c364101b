"""Verify of a Vision Transformer: correct layouts pass, and faults in its layers are detected.

tests/parity/matrix.py covers more layouts: the Vision Transformer is one of its models.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

import launcher.models.vision as vision
from tests.parity.running import plain_sgd_pass, small_run, worst

VIT = "model=vit_b16 data=image_folder data.train=images parallelism.data=1"
LAYOUTS = {
    # Three patches per side and a class token: 10 tokens over 2 ranks.
    "tp sp class token": f"{VIT} parallelism=tp2 parallelism.sequence_parallel=true model.image_size=48",
    "tp sp mean": f"{VIT} parallelism=tp2 parallelism.sequence_parallel=true model.pooling=mean",
    "pp class token": f"{VIT} parallelism=pp2 parallelism.activation_checkpointing=full",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_agrees_with_the_reference(layout: str) -> None:
    result = plain_sgd_pass(small_run(*LAYOUTS[layout].split(), steps=1))
    assert result.ok, (result.diagnosis, worst(result))


def pooled_over_the_local_sequence_shard() -> None:
    vision.reduce_region = lambda x, axis: x


def a_class_token_on_every_rank() -> None:
    arange = vision.torch.arange

    def from_zero(first: int, last: int, **options: Any) -> Tensor:
        return arange(0, last - first, **options)

    vision.torch.arange = from_zero


def attention_is_causal() -> None:
    attention = F.scaled_dot_product_attention

    def causal(*arguments: Tensor, **options: Any) -> Tensor:
        return attention(*arguments, **(options | {"is_causal": True}))

    F.scaled_dot_product_attention = causal


@pytest.mark.parametrize(
    ("fault", "layout"),
    [
        (pooled_over_the_local_sequence_shard, "tp sp mean"),
        (pooled_over_the_local_sequence_shard, "tp sp class token"),
        (a_class_token_on_every_rank, "tp sp class token"),
        (attention_is_causal, "pp class token"),
    ],
)
def test_a_fault_is_detected(fault: Callable[[], None], layout: str) -> None:
    assert not plain_sgd_pass(small_run(*LAYOUTS[layout].split(), steps=1), fault).ok
