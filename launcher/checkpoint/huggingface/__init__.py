"""Convert Hugging Face models to ours and back: a converter per model type. Imports no torch."""

from typing import Any

from launcher.checkpoint.huggingface.converter import Converter, Entry, NotConvertible
from launcher.checkpoint.huggingface.gemma import GEMMA2, GEMMA3, SIZES_OF_TEXT_PART
from launcher.checkpoint.huggingface.gpt2 import GPT2
from launcher.checkpoint.huggingface.gpt_neox import GPT_NEOX
from launcher.checkpoint.huggingface.llama import LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3
from launcher.checkpoint.huggingface.mixture import MIXTRAL, QWEN3_MOE
from launcher.config.schema import ModelConfig

__all__ = [
    "CONVERTERS",
    "Converter",
    "Entry",
    "NotConvertible",
    "converter_of",
    "has_text_part",
    "model_of",
    "titles",
]

# A model that several can express is exported as the first of them, unless it was imported as another.
CONVERTERS = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, OLMO2, GEMMA2, GEMMA3, GPT_NEOX)


def titles(conjunction: str) -> str:
    """Return the names of the model types, such as `GPT-2, Llama and Mistral`."""
    *others, last = (converter.title for converter in CONVERTERS)
    return f"{', '.join(others)} {conjunction} {last}"


def model_of(theirs: dict[str, Any]) -> ModelConfig:
    """Return the model that a config.json describes. Raises NotConvertible."""
    if quantised := theirs.get("quantization_config"):
        method = quantised.get("quant_method", "an unknown method")
        raise NotConvertible(
            f"its weights are quantised ({method}), and the launcher trains fp32, bf16 and fp16 weights"
        )
    theirs = _text_part(theirs)
    for converter in CONVERTERS:
        if converter.model_type == theirs.get("model_type"):
            model = converter.model_of(theirs)
            converter_of(model, converter.model_type)  # no type expresses sizes that transformers refuses
            return model
    known = ", ".join(converter.model_type for converter in CONVERTERS)
    raise NotConvertible(f"model_type is {theirs.get('model_type')!r}, and only {known} are known")


def _text_part(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the text part of a model of text and images; any other config as it is."""
    text = theirs.get("text_config")
    if theirs.get("model_type") != "gemma3" or not isinstance(text, dict):
        return theirs
    return {**SIZES_OF_TEXT_PART, "model_type": GEMMA3.model_type, **text}


def has_text_part(theirs: dict[str, Any]) -> bool:
    """Return whether a config.json describes a model of text and images, of which we import the text part."""
    return _text_part(theirs) is not theirs


def converter_of(model: ModelConfig, model_type: str | None = None) -> Converter:
    """Return a converter that can express a model, if possible of `model_type`.

    Raises NotConvertible, naming what the closest converter cannot express.
    """
    preferred = sorted(CONVERTERS, key=lambda converter: converter.model_type != model_type)
    closest = min(preferred, key=lambda converter: len(converter.differences(model)))
    if differences := closest.differences(model):
        has = ", ".join(differences)
        raise NotConvertible(f"only {titles('and')} models can be exported; this model has {has}")
    return closest
