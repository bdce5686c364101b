"""The quick tests that belong to a file of the launcher, and running them in a forked process."""

import ast
import os
from functools import cache
from pathlib import Path

from tests.fuzz.mutants import PACKAGE, files

TESTS = Path(__file__).parents[1]
# Tests of these modules start the launcher in new processes, which do not have a fault applied in memory.
_OTHER_PROCESSES = {"tests.forked_commands", "tests.runtime.command", "subprocess"}
FOLDERS = ("parallel", "models", "engine", "checkpoint")
MOST_FILES = 3
COUNTS = TESTS / "engine" / "test_step_counts.py"  # of collectives and synchronisations, for all of engine/


def quick_tests_of(file: str) -> list[Path]:
    """Return the test files that import a file of the launcher, its namesake first; at most MOST_FILES.

    If no test imports the file, the tests of the files that import it. COUNTS is one more for engine/.
    """
    module = _module(file)
    modules = {module}
    found = [path for path, imported in _imports().items() if module in imported]
    if not found:
        modules = {_module(user) for user in files() if module in _imported(PACKAGE / user)}
        found = [path for path, imported in _imports().items() if modules & imported]
    stems = {name.rpartition(".")[2] for name in modules}
    folder = Path(file).parent.name
    found.sort(key=lambda path: (path.stem[5:] not in stems, path.parent.name != folder, path.stem))
    nearest = found[:MOST_FILES]
    return [*nearest, COUNTS] if folder == "engine" and COUNTS not in nearest else nearest


def _module(file: str) -> str:
    return "launcher." + file.removesuffix(".py").replace("/", ".")


@cache
def _imports() -> dict[Path, set[str]]:
    """Return the modules that each test file imports, itself or through its helpers."""
    direct = {path: _imported(path) for path in sorted(TESTS.rglob("*.py"))}
    helpers = {"tests." + ".".join(path.relative_to(TESTS).with_suffix("").parts): path for path in direct}
    whole = {}
    for path, imported in direct.items():
        if path.parent.name in FOLDERS and path.name.startswith("test_"):
            through = {name for helper in imported & helpers.keys() for name in direct[helpers[helper]]}
            if not (imported | through) & _OTHER_PROCESSES:
                whole[path] = imported | through
    return whole


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def failed_test(tests: list[str], left_out: tuple[str, ...] = ()) -> str | None:
    """Run quick tests, or the quick tests of files, in this process; return the first that fails, or None.

    Tests that are `left_out` do not run.
    """
    import pytest

    class First:
        name: str | None = None

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and self.name is None:
                self.name = report.nodeid

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed and self.name is None:
                self.name = report.nodeid  # of a file that cannot be imported

    first = First()
    os.chdir(TESTS.parent)
    options = [
        "-x",
        "-q",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:hypothesispytest",
    ]
    pytest.main([*options, *(f"--deselect={name}" for name in left_out), *tests], plugins=[first])
    return first.name
