"""Open the training, validation and test data of a run, and check the data before ranks start.

The check reads text files, which are small, and a few pages of each token file.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.errors import ConfigError
from launcher.config.schema import CorpusSource, RunConfig
from launcher.config.shape import end_of_document, is_of_images, may_read_token_files, sequence_length
from launcher.data.blend import Blend, Segment
from launcher.data.chat import chat_companions, check_chats, open_chats
from launcher.data.chat_template import TEMPLATE_FILE, TOKENIZER_CONFIG
from launcher.data.corpus import load_corpus, token_counts, tokens_digest
from launcher.data.dataset_card import end_of_document_of, tokenizer_path
from launcher.data.images import check_images, digit_counts, digits, image_folder
from launcher.data.input_files import LeftOut
from launcher.data.sampler import Samples
from launcher.data.tokenizer import HuggingFace, write_byte_tokenizer
from launcher.data.tokens import (
    HeldOutPart,
    TokenSplit,
    check_documents_end,
    check_vocabulary,
    known_prefixes,
    open_tokens,
    probe_ids,
)
from launcher.data.windows import Stretch, Windows, check_long_enough
from launcher.files import write_text

TOKENIZER = "tokenizer.json"
ONLY = ""  # the source name in a run that has a single source, not a blend


@dataclass(frozen=True, eq=False)  # eq: samples have no single truth value
class Data:
    """The samples of each part, and a digest of the training data, by source name."""

    train: dict[str, Samples]
    validation: dict[str, Samples]
    test: dict[str, Samples]
    digests: dict[str, str]  # also of separate validation and test files, by `held_out_name`

    def blend(self, segments: Sequence[Segment]) -> Blend:
        """Return the training samples in the order that the blends of the run give."""
        return Blend(self.train, segments)


def blend_of(run: RunConfig, start: int = 0) -> Segment:
    """Return the segment that uses the blend of the run's config from sample `start` on."""
    return Segment(start, run.data.weights or {ONLY: 1.0})


def held_out_name(source: str, part: str) -> str:
    """Return the name of a digest of separate validation or test files; no source has such a name."""
    return f"{source}:{part}"


def open_data(run: RunConfig) -> Data:
    """Return the data of a run, opened for one rank. Raises ConfigError for missing or damaged data."""
    if run.data.source is CorpusSource.tokens:
        splits = _token_splits(run)
        parts = {name: (split.train, split.validation, split.test) for name, split in splits.items()}
        digests = {
            held_out_name(name, part) if part else name: digest
            for name, split in splits.items()
            for part, digest in split.digests().items()
        }
    elif run.data.source is CorpusSource.chat:
        chats = open_chats(run)
        return Data(
            {ONLY: Samples(chats.train, run.training.seed)},
            {ONLY: Samples(chats.validation, None)},
            {ONLY: Samples(chats.test, None)} if chats.test else {},
            {held_out_name(ONLY, part) if part else ONLY: digest for part, digest in chats.digests.items()},
        )
    elif is_of_images(run):
        of_digits = run.data.source is CorpusSource.digits
        images, digests = digits(run.data) if of_digits else image_folder(run.data, run.model, Counter())
        train, validation, test = images
        return Data(
            {ONLY: Samples(train, run.training.seed)},
            {ONLY: Samples(validation, None)},
            {ONLY: Samples(test, None)} if len(test) else {},
            {held_out_name(ONLY, part) if part else ONLY: digest for part, digest in digests.items()},
        )
    else:
        corpus = load_corpus(run.data)
        parts = {ONLY: ([Stretch(corpus.train)], [Stretch(corpus.validation)], [])}
        digests = {ONLY: tokens_digest(corpus.train)}
        if run.data.validation is not None:
            digests[held_out_name(ONLY, "validation")] = tokens_digest(corpus.validation)
    seed = run.training.seed
    return Data(
        # Each source has its own seed: with one seed, two sources of equal length would have the same order.
        {name: _samples(run, train, f"{seed}{name and '/'}{name}") for name, (train, _, _) in parts.items()},
        {name: _samples(run, validation, None) for name, (_, validation, _) in parts.items()},
        {name: _samples(run, test, None) for name, (_, _, test) in parts.items() if any(map(len, test))},
        digests,
    )


