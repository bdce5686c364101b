"""In every layout a flipped bit is noticed and named with its ranks, and equal replicas raise no alarm."""

import re
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config.layout import Layout, resolve_layout
from launcher.config.schema import RunConfig
from launcher.config.world import World
from launcher.engine import replicas
from launcher.engine.replicas import ALL_AXES, Axes, Disagreement, compare, disagreements
from launcher.parallel.mesh import MeshShape
from tests.distributed import run_fresh
from tests.parity.running import PipelineModule, small_run  # imported first: silences DeepSpeed

assert PipelineModule

from launcher.engine.base import Engine  # noqa: E402
from launcher.engine.build import build_engine  # noqa: E402
from launcher.engine.distributed import join, leave  # noqa: E402
from launcher.parallel.sharding import logical_of  # noqa: E402
from launcher.parity.recording import rank_batches  # noqa: E402
from launcher.parity.reference import probe_batches  # noqa: E402

NORM, STATE, EMBEDDING = "final_norm.weight", "final_norm.weight (exp_avg)", "embedding.weight"

# Layouts, with a name of which the last rank must hold a copy.
LAYOUTS = {
    "dp2": ("parallelism=dp parallelism.data=2", STATE),
    "dp3": ("parallelism=dp parallelism.data=3", STATE),
    "dp2 momentum": (
        "parallelism=dp parallelism.data=2 optimizer=sgd optimizer.momentum=0.9",
        "embedding.weight (momentum_buffer)",
    ),
    "tp2": ("parallelism=tp2 parallelism.data=1 parallelism.sequence_parallel=true", STATE),
    "dp2 x tp2": ("parallelism=tp2 parallelism.data=2", STATE),
    "zero1": ("parallelism=zero1 parallelism.data=2", EMBEDDING),
    "zero1 bf16": ("parallelism=zero1 parallelism.data=2 precision=bf16", EMBEDDING),
    "zero2": ("parallelism=zero2 parallelism.data=2", EMBEDDING),
    "zero2 x tp2": ("parallelism=zero2 parallelism.data=2 parallelism.tensor=2", EMBEDDING),
    "zero3": ("parallelism=zero3 parallelism.data=2", NORM),
    "zero3 x tp2": ("parallelism=zero3 parallelism.data=2 parallelism.tensor=2", NORM),
    "zero3 offloaded": ("parallelism=zero3_offload parallelism.data=2", NORM),
    "pp2": ("parallelism=pp2 parallelism.data=1", EMBEDDING),
    "dp2 x pp2": ("parallelism=pp2 parallelism.data=2", EMBEDDING),
    "tp2 x pp2 bf16": ("parallelism=tp2_pp2 parallelism.data=1 precision=bf16", EMBEDDING),
    "experts over 2 of data 4": (
        "parallelism.data=4 parallelism.expert=2 model=moe_tiny",
        "blocks.0.mlp.experts.down.weight",
    ),
    "experts over 2, ZeRO-1, context 2": (
        "parallelism.data=2 parallelism.context=2 parallelism.expert=2 parallelism.zero_stage=1 "
        "model=moe_tiny model.experts.bias_balancing=0.01",
        "blocks.0.mlp.experts.gate_up.weight",
    ),
    "dualpipev": (
        "parallelism=pp2 parallelism.data=2 parallelism.pipeline_schedule=dualpipev",
        "blocks.1.mlp_norm.weight",
    ),
}
QUICK = {"zero3", "tp2 x pp2 bf16", "experts over 2 of data 4"}


def run_in(layout: str) -> tuple[RunConfig, Layout]:
    batch = ["training.global_batch_size=24", "training.micro_batch_size=2"]
    words = LAYOUTS[layout][0].split()
    model = [] if "model=moe_tiny" in words else ["model=gpt_tiny"]
    run = small_run(*model, *batch, *words, steps=2)
    if run.parallelism.zero_stage == 3:  # the norms and biases stay whole, the matrices are partitioned
        run.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    return run, resolve_layout(run, World("cpu", 8, 8))


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in LAYOUTS]
)
def test_each_flipped_bit_is_named(layout: str) -> None:
    """Also: two steps raise no alarm."""
    run, resolved = run_in(layout)
    noticed, expected, false_alarms = run_fresh(flipped, resolved.world_size, run, resolved)[-1]
    assert false_alarms == []
    assert noticed == expected
    assert LAYOUTS[layout][1] in {name for name, _ in noticed}


