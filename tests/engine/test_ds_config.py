"""The DeepSpeed config: pure, and explicit wherever DeepSpeed's default would be wrong."""

from typing import Any

import pytest

from launcher.config.layout import resolve_layout
from launcher.config.machine import Machine
from launcher.config.world import world_of_machine
from launcher.engine.ds_config import deepspeed_config, merged
from tests.config.composing import composed


def config_of(*overrides: str, gpus: int = 0) -> dict[str, Any]:
    run = composed(*overrides)
    return deepspeed_config(run, resolve_layout(run, world_of_machine(run, Machine(gpus=gpus, cores=2))))


def test_sets_micro_batch_and_accumulation_but_not_global_batch() -> None:
    config = config_of("parallelism.data=2", "training.global_batch_size=16", "training.micro_batch_size=2")
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert "train_batch_size" not in config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallelism=zero1"], 1.0),
        (["parallelism=zero1", "optimizer.gradient_clipping=0.3"], 0.3),
        (["parallelism=zero1", "optimizer.gradient_clipping=null"], 0.0),
        (["parallelism=dp"], 0.0),  # under ZeRO-0 our engine clips
    ],
)
def test_clipping_is_always_set(overrides: list[str], expected: float) -> None:
    assert config_of(*overrides)["gradient_clipping"] == expected


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        (["parallelism=dp"], 0),
        (["parallelism.pipeline=2"], 1),
        (["precision=bf16"], 1),
        (["parallelism=zero3", "precision=bf16"], 3),
    ],
)
def test_zero_stage_avoids_stages_where_deepspeed_is_wrong(overrides: list[str], stage: int) -> None:
    assert config_of(*overrides)["zero_optimization"]["stage"] == stage


def test_low_precision_accumulates_in_fp32() -> None:
    assert "bf16" not in config_of()
    bf16 = config_of("precision=bf16")
    assert bf16["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert bf16["data_types"] == {"grad_accum_dtype": "fp32"}
    fp16 = config_of("precision=fp16", "precision.initial_loss_scale_power=12", gpus=2)
    assert fp16["fp16"] == {"enabled": True, "initial_scale_power": 12}


def test_bf16_states_are_summed_and_kept_in_bf16() -> None:
    config = config_of("precision=bf16_states")
    assert config["bf16"] == {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }
    assert config["data_types"] == {"grad_accum_dtype": "bf16"}
    assert config["zero_optimization"]["stage"] == 1


def test_offload_pins_memory_only_with_a_gpu() -> None:
    for gpus, pinned in ((0, False), (2, True)):
        zero = config_of("parallelism=zero3_offload", gpus=gpus)["zero_optimization"]
        assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": pinned}
        assert zero["offload_param"] == {"device": "cpu", "pin_memory": pinned}


def test_zero_3_gathers_the_next_block_ahead() -> None:
    """The weights of its projections on a tensor rank; for a small block as many as DeepSpeed's default.

    Of a large block that is not compiled each module gathers its own weights.
    """
    for model, setting, prefetched, live in (
        ("llama3_70b", "training.compile=true", 855_638_016, 1_711_276_032),
        ("llama3_70b", "training.compile=false", 50_000_000, 1_000_000_000),
        ("llama3_8b", "training.compile=false", 218_103_808, 1_000_000_000),
        ("llama3_8b", "parallelism.tensor=2", 109_051_904, 1_000_000_000),
        ("gpt2_small", "training.compile=true", 50_000_000, 1_000_000_000),
    ):
        overrides = ["parallelism=zero3", setting, "training.micro_batch_size=1"]
        zero = config_of(*overrides, f"model={model}", gpus=8)["zero_optimization"]
        assert zero["stage3_prefetch_bucket_size"] == prefetched, (model, setting)
        assert zero["stage3_max_live_parameters"] == live, (model, setting)
    assert "stage3_prefetch_bucket_size" not in config_of("parallelism=zero2")["zero_optimization"]


def test_deepspeed_settings_override_derived_values() -> None:
    zero = config_of("parallelism=zero2", "+deepspeed.zero_optimization.overlap_comm=true")[
        "zero_optimization"
    ]
    assert zero == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 842_496}


def test_merged_changes_neither_argument() -> None:
    base, over = {"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": {"e": 4}}
    assert merged(base, over) == {"a": {"b": 1, "d": 3}, "c": {"e": 4}}
    assert base == {"a": {"b": 1}, "c": 2}
    assert over == {"a": {"d": 3}, "c": {"e": 4}}
