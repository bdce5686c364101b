"""What a Hugging Face model has beside its weights: its config.json, its tokenizer. Carried along, unread.

A run keeps them in run.dir/huggingface, so that an export of it has them again.
"""

import shutil
from pathlib import Path

from launcher.checkpoint.manifest import MANIFEST

DIRECTORY = "huggingface"
_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def companions_of(source: Path) -> list[Path]:
    """Those of a Hugging Face directory, a run, or one of a run's checkpoints."""
    run = source.parent.parent if (source / MANIFEST).exists() else source
    for folder in (run / DIRECTORY, source):
        found = sorted(path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file())
        if found:
            return found
    return []


def carry_companions(source: Path, target: Path) -> None:
    """Copy them to target/huggingface. Raises OSError."""
    for path in companions_of(source):
        (target / DIRECTORY).mkdir(parents=True, exist_ok=True)
        destination = target / DIRECTORY / path.name
        if not destination.exists():
            shutil.copyfile(path, destination)
