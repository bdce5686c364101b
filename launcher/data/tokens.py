"""Find the token files that a config names, split them into parts, and check them."""

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

_PROBES, _PROBE = 64, 4096  # stretches per part (at least one per file), and tokens per stretch, to check
_DOCUMENTS = 64  # documents per file whose last token is checked


@dataclass(frozen=True)
class TokenSplit:
    """The stretches of tokens of each part, one per file."""

    files: list[TokenFile]  # the training files
    train: list[Stretch]
    validation: list[Stretch]
    test: list[Stretch]

    def digest(self) -> str:
        """Return a digest of the training files."""
        return "-".join(file.digest() for file in self.files)


@dataclass(frozen=True)
class HeldOutPart:
    """The setting of a part that is not trained on: its own files, or a fraction of the training files."""

    field: str  # the field that `pattern` was set in
    pattern: str | None  # the part's own files, or None
    fraction: float  # of the training files' tokens; unused if there is a pattern


def open_tokens(field: str, train: str, validation: HeldOutPart, test: HeldOutPart) -> TokenSplit:
    """Map the files that `train`, the value of `field`, names, cut into three parts. Raises ConfigError."""
    files = _opened(train, field)
    shares = [part.fraction if part.pattern is None else 0.0 for part in (validation, test)]
    cuts = [_cuts(file, *shares) for file in files]

    def stretches(number: int, part: HeldOutPart | None = None) -> list[Stretch]:
        if part and part.pattern is not None:
            return [_stretch(file, 0, len(file.tokens)) for file in _opened(part.pattern, part.field)]
        return [_stretch(file, *cut[number : number + 2]) for file, cut in zip(files, cuts, strict=True)]

    return TokenSplit(files, stretches(0), stretches(1, validation), stretches(2, test))


def check_vocabulary(vocab_size: int, prefix: Path) -> None:
    """Raise ConfigError if the token file's tokenizer has more tokens than the model's vocabulary."""
    tokens = vocab_size_of(prefix)
    if tokens is not None and tokens > vocab_size:
        why = f"the tokenizer of these data has {tokens} tokens ({card_path(prefix)})"
        raise ConfigError("model.vocab_size", vocab_size, why, f"model.vocab_size={tokens} (or more)")


def probe_ids(stretches: Sequence[Stretch], vocab_size: int) -> None:
    """Raise ConfigError for a token id outside the vocabulary; checks 64 stretches of 4,096 tokens."""
    for stretch in (stretch for stretch in stretches if len(stretch.tokens)):
        tokens, most = stretch.tokens, max(1, _PROBES // len(stretches))
        for start in np.linspace(0, max(0, len(tokens) - _PROBE), most).astype(np.int64).tolist():
            check_ids(tokens[start : start + _PROBE], vocab_size, stretch, start)


def check_documents_end(files: Sequence[TokenFile], end_of_document: int | None) -> None:
    """Raise ConfigError if a document, of 64 in each file, does not end with token `end_of_document`."""
    last_tokens = Counter(
        int(tokens[-1])
        for file in files
        for number in np.linspace(0, file.num_documents - 1, _DOCUMENTS).astype(np.int64).tolist()
        if len(tokens := file.document(number))
    )
    if last_tokens.keys() == {end_of_document}:
        return
    off, names = "data.document_attention=false", ", ".join(str(bin_path(file.prefix)) for file in files[:2])
    if len(last_tokens) == 1:
        why = f"the documents of {names} do not end with this token"
        remedy = f"data.end_of_document={next(iter(last_tokens))} (the token they end with) or {off}"
    else:
        examples = ", ".join(map(str, sorted(last_tokens)[:3]))
        why = f"the documents of {names} end with different tokens, such as {examples}"
        remedy = f"{off} or data made with an end token (preprocess_data.py --append-eod)"
    raise ConfigError("data.end_of_document", as_typed(end_of_document), why, remedy)


def _opened(pattern: str, field: str) -> list[TokenFile]:
    try:
        files = [open_token_file(prefix) for prefix in _prefixes(pattern, field)]
    except TokenFileError as error:
        raise ConfigError(field, pattern, str(error), _REMEDY) from None
    for file in files:
        if file.tokens.dtype.kind == "f":
            why = f"{bin_path(file.prefix)} contains {file.tokens.dtype.name}, but token ids are integers"
            raise ConfigError(field, pattern, why, _REMEDY)
    return files


_REMEDY = "a pair of .bin and .idx files made by Megatron-LM's preprocess_data.py or `launcher prepare`"


def _prefixes(pattern: str, field: str) -> list[Path]:
    """Return the paths, without .bin or .idx, that `pattern` names: a path or a glob. Raises ConfigError."""
    plain = os.path.expanduser(pattern.removesuffix(".bin").removesuffix(".idx"))
    if glob.has_magic(plain):
        prefixes = {Path(name).with_suffix("") for name in glob.glob(f"{plain}.idx", recursive=True)}
        if prefixes:
            return sorted(prefixes)
        raise ConfigError(field, pattern, "the glob matches no .idx file", _path_remedy(field, Path(plain)))
    prefix = Path(plain)
    for path in (index_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise ConfigError(field, pattern, f"{path} does not exist", _path_remedy(field, prefix))
    return [prefix]


def _path_remedy(field: str, prefix: Path) -> str:
    """Return a setting with token files from the closest existing directory above `prefix`."""
    directory = next((path for path in (prefix, *prefix.parents) if os.path.isdir(path)), Path())
    indices = directory.glob("*.idx")
    pairs = sorted(path.with_suffix("") for path in indices if path.with_suffix(".bin").is_file())
    if not pairs:
        return f"{field}=PATH (without the ending) of {_REMEDY}"
    others = f" (this directory has {len(pairs) - 1} more)" if pairs[1:] else ""
    return shlex.quote(f'{field}="{pairs[0]}"') + others


def _stretch(file: TokenFile, start: int, end: int) -> Stretch:
    return Stretch(file.tokens[start:end], str(bin_path(file.prefix)), start)


def _cuts(file: TokenFile, validation: float, test: float) -> tuple[int, int, int, int]:
    """Return the token indices where training, validation and test begin, and where test ends.

    Each cut is moved to the closest document boundary, unless documents are so long that the move would
    change the smallest part by more than a third.
    """
    total = len(file.tokens)
    slack = total * min(share for share in (1 - validation - test, validation, test) if share > 0) / 3

    def cut(share: float, parts: int) -> int:
        """Return the index where the last `parts` parts begin, which have `share` of the tokens."""
        # A part with a fraction above 0 gets at least one token, even from a tiny file.
        index = max(total - max(round(total * share), parts), 0)
        boundary = file.boundary_near(index)
        return boundary if abs(boundary - index) <= slack else index

    held_out = (validation > 0) + (test > 0)
    end_of_training = cut(validation + test, held_out) if held_out else total
    return 0, end_of_training, cut(test, 1) if test > 0 else total, total
