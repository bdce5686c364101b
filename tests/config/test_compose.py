"""All of conf/ composes into typed, valid runs; every composition error is a single ConfigError."""

import dataclasses
import functools
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from launcher.config.compose import compose_jobs, load_typed, to_typed
from launcher.config.errors import ConfigError
from launcher.config.fields import (
    closest_fields,
    config_directory,
    fields_in,
    fields_of,
    groups_of,
    options_of,
)
from launcher.config.layout import Layout
from launcher.config.machine import Machine
from launcher.config.schema import GenerateConfig, RunConfig
from launcher.config.secrets import as_yaml
from launcher.config.validate import validate
from launcher.config.world import World, world_of_hardware
from tests.config.composing import FIELDS, alternatives, cases, composed, composed_generate, section_of

CONF = config_directory()
OPTIONS = sorted(
    (path.parent.relative_to(CONF).as_posix(), path.stem)
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF and "hydra" not in path.parts
)
EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment"]
MODELS = [option for group, option in OPTIONS if group == "model"]

# What an option needs beside it to be a whole run.
BESIDE = {
    ("data", "text"): ["data.train=README.md"],
    ("data", "tokens"): ["data.train=corpora/web"],
    ("data", "digits"): ["model=vit_tiny"],
    ("data", "chat"): ["data.train=chats.jsonl"],
    ("data", "image_folder"): ["model=vit_b16", "data.train=images"],
    ("model", "vit_tiny"): ["data=digits"],
    ("model", "vit_b16"): ["data=image_folder", "data.train=images"],
    ("optimizer", "sgd"): [],
    ("parallelism", "ep2"): ["model=moe_tiny"],
}


@functools.cache
def refused(*arguments: str, root: str = "config") -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        compose_jobs(root, RunConfig if root == "config" else GenerateConfig, list(arguments))
    return raised.value


@functools.cache
def run_of_option(group: str, option: str) -> RunConfig:
    """Return the run that an option composes, for tests that only read it."""
    return composed(f"{group}={option}", *BESIDE.get((group, option), []))


refused_once = functools.cache(refused)  # of a command that reads no file and no variable


def validated(run: RunConfig) -> Layout:
    """Return the layout on the nodes of the run's hardware."""
    return validate(run, world_of_hardware(run, Machine(gpus=0, cores=2)))


def leaves(config: Any) -> dict[str, type]:
    """Return the type of every value of a dataclass by dotted name."""
    found: dict[str, type] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": kind for name, kind in leaves(value).items()}
        else:
            found[field.name] = type(value)
    return found


