"""Decisions of `launcher job`, without Slurm; tests/slurm runs jobs on a real cluster."""

import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.commands.ready import ready, ready_on_most_nodes
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError, hydra_text
from launcher.config.run_format import read_identity
from launcher.config.schema import RunConfig
from launcher.config.world import world_of_nodes
from launcher.launch.rank import STOPPED_EXIT_CODE
from launcher.launch.records import ENDS_VARIABLE, RankEnd, RankEndKind
from launcher.launch.slurm import Allocation, read_allocation
from launcher.runtime import slurm_job
from launcher.runtime.slurm_job import (
    End,
    Outcome,
    SlurmJob,
    outcome,
    run_dir_of,
    run_to_the_end,
    step_command,
)
from tests.config.composing import run_of
from tests.forked_commands import LAUNCHER, environment, heavy
from tests.runtime.command import SMALL, metrics, trained
from tests.runtime.test_life_cycle import FAULTY

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
    run.slurm.container[-1] = "~/image.sif"  # srun starts it without a shell
    command = step_command(run, [], 1, ready_on_most_nodes(run, 1)[0].layout, Path("r"))
    assert command[-5] == f"{Path.home()}/image.sif"


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


@dataclass
class FakeSlurm:
    """Takes the commands of Slurm in a test; `srun` trains on this machine."""

    folder: Path
    programs: list[str] = field(default_factory=list)  # of the first starts of the ranks
    calls: list[list[str]] = field(default_factory=list)  # of scontrol requeue and sbatch
    output: str = ""  # of all starts

    def run_step(self, command: list[str], stops: list[int], ends: Path, *, saves: bool) -> int:
        ends.mkdir(parents=True, exist_ok=True)
        for path in ends.iterdir():
            path.unlink()
        variables = environment(SLURM_JOB_ID=ends.name, **{ENDS_VARIABLE: str(ends)})
        program = self.programs.pop(0) if self.programs else LAUNCHER
        arguments = command[command.index("train") :]
        done = heavy().run(arguments, cwd=self.folder, environment=variables, program=program)
        self.output += done.stdout + done.stderr
        if done.returncode == 128 + signal.SIGUSR1:  # the batch step sends it to the ranks
            stops.append(signal.SIGUSR1)
        return done.returncode

    def submit(self, script: str, arguments: list[str], *, options: list[str]) -> str:
        self.calls.append(arguments)
        return "8"

    def job(self, *overrides: str, number: str = "7", restarts: int = 0) -> SlurmJob:
        small = [*SMALL, "hardware.accelerators_per_node=2", "training.steps=4", *overrides]
        typed = [*small, f"run.dir={self.folder}/r"]
        [composed] = compose_jobs("config", RunConfig, typed)
        ready_run, nodes = ready_on_most_nodes(composed.config, 1)
        allocation = Allocation(number, 1, restarts=restarts)
        return SlurmJob(ready_run.run, ready_run.layout, nodes, allocation, typed, [])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launcher"])
    monkeypatch.setattr(slurm_job, "_run_step", fake.run_step)
    monkeypatch.setattr(slurm_job, "_REQUEUE_TAKES", 0.0)
    monkeypatch.setattr(slurm_job, "job_state", lambda job: "RUNNING")
    monkeypatch.setattr(slurm_job, "requeue", lambda job: fake.calls.append(["requeue", job]))
    monkeypatch.setattr(slurm_job, "read_batch_script", lambda job: "")
    monkeypatch.setattr(slurm_job, "settings_of_job", lambda job: [])
    monkeypatch.setattr(slurm_job, "sbatch", fake.submit)
    return fake


KILLED = FAULTY.format(fault="os.kill(os.getpid(), 9)")
# In step 3 a rank signals the launcher that started it, as srun does, and waits until all ranks know it.
STOPPED = FAULTY.format(fault="os.kill(os.getppid(), 10); __import__('time').sleep(1)")
NONE, SAVES = "checkpoint.resume=none", ["checkpoint.interval_steps=1", "checkpoint.asynchronous=false"]


