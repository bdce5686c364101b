"""Every rule refuses with a message that names a setting to type, and that setting works."""

import ast
import copy
import dataclasses
import functools
import inspect
import math
import re
import shlex
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher.commands.ready import ready
from launcher.config import (
    attention_rules,
    card_rules,
    deepspeed_keys,
    deepspeed_rules,
    layout,
    numbers,
    slurm_rules,
    validate,
    world,
)
from launcher.config.errors import ConfigError
from launcher.config.fields import fields_of
from launcher.config.layout import Layout
from launcher.config.machine import Machine
from launcher.config.schema import (
    CalibrateConfig,
    ComparedRunConfig,
    Device,
    Dtype,
    EvaluateConfig,
    ExchangeConfig,
    GenerateConfig,
    PlannedRunConfig,
    PrepareConfig,
    ReplayConfig,
    RunConfig,
)
from launcher.config.shape import legal_pipeline_sizes, legal_tensor_sizes, sequence_length
from launcher.config.world import world_of_joined_ranks, world_of_machine, world_of_nodes
from tests.config.composing import (
    FIELDS,
    Case,
    alternatives,
    cases,
    composed,
    composed_as,
    composed_calibrate,
    composed_compare,
    composed_generate,
    composed_prepare,
    run_of,
    section_of,
)

GENERATE_FIELDS = fields_of(GenerateConfig)
REPLAY_FIELDS = {f: k for f, k in fields_of(ReplayConfig).items() if not f.startswith("parallelism.")}
EVALUATE_FIELDS = {f: k for f, k in fields_of(EvaluateConfig).items() if not f.startswith("parallelism.")}
PREPARE_FIELDS, CALIBRATE_FIELDS = fields_of(PrepareConfig), fields_of(CalibrateConfig)
COMPARE_FIELDS = {f: k for f, k in fields_of(ComparedRunConfig).items() if f.startswith("compare.")}

ROOTS = (
    PlannedRunConfig, ComparedRunConfig, GenerateConfig, ReplayConfig, PrepareConfig, CalibrateConfig,
    ExchangeConfig, EvaluateConfig,
)  # fmt: skip

# What these remedies ask for cannot be typed.
IN_WORDS_ONLY = {
    "deepspeed.elasticity=true",
    "deepspeed.data_types.grad_accum_dtype=bf16 deepspeed.aio=3",
    "[world=6] parallelism.tensor=4",
    "[world=2] parallelism=hybrid_3d",
    "hardware.card.shapes.bf16={4096x1280:1e14}",
    "slurm.environment={A-B:x}",
    "slurm.environment.WANDB_API_KEY=x",
    "slurm.environment.HF_TOKEN=x",
    'slurm.job_name="a\x07b"',
    'slurm.sbatch=["--export=GITHUB_PAT=x"]',
    'slurm.sbatch=["--array=1-3"]',
    'slurm.sbatch=["--wrap=true"]',
    'slurm.output="~/logs/%j.out"',
    "data.source=tokens data.sources={a.b:corpora/web} data.weights={a.b:1}",
    # Fields are removed by Hydra alone: test_a_source_of_weight_0_is_left_out_by_the_remedy.
    "data.source=tokens data.sources={web:corpora/web,code:corpora/code} data.weights={web:1,code:0}",
}


