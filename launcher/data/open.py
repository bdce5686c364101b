"""A run's data, opened: what it trains on, validates and tests on, checked as far as a second allows."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.errors import ConfigError
from launcher.config.schema import CorpusSource, RunConfig
from launcher.config.shape import is_of_images, sequence_length
from launcher.data.blend import Blend, Segment
from launcher.data.card import tokenizer_path
from launcher.data.corpus import load_corpus, token_counts
from launcher.data.images import ImageArray, ImageFiles, check_images, digit_counts, digits, image_folder
from launcher.data.sampler import Samples
from launcher.data.tokenizer import HuggingFace
from launcher.data.tokens import (
    Part,
    TokenSplit,
    check_documents_end,
    check_vocabulary,
    open_tokens,
    probe_ids,
)
from launcher.data.windows import Stretch, Windows, check_long_enough

TOKENIZER = "tokenizer.json"
ONLY = ""  # the name of the source where there is one


@dataclass(frozen=True, eq=False)  # eq: samples have no single truth value
class Data:
    """By source: its samples of each part, and a digest of what is trained on."""

    train: dict[str, Samples]
    validation: dict[str, Samples]
    test: dict[str, Samples]
    digests: dict[str, str]

    def blend(self, segments: Sequence[Segment]) -> Blend:
        """The run's order of samples, after the blends it has had."""
        return Blend(self.train, segments)


def blend_of(run: RunConfig, start: int = 0) -> Segment:
    """The blend that a run's config names, from sample `start` on."""
    return Segment(start, run.data.weights or {ONLY: 1.0})


def open_data(run: RunConfig) -> Data:
    """What one rank reads from. Raises ConfigError, as check_data does before there are ranks."""
    if run.data.source is CorpusSource.tokens:
        splits = _token_splits(run)
        parts = {name: (one.train, one.validation, one.test) for name, one in splits.items()}
        digests = {name: one.digest() for name, one in splits.items()}
    elif is_of_images(run):
        images, digest = image_parts(run)
        train, validation, test = (
            Samples(part, seed) for part, seed in zip(images, (run.training.seed, None, None), strict=True)
        )
        return Data({ONLY: train}, {ONLY: validation}, {ONLY: test} if len(test) else {}, {ONLY: digest})
    else:
        corpus = load_corpus(run.data)
        parts = {ONLY: ([Stretch(corpus.train)], [Stretch(corpus.validation)], [])}
        digests = {ONLY: corpus.digest()}
    return Data(
        # A seed for each source, or two of one length would be read in one order.
        {
            name: _samples(run, part[0], f"{run.training.seed}{name and '/'}{name}")
            for name, part in parts.items()
        },
        {name: _samples(run, part[1], None) for name, part in parts.items()},
        {name: _samples(run, part[2], None) for name, part in parts.items() if _tokens(part[2])},
        digests,
    )


def check_data(run: RunConfig) -> None:
    """Refuse data that is not there, not whole, of other ids than the model's, or too short for one sample.

    Reads no text, and of token files a few pages. Raises ConfigError.
    """
    if is_of_images(run):
        _check_images(run)
        return
    if run.data.source is not CorpusSource.tokens:
        train, validation = token_counts(run.data)
        _check_lengths(run, ONLY, {"training": [train], "validation": [validation]})
        return
    splits = _token_splits(run)
    for prefix in _prefixes(splits):
        check_vocabulary(run.model.vocab_size, prefix)
    tokenizer_of(run, splits)
    for name, split in splits.items():
        parts = {"training": split.train, "validation": split.validation, "test": split.test}
        for stretches in parts.values():
            probe_ids(stretches, run.model.vocab_size)
        if run.data.document_attention:
            check_documents_end(split.files, run.data.end_of_document)
        lengths = {part: [len(one.tokens) for one in stretches] for part, stretches in parts.items()}
        if not sum(lengths["test"]):
            del lengths["test"]
        _check_lengths(run, name, lengths)