def flipped(
    rank: int, world: int, init_method: str, run: RunConfig, layout: Layout
) -> tuple[list[tuple[str, list[int]]], list[tuple[str, list[int]]], list[Disagreement]]:
    """Flip each tensor's lowest bit on the last rank; return what was noticed, expected, and false alarms."""
    device = join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=init_method)
    engine = build_engine(run, layout, device)
    false_alarms = disagreements(engine, {})
    for step, batch in enumerate(probe_batches(run), 1):
        engine.set_learning_rate(run.optimizer.lr)
        engine.random.begin_step(step)
        engine.train_batch(rank_batches(run, engine, batch))
        false_alarms += disagreements(engine, {"step": step})
    targets = list(copies(engine)) if rank == world - 1 else []
    shared = [[(name, axes) for name, axes, _ in targets]]
    dist.broadcast_object_list(shared, src=world - 1)
    noticed, expected = [], []
    for index, (name, axes) in enumerate(shared[0]):
        if targets:
            flip(targets[index][2])
        noticed += [(each.name, sorted(each.ranks)) for each in disagreements(engine, {})]
        expected.append((name, alike(engine.mesh.shape, world - 1, axes)))
        if targets:
            flip(targets[index][2])
    false_alarms += disagreements(engine, {})
    leave()
    return noticed, expected, false_alarms


def copies(engine: Engine) -> Iterator[tuple[str, Axes, Tensor]]:
    """Yield name, axes and tensor of the copies that this rank holds, found without replicas.py.

    Only those of one block: the others are alike.
    """
    mesh, seen = engine.mesh, set()
    for parameter in engine.module.parameters():
        logical = logical_of(parameter)
        # The last stage's copy of the embedding. Under DualPipeV one rank has both ends, and no copy.
        tied = bool(getattr(parameter, "ds_pipe_replicated", False))
        has_copies = mesh.data.size > 1
        of_data = (has_copies, has_copies)
        if logical.part[1] > 1:  # experts: the data ranks of another place in their group hold others
            of_data = (mesh.data.size > mesh.expert.size, False)
        axes = (tied, *of_data, mesh.tensor.size > 1 and not logical.is_split)
        alike_name = re.sub(r"\d+", "N", logical.name)
        is_partitioned = parameter.numel() == 0  # by ZeRO-3
        if not any(axes) or is_partitioned or alike_name in seen:
            continue
        seen.add(alike_name)
        yield logical.name, axes, parameter.data
        if engine.zero_stage == 0:
            for key, state in engine.optimizer.state[parameter].items():
                if key != "step":
                    yield f"{logical.name} ({key})", axes, state


def flip(tensor: Tensor) -> None:
    """Flip the lowest mantissa bit of the last element."""
    bits = tensor.detach().view(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    bits[-1] ^= 1


def alike(shape: MeshShape, rank: int, axes: Axes) -> list[int]:
    """Return the ranks that hold a copy, of two stages at most: both hold a tied weight."""

    def place(rank: int) -> tuple[int, int, int, int]:
        stage, data, tensor = shape.coordinates(rank)
        return stage, data // shape.expert, data % shape.expert, tensor

    return [
        other
        for other in range(shape.world_size)
        if all(
            axis or index == mine for axis, index, mine in zip(axes, place(other), place(rank), strict=True)
        )
    ]


@pytest.mark.parametrize("layout", ["zero1", pytest.param("zero3", marks=pytest.mark.slow)])
def test_states_of_replicated_tensors_are_compared_over_tensor_ranks(layout: str) -> None:
    """ZeRO splits master weights and states over the data ranks, and tensor ranks hold equal fragments."""
    ranks = ["parallelism.data=2", "parallelism.tensor=2"]
    run = small_run("model=gpt_tiny", f"parallelism={layout}", *ranks)
    names = run_fresh(flipped_fragments, 4, run, resolve_layout(run, World("cpu", 8, 8)))[0]
    assert [name.partition(" (")[2] for name in names] == ["master weight)", "exp_avg)", "exp_avg_sq)"]


def flipped_fragments(rank: int, world: int, init_method: str, run: RunConfig, layout: Layout) -> list[str]:
    """Flip a bit of one fragment on rank 0: of its master weight, then of each state; return the names."""
    from launcher.engine.state import fragments

    device = join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=init_method)
    engine = build_engine(run, layout, device)
    engine.set_learning_rate(run.optimizer.lr)
    engine.train_batch(rank_batches(run, engine, next(probe_batches(run))))
    names = []
    for key in ("weight", "exp_avg", "exp_avg_sq"):
        whole = next(
            each for each in fragments(engine, ["exp_avg", "exp_avg_sq"]) if not each.logical.is_split
        )
        for _ in range(2):
            if rank == 0:
                flip(whole.tensors[key])
            found = disagreements(engine, {})
            names += [each.name for each in found]
            assert all(sorted(each.ranks) == [0, 1] for each in found)
    leave()
    return names


