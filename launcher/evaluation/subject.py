"""The model that `launcher evaluate` measures: its weights, run, tokenizer and data. Imports no torch."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.checkpoint.companions import companions_of, run_of
from launcher.checkpoint.exported_files import BYTE_SOURCES, data_of
from launcher.checkpoint.sources import RUN_CONFIG, WeightSource, weights_at
from launcher.checkpoint.tokenizer_files import TOKENIZER_CONFIG, tokens_of
from launcher.config.compose import load_typed
from launcher.config.errors import ConfigError, refusal
from launcher.config.layout import Layout
from launcher.config.machine import Machine
from launcher.config.numbers import BYTE_VALUES
from launcher.config.schema import (
    CorpusSource,
    DataConfig,
    Dtype,
    EvaluateConfig,
    HardwareConfig,
    InputKind,
    OptimizerConfig,
    OptimizerName,
    PipelineSchedule,
    PrecisionConfig,
    RunConfig,
    SchedulerConfig,
    SchedulerName,
    TrainingConfig,
)
from launcher.config.shape import sequence_length
from launcher.config.validate import validate
from launcher.config.world import World, world_of_machine
from launcher.data.chat import PREPARE, opened_chats, prepared_prefix
from launcher.data.chat_template import TEMPLATE_FILE
from launcher.data.dataset_card import tokenizer_path
from launcher.data.evaluated import text_stretch, token_stretches
from launcher.data.open import ONLY, TOKENIZER, open_data
from launcher.data.packing import PackedChats
from launcher.data.tokenizer import Bytes, HuggingFace, Tokenizer
from launcher.data.windows import Stretch, Windows

_OTHER_DATA = "'text=\"corpus/**/*.txt\"' or tokens=NAME, other data"
VALIDATION = "validation"


@dataclass(frozen=True)
class Subject:
    """Weights, and the known facts about the run that made them."""

    weights: WeightSource
    recorded: RunConfig | None  # None: imported weights, or a Hugging Face directory
    tokenizer_json: Path | None  # None: the tokens are bytes, or the tokenizer is not known
    is_of_bytes: bool
    end_of_document: int | None

    @property
    def run_dir(self) -> Path:
        return run_of(self.weights.path)

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer; None if it is not known."""
        if self.tokenizer_json is not None:
            return HuggingFace(self.tokenizer_json, field="tokenizer")
        return Bytes() if self.is_of_bytes else None

    def special_token(self, name: str) -> str | None:
        """Return a token such as `bos_token` as the recorded tokenizer_config.json spells it."""
        path = next(
            (file for file in companions_of(self.weights.path) if file.name == TOKENIZER_CONFIG), None
        )
        try:
            value = json.loads(path.read_text()).get(name) if path else None
        except (OSError, ValueError, AttributeError, RecursionError):
            return None
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None


def subject_of(config: EvaluateConfig, path: Path) -> Subject:
    """Return the model at `path`: a run, a checkpoint or a Hugging Face directory. Raises ConfigError."""
    weights = weights_at(path, "run.dir")
    if weights.model.inputs is InputKind.patches:
        why = "holds an image classifier, which has no perplexity; its accuracy is in metrics.jsonl"
        raise ConfigError("run.dir", path, why, "the directory of a language model's run")
    file = run_of(weights.path) / RUN_CONFIG
    recorded = replace(load_typed(file, RunConfig), model=weights.model) if file.exists() else None
    data = data_of(weights)
    is_of_bytes = config.tokenizer is None and data.get("source") in BYTE_SOURCES
    subject = Subject(weights, recorded, _tokenizer_json(config, weights), is_of_bytes, None)
    subject = replace(subject, tokenizer_json=None) if is_of_bytes else subject
    end = data.get("end_of_document")
    tokenizer = subject.tokenizer()
    if isinstance(tokenizer, HuggingFace):
        _check_size(tokenizer, subject)
        if end is None:
            end = tokenizer.end_of_document if tokenizer.end_spelling else _eos_of(subject)
    return replace(subject, end_of_document=Bytes.end_of_document if is_of_bytes else end)


def _eos_of(subject: Subject) -> int | None:
    """Return the token that tokenizer_config.json names as the end; None if it names none."""
    spelling = subject.special_token("eos_token")
    tokens = {} if subject.tokenizer_json is None else tokens_of(subject.tokenizer_json)
    return next((index for index, text in tokens.items() if text == spelling), None)


def _tokenizer_json(config: EvaluateConfig, weights: WeightSource) -> Path | None:
    if config.tokenizer is not None:
        return Path(config.tokenizer).expanduser()
    return next((file for file in companions_of(weights.path) if file.name == TOKENIZER), None)


