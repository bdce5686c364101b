"""The ranks that a run can have: how many, of which device, and who starts them. Pure."""

from dataclasses import dataclass, replace

from launcher.config.errors import refusal
from launcher.config.machine import Machine
from launcher.config.schema import Device, HardwareConfig, RunConfig
from launcher.config.slurm_rules import check_submission


@dataclass(frozen=True)
class World:
    """The ranks that a run can use.

    torchrun, srun or a cluster starts or counts the ranks of a fixed world, and all of them take part. In any
    other world the launcher starts as many ranks as the layout needs, and `ranks` is the number of GPUs or
    CPU cores; on CPU a layout may have more ranks than cores.
    """

    device: str  # "cpu" or "cuda"
    ranks: int
    ranks_per_node: int
    fixed: bool = False
    memory_bytes: int | None = None  # of the machine, which its CPU ranks share; None: not known, or GPUs

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)

    def of_hardware(self, hardware: HardwareConfig) -> "World":
        """Return the world with the number of ranks that the config asks for, if it may still be chosen."""
        if self.fixed:
            return self
        per_node = hardware.accelerators_per_node or self.ranks_per_node
        return replace(self, ranks=hardware.nodes * per_node, ranks_per_node=per_node)


def world_of_machine(run: RunConfig, machine: Machine) -> World:
    """Return the ranks that the launcher can start here. Raises ConfigError if the run needs a GPU."""
    device = _device(run, machine)
    ranks = machine.gpus if device == "cuda" else machine.cores
    return World(device, ranks, ranks, memory_bytes=_shared_memory(device, machine))


def world_of_joined_ranks(run: RunConfig, machine: Machine, *, ranks: int, ranks_per_node: int) -> World:
    """Return the world that torchrun or srun started. Raises ConfigError if it has no GPU it needs."""
    device = _device(run, machine)
    return World(device, ranks, ranks_per_node, fixed=True, memory_bytes=_shared_memory(device, machine))


def world_of_hardware(run: RunConfig, machine: Machine) -> World:
    """Return the ranks of the hardware in the config; this machine fills in what the config leaves open."""
    h = run.hardware
    device = "cuda" if h.device is Device.cuda or (h.device is Device.auto and machine.gpus > 0) else "cpu"
    memory_bytes = _shared_memory(device, machine)
    if device == "cuda" or (h.nodes > 1 and h.accelerators_per_node):
        per_node = h.accelerators_per_node or machine.gpus or 1
        return World(device, h.nodes * per_node, per_node, memory_bytes=memory_bytes)
    cores = max(2, machine.cores)
    return World(device, cores, cores, memory_bytes=memory_bytes)


def world_of_nodes(run: RunConfig, nodes: int) -> World:
    """Return the ranks of a Slurm job on `nodes` nodes. Raises ConfigError if their hardware is not set."""
    per_node = check_submission(run)
    return World(run.hardware.device.name, nodes * per_node, per_node, fixed=True)


def _device(run: RunConfig, machine: Machine) -> str:
    """Return "cuda" or "cpu"; `auto` becomes "cuda" where there are GPUs."""
    wanted = run.hardware.device
    if wanted is Device.cuda and machine.gpus == 0:
        remedies = "hardware=cpu", "hardware=local (the hardware of this machine)"
        raise refusal(run, "hardware.device", "this machine has no GPU", *remedies)
    if wanted is Device.auto:
        return "cuda" if machine.gpus else "cpu"
    return wanted.name


def _shared_memory(device: str, machine: Machine) -> int | None:
    return machine.memory_bytes if device == "cpu" else None
