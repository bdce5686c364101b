"""Compare the table of deepspeed_keys.py with the installed DeepSpeed."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from pydantic import BaseModel

from launcher.config.deepspeed_keys import OURS, SECTIONS, TOP_LEVEL, KeyType, check_passthrough
from launcher.config.errors import ConfigError
from launcher.config.fields import fields_of, groups_of
from launcher.config.schema import RunConfig

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
}

# DeepSpeed takes these, a run of ours may not set them.
LEFT_OUT = {
    "zero_optimization": {
        "deprecated": "cpu_offload cpu_offload_param cpu_offload_use_pin_memory legacy_stage1 "
        "stage3_gather_fp16_weights_on_model_save",
        "of DeepSpeed's own checkpoints, which we do not write": "elastic_checkpoint load_from_fp32_weights "
        "stage3_gather_16bit_weights_on_model_save pipeline_loading_checkpoint",
        "switches off the gradient norm that every step logs": "compute_grad_norm",
        "another optimizer than ours": "zenflow save_muon_momentum_buffer_in_memory",
        "other modules or arithmetic than ours": "zero_quantized_nontrainable_weights leaf_module "
        "memory_efficient_linear override_module_apply",
        "moves the fragments that we read gradients and states from": "parameter_alignment",
    },
    "zero_optimization.offload_optimizer": {"needs DeepSpeed's CPUAdam": "super_offload cpuadam_cores_perc"},
    "fp16": {
        "casts what our engines feed by themselves": "auto_cast",
        "no fp32 master weights": "fp16_master_weights_and_grads",
    },
}  # fmt: skip


def left_out(section: str) -> set[str]:
    return {key for keys in LEFT_OUT.get(section, {}).values() for key in keys.split()}


def ours_in(section: str) -> set[str]:
    return {path.removeprefix(f"{section}.") for path in OURS if path.startswith(f"{section}.")}


def keys_of(model: type[BaseModel]) -> set[str]:
    """Return the keys as they are written in DeepSpeed's JSON."""
    return {field.alias or name for name, field in model.model_fields.items()}


