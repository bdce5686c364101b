"""Converters to Hugging Face model types: parts, settings and tensor names. Imports no torch."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from launcher.config.errors import as_typed, value_of
from launcher.config.schema import (
    AttentionKind,
    ExpertsConfig,
    InputKind,
    ModelConfig,
    NormPlacement,
    QueryKeyNorm,
    ResidualKind,
)
from launcher.config.shape import head_size, kv_heads
from launcher.parallel.boxes import Box

# Parts of every language model of theirs, unless its converter says otherwise.
TEXT = {
    "inputs": InputKind.tokens,
    "attention": AttentionKind.causal,
    "norm_placement": NormPlacement.pre,
    "query_key_norm": QueryKeyNorm.none,
    "residual": ResidualKind.sequential,
    "rotary_fraction": 1.0,
    "sliding_window": None,
    "full_attention_every": None,
    "local_rope_theta": None,
    "attention_scale_size": None,
    "attention_soft_cap": None,
    "logit_soft_cap": None,
    "embedding_scale": 1.0,
    "experts": ExpertsConfig(),
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class NotConvertible(Exception):
    """A model that the launcher or Hugging Face cannot build, with the reason."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a Hugging Face model, or rows of it: `box` of the logical tensor `ours`, or its transpose.

    Several entries with the same `theirs` follow each other and are its rows from `first_row` on, in order;
    `rows` is the length of the whole tensor then. Ours is theirs + `added`.
    """

    theirs: str
    ours: str
    box: Box
    transposed: bool = False
    first_row: int = 0
    rows: int | None = None
    added: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the whole Hugging Face tensor."""
        sizes = self.box.sizes[::-1] if self.transposed else self.box.sizes
        return sizes if self.rows is None else (self.rows, *sizes[1:])


@dataclass(frozen=True)
class Converter:
    """A Hugging Face model type in terms of our parts and sizes.

    `parts` are the fields of ModelConfig that every model of the type has, `settings` their name for each of
    our other fields, `defaults` the meaning of an absent setting, and `fixed` the settings that our parts
    cannot vary. `derived` are fields that the type derives from others: ours must be null, or agree.
    """

    title: str
    model_type: str
    architecture: str
    prefix: str  # of tensor names, except the head's
    parts: dict[str, Any]
    settings: dict[str, str]
    defaults: dict[str, Any]
    fixed: dict[str, Any]
    derived: tuple[str, ...]
    entries: Callable[[ModelConfig], Iterator[Entry]]  # in forward order, covering each logical tensor once
    read: Callable[[dict[str, Any]], dict[str, Any]]  # further fields from their config.json
    write: Callable[[ModelConfig], dict[str, Any]]  # further settings for their config.json
    implied: Callable[[ModelConfig], dict[str, Any]] = lambda _: {}  # parts that follow from sizes
    head: str = "lm_head.weight"
    inside: tuple[tuple[str, str], ...] = ()  # prefixes in a larger model, and what they stand for
    left_out: tuple[str, ...] = ()  # prefixes of tensors in larger models that are no part of this one
    heads_divide: bool = False  # whether transformers refuses num_heads that do not divide hidden_size

    def model_of(self, theirs: dict[str, Any]) -> ModelConfig:
        """Return the model that a config.json describes. Raises NotConvertible."""
        for key, value in self.fixed.items():
            if theirs.get(key, value) != value:
                why = f"{key} is {theirs[key]!r}, and the launcher's {self.model_type} has {value!r}"
                raise NotConvertible(why)
        values = deepcopy(self.parts)
        for field, key in self.settings.items():
            if key not in theirs and key not in self.defaults:
                raise NotConvertible(f"{key} is missing")
            values[field] = theirs.get(key, self.defaults.get(key))
        model = ModelConfig(**(values | self.read(theirs)))
        for field, value in self.implied(model).items():
            setattr(model, field, value)
        return model

    def differences(self, model: ModelConfig) -> list[str]:
        """Return the settings of a model, as typed, that this model type cannot express."""
        plain = ModelConfig(**{field.name: getattr(model, field.name) for field in fields(ModelConfig)})
        for name in self.derived:
            setattr(plain, name, None)
        for name, value in {**self.parts, **self.implied(model)}.items():
            setattr(plain, name, value)
        differing = [
            f"model.{name}={as_typed(setting_of(model, name))}"
            for name in setting_names()
            if setting_of(model, name) != setting_of(plain, name)
        ]
        is_refused = self.heads_divide and model.hidden_size % model.num_heads
        heads = f"model.num_heads={model.num_heads}, which does not divide hidden_size={model.hidden_size}"
        return [*differing, heads] if is_refused else differing

    def config_json(self, model: ModelConfig, dtype: str, ids: dict[str, Any]) -> dict[str, Any]:
        """Return the config.json of a model with the special tokens `ids`."""
        return {
            **ids,
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.fixed,
            **{key: getattr(model, field) for field, key in self.settings.items()},
            **self.write(model),
            "dtype": dtype,
        }

    def plain_name(self, name: str, model: ModelConfig) -> str | None:
        """Return the name in `entries` of a stored tensor; None for a mask. OpenAI writes no prefix."""
        if name.endswith(_BUFFERS) or name.startswith(self.left_out):
            return None
        for prefix, plain in self.inside:
            if name.startswith(prefix):
                name = plain + name.removeprefix(prefix)
                break
        if name == self.head:
            return None if model.tie_embeddings else name
        return name if name.startswith(self.prefix) else self.prefix + name


# Masks and tables that old versions of transformers stored among the weights.
_BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)


def token_ids(base: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return the special tokens of a config.json that are in the vocabulary, and null for the others.

    Null is written too: transformers' defaults are tokens of the published models.
    """

    def known(value: Any) -> Any:
        if isinstance(value, list):
            return [token for token in value if known(token) is not None] or None
        is_id = isinstance(value, int) and not isinstance(value, bool)
        return value if is_id and 0 <= value < vocab_size else None

    return {name: known(base.get(name)) for name in TOKEN_IDS}


def setting_names() -> list[str]:
    """Return the fields of ModelConfig as dotted names."""
    names: list[str] = []
    for field in fields(ModelConfig):
        inner = fields(field.type) if is_dataclass(field.type) else ()
        names += [f"{field.name}.{each.name}" for each in inner] or [field.name]
    return names


def setting_of(model: ModelConfig, name: str) -> object:
    """Return the value of a field, with null replaced by the size that it stands for."""
    derived = {"num_kv_heads": kv_heads, "head_size": head_size}
    return derived[name](model) if name in derived else value_of(model, name)


def vector(theirs: str, ours: str, size: int, first: int = 0, added: float = 0.0) -> Entry:
    """Return the entry of `size` numbers of a logical vector, from `first` on."""
    return Entry(theirs, ours, Box((first,), (size,)), added=added)


def norm(theirs: str, ours: str, size: int) -> Iterator[Entry]:
    """Yield the weight and the bias of a LayerNorm."""
    for kind in ("weight", "bias"):
        yield vector(f"{theirs}.{kind}", f"{ours}.{kind}", size)


def matrix(theirs: str, ours: str, outputs: int, inputs: int, first: int = 0) -> Entry:
    """Return the entry of `outputs` rows of a logical matrix, from row `first` on."""
    return Entry(theirs, ours, Box((first, 0), (outputs, inputs)))


def head(model: ModelConfig) -> Iterator[Entry]:
    """Yield the untied head, which has the same name in every Hugging Face language model."""
    if not model.tie_embeddings:
        yield matrix("lm_head.weight", "head.weight", model.vocab_size, model.hidden_size)
