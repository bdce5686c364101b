"""Refuse values that YAML or Hydra reads as something other than what the user wrote.

YAML 1.1 reads `time: 24:00:00` as 86400, `account: 0123` as 83 and `partition: no` as false. A text field
accepts a number or a boolean only if its text is exactly what was written.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from omegaconf import ListConfig, OmegaConf

from launcher.config.errors import ConfigError, quoted_setting, typed_text
from launcher.config.fields import fields_of, kind_of_entry, schema_of
from launcher.config.secrets import is_secret_name
from launcher.config.strict import bounded_loader

_NULLS = ("", "~", "null")
_SWEEP_VALUES = "hydra.sweeper.params."
_ONE_TEXT = "this field is one text, not a list"
# YAML 1.1 reads these as octal and as base 60.
_STRANGE_NUMBER = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)")


@dataclass(frozen=True)
class _Scalar:
    """A value of a YAML file: its dotted field, the text as written, and the value that YAML reads."""

    field: str
    node: yaml.ScalarNode
    value: object
    items: Sequence[str]  # all items of the list that contains the value, as written; else empty

    @property
    def is_changed(self) -> bool:
        if self.value is None:
            return self.node.value not in _NULLS
        return not isinstance(self.value, str) and str(self.value) != self.node.value


def check_file(path: Path, package: str, root: type[Any], replaced: Collection[str]) -> dict[str, str]:
    """Check a config file whose values belong below `package`; return texts for enums that YAML misread.

    YAML reads `spike: off` as false, although `off` is a member of the enum. `replaced` are the fields that
    the command line sets. Raises ConfigError.
    """
    with path.open(encoding="utf-8") as file:
        loader = bounded_loader()(file)
        try:
            document = loader.get_single_node()
            scalars = list(_scalars(document, f"{package}." if package else "", loader, path, root))
        finally:
            loader.dispose()
    members: dict[str, str] = {}
    for scalar in scalars:
        kind = _kind_of(scalar.field, root)
        if not scalar.is_changed or scalar.field in replaced:
            continue
        if is_secret_name(scalar.field.rpartition(".")[2]):
            continue  # refused later, by a message without the value
        if kind == "text":
            raise _misread_text(scalar, path)
        if kind == "enum":
            members[scalar.field] = scalar.node.value
        elif _STRANGE_NUMBER.fullmatch(scalar.node.value):
            raise _misread_number(scalar, path)
    return members


def _scalars(
    node: Any, prefix: str, loader: Any, path: Path, root: type[Any], items: Sequence[str] = ()
) -> Iterator[_Scalar]:
    """Yield the values below `node`; `items` are the values of the list that contains it."""
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        for key, value in node.value:
            if not isinstance(loader.construct_object(key), str):
                why = f"YAML does not read this name as text (line {key.start_mark.line + 1} of {path})"
                raise ConfigError(f"{prefix}{key.value}", None, why, f"{_in_yaml(key.value)}: VALUE")
            yield from _scalars(value, f"{prefix}{key.value}.", loader, path, root)
    elif isinstance(node, yaml.SequenceNode):
        plain = [item.value for item in node.value if isinstance(item, yaml.ScalarNode)]
        if is_text(field := prefix.removesuffix("."), root):
            why = f"{_ONE_TEXT} (line {node.start_mark.line + 1} of {path})"
            in_file = f"{field.rpartition('.')[2]}: {_in_yaml(','.join(plain))} (in the file)"
            raise ConfigError(field, f"[{', '.join(plain)}]", why, in_file)
        for item in node.value:
            yield from _scalars(item, prefix, loader, path, root, plain)
    elif isinstance(node, yaml.ScalarNode):
        yield _Scalar(prefix.removesuffix("."), node, loader.construct_object(node), items)


def is_text(field: str, root: type[Any]) -> bool:
    return (fields_of(root).get(field) or kind_of_entry(field) or "").removesuffix(" | null") == "text"


def _kind_of(field: str, root: type[Any]) -> str:
    """Return `text` for a text field, an item of a list of text, or an entry of text; `enum`; or `other`."""
    name = field.removeprefix(_SWEEP_VALUES)
    kind = (fields_of(root).get(name) or kind_of_entry(name) or "").removesuffix(" | null")
    if kind == "list":
        node = OmegaConf.select(schema_of(root), name)
        return "text" if isinstance(node, ListConfig) and node._metadata.element_type is str else "other"
    if kind == "dictionary":
        return kind_of_entry(f"{name}.") or "other"
    return "enum" if " | " in kind and kind != "true | false" else kind


def _misread_text(scalar: _Scalar, path: Path) -> ConfigError:
    written, field = scalar.node.value, scalar.field
    line, read = scalar.node.start_mark.line + 1, _in_words(scalar.value)
    why = f"YAML reads this text as {read}: quote it (line {line} of {path})"
    in_file = _in_yaml(written) if scalar.items else f"{field.rpartition('.')[2]}: {_in_yaml(written)}"
    typed = _typed_list(field, scalar.items) if scalar.items else typed_text(field, written)
    if field.startswith(_SWEEP_VALUES):
        return ConfigError(field, written, why, in_file)
    return ConfigError(field, written, why, f"{in_file} (in the file) or {typed} (on the command line)")


def _misread_number(scalar: _Scalar, path: Path) -> ConfigError:
    written, line = scalar.node.value, scalar.node.start_mark.line + 1
    base = "base 60" if ":" in written else "octal"
    why = f"YAML reads this number in {base}, as {scalar.value} (line {line} of {path})"
    meant = scalar.value if ":" in written else int(written.replace("_", ""))
    name = scalar.field.rpartition(".")[2]
    remedy = f"{name}: {meant} (in the file) or {scalar.field}={meant} (on the command line)"
    return ConfigError(scalar.field, written, why, remedy)


def _in_words(value: object) -> str:
    if value is None:
        return "no value"
    return f"the {'boolean' if isinstance(value, bool) else 'number'} {str(value).lower()}"


def _in_yaml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _typed_list(field: str, items: Sequence[str]) -> str:
    return quoted_setting(field, "[" + ", ".join(map(_in_yaml, items)) + "]")


def check_typed(overrides: list[Override], root: type[Any]) -> None:
    """Raise ConfigError for text on the command line that Hydra reads as another number, such as 1e3."""
    for override in overrides:
        name, typed = override.key_or_group, (override.input_line or "").partition("=")[2]
        if override.is_delete() or _kind_of(name, root) != "text":
            continue
        value = override.value()
        if isinstance(value, list) and is_text(name, root):
            # Slurm writes alternatives as [a100|h100].
            text = typed if re.search(r"[|&*]", typed) else ",".join(map(_as_text, value))
            raise ConfigError(name, typed, _ONE_TEXT, typed_text(name, text))
        is_several = isinstance(value, list | dict | ChoiceSweep)
        words = re.split(r"[\s\[\]{}(),:]+", _QUOTED.sub(" ", typed)) if is_several else [typed.strip()]
        written, read = Counter(words), Counter(map(_as_text, _numbers_in(value)))
        if changed := [text for text, count in read.items() if count > written[text]]:
            why = f"Hydra reads this text as {changed[0]}: quote it"
            remedy = quoted_setting(name, _all_quoted(typed)) if is_several else typed_text(name, typed)
            raise ConfigError(name, typed, why, remedy)


_QUOTED = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'")


def _as_text(value: object) -> str:
    return "null" if value is None else value.text if isinstance(value, QuotedString) else str(value)


def _numbers_in(value: object) -> Iterator[object]:
    """Yield each number, boolean and null of a value that Hydra has parsed."""
    value = value.list if isinstance(value, ChoiceSweep) else value
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers_in(item)
    elif value is None or isinstance(value, int | float):
        yield value


def _all_quoted(typed: str) -> str:
    """Return the list, dictionary or sweep with quotes around each word that Hydra reads as a number."""
    pieces = re.split(rf"({_QUOTED.pattern}|[\s\[\]{{}}(),:]+)", typed)
    parser = OverridesParser.create()

    def quoted(word: str) -> str:
        if not re.fullmatch(r"[\w.+-]+", word):
            return word
        value = parser.parse_override(f"x={word}").value()
        return word if isinstance(value, str) or _as_text(value) == word else f'"{word}"'

    return "".join(map(quoted, pieces))