def test_a_job_that_begins_anew_continues_its_own_run_after_a_failure(slurm: FakeSlurm) -> None:
    slurm.programs.append(KILLED)
    assert run_to_the_end(slurm.job(NONE, *SAVES), []) == 0
    assert "step-00000002, at step 2\n" in slurm.output
    assert [row["step"] for row in metrics(slurm.folder / "r")] == [1, 2, 3, 4]


@pytest.mark.parametrize("resume", [NONE, "checkpoint.resume=a"])
def test_a_requeued_job_continues_its_own_run(resume: str, slurm: FakeSlurm) -> None:
    trained("training.steps=4", "training.stop_at=1", "parallelism.data=2", "run.dir=a", cwd=slurm.folder)
    source = resume.replace("=a", f"={slurm.folder}/a")
    slurm.programs.append(STOPPED)
    assert run_to_the_end(slurm.job(source), []) == STOPPED_EXIT_CODE
    assert slurm.calls == [["requeue", "7"]]
    assert run_to_the_end(slurm.job(source, restarts=1), []) == 0
    assert f"{slurm.folder}/r/checkpoints/step-00000003, at step 3\n" in slurm.output


def test_the_next_job_of_a_chain_continues_the_run(slurm: FakeSlurm) -> None:
    slurm.programs.append(STOPPED)
    job = slurm.job(NONE, "slurm.on_stop=chain")
    assert run_to_the_end(job, []) == 0
    [arguments] = slurm.calls
    [composed] = compose_jobs("config", RunConfig, [*job.typed, *arguments])
    assert composed.config.checkpoint.resume == "auto", "the last value counts"
    following = replace(job, run=composed.config, typed=[*job.typed, *arguments], script_arguments=arguments)
    assert run_to_the_end(replace(following, allocation=Allocation("8", 1)), []) == 0
    assert "step-00000003, at step 3\n" in slurm.output


def test_a_job_that_begins_anew_does_not_continue_a_run_that_it_did_not_begin(slurm: FakeSlurm) -> None:
    """Also if the job is requeued by hand. The refusal names the setting that continues the run."""
    trained("training.steps=4", "training.stop_at=1", "parallelism.data=2", "run.dir=r", cwd=slurm.folder)
    before = read_identity(slurm.folder / "r")
    for restarts in (0, 1):
        assert run_to_the_end(slurm.job(NONE, restarts=restarts), []) != 0
    assert slurm.output.count("already holds a run\n  try: checkpoint.resume=auto (continues the run") >= 2
    assert read_identity(slurm.folder / "r") == before
    assert [row["step"] for row in metrics(slurm.folder / "r")] == [1]


def test_a_stop_in_the_last_step_ends_the_job_as_finished(slurm: FakeSlurm) -> None:
    """A launcher of one task per node exits with the signal's code, although its ranks have finished."""
    slurm.programs.append(STOPPED)
    stops: list[int] = []
    assert run_to_the_end(slurm.job("training.steps=3", "slurm.tasks=per_node"), stops) == 0
    assert stops == [signal.SIGUSR1]
    assert slurm.calls == []


def test_a_run_directory_that_cannot_be_written_is_refused(slurm: FakeSlurm) -> None:
    (slurm.folder / "r").write_text("mine")
    with pytest.raises(ConfigError, match=r"run.dir=\S+/r: cannot be written: Not a directory\n  try: "):
        run_to_the_end(slurm.job(), [])
    assert (slurm.folder / "r").read_text() == "mine"


def test_failures_that_cannot_be_recorded_are_counted(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full: neither the first failure ends the job, nor does it start again for ever."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slurm_job, "record_failed_start", full)
    monkeypatch.setattr(slurm_job, "_run_step", lambda *_, **__: 1)
    assert run_to_the_end(slurm.job(), []) == 1
    said = capsys.readouterr().err
    assert said.count("r/attempts.jsonl cannot be written (No space left on device)") == 3
    assert said.count("and starts again") == 2
    assert "giving up after 3 identical failures" in said