class Recorder(dict[str, Any]):
    """A section of a DeepSpeed config that records the keys that DeepSpeed reads."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return Asked(self)


class Asked:
    """A view of the keys that records each `key in section.keys()`."""

    def __init__(self, section: Recorder) -> None:
        self.section = section

    def __contains__(self, key: object) -> bool:
        return key in self.section

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self.section)


def read_by_deepspeed() -> tuple[set[str], dict[str, set[str]]]:
    """Return the keys that DeepSpeed reads: at the top, and in each section without a model."""
    sections = {name: Recorder() for name in SECTIONS if name not in MODELS}
    top = Recorder({"train_micro_batch_size_per_gpu": 1, **sections})
    DeepSpeedConfig(top)
    return top.asked, {name: section.asked for name, section in sections.items()}


class TestTable:
    def test_every_key_at_the_top_is_read(self) -> None:
        asked, _ = read_by_deepspeed()
        assert set(TOP_LEVEL) - asked == set()
        # Whether the recorder can tell.
        assert not asked & {"overlap_comm", "steps_per_pint"}

    def test_every_key_of_a_plain_section_is_read(self, subtests: pytest.Subtests) -> None:
        for section in sorted(SECTIONS.keys() - MODELS):
            with subtests.test(section):
                _, asked = read_by_deepspeed()
                assert asked[section]
                assert set(SECTIONS[section]) <= asked[section]

    def test_every_key_of_a_modelled_section_is_one_of_the_model(self, subtests: pytest.Subtests) -> None:
        for section in sorted(MODELS):
            with subtests.test(section):
                assert set(SECTIONS[section]) - keys_of(MODELS[section]) == set()

    def test_nothing_of_a_modelled_section_is_forgotten(self, subtests: pytest.Subtests) -> None:
        for section in sorted(MODELS):
            with subtests.test(section):
                listed = [*SECTIONS[section], *ours_in(section), *left_out(section)]
                named_below = {key for key in listed if "." in key}
                assert sorted(set(listed) - named_below) == sorted(keys_of(MODELS[section]))

    def test_a_key_is_allowed_or_ours_or_left_out(self, subtests: pytest.Subtests) -> None:
        for section in sorted(SECTIONS):
            with subtests.test(section):
                assert not set(SECTIONS[section]) & (ours_in(section) | left_out(section))

    def test_what_is_deprecated_is_left_out(self) -> None:
        for section, model in MODELS.items():
            extras = {
                field.alias or name: field.json_schema_extra for name, field in model.model_fields.items()
            }
            deprecated = {
                key for key, extra in extras.items() if isinstance(extra, dict) and extra.get("deprecated")
            }
            assert deprecated <= left_out(section)

    def test_every_section_can_be_reached(self) -> None:
        for section in SECTIONS:
            outer, _, inner = section.rpartition(".")
            assert inner in (SECTIONS[outer] if outer else TOP_LEVEL)

    def test_what_we_set_ourselves_is_read(self) -> None:
        asked, _ = read_by_deepspeed()
        assert {path for path in OURS if "." not in path} <= asked
        for section, model in MODELS.items():
            assert {key for key in ours_in(section) if "." not in key} <= keys_of(model)

    def test_what_we_set_instead_exists(self) -> None:
        known = {*fields_of(RunConfig), *groups_of(RunConfig)}
        for remedy in OURS.values():
            words = [word.partition("=")[0] for word in remedy.split() if "." in word or "=" in word]
            assert words
            assert set(words) <= known


def refused(extra: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        check_passthrough(extra)
    return raised.value


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


EVERY_KEY = [
    *(key for key in TOP_LEVEL if key not in SECTIONS),
    *(f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys),
]


def kind_of(path: str) -> KeyType:
    section, _, key = path.rpartition(".")
    return (SECTIONS[section] if section else TOP_LEVEL)[key]


def example(path: str) -> Any:
    return yaml.safe_load(kind_of(path).example)


VALUES: list[Any] = [True, 0, 1, 7, -1, 0.5, 1.5, 5e8, "banana", "fp32", ["all_reduce"], None]


def test_deepspeed_takes_the_values_that_pass_and_none_that_it_refuses_passes(
    subtests: pytest.Subtests,
) -> None:
    for path in [f"{s}.{key}" for s in MODELS for key in SECTIONS[s] if f"{s}.{key}" not in SECTIONS]:
        with subtests.test(path):
            section, _, key = path.rpartition(".")
            passed = [value for value in VALUES if kind_of(path).holds(value)]
            assert kind_of(path).holds(example(path))
            assert len(passed) < len(VALUES)
            for value in [*passed, example(path)]:
                MODELS[section](**{key: value})


class TestCheck:
    def test_refuses_a_value_that_deepspeed_would(self, subtests: pytest.Subtests) -> None:
        for path, value, why in [
            ("zero_optimization.overlap_comm", "banana", "must be true or false"),
            ("zero_optimization.reduce_bucket_size", -5, "must be a whole number from 1 to 1e15"),
            ("zero_optimization.reduce_bucket_size", "5e8x", "must be a whole number from 1 to 1e15"),
            ("zero_optimization.offload_optimizer.ratio", 1.5, "must be from 0 to 1"),
            ("communication_data_type", "fp8", "must be fp32, bf16 or fp16"),
            ("data_types.grad_accum_dtype", None, "must be fp32, bf16 or fp16"),
            ("gradient_predivide_factor", float("nan"), "must be a number above 0, at most 1e15"),
        ]:
            with subtests.test(f"{path} {value} {why}"):
                error = refused(nested(path, value))
                assert (error.field, error.why) == (f"deepspeed.{path}", why)
                assert error.remedy == f"deepspeed.{path}={kind_of(path).example}"

    def test_accepts_every_key_and_refuses_it_misspelt(self, subtests: pytest.Subtests) -> None:
        for path in [path for path in EVERY_KEY if path not in SECTIONS]:
            with subtests.test(path):
                check_passthrough(nested(path, example(path)))
                section, _, key = path.rpartition(".")
                misspelt = f"{section}.{key[:-1]}" if section else key[:-1]
                error = refused(nested(misspelt, True))
                assert (error.field, error.value) == (f"deepspeed.{misspelt}", "true")
                assert error.why == "unknown or unsupported DeepSpeed key"
                assert f"deepspeed.{path}=true" in error.remedy.split(" or ")

    def test_refuses_what_a_field_of_ours_sets(self, subtests: pytest.Subtests) -> None:
        for path in sorted(OURS):
            with subtests.test(path):
                error = refused(nested(path, 5))
                assert str(error) == (
                    f"deepspeed.{path}=5: the launcher sets this key itself\n  try: {OURS[path].format(5)}"
                )

    def test_refuses_what_is_left_out(self, subtests: pytest.Subtests) -> None:
        for path in [f"{section}.{key}" for section in LEFT_OUT for key in sorted(left_out(section))]:
            with subtests.test(path):
                assert refused(nested(path, True)).field == f"deepspeed.{path}"

    def test_refuses_a_value_for_a_section(self, subtests: pytest.Subtests) -> None:
        for value in [True, 3, "on", None, [1]]:
            for section in sorted(SECTIONS):
                with subtests.test(f"{value} {section}"):
                    error = refused(nested(section, value))
                    assert (error.field, error.why) == (
                        f"deepspeed.{section}",
                        "this key is a section, which has no value itself",
                    )
                    key = f"deepspeed.{section}.{next(iter(SECTIONS[section]))}=VALUE"
                    assert error.remedy.split(" or ")[-1] == key

    @pytest.mark.parametrize(
        ("section", "value", "setting"),
        [
            ("zero_optimization", 3, "parallelism.zero_stage=3"),
            ("bf16", True, "precision=bf16"),
            ("fp16", 3, "precision=fp16"),
        ],
    )
    def test_names_the_setting_that_a_value_of_a_section_means(
        self, section: str, value: int, setting: str
    ) -> None:
        assert refused({section: value}).remedy.split(" or ")[0] == setting

    def test_quotes_a_dictionary_for_the_shell(self) -> None:
        error = refused({"zero_optimizatoin": {"overlap_comm": False}})
        assert error.remedy == "'deepspeed.zero_optimization={overlap_comm: false}'"

    def test_lists_the_keys_where_none_is_close(self) -> None:
        error = refused({"data_types": {"xyzzy": 1}})
        assert error.remedy == "deepspeed.data_types.NAME, where NAME is one of grad_accum_dtype"

    def test_accepts_nothing(self) -> None:
        check_passthrough({})
        check_passthrough({"zero_optimization": {}})
