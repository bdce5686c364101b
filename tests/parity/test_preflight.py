"""`launcher preflight`: kinds, cached passes, and what `launcher submit` does with a verdict.

A small program stands for the Python of the job, and answers as `launcher verify` does. In test_planted.py
the real command runs.
"""

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from launcher.commands import preflight as command
from launcher.commands import submit
from launcher.commands.ready import ReadyRun, ready
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.schema import RunConfig
from launcher.config.world import World, world_of_nodes
from launcher.launch.installed import Installed, NotInstalled, installed_for, installed_here
from launcher.parity import preflight as module
from launcher.parity.kind import kind_of, overrides_of, sections_of
from launcher.parity.preflight import Preflight, Verdict, cache_directory, preflight
from tests.config.composing import run_of

ON_GPUS = ("hardware=h100_80gb", "precision=bf16", "training.global_batch_size=256")
VERSIONS = {"torch": "2.13.0", "deepspeed": "0.19.8", "code": "1"}
# Prints the versions of its file, or "verifies": counts the calls, then does what its file says.
STUB = """#!{python}
import json, os, sys, time
place = {place!r}
if "launcher.launch.installed" in sys.argv:
    print(open(place + "/versions").read())
    sys.exit()
with open(place + "/calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
report = [word for word in sys.argv if word.startswith("verify.report=")][0].partition("=")[2]
exec(open(place + "/behaviour").read())
"""
PASSES = "open(report, 'w').write(json.dumps({'ok': True, 'passes': []}))"
FAILS = """
diagnosis = {'shape': 'every gradient is 1/2 of the right one', 'meaning': 'gradients are scaled by data'}
bad = {'title': 'plain SGD, fp32', 'ok': False, 'diagnosis': diagnosis}
open(report, 'w').write(json.dumps({'ok': False, 'passes': [bad]}))
sys.exit(1)
"""