def number_names(kind: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of the numbers in a type, with [] for the items of a list."""
    if dataclasses.is_dataclass(kind):
        for field, inner in get_type_hints(kind).items():
            yield from number_names(inner, f"{name}.{field}" if name else field)
    elif get_origin(kind) is list:
        yield from number_names(get_args(kind)[0], f"{name}[]")
    elif get_origin(kind) is Union:
        for choice in get_args(kind):
            yield from number_names(choice, name)
    elif kind in (int, float):
        yield name


REFUSALS = cases("refusals.txt")
each_refusal = pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.command)


def typed(refusal: Case) -> list[str]:
    return re.sub(r"\[\w+=\d+\] ?", "", refusal.command).split()


def check(refusal: Case, overrides: list[str]) -> Layout | str:
    """Validate on the machine of the case. Raises ConfigError."""
    if overrides[:1] == ["generate"]:
        return validate.validate_generate(composed_generate(*overrides[1:]))
    if overrides[:1] == ["submit"]:
        run = run_of(*overrides[1:])
        return ready(run, world_of_nodes(run, 1), needs_data=False, must_fit=True).layout
    if overrides[:1] == ["compare"]:
        validate.validate_compare(composed_compare(*overrides[1:]))
        return "accepted"
    if overrides[:1] == ["calibrate"]:
        validate.validate_calibrate(composed_calibrate(*overrides[1:]))
        return "accepted"
    if overrides[:1] == ["replay"]:
        return validate.validate_replay(composed_as("replay", ReplayConfig, *overrides[1:]))[0]
    if overrides[:1] == ["evaluate"]:
        return validate.validate_evaluate(composed_as("evaluate", EvaluateConfig, *overrides[1:]))
    if overrides[:1] == ["prepare"]:
        validate.validate_prepare(composed_prepare(*overrides[1:]))
        return "accepted"
    counts = {name: int(count) for name, count in re.findall(r"\[(\w+)=(\d+)\]", refusal.command)}
    return layout_of(run_of(*overrides), Machine(counts.get("gpus", 0), cores=2), counts.get("world"))


def layout_of(run: RunConfig, machine: Machine, joined_ranks: int | None) -> Layout:
    """Return the layout on this machine, or in a world that torchrun started. Raises ConfigError."""
    if joined_ranks is None:
        return validate.validate(run, world_of_machine(run, machine))
    joined = world_of_joined_ranks(run, machine, ranks=joined_ranks, ranks_per_node=joined_ranks)
    return validate.validate(run, joined)


@functools.cache
def refused(refusal: Case) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        check(refusal, typed(refusal))
    return raised.value


@pytest.mark.parametrize("name", ["code", "my-own_2"])
def test_a_source_of_weight_0_is_left_out_by_the_remedy(name: str) -> None:
    typed = ["data=tokens", "data.sources.web=web", f"data.sources.{name}=other", "data.weights.web=1"]
    typed.append(f"data.weights.{name}=0")
    with pytest.raises(ConfigError) as raised:
        validate.check_blend(composed(*typed))
    repaired = composed(*typed, *shlex.split(raised.value.remedy.partition(" (")[0]))
    validate.check_blend(repaired)
    assert (repaired.data.sources, repaired.data.weights) == ({"web": "web"}, {"web": 1.0})


class TestMessages:
    def test_says_field_value_why_and_the_nearest_that_works(self, subtests: pytest.Subtests) -> None:
        for refusal in REFUSALS:
            with subtests.test(refusal.command):
                error = refused(refusal)
                assert str(error) == refusal.text
                assert refusal.text.startswith(error.field)
                known = {
                    *FIELDS, *GENERATE_FIELDS, *REPLAY_FIELDS, *EVALUATE_FIELDS, *PREPARE_FIELDS,
                    *CALIBRATE_FIELDS,
                    *COMPARE_FIELDS,
                }  # fmt: skip
                assert error.field in known or error.field.startswith(("deepspeed.", "slurm.environment."))

    def test_what_it_says_to_type_is_accepted(self, subtests: pytest.Subtests) -> None:
        for refusal in REFUSALS:
            with subtests.test(refusal.command):
                error = refused(refusal)
                offers = alternatives(error)
                assert bool(offers) != (refusal.command in IN_WORDS_ONLY)
                overrides = typed(refusal)
                if re.search("the launcher sets|unsupported|is a section", error.why):
                    replaced = ("deepspeed.", "slurm.sbatch=", "slurm.srun=")
                    overrides = [word for word in overrides if not word.startswith(replaced)]
                for offer in offers:
                    assert check(refusal, [*overrides, *offer])

    @pytest.mark.parametrize(
        "module",
        [
            validate,
            attention_rules,
            card_rules,
            layout,
            world,
            numbers,
            deepspeed_keys,
            deepspeed_rules,
            slurm_rules,
        ],
    )
    def test_every_raise_has_a_case(self, module: ModuleType) -> None:
        assert module.__file__
        raises = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.Raise)]
        assert raises
        reached = {
            frame.lineno
            for refusal in REFUSALS
            for frame in traceback.extract_tb(refused(refusal).__traceback__)
            if frame.filename == module.__file__
        }
        unreached = [n.lineno for n in raises if not reached & set(range(n.lineno, (n.end_lineno or 0) + 1))]
        assert unreached == []

    def test_every_number_of_the_schema_has_a_finite_bound(self) -> None:
        """The names come from the types of the dataclasses, with those in lists."""
        named = {name for root in ROOTS for name in number_names(root)}
        assert named == set(numbers.BOUNDS)
        for name, bound in numbers.BOUNDS.items():
            assert math.isfinite(bound.most), name
            assert math.isfinite(bound.least) or not bound.range.holds(-1), name

    def test_every_number_has_a_case(self) -> None:
        with_a_case = {re.split("[=:]", refusal.text)[0] for refusal in REFUSALS}
        fields = {name for name in numbers.BOUNDS if "[]" not in name}
        assert fields - {"max_file_gb"} <= with_a_case

    def test_numbers_beyond_reason_are_refused_with_a_setting_that_works(
        self, subtests: pytest.Subtests
    ) -> None:
        for name in (name for name in numbers.BOUNDS if name in FIELDS):
            bound, is_float = numbers.BOUNDS[name], FIELDS[name].startswith("number")
            beyond = ["nan", "inf", "1e310", "-1e309"] if is_float else [10**310, -(10**310)]
            values = [bound.most * 2 + 1, *beyond]
            for value in values:
                with subtests.test(f"{name}={value}"[:80]), pytest.raises(ConfigError) as raised:
                    numbers.refuse_out_of_bounds(run_of(f"{name}={value}"))
                assert raised.value.field == name
                for offer in alternatives(raised.value):
                    numbers.refuse_out_of_bounds(run_of(*offer))


class TestLayout:
    def resolve(self, *typed: str, gpus: int = 0, cores: int = 2, world: int | None = None) -> Layout:
        return layout_of(run_of(*typed), Machine(gpus, cores), world)

    @pytest.mark.parametrize(
        ("typed", "cores", "data"),
        [
            ([], 1, 1),
            ([], 2, 2),
            ([], 3, 2),  # 3 does not divide 16 / 4 passes
            ([], 64, 4),
            (["training.global_batch_size=24"], 5, 3),
            (["training.global_batch_size=24"], 64, 6),
            (["training.global_batch_size=4"], 64, 1),
            (["parallelism.tensor=2"], 2, 1),
            (["parallelism.tensor=2"], 4, 2),
            (["parallelism.tensor=4", "parallelism.pipeline=2"], 2, 1),
        ],
    )
    def test_cpu_ranks_are_the_most_that_divide_the_batch(
        self, typed: list[str], cores: int, data: int
    ) -> None:
        assert self.resolve(*typed, cores=cores).data == data

    def test_gpus_are_all_used(self) -> None:
        assert self.resolve(gpus=4).data == 4
        assert self.resolve("parallelism=tp2_pp2", gpus=8).data == 2
        with pytest.raises(ConfigError, match="micro-batches of 4 on 3 data-parallel ranks"):
            self.resolve(gpus=3)

    def test_fewer_gpus_where_it_is_said(self) -> None:
        assert self.resolve("parallelism.data=2", gpus=8).world_size == 2
        assert self.resolve("hardware.accelerators_per_node=4", gpus=8).world_size == 4

    def test_an_accelerator_node(self) -> None:
        h100 = ["hardware=h100_80gb", "training.global_batch_size=64"]
        assert self.resolve(*h100, gpus=8).describe() == (
            "8 cuda ranks = 1 pipeline x 8 data x 1 tensor, ZeRO-0, 2 micro-batches per step and data rank"
        )
        with pytest.raises(ConfigError, match="this machine has no GPU"):
            self.resolve(*h100, gpus=0)

    def test_device_is_what_is_found_or_asked_for(self) -> None:
        assert self.resolve(gpus=2).device == "cuda"
        assert self.resolve().device == "cpu"
        assert self.resolve("hardware=cpu", gpus=2).device == "cpu"

    def test_accumulation_is_what_the_ranks_leave(self) -> None:
        assert self.resolve("parallelism.data=1").accumulation == 4
        assert self.resolve("parallelism.data=2").accumulation == 2
        assert self.resolve("parallelism.data=4").accumulation == 1

    @pytest.mark.parametrize(
        ("typed", "stage", "notes"),
        [
            (["parallelism.zero_stage=0"], 0, []),
            (["precision=bf16", "parallelism.zero_stage=1"], 1, []),
            (["precision=bf16", "parallelism.zero_stage=3"], 3, []),
            (["parallelism=pp2", "parallelism.data=1"], 1, []),
            (
                ["parallelism.pipeline=2", "parallelism.data=1"],
                1,
                [
                    "ZeRO-1 is used instead of ZeRO-0: with a pipeline, DeepSpeed's ZeRO-0 computes a wrong "
                    "gradient norm"
                ],
            ),
            (
                ["precision=bf16"],
                1,
                ["ZeRO-1 is used instead of ZeRO-0: DeepSpeed's ZeRO-0 has defects in bf16 and fp16"],
            ),
        ],
    )
    def test_zero_0_runs_as_1_where_deepspeed_is_wrong_and_says_so(
        self, typed: list[str], stage: int, notes: list[str]
    ) -> None:
        resolved = self.resolve(*typed)
        assert (resolved.zero_stage, list(resolved.notes)) == (stage, notes)

    def test_more_cpu_ranks_than_cores_are_a_note(self) -> None:
        assert self.resolve("parallelism=hybrid_3d").notes == (
            "8 CPU ranks share 2 cores: correct results, but slow training",
        )
        assert self.resolve("parallelism.tensor=2", cores=1).notes == (
            "2 CPU ranks share 1 core: correct results, but slow training",
        )
        assert self.resolve("parallelism=hybrid_3d", cores=8).notes == ()

    def test_a_joined_world_sets_the_data_parallel_size(self) -> None:
        assert self.resolve(world=4).data == 4
        assert self.resolve("parallelism=tp2_pp2", world=16).data == 4
        assert self.resolve("parallelism.data=2", world=2).data == 2
        # Other machines have the other ranks, so that neither nodes nor cores nor GPUs of this one bind.
        assert self.resolve("hardware.nodes=2", world=4, cores=1).notes == ()
        h100 = self.resolve("hardware=h100_80gb", "training.global_batch_size=64", world=16, gpus=8)
        assert h100.world_size == 16

    @pytest.mark.parametrize(("ranks", "batches"), [(1, "8 micro-batches"), (8, "1 micro-batch")])
    def test_describes_itself(self, ranks: int, batches: str) -> None:
        layout = self.resolve("training.global_batch_size=32", world=ranks)
        unit = "rank" if ranks == 1 else "ranks"
        assert layout.describe() == (
            f"{ranks} cpu {unit} = 1 pipeline x {ranks} data x 1 tensor, ZeRO-0, "
            f"{batches} per step and data rank"
        )

    def test_describes_dualpipev(self) -> None:
        layout = Layout(
            pipeline=2, data=1, tensor=1, device="cpu", accumulation=4, zero_stage=1, stages_per_rank=2
        )
        assert layout.describe() == (
            "2 cpu ranks = 2 pipeline (DualPipeV) x 1 data x 1 tensor, ZeRO-1, "
            "4 micro-batches per step and data rank"
        )


small = st.integers(0, 9)
SETTINGS = {
    "model.hidden_size": st.integers(1, 64),
    "model.num_layers": small,
    "model.num_heads": small,
    "model.num_kv_heads": st.none() | small,
    "model.ffn_hidden_size": st.integers(1, 64),
    "model.max_sequence_length": st.integers(1, 64),
    "data.sequence_length": st.none() | st.integers(1, 64),
    "parallelism.tensor": small,
    "parallelism.pipeline": small,
    "parallelism.data": st.none() | small,
    "parallelism.zero_stage": st.integers(-1, 4),
    "parallelism.sequence_parallel": st.booleans(),
    "parallelism.offload_optimizer": st.booleans(),
    "parallelism.offload_parameters": st.booleans(),
    "precision.dtype": st.sampled_from(Dtype),
    "hardware.device": st.sampled_from(Device),
    "hardware.nodes": st.integers(1, 2),
    "hardware.accelerators_per_node": st.none() | small,
    "training.steps": st.integers(1, 100),
    "training.stop_at": st.none() | st.integers(1, 100),
    "training.global_batch_size": st.integers(1, 48),
    "training.micro_batch_size": st.integers(1, 12),
    "scheduler.decay_steps": st.none() | st.integers(1, 100),
}
SHAPES = ("model=gpt_tiny", "model=llama_tiny")
SCHEDULES = ("scheduler=cosine", "scheduler=wsd")


Place = tuple[Machine, int | None]


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    """Draw a run with some random settings; many are legal, many are not."""
    run = run_of(draw(st.sampled_from(SHAPES)), draw(st.sampled_from(SCHEDULES)))
    for field in draw(st.sets(st.sampled_from(sorted(SETTINGS)), max_size=8)):
        set_field(run, field, draw(SETTINGS[field]))
    return run


@st.composite
def places(draw: st.DrawFn) -> Place:
    """Draw a machine and, if torchrun started them, the number of ranks."""
    machine = Machine(gpus=draw(st.integers(0, 8)), cores=draw(st.integers(1, 8)))
    return machine, draw(st.none() | st.integers(1, 16))


def set_field(run: RunConfig, field: str, value: object) -> None:
    section, name = field.rsplit(".", 1)
    setattr(section_of(run, section), name, value)


def outcome(run: RunConfig, place: Place) -> Layout | ConfigError:
    try:
        return layout_of(run, *place)
    except ConfigError as error:
        return error


class TestAnyRun:
    @given(run=runs(), place=places())
    @settings(max_examples=400)
    def test_is_refused_or_resolved_and_never_changed(self, run: RunConfig, place: Place) -> None:
        before = copy.deepcopy(run)
        found = outcome(run, place)
        assert run == before
        if isinstance(found, ConfigError):
            assert found.why
            assert found.remedy
        else:
            check_invariants(run, place, found)

    @given(run=runs(), place=places(), choices=st.lists(st.integers(0, 4), min_size=12, max_size=12))
    @settings(max_examples=200)
    def test_following_any_advice_leads_to_a_run_that_works(
        self, run: RunConfig, place: Place, choices: list[int]
    ) -> None:
        said = []
        while isinstance(error := outcome(run, place), ConfigError):
            said.append(str(error))
            assert len(said) <= len(choices), said
            offers = alternatives(error)
            assume(offers)  # a world size cannot be typed
            for setting in offers[choices[len(said) - 1] % len(offers)]:
                follow(run, setting)


def check_invariants(run: RunConfig, place: Place, found: Layout) -> None:
    p, t = run.parallelism, run.training
    assert found.world_size == found.pipeline * found.data * found.tensor
    assert (found.tensor, found.pipeline) == (p.tensor, p.pipeline)
    assert p.data in (None, found.data)
    assert found.accumulation >= 1
    assert found.accumulation * found.data * t.micro_batch_size == t.global_batch_size
    assert found.tensor in legal_tensor_sizes(run)
    assert found.pipeline in legal_pipeline_sizes(run)
    assert run.model.hidden_size % run.model.num_heads == 0
    assert not p.sequence_parallel or (found.tensor > 1 and sequence_length(run) % found.tensor == 0)
    assert found.zero_stage == p.zero_stage or ((p.zero_stage, found.zero_stage) == (0, 1) and found.notes)
    assert not (found.zero_stage == 0 and (found.pipeline > 1 or run.precision.dtype is not Dtype.fp32))
    assert not (found.device == "cpu" and run.precision.dtype is Dtype.fp16)
    machine, joined_ranks = place
    assert found.device == "cpu" or machine.gpus
    if joined_ranks is not None:
        assert found.world_size == joined_ranks
    elif found.device == "cuda":
        assert found.world_size <= machine.gpus


def follow(run: RunConfig, setting: str) -> None:
    """Change a run as typing `setting` would."""
    field, _, typed = setting.partition("=")
    if "." not in field:
        setattr(run, field, getattr(run_of(setting), field))
        return
    set_field(run, field, yaml.safe_load(typed))
