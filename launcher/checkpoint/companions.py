"""Companion files of a Hugging Face model: its config.json and its tokenizer files.

A run keeps them in run.dir/huggingface, so that an export of the run contains the tokenizer again. Of
config.json and generation_config.json only what is still right for the exported model is written.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from launcher.checkpoint.manifest import MANIFEST
from launcher.checkpoint.tokenizer_files import TOKENIZER, tokens_of
from launcher.config.numbers import BYTE_VALUES

COMPANIONS = "huggingface"
SOURCE = "_name_or_path"  # key of a carried config.json: the directory that it came from
CERTIFICATE = "certificate.json"  # of an export, see certificate.py
_MODEL_FILES = ("config.json", "generation_config.json")
_PATTERNS = (
    *(*_MODEL_FILES, "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template*"),
)


def companions_of(source: Path) -> list[Path]:
    """Return the companion files of `source`: a Hugging Face directory, a run, or a checkpoint of a run."""
    for folder in (run_of(source) / COMPANIONS, source):
        files = sorted(path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file())
        if files:
            return files
    return []


def run_of(source: Path) -> Path:
    """Return the run directory that a checkpoint lies in; `source` itself if it is no checkpoint."""
    return source.parent.parent if (source / MANIFEST).exists() else source


def carry_companions(source: Path, target: Path, dtype: str | None = None) -> None:
    """Copy the companion files of `source` to target/huggingface; keep files that exist. Raises OSError.

    With `dtype`, of a Hugging Face directory, config.json says where it came from, and the precision of its
    tensors: it can state both wrongly. If the data of the run have replaced the tokenizer, no file of the
    tokenizer is copied: a run that starts again before its first checkpoint would get a mixture of both.
    """
    files, folder = companions_of(source), target / COMPANIONS
    is_replaced = _has_another_tokenizer(folder, files)
    for path in files:
        folder.mkdir(parents=True, exist_ok=True)
        destination = folder / path.name
        if destination.exists() or (is_replaced and path.name not in _MODEL_FILES):
            continue
        if dtype is not None and path.name == "config.json":
            content = {name: value for name, value in base_config(source).items() if name != "torch_dtype"}
            content |= {"dtype": dtype, SOURCE: str(source)}
            destination.write_text(json.dumps(content, indent=2) + "\n")
        else:
            shutil.copyfile(path, destination)


def _has_another_tokenizer(folder: Path, files: list[Path]) -> bool:
    """Return whether the tokenizer.json in `folder` is not the one among `files`."""
    kept = folder / TOKENIZER
    theirs = next((path for path in files if path.name == TOKENIZER), None)
    return kept.exists() and (theirs is None or theirs.read_bytes() != kept.read_bytes())


def tokenizer_of_weights(source: Path) -> Path | None:
    """Return the tokenizer.json among the companions of `source`; None without one, or if it is of bytes."""
    path = next((path for path in companions_of(source) if path.name == TOKENIZER), None)
    return path if path is not None and max(tokens_of(path), default=0) >= BYTE_VALUES else None


def base_config(source: Path, name: str = "config.json") -> dict[str, Any]:
    """Return a JSON file among the companions of `source`; an empty dictionary without one."""
    for path in companions_of(source):
        if path.name == name:
            try:
                content = json.loads(path.read_text())
            except (OSError, ValueError, RecursionError):
                return {}  # the command that needs the file reads it again and reports the error
            return content if isinstance(content, dict) else {}
    return {}
