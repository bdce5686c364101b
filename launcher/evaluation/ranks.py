"""Evaluate on the ranks of a layout: load the weights, score the data, run the tasks."""

from pathlib import Path
from typing import Any

from launcher.checkpoint.load import agreed_error, load_initial_weights
from launcher.checkpoint.manifest import UnusableCheckpoint
from launcher.checkpoint.read import stored_files_of
from launcher.checkpoint.sources import WeightSource, damaged
from launcher.config.layout import Layout
from launcher.config.schema import EvaluateConfig, RunConfig
from launcher.config.shape import sequence_length
from launcher.engine.base import Engine
from launcher.engine.build import build_engine
from launcher.engine.distributed import join, leave, prepare_deepspeed
from launcher.evaluation.perplexity import Measure
from launcher.evaluation.results import Results, write_results
from launcher.evaluation.scorer import Scorer
from launcher.evaluation.subject import Subject, data_to_score
from launcher.runtime.resume import checked_together


def evaluate_rank(
    rank: int,
    *,
    config: EvaluateConfig,
    subject: Subject,
    run: RunConfig,
    layout: Layout,
    task_manager: Any,  # of lm_eval, which has no types; None without tasks
    folder: Path,
) -> None:
    """Evaluate as a rank of `layout`; rank 0 writes the results into `folder`."""
    prepare_deepspeed(layout.device)
    device = join(
        rank=rank, world_size=layout.world_size, local_rank=rank, device=layout.device,
        init_method=f"file://{folder / 'store'}", timeout_minutes=run.launch.timeout_minutes,
    )  # fmt: skip
    engine = build_engine(run, layout, device, drawn=False)
    load(engine, subject.weights)
    scorer, tokenizer = Scorer(engine, run), subject.tokenizer()
    length, size = sequence_length(run), run.model.vocab_size
    stride = config.stride or length
    measure = Measure(scorer, length, stride, config.limit, size, tokenizer, subject.end_of_document)
    data = {name: measure(parts).values() for name, parts in data_to_score(config, subject).items()}
    tasks: dict[str, Any] = {}
    if config.tasks:
        from launcher.evaluation.harness import run_tasks

        tasks = run_tasks(rank, config, subject, scorer, length, task_manager, folder)
    if rank == 0:
        write_results(folder, Results(data, tasks))
    leave()


def load(engine: Engine, weights: WeightSource) -> None:
    """Load the weights into the engine; compare their checksums. Collective over the world.

    Raises ConfigError.
    """
    try:
        with agreed_error(), checked_together(stored_files_of(weights)):
            load_initial_weights(engine, weights)
    except UnusableCheckpoint as unusable:
        raise damaged("run.dir", weights.path, unusable) from None
