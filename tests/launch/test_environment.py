"""Reading the variables of torchrun and srun, and Slurm host lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.errors import ConfigError
from launcher.launch.environment import (
    LaunchEnvironment,
    NodeEnvironment,
    RankEnvironment,
    expand_hosts,
    joined_ranks,
    launch_environment,
    missing_ranks,
    slurm_step_name,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node07",
    "MASTER_PORT": "29500",
}
# As srun 22.05 sets them for rank 5 of a step with 8 tasks, on nodes 3 and 4 of a job with 3 nodes.
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


def test_reads_torchrun_variables() -> None:
    assert joined_ranks(TORCHRUN) == RankEnvironment(5, 8, 1, 4, "node07", 29500)


def test_reads_srun_variables() -> None:
    joined = joined_ranks(SRUN)
    assert joined is not None
    assert joined == RankEnvironment(5, 8, 1, 4, "node03", joined.master_port)
    assert 20000 <= joined.master_port < 40000


def test_torchrun_variables_take_precedence_over_srun() -> None:
    assert joined_ranks(SRUN | TORCHRUN) == joined_ranks(TORCHRUN)


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({}, id="empty environment"),
        pytest.param({"WORLD_SIZE": "8", "MASTER_ADDR": "node03"}, id="batch script exports WORLD_SIZE"),
        pytest.param(JOB, id="batch script"),
        pytest.param(
            JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_GTIDS": "0"},
            id="batch script with task variables",
        ),
        pytest.param(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, id="step of one task in a job of many"),
        pytest.param(without(SRUN, "SLURM_STEP_NUM_TASKS") | {"SLURM_NTASKS": "1"}, id="SLURM_NTASKS=1"),
    ],
)
def test_returns_none_if_ranks_are_not_started_yet(environ: dict[str, str]) -> None:
    assert joined_ranks(environ) is None


def test_ignores_world_size_exported_by_a_batch_script() -> None:
    exported = {"WORLD_SIZE": "12", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert joined_ranks(SRUN | exported) == joined_ranks(SRUN)


def test_falls_back_to_job_variables_without_step_variables() -> None:
    joined = joined_ranks(without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"))
    assert joined is not None
    assert (joined.world_size, joined.master_addr) == (12, "node02")


@pytest.mark.parametrize("base", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_does_not_change_the_environment(base: dict[str, str]) -> None:
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


def test_refusal_names_the_invalid_variable(subtests: pytest.Subtests) -> None:
    for base, name, value in BROKEN:
        with subtests.test(f"{name}={value}"):
            environ = without(base, name) if value is None else base | {name: value}
            with pytest.raises(ConfigError) as refused:
                joined_ranks(environ)
            assert refused.value.field == name
            assert refused.value.value is None if value is None else str(refused.value.value) == value
            assert refused.value.why
            assert refused.value.remedy


def test_refuses_a_step_without_task_count() -> None:
    # If the count defaulted to 1, each rank would train a run of its own.
    with pytest.raises(ConfigError, match="SLURM_NTASKS"):
        joined_ranks(without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))


def test_all_ranks_of_a_step_get_the_same_address() -> None:
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
    assert len({(joined.master_addr, joined.master_port) for joined in ranks if joined}) == 1
    assert [joined.rank for joined in ranks if joined] == list(range(8))


def test_neighbouring_jobs_and_steps_get_different_ports() -> None:
    ports = set()
    for job in range(4700, 4720):
        for step in range(20):
            joined = joined_ranks(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
            assert joined is not None
            ports.add(joined.master_port)
    assert len(ports) == 400


@given(job=st.integers(0, 2**32 - 1), step=st.integers(0, 2**32 - 1))
def test_ports_are_between_20000_and_39999(job: int, step: int) -> None:
    joined = joined_ranks(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
    assert joined is not None
    assert 20000 <= joined.master_port <= 39999


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


def test_refuses_empty_host_names_and_spaces(subtests: pytest.Subtests) -> None:
    for beside in ["", "n[1-2],"]:
        for hosts in ["", ",", "a,", ",a", "a,,b", "a b"]:
            with (
                subtests.test(repr(beside + hosts)),
                pytest.raises(ValueError, match="is not a host name"),
            ):
                expand_hosts(beside + hosts)


INVALID_RANGES = ["a", "1-", "-1", "1,", ",1", "1-2-3", "1 2", " ", "3-1", "0x1", "²"]


def test_refuses_malformed_brackets(subtests: pytest.Subtests) -> None:
    for hosts in ["n[", "n]", "n[]", "n[1", "n1]", "n[[1]]", *(f"n[{x}]" for x in INVALID_RANGES)]:
        with (
            subtests.test(hosts),
            pytest.raises(ValueError, match=r"is not a host name|neither a number nor a range|backwards"),
        ):
            expand_hosts(hosts)


@st.composite
def host_lists(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Draw a compressed host list and the names that it expands to."""
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
def test_expand_hosts_inverts_compression(case: tuple[str, list[str]]) -> None:
    text, names = case
    assert expand_hosts(text) == names


