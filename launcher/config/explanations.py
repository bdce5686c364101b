"""Translate Hydra's and omegaconf's exceptions into ConfigErrors."""

import difflib
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from launcher.config.errors import ConfigError, hydra_text, quoted_setting, settings, typed_text
from launcher.config.fields import (
    ENTRIES,
    MEASUREMENTS,
    closest_fields,
    fields_in,
    fields_of,
    groups_of,
    kind_of_entry,
    options_of,
    schema_of,
)
from launcher.config.numbers import BOUNDS
from launcher.config.own_files import explain_file, no_such_field_in

# Hydra and OmegaConf raise Python's own errors for some input, such as an AssertionError for model=[1].
COMPOSITION_ERRORS = (
    HydraException, OmegaConfBaseException, yaml.YAMLError, ArithmeticError, AssertionError, AttributeError,
    LookupError, OSError, RecursionError, TypeError, ValueError,
)  # fmt: skip

_SHAPE = "GROUP=OPTION or a.b=VALUE"
_VERBS = {
    name.capitalize(): f"{name} " for name in ("calibrate", "evaluate", "generate", "prepare", "replay")
} | {"Exchange": "export "}


@dataclass(frozen=True)
class _Failure:
    """A composition that failed."""

    text: str  # message of the exception and of its cause
    root: type[Any]  # the schema
    overrides: list[str]  # of the command line

    @property
    def file(self) -> str | None:
        """Return the file with the error, without .yaml, or None if the error is on the command line."""
        match = re.search(r"^In '([^']+)':", self.text)
        return match[1] if match else None

    def value_of(self, name: str) -> str | None:
        """Return the last value of `name` on the command line, or None."""
        values = [_split(override)[1] for override in self.overrides if _split(override)[0] == name]
        return values[-1] if values else None


def explain(error: Exception, root: type[Any], overrides: list[str]) -> ConfigError:
    """Return the ConfigError that explains `error`; `overrides` are the overrides of the command line."""
    failure = _Failure(f"{error}\n{error.__cause__ or ''}", root, overrides)
    if isinstance(error, OverrideParseException):
        return _unreadable(_first_unreadable(overrides), root)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        line = error.problem_mark.line + 1
        why = f"line {line} is not valid YAML: {error.problem}"
        return ConfigError(error.problem_mark.name, None, why, f"correct line {line}")
    if not _is_typed_twice(failure) and (mistake := explain_file(failure.text, root)):
        return mistake
    for pattern, explanation in _EXPLANATIONS:
        if match := re.search(pattern, failure.text):
            # The message of an interpolation error names the field, but the field's type is not the problem.
            if explanation is _wrong_field and isinstance(error, InterpolationResolutionError):
                return _dead_interpolation(match[1], failure)
            return explanation(match, failure)
    return ConfigError("command line", None, _first_line(failure), _SHAPE)


def _is_typed_twice(failure: _Failure) -> bool:
    """Return whether an option is added by + on the command line, and not by a file."""
    match = re.search(r"Multiple values for ([^ .]+)", failure.text)
    return match is not None and failure.value_of(match[1]) is not None


def missing_value(name: str, root: type[Any], overrides: list[str]) -> ConfigError:
    """Return the error about a field without a value, or about the removal of its group."""
    options = settings(group := name.partition(".")[0], options_of(group))
    if any(_split(override)[0] == group for override in overrides if override.startswith("~")):
        return ConfigError(f"~{group}", None, f"the group {group} cannot be removed", " or ".join(options))
    chosen = [value for typed, value in map(_split, overrides) if typed == group]
    if chosen and chosen[-1] not in options_of(group):  # a file of the user with a part of the fields
        file, base = f"{group}/{chosen[-1]}.yaml", min(options_of(group), key=lambda name: "tiny" not in name)
        why = f"this field must be set, and {file} does not set it"
        remedy = f"begin {file} with the line `defaults: [{base}]` (or another of the shipped ones)"
        return ConfigError(name, "???", why, remedy)
    return ConfigError(name, "???", "this field must be set", " or ".join([_example(name, root), *options]))