def check_data(run: RunConfig) -> LeftOut:
    """Check that a run can train on its data. Raises ConfigError.

    Reads text files completely, and a few pages of each other file. Returns the number of files that the
    config names and the run does not use, by reason.
    """
    left_out: LeftOut = Counter()
    if is_of_images(run):
        _check_images(run, left_out)
    elif run.data.source is CorpusSource.tokens:
        _check_tokens(run, left_out)
    elif run.data.source is CorpusSource.chat:
        check_chats(run, left_out)
    else:
        train, validation = token_counts(run.data, left_out)
        _check_lengths(run, ONLY, {"training": [train], "validation": [validation]})
    return left_out


def check_known_vocabulary(run: RunConfig) -> None:
    """Raise ConfigError if token files on this machine have more tokens than the model's vocabulary.

    Unlike `check_data`, it accepts missing files: a plan may be for another machine.
    """
    for prefix in _known_prefixes(run):
        check_vocabulary(run.model.vocab_size, prefix)


def _known_prefixes(run: RunConfig) -> list[Path]:
    """Return the run's token files that are on this machine; opens none of them."""
    if not may_read_token_files(run):
        return []
    patterns = [*run.data.sources.values(), *([run.data.train] if run.data.train else [])]
    return [prefix for pattern in patterns for prefix in known_prefixes(pattern)]


def _check_tokens(run: RunConfig, left_out: LeftOut) -> None:
    splits = _token_splits(run, left_out)
    for prefix in _prefixes(splits):
        check_vocabulary(run.model.vocab_size, prefix)
    tokenizer_of(run, splits)
    for name, split in splits.items():
        parts = {"training": split.train, "validation": split.validation, "test": split.test}
        for stretches in parts.values():
            probe_ids(stretches, run.model.vocab_size)
        if run.data.document_attention:
            check_documents_end(split.files, run.data.end_of_document)
        lengths = {part: list(map(len, stretches)) for part, stretches in parts.items()}
        if not sum(lengths["test"]):
            del lengths["test"]
        _check_lengths(run, name, lengths)


def _check_images(run: RunConfig, left_out: LeftOut) -> None:
    if run.data.source is CorpusSource.digits:
        counts = digit_counts(run.data)
    else:
        folders, _ = image_folder(run.data, run.model, left_out)
        counts = [len(folder) for folder in folders]
        for folder in folders:
            check_images(folder)
    for count, part in zip(counts[:2], ("training", "validation"), strict=True):
        if count == 0:
            why = f"the {part} part has none of the {sum(counts)} images"
            remedy = "data.validation_fraction=0.2, or more images"
            raise ConfigError("data.validation_fraction", run.data.validation_fraction, why, remedy)


def _check_lengths(run: RunConfig, name: str, parts: dict[str, list[int]]) -> None:
    # The shortest part is checked first, so that the suggested sequence length fits every part.
    for part, tokens in sorted(parts.items(), key=lambda item: max(item[1])):
        check_long_enough(tokens, sequence_length(run), f"the {part} part of {name or 'the corpus'}")


def _token_splits(run: RunConfig, left_out: LeftOut | None = None) -> dict[str, TokenSplit]:
    d, counts = run.data, Counter() if left_out is None else left_out

    def split(field: str, train: str, validation_field: str, validation: str | None) -> TokenSplit:
        held_out = HeldOutPart(validation_field, validation, d.validation_fraction)
        test, sample = HeldOutPart("data.test", d.test, d.test_fraction), sequence_length(run) + 1
        return open_tokens(field, train, held_out, test, sample, counts)

    if not d.sources:
        assert d.train is not None, "validated with the config"
        return {ONLY: split("data.train", d.train, "data.validation", d.validation)}
    validation = d.validation_sources
    return {
        n: split(f"data.sources.{n}", train, f"data.validation_sources.{n}", validation.get(n))
        for n, train in d.sources.items()
    }


def _prefixes(splits: dict[str, TokenSplit]) -> list[Path]:
    return [file.prefix for split in splits.values() for file in split.files]


