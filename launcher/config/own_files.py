"""Explain usual mistakes in files of a --config-dir, most of them in defaults lists, with lines to write.

All functions are pure.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from launcher.config.errors import ConfigError
from launcher.config.fields import fields_of, groups_of

_GLOBAL = "# @package _global_"


def explain_file(text: str, root: type[Any]) -> ConfigError | None:
    """Return the error about a mistake in a file, by Hydra's message; None if it is about something else."""
    for pattern, explanation in _MISTAKES:
        if (match := re.search(pattern, text)) and (error := explanation(match, root)):
            return error
    return None


def no_such_field_in(file: str, name: str, value: str | None, root: type[Any]) -> ConfigError | None:
    """Return the error if a name in a config file shows a usual mistake; None if it is only misspelt."""
    section, _, leaf = name.rpartition(".")
    if name == file.partition("/")[0] or name in ("global", "_global_"):
        why = f"no such field: {file}.yaml is read as part of {name!r}, because its first line is missing"
        return ConfigError(name, value, why, f"{_GLOBAL} as the first line of {file}.yaml")
    if name in ("default", "override") or name.startswith("override "):
        return _mistake(file, f"{name!r} is no field", "defaults:", f"- override /{_a_group(root)}: OPTION")
    if section and name in fields_of(root):
        why = f"a dot in the name {name!r} does not make a section in a file"
        line = f"{leaf}: VALUE"
        for part in reversed(section.split(".")):
            line = f"{part}: {{{line}}}"
        return _mistake(file, why, line)
    return None


def _mistake(file: str, why: str, *lines: str) -> ConfigError:
    return ConfigError(f"{file}.yaml", None, why, " and ".join(f"`{line}`" for line in lines))


def _a_group(root: type[Any]) -> str:
    return "model" if "model" in groups_of(root) else "GROUP"


def _entry_not_found(match: re.Match[str], root: type[Any]) -> ConfigError | None:
    file, target = match[1], match[2]
    folder = file.rpartition("/")[0]
    if not folder or not target.startswith(f"{folder}/"):
        return None  # an option of the command line, or of a group that is overridden
    entry = target.removeprefix(f"{folder}/").removeprefix("override").strip(" /")
    group, _, option = entry.replace(" ", "/", 1).partition("/")
    if group in groups_of(root) and option:
        why = f"the entry {entry!r} of its defaults list must say that it overrides the group {group}"
        return _mistake(file, why, f"- override /{group}: {option.removesuffix('.yaml')}")
    why = f"its defaults list names {target}.yaml, and no such file exists"
    line = f"- override /{_a_group(root)}: {entry}"
    return ConfigError(f"{file}.yaml", None, why, f"`- NAME` of a file in {folder}/, or `{line}` for a group")


def _second_option(match: re.Match[str], root: type[Any]) -> ConfigError | None:
    group, option = match[1], match[2]
    line = f"- {option}" if group == "experiment" else f"- override /{group}: {option}"
    why = f"the entry for {option!r} adds a second option of the group {group}"
    return ConfigError("defaults list", None, why, f"`{line}` in your file")


def _cannot_override(match: re.Match[str], root: type[Any]) -> ConfigError | None:
    file, target = match[1], match[2]
    folder, (path, _, package) = file.rpartition("/")[0], target.partition("@")
    if package.startswith(f"{folder}.") and path in groups_of(root):
        why = "it overrides a group, and its first line is missing"
        return _mistake(file, why, _GLOBAL)
    group = path.removeprefix(f"{folder}/")
    if group in groups_of(root):
        why = f"the group {group} needs a / in front"
        return _mistake(file, why, f"- override /{group}: OPTION")
    return None


def _not_last(match: re.Match[str], root: type[Any]) -> ConfigError:
    why = "an entry with `override` stands before another entry of the defaults list"
    line = f"- override /{match[2].strip('/')}: {match[3]}"
    return ConfigError(f"{match[1]}.yaml", None, why, f"`{line}` as the last line of the defaults list")


def _no_list(match: re.Match[str], root: type[Any]) -> ConfigError:
    why = "its defaults are no list: each entry needs - in front"
    group = match[1].rpartition("/")[0]
    is_option = group in groups_of(root) and group != "experiment"
    return _mistake(match[1], why, "- OPTION" if is_option else f"- override /{_a_group(root)}: OPTION")


def _two_entries(match: re.Match[str], root: type[Any]) -> ConfigError:
    entries = ast.literal_eval(match[2]) if match[2].endswith("}") else {}
    lines = [f"- {name}: {option}" for name, option in entries.items()] or ["- GROUP: OPTION"]
    return _mistake(match[1], "an entry of its defaults list names several groups", *lines)


def _two_selfs(match: re.Match[str], root: type[Any]) -> ConfigError:
    return ConfigError(f"{match[1]}.yaml", None, "its defaults list names _self_ twice", "`- _self_` once")


def _no_section(match: re.Match[str], root: type[Any]) -> ConfigError:
    """Return the error about text or a list where a section of fields is expected."""
    file, kind, value = match[1], match[2], match[4]
    section = _sections(root).get(f"{match[3]}Config", "SECTION")
    if kind == "str" and section in groups_of(root):
        why = f"{section} is a section of fields; an option of a group belongs into the defaults list"
        return _mistake(file, why, "defaults:", f"- override /{section}: {value}")
    pairs = re.findall(r"'(\w+)': ([^,{}\[\]]+)", value)
    values = ", ".join(f"{name}: {item.strip()}" for name, item in pairs) or "FIELD: VALUE"
    why = f"{section} is a section of fields, not {'a list' if kind == 'list' else 'one value'}"
    is_option = file.startswith(f"{section}/")  # whose fields are those of the section
    return _mistake(file, why, values if is_option else f"{section}: {{{values}}}")


def _sections(root: type[Any], prefix: str = "") -> dict[str, str]:
    """Return the dotted section of each class of fields, by the name of the class."""
    hints = get_type_hints(root)
    sections: dict[str, str] = {}
    for field in fields(root):
        kind, name = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(kind):
            sections |= {kind.__name__: name} | _sections(kind, f"{name}.")  # type: ignore[arg-type,union-attr]
    return sections


def _no_mapping(match: re.Match[str], root: type[Any]) -> ConfigError:
    why = "the file is a list, and must be fields: NAME: VALUE, without - in front"
    return _mistake(match[1], why, "training: {steps: VALUE}")


# Patterns in Hydra's messages, with their explanations. The first explanation that fits is used.
_MISTAKES: tuple[tuple[str, Callable[[re.Match[str], type[Any]], ConfigError | None]], ...] = (
    (r"In '([^']+)': Could not (?:find|load) '([^']+)'", _entry_not_found),
    (r"Multiple values for ([\w/]+)\. To override a value use 'override [^:']+: ([^']+)'", _second_option),
    (r"In '([^']+)': Could not override '([^']+)'", _cannot_override),
    (r"In '?([^':]+)'?: Override '([^' ]+) : ([^']+)' is defined before", _not_last),
    (r"Invalid defaults list in '([^']+)'", _no_list),
    (r"In '?([^':]+)'?: Too many keys in default item (.*)", _two_entries),
    (r"Duplicate _self_ defined in (\S+)", _two_selfs),
    (r"In '([^']+)':[^\n]*\nMerge error: (\w+) is not a subclass of (\w+)Config\. value: (.*)", _no_section),
    (r"In '([^']+)':[^\n]*\nCannot merge DictConfig with ListConfig\n +full_key: \n", _no_mapping),
)
