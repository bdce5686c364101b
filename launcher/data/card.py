"""Paths and contents of the two files that `launcher prepare` writes beside NAME.bin and NAME.idx.

NAME.json, the card, records how the token files were made. NAME.tokenizer.json is the tokenizer. Token files
written by Megatron-LM have neither.
"""

import json
from pathlib import Path


def card_path(prefix: Path) -> Path:
    """Return the path NAME.json for the token files NAME.bin and NAME.idx at `prefix`, NAME."""
    return prefix.parent / f"{prefix.name}.json"


def tokenizer_path(prefix: Path) -> Path:
    """Return the path NAME.tokenizer.json for the token files at `prefix`, NAME."""
    return prefix.parent / f"{prefix.name}.tokenizer.json"


def vocab_size_of(prefix: Path) -> int | None:
    """Return the tokenizer's vocabulary size from the card, or None if no readable card states the size."""
    return _number(prefix, "vocab_size")


def end_of_document_of(prefix: Path) -> int | None:
    """Return the token that ends each document from the card, or None if no readable card states it."""
    return _number(prefix, "end_of_document")


def _number(prefix: Path, name: str) -> int | None:
    try:
        return int(json.loads(card_path(prefix).read_text())[name])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
