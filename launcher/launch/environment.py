"""Rank and world size of a process that torchrun or srun started, read from environment variables alone.

srun starts either every rank, or one launcher per node, which then starts the ranks of its node.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config.errors import ConfigError

_MOST_HOSTS = 2**16  # in a range of a host list


@dataclass(frozen=True)
class RankEnvironment:
    """Numbers of one rank in the world. All ranks meet at `master_addr`:`master_port`."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int


@dataclass(frozen=True)
class NodeEnvironment:
    """A node of a job in which srun starts a launcher on each node, for `local_size` ranks."""

    node: int
    nodes: int
    local_size: int
    master_addr: str
    master_port: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.local_size

    @property
    def ranks(self) -> range:
        return range(self.node * self.local_size, (self.node + 1) * self.local_size)


# None: neither torchrun nor srun started this process, and all ranks run on this machine.
LaunchEnvironment = RankEnvironment | NodeEnvironment | None


def launch_environment(environ: Mapping[str, str], *, configured: int | None, gpus: int) -> LaunchEnvironment:
    """Return the rank or the node that torchrun or srun started this process as; None if neither did.

    `configured` is hardware.accelerators_per_node; None if the config leaves it open. `gpus` is the number of
    GPUs on this node. A Slurm step with one task per node starts one launcher on each node, and that launcher
    starts `configured` ranks or, with None, one rank per GPU. A step with more tasks per node starts every
    rank.

    Raises:
        ConfigError: the number of tasks per node is neither 1 nor `configured`, or variables are missing or
            contradict each other.
    """
    joined = joined_ranks(environ)
    if joined is None or "RANK" in environ:
        return joined
    per_node = configured or max(1, gpus)
    nodes = len(expand_hosts(_text(environ, _nodes_variable(environ))))
    if joined.world_size == nodes and per_node > 1:
        return NodeEnvironment(joined.rank, nodes, per_node, joined.master_addr, joined.master_port)
    if configured is not None and joined.local_size != configured:
        raise ConfigError(
            "hardware.accelerators_per_node",
            configured,
            f"differs from the number of tasks: srun started {joined.local_size} tasks on this node",
            f"hardware.accelerators_per_node={joined.local_size}, or `srun --ntasks-per-node={configured}` "
            "(one task per rank), or `srun --ntasks-per-node=1` (one launcher that starts the node's ranks)",
        )
    return joined


def joined_ranks(environ: Mapping[str, str]) -> RankEnvironment | None:
    """Return the rank that torchrun or srun started this process as; None if neither did.

    Also None in the shell of a batch script and in a step with one task: there the ranks are not started yet.
    Raises ConfigError, with the variable as its field, if variables are missing or contradict each other.
    """
    # Batch scripts often export WORLD_SIZE alone, for the processes that they start. RANK alone is a mistake.
    if "RANK" in environ:
        return _from_torchrun(environ)
    if "SLURM_STEP_ID" in environ and _step_tasks(environ) > 1:
        return _from_srun(environ)
    return None


def missing_ranks(environ: Mapping[str, str], rank: int, world_size: int, reason: str = "") -> str:
    """Return why a rank does not meet the other ranks, and what to do. Pure.

    `reason` is torch's message; an empty text while the rank still waits.
    """
    address, is_step = f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}", _is_slurm_step(environ)
    if re.search("EADDRINUSE|address already in use", reason, re.IGNORECASE):
        remedy = (
            "the same srun again, as a new step" if is_step else "MASTER_PORT=29501 (or another) on all ranks"
        )
        return f"MASTER_PORT={environ.get('MASTER_PORT')}: another process uses this port\n  try: {remedy}"
    joined = re.search(r"(\d+)/\d+ clients joined", reason)
    came = f"only {joined[1]} of {world_size} ranks came" if joined else f"rank {rank} of {world_size} waits"
    if is_step:
        why = f"srun started {world_size} tasks, and each must run the launcher (SLURM_STEP_ID is set)"
        remedy = "`srun launcher ...` in a batch script or after salloc, or in a shell of `srun --pty`: "
        remedy += "`env -u SLURM_STEP_ID launcher ...`, which starts the ranks of this machine by itself"
    else:
        why = f"all {world_size} ranks (WORLD_SIZE) must start, with the same address and port, and reach it"
        remedy = f"`nc -zv {address.replace(':', ' ')}` on the other machines; for one machine `unset RANK`"
    return f"{came} at MASTER_ADDR:MASTER_PORT={address}: {why}\n  try: {remedy}"


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    # A launcher sets RANK too, for its ranks.
    return "SLURM_STEP_ID" in environ and "TORCHELASTIC_RUN_ID" not in environ


def speaks_for_all(environ: Mapping[str, str]) -> bool:
    """Return whether this process prints the messages that are equal on all ranks of torchrun or srun."""
    try:
        ranks = joined_ranks(environ)
    except ConfigError:
        return True  # the variables are invalid, so perhaps no process has rank 0
    return ranks is None or ranks.rank == 0


def slurm_step_name(environ: Mapping[str, str]) -> str | None:
    """Return a run name equal on every node and after a requeue; None if srun did not start the ranks."""
    if "RANK" in environ or joined_ranks(environ) is None:
        return None
    return f"slurm-{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"


