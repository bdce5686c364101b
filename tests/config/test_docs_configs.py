"""The worked example of docs/configs.md composes as the page says."""

import re
import shlex
from pathlib import Path

import pytest

from launcher.config.compose import compose_jobs
from launcher.config.fields import config_directory
from launcher.config.schema import RunConfig

PAGE = (config_directory().parent / "docs" / "configs.md").read_text()


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in re.findall(r"```yaml\n# (my_conf/\S+)\n(.*?)```", PAGE, re.DOTALL):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("example")
class TestExample:
    def test_the_commands_compose(self) -> None:
        commands = [shlex.split(line)[1:] for line in PAGE.splitlines() if line.startswith("launcher ")]
        assert len(commands) == 3
        for command in commands:
            overrides = [word for word in command if word not in ("plan", "submit", "--cfg", "job")]
            [job] = compose_jobs("config", RunConfig, overrides)
            assert (job.config.training.steps, job.config.model.num_layers) == (20, 2)
            assert (job.config.logging.wandb.name, job.config.logging.wandb.tags) == ("007", ["first", "1e3"])

    def test_the_settings_of_the_cluster_count(self) -> None:
        [job] = compose_jobs("config", RunConfig, ["--config-dir=my_conf", "slurm=lab", "experiment=first"])
        slurm = job.config.slurm
        assert (slurm.time, slurm.partition, slurm.account) == ("4:00:00", "short", "0123")
