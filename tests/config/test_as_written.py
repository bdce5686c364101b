"""Text that YAML or Hydra reads as a number, a boolean or nothing is refused, with what to write instead."""

import shlex
from pathlib import Path

import pytest
import yaml

from launcher.config.as_written import check_file
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.fields import config_directory
from launcher.config.schema import RunConfig
from launcher.config.slurm_rules import check_slurm
from tests.config.composing import composed, section_of

# Lines of a file -> the field, the text that was written, and what YAML reads.
MISREAD = {
    "slurm: {time: 24:00:00}": ("slurm.time", "24:00:00", "the number 86400"),
    "slurm: {time: 12:30}": ("slurm.time", "12:30", "the number 750"),
    "slurm: {account: 0123}": ("slurm.account", "0123", "the number 83"),
    "slurm: {account: 12_34}": ("slurm.account", "12_34", "the number 1234"),
    "slurm: {partition: no}": ("slurm.partition", "no", "the boolean false"),
    "slurm: {constraint: 1e3}": ("slurm.constraint", "1e3", "the number 1000.0"),
    "slurm: {reservation: 0x1F}": ("slurm.reservation", "0x1F", "the number 31"),
    "slurm: {qos: NULL}": ("slurm.qos", "NULL", "no value"),
    "slurm: {job_name: .nan}": ("slurm.job_name", ".nan", "the number nan"),
    "slurm: {mem: 1_000}": ("slurm.mem", "1_000", "the number 1000"),
    "slurm: {environment: {LIMIT: 010}}": ("slurm.environment.LIMIT", "010", "the number 8"),
    "slurm: {environment: {DEBUG: yes}}": ("slurm.environment.DEBUG", "yes", "the boolean true"),
    "slurm: {modules: [cuda, 12.10]}": ("slurm.modules", "12.10", "the number 12.1"),
    "logging: {wandb: {tags: [a, 1e3]}}": ("logging.wandb.tags", "1e3", "the number 1000.0"),
    "logging: {wandb: {name: 007}}": ("logging.wandb.name", "007", "the number 7"),
    "logging: {wandb: {group: TRUE}}": ("logging.wandb.group", "TRUE", "the boolean true"),
    "logging: {wandb: {entity: off}}": ("logging.wandb.entity", "off", "the boolean false"),
    "data: {train: 1:30}": ("data.train", "1:30", "the number 90"),
    "data: {sources: {web: 1e-3}}": ("data.sources.web", "1e-3", "the number 0.001"),
    "run: {dir: +5}": ("run.dir", "+5", "the number 5"),
}  # fmt: skip
SAME = [
    "slurm: {time: '24:00:00'}", "slurm: {time: 90}", "slurm: {account: 123}", "slurm: {account: null}",
    "slurm: {account: }", "slurm: {time: 1-12:00:00}", "slurm: {mem: 64G}", "slurm: {nodes: 1-2}",
    "logging: {wandb: {name: 2026-11-26}}", "logging: {wandb: {tags: [1.5, a, -3]}}",
    "slurm: {environment: {OMP_NUM_THREADS: 4}}", "data: {train: !!str 012}",
    "logging: {wandb: {group: True}}",
]  # fmt: skip


