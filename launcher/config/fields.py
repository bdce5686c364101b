"""List the fields and groups that a user can set, their valid values, and close matches of misspelt names."""

import re
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig

from launcher.config.schema import ROOTS, RunConfig


def config_directory() -> Path:
    """Return the path of conf/, which is inside the installed package or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def options_of(group: str) -> list[str]:
    """Return the options of a group in conf/, or an empty list for an unknown group."""
    if not re.fullmatch(r"\w+(/\w+)*", group):
        return []
    return sorted(path.stem for path in (config_directory() / group).glob("*.yaml"))


def groups_of(root: type[Any]) -> list[str]:
    """Return the config groups of `root`; only training runs and subclasses of RunConfig have groups."""
    directories = config_directory().iterdir() if issubclass(root, RunConfig) else []
    return sorted(path.name for path in directories if path.is_dir() and path.name != "hydra")


def schema_of(root: type[Any]) -> DictConfig:
    """Return the fields of `root`, and register them for Hydra to compose. Must not be changed.

    Built once, in 30 ms, and only for the root that a command composes.
    """
    return _schema_of(root)  # type: ignore[arg-type]  # mypy takes dataclass types for unhashable


@cache
def _schema_of(root: type[Any]) -> DictConfig:
    [name] = (name for name, of_file in ROOTS.items() if of_file is root)
    store = ConfigStore.instance()
    store.store(name=f"{name}_schema", node=root)
    schema: DictConfig = store.repo[f"{name}_schema.yaml"].node
    return schema


def fields_of(root: type[Any]) -> dict[str, str]:
    """Return the valid values, in words, of every field that a user can set, by dotted name."""
    return _fields_of(root)  # type: ignore[arg-type]


@cache
def _fields_of(root: type[Any]) -> dict[str, str]:
    values: dict[str, str] = {}

    def walk(config: DictConfig, prefix: str) -> None:
        for key in config:
            name = f"{prefix}{key!s}"
            node = config._get_node(key)
            if isinstance(node, DictConfig) and is_section(node):
                walk(node, f"{name}.")
            else:
                values[name] = _values_in_words(node)

    walk(schema_of(root), "")
    return values


MEASUREMENTS = "measurements"  # valid values of a list that `launcher calibrate` writes
# The valid values of the open dictionaries. The user chooses their keys.
ENTRIES = {
    "data.sources": "text",
    "data.weights": "number",
    "data.validation_sources": "text",
    **{f"hardware.card.shapes.{dtype}": "number" for dtype in ("fp32", "bf16", "fp16")},
    "slurm.environment": "text",
}


def kind_of_entry(name: str) -> str | None:
    """Return the valid values of an entry of an open dictionary, or None if `name` is not such an entry."""
    return ENTRIES.get(name.rpartition(".")[0])


def is_section(node: DictConfig) -> bool:
    """Return whether `node` is a dataclass with fields, not an open dictionary."""
    return node._metadata.object_type not in (dict, None)


def closest_fields(name: str, root: type[Any]) -> list[str]:
    """Return up to two groups or fields whose names are close to a misspelt name."""
    name = re.sub("[:/]", ".", name.partition("@")[0])
    section, _, leaf = name.rpartition(".")
    fields = fields_of(root)
    sections = {field.rpartition(".")[0] for field in fields} - {""}
    same_leaf = [field for field in fields if _leaf(field) == leaf]
    if name in fields or same_leaf:
        return [name] if name in fields else same_leaf[:2]
    if section in sections:
        inner = [field.removeprefix(f"{section}.") for field in fields_in(section, root)]
        return [f"{section}.{close}" for close in get_close_matches(leaf, inner, n=2)]
    if not section and (close := get_close_matches(name, [*groups_of(root), *sections], n=1)):
        return close
    leaves = {_leaf(field) for field in fields}
    # batch_size is a short form of micro_batch_size, although it is closer to patch_size.
    longer = {known for known in leaves if known.endswith(f"_{leaf}")}
    close = get_close_matches(leaf, longer or leaves, n=2)
    return [field for match in close for field in fields if _leaf(field) == match][:2]


def _leaf(field: str) -> str:
    return field.rpartition(".")[2]


def fields_in(section: str, root: type[Any]) -> list[str]:
    """Return the fields of a section such as `model`, or an empty list for an empty section name."""
    return [field for field in fields_of(root) if field.startswith(f"{section}.")] if section else []


def _values_in_words(node: Any) -> str:
    reference = node._metadata.ref_type
    if isinstance(node, ListConfig):
        name = "list" if node._metadata.element_type is str else MEASUREMENTS
    elif isinstance(node, DictConfig):
        name = "dictionary"
    elif isinstance(reference, type) and issubclass(reference, Enum):
        name = " | ".join(reference.__members__)
    else:
        name = {int: "whole number", float: "number", bool: "true | false"}.get(reference, "text")
    return f"{name} | null" if node._metadata.optional else name
