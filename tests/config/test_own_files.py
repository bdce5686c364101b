"""Usual mistakes in experiments of a user are answered with lines that make the file compose."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.schema import RunConfig

GLOBAL = "# @package _global_\n"


class Mistake(NamedTuple):
    wrong: str
    right: str
    why: str


LISTED = "an entry of its defaults list"
MISTAKES = {
    "no override": Mistake(
        f"{GLOBAL}defaults: [model: mine]\n", f"{GLOBAL}defaults:\n- override /model: mine\n",
        "the entry 'model/mine' of its defaults list must say that it overrides the group model",
    ),
    "no override, with a slash": Mistake(
        f"{GLOBAL}defaults: [/model: mine]\n", f"{GLOBAL}defaults:\n- override /model: mine\n",
        "the entry for 'mine' adds a second option of the group model",
    ),
    "no slash": Mistake(
        f"{GLOBAL}defaults: [override model: mine]\n", f"{GLOBAL}defaults:\n- override /model: mine\n",
        "the group model needs a / in front",
    ),
    "no colon": Mistake(
        f"{GLOBAL}defaults: [override /model mine]\n", f"{GLOBAL}defaults:\n- override /model: mine\n",
        "the entry 'model mine' of its defaults list must say",
    ),
    "another group without override": Mistake(
        f"{GLOBAL}defaults: [precision: bf16]\n", f"{GLOBAL}defaults:\n- override /precision: bf16\n",
        "the entry 'precision/bf16' of its defaults list must say that it overrides the group precision",
    ),
    "no package": Mistake(
        "training: {steps: 3}\n", f"{GLOBAL}training: {{steps: 3}}\n",
        "no such field: experiment/own.yaml is read",
    ),
    "no package, with an override": Mistake(
        "defaults: [override /model: mine]\n", f"{GLOBAL}defaults: [override /model: mine]\n",
        "it overrides a group, and its first line is missing",
    ),
    "another package": Mistake(
        "# @package global\ntraining: {steps: 3}\n", f"{GLOBAL}training: {{steps: 3}}\n",
        "no such field: experiment",
    ),
    "override is not last": Mistake(
        f"{GLOBAL}defaults:\n- override /model: mine\n- digits_dp\n",
        f"{GLOBAL}defaults:\n- digits_dp\n- override /model: mine\n",
        "an entry with `override` stands before",
    ),
    "a mapping": Mistake(
        f"{GLOBAL}defaults:\n  override /model: mine\n", f"{GLOBAL}defaults:\n  - override /model: mine\n",
        "its defaults are no list",
    ),
    "several groups in an entry": Mistake(
        f"{GLOBAL}defaults: [{{override /model: mine, override /data: digits}}]\n",
        f"{GLOBAL}defaults:\n- override /model: mine\n- override /data: digits\n",
        f"{LISTED} names several groups",
    ),
    "two selfs": Mistake(
        f"{GLOBAL}defaults: [_self_, digits_dp, _self_]\n", f"{GLOBAL}defaults:\n- digits_dp\n- _self_\n",
        "its defaults list names _self_ twice",
    ),
    "an option for a section": Mistake(
        f"{GLOBAL}model: mine\n", f"{GLOBAL}defaults:\n- override /model: mine\n",
        "model is a section of fields",
    ),
    "a list of fields": Mistake(
        f"{GLOBAL}training: [{{steps: 3}}, {{seed: 1}}]\n", f"{GLOBAL}training: {{steps: 3, seed: 1}}\n",
        "training is a section of fields, not a list",
    ),
    "a file that is a list": Mistake(
        f"{GLOBAL}- training\n", f"{GLOBAL}training: {{steps: 3}}\n", "the file is a list",
    ),
    "default": Mistake(
        f"{GLOBAL}default: [override /model: mine]\n", f"{GLOBAL}defaults:\n- override /model: mine\n",
        "'default' is no field",
    ),
    "a dotted name": Mistake(
        f"{GLOBAL}logging.wandb.name: a\n", f"{GLOBAL}logging: {{wandb: {{name: a}}}}\n", "a dot in the name",
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [gpt_tiny]\nnum_layers: 2\n")
    return tmp_path


def composed_from(folder: Path, text: str) -> RunConfig:
    (folder / "experiment" / "own.yaml").write_text(text)
    [job] = compose_jobs("config", RunConfig, [f"--config-dir={folder}", "experiment=own"])
    return job.config


def test_a_mistake_is_answered_with_lines_that_compose(folder: Path, subtests: pytest.Subtests) -> None:
    for name, mistake in MISTAKES.items():
        with subtests.test(name):
            with pytest.raises(ConfigError) as raised:
                composed_from(folder, mistake.wrong)
            error = raised.value
            assert error.why.startswith(mistake.why)
            lines = re.findall(r"`([^`]*)`", error.remedy) or [
                error.remedy.partition(" as the first line")[0]
            ]
            for line in lines:
                pattern = re.escape(line).replace("OPTION", r"\w+").replace("VALUE", r"\w+")
                assert re.search(rf"^ *{pattern}$", mistake.right, re.MULTILINE), line
            assert composed_from(folder, mistake.right)


def test_a_model_with_a_part_of_the_fields_is_told_its_first_line(folder: Path) -> None:
    file = folder / "model" / "mine.yaml"
    file.write_text("num_layers: 2\n")
    with pytest.raises(ConfigError, match=r"must be set, and model/mine\.yaml does not set it") as raised:
        compose_jobs("config", RunConfig, [f"--config-dir={folder}", "model=mine"])
    [line] = re.findall(r"`([^`]*)`", raised.value.remedy)
    file.write_text(f"{line}\nnum_layers: 2\n")
    [job] = compose_jobs("config", RunConfig, [f"--config-dir={folder}", "model=mine"])
    assert job.config.model.num_layers == 2


@pytest.mark.parametrize(
    ("typed", "works"),
    [
        ("experiment=experiment/own", "experiment=own"), ("experiment={folder}/experiment/own.yaml",
        "experiment=own"),
        ("model=model/mine", "model=mine"), ("experiment=own.yaml", None),
    ],
)  # fmt: skip
def test_a_path_for_an_option_is_answered_with_its_name(typed: str, works: str | None, folder: Path) -> None:
    (folder / "experiment" / "own.yaml").write_text(GLOBAL)
    arguments = [f"--config-dir={folder}", typed.format(folder=folder)]
    if works is None:
        assert compose_jobs("config", RunConfig, arguments)
        return
    with pytest.raises(ConfigError) as raised:
        compose_jobs("config", RunConfig, arguments)
    assert raised.value.remedy == works
    assert compose_jobs("config", RunConfig, [arguments[0], works])


class TestFilesOfACluster:
    """A slurm file of the user wins over shipped experiments, and loses to the command line."""

    @pytest.fixture
    def arguments(self, folder: Path) -> list[str]:
        (folder / "slurm").mkdir()
        cluster = 'defaults: [default]\ntime: "4:00:00"\npartition: short\ncpus_per_task: 3\n'
        (folder / "slurm" / "lab.yaml").write_text(cluster)
        return [f"--config-dir={folder}", "slurm=lab"]

    @pytest.mark.parametrize("experiment", ["gpt2_small", "gpt2_small_sweep", "llama3_8b_3d", "stdlib_gpt"])
    def test_shipped_experiments_do_not_replace_it(self, experiment: str, arguments: list[str]) -> None:
        [job] = compose_jobs("config", RunConfig, [*arguments, f"experiment={experiment}"])
        slurm = job.config.slurm
        assert (slurm.time, slurm.partition, slurm.cpus_per_task) == ("4:00:00", "short", 3)
        assert job.origins["slurm.time"].endswith("slurm/lab.yaml")

    def test_fields_that_it_does_not_set_come_from_the_experiment(self, arguments: list[str]) -> None:
        [job] = compose_jobs("config", RunConfig, [*arguments, "experiment=gpt2_xl_chain"])
        assert (job.config.slurm.on_stop.name, job.config.slurm.signal_seconds) == ("chain", 300)
        assert job.origins["slurm.signal_seconds"] == "the shipped experiment/gpt2_xl_chain.yaml"

    def test_null_in_it_is_a_setting(self, folder: Path, arguments: list[str]) -> None:
        (folder / "slurm" / "lab.yaml").write_text("time: null\n")
        [job] = compose_jobs("config", RunConfig, [*arguments, "experiment=gpt2_small"])
        assert job.config.slurm.time is None

    def test_the_command_line_replaces_it(self, arguments: list[str]) -> None:
        typed = [*arguments, "experiment=gpt2_small", "slurm.time=1:00:00"]
        [job] = compose_jobs("config", RunConfig, typed)
        assert (job.config.slurm.time, job.origins["slurm.time"]) == ("1:00:00", "the command line")

    def test_an_experiment_of_the_user_replaces_it(self, folder: Path, arguments: list[str]) -> None:
        (folder / "experiment" / "own.yaml").write_text(f'{GLOBAL}slurm: {{time: "2:00:00"}}\n')
        [job] = compose_jobs("config", RunConfig, [*arguments, "experiment=own"])
        assert job.config.slurm.time == "2:00:00"
        assert job.origins["slurm.time"].endswith("experiment/own.yaml")

    def test_without_it_an_experiment_has_its_own_time(self) -> None:
        [job] = compose_jobs("config", RunConfig, ["experiment=gpt2_small"])
        assert (job.config.slurm.time, job.origins["slurm.time"]) == (
            "24:00:00", "the shipped experiment/gpt2_small.yaml",
        )  # fmt: skip

    def test_each_job_of_a_sweep_has_its_own_origins(self, arguments: list[str]) -> None:
        sweep = ["--multirun", *arguments, "experiment=gpt2_small,stdlib_gpt"]
        assert {job.config.slurm.time for job in compose_jobs("config", RunConfig, sweep)} == {"4:00:00"}