@given(st.text(alphabet="ab[]-,0123 ", max_size=12))
def test_expand_hosts_returns_names_or_raises(text: str) -> None:
    try:
        hosts = expand_hosts(text)
    except ValueError:
        return
    assert hosts
    assert all(host and not set(host) & set("[], ") for host in hosts)


TASK_PER_NODE = SRUN | {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_GTIDS": "1",
}


def ranks_of_node(place: LaunchEnvironment) -> list[int]:
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
def test_one_task_per_node_starts_all_ranks_of_its_node(
    configured: int | None, gpus: int, ranks: list[int]
) -> None:
    place = launch_environment(TASK_PER_NODE, configured=configured, gpus=gpus)
    assert ranks_of_node(place) == ranks
    assert place is not None
    assert place.world_size == 2 * len(ranks)
    assert place.master_addr == "node03"


@pytest.mark.parametrize(("configured", "gpus"), [(4, 0), (None, 0), (None, 8), (4, 8)])
def test_one_task_per_rank_is_a_rank(configured: int | None, gpus: int) -> None:
    assert launch_environment(SRUN, configured=configured, gpus=gpus) == joined_ranks(SRUN)


def test_single_rank_per_node_is_a_rank() -> None:
    assert launch_environment(TASK_PER_NODE, configured=1, gpus=8) == joined_ranks(TASK_PER_NODE)
    assert launch_environment(TASK_PER_NODE, configured=None, gpus=1) == joined_ranks(TASK_PER_NODE)


@pytest.mark.parametrize("configured", [2, 8])
def test_refuses_a_number_of_tasks_other_than_configured(configured: int) -> None:
    with pytest.raises(ConfigError, match="srun started 4 tasks on this node") as raised:
        launch_environment(SRUN, configured=configured, gpus=8)
    assert str(raised.value).startswith(f"hardware.accelerators_per_node={configured}: ")
    assert "hardware.accelerators_per_node=4" in raised.value.remedy


def test_torchrun_local_size_overrides_the_config() -> None:
    assert launch_environment(SRUN | TORCHRUN, configured=8, gpus=0) == joined_ranks(TORCHRUN)


def test_run_is_named_after_job_and_step() -> None:
    assert slurm_step_name(SRUN) == slurm_step_name(TASK_PER_NODE) == "slurm-4711.1"
    assert slurm_step_name(SRUN | TORCHRUN) is None
    assert slurm_step_name(JOB) is None
    assert slurm_step_name(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) is None


STEP = {"SLURM_STEP_ID": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "20463", "RANK": "0"}
UNDER_TORCHRUN = {
    "RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}


@pytest.mark.parametrize(
    ("environ", "reason", "parts"),
    [
        (
            STEP, "Timed out after 13 seconds waiting for clients. 1/4 clients joined.",
            ["only 1 of 4 ranks came at MASTER_ADDR:MASTER_PORT=node1:20463", "srun started 4 tasks",
             "env -u SLURM_STEP_ID launcher"],
        ),
        (STEP, "", ["rank 1 of 4 waits at MASTER_ADDR:MASTER_PORT=node1:20463", "srun launcher ..."]),
        (
            UNDER_TORCHRUN, "The client socket has failed to connect to any network address",
            ["rank 1 of 4 waits at MASTER_ADDR:MASTER_PORT=10.0.0.1:29500", "WORLD_SIZE",
             "nc -zv 10.0.0.1 29500"],
        ),
        (UNDER_TORCHRUN | {"SLURM_STEP_ID": "0"}, "", ["`unset RANK`"]),
        (
            UNDER_TORCHRUN, "The server socket has failed to listen. port: 29500, EADDRINUSE",
            ["MASTER_PORT=29500: another process uses this port", "MASTER_PORT=29501"],
        ),
        (STEP, "errno: 98 - Address already in use", ["MASTER_PORT=20463", "the same srun again"]),
    ],
)  # fmt: skip
def test_missing_ranks_are_explained(environ: dict[str, str], reason: str, parts: list[str]) -> None:
    message = missing_ranks(environ, 1, 4, reason)
    assert "\n  try: " in message
    for part in parts:
        assert part in message
