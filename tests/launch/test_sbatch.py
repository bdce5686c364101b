"""The batch script: its sbatch options, and that the shell never executes text that a user typed."""

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
from launcher.config.slurm_rules import check_submission, nodes_of, seconds_of
from launcher.launch.sbatch import BatchScript, check_script_arguments, render, slurm_word
from launcher.launch.submission import _make_log_directory, batch_script_of, submission_summary
from tests.config.composing import run_of

CPU = ["hardware=cpu", "hardware.accelerators_per_node=2", "hardware.nodes=2"]
# Stands for Python: prints its arguments and its environment.
RECORDER = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
printable = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)


def batch(*overrides: str, jobs: list[list[str]] | None = None, python: str = "python") -> BatchScript:
    run = run_of(*CPU, *overrides)
    return BatchScript(run, list(overrides), jobs or [list(overrides)], 2, python)


def options(*overrides: str, jobs: int = 1) -> list[str]:
    script = render(batch(*overrides, jobs=[[]] * jobs))
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def executed(
    script: str, folder: Path, *arguments: str, **environment: str
) -> tuple[list[str], dict[str, str]]:
    """Run the script; return the arguments and the environment of the process that it starts."""
    process = subprocess.run(
        ["bash", "-c", script, "job.sbatch", *arguments], cwd=folder, text=True, capture_output=True,
        env={"PATH": os.environ["PATH"], **environment}, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    argv, variables = json.loads(process.stdout)
    return argv, variables


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorder") / "recorder"
    path.write_text(RECORDER)
    path.chmod(0o755)
    return path


@given(overrides=st.lists(printable, max_size=4), value=printable, more=st.lists(printable, max_size=2))
@settings(max_examples=30)
def test_overrides_and_variables_are_passed_unchanged(
    recorder: Path, overrides: list[str], value: str, more: list[str]
) -> None:
    script = batch(jobs=[overrides], python=str(recorder))
    script.run.slurm.environment["CHOSEN"] = value
    argv, variables = executed(render(script), recorder.parent, *more)
    assert argv == ["-P", "-m", "launcher", "job", *overrides, "--", *more]
    assert variables["CHOSEN"] == value
    assert os.listdir(recorder.parent) == ["recorder"]


def test_a_number_of_nodes_that_is_refused_later_is_read() -> None:
    assert nodes_of(run_of("hardware.nodes=-3")) == (-3, -3)


def test_refuses_line_breaks_in_arguments() -> None:
    job = Job(run_of(*CPU), None, [])
    with pytest.raises(ConfigError, match="contains a control character"):
        batch_script_of([job], ["training.steps=1\ntouch x"])


def test_modules_are_loaded_by_name(recorder: Path) -> None:
    script = batch(python=str(recorder))
    script.run.slurm.modules = ["cuda/12.4", "$(touch x)", "a b"]
    module = {"BASH_FUNC_module%%": '() { LOADED=$(printf "%s|" "$@"); export LOADED; }'}
    _, variables = executed(render(script), recorder.parent, **module)
    assert variables["LOADED"] == "load|cuda/12.4|$(touch x)|a b|"
    assert os.listdir(recorder.parent) == ["recorder"]


@pytest.mark.parametrize("task", [0, 1])
def test_array_task_runs_its_overrides(task: int, recorder: Path) -> None:
    script = batch(jobs=[["optimizer.lr=1"], ["optimizer.lr=$(touch x)", "a b"]], python=str(recorder))
    argv, _ = executed(render(script), recorder.parent, "steps=1", SLURM_ARRAY_TASK_ID=str(task))
    assert argv == ["-P", "-m", "launcher", "job", *script.jobs[task], "--", "steps=1"]


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
def test_slurm_word(word: str, written: str) -> None:
    """In tests/slurm, sbatch itself reads such words."""
    assert slurm_word(word) == written


def test_sbatch_options() -> None:
    rendered = options(
        "slurm.partition=gpu", "slurm.account=lab", "slurm.qos=high", "slurm.time=90", "slurm.mem=64G",
        "slurm.cpus_per_task=4", 'slurm.constraint="a100&nvlink"', "slurm.exclude=node7",
        "slurm.reservation=r", 'slurm.sbatch=["--mail-type=END","--comment=a b"]',
    )  # fmt: skip
    assert rendered == [
        "--job-name=launcher", "--partition=gpu", "--account=lab", "--qos=high", "--time=90", "--nodes=2",
        "--ntasks-per-node=2", "--cpus-per-task=4", "--mem=64G", '--constraint="a100&nvlink"',
        "--exclude=node7", "--reservation=r", "--output=slurm-%j.out", "--signal=B:USR1@120", "--requeue",
        "--open-mode=append", "--mail-type=END", '--comment="a b"',
    ]  # fmt: skip


def test_one_task_per_node_gets_one_cpu_per_rank() -> None:
    assert {"--ntasks-per-node=1", "--cpus-per-task=2"} <= set(options("slurm.tasks=per_node"))


def test_node_range_requests_cpus_instead_of_tasks() -> None:
    rendered = options("slurm.nodes=1-2", "slurm.cpus_per_task=3")
    assert {"--nodes=1-2", "--mincpus=6"} <= set(rendered)
    assert not [option for option in rendered if "task" in option]


def test_on_stop_end_disables_requeue() -> None:
    assert "--no-requeue" in options("slurm.on_stop=end")


def test_sweep_is_a_job_array() -> None:
    assert {"--array=0-2", "--output=slurm-%A_%a.out"} <= set(options(jobs=3))
    assert "--array=0-2%2" in options("slurm.max_parallel=2", jobs=3)


def test_gpus_per_node_come_from_the_hardware_config() -> None:
    run = run_of("hardware=h100_80gb", "training.global_batch_size=32")
    assert "--gpus-per-node=8\n" in render(BatchScript(run, [], [[]], 8, "python"))
    run.slurm.gpus_per_node = "h100:8"
    assert "--gpus-per-node=h100:8\n" in render(BatchScript(run, [], [[]], 8, "python"))


def test_refuses_an_array_of_jobs_with_different_resources() -> None:
    jobs = [Job(run_of(*CPU, f"slurm.time={time}"), index, []) for index, time in enumerate((10, 20))]
    with pytest.raises(ConfigError, match="are one Slurm array"):
        batch_script_of(jobs, [])
    with pytest.raises(ConfigError, match="max_parallel needs --multirun"):
        batch_script_of([Job(run_of(*CPU, "slurm.max_parallel=2"), None, [])], [])


def test_submit_fields_are_not_passed_to_the_job() -> None:
    script = batch_script_of([Job(run_of(*CPU), None, ["training.steps=1", "submit.dry_run=true"])], [])
    assert script.jobs == [["training.steps=1"]]


def test_config_directory_is_passed_to_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "slurm").mkdir(parents=True)
    (tmp_path / "mine" / "slurm" / "lab.yaml").write_text("partition: lab\n")
    monkeypatch.chdir(tmp_path)
    [job] = compose_jobs("config", RunConfig, ["--config-dir", "mine", "slurm=lab"])
    assert job.config.slurm.partition == "lab"
    assert job.overrides == [f"--config-dir={tmp_path / 'mine'}", "slurm=lab"]


