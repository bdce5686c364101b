"""The world that torchrun or srun put this process in, read from environment variables alone.

srun may start every rank, or one launcher per node, which starts the ranks of its node.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config.errors import ConfigError


@dataclass(frozen=True)
class RankEnvironment:
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int


@dataclass(frozen=True)
class NodeEnvironment:
    """The ranks that one launcher per node starts on its own."""

    node: int
    nodes: int
    ranks_per_node: int
    master_addr: str
    master_port: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def local_size(self) -> int:
        return self.ranks_per_node

    @property
    def ranks(self) -> range:
        return range(self.node * self.ranks_per_node, (self.node + 1) * self.ranks_per_node)


Place = RankEnvironment | NodeEnvironment | None  # None: alone on this machine


def place_of(environ: Mapping[str, str], *, configured: int | None, gpus: int) -> Place:
    """Where this process stands; `configured` ranks per node are what the config says, if it does.

    A step of as many tasks per node starts every rank. One of a single task per node starts a launcher on
    each, which starts the ranks of its node: as many as configured, or as GPUs are seen there. Raises
    ConfigError for a step of another number of tasks than the configured.
    """
    joined = joined_ranks(environ)
    if joined is None or "RANK" in environ:
        return joined
    per_node = configured or max(1, gpus)
    nodes = len(expand_hosts(_srun_text(environ, _nodes_variable(environ))))
    if joined.world_size == nodes and per_node > 1:
        return NodeEnvironment(joined.rank, nodes, per_node, joined.master_addr, joined.master_port)
    if configured is not None and joined.local_size != configured:
        raise ConfigError(
            "hardware.accelerators_per_node",
            configured,
            f"srun started {joined.local_size} tasks on this node",
            f"hardware.accelerators_per_node={joined.local_size} or srun --ntasks-per-node={configured} "
            "(one task per rank) or --ntasks-per-node=1 (a launcher that starts the ranks of its node)",
        )
    return joined


def joined_ranks(environ: Mapping[str, str]) -> RankEnvironment | None:
    """The rank that torchrun or srun made of this process; None where neither did.

    None also in the batch script's own shell and in a step of one task: there ranks are still to be started.
    Raises ConfigError, named after the variable, where the variables contradict each other or are incomplete.
    """
    # Batch scripts often export WORLD_SIZE alone, for what they start; RANK alone is a mistake.
    if "RANK" in environ:
        return _from_torchrun(environ)
    if "SLURM_STEP_ID" in environ and _step_tasks(environ) > 1:
        return _from_srun(environ)
    return None


def speaks_for_all(environ: Mapping[str, str]) -> bool:
    """Return whether this process reports what all ranks of torchrun or srun have to report alike."""
    try:
        ranks = joined_ranks(environ)
    except ConfigError:
        return True  # a stray RANK or WORLD_SIZE: there may be no first rank
    return ranks is None or ranks.rank == 0


def step_name(environ: Mapping[str, str]) -> str | None:
    """What to call a run whose ranks srun starts: the same on every node and after a requeue; else None."""
    if "RANK" in environ or joined_ranks(environ) is None:
        return None
    return f"slurm-{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"


def expand_hosts(hosts: str) -> list[str]:
    """The host names that a Slurm list such as `node[03-05,9],rack[1-2]n[1-4]` stands for, in its order.

    Raises ValueError where the text is not such a list.
    """
    # A comma inside brackets separates numbers, one outside separates hosts.
    patterns = re.split(r",(?![^\[]*\])", hosts)
    return [host for pattern in patterns for host in _expand_pattern(pattern)]


def _from_torchrun(environ: Mapping[str, str]) -> RankEnvironment:
    found = RankEnvironment(
        rank=_torchrun_integer(environ, "RANK"),
        world_size=_torchrun_integer(environ, "WORLD_SIZE", at_least=1),
        local_rank=_torchrun_integer(environ, "LOCAL_RANK"),
        local_size=_torchrun_integer(environ, "LOCAL_WORLD_SIZE", at_least=1),
        master_addr=_torchrun_text(environ, "MASTER_ADDR"),
        master_port=_torchrun_integer(environ, "MASTER_PORT", at_least=1),
    )
    if found.master_port > 65535:
        raise ConfigError("MASTER_PORT", found.master_port, "ports end at 65535", "a free port below 65536")
    _check_bounds(environ, found, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return found


def _from_srun(environ: Mapping[str, str]) -> RankEnvironment:
    found = RankEnvironment(
        rank=_srun_integer(environ, "SLURM_PROCID"),
        world_size=_step_tasks(environ),
        local_rank=_srun_integer(environ, "SLURM_LOCALID"),
        local_size=_tasks_of_this_node(environ),
        master_addr=_first_host(environ, _nodes_variable(environ)),
        master_port=_step_port(
            _srun_integer(environ, "SLURM_JOB_ID"), _srun_integer(environ, "SLURM_STEP_ID")
        ),
    )
    tasks = _step_tasks_variable(environ)
    _check_bounds(environ, found, "SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_GTIDS")
    return found


def _check_bounds(
    environ: Mapping[str, str],
    found: RankEnvironment,
    rank: str,
    world: str,
    local_rank: str,
    local_size: str,
) -> None:
    """Refuse what does not fit together; the names are those of the variables to blame."""
    for name, value, size_name, size in (
        (rank, found.rank, world, found.world_size),
        (local_rank, found.local_rank, local_size, found.local_size),
    ):
        if value >= size:
            why = f"{size_name}={environ[size_name]} makes {size - 1} the last"
            raise ConfigError(name, value, why, f"{name}={size - 1}")
    if found.local_size > found.world_size:
        why = f"more ranks on this node than {world}={found.world_size} allows"
        raise ConfigError(local_size, environ[local_size], why, f"{world} of at least {found.local_size}")


def _step_tasks_variable(environ: Mapping[str, str]) -> str:
    # SLURM_NTASKS is the job's: a step of fewer tasks inherits it unchanged.
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"


def _nodes_variable(environ: Mapping[str, str]) -> str:
    return "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environ else "SLURM_JOB_NODELIST"


def _step_tasks(environ: Mapping[str, str]) -> int:
    return _srun_integer(environ, _step_tasks_variable(environ), at_least=1)


def _tasks_of_this_node(environ: Mapping[str, str]) -> int:
    """SLURM_GTIDS lists the ranks of this node, such as `4,5,6,7`."""
    ranks = _srun_text(environ, "SLURM_GTIDS")
    if not re.fullmatch(r"\d+(,\d+)*", ranks):
        raise ConfigError("SLURM_GTIDS", ranks, "is not a list of ranks", _SRUN_REMEDY)
    return ranks.count(",") + 1


def _first_host(environ: Mapping[str, str], name: str) -> str:
    hosts = _srun_text(environ, name)
    try:
        return expand_hosts(hosts)[0]
    except ValueError as error:
        raise ConfigError(name, hosts, str(error), _SRUN_REMEDY) from None


def _step_port(job: int, step: int) -> int:
    """One port for all ranks of a step; jobs and steps of near numbers, which may share a node, differ."""
    return 20000 + (job * 7919 + step) % 20000


def _expand_pattern(pattern: str) -> list[str]:
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[^\[\]]+\])+", pattern):
        raise ValueError(f"{pattern!r} is not a host name or a Slurm range of them")
    # Splitting at a capturing group alternates: text, brackets, text, brackets, ..., text.
    pieces = re.split(r"\[([^\]]+)\]", pattern)
    choices = [[piece] if index % 2 == 0 else _expand_numbers(piece) for index, piece in enumerate(pieces)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _expand_numbers(ranges: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        matched = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        if matched is None:
            raise ValueError(f"{part!r} in brackets is neither a number nor a range")
        first, last = matched[1], matched[2] or matched[1]
        if int(last) < int(first):
            raise ValueError(f"the range {part!r} runs backwards")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


_TORCHRUN_REMEDY = "start with torchrun, which sets all six variables, or unset RANK"
_SRUN_REMEDY = "start with srun, which sets it, or unset SLURM_STEP_ID"


def _torchrun_text(environ: Mapping[str, str], name: str) -> str:
    return _text(environ, name, "RANK is set, but this is not", _TORCHRUN_REMEDY)


def _torchrun_integer(environ: Mapping[str, str], name: str, at_least: int = 0) -> int:
    return _integer(_torchrun_text(environ, name), name, at_least, _TORCHRUN_REMEDY)


def _srun_text(environ: Mapping[str, str], name: str) -> str:
    return _text(environ, name, "SLURM_STEP_ID is set, but this is not", _SRUN_REMEDY)


def _srun_integer(environ: Mapping[str, str], name: str, at_least: int = 0) -> int:
    return _integer(_srun_text(environ, name), name, at_least, _SRUN_REMEDY)


def _text(environ: Mapping[str, str], name: str, missing: str, remedy: str) -> str:
    if not environ.get(name):
        raise ConfigError(name, environ.get(name), missing, remedy)
    return environ[name]


def _integer(text: str, name: str, at_least: int, remedy: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) < at_least:
        raise ConfigError(name, text, f"is not an integer of at least {at_least}", remedy)
    return int(text)
