"""Hugging Face models in our terms, and back: an adapter per model type. Imports no torch."""

from typing import Any

from launcher.checkpoint.huggingface import gpt2, llama
from launcher.checkpoint.huggingface.adapter import Adapter, Entry, NotConvertible
from launcher.config.schema import ModelConfig

__all__ = [
    "Adapter",
    "Entry",
    "NotConvertible",
    "adapter_of",
    "model_of",
    "setting_names",
    "setting_of",
    "titles",
]

ADAPTERS = (gpt2.ADAPTER, llama.ADAPTER)


def titles(conjunction: str) -> str:
    """Return the names of the model types, such as `GPT-2 and Llama`."""
    return f" {conjunction} ".join(adapter.title for adapter in ADAPTERS)


def model_of(theirs: dict[str, Any]) -> ModelConfig:
    """Return the model that a config.json describes. Raises NotConvertible."""
    for adapter in ADAPTERS:
        if adapter.model_type == theirs.get("model_type"):
            return adapter.model_of(theirs)
    known = " and ".join(adapter.model_type for adapter in ADAPTERS)
    raise NotConvertible(f"model_type is {theirs.get('model_type')!r}, and only {known} are known")


def adapter_of(model: ModelConfig) -> Adapter:
    """Return the adapter that can express a model. Raises NotConvertible, naming what the closest cannot."""
    closest = min(ADAPTERS, key=lambda adapter: len(adapter.differences(model)))
    if differences := closest.differences(model):
        has = ", ".join(differences)
        raise NotConvertible(f"only {titles('and')} models can be exported; this model has {has}")
    return closest
