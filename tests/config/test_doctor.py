"""`launcher doctor` reports whatever is broken, in seconds, and never with a traceback."""

import resource
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import pytest

from launcher.commands import doctor
from launcher.launch import machine_checks
from launcher.launch.machine_checks import Finding, findings_of
from tests.forked_commands import environment

GOOD = {
    "torch": {"version": "2", "cuda": "13.0", "nccl": "2.29.0", "gloo": True, "gpus": [
        {"name": "H100", "free": 79e9, "total": 80e9}, {"name": "H100", "free": 79e9, "total": 80e9},
    ]},
    "deepspeed": {"version": "0.19.8", "accelerator": "cuda"},
}  # fmt: skip
IMPORTED = dict.fromkeys(doctor._MODULES, "")


def run_doctor(cwd: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "launcher", "doctor", *arguments],
        cwd=cwd, env=environment(**extra), text=True, capture_output=True, timeout=120,
    )  # fmt: skip


def broken(folder: Path, *modules: str) -> str:
    """Write modules that cannot be imported; return PYTHONPATH."""
    for module in modules:
        (folder / module).mkdir(parents=True)
        (folder / module / "__init__.py").write_text("raise OSError('libbroken.so.1: not found')\n")
    return str(folder)


def test_a_healthy_machine_has_no_problem(tmp_path: Path) -> None:
    begin = time.monotonic()
    ended = run_doctor(tmp_path, HOME=str(tmp_path), WANDB_MODE="offline")
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    names = [line.split("  ")[0] for line in ended.stdout.partition("\n\n")[0].splitlines()]
    wanted = "launcher python torch deepspeed hydra-core wandb safetensors CUDA DeepSpeed free".split()
    assert set(wanted) <= {name.split()[0] for name in names}
    assert "problem" in ended.stdout.splitlines()[-1]
    assert time.monotonic() - begin < 60


def test_broken_packages_are_named_even_those_that_the_command_line_needs(tmp_path: Path) -> None:
    path = broken(tmp_path / "broken", "omegaconf", "torch", "rich")
    ended = run_doctor(tmp_path, PYTHONPATH=path)
    assert (ended.returncode, ended.stderr) == (1, ""), ended.stdout
    for package in ("omegaconf", "torch", "rich"):
        assert (
            f"problem: {package} cannot be used: OSError: libbroken.so.1: not found\n  try: pip "
            in ended.stdout
        )
    assert "free memory" in ended.stdout, "the rest is reported, too"
    command = [sys.executable, "-P", "-m", "launcher", "training.steps=1"]
    other = subprocess.run(command, env=environment(PYTHONPATH=path), text=True, capture_output=True)
    assert other.returncode == 1
    assert other.stderr.startswith(
        "launcher: cannot start: OSError: libbroken.so.1: not found\n  try: launcher doctor"
    )


def test_the_home_directory_in_run_dir_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor._run_dir(["run.dir=~/runs"]) == tmp_path / "runs"
    assert doctor._run_dir([]) == Path("runs")


def test_no_home_no_name_and_no_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    whys = [finding.why for finding in machine_checks.user()]
    assert f"the home directory {tmp_path / 'home'} does not exist" in whys[0]
    assert "has no name" in whys[1]
    monkeypatch.delenv("HOME")
    assert "the home directory unknown" in machine_checks.user()[0].why

    def no_directory() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", no_directory)
    assert machine_checks.disks(tmp_path / "runs")[-1].is_fatal


def test_directories_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    by_name = {finding.name: finding for finding in machine_checks.disks(tmp_path / "file" / "runs")}
    assert by_name["run.dir"].why == f"{tmp_path / 'file'} is not a directory"
    assert by_name["run.dir"].is_fatal
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**10, 10**10, 10**6))
    full = {finding.name: finding for finding in machine_checks.disks(tmp_path)}
    assert [full[name].is_fatal for name in ("directory", "run.dir", "TMPDIR")] == [False, True, True]
    assert "only 1.00 MB are free" in full["TMPDIR"].why
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**7, 0, 10**7))
    assert "NCCL needs it" in machine_checks.shared_memory(tmp_path)[0].why


