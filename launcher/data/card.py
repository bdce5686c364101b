"""What `launcher prepare` leaves beside NAME.bin and NAME.idx: a card, NAME.json, and NAME.tokenizer.json.

Megatron-LM's own files have neither.
"""

import json
from pathlib import Path
from typing import Any


def card_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.json")


def tokenizer_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.tokenizer.json")


def vocab_size_of(prefix: Path) -> int | None:
    """The tokens that the tokenizer of a prepared file has; None where nothing tells."""
    try:
        card: Any = json.loads(card_path(prefix).read_text())
        return int(card["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