class Job:
    """The Python of a job: a stub whose answers a test sets."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.python = place / "python"
        self.python.write_text(STUB.format(python=sys.executable, place=str(place)))
        self.python.chmod(0o755)
        self.behaves(PASSES)
        self.has(**VERSIONS)

    def behaves(self, behaviour: str) -> None:
        (self.place / "behaviour").write_text(behaviour)

    def has(self, **versions: str) -> None:
        (self.place / "versions").write_text(json.dumps(versions))

    @property
    def calls(self) -> list[list[str]]:
        path = self.place / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, *overrides: str) -> ReadyRun:
        run = run_of(*ON_GPUS, *overrides, f"slurm.python={self.python}")
        return ready(run, world_of_nodes(run, run.hardware.nodes), needs_data=False, must_fit=False)

    def verdict(self, *overrides: str) -> Preflight:
        ready_run = self.run(*overrides)
        return preflight(ready_run.run, ready_run.layout)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "job").mkdir()
    return Job(tmp_path / "job")


def entries() -> list[Path]:
    return sorted(cache_directory().glob("*.json"))


def kind(*overrides: str) -> RunConfig:
    run = run_of(*ON_GPUS, *overrides)
    ready_run = ready(run, world_of_nodes(run, run.hardware.nodes), needs_data=False, must_fit=False)
    return kind_of(ready_run.run, ready_run.layout)


def test_runs_of_one_kind_differ_in_sizes_and_numbers_only() -> None:
    usual = sections_of(kind("model=llama3_8b", "parallelism=zero1"))
    for same in (
        ("model=llama3_70b", "parallelism=zero1", "hardware.nodes=4"),
        ("model=llama3_8b", "parallelism=zero1", "optimizer.lr=1e-5", "training.steps=7", "training.seed=3"),
        ("model=llama3_8b", "parallelism=zero1", "training.validation_interval=3", "model.num_layers=8"),
    ):
        assert sections_of(kind(*same)) == usual, same


def test_other_code_is_another_kind() -> None:
    choices = [
        [], ["parallelism=zero2"], ["parallelism=zero3"], ["parallelism=zero3_offload"],
        ["parallelism=tp2"], ["parallelism=tp2", "parallelism.sequence_parallel=true"],
        ["parallelism=pp2"], ["parallelism=pp2", "parallelism.pipeline_schedule=dualpipev"],
        ["precision=fp32"], ["precision=bf16_states"], ["training.compile=true"], ["model=gpt2_small"],
        ["parallelism.activation_checkpointing=full"], ["finetune.lora.rank=8"], ["optimizer=sgd"],
        ["optimizer.gradient_clipping=null"], ["model.dropout=0.2"], ["data.document_attention=true"],
        ["training.global_batch_size=32"], ["deepspeed.zero_optimization.overlap_comm=false"],
    ]  # fmt: skip
    kinds = {json.dumps(sections_of(kind("model=llama3_8b", *choice)), sort_keys=True) for choice in choices}
    assert len(kinds) == len(choices)


@pytest.mark.slow
def test_overrides_compose_the_kind_again(subtests: pytest.Subtests) -> None:
    for choice in (
        ("experiment=llama3_70b_3d",), ("experiment=llama3_8b_zero3_offload",),
        ("experiment=qwen3_8b_lora", "data=stdlib"),
        ("experiment=finetune_chat", "precision=bf16_states", "parallelism.data=null"),
        ("experiment=digits_dp", "precision=fp32", "parallelism.data=null"),
        ("model=gemma2_2b", "parallelism=pp2"),
        ("model=mixtral_8x7b",),
    ):  # fmt: skip
        with subtests.test(str(choice)):
            one = kind(*choice)
            [composed] = compose_jobs("config", RunConfig, overrides_of(one))
            assert sections_of(composed.config) == sections_of(one)
            p = one.parallelism
            assert p.data
            world = World("cpu", 8, 8)
            assert ready(composed.config, world, needs_data=False, must_fit=False).layout.data == p.data
            assert max(p.pipeline, p.data, p.tensor) <= 2


def test_a_success_is_recorded_once_for_a_kind_and_its_versions(job: Job) -> None:
    assert job.verdict().verdict is Verdict.passed
    assert job.verdict("optimizer.lr=1e-5", "hardware.nodes=2").verdict is Verdict.passed
    assert len(job.calls) == 1
    assert job.verdict("parallelism=zero2").verdict is Verdict.passed
    assert len(job.calls) == 2
    for changed in ({"torch": "2.14.0"}, {"deepspeed": "0.19.9"}, {"code": "2"}):
        job.has(**VERSIONS | changed)
        assert job.verdict().verdict is Verdict.passed
    assert len(job.calls) == 5


def test_the_check_is_verify_of_the_kind(job: Job) -> None:
    ready_run = job.run("parallelism=zero2")
    preflight(ready_run.run, ready_run.layout)
    [words] = job.calls
    assert words[:4] == ["-P", "-m", "launcher", "verify"]
    assert words[4:-1] == overrides_of(kind_of(ready_run.run, ready_run.layout))


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b'{"when": "now"}', b"\xff" * 99, b"[" * 99999]
)
def test_a_damaged_record_is_made_again(job: Job, damage: bytes) -> None:
    job.verdict()
    [entry] = entries()
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    assert job.verdict().verdict is Verdict.passed
    assert len(job.calls) == 2
    assert json.loads(entry.read_bytes()).keys() == json.loads(whole).keys()


def test_a_record_of_another_kind_does_not_count(job: Job) -> None:
    job.verdict()
    [entry] = entries()
    job.verdict("parallelism=zero2")
    [other] = {*entries()} - {entry}
    entry.write_bytes(other.read_bytes())
    job.verdict()
    assert len(job.calls) == 3


def test_a_failure_is_not_recorded(job: Job) -> None:
    job.behaves(FAILS)
    failed = job.verdict()
    assert failed.verdict is Verdict.failed
    assert "every gradient is 1/2 of the right one; usual cause: gradients are scaled by data" in failed.why
    assert entries() == []
    job.behaves(PASSES)
    assert job.verdict().verdict is Verdict.passed


def test_two_submissions_at_once_check_once(job: Job) -> None:
    job.behaves(f"time.sleep(1); {PASSES}")
    verdicts: list[Verdict] = []
    threads = [threading.Thread(target=lambda: verdicts.append(job.verdict().verdict)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [Verdict.passed] * 3
    assert len(job.calls) == 1


def test_without_a_cache_directory_the_check_is_made_each_time(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/none")
    assert [job.verdict().verdict for _ in range(2)] == [Verdict.passed] * 2
    assert len(job.calls) == 2


@pytest.mark.parametrize(
    ("behaviour", "verdict", "words"),
    [
        ("os.kill(os.getpid(), 9)", Verdict.unknown, "ended by SIGKILL, perhaps because"),
        ("sys.exit('launcher: x=1: refused')", Verdict.failed, "x=1: refused"),
        (
            "print('launcher: training.compile=true: no compiler'); sys.exit(2)",
            Verdict.unknown,
            "no compiler",
        ),
        ("raise ImportError('cannot import name Engine')", Verdict.failed, "cannot import name Engine"),
        ("import no_such_package", Verdict.unknown, "No module named"),
        ("raise OSError('libcudart.so: cannot open shared object file')", Verdict.unknown, "libcudart.so"),
        ("time.sleep(60)", Verdict.failed, "does not end within 1 s"),
        ("pass", Verdict.failed, "without a message"),
    ],
)
def test_every_end_of_the_check_has_a_message(
    job: Job, monkeypatch: pytest.MonkeyPatch, behaviour: str, verdict: Verdict, words: str
) -> None:
    if "sleep" in behaviour:
        monkeypatch.setattr(module, "LIMIT", 1.0)
    job.behaves(behaviour)
    result = job.verdict()
    assert (result.verdict, words in result.why) == (verdict, True), result.why
    assert "\n" not in result.why
    assert entries() == []


def test_a_machine_that_cannot_run_the_check_gives_no_verdict(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_container = job.verdict("slurm.container=[apptainer]")
    assert in_container.verdict is Verdict.unknown
    assert "slurm.container" in in_container.why
    monkeypatch.setattr(module, "_MEGABYTES_OF_A_RANK", 10**9)
    assert "MB of memory are free" in job.verdict().why
    job.python.unlink()
    missing = job.verdict()
    assert missing.verdict is Verdict.unknown
    assert "cannot be started here" in missing.why
    assert job.calls == []


def test_the_ranks_of_every_axis_need_memory(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MEGABYTES_OF_A_RANK", 10**9)
    four = [f"parallelism.{axis}=2" for axis in ("context", "tensor", "pipeline")]  # with the data axis
    for overrides, ranks in (["parallelism.context=2"], 4), (["parallelism.tensor=2"], 4), (four, 8):
        assert job.verdict(*overrides).why.startswith(f"{ranks} small ranks need ")


def test_a_missing_package_has_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.launch.installed.find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match="the package torch is not installed here"):
        installed_here()


def test_installed_code_is_identified() -> None:
    here = installed_here()
    assert here == installed_for(sys.executable)
    assert here.torch.split(".")[0].isdecimal()
    assert str(here) == f"torch {here.torch} and deepspeed {here.deepspeed}"


def submitted(job: Job, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[str]:
    """Call the command; return the scripts that sbatch would get."""
    scripts: list[str] = []

    def sbatch(script: str) -> str:
        scripts.append(script)
        return "7"

    monkeypatch.setattr("launcher.launch.submission.sbatch", sbatch)
    monkeypatch.setattr("launcher.launch.submission.shutil.which", lambda name: name)
    monkeypatch.chdir(job.place)
    submit.main([*ON_GPUS, f"slurm.python={job.python}", *overrides])
    return scripts


def test_submit_refuses_a_failure(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.behaves(FAILS)
    with pytest.raises(ConfigError) as refused:
        submitted(job, monkeypatch)
    text = str(refused.value)
    assert text.startswith("submit.preflight=true: with torch 2.13.0 and deepspeed 0.19.8 the preflight")
    assert "every gradient is 1/2" in text
    assert "submit.preflight=false" in text.partition("try: ")[2]
    assert "#SBATCH" not in capsys.readouterr().out
    assert len(submitted(job, monkeypatch, "submit.preflight=false")) == 1
    assert len(job.calls) == 1


def test_submit_continues_after_a_success_and_if_no_check_is_possible(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(submitted(job, monkeypatch)) == 1
    assert "preflight  passed with torch 2.13.0 and deepspeed 0.19.8: checked on " in capsys.readouterr().err
    assert len(submitted(job, monkeypatch, "slurm.container=[apptainer]")) == 1
    assert "preflight  not made: the job runs in a container" in capsys.readouterr().err
    assert len(job.calls) == 1


def test_submit_checks_each_kind_of_a_sweep_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(job, monkeypatch, "--multirun", "optimizer.lr=1e-4,1e-3", "parallelism.zero_stage=1,2")
    assert len(job.calls) == 2


def test_a_dry_run_and_a_refused_job_run_no_preflight(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.behaves(FAILS)
    assert submitted(job, monkeypatch, "submit.dry_run=true") == []
    with pytest.raises(ConfigError, match=r"slurm\.output"):
        submitted(job, monkeypatch, "slurm.output=/dev/null/x/%j.out")
    assert job.calls == []


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [(PASSES, 0, "preflight  passed with"), (FAILS, 1, "repeat   launcher verify ")],
)
def test_the_preflight_command(
    job: Job, capsys: pytest.CaptureFixture[str], behaviour: str, code: int, words: str
) -> None:
    job.behaves(behaviour)
    assert command.main([*ON_GPUS, f"slurm.python={job.python}"]) == code
    assert words in capsys.readouterr().out


def test_the_command_is_refused_where_no_check_is_possible(job: Job) -> None:
    job.behaves("os.kill(os.getpid(), 9)")
    with pytest.raises(ConfigError, match="preflight: not possible on this machine"):
        command.main([*ON_GPUS, f"slurm.python={job.python}"])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    assert "launcher preflight [OVERRIDES]" in capsys.readouterr().out


def test_variables_of_ranks_do_not_reach_the_check(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "1")
    job.behaves(f"open(place + '/seen', 'w').write(' '.join(os.environ)); {PASSES}")
    job.verdict()
    seen = set((job.place / "seen").read_text().split())
    assert not seen & {"RANK", "WORLD_SIZE", "SLURM_JOB_ID"}
    assert "PATH" in seen or "PATH" not in os.environ


def test_versions_in_words() -> None:
    assert str(Installed("2.6", "0.19.8", "")) == "torch 2.6 and deepspeed 0.19.8"
