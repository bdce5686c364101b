"""Adapters to Hugging Face model types: parts, settings and tensor names. Imports no torch."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

from launcher.config.errors import as_typed, value_of
from launcher.config.schema import AttentionKind, BiasesConfig, InputKind, ModelConfig
from launcher.config.shape import head_size, kv_heads
from launcher.parallel.boxes import Box, whole

TEXT = {
    "inputs": InputKind.tokens,
    "attention": AttentionKind.causal,
}  # parts of every language model of theirs


class NotConvertible(Exception):
    """A model that the launcher or Hugging Face cannot build, with the reason."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a Hugging Face model: `box` of the logical tensor `ours`, or the transpose of that box."""

    theirs: str
    ours: str
    box: Box
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.box.sizes[::-1] if self.transposed else self.box.sizes


@dataclass(frozen=True)
class Adapter:
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
        return ModelConfig(**values, **self.read(theirs))

    def differences(self, model: ModelConfig) -> list[str]:
        """Return the settings of a model, as typed, that this model type cannot express."""
        plain = ModelConfig(**{field.name: getattr(model, field.name) for field in fields(ModelConfig)})
        for name in self.derived:
            setattr(plain, name, None)
        for name, value in self.parts.items():
            setattr(plain, name, value)
        return [
            f"model.{name}={as_typed(setting_of(model, name))}"
            for name in setting_names()
            if setting_of(model, name) != setting_of(plain, name)
        ]

    def config_json(self, model: ModelConfig, dtype: str, base: dict[str, Any] | None) -> dict[str, Any]:
        """Return the config.json of a model; token ids and the like come from `base`, if there is one."""
        # Their defaults are GPT-2's and Llama's own tokens, which another vocabulary may not have.
        kept = base or {"bos_token_id": None, "eos_token_id": None}
        return {
            **kept,
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.fixed,
            **{key: getattr(model, field) for field, key in self.settings.items()},
            **self.write(model),
            "dtype": dtype,
        }

    def plain_name(self, name: str, model: ModelConfig) -> str | None:
        """Return the name in `entries` of a stored tensor; None for a mask. OpenAI writes no prefix."""
        if name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):
            return None
        if name == "lm_head.weight":
            return None if model.tie_embeddings else name
        return name if name.startswith(self.prefix) else self.prefix + name


def setting_names() -> list[str]:
    """Return the fields of ModelConfig as dotted names."""
    names = [field.name for field in fields(ModelConfig) if field.name != "biases"]
    return names + [f"biases.{field.name}" for field in fields(BiasesConfig)]


def setting_of(model: ModelConfig, name: str) -> object:
    """Return the value of a field, with null replaced by the size that it stands for."""
    derived = {"num_kv_heads": kv_heads, "head_size": head_size}
    return derived[name](model) if name in derived else value_of(model, name)


def vector(theirs: str, ours: str, size: int) -> Entry:
    return Entry(theirs, ours, whole((size,)))


def matrix(theirs: str, ours: str, outputs: int, inputs: int, first: int = 0) -> Entry:
    """Return the entry of `outputs` rows of a logical matrix, from row `first` on."""
    return Entry(theirs, ours, Box((first, 0), (outputs, inputs)))


def head(model: ModelConfig) -> Iterator[Entry]:
    """Yield the untied head, which every language model of theirs names alike."""
    if not model.tie_embeddings:
        yield matrix("lm_head.weight", "head.weight", model.vocab_size, model.hidden_size)
