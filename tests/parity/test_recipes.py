"""`plan` and `verify` accept the overrides of every recipe."""

import shlex
from pathlib import Path

import pytest

from tests.runtime.command import launcher

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.sbatch"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "verify"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_plan_and_verify_accept_the_recipe(recipe: Path, command: str, tmp_path: Path) -> None:
    overrides = shlex.split(recipe.read_text().splitlines()[1].removeprefix("# launcher submit "))
    done = launcher(command, *overrides, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_ten_recipes() -> None:
    assert len(RECIPES) == 10