def _example(field: str, root: type[Any]) -> str:
    """Return a setting of a field with its default, or with examples if it has no default."""
    kind = fields_of(root).get(field) or kind_of_entry(field) or "VALUE"
    default = OmegaConf.select(schema_of(root), field)
    examples = {"text": ["TEXT"], "number": ["1"]}.get(kind) or kind.split(" | ")
    examples = [BOUNDS[field].example] if field in BOUNDS else examples
    return " or ".join(settings(field, [default] if default is not None or "null" in kind else examples))


def no_such_field(name: str, value: str | None, root: type[Any], file: str | None = None) -> ConfigError:
    """Return the error about a name, on the command line or in `file`.yaml, that is not a field."""
    if file and (mistake := no_such_field_in(file, name, value, root)):
        return mistake
    remedies = [_with_value(field, value) for field in closest_fields(name, root)]
    if not remedies and (known := fields_in(name.rpartition(".")[0], root)):
        names = ", ".join(field.rpartition(".")[2] for field in known)
        remedies = [f"{known[0].rpartition('.')[0]}.NAME, where NAME is one of {names}"]
    verb = _VERBS.get(root.__name__.removesuffix("Config"), "")
    flag = "--hydra-help" if name.partition(".")[0] == "hydra" else f"{verb}--help"
    remedy = " or ".join(remedies) or f"a name that `launcher {flag}` lists"
    return ConfigError(name, value, f"no such field{_in(file)}", remedy)


def _ambiguous(match: re.Match[str], failure: _Failure) -> ConfigError:
    name, value = _split(match[1])
    kind = (fields_of(failure.root).get(name) or kind_of_entry(name) or "").removesuffix(" | null")
    single, several = f"{name}={value.partition(',')[0]}", value
    if kind == "text":
        single = typed_text(name, value)
    elif kind == "list":
        single, several = quoted_setting(name, f"[{value}]"), f"[{value}],[]"
    why = "a comma separates several values, which only --multirun accepts"
    return ConfigError(name, value, why, f"{single} or --multirun {quoted_setting(name, several)}")


def _no_such_option(match: re.Match[str], failure: _Failure) -> ConfigError:
    listed = re.findall(r"^\t(\w\S*)$", failure.text, re.MULTILINE)
    group, _, option = match[1].partition("/")
    name = option.rpartition("/")[2].removesuffix(".yaml")
    if "/" in option and group in groups_of(failure.root):
        why = f"an option is the name of a file in {group}/, without directories and .yaml"
        options = [name] if name in listed else sorted(listed)
        return ConfigError(group, option, why, " or ".join(settings(group, options)))
    group, _, option = match[1].rpartition("/")
    return not_an_option(group or "config", option, listed)


def _option_of_another_type(match: re.Match[str], failure: _Failure) -> ConfigError:
    for name in groups_of(failure.root):
        if (value := failure.value_of(name)) is not None:
            return not_an_option(name, value, options_of(name))
    return ConfigError("command line", None, "a setting needs a name, = and a value", _SHAPE)


def not_an_option(group: str, option: str, options: list[str]) -> ConfigError:
    """Return the error about a value of a group that is none of its options."""
    longer = [name for name in options if option and name.startswith(option)]
    close = longer or difflib.get_close_matches(option, options, n=2)
    remedies = settings(group, close or sorted(options))
    if not close and group == "hardware":  # `launcher calibrate` writes such files
        remedies.append(f"--config-dir=DIRECTORY, if your file is DIRECTORY/hardware/{option}.yaml")
    remedy = " or ".join(remedies) or "a name that `launcher --help` lists"
    return ConfigError(group, option, "no such option", remedy)


def _no_directory(match: re.Match[str], failure: _Failure) -> ConfigError:
    return ConfigError("--config-dir", match[1], "no such directory", "--config-dir=DIRECTORY of your files")


