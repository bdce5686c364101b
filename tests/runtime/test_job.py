"""Decisions of `launcher job`, without Slurm; tests/slurm runs jobs on a real cluster."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.commands.ready import ready, ready_on_most_nodes
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError, hydra_text
from launcher.config.schema import RunConfig
from launcher.config.world import world_of_nodes
from launcher.launch.records import RankEnd, RankEndKind
from launcher.launch.slurm import Allocation, read_allocation
from launcher.runtime.slurm_job import End, Outcome, outcome, run_dir_of, step_command
from tests.config.composing import run_of

NODES = ["hardware=cpu", "hardware.accelerators_per_node=2", "training.global_batch_size=16"]

SILENT = "a rank ended without a message: see the output of srun above"


@pytest.mark.parametrize(
    ("code", "stop_requested", "ends", "expected"),
    [
        (0, False, [], Outcome(End.finished)),
        (0, True, [], Outcome(End.finished)),  # the stop came after the last step
        (143, True, [RankEnd(0, RankEndKind.stopped), RankEnd(1, RankEndKind.stopped)], Outcome(End.stopped)),
        (143, False, [RankEnd(0, RankEndKind.stopped)], Outcome(End.stopped)),  # Slurm signalled the ranks
        (137, True, [], Outcome(End.stopped)),  # killed during the save
        (2, False, [RankEnd(0, RankEndKind.refused, "x")], Outcome(End.refused, "x")),
        (
            1,
            False,
            [RankEnd(0, RankEndKind.halted, "x"), RankEnd(1, RankEndKind.lost, "y")],
            Outcome(End.halted, "x"),
        ),
        # srun ends the other ranks and returns the highest exit code.
        (
            143,
            False,
            [RankEnd(0, RankEndKind.refused, "x"), RankEnd(1, RankEndKind.lost, "y")],
            Outcome(End.refused, "x"),
        ),
        (
            143,
            False,
            [RankEnd(1, RankEndKind.failed, "x"), RankEnd(0, RankEndKind.stopped)],
            Outcome(End.failed, "x"),
        ),
        (
            1,
            False,
            [RankEnd(1, RankEndKind.lost, "a"), RankEnd(0, RankEndKind.lost, "b")],
            Outcome(End.failed, "a"),
        ),
        (1, False, [RankEnd(1, RankEndKind.lost, "closed")], Outcome(End.failed, SILENT)),
        (
            1,
            False,
            [RankEnd(1, RankEndKind.lost, "reset"), RankEnd(0, RankEndKind.stopped)],
            Outcome(End.failed, "reset"),
        ),
        # srun returns 0 for a stop.
        (0, True, [RankEnd(0, RankEndKind.stopped), RankEnd(1, RankEndKind.stopped)], Outcome(End.stopped)),
        (0, False, [RankEnd(0, RankEndKind.stopped), RankEnd(1, RankEndKind.stopped)], Outcome(End.stopped)),
        (137, False, [], Outcome(End.failed, "srun ended with code 137, SIGKILL: see its output above")),
        (1, False, [], Outcome(End.failed, "srun ended with code 1: see its output above")),
    ],
)
def test_outcome(code: int, stop_requested: bool, ends: list[RankEnd], expected: Outcome) -> None:
    assert outcome(code, stop_requested, ends, 2) == expected


@pytest.mark.parametrize(
    ("typed", "nodes", "used", "data"),
    [
        ([], 4, 4, 8),
        ([], 3, 2, 4),  # 6 data ranks do not divide 16
        (["training.global_batch_size=48"], 3, 3, 6),
        (["parallelism.tensor=2"], 3, 2, 2),
        (["parallelism.tensor=4"], 3, 2, 1),
        (["parallelism.data=2"], 4, 1, 2),
    ],
)
def test_a_job_uses_the_most_nodes_that_have_a_legal_layout(
    typed: list[str], nodes: int, used: int, data: int
) -> None:
    ready_run, taken = ready_on_most_nodes(run_of(*NODES, "training.micro_batch_size=1", *typed), nodes)
    assert (taken, ready_run.layout.data) == (used, data)


def test_without_a_legal_layout_the_refusal_is_that_of_all_nodes() -> None:
    with pytest.raises(ConfigError, match="the world size 2 is not a multiple of tensor 4"):
        ready_on_most_nodes(run_of(*NODES, "parallelism.tensor=4"), 1)


AUTO = ["hardware=h100_80gb", "model=llama3_8b", "precision=bf16", "training.global_batch_size=64"]


@pytest.mark.slow
def test_auto_chooses_a_layout_for_the_allocated_nodes() -> None:
    run = run_of(*AUTO, "parallelism=auto", "hardware.nodes=4", "slurm.nodes=2-4")
    for nodes in (4, 3, 2):
        ready_run, used = ready_on_most_nodes(run, nodes)
        assert (ready_run.layout.world_size, ready_run.layout.device) == (8 * used, "cuda")
        assert not ready_run.run.parallelism.auto
        assert ready_run.run.parallelism.data == ready_run.layout.data
    assert ready_on_most_nodes(run, 4) == ready_on_most_nodes(run, 4)


def ready_on_a_node(run: RunConfig) -> None:
    ready(run, world_of_nodes(run, 1), needs_data=False, must_fit=True)


def test_a_run_that_cannot_fit_its_nodes_is_refused() -> None:
    too_large = run_of(*AUTO, "model=llama3_70b", "parallelism.tensor=2")
    with pytest.raises(ConfigError, match=r"hardware.memory_bytes=8.49e\+10: stage 0 needs"):
        ready_on_a_node(too_large)
    with pytest.raises(ConfigError, match=r"parallelism.auto=true: none of \d+ layouts on 8 ranks fits"):
        ready_on_a_node(run_of(*AUTO, "parallelism=auto", "hardware.memory_bytes=1e9"))
    ready_on_a_node(run_of(*AUTO, "model=llama3_70b", "parallelism.tensor=2", "plan.enforce=false"))


def test_the_srun_command() -> None:
    run = run_of(*NODES, "training.micro_batch_size=1", 'slurm.srun=["--cpu-bind=none"]')
    ready_run, nodes = ready_on_most_nodes(run, 2)
    command = step_command(run, ["training.steps=5"], nodes, ready_run.layout, Path("runs/a b"))
    assert command == [
        "srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "--export=ALL",
        "--label", "--cpu-bind=none", sys.executable, "-P", "-m", "launcher", "train", "training.steps=5",
        "hardware.nodes=2", 'run.dir="runs/a b"',
    ]  # fmt: skip


def test_the_srun_command_of_one_launcher_per_node() -> None:
    run = run_of(*NODES, "training.micro_batch_size=1", "slurm.tasks=per_node")
    command = step_command(run, [], 2, ready_on_most_nodes(run, 2)[0].layout, Path("r"))
    assert command[1:5] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=2"]


def test_a_container_runs_its_own_launcher() -> None:
    run = run_of(*NODES, "slurm.container=[apptainer,exec,--nv,image.sif]")
    command = step_command(run, [], 1, ready_on_most_nodes(run, 1)[0].layout, Path("r"))
    assert command[-8:-2] == ["apptainer", "exec", "--nv", "image.sif", "launcher", "train"]


@given(
    st.text(
        st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="$"),
        min_size=1,
        max_size=30,
    )
)
@settings(max_examples=10)
def test_hydra_reads_back_any_directory_name(name: str) -> None:
    sys.argv = ["launcher"]
    [job] = compose_jobs("config", RunConfig, [f"run.dir={hydra_text(name)}"])
    assert job.config.run.dir == name


def test_run_directories_of_jobs_and_array_tasks() -> None:
    run = run_of(*NODES)
    assert run_dir_of(run, Allocation("7", 2)) == Path("runs/slurm-7")
    assert run_dir_of(run, Allocation("9", 2, "7", "3")) == Path("runs/slurm-7/3")
    run.run.dir = "mine"
    assert run_dir_of(run, Allocation("7", 2)) == Path("mine")
    assert run_dir_of(run, Allocation("9", 2, "7", "3")) == Path("mine/3")


def test_outside_a_slurm_job_the_command_is_refused() -> None:
    with pytest.raises(ConfigError, match="must run inside a Slurm job"):
        read_allocation({"SLURM_JOB_ID": "7"})
    assert read_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}) == Allocation("7", 2)


def test_only_one_task_of_an_array_is_requeued() -> None:
    """The last task of an array has the same job number as the whole array."""
    of_array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "2"}
    allocation = read_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", **of_array})
    assert (allocation.id, allocation.name, allocation.restarts) == ("7_1", "slurm-7", 2)
    assert Allocation("7", 2).id == "7"
