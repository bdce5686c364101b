"""The batch script: what each recipe asks for, and that nothing a user types is run by the shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.compose import Job, compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.slurm_rules import seconds_of
from launcher.launch.sbatch import Batch, check_after_a_script, render, slurm_word
from launcher.launch.submit import _make_room_for, batch_of, told
from tests.config.composing import run_of

CPU = ["hardware=cpu", "hardware.accelerators_per_node=2", "hardware.nodes=2"]
# In place of Python: prints what it is given, and the environment.
RECORDER = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
printable = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)


def batch(*overrides: str, jobs: list[list[str]] | None = None, python: str = "python") -> Batch:
    run = run_of(*CPU, *overrides)
    return Batch(run, list(overrides), jobs or [list(overrides)], 2, python)


def options(*overrides: str, jobs: int = 1) -> list[str]:
    script = render(batch(*overrides, jobs=[[]] * jobs))
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def executed(
    script: str, folder: Path, *arguments: str, **environment: str
) -> tuple[list[str], dict[str, str]]:
    """What the script starts: its arguments and its environment."""
    done = subprocess.run(
        ["bash", "-c", script, "job.sbatch", *arguments], cwd=folder, text=True, capture_output=True,
        env={"PATH": os.environ["PATH"], **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    argv, surroundings = json.loads(done.stdout)
    return argv, surroundings


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorder") / "recorder"
    path.write_text(RECORDER)
    path.chmod(0o755)
    return path


@given(overrides=st.lists(printable, max_size=4), value=printable, more=st.lists(printable, max_size=2))
@settings(max_examples=30)
def test_overrides_and_variables_arrive_as_they_were_typed(
    recorder: Path, overrides: list[str], value: str, more: list[str]
) -> None:
    made = batch(jobs=[overrides], python=str(recorder))
    made.run.slurm.environment["CHOSEN"] = value
    argv, surroundings = executed(render(made), recorder.parent, *more)
    assert argv == ["-m", "launcher", "job", *overrides, "--", *more]
    assert surroundings["CHOSEN"] == value
    assert os.listdir(recorder.parent) == ["recorder"]


def test_a_comment_cannot_end_early() -> None:
    job = Job(run_of(*CPU), None, [])
    with pytest.raises(ConfigError, match="holds a control character"):
        batch_of([job], ["training.steps=1\ntouch x"])


def test_modules_are_loaded_by_their_names(recorder: Path) -> None:
    made = batch(python=str(recorder))
    made.run.slurm.modules = ["cuda/12.4", "$(touch x)", "a b"]
    module = {"BASH_FUNC_module%%": '() { LOADED=$(printf "%s|" "$@"); export LOADED; }'}
    _, surroundings = executed(render(made), recorder.parent, **module)
    assert surroundings["LOADED"] == "load|cuda/12.4|$(touch x)|a b|"
    assert os.listdir(recorder.parent) == ["recorder"]


@pytest.mark.parametrize("task", [0, 1])
def test_a_task_of_an_array_runs_its_own(task: int, recorder: Path) -> None:
    made = batch(jobs=[["optimizer.lr=1"], ["optimizer.lr=$(touch x)", "a b"]], python=str(recorder))
    argv, _ = executed(render(made), recorder.parent, "steps=1", SLURM_ARRAY_TASK_ID=str(task))
    assert argv == ["-m", "launcher", "job", *made.jobs[task], "--", "steps=1"]


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("gpu", "gpu"),
        ("24:00:00", "24:00:00"),
        ("a b", '"a b"'),
        ('say "hi"', r'"say \"hi\""'),
        ("back\\slash", r'"back\\slash"'),
        ("$(touch x)", '"$(touch x)"'),
        ("# a", '"# a"'),
        ("it's", '"it\'s"'),
    ],
)
def test_a_word_of_slurms(word: str, written: str) -> None:
    """tests/slurm has sbatch itself read such words."""
    assert slurm_word(word) == written


def test_what_is_asked_for() -> None:
    found = options(
        "slurm.partition=gpu", "slurm.account=lab", "slurm.qos=high", "slurm.time=90", "slurm.mem=64G",
        "slurm.cpus_per_task=4", 'slurm.constraint="a100&nvlink"', "slurm.exclude=node7",
        "slurm.reservation=r", 'slurm.sbatch=["--mail-type=END","--comment=a b"]',
    )  # fmt: skip
    assert found == [
        "--job-name=launcher", "--partition=gpu", "--account=lab", "--qos=high", "--time=90", "--nodes=2",
        "--ntasks-per-node=2", "--cpus-per-task=4", "--mem=64G", '--constraint="a100&nvlink"',
        "--exclude=node7", "--reservation=r", "--output=slurm-%j.out", "--signal=B:USR1@120", "--requeue",
        "--open-mode=append", "--mail-type=END", '--comment="a b"',
    ]  # fmt: skip


def test_one_task_per_node_gets_a_cpu_for_each_of_its_ranks() -> None:
    assert {"--ntasks-per-node=1", "--cpus-per-task=2"} <= set(options("slurm.tasks=per_node"))


def test_a_range_of_nodes_asks_for_cpus_instead_of_tasks() -> None:
    found = options("slurm.nodes=1-2", "slurm.cpus_per_task=3")
    assert {"--nodes=1-2", "--mincpus=6"} <= set(found)
    assert not [option for option in found if "task" in option]


def test_what_is_not_to_go_on_is_not_requeued() -> None:
    assert "--no-requeue" in options("slurm.on_stop=end")


def test_a_sweep_is_an_array() -> None:
    assert {"--array=0-2", "--output=slurm-%A_%a.out"} <= set(options(jobs=3))
    assert "--array=0-2%2" in options("slurm.max_parallel=2", jobs=3)


def test_gpus_are_those_of_the_hardware() -> None:
    run = run_of("hardware=h100_80gb", "training.global_batch_size=32")
    assert "--gpus-per-node=8\n" in render(Batch(run, [], [[]], 8, "python"))
    run.slurm.gpus_per_node = "h100:8"
    assert "--gpus-per-node=h100:8\n" in render(Batch(run, [], [[]], 8, "python"))


def test_jobs_of_one_array_ask_for_the_same() -> None:
    jobs = [Job(run_of(*CPU, f"slurm.time={time}"), index, []) for index, time in enumerate((10, 20))]
    with pytest.raises(ConfigError, match="are one array"):
        batch_of(jobs, [])
    with pytest.raises(ConfigError, match="is of a --multirun's jobs, and this is one job"):
        batch_of([Job(run_of(*CPU, "slurm.max_parallel=2"), None, [])], [])


def test_what_is_only_for_submitting_does_not_reach_the_job() -> None:
    made = batch_of([Job(run_of(*CPU), None, ["training.steps=1", "submit.dry_run=true"])], [])
    assert made.jobs == [["training.steps=1"]]


def test_a_config_directory_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "slurm").mkdir(parents=True)
    (tmp_path / "mine" / "slurm" / "lab.yaml").write_text("partition: lab\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launcher"])
    [job] = compose_jobs("config", RunConfig, ["--config-dir", "mine", "slurm=lab"])
    assert job.config.slurm.partition == "lab"
    assert job.overrides == [f"--config-dir={tmp_path / 'mine'}", "slurm=lab"]


def test_what_a_user_is_told() -> None:
    run = run_of(*CPU)
    one, other = (Layout(1, data, 1, "cpu", 1, 0) for data in (1, 2))
    assert told(run, "7", [one]) == [
        "job      7",
        f"layout   {one.describe()}",
        "run      runs/slurm-7",
        "log      slurm-7.out: tail -F slurm-7.out",
        "state    squeue -j 7",
        "cancel   scancel 7, which saves the run first",
    ]
    run.run.dir = "mine"
    assert told(run, "7", [one, other])[:5] == [
        "job      7, an array of 2",
        f"layout   {one.describe()}",
        f"layout   {other.describe()}",
        "run      mine/0 to /1",
        "log      slurm-7_0.out and so on: tail -F slurm-7_0.out",
    ]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("0", 0), ("5", 300), ("1:30", 90), ("2:00:01", 7201), ("1-2", 93600), ("1-2:03", 93780),
        ("1-0:0:9", 86409),
    ],
)  # fmt: skip
def test_a_time_limit_in_seconds(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("slurm.time=12:00:00", "before the script's name: sbatch --time=12:00:00 SCRIPT"),
        ("+slurm.job_name=x", "before the script's name: sbatch --job-name=x SCRIPT"),
        ("hardware.nodes=4", "before the script's name: sbatch --nodes=4 SCRIPT"),
        (
            "slurm.environment.NCCL_DEBUG=INFO",
            "`launcher submit`, with the command in",
        ),
        ("slurm=lab", "`launcher submit`"),
        ("submit.dry_run=true", "`launcher submit`"),
    ],
)
def test_what_sbatch_has_read_already_is_refused_after_the_script(typed: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_after_a_script(["training.steps=5", typed])
    assert refused.value.field == typed.strip("+").partition("=")[0]
    assert refused.value.remedy.startswith(remedy)


def test_what_is_read_when_the_job_runs_may_come_after_the_script() -> None:
    check_after_a_script(["slurm.on_stop=end", "slurm.srun=[]", "run.dir=x", "slurmy=1", "hardware=cpu"])


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    script = render(batch(python=".venv/bin/python"))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 2
    expected = f"launcher: no .venv/bin/python in {tmp_path}: submit from where it is\n"
    assert done.stderr == expected


def test_the_directory_of_the_log_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _make_room_for("logs/of/slurm-%j.out")
    assert (tmp_path / "logs" / "of").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"slurm.output=file/%j: .*/file: (File exists|Not a directory)"):
        _make_room_for("file/%j")