def _no_config(match: re.Match[str], failure: _Failure) -> ConfigError:
    return ConfigError("--config-name", match[1], "no such config", "leave --config-name out")


def _chosen_twice(match: re.Match[str], failure: _Failure) -> ConfigError:
    name = match[1] or match[2]
    value = failure.value_of(name)
    why = "an option of this group is already selected, and + would add a second one"
    return ConfigError(f"+{name}", value, why, _with_value(name, value))


def _endless(match: re.Match[str], failure: _Failure) -> ConfigError:
    why = "a file or a value refers to itself, or brackets are too deep"
    return ConfigError("command line", None, why, "a defaults list without a circle")


def _set_already(match: re.Match[str], failure: _Failure) -> ConfigError:
    name, value = match[1], failure.value_of(match[1])
    why = "the field exists, and + only adds new keys to a dictionary"
    return ConfigError(f"+{name}", value, why, _with_value(name, value))


def _cannot_remove(match: re.Match[str], failure: _Failure) -> ConfigError:
    name = next((_split(override)[0] for override in failure.overrides if override.startswith("~")), "")
    kind = fields_of(failure.root).get(name)
    if kind is None:
        remedy = " or ".join(closest_fields(name, failure.root)) or "leave it out"
        return ConfigError(f"~{name}", None, "no such field", remedy)
    return ConfigError(f"~{name}", None, "a field can be set, not removed", _example(name, failure.root))


def _no_such_group(match: re.Match[str], failure: _Failure) -> ConfigError:
    return no_such_field(match[1], failure.value_of(match[1]), failure.root, failure.file)


def _no_such_key(match: re.Match[str], failure: _Failure) -> ConfigError:
    # omegaconf's message has only the part of the name up to the unknown key; the command line has all of it.
    names = (name for name, _ in map(_split, failure.overrides))
    name = next((name for name in names if f"{name}.".startswith(f"{match[1]}.")), match[1])
    return no_such_field(name, failure.value_of(name), failure.root, failure.file)


def _dead_interpolation(field: str, failure: _Failure) -> ConfigError:
    why = _first_line(failure).partition("raised while resolving interpolation: ")
    remedy = _example(field, failure.root)
    return ConfigError(field, failure.value_of(field), (why[2] or why[0]).strip('"'), remedy)


def _whole_name(end: str, fields: Iterable[str]) -> str | None:
    """Return the field or entry of an open dictionary whose full name ends with `end`, or None."""
    section, _, key = end.rpartition(".")
    entries = [f"{name}.{key}" for name in ENTRIES if section and f".{name}".endswith(f".{section}")]
    return next((name for name in (*fields, *entries) if f".{name}".endswith(f".{end}")), None)


def _wrong_field(match: re.Match[str], failure: _Failure) -> ConfigError:
    """Return the error about an existing field with a value of the wrong type."""
    fields = fields_of(failure.root)
    field = _whole_name(match[1].partition("[")[0], fields) or match[1]  # a list's item is named `tags[1]`
    for name, value in map(_split, failure.overrides):
        if name.startswith(f"{field}.") and field in fields:
            return _below_field(name, value, field, fields[field])
    quoted = re.search(r"merging override [^=]+=([^\n]*)", failure.text)
    quoted = quoted or re.search(r"[Vv]alue '(.*?)'", failure.text)
    unset = "null" if "is not Optional" in failure.text else ""
    value = quoted[1] if quoted else failure.value_of(field) or unset
    if field not in fields and not kind_of_entry(field):
        inner = [_example(name, failure.root) for name in fields_in(field, failure.root)[:2]]
        why = "this is a section of fields, which has no value itself"
        remedy = " or ".join(inner) or f"{field}.NAME=VALUE"
        if field == "run":
            remedy = quoted_setting("run.dir", value)
        return ConfigError(field, value or None, why, remedy)
    kind = fields.get(field) or kind_of_entry(field) or ""
    why = f"must be {_IN_WORDS.get(kind.removesuffix(' | null'), f'one of {kind}')}{_in(failure.file)}"
    return ConfigError(field, value, why, _nearest_value(field, value, kind, failure.root))


