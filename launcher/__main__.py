"""The command line: `launcher [train] OVERRIDES` and `launcher generate OVERRIDES`.

Nothing here imports torch before the config has been composed and checked.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from launcher.config.compose import multirun_index, run_hydra
from launcher.config.errors import ConfigError
from launcher.config.schema import GenerateConfig, RunConfig
from launcher.config.validate import sequence_length, validate, validate_generate
from launcher.data.sampler import check_corpus
from launcher.launch.environment import joined_ranks
from launcher.launch.local import RankFailure
from launcher.launch.machine import share_cores, this_machine

REFUSED, FAILED, INTERRUPTED = 2, 1, 130


def main() -> None:
    """The console script. Exit codes: 0 done, 1 a rank failed, 2 refused, 130 interrupted."""
    arguments = sys.argv[1:]
    command = COMMANDS.get(arguments[0]) if arguments else None
    try:
        if command:
            command(arguments[1:])
        else:
            train(arguments)
    except ConfigError as error:
        sys.exit(_report(f"launcher: {error}", REFUSED))
    except RankFailure as failure:
        sys.exit(_report(f"launcher: {failure}", FAILED))
    except KeyboardInterrupt:
        sys.exit(_report("launcher: interrupted; all ranks have ended", INTERRUPTED))


def train(arguments: list[str]) -> None:
    run_hydra("config", RunConfig, arguments, _train)


def _train(run: RunConfig) -> None:
    ranks, machine = joined_ranks(os.environ), this_machine()
    layout = validate(
        run, gpus=machine.gpus, cores=machine.cores, joined_world=ranks.world_size if ranks else None
    )
    check_corpus(run.data, sequence_length(run))
    from launcher.runtime.start import train_as_joined_rank, train_on_this_machine

    if ranks:
        train_as_joined_rank(run, layout, ranks)
    else:
        train_on_this_machine(run, layout, cores=machine.cores, multirun_index=multirun_index())


def generate(arguments: list[str]) -> None:
    run_hydra("generate", GenerateConfig, arguments, _generate)


def _generate(config: GenerateConfig) -> None:
    run_dir = Path(validate_generate(config)).expanduser()
    share_cores(1, this_machine().cores)
    from launcher.runtime.generate import generate as sample_text

    print(sample_text(config, run_dir))


COMMANDS: dict[str, Callable[[list[str]], None]] = {"train": train, "generate": generate}


def _report(message: str, code: int) -> int:
    # Under torchrun or srun every rank is refused alike: one of them says so.
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0" or code == FAILED:
        print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
