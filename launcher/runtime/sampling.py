"""Sample text from a run's final weights, or from its newest checkpoint, in one process."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.checkpoint.companions import COMPANIONS
from launcher.checkpoint.final import FINAL_WEIGHTS, final_weights_of
from launcher.checkpoint.manifest import checkpoints_in, step_of
from launcher.checkpoint.sources import WeightSource, check_model_is, weights_at
from launcher.checkpoint.weights import load_source, load_weights
from launcher.config.compose import load_typed
from launcher.config.errors import ConfigError
from launcher.config.schema import CorpusSource, FinetuneConfig, GenerateConfig, ParallelismConfig, RunConfig
from launcher.config.shape import has_lora
from launcher.data.open import TOKENIZER
from launcher.data.tokenizer import Bytes, HuggingFace, Tokenizer
from launcher.models.architecture import FlatModel, flat_model
from launcher.models.block_context import BlockContext
from launcher.parallel.initializer import Initializer
from launcher.parallel.mesh import ProcessMesh
from launcher.runtime.run_dir import CONFIG


def generate(config: GenerateConfig, run_dir: Path) -> str:
    """Return the prompt and `max_new_tokens` sampled tokens as text. Raises ConfigError."""
    run = load_typed(run_dir / CONFIG, RunConfig)
    weights = unfinished_weights(run, run_dir)
    tokenizer = tokenizer_of(run, config, run_dir)
    model = load_model(run, run_dir, weights)
    tokens = prompt_tokens(config, tokenizer, run.model.vocab_size)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for _ in range(config.max_new_tokens):
            window = tokens[:, -run.model.max_sequence_length :]
            scores = model.logits(window)[0, -1, : run.model.vocab_size]
            tokens = torch.cat([tokens, sample(scores, config, generator).view(1, 1)], dim=1)
    return tokenizer.decode(tokens[0].tolist())


def prompt_tokens(config: GenerateConfig, tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Return the token ids (1, tokens) of the prompt.

    Raises ConfigError for a token outside the vocabulary, and for text that the tokenizer cannot read or of
    which it makes no token.
    A special token that the prompt spells becomes this token, unlike in text to train on: a prompt is written
    by hand, and a chat template is made of such tokens.
    """
    if isinstance(tokenizer, HuggingFace):
        try:
            ids, *_ = tokenizer.encode_with_places(config.prompt)
        except UnicodeEncodeError:
            why = "only a model of bytes takes a prompt that is not UTF-8"
            raise ConfigError("prompt", ascii(config.prompt), why, "a prompt in UTF-8") from None
    else:
        [ids] = tokenizer.encode([config.prompt])
    if not len(ids):
        why = "the tokenizer makes no token of this text"
        raise ConfigError("prompt", repr(config.prompt), why, "prompt=The (or another word)")
    if (largest := int(ids.max())) >= vocab_size:
        spelling = tokenizer.decode([largest])
        why = f"it has the token {largest}, {spelling!r}, and the model has {vocab_size} tokens"
        remedy = "a prompt without this token, or tokenizer=PATH of the tokenizer.json of the model"
        raise ConfigError("prompt", config.prompt, why, remedy)
    return torch.from_numpy(ids.astype(np.int64))[None]


def tokenizer_of(run: RunConfig, config: GenerateConfig, run_dir: Path) -> Tokenizer:
    """Return the tokenizer of `config` or of the run; bytes if its text is bytes. Raises ConfigError."""
    recorded = run_dir / COMPANIONS / TOKENIZER
    if config.tokenizer is not None:
        return HuggingFace(Path(config.tokenizer).expanduser(), field="tokenizer")
    if run.data.source not in (CorpusSource.tokens, CorpusSource.chat):
        return Bytes()
    if not recorded.exists():
        why = "its token files had no tokenizer beside them, and the run recorded none"
        raise ConfigError("run.dir", run_dir, why, "tokenizer=PATH of the tokenizer.json they were made with")
    return HuggingFace(recorded, field="run.dir")


def unfinished_weights(run: RunConfig, run_dir: Path) -> WeightSource | None:
    """Return the newest checkpoint of a run that has not finished, and say its step; None if it has.

    Raises ConfigError if the run has neither final weights nor a checkpoint.
    """
    checkpoints = checkpoints_in(run_dir)
    if (run_dir / FINAL_WEIGHTS).is_dir() or not checkpoints:
        step = final_weights_of(run_dir).step
        if not checkpoints or step_of(checkpoints[0]) <= step:
            return None  # else the run went on after these weights
    weights = weights_at(run_dir, "run.dir")
    check_model_is(run.model, weights, "run.dir")
    print(f"note     the run has not finished: weights of step {step_of(weights.path)}", file=sys.stderr)
    return weights


def load_model(run: RunConfig, run_dir: Path, weights: WeightSource | None = None) -> FlatModel:
    """Return the whole model on the CPU, in evaluation mode, with `weights` or the run's final weights."""
    # The weights do not depend on the layout that trained them: one process loads the whole model.
    adapters = has_lora(run)
    run = replace(run, parallelism=ParallelismConfig(), finetune=FinetuneConfig())
    mesh = ProcessMesh.single()
    initializer = Initializer(run.training.seed, mesh.tensor, drawn=False)
    context = BlockContext.create(run, mesh, initializer)
    model = flat_model(run.model, context)
    if weights or adapters:
        load_source(model, weights or weights_at(run_dir, "run.dir"))
    else:
        load_weights(model, run_dir)
    return model.eval()


def sample(scores: Tensor, config: GenerateConfig, generator: torch.Generator) -> Tensor:
    """Return a token id of scores (V,): at temperature 0 the likeliest, else drawn from the top_k."""
    if config.temperature == 0:
        return scores.argmax()
    if config.top_k:
        threshold = scores.topk(min(config.top_k, scores.numel())).values[-1]
        scores = scores.masked_fill(scores < threshold, float("-inf"))
    # At a temperature near 0 a quotient is infinite: the largest must stay 0, for softmax computes inf - inf.
    scores = (scores.double() - scores.max()) / config.temperature
    return torch.multinomial(F.softmax(scores.float(), dim=-1), 1, generator=generator)