def _below_field(name: str, value: str, field: str, kind: str) -> ConfigError:
    """Return the error about a name that begins with the name of a field, such as an item of its list."""
    if kind not in ("list", MEASUREMENTS):
        return ConfigError(name, value, f"{field} is a field, not a section", quoted_setting(field, value))
    why = f"{field} is a list, and an item of a list cannot be set alone"
    remedy = _CALIBRATED if kind == MEASUREMENTS else quoted_setting(field, f"[{value}]")
    return ConfigError(name, value, why, remedy)


_KEY = r"\n +full_key: (\S+)"

# Patterns in the messages of Hydra and omegaconf, with their explanations. The first match is used.
_EXPLANATIONS: tuple[tuple[str, Callable[[re.Match[str], _Failure], ConfigError]], ...] = (
    (r"maximum recursion depth", _endless),
    (r"Ambiguous value for argument '(.+)'", _ambiguous),
    (r"(?:Could not find|Could not load) '([^']+)'", _no_such_option),
    (r"Config group override must be", _option_of_another_type),
    (r"config directory '(.+)' not found", _no_directory),
    (r"primary config '([^']*)'", _no_config),
    (r"(\S+) appears more than once|Multiple values for ([^ .]+)", _chosen_twice),
    (r"An item is already at '([^']+)'", _set_already),
    (r"Could not delete|does not support deletion", _cannot_remove),
    (rf"(?:is not in struct|Key '[^']+' not in [^\n]+){_KEY}", _no_such_key),
    (r"Could not override '([^']+)'", _no_such_group),
    (_KEY, _wrong_field),
)

_CALIBRATED = "a hardware file that `launcher calibrate` writes"
_IN_WORDS = {
    "whole number": "a whole number",
    "number": "a number",
    "true | false": "true or false",
    "text": "text",
    "list": "a list of text",
    MEASUREMENTS: "a list of measurements",
    "dictionary": "a dictionary",
}


