"""Paths and contents of the two files that `launcher prepare` writes beside NAME.bin and NAME.idx.

NAME.json, the card, records how the token files were made. NAME.tokenizer.json is the tokenizer. Token files
written by Megatron-LM have neither.
"""

import json
from pathlib import Path
from typing import Any

_TEMPLATE, _TOKENS = "chat_template", "chat_template_tokens"  # entries of the card


def card_path(prefix: Path) -> Path:
    """Return the path NAME.json for the token files NAME.bin and NAME.idx at `prefix`, NAME."""
    return prefix.parent / f"{prefix.name}.json"


def tokenizer_path(prefix: Path) -> Path:
    """Return the path NAME.tokenizer.json for the token files at `prefix`, NAME."""
    return prefix.parent / f"{prefix.name}.tokenizer.json"


def vocab_size_of(prefix: Path) -> int | None:
    """Return the tokenizer's vocabulary size from the card, or None if no readable card states the size."""
    return _number(prefix, "vocab_size")


def text_vocab_size_of(prefix: Path) -> int | None:
    """Return the vocabulary size that text needs, from the card; None if no readable card states it."""
    return _number(prefix, "text_vocab_size")


def end_of_document_of(prefix: Path) -> int | None:
    """Return the token that ends each document from the card, or None if no readable card states it."""
    return _number(prefix, "end_of_document")


def chat_template_of(prefix: Path) -> str | None:
    """Return the chat template of prepared conversations from the card; None if no card states it."""
    template = _value(prefix, _TEMPLATE)
    return template if isinstance(template, str) else None


def template_tokens_of(prefix: Path) -> dict[str, str]:
    """Return the special tokens of the chat template by name; empty for cards of earlier versions."""
    tokens = _value(prefix, _TOKENS)
    return tokens if isinstance(tokens, dict) else {}


def chat_entries(template: str, tokens: dict[str, str]) -> dict[str, Any]:
    """Return the entries of the card about a chat template and its special tokens, such as `bos_token`."""
    return {_TEMPLATE: template, _TOKENS: tokens}


def _number(prefix: Path, name: str) -> int | None:
    try:
        return int(_value(prefix, name))
    except (ValueError, TypeError):
        return None


def _value(prefix: Path, name: str) -> Any:
    """Return a value of the card; None without a readable card, or if the card lacks it."""
    try:
        return json.loads(card_path(prefix).read_text())[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
