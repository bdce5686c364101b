"""Every recipe's run is planned; test_command.py verifies the experiment that the recipe names."""

import shlex
from pathlib import Path

import pytest

from tests.config.test_cli import launcher
from tests.parity.test_command import EXPERIMENTS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.sbatch"))


def test_every_recipe_is_planned(subtests: pytest.Subtests, tmp_path: Path) -> None:
    assert len(RECIPES) == 14
    typed = [
        shlex.split(recipe.read_text().splitlines()[1].removeprefix("# launcher submit "))
        for recipe in RECIPES
    ]
    plans = launcher(tmp_path, *(["plan", *overrides] for overrides in typed))
    for recipe, overrides, planned in zip(RECIPES, typed, plans, strict=True):
        with subtests.test(recipe.stem):
            assert planned.code == 0, planned.out + planned.err
            [experiment] = [word for word in overrides if word.startswith("experiment=")]
            assert experiment.removeprefix("experiment=") in EXPERIMENTS
