"""Plans for tests, from overrides."""

from launcher.commands.ready import ready
from launcher.config.machine import Machine
from launcher.config.world import world_of_hardware
from launcher.planning.cost.run_plan import Plan
from tests.config.composing import run_of

LLAMA = ["model=llama3_8b", "precision=bf16", "training.micro_batch_size=1", "training.global_batch_size=128"]


def plan_of(*overrides: str, memory_here: int | None = None) -> Plan:
    """Return the plan on the hardware of the overrides, independent of this machine."""
    run = run_of(*overrides)
    world = world_of_hardware(run, Machine(gpus=0, cores=64, memory_bytes=memory_here))
    return ready(run, world, needs_data=False, must_fit=False).plan
