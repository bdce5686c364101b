"""A shrunk run is legal and small, and keeps every property that can break."""

import copy
from dataclasses import replace
from itertools import accumulate, combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import ContextMethod, Dtype, ModelConfig, RunConfig
from launcher.config.shape import (
    head_size,
    kv_heads,
    layer_has_experts,
    sequence_length,
    stages_per_rank,
    window_of,
)
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.parity.shrink import (
    LONG,
    MOST_RANKS,
    inner_stages,
    long_samples,
    other_axes,
    shrink,
    shrunk_axes,
    small_axes,
)
from launcher.planning.cost.geometry import blocks_of_stages
from tests.config.composing import run_of

BASES = [
    ["model=gpt_tiny", "optimizer=adamw"],
    ["model=gpt2_small", "optimizer=sgd", "scheduler=wsd", "scheduler.decay_steps=10"],
    ["model=llama_tiny", "optimizer=adamw", "data.sequence_length=64"],
    ["model=llama3_70b", "optimizer=adamw", "precision=bf16"],
]
SIZES = st.sampled_from([1, 2, 3, 4, 8, 16])
AXES = ("pipeline", "data", "tensor", "context")


@st.composite
def legal_runs(draw: st.DrawFn) -> tuple[RunConfig, Layout]:
    """Draw a legal run of any size, and its layout on a cluster with enough ranks."""
    run = run_of(*draw(st.sampled_from(BASES)))
    m, p, t = run.model, run.parallelism, run.training
    p.tensor, p.pipeline = draw(SIZES), draw(SIZES)
    p.context, p.context_method = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from(ContextMethod))
    data = draw(SIZES | st.just(1024))
    p.zero_stage = draw(st.integers(0, 3))
    p.sequence_parallel = draw(st.booleans())
    p.offload_optimizer = draw(st.booleans())
    m.tie_embeddings = draw(st.booleans())
    m.vocab_size += draw(st.integers(0, 3))
    m.num_layers = p.pipeline * draw(st.integers(1, 3)) + draw(st.integers(0, 2))
    if m.num_kv_heads is not None:
        m.num_kv_heads = p.tensor * draw(st.sampled_from([1, 2, 4]))
        m.num_heads = m.num_kv_heads * draw(st.sampled_from([1, 2, 8]))
    else:
        m.num_heads = p.tensor * draw(st.integers(1, 4))
    m.hidden_size = m.num_heads * draw(st.sampled_from([2, 64]))
    m.head_size = draw(st.sampled_from([None, 2, 10]))
    m.ffn_hidden_size = p.tensor * draw(st.integers(1, 100))
    t.micro_batch_size = draw(st.integers(1, 5))
    t.global_batch_size = t.micro_batch_size * data * draw(st.integers(1, 9))
    run.optimizer.gradient_clipping = draw(st.sampled_from([None, 0.1, 1.0]))
    ranks = p.tensor * p.pipeline * p.context * data
    try:
        return run, validate(run, World("cpu", ranks, ranks, fixed=True))
    except ConfigError:
        assume(False)
        raise


@given(drawn=legal_runs())
@settings(max_examples=100)
def test_a_shrunk_run_is_legal_small_and_has_the_same_properties(drawn: tuple[RunConfig, Layout]) -> None:
    run, layout = drawn
    before = copy.deepcopy(run)
    small, _ = shrink(run, layout)
    assert run == before

    small_layout = validate(small, World("cpu", 2, 2))
    assert small_layout.device == "cpu"
    check_axes(layout, [small, *other_axes(run, layout)])
    assert (small_layout.accumulation > 1) == (layout.accumulation > 1)

    kept = ("zero_stage", "sequence_parallel", "offload_optimizer", "offload_parameters")
    for field in (*kept, "activation_checkpointing"):
        assert getattr(small.parallelism, field) == getattr(run.parallelism, field)
    assert parts_of(small.model) == parts_of(run.model)
    assert small.model.tie_embeddings == run.model.tie_embeddings
    assert properties(small, small_layout) == properties(run, layout)
    assert parameters(small) < 1_000_000
    for more in (inner_stages(run, layout, small), long_samples(run, layout, small)):
        if more is not None:
            assert validate(more, World("cpu", 2, 2)).world_size <= MOST_RANKS
            assert parts_of(more.model) == parts_of(run.model)
            assert parameters(more) < 1_000_000


def check_axes(layout: Layout, runs: list[RunConfig]) -> None:
    """Check that small runs of few ranks keep each axis above 1, and each pair of such axes together."""
    large = {axis for axis in AXES if getattr(layout, axis) > 1}
    assert len(runs) == (4 if len(large) == 4 else 1)
    kept = []
    for run in runs:
        small = validate(run, World("cpu", 2, 2))
        assert small.world_size <= MOST_RANKS
        kept.append({axis for axis in AXES if getattr(small, axis) > 1})
        assert kept[-1] <= large
        assert len(kept[-1]) == min(3, len(large))
    for pair in combinations(large, 2):
        assert any(set(pair) <= axes for axes in kept)


