"""training.compile: its default by device, and the refusal on a machine that cannot compile."""

import pytest

from launcher.commands.ready import check_compiler
from launcher.config.errors import ConfigError
from launcher.config.validate import validate
from launcher.config.world import World
from tests.config.composing import run_of

CPU, GPU = World("cpu", 2, 2), World("cuda", 2, 2)


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_gpu"), [("null", False, True), ("true", True, True), ("false", False, False)]
)
def test_blocks_are_compiled_by_default_on_gpus(setting: str, on_cpu: bool, on_gpu: bool) -> None:
    run = run_of("hardware.device=auto", "parallelism=dp", f"training.compile={setting}")
    assert validate(run, CPU).compiled is on_cpu
    assert validate(run, GPU).compiled is on_gpu


def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("hardware=cpu", "parallelism=dp", "training.compile=true")
    layout = validate(run, CPU)
    check_compiler(run, layout)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(
        ConfigError, match=r"training.compile=true: .* /nowhere/c\+\+ is not installed"
    ) as refused:
        check_compiler(run, layout)
    assert "training.compile=false" in str(refused.value)
    check_compiler(run_of("hardware=cpu", "parallelism=dp"), layout)