def image_parts(run: RunConfig) -> tuple[Sequence[ImageArray | ImageFiles], str]:
    """Training, validation and test part, and a digest of the first."""
    if run.data.source is CorpusSource.digits:
        return digits(run.data)
    return image_folder(run.data, run.model)


def _check_images(run: RunConfig) -> None:
    if run.data.source is CorpusSource.digits:
        counts = digit_counts(run.data)
    else:
        folders, _ = image_folder(run.data, run.model)
        counts = [len(folder) for folder in folders]
        for folder in folders:
            check_images(folder)
    for count, name in zip(counts[:2], ("train on", "validate on"), strict=True):
        if count == 0:
            why = f"of {sum(counts)} images it leaves none to {name}"
            remedy = "data.validation_fraction=0.2, or more images"
            raise ConfigError("data.validation_fraction", run.data.validation_fraction, why, remedy)


def _check_lengths(run: RunConfig, name: str, parts: dict[str, list[int]]) -> None:
    # The shortest part first: what it is offered as a remedy then holds for all.
    for part, tokens in sorted(parts.items(), key=lambda one: max(one[1])):
        what = f"the {part} part of {name or 'the corpus'}"
        check_long_enough(tokens, sequence_length(run), what)


def _token_splits(run: RunConfig) -> dict[str, TokenSplit]:
    d = run.data

    def split(field: str, train: str, validation_field: str, validation: str | None) -> TokenSplit:
        return open_tokens(
            field,
            train,
            Part(validation_field, validation, d.validation_fraction),
            Part("data.test", d.test, d.test_fraction),
        )

    if not d.sources:
        assert d.train is not None, "validated with the config"
        return {ONLY: split("data.train", d.train, "data.validation", d.validation)}
    return {
        name: split(
            f"data.sources.{name}",
            train,
            f"data.validation_sources.{name}",
            d.validation_sources.get(name),
        )
        for name, train in d.sources.items()
    }


def _prefixes(splits: dict[str, TokenSplit]) -> list[Path]:
    return [file.prefix for split in splits.values() for file in split.files]


def tokenizer_of(run: RunConfig, splits: dict[str, TokenSplit]) -> Path | None:
    """The tokenizer.json that token files were made with; None where none is beside them.

    Raises ConfigError for one that cannot be read, and for files that were made with several.
    """
    if run.data.tokenizer is not None:
        path = Path(run.data.tokenizer).expanduser()
        HuggingFace(path, field="data.tokenizer")
        return path
    found = [path for prefix in _prefixes(splits) if (path := tokenizer_path(prefix)).exists()]
    for other in found[1:]:
        if other.read_bytes() != found[0].read_bytes():
            why = f"{found[0]} and {other} are two tokenizers, and one model has one"
            raise ConfigError("data.tokenizer", None, why, "token files made with one of them")
    return found[0] if found else None


def record_tokenizer(run: RunConfig, folder: Path) -> None:
    """Copy the tokenizer of the run's token files, if there is one, to folder/tokenizer.json."""
    if run.data.source is not CorpusSource.tokens:
        return
    found, own = tokenizer_of(run, _token_splits(run)), folder / TOKENIZER
    if found is None or (own.exists() and own.read_bytes() == found.read_bytes()):
        return
    folder.mkdir(exist_ok=True)
    for path in (*folder.glob("tokenizer*"), *folder.glob("special_tokens_map.json")):
        path.unlink()  # of the model that the run began with, which had another
    shutil.copyfile(found, own)


def _samples(run: RunConfig, stretches: list[Stretch], shuffle_seed: str | None) -> Samples:
    # Bytes need no check: every vocabulary has them all.
    checked = run.model.vocab_size if run.data.source is CorpusSource.tokens else None
    return Samples(Windows(stretches, sequence_length(run), checked), shuffle_seed)


def _tokens(stretches: list[Stretch]) -> int:
    return sum(len(stretch.tokens) for stretch in stretches)
