"""Composing and refusing is quick because it imports neither torch nor deepspeed; imports go one way."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import launcher.commands
import launcher.config

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "deepspeed", "wandb", "transformers"}


@pytest.mark.parametrize(
    "module",
    [
        "launcher.__main__",
        "launcher.command_line",
        "launcher.launch.local",
        "launcher.data.sampler",
        *(f"launcher.commands.{module.name}" for module in pkgutil.iter_modules(launcher.commands.__path__)),
        *(f"launcher.config.{module.name}" for module in pkgutil.iter_modules(launcher.config.__path__)),
    ],
)
def test_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import json, sys, {module}; print(json.dumps(sorted({{n.partition('.')[0] for n in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "launcher" in loaded
    assert loaded & HEAVY == set()


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
