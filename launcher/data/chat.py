"""Open the conversations that `data=chat` names: JSON lines, or token files with a mask."""

import glob
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import launcher
from launcher.config.errors import ConfigError, as_typed, typed_text
from launcher.config.schema import DataConfig, RunConfig
from launcher.config.shape import end_of_document, sequence_length
from launcher.data.chat_template import ChatTemplate, template_of
from launcher.data.chat_tokens import ENDS_INSIDE
from launcher.data.dataset_card import chat_template_of, template_tokens_of, tokenizer_path
from launcher.data.input_files import LeftOut, first_of_each, not_held_out
from launcher.data.packing import ChatTokens, PackedChats
from launcher.data.reading import FileFormat, Place, batches, format_of
from launcher.data.token_file import TokenFileError, bin_path, index_path, mask_path, open_token_file
from launcher.data.tokenise import TokeniseSettings, Worker
from launcher.data.tokenizer import HuggingFace
from launcher.data.tokens import check_vocabulary
from launcher.text import plural

_IN_PACKAGE = "pkg://launcher/"  # files that the launcher comes with, as Hydra names those of a package
_LONGEST_LINE = 256 * 10**6  # bytes
_PROBES = 64  # conversations per part whose end is checked, and windows per part that are read
PREPARE = "launcher prepare SOURCE TARGET chat=true"
_TEMPLATE = "the chat template"  # in the reason of a line that the template makes bad


@dataclass(frozen=True)
class ChatSplit:
    """The conversations of each part, and digests of the training files and of separate files, by part."""

    train: PackedChats
    validation: PackedChats
    test: PackedChats | None
    digests: dict[str, str]  # "" is the training files


def open_chats(run: RunConfig, left_out: LeftOut | None = None) -> ChatSplit:
    """Return the conversations of a run, in parts. Raises ConfigError.

    Files of validation and test are not trained on; their number is added to `left_out`.
    """
    d = run.data
    train, digest = _training_chats(d, LeftOut() if left_out is None else left_out)
    digests, count = {"": digest}, len(train)
    held_out: dict[str, tuple[ChatTokens, int, int]] = {}
    parts = (("test", d.test, d.test_fraction), ("validation", d.validation, d.validation_fraction))
    for name, pattern, fraction in parts:
        if pattern is not None:
            chats, digests[name] = opened_chats(d, f"data.{name}", pattern)
            held_out[name] = chats, 0, len(chats)
        elif fraction > 0:
            # The last conversations, in the order training, validation, test.
            first = count - max(1, round(fraction * len(train)))
            held_out[name] = train, first, count
            count = first
    if count < 1:
        why = f"{d.train} has {plural(len(train), 'conversation')}, and none of them is left to train on"
        raise ConfigError("data.train", d.train, why, "more conversations, or data.validation=PATH of others")
    packed = {name: _packed(run, *part) for name, part in held_out.items()}
    return ChatSplit(_packed(run, train, 0, count), packed["validation"], packed.get("test"), digests)


def _training_chats(d: DataConfig, left_out: LeftOut) -> tuple[ChatTokens, str]:
    """Return the conversations of data.train without files of validation and test, and their digest."""
    assert d.train is not None, "validated with the config"
    patterns = {"data.validation": d.validation, "data.test": d.test}
    held_out = [
        path
        for field, pattern in patterns.items()
        if pattern is not None
        for path in _chat_files(field, pattern)
    ]
    paths = not_held_out(_chat_files("data.train", d.train), held_out, "data.train", d.train, left_out)
    if prepared_prefix(d.train) is not None:
        return opened_chats(d, "data.train", d.train)
    return _read(d, "data.train", d.train, paths)


def _chat_files(field: str, pattern: str) -> list[Path]:
    """Return the files of JSON that a pattern names, or the .bin file of prepared conversations."""
    prefix = prepared_prefix(pattern)
    return _files(field, pattern) if prefix is None else [bin_path(prefix)]


