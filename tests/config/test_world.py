"""The ranks of a world: on a machine, joined, on the hardware of a config, on the nodes of a job."""

import pytest

from launcher.config.errors import ConfigError
from launcher.config.layout import resolve_layout
from launcher.config.machine import Machine
from launcher.config.world import (
    World,
    world_of_hardware,
    world_of_joined_ranks,
    world_of_machine,
    world_of_nodes,
)
from tests.config.composing import run_of

LAPTOP, SERVER = Machine(gpus=0, cores=4, memory_bytes=10**9), Machine(gpus=8, cores=64, memory_bytes=10**12)
CPU, H100 = ["hardware=cpu"], ["hardware=h100_80gb"]
CPU_NODES = [*CPU, "hardware.nodes=2", "hardware.accelerators_per_node=3"]


@pytest.mark.parametrize(
    ("typed", "machine", "world"),
    [
        ([], LAPTOP, World("cpu", 4, 4, memory_bytes=10**9)),
        (CPU, SERVER, World("cpu", 64, 64, memory_bytes=10**12)),
        ([], SERVER, World("cuda", 8, 8)),
        (H100, SERVER, World("cuda", 8, 8)),
        # The GPUs of the machine count, not the number in the config.
        ([*H100, "hardware.accelerators_per_node=4"], SERVER, World("cuda", 8, 8)),
    ],
)
def test_a_machine_has_its_gpus_or_its_cores(typed: list[str], machine: Machine, world: World) -> None:
    assert world_of_machine(run_of(*typed), machine) == world


@pytest.mark.parametrize(
    ("typed", "machine", "world"),
    [
        ([], LAPTOP, World("cpu", 16, 8, fixed=True, memory_bytes=10**9)),
        ([], SERVER, World("cuda", 16, 8, fixed=True)),
    ],
)
def test_a_joined_world_is_fixed(typed: list[str], machine: Machine, world: World) -> None:
    assert world_of_joined_ranks(run_of(*typed), machine, ranks=16, ranks_per_node=8) == world


def test_cuda_without_a_gpu_is_refused() -> None:
    run = run_of(*H100)
    with pytest.raises(ConfigError, match=r"hardware.device=cuda: this machine has no GPU") as raised:
        world_of_machine(run, LAPTOP)
    assert raised.value.remedy == "hardware=cpu or hardware=local (the hardware of this machine)"
    with pytest.raises(ConfigError, match=r"hardware.device=cuda: this machine has no GPU"):
        world_of_joined_ranks(run, LAPTOP, ranks=16, ranks_per_node=8)


@pytest.mark.parametrize(
    ("typed", "machine", "world"),
    [
        ([*H100, "hardware.nodes=4"], LAPTOP, World("cuda", 32, 8)),
        ([], SERVER, World("cuda", 8, 8)),
        (["hardware.device=cuda"], LAPTOP, World("cuda", 1, 1)),
        (CPU_NODES, LAPTOP, World("cpu", 6, 3, memory_bytes=10**9)),
        # One CPU node is this machine, and pipelines and tensor groups can be planned on a single core.
        ([*CPU, "hardware.accelerators_per_node=8"], LAPTOP, World("cpu", 4, 4, memory_bytes=10**9)),
        (CPU, Machine(gpus=0, cores=1), World("cpu", 2, 2)),
    ],
)
def test_the_hardware_of_the_config_needs_no_such_machine(
    typed: list[str], machine: Machine, world: World
) -> None:
    assert world_of_hardware(run_of(*typed), machine) == world


def test_the_nodes_of_a_job_are_fixed_and_their_memory_is_not_known() -> None:
    assert world_of_nodes(run_of(*CPU_NODES), 5) == World("cpu", 15, 3, fixed=True)
    assert world_of_nodes(run_of(*H100), 2) == World("cuda", 16, 8, fixed=True)
    with pytest.raises(
        ConfigError, match=r"accelerators_per_node=null: `launcher submit` needs the hardware"
    ):
        world_of_nodes(run_of(*CPU), 2)


def test_the_configured_ranks_are_taken_where_they_may_still_be_chosen() -> None:
    hardware = run_of(*CPU_NODES).hardware
    assert World("cpu", 4, 4).of_hardware(hardware) == World("cpu", 6, 3)
    assert World("cpu", 4, 4, fixed=True).of_hardware(hardware) == World("cpu", 4, 4, fixed=True)
    assert World("cpu", 4, 4).of_hardware(run_of(*CPU).hardware) == World("cpu", 4, 4)


def test_nodes_that_are_not_full_count_too() -> None:
    assert [World("cuda", ranks, 8).nodes for ranks in (1, 8, 9, 16)] == [1, 1, 2, 2]


def test_all_ranks_of_a_fixed_world_and_of_several_nodes_take_part() -> None:
    batch = ["training.global_batch_size=32", "training.micro_batch_size=1"]
    assert resolve_layout(run_of(*batch), World("cpu", 16, 8, fixed=True)).world_size == 16
    two_nodes = run_of(*H100, *batch, "hardware.nodes=2")
    assert resolve_layout(two_nodes, World("cuda", 32, 8)).world_size == 16
    one_of_two = run_of(*H100, *batch, "parallelism.data=2")
    assert resolve_layout(one_of_two, World("cuda", 16, 8)).world_size == 2


def test_a_machine_of_fewer_nodes_or_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hardware.nodes=2: `launcher` starts ranks on this machine only"):
        resolve_layout(run_of("hardware.nodes=2"), World("cpu", 4, 4))
    run = run_of(*H100, "hardware.accelerators_per_node=4")
    with pytest.raises(ConfigError, match=r"hardware.accelerators_per_node=4: this machine has 2 GPUs"):
        resolve_layout(run, World("cuda", 2, 2))


def test_context_ranks_share_a_node() -> None:
    """A group that crosses nodes is refused where nodes are known, with sizes that fit."""
    large = ["model=llama3_8b", *H100, "hardware.nodes=4", "parallelism.data=1"]
    for context, tensor, remedies in ((16, 2, ["context=4"]), (8, 4, ["context=2", "tensor=1"])):
        axes = [f"parallelism.context={context}", f"parallelism.tensor={tensor}"]
        run = run_of(*large, *axes)
        with pytest.raises(ConfigError, match="do not fit into nodes of 8 ranks") as error:
            resolve_layout(run, World("cuda", 32, 8))
        assert error.value.field == "parallelism.context"
        assert error.value.remedy == " or ".join(f"parallelism.{remedy}" for remedy in remedies)
    run = run_of("model=llama3_8b", *H100, "hardware.nodes=4", "parallelism.context=8", "parallelism.data=4")
    assert resolve_layout(run, World("cuda", 32, 8)).context == 8
