"""Plans for tests, from overrides."""

from launcher.config.schema import Device
from launcher.config.validate import validate
from launcher.planning.cost.plan import Plan, make_plan, memory_budget
from tests.config.composing import run_of

LLAMA = ["model=llama3_8b", "precision=bf16", "training.micro_batch_size=1", "training.global_batch_size=128"]


def plan_of(*overrides: str, memory_here: int | None = None) -> Plan:
    """On the hardware of the overrides, whatever this machine is."""
    run = run_of(*overrides)
    h = run.hardware
    if h.device is Device.cuda:
        per_node = h.accelerators_per_node or 1
        joined = h.nodes * per_node if h.nodes > 1 else None
        layout = validate(run, gpus=per_node, cores=1, joined_world=joined)
    else:
        layout = validate(run, gpus=0, cores=64)
    return make_plan(run, layout, budget=memory_budget(run, layout.world_size, memory_here))
