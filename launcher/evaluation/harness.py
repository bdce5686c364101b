"""Run tasks of lm-evaluation-harness on a model in any layout.

lm_eval runs on rank 0. The other ranks wait for windows of tokens, which all ranks score together.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tokenizers import Tokenizer as LibraryTokenizer

from launcher.config.errors import ConfigError, refusal
from launcher.config.schema import EvaluateConfig
from launcher.data.evaluated import Window
from launcher.data.open import TOKENIZER
from launcher.data.tokenizer import write_byte_tokenizer
from launcher.evaluation.scorer import Score, Scorer
from launcher.evaluation.subject import Subject

_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
)


def run_tasks(
    rank: int,
    config: EvaluateConfig,
    subject: Subject,
    scorer: Scorer,
    length: int,
    manager: Any,
    folder: Path,
) -> dict[str, Any]:
    """Return lm_eval's results on rank 0, and nothing on other ranks. Collective over the world."""
    if rank:
        while windows := _received():
            scorer.scores(windows)
        return {}
    model = LauncherModel(config, subject, _SharedScorer(scorer), length, folder)
    results = simple_evaluate(
        model=model,
        tasks=list(config.tasks),
        num_fewshot=config.few_shot,
        limit=config.limit,
        task_manager=manager,
        log_samples=False,
    )
    _send([])
    return {name: results[name] for name in _KEPT if name in results}


def _send(windows: Sequence[Window]) -> None:
    dist.broadcast_object_list([windows])


def _received() -> list[Window]:
    windows: list[list[Window]] = [[]]
    dist.broadcast_object_list(windows)
    return windows[0]


class _SharedScorer:
    """Scores windows of rank 0 on all ranks."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def scores(self, windows: Sequence[Window]) -> list[Score]:
        """Return the score of each window; the longest are scored first, windows of like length together."""
        if not windows:
            return []
        order = sorted(range(len(windows)), key=lambda place: -len(windows[place].tokens))
        ordered = [windows[place] for place in order]
        _send(ordered)
        return [score for _, score in sorted(zip(order, self._scorer.scores(ordered), strict=True))]


class LauncherModel(TemplateLM):  # type: ignore[misc]  # lm_eval ships no types
    """The model interface of lm_eval. It encodes, truncates and stops as lm_eval's own `hf` model does."""

    def __init__(
        self, config: EvaluateConfig, subject: Subject, scorer: _SharedScorer, length: int, folder: Path
    ) -> None:
        super().__init__()
        self._config, self._scorer, self.max_length = config, scorer, length
        path = subject.tokenizer_json
        if path is None:
            assert subject.is_of_bytes, "checked before the ranks were started"
            path = folder / TOKENIZER
            write_byte_tokenizer(path)
        # As transformers reads it: text that spells a special token is this token, and the file may say that
        # a token such as BOS is put before the text.
        self._tokenizer = LibraryTokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._end, self._begin = self._special(subject, "eos_token"), self._special(subject, "bos_token")
        self._end = subject.end_of_document if self._end is None else self._end

    def _special(self, subject: Subject, name: str) -> int | None:
        spelling = subject.special_token(name)
        token: int | None = None if spelling is None else self._tokenizer.token_to_id(spelling)
        return token

    @property
    def eot_token_id(self) -> int:
        if self._end is None:
            why = "the tokenizer names no token that ends a text, which these tasks need"
            raise refusal(self._config, "tasks", why, "tokenizer=PATH beside a tokenizer_config.json")
        return self._end

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._begin is None else self._begin

    @property
    def tokenizer_name(self) -> str:
        return "launcher"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and self._begin is not None:
            add_special_tokens = not string.startswith(str(self._tokenizer.id_to_token(self._begin)))
        ids: list[int] = self._tokenizer.encode(
            string, add_special_tokens=add_special_tokens is not False
        ).ids
        return ids

    def tok_decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        return [(-score.loss, score.is_greedy) for score in self._scorer.scores(windows)]

    def _window(self, context: list[int], continuation: list[int]) -> Window:
        """Return the window of the last `max_length` inputs, which scores the continuation."""
        tokens = np.array((context + continuation)[-(self.max_length + 1) :], np.int64)
        return Window(tokens, max(0, len(tokens) - len(continuation) - 1))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, counts = [], []
        for request in requests:
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            disjoint = [utils.make_disjoint_window(window) for window in rolling]
            windows += [self._window(*window) for window in disjoint]
            counts.append(len(disjoint))
        scores = iter(self._scorer.scores(windows))
        return [-sum(next(scores).loss for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the likeliest continuation of each request, one forward pass of all of them per token."""
        texts = [_Generation(self, *request.args) for request in requests]
        while unfinished := [text for text in texts if not text.is_finished]:
            scores = self._scorer.scores([text.window() for text in unfinished])
            for text, score in zip(unfinished, scores, strict=True):
                text.add(score.likeliest)
        return [text.result() for text in texts]

    def settings_of(self, options: dict[str, Any]) -> tuple[list[str], int]:
        """Return the texts that stop a generation, and the most tokens. Raises ConfigError."""
        settings = normalize_gen_kwargs(options, 256)
        if settings.get("do_sample"):
            why = f"a task draws its answers (temperature {settings.get('temperature')}), and only greedy"
            why += " answers are supported"
            raise ConfigError("tasks", ",".join(self._config.tasks), why, "tasks with do_sample: false")
        most = int(settings["max_gen_toks"])
        if most >= self.max_length:
            why = f"a task generates up to {most} tokens, and prompt and answer share {self.max_length}"
            raise ConfigError(
                "tasks", ",".join(self._config.tasks), why, f"sequence_length={most + 1} (or more)"
            )
        end = None if self._end is None else self._tokenizer.decode([self._end], skip_special_tokens=False)
        return handle_stop_sequences(settings.get("until"), eos=end), most


class _Generation:
    """A greedy continuation of a prompt."""

    def __init__(self, model: LauncherModel, context: str, options: dict[str, Any]) -> None:
        self._model = model
        self._stops, self._most = model.settings_of(options)
        self._prompt = model.tok_encode(context)[-(model.max_length - self._most) :]
        self._added: list[int] = []

    @property
    def is_finished(self) -> bool:
        if len(self._added) >= self._most or (self._added and self._added[-1] == self._model._end):
            return True
        text = self._model.tok_decode(self._added)
        return any(stop in text for stop in self._stops if stop)

    def window(self) -> Window:
        """Return the window whose likeliest token continues the text; its last label is a placeholder."""
        tokens = np.array([*self._prompt, *self._added, 0], np.int64)
        return Window(tokens, len(tokens) - 2)

    def add(self, token: int) -> None:
        self._added.append(token)

    def result(self) -> str:
        text: str = postprocess_generated_text(self._model.tok_decode(self._added), self._stops, None)
        return text
