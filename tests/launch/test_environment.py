"""What torchrun and srun say, and the host lists of Slurm."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.errors import ConfigError
from launcher.launch.environment import (
    NodeEnvironment,
    Place,
    RankEnvironment,
    expand_hosts,
    joined_ranks,
    place_of,
    step_name,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node07",
    "MASTER_PORT": "29500",
}
# As srun of 22.05 sets them for rank 5 of a step of 8 on nodes 3 and 4 of a job of 3 nodes.
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[02-04]",
    "SLURM_NTASKS": "12",
    "SLURM_TASKS_PER_NODE": "4(x3)",
}
STEP = {
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_GTIDS": "4,5,6,7",
}
SRUN = JOB | STEP


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_torchrun() -> None:
    assert joined_ranks(TORCHRUN) == RankEnvironment(5, 8, 1, 4, "node07", 29500)


def test_srun() -> None:
    found = joined_ranks(SRUN)
    assert found is not None
    assert found == RankEnvironment(5, 8, 1, 4, "node03", found.master_port)
    assert 20000 <= found.master_port < 40000


def test_torchrun_inside_an_srun_step_is_torchrun() -> None:
    assert joined_ranks(SRUN | TORCHRUN) == joined_ranks(TORCHRUN)


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"WORLD_SIZE": "8", "MASTER_ADDR": "node03"}, id="exports of a batch script"),
        pytest.param(JOB, id="the batch script's own shell"),
        pytest.param(
            JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_GTIDS": "0"},
            id="the batch script's own shell, which has these",
        ),
        pytest.param(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, id="one launcher in a job of many tasks"),
        pytest.param(without(SRUN, "SLURM_STEP_NUM_TASKS") | {"SLURM_NTASKS": "1"}, id="SLURM_NTASKS=1"),
    ],
)
def test_no_ranks_are_joined(environ: dict[str, str]) -> None:
    assert joined_ranks(environ) is None


def test_a_batch_script_exporting_world_size_is_joined_through_srun() -> None:
    exported = {"WORLD_SIZE": "12", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert joined_ranks(SRUN | exported) == joined_ranks(SRUN)


def test_older_variables_stand_in() -> None:
    found = joined_ranks(without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"))
    assert found is not None
    assert (found.world_size, found.master_addr) == (12, "node02")


@pytest.mark.parametrize("base", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_the_environment_is_left_alone(base: dict[str, str]) -> None:
    environ = dict(base)
    joined_ranks(environ)
    assert environ == base


BROKEN = [
    *((TORCHRUN, name, None) for name in TORCHRUN if name != "RANK"),
    *((TORCHRUN, name, "") for name in TORCHRUN),
    *((TORCHRUN, name, "two") for name in TORCHRUN if name != "MASTER_ADDR"),
    (TORCHRUN, "RANK", "-1"),
    (TORCHRUN, "RANK", "8"),
    (TORCHRUN, "RANK", "1.0"),
    (TORCHRUN, "RANK", "²"),
    (TORCHRUN, "WORLD_SIZE", "0"),
    (TORCHRUN, "LOCAL_RANK", "4"),
    (TORCHRUN, "LOCAL_WORLD_SIZE", "9"),
    (TORCHRUN, "MASTER_PORT", "0"),
    (TORCHRUN, "MASTER_PORT", "65536"),
    *((SRUN, name, None) for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_GTIDS")),
    (SRUN, "SLURM_STEP_NUM_TASKS", "many"),
    (SRUN, "SLURM_STEP_ID", "interactive"),
    (SRUN, "SLURM_JOB_ID", "x"),
    (SRUN, "SLURM_PROCID", "8"),
    (SRUN, "SLURM_LOCALID", "4"),
    (SRUN, "SLURM_GTIDS", "4,,5"),
    (SRUN, "SLURM_GTIDS", "0,1,2,3,4,5,6,7,8"),
    (SRUN, "SLURM_STEP_NODELIST", "node[3-"),
    (SRUN, "SLURM_STEP_NODELIST", ""),
]


def test_broken_combinations_name_the_variable(subtests: pytest.Subtests) -> None:
    for base, name, value in BROKEN:
        with subtests.test(f"{name}={value}"):
            environ = without(base, name) if value is None else base | {name: value}
            with pytest.raises(ConfigError) as refused:
                joined_ranks(environ)
            assert refused.value.field == name
            assert refused.value.value is None if value is None else str(refused.value.value) == value
            assert refused.value.why
            assert refused.value.remedy


def test_a_step_without_any_task_count_is_refused() -> None:
    # Taken for one task, each of the ranks would train by itself.
    with pytest.raises(ConfigError, match="SLURM_NTASKS"):
        joined_ranks(without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))


def test_every_rank_of_a_step_meets_at_the_same_place() -> None:
    ranks = [
        joined_ranks(
            SRUN
            | {
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank % 4),
                "SLURM_GTIDS": "0,1,2,3" if rank < 4 else "4,5,6,7",
            }
        )
        for rank in range(8)
    ]
    assert len({(found.master_addr, found.master_port) for found in ranks if found}) == 1
    assert [found.rank for found in ranks if found] == list(range(8))


def test_neighbouring_jobs_and_steps_do_not_share_a_port() -> None:
    ports = set()
    for job in range(4700, 4720):
        for step in range(20):
            found = joined_ranks(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
            assert found is not None
            ports.add(found.master_port)
    assert len(ports) == 400


@given(job=st.integers(0, 2**32 - 1), step=st.integers(0, 2**32 - 1))
def test_ports_stay_in_range(job: int, step: int) -> None:
    found = joined_ranks(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
    assert found is not None
    assert 20000 <= found.master_port <= 39999


def test_expand_hosts(subtests: pytest.Subtests) -> None:
    for hosts, expanded in [
        ("node1", "node1"),
        ("gpu-01.cluster.example", "gpu-01.cluster.example"),
        ("a,b,c", "a b c"),
        ("node[1-3]", "node1 node2 node3"),
        ("node[03-05,9],gpu1", "node03 node04 node05 node9 gpu1"),
        ("node[7]", "node7"),
        ("node[08-11]", "node08 node09 node10 node11"),
        ("node[098-101]", "node098 node099 node100 node101"),
        ("node[9-10]", "node9 node10"),
        ("node[0-1,0003-0004]", "node0 node1 node0003 node0004"),
        ("rack[1-2]n[1-4]", "rack1n1 rack1n2 rack1n3 rack1n4 rack2n1 rack2n2 rack2n3 rack2n4"),
        ("r[1,3]n[01-02],login,x[5]", "r1n01 r1n02 r3n01 r3n02 login x5"),
        ("n[1-2]-ib", "n1-ib n2-ib"),
        ("[1-2]", "1 2"),
        ("gpu1,node[1-2],gpu2", "gpu1 node1 node2 gpu2"),
    ]:
        with subtests.test(hosts):
            assert expand_hosts(hosts) == expanded.split()


def test_empty_names_and_spaces_are_refused(subtests: pytest.Subtests) -> None:
    for beside in ["", "n[1-2],"]:
        for hosts in ["", ",", "a,", ",a", "a,,b", "a b"]:
            with (
                subtests.test(repr(beside + hosts)),
                pytest.raises(ValueError, match="is not a host name"),
            ):
                expand_hosts(beside + hosts)


NO_NUMBERS = ["a", "1-", "-1", "1,", ",1", "1-2-3", "1 2", " ", "3-1", "0x1", "²"]


def test_odd_brackets_are_refused(subtests: pytest.Subtests) -> None:
    for hosts in ["n[", "n]", "n[]", "n[1", "n1]", "n[[1]]", *(f"n[{x}]" for x in NO_NUMBERS)]:
        with (
            subtests.test(hosts),
            pytest.raises(ValueError, match=r"is not a host name|neither a number nor a range|backwards"),
        ):
            expand_hosts(hosts)


@st.composite
def host_lists(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A compressed list and, built beside it, the names that it stands for."""
    texts, names = [], []
    for _ in range(draw(st.integers(1, 4))):
        prefix = draw(st.from_regex(r"[a-z][a-z-]{0,4}", fullmatch=True))
        suffix = draw(st.sampled_from(["", "-ib", ".example"]))
        width = draw(st.integers(1, 4))
        ranges = draw(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 12)), min_size=1, max_size=3))
        parts = []
        for first, more in ranges:
            parts.append(f"{first:0{width}}" + (f"-{first + more:0{width}}" if more else ""))
            names += [f"{prefix}{number:0{width}}{suffix}" for number in range(first, first + more + 1)]
        texts.append(f"{prefix}[{','.join(parts)}]{suffix}")
    return ",".join(texts), names


