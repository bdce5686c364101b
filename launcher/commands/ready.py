"""Make a run ready: choose its layout, check the run and its data, plan it, refuse what cannot fit."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from launcher.checkpoint.companions import tokenizer_of_weights
from launcher.config.errors import ConfigError, refusal, typed_text
from launcher.config.layout import Layout
from launcher.config.machine import Machine
from launcher.config.schema import CorpusSource, RunConfig
from launcher.config.shape import may_read_token_files
from launcher.config.validate import validate
from launcher.config.world import World, world_of_hardware, world_of_nodes
from launcher.data.input_files import LeftOut
from launcher.planning.choose.enforce import chosen, refuse_too_large
from launcher.planning.choose.search import Search
from launcher.planning.cost.run_plan import Plan, make_plan, memory_budget

_TENSORBOARD = ("pip install 'tensorboard>=2.18,<3'", "logging.tensorboard=false")


@dataclass(frozen=True)
class ReadyRun:
    """A checked run with its layout and plan; `search` is what `parallelism=auto` chose the layout from."""

    run: RunConfig
    layout: Layout
    plan: Plan
    search: Search | None = None
    left_out: LeftOut = field(default_factory=Counter)  # data files that the run does not use, by reason


def ready(run: RunConfig, world: World, *, needs_data: bool, must_fit: bool) -> ReadyRun:
    """Return the run as it can be trained on the ranks of `world`.

    With `needs_data` its data is read and checked here. With `must_fit` a run that needs more memory than a
    rank has is refused, unless plan.enforce=false. Raises ConfigError.
    """
    search = None
    if run.parallelism.auto:
        run, search = chosen(run, world)
    layout = validate(run, world)
    left_out: LeftOut = Counter()
    if needs_data or may_read_token_files(run):
        # numpy, which reads the data, takes a tenth of a second to import, and most plans need no data.
        from launcher.data.open import check_data, check_known_vocabulary

        if needs_data:
            left_out = check_data(run)
        else:
            check_known_vocabulary(run)
    plan = make_plan(run, layout, budget=memory_budget(run, world, layout.world_size))
    if must_fit:
        refuse_too_large(plan)
    return ReadyRun(run, layout, plan, search, left_out)


def ready_elsewhere(runs: Iterable[RunConfig], machine: Machine) -> list[ReadyRun]:
    """Return the runs on their configured hardware, for commands that neither read their data nor train them.

    Raises ConfigError.
    """
    return [ready(run, world_of_hardware(run, machine), needs_data=False, must_fit=False) for run in runs]


def check_tensorboard(run: RunConfig) -> None:
    """Raise ConfigError if logging.tensorboard is set and its package is missing. Imports nothing."""
    if run.logging.tensorboard and find_spec("tensorboard") is None:
        why = "the package tensorboard is not installed"
        raise refusal(run, "logging.tensorboard", why, *_TENSORBOARD)


def check_bytes(run: RunConfig) -> list[str]:
    """Return a warning if text is read as bytes, and the initial weights have a tokenizer.

    Raises ConfigError for conversations, whose tokenizer is one setting. No weights are read.
    """
    d, begun = run.data, run.checkpoint.init_from
    is_bytes = d.source in (CorpusSource.stdlib, CorpusSource.text)
    if begun is None or not (is_bytes or d.source is CorpusSource.chat):
        return []
    from launcher.data.chat import chat_companions  # imports numpy

    tokenizer = tokenizer_of_weights(Path(begun).expanduser())
    if tokenizer is None or (d.source is CorpusSource.chat and chat_companions(run)[0] is not None):
        return []
    has = f"checkpoint.init_from={begun} has a tokenizer"
    if not is_bytes:
        why = f"without a tokenizer data=chat reads bytes, and {has}"
        raise refusal(run, "data.tokenizer", why, typed_text("data.tokenizer", str(tokenizer)))
    remedy = typed_text("tokenizer.path", str(tokenizer))
    return [f"warning  data={d.source.name} is read as bytes, and {has}: bytes are not its tokens\n"
            f"  try: launcher prepare SOURCE TARGET {remedy}, and data=tokens data.train=TARGET"]  # fmt: skip


def check_compiler(run: RunConfig, layout: Layout) -> None:
    """Raise ConfigError if training.compile is set and this machine cannot compile for the run's device."""
    if not run.training.compile:
        return
    compiler = os.environ.get("CXX", "g++")  # as torch reads it
    if layout.device == "cpu" and which(compiler) is None:
        why = f"torch.compile needs a C++ compiler on CPU, and {compiler} is not installed"
        raise refusal(run, "training.compile", why, "training.compile=false", "CXX=PATH of a compiler")
    if layout.device == "cuda" and find_spec("triton") is None:
        why = "torch.compile needs the package triton on GPUs, and it is not installed"
        raise refusal(run, "training.compile", why, "training.compile=false", "pip install triton")


def ready_on_most_nodes(run: RunConfig, nodes: int) -> tuple[ReadyRun, int]:
    """Return the run on as many of `nodes` as it can use, and their number; else raise the first refusal."""
    refused: ConfigError | None = None
    for used in range(nodes, 0, -1):
        try:
            return ready(run, world_of_nodes(run, used), needs_data=False, must_fit=True), used
        except ConfigError as error:
            refused = refused or error
    assert refused is not None
    raise refused