def test_the_home_directory_in_the_path_of_python_is_found() -> None:
    job = Job(run_of(*CPU, 'slurm.python="~/env/bin/python"'), None, [])
    assert batch_script_of([job], []).python == f"{Path.home()}/env/bin/python"
    job.config.slurm.python = "~nobody-here/bin/python"
    with pytest.raises(ConfigError, match="~nobody-here is not the home directory of a user"):
        batch_script_of([job], [])


def test_submission_summary() -> None:
    run = run_of(*CPU)
    small, large = (Layout(1, data, 1, "cpu", 1, 0) for data in (1, 2))
    assert submission_summary(run, "7", [small]) == [
        "job      7",
        f"layout   {small.describe()}",
        "run      runs/slurm-7",
        "log      slurm-7.out: tail -F slurm-7.out",
        "state    squeue -j 7",
        "cancel   scancel 7 (saves a checkpoint first)",
    ]
    run.run.dir = "mine"
    assert submission_summary(run, "7", [small, large])[:5] == [
        "job      7, an array of 2 tasks",
        f"layout   {small.describe()}",
        f"layout   {large.describe()}",
        "run      mine/0 to /1",
        "log      slurm-7_0.out (one per task): tail -F slurm-7_0.out",
    ]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("0", 0), ("5", 300), ("1:30", 90), ("2:00:01", 7201), ("1-2", 93600), ("1-2:03", 93780),
        ("1-0:0:9", 86409), ("INFINITE", 0), ("unlimited", 0),
    ],
)  # fmt: skip
def test_time_limit_in_seconds(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("slurm.time=12:00:00", "sbatch --time=12:00:00 SCRIPT"),
        ("+slurm.job_name=x", "sbatch --job-name=x SCRIPT"),
        ("hardware.nodes=4", "sbatch --nodes=4 SCRIPT"),
        (
            "slurm.environment.NCCL_DEBUG=INFO",
            "`launcher submit` with this setting",
        ),
        ("slurm=lab", "`launcher submit`"),
        ("submit.dry_run=true", "`launcher submit`"),
    ],
)
def test_refuses_sbatch_settings_after_the_script(typed: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_script_arguments(["training.steps=5", typed])
    assert refused.value.field == typed.strip("+").partition("=")[0]
    assert refused.value.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("3", (3, 3)), ("2-4", (2, 4)), ("1,5,9", (1, 9)), ("1-15:4", (1, 13)), ("1k-2k", (1024, 2048)),
        ("8,2-4", (2, 8)),
    ],
)  # fmt: skip
def test_numbers_of_nodes_in_every_form_of_sbatch(nodes: str, expected: tuple[int, int]) -> None:
    run = run_of(*CPU, f'slurm.nodes="{nodes}"', f"hardware.nodes={expected[1]}")
    assert check_submission(run) == 2
    assert nodes_of(run) == expected
    assert f"--nodes={nodes}" in options(f'slurm.nodes="{nodes}"')


