"""Find the token files that a config names, split them into parts, and check them."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launcher.config.errors import ConfigError, as_typed, typed_text
from launcher.data.corpus import split_key
from launcher.data.dataset_card import card_path, text_vocab_size_of, vocab_size_of
from launcher.data.input_files import (
    LeftOut,
    closest_directory,
    first_of_each,
    matching,
    not_held_out,
    prepare_commands,
)
from launcher.data.reading import format_of
from launcher.data.token_file import (
    MappedTokens,
    TokenFile,
    TokenFileError,
    bin_path,
    index_path,
    mask_path,
    open_token_file,
)
from launcher.data.windows import Stretch, check_ids

_PROBES, _PROBE = 64, 4096  # stretches per part (at least one per file), and tokens per stretch, to check
_DOCUMENTS = 64  # documents per file whose last token is checked


# Token indices of a file where training, validation and test begin, and where test ends.
Cuts = tuple[int, int, int, int]


@dataclass(frozen=True)
class TokenSplit:
    """The stretches of tokens of each part, one per file."""

    files: list[TokenFile]  # the training files
    train: list[Stretch]
    validation: list[Stretch]
    test: list[Stretch]

    held_out: dict[str, list[TokenFile]]  # separate files of the part "validation" or "test"

    def digests(self) -> dict[str, str]:
        """Return a digest of the training files, under "", and of each part that has files of its own."""
        files = {"": self.files, **self.held_out}
        return {part: "-".join(file.digest() for file in part_files) for part, part_files in files.items()}


@dataclass(frozen=True)
class HeldOutPart:
    """The setting of a part that is not trained on: its own files, or a fraction of the training files."""

    field: str  # the field that `pattern` was set in
    pattern: str | None  # the part's own files, or None
    fraction: float  # of the training files' tokens; unused if there is a pattern


def open_tokens(
    field: str, train: str, validation: HeldOutPart, test: HeldOutPart, sample: int, left_out: LeftOut
) -> TokenSplit:
    """Map the files that `train`, the value of `field`, names, cut into three parts. Raises ConfigError.

    `sample` is the number of tokens of a sample, which a part must have in one of its files.
    Adds the number of files that are not used to `left_out`, by reason.
    """
    files = _opened(train, field, left_out)
    parts = {"validation": validation, "test": test}
    held_out = {
        name: _opened(part.pattern, part.field, left_out)
        for name, part in parts.items()
        if part.pattern is not None
    }
    files = _without(files, [file for part in held_out.values() for file in part], field, train, left_out)
    shares = [0.0 if name in held_out else part.fraction for name, part in parts.items()]
    cuts = [_cuts(file, *shares) for file in files]
    if any(share > 0 and _longest(cuts, part) < sample for part, share in enumerate(shares, 1)):
        cuts = _whole_files(files, *shares) or cuts

    def stretches(number: int, name: str) -> list[Stretch]:
        if name in held_out:
            return [_stretch(file, 0, file.num_tokens) for file in held_out[name]]
        return [_stretch(file, *cut[number : number + 2]) for file, cut in zip(files, cuts, strict=True)]

    return TokenSplit(files, stretches(0, ""), stretches(1, "validation"), stretches(2, "test"), held_out)


def _longest(cuts: Sequence[Cuts], part: int) -> int:
    """Return the most tokens of a part (1: validation, 2: test) in one file."""
    return max(cut[part + 1] - cut[part] for cut in cuts)


def _whole_files(files: Sequence[TokenFile], validation: float, test: float) -> list[Cuts] | None:
    """Return cuts that hold out whole files, chosen by a hash of their names; None for too few files.

    The end of a file that is not much longer than a sample has no sample.
    """
    tokens = [file.num_tokens for file in files]
    numbers = sorted(range(len(files)), key=lambda number: split_key(files[number].prefix.name))
    if len(files) <= (validation > 0) + (test > 0):
        return None
    cuts: list[Cuts] = [(0, count, count, count) for count in tokens]
    for share, part in ((validation, 1), (test, 2)):
        held_out = 0
        while share > 0 and held_out < share * sum(tokens) and len(numbers) > 1 + (part == 1 and test > 0):
            number = numbers.pop(0)
            held_out += tokens[number]
            cuts[number] = (0, 0, tokens[number], tokens[number]) if part == 1 else (0, 0, 0, tokens[number])
    return cuts


def _without(
    files: list[TokenFile], held_out: list[TokenFile], field: str, pattern: str, left_out: LeftOut
) -> list[TokenFile]:
    """Return the files that are not held out for validation or test. Raises ConfigError if none is left."""
    by_bin = {bin_path(file.prefix): file for file in files}
    held = [bin_path(file.prefix) for file in held_out]
    return [by_bin[path] for path in not_held_out(by_bin, held, field, pattern, left_out)]


def check_vocabulary(vocab_size: int, prefix: Path) -> None:
    """Raise ConfigError if the token file's tokenizer has more tokens than the model's vocabulary."""
    tokens = vocab_size_of(prefix)
    if tokens is not None and (text_vocab_size_of(prefix) or tokens) > vocab_size:
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


def _opened(pattern: str, field: str, left_out: LeftOut) -> list[TokenFile]:
    try:
        files = [open_token_file(prefix) for prefix in _prefixes(pattern, field, left_out)]
    except TokenFileError as error:
        raise ConfigError(field, pattern, str(error), _REMEDY) from None
    for file in files:
        if (mask := mask_path(file.prefix)).exists():
            why = f"{mask} says which tokens of these conversations are learned, and data=tokens learns all"
            raise ConfigError(field, pattern, why, f"data=chat {typed_text(field, pattern)}")
        if file.dtype.kind == "f":
            why = f"{bin_path(file.prefix)} contains {file.dtype.name}, but token ids are integers"
            raise ConfigError(field, pattern, why, _REMEDY)
    return files


_REMEDY = "a pair of .bin and .idx files made by Megatron-LM's preprocess_data.py or `launcher prepare`"


def _prefixes(pattern: str, field: str, left_out: LeftOut) -> list[Path]:
    """Return the paths, without .bin or .idx, that `pattern` names: a path or a glob. Raises ConfigError.

    A file that the glob reaches by two names is used once.
    """
    plain = _plain(pattern)
    if glob.has_magic(plain):
        prefixes = _matching_prefixes(f"{plain}.idx", field, left_out)
        if not prefixes:
            remedy = _path_remedy(field, Path(plain))
            raise ConfigError(field, pattern, "the glob matches no .idx file", remedy)
        with_tokens = _matching_prefixes(f"{plain}.bin", field, Counter())
        left_out["without an .idx file"] += len(set(with_tokens).difference(prefixes))
        by_bin = {bin_path(prefix): prefix for prefix in prefixes}
        existing = [path for path in by_bin if path.exists()]
        kept = {by_bin[path] for path in first_of_each(existing, left_out)}
        return [prefix for path, prefix in by_bin.items() if prefix in kept or path not in existing]
    prefix = Path(plain)
    for path in (index_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise ConfigError(field, pattern, f"{path} does not exist", _path_remedy(field, prefix))
    return [prefix]


def known_prefixes(pattern: str) -> list[Path]:
    """Return the prefixes of the token files that `pattern` names and that have an index, sorted."""
    plain = _plain(pattern)
    if glob.has_magic(plain):
        return _matching_prefixes(f"{plain}.idx", "data.train", Counter())
    return [Path(plain)] if index_path(Path(plain)).is_file() else []


def _matching_prefixes(pattern: str, field: str, left_out: LeftOut) -> list[Path]:
    root = Path(Path(pattern).anchor)
    relative = str(Path(pattern).relative_to(root))
    return sorted({path.with_suffix("") for path in matching(root, relative, field, left_out)})


def _plain(pattern: str) -> str:
    return os.path.expanduser(pattern.removesuffix(".bin").removesuffix(".idx"))


def _path_remedy(field: str, prefix: Path) -> str:
    """Return a setting with token files from the closest existing directory above `prefix`."""
    if prefix.is_file() and format_of(prefix) is not None:
        return prepare_commands(prefix)
    directory = closest_directory((prefix, *prefix.parents))
    indices = directory.glob("*.idx") if directory else ()
    pairs = sorted(path.with_suffix("") for path in indices if path.with_suffix(".bin").is_file())
    if not pairs and prefix.is_dir() and any(format_of(path) for path in prefix.iterdir()):
        return prepare_commands(prefix)
    if not pairs:
        return f"{field}=PATH (without the ending) of {_REMEDY}"
    others = f" (this directory has {len(pairs) - 1} more)" if pairs[1:] else ""
    return typed_text(field, str(pairs[0])) + others


def _stretch(file: TokenFile, start: int, end: int) -> Stretch:
    return Stretch(MappedTokens(file, start, end), str(bin_path(file.prefix)), start)


def _cuts(file: TokenFile, validation: float, test: float) -> Cuts:
    """Return the token indices where training, validation and test begin, and where test ends.

    Each cut is moved to the closest document boundary, unless documents are so long that the move would
    change the smallest part by more than a third.
    """
    total = file.num_tokens
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