def _nearest_value(field: str, value: str, kind: str, root: type[Any]) -> str:
    accepted = kind.removesuffix(" | null")
    if accepted == MEASUREMENTS:
        return _CALIBRATED
    if accepted == "whole number" and re.fullmatch(r"[-+]?\d+\.?\d*(?:[eE][-+]?\d{1,2})?", value):
        number = float(value)
        return " or ".join(settings(field, dict.fromkeys([int(number // 1), int(-(-number // 1))])))
    if accepted in ("whole number", "number") and (plain := _without_unit(field, value, accepted)):
        return f"{field}={plain}"
    if accepted not in _IN_WORDS or accepted == "true | false":
        options = kind.split(" | ")
        return " or ".join(settings(field, difflib.get_close_matches(value.lower(), options, n=1) or options))
    example = {"list": "[a, b]", "dictionary": "{KEY: VALUE}"}.get(accepted)
    return shlex.quote(f"{field}={example}") if example else _example(field, root)


_COUNTS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BYTES = (
    {"b": 1.0}
    | {f"{unit}b": factor for unit, factor in _COUNTS.items()}
    | {
        f"{unit}{end}": 1024.0**power
        for power, unit in enumerate(("k", "m", "g", "t"), 1)
        for end in ("i", "ib")
    }
)
_TIMES = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
# By the end of a field's name: the units in which its value may be typed by mistake, and its own unit.
_UNITS_OF: dict[str, tuple[dict[str, float], float]] = {
    "_gb": (_BYTES | {"g": 1e9, "m": 1e6, "t": 1e12}, 1e9),
    "_mb": (_BYTES | {"g": 1e9, "m": 1e6, "k": 1e3}, 1e6),
    "_gb_s": ({f"{unit}/s": factor for unit, factor in _BYTES.items()} | _BYTES, 1e9),
    "_bytes": (_COUNTS | _BYTES, 1.0),
    "_minutes": (_TIMES, 60.0),
    "_seconds": (_TIMES, 1.0),
}


def _without_unit(field: str, value: str, kind: str) -> str | None:
    """Return the number that 80GB, 15m, 1k, 10% or 1_000 stands for in a field, as it is typed; else None."""
    match = re.fullmatch(r"(\d[\d_]{0,17}\.?\d{0,17})\s*([a-zA-Z%/]{0,4})", value)
    if match is None:
        return None
    number, unit = float(match[1].replace("_", "")), match[2].lower()
    otherwise = ({"%": 0.01} if kind == "number" else _COUNTS), 1.0
    units, own_unit = next((pair for end, pair in _UNITS_OF.items() if field.endswith(end)), otherwise)
    if unit and unit not in units:
        return None
    factor = units[unit] / own_unit if unit else 1.0
    product, bound = number * factor, BOUNDS.get(field)
    whole = f"{product:.15g}"
    is_wrong = kind == "whole number" and product != round(product)
    if is_wrong or (bound and not (bound.range.holds(product) and bound.least <= product <= bound.most)):
        return None
    return f"{product:.6g}".replace("+", "") if kind == "number" and product >= 10**6 else whole


def _unreadable(override: str, root: type[Any]) -> ConfigError:
    name, value = _split(override)
    kind, options = fields_of(root).get(name) or kind_of_entry(name), options_of(name)
    if "=" not in override:
        why = "a setting needs a name, = and a value"
        values = ["VALUE"] if name.startswith("deepspeed.") else options
        close = [_example(name, root)] if kind else settings(name, values)
        close = close or [f"{field}=VALUE" for field in closest_fields(name, root)]
        if name.isidentifier() and not kind and not options:
            close.append("`launcher --help`")
            why = "this is neither a command nor a setting NAME=VALUE"
        return ConfigError(name or "''", None, why, " or ".join(close) or _SHAPE)
    if not name:
        return ConfigError(override, None, "a setting needs a name, = and a value", _SHAPE)
    if not kind and not options and not name.startswith("deepspeed."):
        return no_such_field(name, value, root)
    if re.search(r"\s=", override):
        return ConfigError(override, None, "there must be no space before =", f"{name}={value.strip()}")
    if value.endswith(","):
        why = "a comma at the end separates nothing"
        return ConfigError(name, value, why, quoted_setting(name, value.rstrip(", ")))
    if kind == "list":
        items = ", ".join(hydra_text(item.strip("\"' ")) for item in value.strip("[]").split(","))
        quoted = shlex.quote(f"{name}=[{items}]")
        return ConfigError(name, value, "an item of this list must be quoted", quoted)
    if kind and not kind.startswith("text"):
        return ConfigError(name, value, "this value cannot be parsed", _example(name, root))
    if name.startswith("slurm.environment.") and not (key := name.split(".", 2)[2]).isidentifier():
        why = f"{key} is not a valid name of an environment variable"
        return ConfigError(name, value, why, "letters, digits and _, not beginning with a digit")
    remedy = quoted_setting(name, hydra_text(value.strip("\"' ")))
    return ConfigError(name, value, "this text must be quoted", remedy)


def _first_unreadable(overrides: list[str]) -> str:
    parser = OverridesParser.create()
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException:
            return override
    return ""


def _split(override: str) -> tuple[str, str]:
    name, _, value = override.lstrip("+~").partition("=")
    return name.strip(), value


def _with_value(field: str, value: str | None) -> str:
    return field if value is None else quoted_setting(field, value)


def _in(file: str | None) -> str:
    return f" (in {file}.yaml)" if file else ""


def _first_line(failure: _Failure) -> str:
    return next((line.strip() for line in failure.text.splitlines() if line.strip()), "cannot be composed")
