"""The command line in separate processes: messages of wrong commands, and the modules that it imports."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from launcher import command_line
from launcher.commands import train
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.fields import config_directory, options_of
from launcher.config.schema import RunConfig
from tests.forked_commands import environment, light

# No GPU is visible: a refusal must not depend on the machine.
ENVIRONMENT = environment(CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(config_directory().parent))


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    heavy: list[str]  # of torch, deepspeed and wandb, those that were imported


def launcher(cwd: Path, *commands: list[str], **extra: str) -> list[Ended]:
    """Run each command to its end, two at a time."""

    def ended(arguments: list[str]) -> Ended:
        command = light().start(arguments, cwd=cwd, environment=ENVIRONMENT | extra)
        out, error = command.communicate()
        return Ended(command.wait(), out, error, command.heavy)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(ended, commands))


def torchrun(rank: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
    }  # fmt: skip


# What is typed -> how the message starts, after `launcher: `.
WRONG = {
    "parallelism.tensr=2": "parallelism.tensr=2: no such field",
    "parallelism.tensor=3": "parallelism.tensor=3: 4 attention heads cannot be split 3 ways",
    "parallelism.tensor=two": "parallelism.tensor=two: must be a whole number",
    "parallelism.tensor=0": "parallelism.tensor=0: must be at least 1",
    "parallelism.tensor": "parallelism.tensor: a setting needs a name, = and a value",
    "parallelism.tensor=2,4": "parallelism.tensor=2,4: a comma separates several values",
    "train parallelism.tensor=3": "parallelism.tensor=3: 4 attention heads cannot be split 3 ways",
    "verify parallelism.tensor=3": "parallelism.tensor=3: 4 attention heads cannot be split 3 ways",
    "model=llama_tiny parallelism.tensor=4": "parallelism.tensor=4: 2 KV heads cannot be split 4 ways",
    "parallelism.pipeline=5": "parallelism.pipeline=5: 4 layers cannot fill 5 stages",
    "parallelism=pp2 parallelism.zero_stage=2": "parallelism.zero_stage=2: with parallelism.pipeline=2,",
    "parallelism.zero_stage=4": "parallelism.zero_stage=4: the stages are 0 to 3",
    "parallelism.sequence_parallel=true": "parallelism.sequence_parallel=true: sequence parallelism needs",
    "parallelism.offload_optimizer=true": "parallelism.offload_optimizer=true: ZeRO-0 has no partitioned",
    "parallelism=zero2 parallelism.offload_parameters=true": "parallelism.offload_parameters=true: only",
    "parallelism.data=3": "training.global_batch_size=16: not a multiple of 12",
    "modle=gpt2_small": "modle=gpt2_small: no such field",
    "model=gpt3": "model=gpt3: no such option",
    "model.num_heads=5": "model.num_heads=5: does not divide model.hidden_size=128",
    "model.foo=1": "model.foo=1: no such field",
    "+model.foo=1": "model.foo=1: no such field",
    "++foo=1": "foo=1: no such field",
    "~model": "~model: the group model cannot be removed",
    "~training.seed": "~training.seed: a field can be set, not removed",
    "experiment=none_such": "experiment=none_such: no such option",
    "training.steps=1.5": "training.steps=1.5: must be a whole number",
    "training.micro_batch_size=3": "training.global_batch_size=16: not a multiple of 3",
    "training.stop_at=300": "training.stop_at=300: must be at most training.steps=200",
    "optimizer.lr=inf": "optimizer.lr=inf: must be a finite number above 0",
    "optimizer.momentum=0.9": "optimizer.momentum=0.9: not a setting of adamw",
    "scheduler=wsd training.steps=20": "scheduler.decay_steps=40: 20 warm-up steps + 40 decay",
    "precision=fp16": "precision.dtype=fp16: DeepSpeed trains fp16 on GPUs only",
    "precision.dtype=FP32": "precision.dtype=FP32: must be one of fp32 | bf16 | fp16",
    "model.rope_scaling.kind=dynamic": "model.rope_scaling.kind=dynamic: must be one of none | linear",
    "hardware=h100_80gb": "hardware.device=cuda: this machine has no GPU",
    "hardware.nodes=2": "hardware.nodes=2: `launcher` starts ranks on this machine only",
    "data=text": "data.train=null: data=text needs files to train on",
    "data=text data.train=none/*.txt": "data.train=none/*.txt: the glob matches no file",
    "data=text data.train=blank.txt": "data.train=blank.txt: every matched file is empty",
    "data=text data.train=short.txt": "data.sequence_length=128: the validation part of the corpus has",
    "data.train=short.txt": "data.train=short.txt: data=stdlib does not use data.train",
    "deepspeed.zero_optimization.overlap_com=true": "deepspeed.zero_optimization.overlap_com=true: unknown",
    "deepspeed.train_batch_size=8": "deepspeed.train_batch_size=8: the launcher sets this key itself",
    "deepspeed.bf16=on": "deepspeed.bf16=on: this key is a section, which has no value itself",
    "logging.wandb.mode=sometimes": "logging.wandb.mode=sometimes: must be one of auto | online | offline",
    "run.dir=${oc.env:NONE_SUCH}": "run.dir=${oc.env:NONE_SUCH}: Environment variable 'NONE_SUCH' not found",
    "run.dir=(a)": "run.dir=(a): this text must be quoted",
    "--multirun optimizer.lr=1e-3,fast": "optimizer.lr=fast: must be a number",
    "--multirun optimizer.lr=1e-3,-1": "optimizer.lr=-1.0: must be a finite number above 0",
    "parallelism.tensor=1,3 -m": "parallelism.tensor=3: 4 attention heads cannot be split 3 ways",
    "--config-dir none_such": "--config-dir=",
    "--nonsense": "command line: unrecognized arguments: --nonsense",
    "--cfg nonsense": "command line: argument --cfg/-c: invalid choice: 'nonsense'",
    "--help model=gpt3": "model=gpt3: no such option",
    "tarin": "tarin: no such command",
    "assess": "assess: this is neither a command nor a setting NAME=VALUE",
    "slurm.environment.1X=a": "slurm.environment.1X=a: 1X is not a valid name of an environment variable",
    "verfiy parallelism=tp2": "verfiy: no such command",
    "plna parallelism=tp2": "plna: no such command",
    "data=text plan": "plan: the command comes before its settings",
    "parallelism=tp2 --config-dir . submit": "submit: the command comes before its settings",
    "--multirun plan training.steps=5,6": "plan: the command comes before its settings",
    "--config-dir=. plan": "plan: the command comes before its settings",
    "compare compare.report=/": "compare.report=/: already exists, and the launcher did not write it",
    "replay broken step=1": "broken: a setting needs a name, = and a value",
    "export run.dir=broken": "export broken: the command needs a SOURCE and a TARGET directory",
    "evaluate": "run.dir=null: `launcher evaluate` needs the directory of a run or a checkpoint",
    "evaluate run.dir=none_such": "run.dir=none_such: is not a directory",
    "generate": "run.dir=null: sampling needs the directory of a run",
    "generate run.dir=none_such": "run.dir=none_such: this is not a run directory",
    "generate run.dir=broken": "run.dir=broken: its config.yaml was not written by a run",
    "generate run.dir=a prompt=": "prompt=: the prompt is empty",
    "generate run.dir=a temperature=-1": "temperature=-1.0: must be a finite number, 0 or more",
    "generate run.dir=a promt=x": "promt=x: no such field",
    "generate run.dir=a model=gpt_tiny": "model=gpt_tiny: no such field",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    (place / "blank.txt").touch()
    (place / "short.txt").write_text("short")
    (place / "broken").mkdir()
    (place / "broken" / "config.yaml").write_text("model: {}")
    return place


@pytest.fixture(scope="module")
def refusals(place: Path) -> dict[str, Ended]:
    return dict(zip(WRONG, launcher(place, *map(str.split, WRONG)), strict=True))


class TestWrongCommands:
    def test_are_more_than_a_few(self) -> None:
        assert len(WRONG) >= 25

    def test_get_one_message_and_exit_code_2(
        self, subtests: pytest.Subtests, refusals: dict[str, Ended]
    ) -> None:
        for command in WRONG:
            with subtests.test(command):
                ended = refusals[command]
                assert ended.err.startswith(f"launcher: {WRONG[command]}")
                message, nearest = ended.err.splitlines()
                assert nearest.startswith("  try: ")
                assert len(nearest) > len("  try: ")
                assert "HYDRA_FULL_ERROR" not in ended.err
                assert "Traceback" not in message
                assert (ended.code, ended.out) == (2, "")

    def test_import_nothing_heavy(self, subtests: pytest.Subtests, refusals: dict[str, Ended]) -> None:
        for command in WRONG:
            with subtests.test(command):
                assert refusals[command].heavy == []

    def test_leave_no_run_behind(self, place: Path, refusals: dict[str, Ended]) -> None:
        assert refusals
        assert list(place.rglob("run.json")) == []
        assert list(place.rglob("logs")) == []

    @pytest.mark.parametrize("command", ["parallelism.tensor=3", "generate run.dir=none_such", "--nonsense"])
    def test_do_so_as_a_module(self, command: str, place: Path) -> None:
        python = [sys.executable, "-X", "importtime", "-m", "launcher", *command.split()]
        done = subprocess.run(python, cwd=place, env=ENVIRONMENT, text=True, capture_output=True, timeout=60)
        said = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("import time:")]
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert "".join(said).startswith(f"launcher: {WRONG[command]}")
        assert (done.returncode, done.stdout, len(said)) == (2, "", 2)
        assert "hydra" in imported
        assert not imported & {"torch", "deepspeed", "wandb"}


class TestRanks:
    """Under torchrun every rank raises the same refusal."""

    def test_the_first_says_it_and_the_others_only_end(self, place: Path) -> None:
        [first] = launcher(place, ["parallelism.tensor=3"], **torchrun(0))
        [second] = launcher(place, ["parallelism.tensor=3"], **torchrun(1))
        assert first.err.startswith("launcher: parallelism.tensor=3: 4 attention heads")
        assert (second.out, second.err) == ("", "")
        assert first.code == second.code == 2
        assert first.heavy == second.heavy == []

    def test_the_world_is_what_the_layout_must_fill(self, place: Path) -> None:
        [ended] = launcher(place, ["parallelism=hybrid_3d"], **torchrun(0))
        assert ended.err == (
            "launcher: parallelism.tensor=2: the world size 2 is not a multiple of tensor 2 x pipeline 2 "
            "= 4 ranks, one copy of the model\n"
            "  try: a world size of 8\n"
        )

    @pytest.mark.parametrize(
        "environment", [{"RANK": "1"}, {"RANK": "x"}, {**torchrun(1), "WORLD_SIZE": "1"}]
    )
    def test_a_stray_variable_is_always_said(self, environment: dict[str, str], place: Path) -> None:
        [ended] = launcher(place, [], **environment)
        assert ended.err.startswith(
            ("launcher: WORLD_SIZE: is missing or empty, although RANK is set", "launcher: RANK=")
        )
        assert ended.code == 2

    def test_a_batch_script_is_no_rank(self, place: Path) -> None:
        [ended] = launcher(place, ["parallelism.tensor=3"], SLURM_PROCID="1", SLURM_JOB_ID="7")
        assert ended.err.startswith("launcher: parallelism.tensor=3")

    def test_a_sweep_is_refused(self, place: Path) -> None:
        [ended] = launcher(place, ["-m", "optimizer.lr=1e-3,2e-3"], **torchrun(0))
        assert ended.err.startswith("launcher: --multirun: ranks that torchrun or srun started train one run")
        assert (ended.code, ended.heavy) == (2, [])


class TestLooking:
    """Flags that print something and start nothing."""

    def test_help(self, place: Path) -> None:
        [root, train, generate, hydra] = launcher(
            place, ["--help"], ["train", "--help"], ["generate", "--help"], ["--hydra-help"]
        )
        for ended in (root, train, generate, hydra):
            assert (ended.code, ended.err, ended.heavy) == (0, "", [])
        assert root.out == train.out
        for words in (
            "launcher generate run.dir=PATH",
            "parallelism: auto, cp2, dp, ep2, hybrid_3d",
            "experiment=stdlib_gpt",
        ):
            assert words in root.out
        assert "experiment: " in root.out
        assert "prompt: 'import '" in generate.out
        assert "parallelism" not in generate.out
        assert "--multirun" in hydra.out

    def test_cfg_composes_every_experiment(self, subtests: pytest.Subtests, place: Path) -> None:
        experiments = options_of("experiment")
        shown = launcher(place, *(["--cfg", "job", f"experiment={name}"] for name in experiments))
        for experiment, ended in zip(experiments, shown, strict=True):
            with subtests.test(experiment):
                assert (ended.code, ended.err, ended.heavy) == (0, "", [])
                assert set(yaml.safe_load(ended.out)) >= {"model", "parallelism", "hardware", "training"}

    def test_cfg_shows_what_is_typed(self, place: Path) -> None:
        [one, other, generate] = launcher(
            place,
            ["--cfg", "job", "training.steps=7"],
            ["training.steps=7", "--cfg", "job", "model.dropout=0.5"],
            ["generate", "--cfg", "job", "prompt=x"],
        )  # fmt: skip
        assert yaml.safe_load(one.out)["training"]["steps"] == 7
        # A flag may stand between overrides.
        assert yaml.safe_load(other.out)["training"]["steps"] == 7
        assert yaml.safe_load(other.out)["model"]["dropout"] == 0.5
        assert yaml.safe_load(generate.out)["prompt"] == "x"

    def test_a_config_dir_of_ones_own(self, tmp_path: Path) -> None:
        own = tmp_path / "my files" / "experiment"
        own.mkdir(parents=True)
        (own / "mine.yaml").write_text(
            "# @package _global_\ndefaults: [override /model: llama_tiny]\ntraining: {steps: 7}\n"
        )
        (own / "wrong.yaml").write_text("# @package _global_\ntraining: {step: 7}\n")
        flag = f"--config-dir={own.parent}"
        [shown, helped, wrong] = launcher(
            tmp_path, ["--cfg", "job", flag, "experiment=mine"], [flag, "--help"], [flag, "experiment=wrong"]
        )
        composed = yaml.safe_load(shown.out)
        assert (composed["training"]["steps"], composed["model"]["norm"]) == (7, "rms_norm")
        assert "mine" in helped.out
        assert wrong.err == (
            "launcher: training.step: no such field (in experiment/wrong.yaml)\n  try: training.steps\n"
        )


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m launcher --help | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_a_python_without_torch_is_said_before_a_directory_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "deepspeed" not in command_line.PACKAGES["export"]
    computing = dict.fromkeys(command_line.PACKAGES, ("no_such_package",))
    monkeypatch.setattr(command_line, "PACKAGES", computing)
    monkeypatch.chdir(tmp_path)
    for verb in computing:
        with pytest.raises(ConfigError, match="has no package no_such_package\n  try: `launcher doctor`"):
            command_line._check_packages(verb, [])
        command_line._check_packages(verb, ["--help"])
    assert command_line.run_command(["run.dir=r"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_setting_of_another_command_is_said() -> None:
    overrides = ["slurm.partition=gpu", "verify.steps=2", "training.steps=3"]
    [job] = compose_jobs("config", RunConfig, overrides)
    assert train._unused(job) == [
        "note     slurm.partition has no effect here: `launcher submit` uses it",
        "note     verify.steps has no effect here: `launcher verify` uses it",
    ]


def test_no_module_of_the_working_directory_is_imported(tmp_path: Path) -> None:
    for name in ("tokenize", "signal", "hydra", "omegaconf", "argparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user was imported')\n")
    for name in ("wandb", "tokenizers", "launcher"):
        (tmp_path / name).mkdir()
    spawn = "from launcher.__main__ import main; import sys, os; sys.argv = ['x', '--version']\ntry: main()\n"
    spawn += "except SystemExit: pass\nimport subprocess; sys.exit(subprocess.call([sys.executable, '-c', "
    spawn += "'import tokenize, sys; sys.exit(7)']))"
    for options, code in ((["-m", "launcher", "--cfg", "job"], 0), (["-P", "-c", spawn], 7)):
        command = [sys.executable, *options]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (code, "")