def test_four_axes_are_kept_in_four_small_runs() -> None:
    axes = [f"parallelism.{axis}=4" for axis in AXES]
    sequence = ["parallelism.sequence_parallel=true", "parallelism.pipeline_schedule=dualpipev"]
    model = ["model=llama_tiny", "model.num_layers=8", "model.num_kv_heads=4"]
    batch = ["training.micro_batch_size=1", "training.global_batch_size=64"]
    run = run_of(*model, *batch, *axes, *sequence)
    layout = validate(run, World("cpu", 256, 256, fixed=True))
    assert small_axes(layout) == [(2, 1, 2, 2), (2, 2, 1, 2), (1, 2, 2, 2), (2, 2, 2, 1)]
    assert [str(each) for each in small_axes(layout)][:2] == [
        "pipeline x tensor x context", "pipeline x data x context",
    ]  # fmt: skip
    small, *others = runs = [shrink(run, layout)[0], *other_axes(run, layout)]
    check_axes(layout, runs)
    assert [each.parallelism.sequence_parallel for each in runs] == [True, False, True, True]
    assert [each.parallelism.pipeline_schedule.name for each in others].count("1f1b") == 1
    inner = inner_stages(run, layout, small)
    assert inner is not None
    assert validate(inner, World("cpu", 2, 2)).world_size == MOST_RANKS
    assert (inner.parallelism.pipeline, inner.parallelism.context, inner.parallelism.tensor) == (4, 2, 1)
    # Expert ranks are data ranks: the first run, which has most passes, keeps them.
    assert small_axes(replace(layout, expert=2))[0] == (1, 2, 2, 2)
    assert small_axes(replace(layout, tensor=1, context=8)) == [(2, 2, 1, 2)]


def test_inner_stages_are_kept_or_have_a_layout_of_their_own() -> None:
    assert shrunk_axes(4, 64, 1) == (4, 2, 1)
    assert shrunk_axes(8, 1, 8) == (4, 1, 2)
    assert shrunk_axes(4, 16, 8) == (2, 2, 2)
    axes = ["parallelism.pipeline=4", "parallelism.data=4", "parallelism.tensor=2"]
    run = run_of("model=llama_tiny", *axes, "model.num_layers=8", "training.micro_batch_size=1")
    layout = validate(run, World("cpu", 32, 32, fixed=True))
    inner = inner_stages(run, layout, shrink(run, layout)[0])
    assert inner is not None
    p = inner.parallelism
    assert (p.pipeline, p.data, p.tensor) == (4, 1, 2)
    run.parallelism.pipeline = 2
    layout = validate(run, World("cpu", 16, 16, fixed=True))
    assert inner_stages(run, layout, shrink(run, layout)[0]) is None


@pytest.mark.parametrize("layers", [26, 27])
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
@pytest.mark.parametrize(
    "pattern",
    [
        ["model=llama_tiny", "model.sliding_window=64", "model.full_attention_every=2"],
        ["model=moe_tiny", "model.experts.every=2"],
    ],
)
def test_stages_begin_at_different_places_of_a_pattern(
    pattern: list[str], schedule: str, layers: int
) -> None:
    """Else a stage that counts its own layers would have the right windows and experts."""
    axes = ["parallelism.pipeline=2", "parallelism.data=1", f"parallelism.pipeline_schedule={schedule}"]
    run = run_of(*pattern, *axes, f"model.num_layers={layers}")
    small, _ = shrink(run, validate(run, World("cpu", 2, 2)))
    m = small.model
    starts = list(accumulate(blocks_of_stages(m.num_layers, 2 * stages_per_rank(small)), initial=0))[:-1]
    kinds = {(window_of(m, start) is None, layer_has_experts(m, start)) for start in starts}
    assert len(kinds) == 2
    assert m.num_layers <= 6


def test_long_samples_have_the_positions_of_the_run() -> None:
    window = ["model.sliding_window=1000", "model.max_sequence_length=8192"]
    run = run_of("model=llama_tiny", "parallelism.data=1", "model.num_kv_heads=2", *window)
    layout = validate(run, World("cpu", 1, 1, fixed=True))
    long = long_samples(run, layout, shrink(run, layout)[0])
    assert long is not None
    assert sequence_length(long) == LONG
    assert long.model.sliding_window == 1000
    assert long.model.rope_theta == run.model.rope_theta
    images = run_of("model=vit_tiny", "data=digits", "parallelism.data=1")
    layout = validate(images, World("cpu", 1, 1, fixed=True))
    assert long_samples(images, layout, shrink(images, layout)[0]) is None


def test_heads_for_eight_tensor_ranks_keep_the_run_small() -> None:
    heads = ["model.num_heads=64", "model.num_kv_heads=16", "model.hidden_size=4096", "parallelism.tensor=8"]
    run = run_of("model=llama_tiny", *heads)
    small, _ = shrink(run, validate(run, World("cpu", 8, 8, fixed=True)))
    assert (small.model.num_heads, small.model.num_kv_heads, small.model.hidden_size) == (32, 16, 128)
    assert parameters(small) < 1_000_000


