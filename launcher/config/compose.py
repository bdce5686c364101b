"""Hydra's composition, with each of its errors turned into one ConfigError."""

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher.config.errors import ConfigError
from launcher.config.schema import GenerateConfig, RunConfig, register_schema

Config = TypeVar("Config", RunConfig, GenerateConfig)


def config_directory() -> Path:
    """conf/: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def run_hydra(
    config_name: str, root: type[Config], arguments: list[str], task: Callable[[Config], None]
) -> None:
    """Compose `config_name` from command-line `arguments` and hand the typed object to `task`.

    Hydra's own flags (--help, --cfg job, --multirun, --config-dir ...) do what they do in any Hydra
    application. Raises ConfigError for whatever cannot be composed; what `task` raises passes through.
    """
    register_schema()
    # Hydra would otherwise print its errors itself and exit with 1; it offers no other switch.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["launcher", *(_addable(argument) for argument in arguments)]
    failures: list[BaseException] = []

    def typed_task(composed: DictConfig) -> None:
        # Kept, not raised: Hydra would print a line of its own about every exception of a task.
        if failures:
            return
        try:
            task(to_typed(composed, root))
        except BaseException as failure:
            failures.append(failure)

    main = hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=config_name)(
        typed_task
    )
    try:
        main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error, root) from None
    if failures:
        raise failures[0]


def _addable(argument: str) -> str:
    """`deepspeed` is the one open dictionary: its keys need no `+`."""
    return f"++{argument}" if argument.startswith("deepspeed.") else argument


def multirun_index() -> int | None:
    """Which job of a --multirun this is, or None in a single run."""
    if not HydraConfig.initialized():
        return None
    hydra_config = HydraConfig.get()
    return (
        int(hydra_config.job.num)
        if hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
        else None
    )


def to_typed(composed: DictConfig, root: type[Config]) -> Config:
    """The dataclasses behind a composed config. Raises ConfigError for a value missing or a key unknown."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(
            missing[0], "???", "has no value", f"{missing[0]}=<{fields_of(root).get(missing[0], 'value')}>"
        )
    _refuse_unknown(composed, OmegaConf.structured(root), "", root)
    typed = OmegaConf.to_object(composed)
    assert isinstance(typed, root)
    return typed


def _refuse_unknown(config: DictConfig, schema: DictConfig, prefix: str, root: type[Any]) -> None:
    # Hydra's `+key=value` adds keys that the schema does not have.
    for key in config:
        name = f"{prefix}{key!s}"
        if key not in schema.keys():  # noqa: SIM118  (`in schema` is false for a mandatory value)
            raise _no_such_field(name, str(config[key]), root)
        node, inner = config._get_node(key), schema._get_node(key)
        if isinstance(node, DictConfig) and isinstance(inner, DictConfig) and _is_dataclass_node(inner):
            _refuse_unknown(node, inner, f"{name}.", root)


def _is_dataclass_node(node: DictConfig) -> bool:
    return node._metadata.object_type not in (dict, None)


def load_typed(path: Path, root: type[Config]) -> Config:
    """Read a composed config that a run wrote (run.dir/config.yaml). Raises ConfigError if it cannot be."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(root), OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(
            "run.dir", path.parent, f"{path.name} is not a run's config: {error}", "a run's directory"
        ) from None
    assert isinstance(merged, DictConfig)
    return to_typed(merged, root)


def explain(error: Exception, root: type[Any]) -> ConfigError:
    """Hydra's or omegaconf's exception as field, value, why and the nearest that works."""
    text = f"{error}\n{error.__cause__ or ''}"
    override = re.search(r"(?:Could not override|rror merging override) '([^'\n]+)'", text)
    key = re.search(r"full_key: (\S+)", text)
    if option := re.search(r"(?:Could not find|Could not load) '([^']+)'", text):
        return _no_such_option(option[1], text)
    if isinstance(error, OverrideParseException) or "No match in the defaults list" in text:
        typed = override[1] if override else getattr(error, "override", "")
        return _unreadable(typed, root)
    if "is not in struct" in text or re.search(r"Key '[^']+' not in", text):
        name, _, value = (override[1] if override else key[1] if key else "").partition("=")
        return _no_such_field(name.lstrip("+~"), value or None, root)
    if key and key[1] in fields_of(root):
        value = re.search(r"[Vv]alue '(.*?)'", text)
        kind = fields_of(root)[key[1]]
        return ConfigError(
            key[1], value[1] if value else "null", f"not of the type <{kind}>", f"{key[1]}=<{kind}>"
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return ConfigError("command line", None, first, _QUOTING)


_QUOTING = "GROUP=OPTION or a.b=VALUE, quoted where it has spaces or commas: 'a.b=\"x, y\"'"


def _unreadable(typed: str, root: type[Any]) -> ConfigError:
    name, equals, value = typed.partition("=")
    if not equals or not name.strip("+~") or name.lstrip("+~") in fields_of(root):
        return ConfigError(typed or "command line", None, "cannot be read as an override", _QUOTING)
    return _no_such_field(name.lstrip("+~"), value, root)


def _no_such_option(name: str, text: str) -> ConfigError:
    group, _, option = name.rpartition("/")
    options = sorted(set(re.findall(r"^\t(\S+)$", text, re.MULTILINE)))
    close = difflib.get_close_matches(option, options, n=2) or options
    return ConfigError(
        group or "config",
        option,
        "no such option",
        " or ".join(f"{group}={o}" for o in close) or "launcher --help",
    )


def _no_such_field(name: str, value: str | None, root: type[Any]) -> ConfigError:
    fields = fields_of(root)
    groups = sorted(
        {field.split(".")[0] for field in fields} | ({"experiment"} if root is RunConfig else set())
    )
    same_leaf = [field for field in fields if field.split(".")[-1] == name.split(".")[-1]]
    candidates = [*fields, *groups] if "." in name else [*groups, *(field.split(".")[-1] for field in fields)]
    close = difflib.get_close_matches(name, candidates, n=2, cutoff=0.6)
    full = [next((f for f in fields if f.split(".")[-1] == c and c not in groups), c) for c in close]
    return ConfigError(
        name, value, "no such field", " or ".join(same_leaf[:2] or full) or "one that `launcher --help` lists"
    )


def fields_of(root: type[Any]) -> dict[str, str]:
    """Every field a user can set, as dotted name -> its legal values in words."""
    found: dict[str, str] = {}

    def walk(config: DictConfig, prefix: str) -> None:
        for key in config:
            name = f"{prefix}{key!s}"
            node = config._get_node(key)
            if isinstance(node, DictConfig) and _is_dataclass_node(node):
                walk(node, f"{name}.")
            else:
                found[name] = _kind(node)

    walk(OmegaConf.structured(root), "")
    return found


def _kind(node: Any) -> str:
    reference = node._metadata.ref_type
    members = getattr(reference, "__members__", None)
    if members:
        return " | ".join(members)
    name = {int: "whole number", float: "number", bool: "true | false", str: "text"}.get(reference, "value")
    return f"{name} | null" if node._metadata.optional else name
