"""Composing and refusing import neither torch nor deepspeed; imports go one way."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import launcher.commands
import launcher.config
from tests.forked_commands import CommandServer, environment

ROOT = Path(__file__).parents[2]


MODULES = [
    "launcher.__main__",
    "launcher.command_line",
    "launcher.launch.local",
    "launcher.data.sampler",
    *(f"launcher.commands.{module.name}" for module in pkgutil.iter_modules(launcher.commands.__path__)),
    *(f"launcher.config.{module.name}" for module in pkgutil.iter_modules(launcher.config.__path__)),
]


def test_imports_nothing_heavy(subtests: pytest.Subtests) -> None:
    server = CommandServer(modules=())
    program = "\n".join(f"import {module}" for module in MODULES)
    together = server.start([], cwd=ROOT, environment=environment(), program=program)
    assert together.wait() == 0, together.error()
    # One by one only to name the module.
    for module in MODULES if together.heavy else ():
        with subtests.test(module):
            alone = server.start([], cwd=ROOT, environment=environment(), program=f"import {module}")
            assert alone.wait() == 0, alone.error()
            assert alone.heavy == []
    assert together.heavy == []
    torch = server.start([], cwd=ROOT, environment=environment(), program="import torch")
    assert torch.wait() == 0
    assert torch.heavy == ["torch"], "the server must tell"


def test_import_contracts_hold() -> None:
    pytest.importorskip(
        "importlinter", reason="import-linter is a development dependency: pip install .[dev]"
    )
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
