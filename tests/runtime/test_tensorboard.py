"""TensorBoard's files: every row, repeated steps purged, refused without the package, never a run's end."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launcher.commands import ready
from launcher.commands.ready import check_tensorboard
from launcher.config.errors import ConfigError
from launcher.runtime.metrics.tensorboard import TensorBoardLog
from tests.config.composing import run_of
from tests.forked_commands import LAUNCHER, environment, light

calls: list[tuple[Any, ...]] = []


class Writer:
    """Stands for SummaryWriter, so that the test needs no further package."""

    def __init__(self, folder: str, purge_step: int) -> None:
        calls.append(("open", folder, purge_step))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "broken":
            raise OSError("the disk is full")
        calls.append((name, value, step))

    def close(self) -> None:
        calls.append(("close",))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)


def test_rows_are_written_and_repeated_steps_purged(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, 5)
    log.write({"step": 5, "train/loss": 2.0, "val/loss": 3.0})
    log.close()
    assert calls == [
        ("open", str(tmp_path / "tensorboard"), 5), ("train/loss", 2.0, 5), ("val/loss", 3.0, 5), ("close",),
    ]  # fmt: skip
    assert log.notes == []


def test_a_failure_is_one_note(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, 1)
    for _ in range(3):
        log.write({"step": 1, "broken": 1.0})
    log.close()
    assert log.notes == [
        "TensorBoard's files are no longer written (OSError('the disk is full')); training continues"
    ]


def test_an_import_that_fails_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = TensorBoardLog(tmp_path, 1)
    log.write({"step": 1, "train/loss": 1.0})
    assert len(log.notes) == 1


def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_of("logging.tensorboard=true")
    monkeypatch.setattr(ready, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        check_tensorboard(run)
    assert "try: pip install 'tensorboard>=2.18,<3' or logging.tensorboard=false" in str(refused.value)
    check_tensorboard(run_of())
    monkeypatch.setattr(ready, "find_spec", lambda name: object())
    check_tensorboard(run)


def test_train_and_submit_refuse_before_they_load_torch(tmp_path: Path) -> None:
    program = f"import launcher.commands.ready as ready\nready.find_spec = lambda name: None\n{LAUNCHER}"
    slurm = ["hardware=cpu", "hardware.accelerators_per_node=1", "submit.dry_run=true", "parallelism=single"]
    for arguments in (["train"], ["submit", *slurm]):
        command = light().start(
            [*arguments, "logging.tensorboard=true"], cwd=tmp_path, environment=environment(), program=program
        )
        _, error = command.communicate()
        assert (command.returncode, command.heavy) == (2, [])
        assert error.startswith("launcher: logging.tensorboard=true: the package tensorboard is not")
