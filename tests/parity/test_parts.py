"""Verify of combinations of parts that no shipped model has: the layouts agree with the reference."""

import pytest
from torch import Tensor

import launcher.parallel.layers as layers
from tests.config.composing import UNPUBLISHED
from tests.parity.running import plain_sgd_pass, small_run, worst

LAYOUTS = {
    "tp2 sp": ["parallelism=tp2", "parallelism.data=1", "parallelism.sequence_parallel=true"],
    "pp2 full": ["parallelism=pp2", "parallelism.data=1", "parallelism.activation_checkpointing=full"],
}


@pytest.mark.slow
@pytest.mark.parametrize("parts", [name for name in UNPUBLISHED if "images" not in name])
def test_any_text_parts_agree_under_zero_3_with_documents(parts: str) -> None:
    layout = ["parallelism=zero3", "parallelism.data=2", "parallelism.tensor=2"]
    layout += ["parallelism.activation_checkpointing=selective", "data.document_attention=true"]
    result = plain_sgd_pass(small_run(*UNPUBLISHED[parts], *layout, steps=1))
    assert result.ok, (result.diagnosis, worst(result))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts", UNPUBLISHED)
def test_any_parts_agree_with_the_reference(parts: str, layout: str) -> None:
    result = plain_sgd_pass(small_run(*UNPUBLISHED[parts], *LAYOUTS[layout], steps=1))
    assert result.ok, (result.diagnosis, worst(result))


def biases_of_column_layers_not_added() -> None:
    def forward(self: layers.ColumnParallelLinear, x: Tensor) -> Tensor:
        y = layers.column_linear(x, self.weight, None, self.tp)
        return y if self.bias is None else y + 0 * self.bias

    layers.ColumnParallelLinear.forward = forward  # type: ignore[method-assign]


def test_a_bias_that_is_not_added_is_detected() -> None:
    run = small_run(*next(iter(UNPUBLISHED.values())), *LAYOUTS["tp2 sp"], steps=1)
    result = plain_sgd_pass(run, biases_of_column_layers_not_added)
    assert not result.ok
    assert any("attention.qkv" in difference.name for difference in worst(result))
