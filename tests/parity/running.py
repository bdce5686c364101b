"""Runs for the tests of verify, and its passes one at a time."""

from collections.abc import Callable

import torch

from launcher.config.schema import RunConfig
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.engine.distributed import prepare_deepspeed
from tests.config.composing import run_of

prepare_deepspeed("cpu")
torch.set_num_threads(1)  # a fork does not take OpenMP's threads along, and deadlocks in them

from deepspeed.runtime.pipe.module import PipelineModule  # noqa: E402

from launcher.engine.pipeline import StagedModule  # noqa: E402
from launcher.parity.differences import Difference  # noqa: E402  (after DeepSpeed is made quiet)
from launcher.parity.shrink import shrink  # noqa: E402
from launcher.parity.verdict import write_report  # noqa: E402
from launcher.parity.verification import VerifyPass, dropout_pass, passes, run_pass, verify  # noqa: E402

CORES = 8

__all__ = [
    "PipelineModule",
    "StagedModule",
    "VerifyPass",
    "dropout_pass",
    "passes",
    "plain_sgd_pass",
    "run_pass",
    "shrink",
    "small_run",
    "verify",
    "worst",
    "write_report",
]


def small_run(*overrides: str, steps: int = 2) -> RunConfig:
    """A run of these overrides, shrunk as verify does."""
    run = run_of("hardware=cpu", f"verify.steps={steps}", *overrides)
    return shrink(run, validate(run, World("cpu", CORES, CORES)))[0]


def plain_sgd_pass(small: RunConfig, mutation: Callable[[], None] | None = None) -> VerifyPass:
    """The first pass alone: it shows every gradient."""
    return next(verify(small, mutation=mutation))


def worst(one: VerifyPass) -> list[Difference]:
    """What failed, for an assertion's message."""
    return [difference for difference in one.differences if not difference.ok][:10]
