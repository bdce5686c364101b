"""sbatch gets the shell's variables that it should, and its output may hold lines of a site's wrapper."""

import pytest

from launcher.config.compose import Job
from launcher.launch import slurm
from launcher.launch.slurm import (
    SlurmError,
    read_batch_script,
    settings_of_job,
    submission_environment,
    submitted_job,
)
from launcher.launch.submission import resource_origins
from tests.config.composing import run_of

SCRIPT = "#!/usr/bin/env bash\n#SBATCH --time=1:00:00\n#SBATCH --gpus-per-node=8\n"
SHELL = {"PATH": "/bin", "WANDB_API_KEY": "k", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "lab"}
OUTER = {
    "SLURM_JOB_ID": "9", "SLURM_CPU_BIND": "quiet", "SLURM_MEM_PER_NODE": "4000", "SLURM_NTASKS": "4",
    "SLURM_TRES_PER_TASK": "cpu=2", "SBATCH_TIMELIMIT": "5", "SBATCH_EXCLUSIVE": "1",
}  # fmt: skip


def test_variables_of_the_outer_job_do_not_reach_the_new_job() -> None:
    assert submission_environment(SHELL | OUTER, SCRIPT) == {
        "PATH": "/bin", "WANDB_API_KEY": "k", "SLURM_CONF": "/etc/slurm.conf",
    }  # fmt: skip


def test_variables_of_a_login_shell_stay_but_do_not_replace_options_of_the_script() -> None:
    login = SHELL | {
        "SBATCH_TIMELIMIT": "5",
        "SBATCH_GPUS_PER_NODE": "1",
        "SBATCH_QOS": "low",
        "SLURM_N": "1",
    }
    assert submission_environment(login, SCRIPT) == SHELL | {"SBATCH_QOS": "low"}


@pytest.mark.parametrize(
    "output",
    [
        "123\n", "123;cluster\n", "Welcome to the cluster\n\n123;a\n",
        "sbatch: note\n123\nbudget: 5000 hours left\n",
        "Submitted batch job 123\n", "2 jobs are queued\n123\n",
        "---- 2026 ----\n  123  \n", "123;west\r\n",
    ],
)  # fmt: skip
def test_the_job_id_is_found_among_lines_of_a_wrapper(output: str) -> None:
    assert submitted_job(output) == "123"


@pytest.mark.parametrize("output", ["", "Welcome\n", "12a\n"])
def test_an_output_without_a_job_id_is_an_error(output: str) -> None:
    with pytest.raises(SlurmError, match="sbatch printed no job id"):
        submitted_job(output)


def test_a_script_is_read_without_lines_of_a_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_run", lambda command: f"Welcome\n{SCRIPT}")
    assert read_batch_script("7") == SCRIPT


def test_a_follow_up_job_has_the_settings_of_the_job_and_not_of_the_script(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = "JobId=7 JobName=a UserId=u(0) QOS=N/A Account=lab TimeLimit=04:00:00 Partition=gpu Nodes=1"
    monkeypatch.setattr(slurm, "_run", lambda command: shown)
    assert settings_of_job("7") == [
        "--time=04:00:00", "--partition=gpu", "--account=lab", "--job-name=a",
    ]  # fmt: skip
    shown = (
        "JobId=7 JobName=my run TimeLimit=1 UserId=u(0) TimeLimit=1:00:00 ExcNodeList=node[1-2] "
        "MinMemoryNode=64000M Features=a100&nvlink Reservation=(null)"
    )
    assert settings_of_job("7") == [
        "--time=1:00:00", "--constraint=a100&nvlink", "--exclude=node[1-2]", "--mem=64000M",
        "--job-name=my run TimeLimit=1",
    ]  # fmt: skip
    for unset in ("0", "62.50G"):
        shown = f"JobId=7 UserId=u(0) MinMemoryNode={unset} Features=(null)"
        assert settings_of_job("7") == []


@pytest.mark.parametrize(
    ("environ", "lines"),
    [
        (
            {},
            ["time     1:00:00 (from my/slurm/lab.yaml)", "partition gpu (from the command line)",
             "account  the default of the cluster"],
        ),
        (
            {"SBATCH_ACCOUNT": "lab", "SBATCH_TIMELIMIT": "5"},
            ["time     1:00:00 (from my/slurm/lab.yaml); not SBATCH_TIMELIMIT=5, which has less precedence",
             "partition gpu (from the command line)", "account  lab (from the variable SBATCH_ACCOUNT)"],
        ),
        (
            {"SBATCH_ACCOUNT": "lab", "SLURM_JOB_ID": "9"},
            ["time     1:00:00 (from my/slurm/lab.yaml)", "partition gpu (from the command line)",
             "account  the default of the cluster; not SBATCH_ACCOUNT=lab, of the job that "
             "this shell runs in"],
        ),
    ],
)  # fmt: skip
def test_a_submission_says_where_its_settings_come_from(environ: dict[str, str], lines: list[str]) -> None:
    run = run_of("slurm.time=1:00:00", "slurm.partition=gpu")
    origins = {"slurm.time": "my/slurm/lab.yaml", "slurm.partition": "the command line"}
    assert resource_origins(Job(run, None, [], origins), environ, SCRIPT) == lines