@pytest.mark.slow
def test_a_deleted_working_directory(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; {sys.executable} -P -m launcher doctor"
    path = broken(tmp_path / "broken", "torch", "deepspeed")  # the report comes without waiting for them
    ended = subprocess.run(
        ["sh", "-c", command], cwd=gone, env=environment(PYTHONPATH=path), text=True, capture_output=True
    )
    assert "Traceback" not in ended.stderr
    assert (ended.returncode, "the working directory was deleted" in ended.stdout) == (1, True)


def test_what_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests) -> None:
    monkeypatch.setattr(doctor, "existing_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [finding for finding in doctor.devices(GOOD) if finding.why] == []
    busy = [{"name": "H100", "free": 9e9, "total": 80e9}] * 2
    for change, words, is_fatal in (
        ({"gpus": []}, "torch can use 0 of 2 GPUs: see nvidia-smi", True),
        ({"gpus": [], "cuda": None}, "torch can use 0 of 2 GPUs: it is built for CPUs only", True),
        ({"gpus": [], "cuda_error": "the driver is too old"}, "0 of 2 GPUs: the driver is too old", True),
        ({"nccl": None}, "torch has no NCCL", True),
        ({"gloo": False}, "torch has no gloo", True),
        ({"gpus": busy}, "GPU 0 is used by other programs: 9.00 GB of 80.00 GB", False),
    ):
        with subtests.test(words):
            problems = [f for f in doctor.devices({**GOOD, "torch": {**GOOD["torch"], **change}}) if f.why]
            assert words in problems[0].why
            assert problems[0].is_fatal == is_fatal
            assert problems[0].remedy


def test_an_import_that_crashes_is_named_and_the_untried_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    answered = dict(list(IMPORTED.items())[:2])
    problems = [finding for finding in doctor.versions(answered, GOOD) if finding.why]
    assert [finding.name for finding in problems] == ["wandb"]
    assert doctor.print_findings(problems) == 1
    assert "wandb cannot be used: its import crashes" in capsys.readouterr().out


def test_a_check_that_fails_is_a_finding() -> None:
    def fails() -> list[Finding]:
        raise RuntimeError("a\nb")

    [finding] = findings_of("disks", fails)
    assert finding.why == "disks cannot be checked: RuntimeError: a b"


def test_cores_and_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine_checks.core_quota(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine_checks.core_quota(tmp_path) is None
    monkeypatch.setattr(machine_checks, "core_quota", lambda: 0.5)
    assert "OMP_NUM_THREADS=1" in machine_checks.cores()[0].remedy
    cgroup = tmp_path / "sys" / "fs" / "cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("1000\n")
    (cgroup / "memory.current").write_text("400\n")
    assert machine_checks.free_memory(tmp_path) == 600
    monkeypatch.setattr(machine_checks, "free_memory", lambda: 600)
    assert "ranks may be killed" in machine_checks.memory()[0].why
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    assert "a process may open 512 files" in machine_checks.open_files()[0].why


def test_wandb_without_a_server_takes_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    for name in ("NETRC", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://user:secret@127.0.0.1:9")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password abcdef\n")
    begin = time.monotonic()
    [finding] = machine_checks.wandb()
    assert time.monotonic() - begin < 4
    assert "127.0.0.1 does not answer" in finding.why
    assert "secret" not in f"{finding.value}{finding.why}{finding.remedy}"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert machine_checks.wandb()[0].why == ""
    monkeypatch.setenv("WANDB_MODE", "online")
    (tmp_path / ".netrc").unlink()
    assert "W&B has no key" in machine_checks.wandb()[0].why


def test_slurm_is_found_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert machine_checks.slurm()[0].why == ""
    (tmp_path / "sbatch").touch(mode=0o755)
    assert "srun, scontrol cannot be found" in machine_checks.slurm()[0].why
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert "inside job 42" in machine_checks.slurm()[0].value
