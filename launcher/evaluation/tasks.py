"""Find tasks of lm-evaluation-harness. Its own import takes seconds, and the index of its tasks longer."""

import difflib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.config.errors import ConfigError, refusal
from launcher.config.schema import EvaluateConfig

INSTALL = "pip install 'launcher[evaluate]'"


def check_harness(config: EvaluateConfig) -> None:
    """Raise ConfigError if tasks are named and lm_eval is not installed. Imports nothing."""
    if config.tasks and find_spec("lm_eval") is None:
        why = "the package lm_eval (lm-evaluation-harness) is not installed"
        raise refusal(config, "tasks", why, INSTALL, "pip install lm_eval")
    if config.task_dir is not None and not Path(config.task_dir).expanduser().is_dir():
        raise refusal(config, "task_dir", "is not a directory", "a directory with the YAML files of tasks")


def task_manager_of(config: EvaluateConfig) -> Any:
    """Return lm_eval's TaskManager, which knows every task of `config`. Raises ConfigError."""
    # The ranks are processes already; the library's threads would only slow them down.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval.tasks import TaskManager

    folder = None if config.task_dir is None else str(Path(config.task_dir).expanduser())
    if folder is not None:
        # The index of 14,000 shipped tasks takes half a minute, so it is made only if it is needed.
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(config.tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder)
    known = manager.all_tasks
    for task in config.tasks:
        if task not in known:
            raise _unknown(config, task, known)
    return manager


def _unknown(config: EvaluateConfig, task: str, known: list[str]) -> ConfigError:
    why = "lm-evaluation-harness has no such task, group or tag"
    near = difflib.get_close_matches(task, known, n=3, cutoff=0.6)
    near = near or [name for name in known if task.lower() in name.lower()][:3]
    listed = "a name that `lm_eval ls tasks` lists, or task_dir=DIRECTORY with its YAML file"
    remedy = " or ".join([f"tasks=[{name}]" for name in near] or [listed])
    return ConfigError("tasks", task, why, remedy)