def check_chats(run: RunConfig, left_out: LeftOut) -> None:
    """Check that a run can train on its conversations; count those left out. Raises ConfigError."""
    split, length = open_chats(run, left_out), sequence_length(run)
    _check_tokenizer(run)
    for name, part in (("training", split.train), ("validation", split.validation), ("test", split.test)):
        if part is None:
            continue
        if not len(part):
            why = f"no conversation of the {name} part has a token to learn among its first {length + 1}"
            remedy = f"data.sequence_length={2 * length}, or shorter conversations"
            raise ConfigError("data.sequence_length", length, why, remedy)
        _check_ends(part.chats, part.end_of_document)
        part.read(np.arange(min(len(part), _PROBES)))
        left_out[f"conversations without a label in {length + 1} tokens"] += part.left_out
        left_out[f"ends of conversations, after {length + 1} tokens"] += part.cut


def _check_tokenizer(run: RunConfig) -> None:
    """Raise ConfigError if the tokenizer has more tokens than the model's vocabulary."""
    assert run.data.train is not None, "validated with the config"
    if (prefix := prepared_prefix(run.data.train)) is not None:
        check_vocabulary(run.model.vocab_size, prefix)
        return
    tokenizer = _settings(run.data, None).load()
    if tokenizer.text_vocab_size > run.model.vocab_size:
        why, size = f"the tokenizer of these data has {tokenizer.vocab_size} tokens", tokenizer.vocab_size
        raise ConfigError("model.vocab_size", run.model.vocab_size, why, f"model.vocab_size={size} (or more)")


def _check_ends(chats: ChatTokens, end_of_document: int) -> None:
    """Raise ConfigError if a conversation, of 64, does not end with the token `end_of_document`."""
    ends = chats.starts[1:][np.linspace(0, len(chats) - 1, _PROBES).astype(np.int64)]
    for last in chats.tokens[ends - 1].tolist():
        if last != end_of_document:
            why = f"a conversation of {chats.name} ends with the token {last}"
            remedy = f"data.end_of_document={last}"
            raise ConfigError("data.end_of_document", as_typed(end_of_document), why, remedy)


def chat_companions(run: RunConfig) -> tuple[Path | None, ChatTemplate | None]:
    """Return the tokenizer.json of a run's conversations, None for bytes, and their chat template.

    The template is None if the card of token files does not state it.
    """
    d = run.data
    assert d.train is not None, "validated with the config"
    if (prefix := prepared_prefix(d.train)) is not None:
        path = tokenizer_path(prefix)
        source = chat_template_of(prefix)
        template = None if source is None else ChatTemplate(source, template_tokens_of(prefix))
        return path if path.exists() else _tokenizer(d), template
    return _tokenizer(d), _template(d)


def _packed(run: RunConfig, chats: ChatTokens, first: int, last: int) -> PackedChats:
    end = end_of_document(run)
    assert end is not None
    return PackedChats(chats, first, last, sequence_length(run), end, run.model.vocab_size)


