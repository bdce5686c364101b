"""The requirements of the package admit what is tested, and its metadata agree."""

import importlib.metadata
import re
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = [Requirement(line) for line in re.findall(r"^\w.*$", (ROOT / "constraints.txt").read_text(), re.M)]


def required() -> dict[str, SpecifierSet]:
    texts = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    requirements = [Requirement(text) for text in texts if not text.startswith("launcher")]
    return {requirement.name: requirement.specifier for requirement in requirements}


def test_every_requirement_is_pinned_to_a_version_that_it_admits() -> None:
    assert sorted(required()) == sorted(pin.name for pin in PINNED)
    for pin in PINNED:
        [version] = pin.specifier
        assert version.operator == "=="
        assert required()[pin.name].contains(version.version), pin.name


def test_the_installed_versions_are_the_pinned_ones() -> None:
    """Else `make setup` has not installed what constraints.txt says is tested."""
    runtime = {Requirement(text).name for text in PROJECT["dependencies"]}
    for pin in PINNED:
        if pin.name in runtime:
            assert pin.specifier.contains(importlib.metadata.version(pin.name)), pin.name


def test_the_torch_of_a_cluster_is_admitted() -> None:
    for version in ("2.8.0", "2.11.0+cu130", "2.13.0", "2.14.1"):
        assert required()["torch"].contains(version)
    # Without addmm into fp32, and gloo without averages.
    assert not required()["torch"].contains("2.7.1")


def test_the_stated_pythons_are_those_that_are_admitted() -> None:
    stated = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    admitted = SpecifierSet(PROJECT["requires-python"])
    versions = [f"3.{minor}" for minor in range(8, 20)]
    assert stated == [version for version in versions if f"{version}.1" in admitted]