# Settings that a rule bounds by a size of the run, and which the small run cannot have.
BOUNDED = {
    "few rotated channels": ["model=llama_tiny", "model.hidden_size=512", "model.rotary_fraction=0.0625"],
    "a quarter of a head of 12": ["model=llama_tiny", "model.head_size=24", "model.rotary_fraction=0.25"],
    "a late profile": ["profile.enabled=true", "profile.first_step=100"],
    "a long profile": ["profile.enabled=true", "profile.steps=50"],
    "imbalanced experts": [
        "model=moe_tiny", "parallelism=tp2", "parallelism.expert=8", "plan.expert_imbalance=8",
    ],
    "digits in small patches": ["model=vit_tiny", "data=digits", "model.patch_size=1"],
    "digits and a class token": [
        "model=vit_tiny", "data=digits", "model.pooling=class_token", "model.patch_size=8",
        "parallelism=tp2", "parallelism.sequence_parallel=true",
    ],
    "images for three tensor ranks": [
        "model=vit_b16", "data=image_folder", "data.train=images", "model.pooling=mean",
        "model.image_size=192", "parallelism.tensor=3", "parallelism.sequence_parallel=true",
    ],
    "a loss scale": ["precision=fp16", "deepspeed.fp16.hysteresis=3", "hardware.device=cuda"],
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_settings_that_are_bounded_by_a_size_are_legal_in_the_small_run(name: str) -> None:
    run = run_of("training.global_batch_size=32", *BOUNDED[name])
    ranks, device = 8 * run.parallelism.tensor, run.hardware.device.name.replace("auto", "cpu")
    layout = validate(run, World(device, ranks, ranks, fixed=True))
    small = shrink(run, layout)[0]
    assert validate(small, World("cpu", 2, 2)).tensor == layout.tensor
    if (long := long_samples(run, layout, small)) is not None:
        validate(long, World("cpu", 2, 2))


def parts_of(model: ModelConfig) -> tuple[object, ...]:
    return model.inputs, model.norm, model.positions, model.mlp, model.attention, model.biases


def properties(run: RunConfig, layout: Layout) -> dict[str, bool]:
    return {
        "grouped KV heads": kv_heads(run.model) != run.model.num_heads,
        "uneven layers": run.model.num_layers % layout.pipeline != 0,
        "vocabulary not divisible by the tensor ranks": run.model.vocab_size % layout.tensor != 0,
        "sequences shorter than the model allows": sequence_length(run) < run.model.max_sequence_length,
        "a head size of its own": head_size(run.model) * run.model.num_heads != run.model.hidden_size,
        "clipping": run.optimizer.gradient_clipping is not None,
    }


def parameters(run: RunConfig) -> int:
    m = run.model
    return m.num_layers * (4 * m.hidden_size**2 + 3 * m.hidden_size * m.ffn_hidden_size) + 2 * (
        m.vocab_size * m.hidden_size
    )


@given(drawn=legal_runs())
def test_reports_every_changed_field(drawn: tuple[RunConfig, Layout]) -> None:
    run, layout = drawn
    small, report = shrink(run, layout)
    lines = {line.partition(" ")[0]: line for line in report}
    for section in ("model", "parallelism", "training", "optimizer"):
        for name, old in vars(getattr(run, section)).items():
            new = getattr(getattr(small, section), name)
            if old is not None:
                assert (f"{section}.{name}" in lines) == (old != new)
    if run.model.hidden_size != small.model.hidden_size:
        assert lines["model.hidden_size"].endswith(f" {run.model.hidden_size} -> {small.model.hidden_size}")


@given(pipeline=st.integers(1, 512), data=st.integers(1, 512), tensor=st.integers(1, 512))
def test_shrunk_axes_fit_and_stay_above_1(pipeline: int, data: int, tensor: int) -> None:
    axes = shrunk_axes(pipeline, data, tensor)
    assert axes[0] * axes[1] * axes[2] <= MOST_RANKS
    for small, large in zip(axes, (pipeline, data, tensor), strict=True):
        assert small <= large
        assert (small > 1) == (large > 1)
    if pipeline * data * tensor <= MOST_RANKS:
        assert axes == (pipeline, data, tensor)


def test_accumulation_differs_from_the_size_of_every_axis() -> None:
    for layout in ("dp", "tp2", "pp2", "tp2_pp2", "hybrid_3d"):
        run = run_of(f"parallelism={layout}", "training.micro_batch_size=1")
        small, _ = shrink(run, validate(run, World("cpu", 2, 2)))
        shrunk = validate(small, World("cpu", 2, 2))
        assert shrunk.accumulation > 1
        assert shrunk.accumulation not in (shrunk.data, shrunk.tensor, shrunk.pipeline)


@pytest.mark.parametrize("dtype", Dtype)
def test_only_fp16_changes_precision(dtype: Dtype) -> None:
    run = run_of("hardware=a100_80gb", "training.micro_batch_size=1", f"precision={dtype.name}")
    small, report = shrink(run, validate(run, World("cuda", 8, 8, fixed=True)))
    assert small.precision.dtype is (Dtype.fp32 if dtype is Dtype.fp16 else dtype)
    assert ("precision.dtype fp16 -> fp32" in report) == (dtype is Dtype.fp16)
    validate(small, World("cpu", 2, 2))