def opened_chats(data: DataConfig, field: str, pattern: str) -> tuple[ChatTokens, str]:
    """Return the conversations that a field names, and their digest. Raises ConfigError."""
    if (prefix := prepared_prefix(pattern)) is None:
        return _read(data, field, pattern, _files(field, pattern))
    try:
        file = open_token_file(prefix)
    except TokenFileError as error:
        raise ConfigError(field, pattern, str(error), PREPARE) from None
    path = mask_path(prefix)
    size = path.stat().st_size if path.is_file() else None
    if size != file.num_tokens:
        state = "does not exist" if size is None else f"has {size} bytes for {file.num_tokens} tokens"
        why = f"{path} {state}, and data=chat needs a byte per token"
        plain = f"data=tokens {typed_text(field, pattern)} (learns all tokens)"
        raise ConfigError(field, pattern, why, plain if size is None else PREPARE)
    sequences = file.documents[:-1]
    starts = np.append(file.pointers[sequences] // file.dtype.itemsize, file.num_tokens).astype(np.int64)
    return ChatTokens(str(path), starts, file), file.digest()


def _read(data: DataConfig, field: str, pattern: str, paths: list[Path]) -> tuple[ChatTokens, str]:
    """Return the conversations in files of JSON as tokens, and their digest. Raises ConfigError.

    The files are `paths`, which the value `pattern` of `field` names.
    """
    template, dtype = _template(data), _settings(data, None).load().dtype
    worker = Worker(_settings(data, template))
    tokens, masks, lengths = [], [], [0]
    for batch in batches(paths, Place(), "", _LONGEST_LINE, json_arrays=True):
        tokenised = worker.tokenise(batch)
        if tokenised.bad_lines:
            bad = tokenised.bad_lines[0]
            skip = f"{PREPARE} bad_lines=skip (leaves bad lines out)"
            remedy = f"{_mend(data, bad.why)}, or {skip}"
            raise ConfigError(field, pattern, f"{batch.file}:{bad.line} {bad.why}", remedy)
        tokens.append(tokenised.tokens)
        masks.append(tokenised.mask)
        lengths += tokenised.lengths
    content = b"".join(tokens), b"".join(masks)
    arrays = np.frombuffer(content[0], dtype), np.frombuffer(content[1], np.uint8)
    starts = np.cumsum(lengths, dtype=np.int64)
    digest = zlib.crc32(starts.tobytes(), zlib.crc32(content[1], zlib.crc32(content[0])))
    return ChatTokens(pattern, starts, in_memory=arrays), f"{len(arrays[0])}-{digest:08x}"


def _mend(data: DataConfig, why: str) -> str:
    """Return the remedy for a bad line: usually to correct the line, else a setting."""
    if _TEMPLATE in why:
        return "data.chat_template=PATH of another template"
    if ENDS_INSIDE not in why or not isinstance(tokenizer := _settings(data, None).load(), HuggingFace):
        return "correct the line"
    other = tokenizer.token_beside_end()
    named = "ID of a token that the template does not write" if other is None else other
    return f"data.end_of_document={named} (and {PREPARE} has tokenizer.end_of_document)"


def prepared_prefix(pattern: str) -> Path | None:
    """Return the prefix of the token files that a pattern names, or None."""
    prefix = Path(os.path.expanduser(pattern.removesuffix(".bin").removesuffix(".idx")))
    return prefix if index_path(prefix).is_file() else None


def _files(field: str, pattern: str) -> list[Path]:
    plain = pattern
    if pattern.startswith(_IN_PACKAGE):
        plain = str(Path(launcher.__file__).parent / pattern.removeprefix(_IN_PACKAGE))
    matches = sorted(map(Path, glob.glob(os.path.expanduser(plain), recursive=True)))
    paths = first_of_each(filter(Path.is_file, matches), LeftOut())
    if not paths:
        why = "no file has this name, and there are no token files of this name either"
        raise ConfigError(field, pattern, why, f"{field}=PATH of a .jsonl file, or {PREPARE}")
    for path in paths:
        if format_of(path) is not FileFormat.json_lines:
            why = f"{path} is not a .jsonl, .ndjson or .json file"
            raise ConfigError(field, pattern, why, f"{field}=PATH of a .jsonl file")
    return paths


def _settings(data: DataConfig, template: ChatTemplate | None) -> TokeniseSettings:
    end = data.end_of_document
    return TokeniseSettings(
        _tokenizer(data), end, "", _LONGEST_LINE, template=template, field="data.tokenizer"
    )


def _tokenizer(data: DataConfig) -> Path | None:
    return None if data.tokenizer is None else Path(data.tokenizer).expanduser()


def _template(data: DataConfig) -> ChatTemplate:
    path = None if data.chat_template is None else Path(data.chat_template).expanduser()
    fields = {"tokenizer_field": "data.tokenizer", "template_field": "data.chat_template"}
    return template_of(_tokenizer(data), path, **fields)