def expand_hosts(hosts: str) -> list[str]:
    """Return the host names in a Slurm host list such as `node[03-05,9],rack[1-2]n[1-4]`; or ValueError."""
    # A comma inside brackets separates numbers; a comma outside brackets separates hosts.
    patterns = re.split(r",(?![^\[]*\])", hosts)
    return [host for pattern in patterns for host in _expand_pattern(pattern)]


def _from_torchrun(environ: Mapping[str, str]) -> RankEnvironment:
    ranks = RankEnvironment(
        rank=_integer(environ, "RANK"),
        world_size=_integer(environ, "WORLD_SIZE", at_least=1),
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_size=_integer(environ, "LOCAL_WORLD_SIZE", at_least=1),
        master_addr=_text(environ, "MASTER_ADDR"),
        master_port=_integer(environ, "MASTER_PORT", at_least=1),
    )
    if ranks.master_port > 65535:
        why = "is above 65535, the highest port"
        raise ConfigError("MASTER_PORT", ranks.master_port, why, "MASTER_PORT=29500")
    _check_bounds(environ, ranks, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return ranks


def _from_srun(environ: Mapping[str, str]) -> RankEnvironment:
    ranks = RankEnvironment(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_step_tasks(environ),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_size=_tasks_of_this_node(environ),
        master_addr=_first_host(environ, _nodes_variable(environ)),
        master_port=_step_port(environ),
    )
    tasks = _step_tasks_variable(environ)
    _check_bounds(environ, ranks, ("SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_GTIDS"))
    return ranks


def _check_bounds(environ: Mapping[str, str], ranks: RankEnvironment, names: tuple[str, ...]) -> None:
    """Raise ConfigError for numbers that contradict each other; `names` are the variables."""
    rank, world, local_rank, local_size = names
    for name, value, size_name, size in (
        (rank, ranks.rank, world, ranks.world_size),
        (local_rank, ranks.local_rank, local_size, ranks.local_size),
    ):
        if value >= size:
            why = f"must be at most {size - 1}, because of {size_name}={environ[size_name]}"
            starter, unset = ("torchrun", "RANK") if rank == "RANK" else ("srun", "SLURM_STEP_ID")
            remedy = f"start the command with {starter}, or unset {unset}"
            raise ConfigError(name, value, why, remedy)
    if ranks.local_size > ranks.world_size:
        why = f"gives this node more ranks than the whole world has ({world}={ranks.world_size})"
        remedy = f"{world}={ranks.local_size} or larger"
        raise ConfigError(local_size, environ[local_size], why, remedy)


def _step_tasks_variable(environ: Mapping[str, str]) -> str:
    # SLURM_NTASKS counts the tasks of the job: a step with fewer tasks inherits it unchanged.
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"


def _nodes_variable(environ: Mapping[str, str]) -> str:
    return "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environ else "SLURM_JOB_NODELIST"


def _step_tasks(environ: Mapping[str, str]) -> int:
    return _integer(environ, _step_tasks_variable(environ), at_least=1)


def _tasks_of_this_node(environ: Mapping[str, str]) -> int:
    ranks = _text(environ, "SLURM_GTIDS")
    if not re.fullmatch(r"\d+(,\d+)*", ranks):
        raise ConfigError("SLURM_GTIDS", ranks, "is not a comma-separated list of ranks", _remedy(environ))
    return ranks.count(",") + 1


def _first_host(environ: Mapping[str, str], name: str) -> str:
    hosts = _text(environ, name)
    try:
        return expand_hosts(hosts)[0]
    except ValueError as error:
        raise ConfigError(name, hosts, str(error), _remedy(environ)) from None


def _step_port(environ: Mapping[str, str]) -> int:
    """Return the port of a step, 20000 to 39999: neighbouring jobs and steps may share a node."""
    job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
    return 20000 + (job * 7919 + step) % 20000


def _expand_pattern(pattern: str) -> list[str]:
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[^\[\]]+\])+", pattern):
        raise ValueError(f"{pattern!r} is not a host name or a Slurm host range such as node[1-4]")
    # re.split with a capturing group returns text, brackets, text, brackets, ..., text.
    pieces = re.split(r"\[([^\]]+)\]", pattern)
    choices = [[piece] if index % 2 == 0 else _expand_numbers(piece) for index, piece in enumerate(pieces)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _expand_numbers(ranges: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        matched = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part)
        if matched is None:
            raise ValueError(f"{part!r} in brackets is neither a number nor a range of numbers")
        first, last = matched[1], matched[2] or matched[1]
        if int(last) < int(first):
            raise ValueError(f"the range {part!r} runs backwards")
        if int(last) - int(first) >= _MOST_HOSTS:
            raise ValueError(f"the range {part!r} has more than {_MOST_HOSTS:,} hosts")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        marker = "RANK" if "RANK" in environ else "SLURM_STEP_ID"
        why = f"is missing or empty, although {marker} is set"
        raise ConfigError(name, environ.get(name), why, _remedy(environ))
    return environ[name]


def _integer(environ: Mapping[str, str], name: str, at_least: int = 0) -> int:
    text = _text(environ, name)
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < at_least:
        raise ConfigError(name, text, f"must be an integer of at least {at_least}", _remedy(environ))
    return int(text)


def _remedy(environ: Mapping[str, str]) -> str:
    if "RANK" in environ:
        return "start the command with torchrun, which sets all six variables, or unset RANK"
    return "start the command with srun, which sets this variable, or unset SLURM_STEP_ID"
