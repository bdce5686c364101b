"""`--help` describes each field by its comment in schema.py."""

import pytest

from launcher.command_line import VERBS, run_command
from launcher.config.compose import compose_jobs
from launcher.config.descriptions import descriptions
from launcher.config.fields import fields_of
from launcher.config.schema import ExchangeConfig, GenerateConfig, PrepareConfig, ReplayConfig, RunConfig


@pytest.mark.parametrize("root", [RunConfig, GenerateConfig, PrepareConfig, ReplayConfig, ExchangeConfig])
def test_every_field_has_a_description(root: type) -> None:
    found = descriptions(root)
    assert set(found) == set(fields_of(root))
    assert all(found.values())


def test_descriptions_are_the_comments_of_the_schema() -> None:
    found = descriptions(RunConfig)
    assert found["slurm.mem"] == "memory of a node, such as 64G"
    assert found["slurm.on_stop"] == "requeue | chain | end"
    assert found["guard.replica_interval"].startswith("Steps between comparisons")


def test_help_has_them_beside_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert compose_jobs("config", RunConfig, ["--help"]) == []
    lines = capsys.readouterr().out.splitlines()
    [steps] = [line for line in lines if line.strip().startswith("stop_at:")]
    assert steps.split("  # ")[1] == "end after this step; the schedule still spans `steps`"
    assert "  launcher COMMAND --help         options of a command" in "\n".join(lines)


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_a_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith("launcher")
