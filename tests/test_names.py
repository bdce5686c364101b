"""A name has one meaning in the whole package: no class, type alias or file of another meaning shares it."""

import ast
import re
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "launcher"
FILES = sorted(PACKAGE.rglob("*.py"))
# Names of two files about the same thing: a command and its work, or a model part and its check.
TWINS = {"__init__", "dropout", "preflight", "replay"}
ALIAS = re.compile(r"_?[A-Z]\w*[a-z]")  # constants are in capitals


def meanings(path: Path) -> dict[str, str]:
    """Return the classes and type aliases of a file: by name, the file of a class or the type of an alias."""
    defined: dict[str, str] = {}
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.ClassDef(name=name):
                defined[name] = f"class in {path.relative_to(PACKAGE)}"
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if ALIAS.match(name):
                defined[name] = ast.unparse(value)
    return defined


def test_no_two_classes_or_type_aliases_share_a_name() -> None:
    """Aliases of the same type may share a name, as GlobalBatch does."""
    by_name: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        for name, meaning in meanings(path).items():
            by_name[name].add(meaning)
    assert len(by_name) > 300
    assert {name: sorted(of_name) for name, of_name in by_name.items() if len(of_name) > 1} == {}


def test_no_two_files_share_a_name() -> None:
    stems = [path.stem for path in FILES]
    assert {stem for stem in stems if stems.count(stem) > 1} == TWINS
