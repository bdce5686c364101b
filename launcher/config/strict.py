"""Make OmegaConf stricter while a config is composed or loaded."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import BooleanNode, _utils
from omegaconf.errors import ValidationError

MOST_YAML_VALUES = 1_000_000  # values of a file, with each alias replaced by its content


class _BoundedLoader(_utils.get_yaml_loader()):  # type: ignore[misc]
    """Raises an error for nested aliases, with which a few lines stand for billions of values."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _values_in(node, {}) > MOST_YAML_VALUES:
            problem = f"its aliases stand for more than {MOST_YAML_VALUES:,} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return node


def bounded_loader() -> Any:
    """Return the class that reads YAML as OmegaConf does, in bounded memory."""
    return _BoundedLoader


def _values_in(node: Any, known: dict[int, int]) -> int:
    if id(node) not in known:
        known[id(node)] = MOST_YAML_VALUES  # for an alias of a node that contains it
        inner = node.value if isinstance(node.value, list) else []
        children = [child for item in inner for child in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_values_in(child, known) for child in children)
    return known[id(node)]


def _strict_boolean(node: BooleanNode, value: Any) -> bool:
    """Refuse a number where true or false belongs. OmegaConf reads 2 as true."""
    if not isinstance(value, bool) and re.fullmatch(r"[-+]?\d+", str(value)):
        raise ValidationError(f"Value '{value}' is not a valid bool")
    return _convert_boolean(node, value)


_convert_boolean, _get_yaml_loader = BooleanNode._validate_and_convert_impl, _utils.get_yaml_loader


@contextmanager
def strict() -> Iterator[None]:
    """Read booleans strictly and files in bounded memory, in the block."""
    BooleanNode._validate_and_convert_impl = _strict_boolean  # type: ignore[method-assign,assignment]
    _utils.get_yaml_loader = bounded_loader
    try:
        yield
    finally:
        BooleanNode._validate_and_convert_impl = _convert_boolean  # type: ignore[method-assign]
        _utils.get_yaml_loader = _get_yaml_loader