def refused(lines: str, folder: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        from_file(lines, folder, *overrides)
    return raised.value


def from_file(lines: str, folder: Path, *overrides: str) -> RunConfig:
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{lines}\n")
    [job] = compose_jobs("config", RunConfig, [f"--config-dir={folder}", "experiment=mine", *overrides])
    return job.config


def texts_of(run: RunConfig, field: str) -> list[str]:
    """Return the texts of a field: one, the items of a list, or an entry of a dictionary."""
    section, _, name = field.rpartition(".")
    parent = section_of(run, section)
    value = parent[name] if isinstance(parent, dict) else getattr(parent, name)
    return value if isinstance(value, list) else [value]


def test_text_that_yaml_misreads_is_refused_with_what_to_write(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for lines, (field, written, read) in MISREAD.items():
        with subtests.test(lines):
            error = refused(lines, tmp_path)
            assert (error.field, error.value) == (field, written)
            assert error.why.startswith(f"YAML reads this text as {read}: quote it (line 2 of {tmp_path}")
            in_file, _, typed = error.remedy.partition(" (in the file) or ")
            typed = typed.removesuffix(" (on the command line)")
            repaired = yaml.safe_load(in_file if ": " in in_file else f"item: {in_file}")
            assert list(repaired.values()) == [written]
            # The setting on the command line is enough: it replaces the value of the file.
            run = from_file(lines, tmp_path, *shlex.split(typed))
            assert written in texts_of(run, field)


def test_text_that_yaml_reads_as_written_is_accepted(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for lines in SAME:
        with subtests.test(lines):
            from_file(lines, tmp_path)
    assert from_file("slurm: {time: 90, account: null}", tmp_path).slurm.time == "90"


@pytest.mark.parametrize(
    ("lines", "why", "value"),
    [
        ("training: {steps: 0100}", "YAML reads this number in octal, as 64", 100),
        ("launch: {timeout_minutes: 1:30}", "YAML reads this number in base 60, as 90", 90),
        ("deepspeed: {gradient_predivide_factor: 010}", "YAML reads this number in octal, as 8", 10),
    ],
)
def test_octal_and_base_60_are_refused_for_numbers(lines: str, why: str, value: int, tmp_path: Path) -> None:
    error = refused(lines, tmp_path)
    assert error.why.startswith(why)
    assert f"{error.field}={value}" in error.remedy
    assert from_file(lines, tmp_path, f"{error.field}={value}")


def test_numbers_with_underscores_and_exponents_are_accepted(tmp_path: Path) -> None:
    run = from_file("training: {steps: 1_000}\noptimizer: {lr: 1e-4}\nlogging: {interval: 0x10}", tmp_path)
    assert (run.training.steps, run.optimizer.lr, run.logging.interval) == (1000, 1e-4, 16)


def test_a_member_of_an_enum_may_look_like_a_boolean(tmp_path: Path) -> None:
    assert from_file("guard: {spike: off}", tmp_path).guard.spike.name == "off"
    assert refused("guard: {spike: no}", tmp_path).value == "no"


@pytest.mark.parametrize("name", ["on", "1", "no"])
def test_a_name_that_is_not_text_is_refused(name: str, tmp_path: Path) -> None:
    error = refused(f"slurm: {{environment: {{{name}: x}}}}", tmp_path)
    assert error.why.startswith("YAML does not read this name as text (line 2 of ")
    assert error.remedy == f'"{name}": VALUE'


@pytest.mark.parametrize("field", ["slurm.exclude", "slurm.constraint", "logging.wandb.name"])
def test_a_list_for_a_text_is_refused_with_the_text(field: str, tmp_path: Path) -> None:
    lines = "[a, b]"
    for name in reversed(field.split(".")):
        lines = f"{name}: {lines}" if name == field.partition(".")[0] else f"{{{name}: {lines}}}"
    error = refused(lines, tmp_path)
    assert error.remedy == f'{field.rpartition(".")[2]}: "a,b" (in the file)'
    with pytest.raises(ConfigError) as typed:
        composed(f"{field}=[a,b]")
    [remedy] = shlex.split(typed.value.remedy)
    assert texts_of(composed(remedy), field) == ["a,b"]


def test_a_secret_is_not_part_of_the_message(tmp_path: Path) -> None:
    run = from_file("slurm: {environment: {DB_PASSWORD: 0123}}", tmp_path)
    with pytest.raises(ConfigError) as raised:
        check_slurm(run)
    assert "0123" not in str(raised.value)


def test_values_of_a_sweep_are_checked(tmp_path: Path) -> None:
    lines = "hydra: {sweeper: {params: {logging.wandb.name: 1e3}}}"
    with pytest.raises(ConfigError) as raised:
        from_file(lines, tmp_path, "--multirun")
    assert raised.value.why.startswith("YAML reads this text as the number 1000.0")


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("slurm.account=12_34", 'slurm.account="12_34"'),
        ("slurm.partition=true", 'slurm.partition="true"'),
        ("slurm.qos=NULL", 'slurm.qos="NULL"'),
        ("run.dir=1e3", 'run.dir="1e3"'),
        ("logging.wandb.tags=[a,1e3,2]", 'logging.wandb.tags=[a,"1e3",2]'),
        ("slurm.environment={A: 1e3, B: True}", 'slurm.environment={A: "1e3", B: True}'),
        ("data.sources.web=1_0", 'data.sources.web="1_0"'),
    ],
)
def test_text_that_hydra_misreads_is_refused_with_what_to_type(typed: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        composed(typed)
    assert raised.value.why.endswith("quote it")
    assert shlex.split(raised.value.remedy) == [remedy]
    assert composed(remedy)


def test_each_value_of_a_typed_sweep_is_checked() -> None:
    with pytest.raises(ConfigError) as raised:
        compose_jobs("config", RunConfig, ["-m", "logging.wandb.name=a,1e3"])
    remedy = shlex.split(raised.value.remedy)
    assert remedy == ['logging.wandb.name=a,"1e3"']
    jobs = compose_jobs("config", RunConfig, ["-m", *remedy])
    assert [job.config.logging.wandb.name for job in jobs] == ["a", "1e3"]


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("slurm.account=0123", "0123"),
        ("slurm.time=24:00:00", "24:00:00"),
        ("slurm.time=90", "90"),
        ("logging.wandb.name=007", "007"),
        ("slurm.partition=no", "no"),
    ],
)
def test_text_that_hydra_reads_as_typed_is_accepted(typed: str, text: str) -> None:
    assert section_of(composed(typed), typed.partition("=")[0]) == text


def test_shipped_files_are_read_as_written() -> None:
    for path in config_directory().rglob("*.yaml"):
        assert check_file(path, "", RunConfig, ()) == {}
