"""The tokenizer files of an export: every token is in the vocabulary of the model. Imports no torch."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_SPECIAL, _ADDED, _VOCABULARY = "special_tokens_map.json", "added_tokens.json", "vocab.json"
_OF_ANOTHER_PLACE = {"name_or_path", "tokenizer_file", "special_tokens_map_file"}
_ZERO, _LETTER_OF_ZERO = "\0", "\u0100"
# Files that a tokenizer can be loaded from; the last is SentencePiece's.
_LOADABLE = (TOKENIZER, _VOCABULARY, "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _LOADABLE)


def forget_paths(folder: Path) -> None:
    """Remove from tokenizer_config.json the names of the machine and the repository that it came from."""
    settings = _table_in(folder / TOKENIZER_CONFIG)
    if stale := _OF_ANOTHER_PLACE & settings.keys():
        kept = {name: value for name, value in settings.items() if name not in stale}
        (folder / TOKENIZER_CONFIG).write_text(_as_json(kept))


def spell_zero_byte(folder: Path) -> str | None:
    """Make the zero byte a special token of a tokenizer of bytes; return its spelling, else None.

    tokenizers spells this byte by a letter, which text may contain. If the token is spelled as the byte
    itself, tokenizers finds it in text where the byte is, and transformers can name it as the end of
    documents.
    """
    content = _table_in(folder / TOKENIZER)
    vocabulary = (content.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict) or vocabulary.get(_LETTER_OF_ZERO) != 0:
        return None
    vocabulary[_ZERO] = vocabulary.pop(_LETTER_OF_ZERO)
    matching = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {"id": 0, "content": _ZERO, "special": True, **matching}
    content["added_tokens"] = [*(content.get("added_tokens") or ()), added]
    (folder / TOKENIZER).write_text(_as_json(content))
    return _ZERO


def set_longest_text(folder: Path, tokens: int) -> None:
    """Set model_max_length in tokenizer_config.json to `tokens`, if the file has this setting."""
    settings = _table_in(folder / TOKENIZER_CONFIG)
    if "model_max_length" in settings:
        (folder / TOKENIZER_CONFIG).write_text(_as_json({**settings, "model_max_length": tokens}))


def leave_out_special_tokens(folder: Path, size: int) -> list[str]:
    """Remove the special tokens from `size` on from the files in `folder`; return their spellings.

    Gemma 3's text models come with such a token, which stands for an image in the larger models. No text
    becomes a special token, so that the model never reads one of them.
    """
    outside = [
        str(token.get("content"))
        for index, token in _added_tokens(folder)
        if token.get("special") and index is not None and index >= size
    ]
    outside = list(dict.fromkeys(outside))
    if outside:
        for name in (TOKENIZER, TOKENIZER_CONFIG, _SPECIAL, _ADDED):
            if content := _table_in(folder / name):
                (folder / name).write_text(_as_json(_without(content, outside)))
    return outside


def largest_token(folder: Path) -> int | None:
    """Return the largest token id that the files in `folder` name; None if they name none."""
    ids: list[Any] = list(tokens_of(folder / TOKENIZER))
    ids += [*_table_in(folder / _VOCABULARY).values(), *_table_in(folder / _ADDED).values()]
    ids += [index for index, _ in _added_tokens(folder)]
    return max((index for index in ids if isinstance(index, int)), default=None)


def _added_tokens(folder: Path) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield id and settings of each added token, in tokenizer.json and in tokenizer_config.json."""
    added = _table_in(folder / TOKENIZER).get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            yield token["id"], token
    decoder = _table_in(folder / TOKENIZER_CONFIG).get("added_tokens_decoder")
    for text, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict):
            yield int(text) if text.isdecimal() else None, token


def tokens_of(path: Path) -> dict[int, str]:
    """Return the tokens of a tokenizer.json by id; empty if it has another form."""
    try:
        content = _table_in(path)
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tokens = {index: text for text, index in vocabulary.items()}
        else:
            tokens = {index: text for index, (text, _) in enumerate(vocabulary)}
        return tokens | {token["id"]: token["content"] for token in content.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _table_in(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _without(value: Any, outside: Iterable[str]) -> Any:
    """Return a value of JSON without the tokens `outside`: texts, keys, or the `content` of objects."""
    if isinstance(value, dict):
        return {
            name: _without(item, outside)
            for name, item in value.items()
            if name not in outside and not _is_token(item, outside)
        }
    if isinstance(value, list):
        return [_without(item, outside) for item in value if not _is_token(item, outside)]
    return value


def _is_token(value: Any, outside: Iterable[str]) -> bool:
    spelling = value.get("content") if isinstance(value, dict) else value
    return isinstance(spelling, str) and spelling in outside