@given(host_lists())
def test_expand_hosts_undoes_compression(case: tuple[str, list[str]]) -> None:
    text, names = case
    assert expand_hosts(text) == names


@given(st.text(alphabet="ab[]-,0123 ", max_size=12))
def test_expand_hosts_returns_names_or_refuses(text: str) -> None:
    try:
        hosts = expand_hosts(text)
    except ValueError:
        return
    assert hosts
    assert all(host and not set(host) & set("[], ") for host in hosts)


ONE_PER_NODE = SRUN | {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_GTIDS": "1",
}


def ranks_there(place: Place) -> list[int]:
    assert isinstance(place, NodeEnvironment)
    return list(place.ranks)


@pytest.mark.parametrize(
    ("configured", "gpus", "ranks"),
    [
        (4, 0, [4, 5, 6, 7]),
        (None, 8, list(range(8, 16))),
        (2, 8, [2, 3]),
    ],
)
def test_one_task_per_node_starts_the_ranks_of_its_node(
    configured: int | None, gpus: int, ranks: list[int]
) -> None:
    place = place_of(ONE_PER_NODE, configured=configured, gpus=gpus)
    assert ranks_there(place) == ranks
    assert place is not None
    assert place.world_size == 2 * len(ranks)
    assert place.master_addr == "node03"


