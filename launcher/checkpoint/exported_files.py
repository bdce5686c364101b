"""The files of an export beside weights and config.json: tokenizer and generation_config.json."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.checkpoint.companions import base_config, companions_of, run_of
from launcher.checkpoint.huggingface import NotConvertible
from launcher.checkpoint.huggingface.converter import TOKEN_IDS, token_ids
from launcher.checkpoint.manifest import read_manifest
from launcher.checkpoint.sources import RUN_CONFIG, WeightsKind, WeightSource
from launcher.checkpoint.tokenizer_files import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    forget_paths,
    has_tokenizer,
    largest_token,
    leave_out_special_tokens,
    set_longest_text,
    spell_zero_byte,
    tokens_of,
)
from launcher.config.compose import load_typed
from launcher.config.run_format import END_OF_DOCUMENT, read_identity
from launcher.config.schema import CorpusSource, RunConfig
from launcher.config.shape import END_OF_TEXT

GENERATION = "generation_config.json"
# Settings of generation that are right for any weights and vocabulary.
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
BYTE_SOURCES = (CorpusSource.stdlib.name, CorpusSource.text.name)

Settings = dict[str, Any]


def write_tokenizer(
    weights: WeightSource, target: Path, write_bytes: Callable[[Path], None]
) -> tuple[Settings, list[str]]:
    """Write tokenizer and generation config; return the token ids for config.json, and notes to the user.

    A run on text as bytes gets the tokenizer that `write_bytes` writes; other runs get the tokenizer that the
    run recorded. Raises NotConvertible if the vocabulary lacks a token of text.
    """
    data, size = data_of(weights), weights.model.vocab_size
    ids = token_ids(_special_tokens(weights, data), size)
    if data.get("source") in BYTE_SOURCES:
        write_bytes(target / TOKENIZER)
    else:
        for path in companions_of(weights.path):
            if path.name not in ("config.json", GENERATION):
                shutil.copyfile(path, target / path.name)
    forget_paths(target)
    if _has_another_length(weights):
        set_longest_text(target, weights.model.max_sequence_length)
    notes = [
        f"without the special token {token!r} of its tokenizer: model.vocab_size={size} has no such token"
        for token in leave_out_special_tokens(target, size)
    ]
    if (largest := largest_token(target)) is not None and largest >= size:
        has = f"its tokenizer has the token {largest}"
        raise NotConvertible(f"{has}, and model.vocab_size={size} has no such token")
    if (target / TOKENIZER).exists() and not (target / TOKENIZER_CONFIG).exists():
        _write(target / TOKENIZER_CONFIG, _tokenizer_config(weights, ids, target))
    _write(target / GENERATION, {**_generation(weights), **ids})
    if not has_tokenizer(target):
        notes.append("without a tokenizer: none came with the weights or with the data. Copy its files there")
    return ids, notes


def _has_another_length(weights: WeightSource) -> bool:
    """Return whether the run changed the longest sequence of the model that it began with."""
    theirs = base_config(weights.path)
    length = theirs.get("max_position_embeddings", theirs.get("n_positions"))
    return length is not None and length != weights.model.max_sequence_length


def data_of(weights: WeightSource) -> Settings:
    """Return source and end of document of the run that made the weights; empty for an imported model."""
    if weights.kind is WeightsKind.checkpoint:
        data = dict(read_manifest(weights.path).config.get("data") or {})
    elif weights.kind is WeightsKind.run:
        typed = load_typed(weights.path / RUN_CONFIG, RunConfig).data
        data = {"source": typed.source.name, "end_of_document": typed.end_of_document}
    else:
        return {}
    if data.get("source") is not None and data.get("end_of_document") is None:
        data["end_of_document"] = (read_identity(run_of(weights.path)) or {}).get(END_OF_DOCUMENT)
    return data


def _special_tokens(weights: WeightSource, data: Settings) -> Settings:
    """Return the special tokens of the model that the run began with, if the tokenizer is the same."""
    if data.get("source") in BYTE_SOURCES:
        return {"eos_token_id": END_OF_TEXT}
    end = {} if data.get("end_of_document") is None else {"eos_token_id": data["end_of_document"]}
    names = {path.name for path in companions_of(weights.path)}
    if data.get("source") is not None and TOKENIZER_CONFIG not in names:
        return end
    generation = base_config(weights.path, GENERATION)
    theirs = {
        **base_config(weights.path),
        **{name: value for name, value in generation.items() if value is not None},
    }
    return {**end, **{name: theirs[name] for name in TOKEN_IDS if theirs.get(name) is not None}}


def _generation(weights: WeightSource) -> Settings:
    base = base_config(weights.path, GENERATION)
    return {name: base[name] for name in _SAMPLING if name in base}


def _tokenizer_config(weights: WeightSource, ids: Settings, target: Path) -> Settings:
    """Return the settings by which AutoTokenizer loads a tokenizer.json as it is.

    If a byte other than zero ends documents, it is no special token, because text may contain it.
    """
    ends = ids["eos_token_id"]
    end = ends[0] if isinstance(ends, list) else ends
    spelling = tokens_of(target / TOKENIZER).get(end, "")
    if len(spelling) == 1:
        spelling = (spell_zero_byte(target) if end == END_OF_TEXT else None) or ""
    special = {"eos_token": spelling} if spelling else {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": weights.model.max_sequence_length,
        "clean_up_tokenization_spaces": False,
        **special,
    }


def _write(path: Path, content: Settings) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
