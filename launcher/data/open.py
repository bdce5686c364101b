"""A run's data, opened: what it trains and validates on, checked as far as a second allows."""

from dataclasses import dataclass

from launcher.config.schema import CorpusSource, RunConfig
from launcher.config.shape import sequence_length
from launcher.data.corpus import load_corpus, token_counts
from launcher.data.sampler import Samples
from launcher.data.tokens import TokenSplit, check_documents_end, open_tokens, probe_ids
from launcher.data.windows import Stretch, Windows, check_long_enough


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class Data:
    """`digest` is the same for the same training data, wherever it lies."""

    train: Samples
    validation: Samples
    digest: str


def open_data(run: RunConfig) -> Data:
    """What one rank reads from. Raises ConfigError, as check_data does before there are ranks."""
    if run.data.source is CorpusSource.tokens:
        split = _token_split(run)
        train, validation, digest = split.train, split.validation, split.digest()
    else:
        corpus = load_corpus(run.data)
        train, validation = [Stretch(corpus.train)], [Stretch(corpus.validation)]
        digest = corpus.digest()
    return Data(
        Samples(_windows(run, train), shuffle_seed=run.training.seed),
        Samples(_windows(run, validation), shuffle_seed=None),
        digest,
    )


def check_data(run: RunConfig) -> None:
    """Refuse data that is not there, not whole, of other ids than the model's, or too short for one sample.

    Reads no text, and of token files a few pages. Raises ConfigError.
    """
    if run.data.source is CorpusSource.tokens:
        split = _token_split(run)
        parts = [[len(stretch.tokens) for stretch in part] for part in (split.train, split.validation)]
        probe_ids(split.train, run.model.vocab_size)
        probe_ids(split.validation, run.model.vocab_size)
        if run.data.document_attention:
            check_documents_end(split.files, run.data.end_of_document)
    else:
        parts = [[tokens] for tokens in token_counts(run.data)]
    names = "the training part of the corpus", "the validation part of the corpus"
    # The shorter part first: what it is offered as a remedy then holds for both.
    for tokens, name in sorted(zip(parts, names, strict=True), key=lambda part: max(part[0])):
        check_long_enough(tokens, sequence_length(run), name)


def _token_split(run: RunConfig) -> TokenSplit:
    assert run.data.train is not None, "validated with the config"
    return open_tokens(run.data.train, run.data.validation, run.data.validation_fraction, field="data.train")


def _windows(run: RunConfig, stretches: list[Stretch]) -> Windows:
    # Bytes need no check: every vocabulary has them all.
    checked = run.model.vocab_size if run.data.source is CorpusSource.tokens else None
    return Windows(stretches, sequence_length(run), checked)
