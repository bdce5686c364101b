"""Token files as a run's data: which files are meant, how they are split, and what is wrong with them."""

import glob
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launcher.config.errors import ConfigError, as_typed
from launcher.data.card import card_path, vocab_size_of
from launcher.data.token_file import TokenFile, TokenFileError, bin_path, index_path, open_token_file
from launcher.data.windows import Stretch, check_ids

_PROBES, _PROBE = 64, 4096  # stretches, and tokens of each, whose ids are checked at the start
_DOCUMENTS = 64  # of each file whose last token is looked at


@dataclass(frozen=True)
class TokenSplit:
    """The stretches of each part, one or none per file."""

    files: list[TokenFile]  # that are trained on
    train: list[Stretch]
    validation: list[Stretch]
    test: list[Stretch]

    def digest(self) -> str:
        return "-".join(file.digest() for file in self.files)


@dataclass(frozen=True)
class Part:
    """What is held out: the files that `pattern` of `field` names, or a fraction of those trained on."""

    field: str
    pattern: str | None
    fraction: float

    @property
    def share(self) -> float:
        return self.fraction if self.pattern is None else 0.0


def open_tokens(field: str, train: str, validation: Part, test: Part) -> TokenSplit:
    """Map the files that `train` of `field` names, and hold out the other parts.

    A fraction is of each file's tokens: its end for the test, and what is before that for validation, from
    the closest beginning of a document on. Raises ConfigError for files that are not there or not whole.
    """
    files = _opened(train, field)
    cuts = [_cuts(file, validation.share, test.share) for file in files]

    def part(number: int, named: Part | None = None) -> list[Stretch]:
        if named and named.pattern is not None:
            return [_stretch(file, 0, len(file.tokens)) for file in _opened(named.pattern, named.field)]
        return [_stretch(file, *cut[number : number + 2]) for file, cut in zip(files, cuts, strict=True)]

    return TokenSplit(files, part(0), part(1, validation), part(2, test))


def check_vocabulary(vocab_size: int, prefix: Path) -> None:
    """Raise ConfigError where the card beside a prepared file tells of more tokens than the model has."""
    tokens = vocab_size_of(prefix)
    if tokens is not None and tokens > vocab_size:
        why = f"{card_path(prefix)} says that its tokenizer has {tokens} tokens"
        raise ConfigError("model.vocab_size", vocab_size, why, f"model.vocab_size={tokens} (or more)")


def probe_ids(stretches: Sequence[Stretch], vocab_size: int) -> None:
    """Raise ConfigError for an id outside the vocabulary among 262,144, in stretches evenly spread."""
    for stretch in stretches:
        tokens, most = stretch.tokens, max(1, _PROBES // len(stretches))
        for start in np.linspace(0, max(0, len(tokens) - _PROBE), most).astype(np.int64).tolist():
            if len(tokens):
                check_ids(tokens[start : start + _PROBE], vocab_size, stretch, start)


def check_documents_end(files: Sequence[TokenFile], end_of_document: int | None) -> None:
    """Raise ConfigError where documents do not end with that token; of each file some are looked at."""
    last = Counter(
        int(tokens[-1])
        for file in files
        for number in np.linspace(0, file.num_documents - 1, _DOCUMENTS).astype(np.int64).tolist()
        if len(tokens := file.document(number))
    )
    if last.keys() == {end_of_document}:
        return
    off, names = "data.document_attention=false", ", ".join(str(bin_path(file.prefix)) for file in files[:2])
    if len(last) == 1:
        remedy = f"data.end_of_document={next(iter(last))} (what each ends with) or {off}"
        why = f"the documents of {names} do not end with it"
    else:
        remedy = f"{off} or documents that end with a token of their own, as --append-eod makes them"
        why = f"documents of {names} end with many tokens, {', '.join(map(str, sorted(last)[:3]))} and others"
    raise ConfigError("data.end_of_document", as_typed(end_of_document), why, remedy)


def _opened(pattern: str, field: str) -> list[TokenFile]:
    try:
        files = [open_token_file(prefix) for prefix in _prefixes(pattern, field)]
    except TokenFileError as error:
        raise ConfigError(field, pattern, str(error), _REMEDY) from None
    for file in files:
        if file.tokens.dtype.kind == "f":
            why = f"{bin_path(file.prefix)} holds {file.tokens.dtype.name}, and token ids are whole numbers"
            raise ConfigError(field, pattern, why, _REMEDY)
    return files


_REMEDY = "whole .bin and .idx files as Megatron-LM's preprocess_data.py or `launcher prepare` write them"


def _prefixes(pattern: str, field: str) -> list[Path]:
    """NAME of each NAME.bin and NAME.idx, in order; `pattern` is NAME, either file, or a glob of them."""
    plain = os.path.expanduser(pattern.removesuffix(".bin").removesuffix(".idx"))
    if glob.has_magic(plain):
        found = {Path(name).with_suffix("") for name in glob.glob(f"{plain}.idx", recursive=True)}
        if found:
            return sorted(found)
        raise ConfigError(field, pattern, "matches no .idx file", _nearest(field, Path(plain)))
    prefix = Path(plain)
    for path in (index_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise ConfigError(field, pattern, f"there is no {path}", _nearest(field, prefix))
    return [prefix]


def _nearest(field: str, prefix: Path) -> str:
    """Token files that are there, in the directory meant or the closest one above it that exists."""
    place = next((place for place in (prefix, *prefix.parents) if os.path.isdir(place)), Path())
    whole = sorted(path.with_suffix("") for path in place.glob("*.idx") if path.with_suffix(".bin").is_file())
    if not whole:
        return f"{_REMEDY}: {field}=PATH, without the ending"
    return shlex.quote(f'{field}="{whole[0]}"') + (f" (or one of {len(whole) - 1} more)" if whole[1:] else "")


def _stretch(file: TokenFile, start: int, end: int) -> Stretch:
    return Stretch(file.tokens[start:end], str(bin_path(file.prefix)), start)


def _cuts(file: TokenFile, validation: float, test: float) -> tuple[int, int, int, int]:
    """Where each part begins and the last ends, moved to the nearest beginnings of documents.

    Not where documents are so long that the smallest part would gain or lose more than a third.
    """
    total = len(file.tokens)
    slack = total * min(share for share in (1 - validation - test, validation, test) if share > 0) / 3

    def moved(place: int) -> int:
        near = file.boundary_near(place)
        return near if abs(near - place) <= slack else place

    # A part that is asked for gets a token, however small the file.
    end_of_training = total - max(round(total * (validation + test)), (validation > 0) + (test > 0))
    end_of_validation = total - max(round(total * test), int(test > 0))
    first, second = max(end_of_training, 0), max(end_of_validation, 0)
    if validation + test > 0:
        first = moved(first)
    return 0, first, moved(second) if test > 0 else total, total