@pytest.mark.parametrize(("configured", "gpus"), [(4, 0), (None, 0), (None, 8), (4, 8)])
def test_a_task_per_rank_is_a_rank(configured: int | None, gpus: int) -> None:
    assert place_of(SRUN, configured=configured, gpus=gpus) == joined_ranks(SRUN)


def test_one_rank_per_node_is_a_rank() -> None:
    assert place_of(ONE_PER_NODE, configured=1, gpus=8) == joined_ranks(ONE_PER_NODE)
    assert place_of(ONE_PER_NODE, configured=None, gpus=1) == joined_ranks(ONE_PER_NODE)


@pytest.mark.parametrize("configured", [2, 8])
def test_another_number_of_tasks_than_configured_is_refused(configured: int) -> None:
    with pytest.raises(ConfigError, match="srun started 4 tasks on this node") as raised:
        place_of(SRUN, configured=configured, gpus=8)
    assert str(raised.value).startswith(f"hardware.accelerators_per_node={configured}: ")
    assert "hardware.accelerators_per_node=4" in raised.value.remedy


def test_torchrun_has_counted_itself() -> None:
    assert place_of(SRUN | TORCHRUN, configured=8, gpus=0) == joined_ranks(TORCHRUN)


def test_a_run_is_called_after_the_step_of_its_ranks() -> None:
    assert step_name(SRUN) == step_name(ONE_PER_NODE) == "slurm-4711.1"
    assert step_name(SRUN | TORCHRUN) is None
    assert step_name(JOB) is None
    assert step_name(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) is None