def tokenizer_of(run: RunConfig, splits: dict[str, TokenSplit]) -> Path | None:
    """Return the tokenizer.json of the token files, or None if unknown. Raises ConfigError for several."""
    if run.data.tokenizer is not None:
        path = Path(run.data.tokenizer).expanduser()
        HuggingFace(path, field="data.tokenizer")
        return path
    paths = [path for prefix in _prefixes(splits) if (path := tokenizer_path(prefix)).exists()]
    for path in paths[1:]:
        if path.read_bytes() != paths[0].read_bytes():
            why = f"{paths[0]} and {path} are different tokenizers, and a model has only one"
            remedy = "use only token files made with the same tokenizer"
            raise ConfigError("data.tokenizer", None, why, remedy)
    return paths[0] if paths else None


def record_tokenizer(run: RunConfig, folder: Path) -> None:
    """Copy the tokenizer of the run's token files, if it is known, to folder/tokenizer.json.

    Of conversations also the chat template is written.
    """
    if run.data.source is CorpusSource.chat:
        _record_chat(run, folder)
        return
    if run.data.source is not CorpusSource.tokens:
        return
    source, copy = tokenizer_of(run, _token_splits(run)), folder / TOKENIZER
    if source is None or (copy.exists() and copy.read_bytes() == source.read_bytes()):
        return
    folder.mkdir(exist_ok=True)
    _forget_tokenizer(folder)
    shutil.copyfile(source, copy)


def _forget_tokenizer(folder: Path) -> None:
    """Remove the files of another tokenizer, and its tokens from the settings of the model.

    They came with the model that the run started from.
    """
    for pattern in _TOKENIZER_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    for name in _MODEL_FILES:
        _forget_tokens(folder / name)


_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "chat_template*",
)
_MODEL_FILES = ("config.json", "generation_config.json")


def _forget_tokens(path: Path) -> None:
    """Remove eos_token_id and the like from a JSON file: an export would name tokens of another tokenizer."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return  # an export does not read them either
    if isinstance(settings, dict) and any(name.endswith(_TOKEN_ID) for name in settings):
        kept = {name: value for name, value in settings.items() if not name.endswith(_TOKEN_ID)}
        write_text(path, json.dumps(kept, indent=2) + "\n")


_TOKEN_ID = "_token_id"


def _record_chat(run: RunConfig, folder: Path) -> None:
    source, template = chat_companions(run)
    copy = folder / TOKENIZER
    folder.mkdir(exist_ok=True)
    if source is None:
        _forget_tokenizer(folder)
        write_byte_tokenizer(copy)
    elif not (copy.exists() and copy.read_bytes() == source.read_bytes()):
        _forget_tokenizer(folder)
        shutil.copyfile(source, copy)
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template.source)
    if source is not None and not (folder / TOKENIZER_CONFIG).exists():
        beside = source.parent / TOKENIZER_CONFIG
        if source.name == TOKENIZER and beside.is_file():
            shutil.copyfile(beside, folder / TOKENIZER_CONFIG)
        elif template is not None and template.tokens:
            _write_tokenizer_config(run, template.tokens, folder / TOKENIZER_CONFIG)


def _write_tokenizer_config(run: RunConfig, tokens: dict[str, str], path: Path) -> None:
    """Write settings with which transformers loads the tokenizer, and the special tokens of its template."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": run.model.max_sequence_length,
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    path.write_text(json.dumps(settings, indent=2) + "\n")


def end_of_documents(run: RunConfig) -> int | None:
    """Return the token that ends each document of the run's token files; None if they do not state one.

    Reads their cards and opens none of them.
    """
    if run.data.end_of_document is not None or run.data.source is CorpusSource.chat:
        return end_of_document(run)
    ends = {end_of_document_of(prefix) for prefix in _known_prefixes(run)}
    return ends.pop() if len(ends) == 1 else None


def _samples(run: RunConfig, stretches: list[Stretch], shuffle_seed: str | None) -> Samples:
    # Text needs no check: every vocabulary has all 256 byte values.
    vocab_size = run.model.vocab_size if run.data.source is CorpusSource.tokens else None
    return Samples(Windows(stretches, sequence_length(run), vocab_size), shuffle_seed)