class TestConf:
    def test_finds_the_options(self) -> None:
        assert {group for group, _ in OPTIONS} == set(groups_of(RunConfig))
        assert len(OPTIONS) > 30
        assert len(MODELS) >= 6
        assert EXPERIMENTS

    def test_every_option_becomes_a_typed_run(self, subtests: pytest.Subtests) -> None:
        for group, option in OPTIONS:
            with subtests.test(f"{group}={option}"):
                run = run_of_option(group, option)
                for name, kind in leaves(run).items():
                    legal = FIELDS[name]
                    typed = {"whole number": int, "number": float, "true | false": bool, "text": str}
                    expected = typed.get(legal.removesuffix(" | null"))
                    assert expected in (None, kind) or (kind is type(None) and legal.endswith("| null")), name
                    assert expected or issubclass(kind, (Enum, list, dict, type(None))), name

    def test_every_option_has_its_effect(self, subtests: pytest.Subtests) -> None:
        """No later file of the defaults list overrides a value of an option."""
        for group, option in OPTIONS:
            with subtests.test(f"{group}={option}"):
                run = run_of_option(group, option)
                said = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
                assert isinstance(said, dict)
                said.pop("defaults", None)
                part = run if group == "experiment" else section_of(run, group)
                for name, value in flat(said).items():
                    has = section_of(part, name)  # type: ignore[arg-type]
                    if isinstance(has, list):
                        has = [
                            dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row for row in has
                        ]
                    assert value == "???" or (has.name if isinstance(has, Enum) else has) == value, name

    def test_every_option_works_on_hardware_that_suits_it(self, subtests: pytest.Subtests) -> None:
        for group, option in OPTIONS:
            with subtests.test(f"{group}={option}"):
                run = composed(
                    f"{group}={option}", *SUITS.get((group, option), []), *BESIDE.get((group, option), [])
                )
                layout = validated(run)
                assert layout.world_size >= 1

    @pytest.mark.parametrize(
        ("group", "field"), [("precision", "dtype"), ("optimizer", "name"), ("scheduler", "name")]
    )
    def test_an_option_is_what_it_is_called(self, group: str, field: str) -> None:
        for option in options_of(group):
            chosen = section_of(composed(f"{group}={option}"), f"{group}.{field}")
            assert chosen.name == option.removesuffix("_states")

    @pytest.mark.parametrize(
        ("option", "pipeline", "data", "tensor", "zero_stage"),
        [
            ("single", 1, 1, 1, 0),
            ("dp", 1, 8, 1, 0),
            ("tp2", 1, 4, 2, 0),
            ("pp2", 2, 4, 1, 1),
            ("tp2_pp2", 2, 2, 2, 1),
            ("zero1", 1, 8, 1, 1),
            ("zero2", 1, 8, 1, 2),
            ("zero3", 1, 8, 1, 3),
            ("zero3_offload", 1, 8, 1, 3),
            ("hybrid_3d", 2, 2, 2, 1),
        ],
    )
    def test_a_layout_is_what_it_is_called(
        self, option: str, pipeline: int, data: int, tensor: int, zero_stage: int
    ) -> None:
        layout = validate(
            composed(f"parallelism={option}", "training.global_batch_size=32"), World("cuda", 8, 8)
        )
        assert layout == Layout(pipeline, data, tensor, "cuda", 8 // data, zero_stage, compiled=True)

    def test_every_experiment_validates(self, subtests: pytest.Subtests) -> None:
        for experiment in EXPERIMENTS:
            with subtests.test(experiment):
                run = composed(f"experiment={experiment}")
                layout, p, per_node = validated(run), run.parallelism, run.hardware.accelerators_per_node
                said = p.tensor * p.pipeline * (p.data or 1)
                assert layout.world_size == (run.hardware.nodes * per_node if per_node else said)

    def test_every_model_validates_on_an_accelerator_node(self, subtests: pytest.Subtests) -> None:
        for parallelism in ["zero3", "zero3_offload", "hybrid_3d", "single"]:
            for model in MODELS:
                with subtests.test(f"{parallelism} {model}"):
                    node = composed("hardware=h100_80gb", "precision=bf16", "training.global_batch_size=64")
                    run = dataclasses.replace(
                        node,
                        model=composed(f"model={model}").model,
                        data=composed(*BESIDE.get(("model", model), [])).data,
                        parallelism=composed(f"parallelism={parallelism}").parallelism,
                    )
                    if model == "gpt2_xl" and parallelism == "hybrid_3d":
                        with pytest.raises(ConfigError, match="25 attention heads cannot be split 2 ways"):
                            validated(run)
                    else:
                        assert validated(run).device == "cuda"

    @pytest.mark.slow
    def test_survives_being_written_and_read(self, subtests: pytest.Subtests, tmp_path: Path) -> None:
        for group, option in OPTIONS:
            with subtests.test(f"{group}={option}"):
                run = run_of_option(group, option)
                path = tmp_path / "config.yaml"
                path.write_text(as_yaml(run))
                assert load_typed(path, RunConfig) == run

    def test_survives_with_every_kind_of_value(self, tmp_path: Path) -> None:
        run = composed(
            "parallelism.activation_checkpointing=full", "logging.wandb.tags=[a, 'b, c']",
            "training.stop_at=7", "optimizer.lr=1e-5", "run.dir='with space: and # colon'",
            "deepspeed.aio.block_size=4096", "deepspeed.zero_optimization={overlap_comm: true}",
            "hardware.peak_flops.bf16=989e12",
        )  # fmt: skip
        path = tmp_path / "config.yaml"
        path.write_text(as_yaml(run))
        assert load_typed(path, RunConfig) == run
        assert run.deepspeed == {"aio": {"block_size": 4096}, "zero_optimization": {"overlap_comm": True}}
        assert run.hardware.peak_flops.bf16 == 989e12

    def test_the_defaults_are_a_run_that_works_anywhere(self) -> None:
        for cores in (1, 2, 64):
            assert validate(composed(), World("cpu", cores, cores)).world_size <= cores

    def test_generate_composes(self) -> None:
        config = composed_generate("run.dir=runs/a", "prompt=x y", "temperature=0")
        assert (config.run.dir, config.prompt, config.temperature) == ("runs/a", "x y", 0.0)


# fp16 and accelerators need a machine that has them; presets of 8 accelerators a batch that they divide.
SUITS = {
    ("precision", "fp16"): ["hardware=h100_80gb", "training.global_batch_size=32"],
    **{
        ("hardware", name): ["training.global_batch_size=32"]
        for name in options_of("hardware")
        if name not in ("cpu", "local")
    },
}


def flat(said: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in said.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


NOT_COMPOSED = cases("not_composed.txt")
each_case = pytest.mark.parametrize("case", NOT_COMPOSED, ids=lambda case: case.command)


class TestNotComposed:
    def test_says_field_value_why_and_the_nearest_that_works(self, subtests: pytest.Subtests) -> None:
        for case in NOT_COMPOSED:
            with subtests.test(case.command):
                assert str(refused_once(case.command)) == case.text

    def test_what_it_says_to_type_composes(self, subtests: pytest.Subtests) -> None:
        for case in NOT_COMPOSED:
            with subtests.test(case.command):
                for offer in alternatives(refused_once(case.command)):
                    assert composed(*offer)

    def test_nothing_typed_between_quotes(self) -> None:
        assert str(refused("")).startswith("'': a setting needs a name, = and a value")

    @pytest.mark.parametrize(
        ("typed", "message"),
        [
            ("model=gpt_tiny", "model=gpt_tiny: no such field"),
            ("promt=x", "promt=x: no such field\n  try: prompt=x"),
            ("top_k=few", "top_k=few: must be a whole number"),
            ("prompt.x=3", "prompt.x=3: prompt is a field, not a section\n  try: prompt=3"),
            (
                "run=3",
                "run=3: this is a section of fields, which has no value itself\n  try: run.dir=3",
            ),
        ],
    )
    def test_generate_too(self, typed: str, message: str) -> None:
        assert str(refused(typed, root="generate")).startswith(message)

    def test_in_a_sweep_names_the_value_that_does_not_work(self) -> None:
        assert str(refused("--multirun", "optimizer.lr=1e-3,abc")).startswith(
            "optimizer.lr=abc: must be a number"
        )
        assert str(refused("-m", "model=gpt_tiny,gpt3")).startswith("model=gpt3: no such option")

    def test_composes_the_last_of_two(self) -> None:
        assert composed("training.steps=3", "training.steps=4").training.steps == 4

    @given(st.text(alphabet="model.tensorparallelism=12,[]{}()$:'\"\\~+@ -|!#\n", min_size=0, max_size=30))
    @settings(max_examples=50)
    def test_anything_typed_composes_or_is_refused(self, typed: str) -> None:
        if typed.lstrip().startswith("-"):
            return
        try:
            compose_jobs("config", RunConfig, [typed])
        except ConfigError as error:
            refusal = error
        else:
            return
        assert refusal.why
        assert refusal.remedy


class TestSweep:
    def test_gives_a_numbered_job_for_each(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        jobs = compose_jobs("config", RunConfig, ["--multirun", "optimizer.lr=1e-3,2e-3", "training.steps=5"])
        assert [(job.index, job.config.optimizer.lr) for job in jobs] == [(0, 1e-3), (1, 2e-3)]
        assert {job.config.training.steps for job in jobs} == {5}

    def test_a_single_run_has_no_number(self) -> None:
        assert [job.index for job in compose_jobs("config", RunConfig, [])] == [None]


OWN_FILES = {
    "experiment/works.yaml": "# @package _global_\ndefaults: [override /model: mine]\ntraining: {steps: 7}\n",
    "model/mine.yaml": "defaults: [gpt_tiny]\nnum_layers: 2\n",
    "experiment/misspelt.yaml": "# @package _global_\nmodel: {hidden_sise: 3}\n",
    "experiment/of_another_type.yaml": "# @package _global_\nmodel: {hidden_size: wide}\n",
    "experiment/no_group.yaml": "# @package _global_\ndefaults:\n  - override /modle: gpt_tiny\n",
    "experiment/no_option.yaml": "# @package _global_\ndefaults:\n  - override /model: gpt_tny\n",
    "experiment/no_package.yaml": "training: {steps: 7}\n",
    "experiment/no_yaml.yaml": "# @package _global_\ntraining: {steps: [7\n",
}


class TestOwnFiles:
    @pytest.fixture
    def own(self, tmp_path: Path) -> str:
        for name, text in OWN_FILES.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return f"--config-dir={tmp_path}"

    def test_compose_beside_those_of_conf(self, own: str) -> None:
        run = composed(own, "experiment=works")
        assert (run.training.steps, run.model.num_layers, run.model.hidden_size) == (7, 2, 128)

    @pytest.mark.parametrize(
        ("experiment", "message"),
        [
            (
                "misspelt",
                "model.hidden_sise: no such field (in experiment/misspelt.yaml)\n"
                "  try: model.hidden_size or model.ffn_hidden_size",
            ),
            (
                "of_another_type",
                "model.hidden_size=wide: must be a whole number (in experiment/of_another_type.yaml)\n"
                "  try: model.hidden_size=128",
            ),
            (
                "no_group",
                "modle: no such field (in experiment/no_group.yaml)\n  try: model",
            ),
            (
                "no_option",
                "model=gpt_tny: no such option\n  try: model=gpt_tiny or model=vit_tiny",
            ),
            (
                "no_package",
                "experiment=no_package: no such field: experiment/no_package.yaml is read as part of "
                "'experiment', because its first line is missing\n"
                "  try: # @package _global_ as the first line of experiment/no_package.yaml",
            ),
        ],
    )
    def test_a_mistake_in_one_names_the_file(self, own: str, experiment: str, message: str) -> None:
        assert str(refused(own, f"experiment={experiment}")) == message

    def test_what_is_not_yaml_names_the_line(self, own: str, tmp_path: Path) -> None:
        error = refused(own, "experiment=no_yaml")
        assert error.field == str(tmp_path / "experiment" / "no_yaml.yaml")
        assert error.why.startswith("line 3 is not valid YAML: expected ',' or ']'")


# Files and overrides that start a program in a plain Hydra application.
PROGRAMS = {
    "callback": "# @package hydra.callbacks\nx: {_target_: os.abort}\n",
    "launcher": "# @package hydra.launcher\n_target_: os.abort\n",
    "logging": "# @package hydra.job_logging\nhandlers: {x: {(): os.abort}}\n",
    "hydra_logging": "# @package _global_\nhydra: {hydra_logging: {handlers: {x: {(): os.abort}}}}\n",
    "environment": "# @package hydra.job.env_set\nPATH: x\n",
    "directory": "# @package hydra.run\ndir: elsewhere\n",
    "option": "# @package _global_\ndefaults: [override /hydra/callbacks: mine]\n",
}


class TestNoProgramStarts:
    @pytest.mark.parametrize(
        "flags",
        [
            [],
            ["--multirun"],
            *(
                pytest.param(f, marks=pytest.mark.slow)
                for f in (["--help"], ["--cfg", "job"], ["--info=all"])
            ),
        ],
    )
    def test_from_a_file(self, flags: list[str], tmp_path: Path, subtests: pytest.Subtests) -> None:
        (tmp_path / "hydra" / "callbacks").mkdir(parents=True)
        (tmp_path / "hydra" / "callbacks" / "mine.yaml").write_text("x: {_target_: os.abort}\n")
        (tmp_path / "experiment").mkdir()
        for name, text in PROGRAMS.items():
            (tmp_path / "experiment" / f"{name}.yaml").write_text(text)
            with subtests.test(name):
                error = refused(f"--config-dir={tmp_path}", f"experiment={name}", *flags)
                assert error.field.startswith("hydra.")
                assert error.why.startswith("settings of Hydra can start programs")

    @pytest.mark.parametrize(
        "override",
        [
            "+hydra.callbacks.x._target_=os.abort", "hydra.launcher._target_=os.abort",
            "hydra.searchpath=[pkg://os]", "hydra.run.dir=x", "hydra.job.chdir=true", "++hydra.env.x=1",
            "hydra.mode=MULTIRUN", "~hydra.launcher", "hydra.verbose=true", "hydra/launcher=basic",
            "hydra/job_logging@hydra.x=default", "hydra.sweeper.params.optimizer.lr=1",
        ],
    )  # fmt: skip
    def test_from_an_override(self, override: str) -> None:
        assert refused(override).why.startswith("settings of Hydra can start programs")

    @pytest.mark.parametrize(
        "flag",
        [
            "--experimental-rerun=x", "--config-path=pkg://os", "--config-name=plan", "--shell-completion",
            "--resolve", "--package=model", "--experimental=x",
        ],
    )  # fmt: skip
    def test_from_a_flag(self, flag: str) -> None:
        assert flag.partition("=")[0] in refused(flag).field

    def test_a_file_may_have_a_sweep(self, tmp_path: Path) -> None:
        (tmp_path / "experiment").mkdir()
        params = "# @package _global_\nhydra: {sweeper: {params: {optimizer.lr: '1e-3,2e-3'}}}\n"
        (tmp_path / "experiment" / "sweep.yaml").write_text(params)
        jobs = compose_jobs("config", RunConfig, ["-m", f"--config-dir={tmp_path}", "experiment=sweep"])
        assert [job.config.optimizer.lr for job in jobs] == [1e-3, 2e-3]

    def test_a_target_is_no_field(self) -> None:
        assert refused("+model._target_=os.abort").why == "no such field"
        assert refused("+_target_=os.abort").why == "no such field"


MOST = "the maximum is 4,096, or 100,000 in quotes"


class TestBounds:
    @pytest.mark.parametrize(
        ("argument", "why"),
        [
            ("model=" + "[" * 200, "has brackets 200 deep; the maximum is 32"),
            ("run.dir=" + "a" * 5000, "has 5,008 characters; the maximum is 4,096, or 100,000 in quotes"),
            (
                f"run.dir='{'a' * 200_000}'",
                "has 200,010 characters; the maximum is 4,096, or 100,000 in quotes",
            ),
            ("run.dir=\udcff", "is not valid UTF-8 text"),
        ],
    )
    def test_of_an_argument(self, argument: str, why: str) -> None:
        assert refused(argument).why == why

    def test_of_the_number_of_arguments(self) -> None:
        assert refused(*["training.steps=1"] * 1001).why == "1,001 arguments; the maximum is 1,000"

    @pytest.mark.parametrize(
        "values", ["range(0,99999)", "shuffle(range(0,99999999999))", "range(0.0,1.0,1e-9)"]
    )
    def test_of_a_sweep(self, values: str) -> None:
        assert "the maximum of 1,000" in refused("--multirun", f"training.seed={values}").why
        assert (
            "the maximum of 1,000"
            in refused("--multirun", *(f"training.{n}=range(1,40)" for n in ("seed", "steps"))).why
        )

    def test_of_the_aliases_in_a_file(self, tmp_path: Path) -> None:
        lines = ["# @package _global_", "a0: &a0 [x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "many.yaml").write_text("\n".join(lines))
        (tmp_path / "experiment" / "circle.yaml").write_text("# @package _global_\ndefaults: [circle]\n")
        error = refused(f"--config-dir={tmp_path}", "experiment=many")
        assert error.why.endswith("its aliases stand for more than 1,000,000 values")
        error = refused(f"--config-dir={tmp_path}", "experiment=circle")
        assert error.why.startswith("a file or a value refers to itself")

    def test_a_boolean_is_no_number(self, subtests: pytest.Subtests, tmp_path: Path) -> None:
        for override in (
            "model.tie_embeddings=2",
            "plan.trace=2",
            "submit.dry_run=1",
            "model.biases.qkv='0'",
        ):
            with subtests.test(override):
                assert refused(override).why == "must be true or false"
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "a.yaml").write_text("# @package _global_\nmodel: {tie_embeddings: 2}\n")
        error = refused(f"--config-dir={tmp_path}", "experiment=a")
        assert error.why == "must be true or false (in experiment/a.yaml)"


class TestLoad:
    @pytest.mark.parametrize(
        ("text", "why"),
        [
            (None, "this is not a run directory, because it has no config.yaml"),
            (
                "model: {hidden_size: [",
                "its config.yaml was not written by a run: while parsing a flow node",
            ),
            ("model: {hidden_size: wide}", "its config.yaml was not written by a run: Value 'wide'"),
            ("modle: {}", "its config.yaml was not written by a run: Key 'modle' not in 'RunConfig'"),
            (
                "model: {}",
                "its config.yaml was not written by a run: data.source=???: this field must be set",
            ),
            ("[]", "its config.yaml was not written by a run: "),
            ("text", "its config.yaml was not written by a run: "),
            ("\x00", "its config.yaml was not written by a run: "),
        ],
    )
    def test_refuses_what_no_run_wrote(self, text: str | None, why: str, tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError) as raised:
            load_typed(path, RunConfig)
        assert raised.value.field == "run.dir"
        assert raised.value.value == tmp_path
        assert raised.value.why.startswith(why)


class TestFields:
    def test_lists_every_field_with_what_it_takes(self) -> None:
        fields = FIELDS
        assert fields["model.norm"] == "layer_norm | rms_norm"
        assert fields["parallelism.data"] == "whole number | null"
        assert fields["hardware.peak_flops.bf16"] == "number | null"
        assert fields["model.tie_embeddings"] == "true | false"
        assert fields["logging.wandb.tags"] == "list"
        assert fields["deepspeed"] == "dictionary"
        assert set(fields) == set(fields_of(RunConfig)) == set(leaves(composed()))

    def test_lists_a_section(self) -> None:
        assert fields_in("hardware.peak_flops", RunConfig) == [
            f"hardware.peak_flops.{dtype}" for dtype in ("fp32", "bf16", "fp16")
        ]
        assert fields_in("", RunConfig) == []

    def test_lists_options(self) -> None:
        assert options_of("precision") == ["bf16", "bf16_states", "fp16", "fp32"]
        assert options_of("hydra/help") == [
            "calibrate", "compare", "evaluate", "exchange", "generate", "launcher", "plan", "prepare",
            "replay",
        ]  # fmt: skip
        assert options_of("..") == options_of("") == options_of("xyzzy") == []

    def test_a_field_with_two_letters_swapped_is_recognised(self, subtests: pytest.Subtests) -> None:
        for field in [field for field in sorted(FIELDS) if len(field.rpartition(".")[2]) > 3]:
            with subtests.test(field):
                section, dot, leaf = field.rpartition(".")
                middle = next(i for i in range(len(leaf) // 2, 0, -1) if leaf[i] != leaf[i - 1])
                swapped = leaf[: middle - 1] + leaf[middle] + leaf[middle - 1] + leaf[middle + 1 :]
                assert field in closest_fields(f"{section}{dot}{swapped}", RunConfig)
                assert leaf in {
                    name.rpartition(".")[2] for name in closest_fields(f"modle{dot}{swapped}", RunConfig)
                }


def test_a_value_missing_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"data.source=\?\?\?: this field must be set"):
        to_typed(OmegaConf.structured(RunConfig), RunConfig)