@pytest.mark.parametrize("field", ["time", "mem", "gpus_per_node"])
def test_every_form_of_sbatch_is_accepted(field: str, subtests: pytest.Subtests) -> None:
    forms = {
        "time": ["90", "90:30", "1:30:00", "2-12", "2-12:30", "2-12:30:00", "INFINITE", "unlimited", "0"],
        "mem": ["64000", "2000000K", "2000M", "64G", "1T", "0", "64g"],
        "gpus_per_node": ["8", "h100:8", "h100:4,a100:4"],
    }
    for value in forms[field]:
        with subtests.test(value):
            hardware = ["hardware=h100_80gb", "hardware.nodes=1"]
            check_submission(run_of(*hardware, f'slurm.{field}="{value}"'))
            assert f"--{field.replace('_', '-')}={value}" in render(
                BatchScript(run_of(*hardware, f'slurm.{field}="{value}"'), [], [[]], 8, "python")
            )


def test_accepts_run_settings_after_the_script() -> None:
    check_script_arguments(["slurm.on_stop=end", "slurm.srun=[]", "run.dir=x", "slurmy=1", "hardware=cpu"])


def test_missing_interpreter_is_named(tmp_path: Path) -> None:
    script = render(batch(python=".venv/bin/python"))
    process = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert process.returncode == 2
    assert process.stderr == (
        f"launcher: .venv/bin/python is not an executable file in {tmp_path}: "
        "submit from the directory that contains it\n"
    )


def test_creates_the_directory_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _make_log_directory("logs/of/slurm-%j.out")
    assert (tmp_path / "logs" / "of").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"slurm.output=file/%j: .*/file: (File exists|Not a directory)"):
        _make_log_directory("file/%j")