def test_numbers_are_compared_over_all_ranks() -> None:
    run, layout = run_in("pp2")
    names = run_fresh(different_numbers, 2, run, layout)[0]
    assert names == ["step", "samples consumed", "highest learning rate", "number of optimizer updates"]


def different_numbers(rank: int, world: int, init_method: str, run: RunConfig, layout: Layout) -> list[str]:
    device = join(rank=rank, world_size=world, local_rank=rank, device="cpu", init_method=init_method)
    engine = build_engine(run, layout, device)
    engine.train_batch(rank_batches(run, engine, next(probe_batches(run))))
    engine.optimizer.param_groups[0]["lr"] += rank
    for state in engine.optimizer.state.values():
        state["step"] += rank
    differing = disagreements(engine, {"step": 7 + rank, "samples consumed": 16 * rank})
    leave()
    return [each.name for each in differing]


def test_ranks_in_the_minority_are_named() -> None:
    assert Disagreement("w", {0: 5, 1: 6, 2: 5, 3: 5}).minority() == [1]
    assert Disagreement("w", {0: 5, 1: 6}).minority() == [0, 1]
    assert Disagreement("w", {0: 5, 1: 6, 2: 5, 3: 6}).minority() == [0, 1, 2, 3]
    assert Disagreement("w", {0: 5, 1: 6, 2: 7}).minority() == [0, 1, 2]


def test_only_ranks_along_the_axes_are_compared() -> None:
    shape = MeshShape(pipeline=2, data=2, tensor=2)
    data: Axes = (False, True, True, False)
    by_stage_and_tensor = [{(data, "w"): 10 * (rank // 4) + rank % 2} for rank in range(8)]
    assert compare(shape, by_stage_and_tensor) == []
    by_stage_and_tensor[6] = {(data, "w"): 3}
    assert compare(shape, by_stage_and_tensor) == [Disagreement("w", {4: 10, 6: 3})]
    everywhere = [{(ALL_AXES, "n"): 1} for _ in range(8)]
    assert compare(shape, everywhere) == []
    assert compare(shape, [*everywhere[:7], {(ALL_AXES, "n"): 2}])[0].minority() == [7]
    assert compare(shape, [*everywhere[:7], {}]) == []


def test_experts_are_compared_between_the_ranks_that_hold_the_same() -> None:
    shape, holders = MeshShape(data=4, expert=2), (False, True, False, False)
    held = [{(holders, "experts"): rank % 2} for rank in range(4)]
    assert compare(shape, held) == []
    held[3] = {(holders, "experts"): 7}
    assert compare(shape, held) == [Disagreement("experts", {1: 1, 3: 7})]


def test_a_hash_that_ignores_the_tensor_is_caught() -> None:
    """The tests above fail with a hash that is always the same."""
    run, layout = run_in("dp2")
    noticed, expected, _ = run_fresh(flipped_without_hash, 2, run, layout)[-1]
    assert noticed == []
    assert expected


def flipped_without_hash(
    rank: int, world: int, init_method: str, run: RunConfig, layout: Layout
) -> tuple[list[tuple[str, list[int]]], list[tuple[str, list[int]]], list[Disagreement]]:
    replicas.digest = lambda tensors: torch.ones((), dtype=torch.int64)
    return flipped(rank, world, init_method, run, layout)