def _check_size(tokenizer: HuggingFace, subject: Subject) -> None:
    size = subject.weights.model.vocab_size
    if tokenizer.text_vocab_size > size:
        why = f"this tokenizer has {tokenizer.vocab_size} tokens, and the model has {size}"
        remedy = "tokenizer=PATH of the tokenizer.json that the model was trained with"
        raise ConfigError("tokenizer", subject.tokenizer_json, why, remedy)


def known_tokenizer(config: EvaluateConfig, subject: Subject, field: str) -> Tokenizer:
    """Return the tokenizer, which `field` needs. Raises ConfigError if it is not known."""
    if (tokenizer := subject.tokenizer()) is None:
        why = f"{field}=... needs a tokenizer, and {subject.run_dir} records none"
        raise refusal(config, field, why, "tokenizer=PATH of the tokenizer.json the model was trained with")
    return tokenizer


def run_to_evaluate(config: EvaluateConfig, subject: Subject, machine: Machine) -> tuple[RunConfig, Layout]:
    """Return the run that builds the model in the layout of `config`, and this layout. Raises ConfigError."""
    recorded, p = subject.recorded or RunConfig(model=subject.weights.model), config.parallelism
    dtype = config.dtype or (recorded.precision.dtype if subject.recorded else Dtype.fp32)
    # The rules of text as bytes do not hold for imported weights.
    data = recorded.data if subject.recorded else DataConfig(source=CorpusSource.tokens, train="none")
    run = replace(
        recorded,
        data=replace(data, sequence_length=_length(config, subject)),
        precision=PrecisionConfig(dtype=dtype),
        hardware=HardwareConfig(device=config.device),
        # No optimizer states: there are no updates.
        optimizer=OptimizerConfig(name=OptimizerName.sgd, lr=1.0, momentum=0.0, gradient_clipping=None),
        scheduler=SchedulerConfig(name=SchedulerName.constant),
        deepspeed={},
    )
    world = world_of_machine(run, machine)
    if dtype is Dtype.fp16 and world.device == "cpu":
        raise refusal(config, "dtype", "fp16 is computed on GPUs only", "dtype=fp32")
    copy = p.tensor * p.pipeline * p.context
    data_size = p.data or max(1, world.ranks // copy)
    training = TrainingConfig(
        steps=0,
        micro_batch_size=config.micro_batch_size,
        # A micro-batch for each pipeline stage.
        global_batch_size=config.micro_batch_size * data_size * p.pipeline,
        compile=False,  # the lengths of prompts differ
    )
    parallelism = replace(p, data=data_size, pipeline_schedule=PipelineSchedule["1f1b"])
    run = replace(run, parallelism=parallelism, training=training)
    return run, _validated(run, world)


def _validated(run: RunConfig, world: World) -> Layout:
    try:
        return validate(run, world)
    except ConfigError as error:
        if error.field == "data.sequence_length":
            raise ConfigError(
                "sequence_length", error.value, error.why, error.remedy.replace("data.", "")
            ) from None
        raise


def _length(config: EvaluateConfig, subject: Subject) -> int:
    """Return the tokens of a window. Raises ConfigError if it is too long, or the stride is."""
    most = subject.weights.model.max_sequence_length
    length = config.sequence_length or (sequence_length(subject.recorded) if subject.recorded else most)
    if length > most:
        why = f"the model takes at most {most} tokens (model.max_sequence_length)"
        raise refusal(config, "sequence_length", why, f"sequence_length={most}")
    if (config.stride or 0) > length:
        why = f"tokens between windows of {length} tokens would not be scored"
        raise refusal(config, "stride", why, f"stride={length} (or less)")
    return length


def data_to_score(config: EvaluateConfig, subject: Subject) -> dict[str, list[Stretch] | PackedChats]:
    """Return the tokens to score by name: text files, token files, else the run's validation data.

    Nothing is scored beside tasks unless it is named. Raises ConfigError.
    """
    data: dict[str, list[Stretch] | PackedChats] = {}
    if config.text is not None:
        tokenizer = known_tokenizer(config, subject, "text")
        data["text"] = [text_stretch(config.text, tokenizer, subject.end_of_document)]
    if config.tokens is not None:
        data["tokens"] = _token_files(config.tokens, config, subject)
    if config.chats is not None:
        data["chats"] = _chats(config.chats, config, subject)
    if not data and not config.tasks:
        data = _validation_data(config, subject)
    for name, parts in data.items():
        if isinstance(parts, PackedChats):
            _check_not_empty(parts, config, name)
        elif not any(len(stretch) > 1 for stretch in parts):
            why = "fewer than two tokens: the first token of a file is only context"
            raise ConfigError(name, getattr(config, name, None), why, "more text")
    return data


def _token_files(pattern: str, config: EvaluateConfig, subject: Subject) -> list[Stretch]:
    try:
        stretches, prefixes = token_stretches(pattern, subject.weights.model.vocab_size)
    except ConfigError as error:
        if error.field != "model.vocab_size":
            raise
        raise _other_tokenizer(config, error.why) from None
    for prefix in prefixes:
        if why := _why_other_tokenizer(prefix, subject):
            raise _other_tokenizer(config, why)
    return stretches


def _why_other_tokenizer(prefix: Path, subject: Subject) -> str | None:
    """Return why the model cannot have the tokens of these token files; None if it can."""
    if not (path := tokenizer_path(prefix)).exists():
        return None
    if _has_byte_tokens(path) and (subject.is_of_bytes or _has_byte_tokens(subject.tokenizer_json)):
        return None
    if subject.is_of_bytes:
        return f"they were made with {path}, and the model was trained on bytes"
    if subject.tokenizer_json is not None and not _same_json(path, subject.tokenizer_json):
        return f"they were made with {path}, the model with another tokenizer"
    return None


def _has_byte_tokens(tokenizer_json: Path | None) -> bool:
    """Return whether a tokenizer.json is that of bytes. The export of a run on bytes changes its content."""
    tokens = {} if tokenizer_json is None else tokens_of(tokenizer_json)
    return max(tokens, default=BYTE_VALUES) < BYTE_VALUES


def _other_tokenizer(config: EvaluateConfig, why: str) -> ConfigError:
    remedies = "token files made with the tokenizer of the model", "text=GLOB, which is tokenised here"
    return refusal(config, "tokens", why, *remedies)


def _chats(pattern: str, config: EvaluateConfig, subject: Subject) -> PackedChats:
    """Return the conversations that `pattern` names, cut to the length of a window. Raises ConfigError."""
    known_tokenizer(config, subject, "chats")
    prefix, end = prepared_prefix(pattern), subject.end_of_document
    why = None if prefix is None else _why_other_tokenizer(prefix, subject)
    if end is None:
        why = "the tokenizer has no token that ends a conversation"
    if why:
        raise refusal(config, "chats", why, f"token files of this tokenizer: {PREPARE}")
    assert end is not None
    try:
        chats, _ = opened_chats(_chat_settings(subject), "chats", pattern)
    except ConfigError as error:
        if error.field == "chats":
            raise
        remedy = f"token files of these conversations: {PREPARE} chat_template=PATH"
        raise refusal(config, "chats", error.why, remedy) from None
    return PackedChats(chats, 0, len(chats), _length(config, subject), end, subject.weights.model.vocab_size)


def _chat_settings(subject: Subject) -> DataConfig:
    """Return the settings by which `data=chat` encodes conversations as the run did."""
    data, path = DataConfig(source=CorpusSource.chat), subject.tokenizer_json
    if path is None:
        return data
    if not _has_byte_tokens(path):
        return replace(data, tokenizer=str(path), end_of_document=subject.end_of_document)
    # A run on bytes recorded a tokenizer of bytes, and its template beside it.
    template = path.parent / TEMPLATE_FILE
    return replace(data, chat_template=str(template) if template.is_file() else None)


def _check_not_empty(chats: PackedChats, config: EvaluateConfig, name: str) -> None:
    if not len(chats):
        length = chats.sequence_length
        why = f"in {name} the assistant writes nothing among the first {length + 1} tokens of a conversation"
        raise ConfigError("sequence_length", length, why, "a larger one, or other conversations")


def _same_json(a: Path, b: Path) -> bool:
    try:
        return a.read_bytes() == b.read_bytes() or bool(
            json.loads(a.read_text()) == json.loads(b.read_text())
        )
    except (ValueError, RecursionError):
        return False


def _validation_data(config: EvaluateConfig, subject: Subject) -> dict[str, list[Stretch] | PackedChats]:
    if subject.recorded is None:
        why = "these weights belong to no run, so they have no validation data"
        raise ConfigError("run.dir", subject.weights.path, why, _OTHER_DATA)
    recorded = subject.recorded
    data = replace(recorded.data, sequence_length=_length(config, subject))  # conversations are cut to it
    try:
        sources = open_data(replace(recorded, data=data)).validation
    except ConfigError as error:
        why = f"the run's validation data cannot be read: {error.field}={error.value}: {error.why}"
        raise ConfigError("run.dir", subject.run_dir, why, _OTHER_DATA) from None
    parts: dict[str, list[Stretch] | PackedChats] = {}
    for name, samples in sources.items():
        items = samples.items
        assert isinstance(items, Windows | PackedChats), "a language model reads tokens"
        of_source = list(items.stretches) if isinstance(items, Windows) else items
        parts[VALIDATION if name == ONLY else f"{VALIDATION}/{name}"] = of_source
    return parts
