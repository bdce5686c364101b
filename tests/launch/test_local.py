"""Ranks as real processes: how they end, which failure is reported, and that no process is left."""

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest

from launcher.config.errors import ConfigError, RunStopped
from launcher.config.secrets import note_variables
from launcher.launch.local import AGAIN, RankFailure, Stopped, run_local_ranks
from launcher.launch.memory_kills import memory_kills
from launcher.launch.rank import END_SIGNAL, STOP_SIGNAL, STOPPED_EXIT_CODE

HANG = 60.0  # seconds; reached only if a process hangs
REPOSITORY = Path(__file__).parents[2]


def run(target: Callable[[int], None], world_size: int, logs: Path, **options: Any) -> None:
    run_local_ranks(target, world_size, log_dir=logs, **({"start_method": "fork"} | options))


def failure_of(target: Callable[[int], None], world_size: int, logs: Path, **options: Any) -> RankFailure:
    with pytest.raises(RankFailure) as failed:
        run(target, world_size, logs, **options)
    assert failed.value.world_size == world_size
    return failed.value


def wait_for(condition: Callable[[], bool], name: str) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {name}"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # zombie or dead


def write_pid(directory: Path, name: str, pid: int) -> None:
    partial_file = directory / f".{name}"
    partial_file.write_text(str(pid))
    partial_file.rename(directory / f"{name}.pid")  # atomic: read_pids never reads a partial file


def read_pids(directory: Path) -> dict[str, int]:
    return {path.stem: int(path.read_text()) for path in directory.glob("*.pid")}


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Iterator[None]:
    """Check that each test restores signal handlers and the signal mask."""

    def state() -> tuple[object, ...]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, STOP_SIGNAL, END_SIGNAL)
        return *(signal.getsignal(number) for number in numbers), signal.pthread_sigmask(signal.SIG_BLOCK, [])

    before = state()
    yield
    assert state() == before


# --- success ---------------------------------------------------------------------------------------------


def write_rank(directory: Path, rank: int) -> None:
    (directory / str(rank)).write_text(str(os.getpid()))


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_each_rank_runs_once_in_a_separate_process(
    tmp_path: Path, start_method: Literal["fork", "spawn"]
) -> None:
    run(partial(write_rank, tmp_path), 3, tmp_path / "new" / "logs", start_method=start_method)
    pids = {int((tmp_path / str(rank)).read_text()) for rank in range(3)}
    assert len(pids) == 3
    assert os.getpid() not in pids
    assert sorted(path.name for path in (tmp_path / "new/logs").iterdir()) == ["rank_1.log", "rank_2.log"]


def test_exit_code_zero_is_success(tmp_path: Path) -> None:
    run(lambda rank: sys.exit(0), 2, tmp_path)


def test_ranks_may_start_child_processes(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        import multiprocessing

        child = multiprocessing.get_context("fork").Process(target=write_rank, args=(tmp_path, rank))
        child.start()
        child.join()

    run(target, 2, tmp_path / "logs")
    assert (tmp_path / "1").exists()


def test_ranks_inherit_no_descriptors_of_other_ranks(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        (tmp_path / f"descriptors_{rank}").write_text(str(len(os.listdir("/proc/self/fd"))))
        wait_for(lambda: len(list(tmp_path.glob("descriptors_*"))) == 4, "the other ranks")

    run(target, 4, tmp_path)
    assert len({path.read_text() for path in tmp_path.glob("descriptors_*")}) == 1


# --- failures --------------------------------------------------------------------------------------------


def fail_with_a_secret(rank: int) -> NoReturn:
    raise RuntimeError(f"cannot read {os.environ['LAUNCHER_TEST_VALUE']}/x")


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [0, 1])
def test_a_traceback_holds_no_value_of_the_environment(
    tmp_path: Path,
    start_method: Literal["fork", "spawn"],
    first: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LAUNCHER_TEST_VALUE", "hunter2")
    note_variables(["LAUNCHER_TEST_VALUE"])
    ranks = range(first, first + 1)
    failure = failure_of(fail_with_a_secret, 2, tmp_path, start_method=start_method, local_ranks=ranks)
    assert "RuntimeError: cannot read ${oc.env:LAUNCHER_TEST_VALUE}/x" in str(failure)
    said = [str(failure), failure.reason, *capfd.readouterr(), *(p.read_text() for p in tmp_path.iterdir())]
    assert "hunter2" not in "".join(said)


def test_the_end_of_a_log_holds_no_value_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCHER_TEST_VALUE", "hunter2")
    note_variables(["LAUNCHER_TEST_VALUE"])

    def target(rank: int) -> None:
        print("a library prints hunter2", flush=True)
        os._exit(3)

    failure = failure_of(target, 2, tmp_path, local_ranks=range(1, 2))
    assert "a library prints ${oc.env:LAUNCHER_TEST_VALUE}" in str(failure)


def test_a_guard_that_ends_the_run_is_not_a_failure_of_its_code(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        raise RunStopped("the loss is not finite")

    failure = failure_of(target, 2, tmp_path)
    assert failure.halted
    assert str(failure) == "rank 0 of 2 stopped the run: the loss is not finite"
    assert not failure_of(lambda rank: sys.exit(3), 1, tmp_path).halted


def stop_itself(rank: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_that_are_all_stopped_end_the_run(tmp_path: Path, world_size: int) -> None:
    failure = failure_of(stop_itself, world_size, tmp_path, stopped_limit=0.5)
    names = "rank 0 of 1 was" if world_size == 1 else "rank 0 of 2 was"
    assert str(failure).startswith(f"{names} stopped by SIGSTOP or SIGTSTP for 0.5 seconds"), failure


def test_a_rank_that_continues_or_is_waited_for_does_not_end_the_run(tmp_path: Path) -> None:
    def continues(rank: int) -> None:
        if os.fork() == 0:
            time.sleep(0.4)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        stop_itself(rank)
        os.wait()

    run(continues, 1, tmp_path, stopped_limit=1.5)

    def waits(rank: int) -> None:
        if rank == 0:
            stop_itself(rank)
        time.sleep(1.5)
        raise RuntimeError("the run hangs")

    assert "the run hangs" in str(failure_of(waits, 2, tmp_path, stopped_limit=0.5))


def sleep_for_long() -> None:
    time.sleep(10 * HANG)


def wait_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_in_c() -> None:
    # Never returns to the interpreter, so Python's signal handlers do not run: SIGTERM has no effect, as in a
    # collective that waits in C++.
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


@pytest.mark.parametrize("wait", [sleep_for_long, wait_for_a_lock, wait_in_c])
def test_failing_rank_ends_waiting_ranks(tmp_path: Path, wait: Callable[[], None]) -> None:
    def target(rank: int) -> None:
        write_pid(tmp_path, f"rank_{rank}", os.getpid())
        if rank != 1:
            wait()
        wait_for(lambda: len(read_pids(tmp_path)) == 3, "the other ranks")
        raise ValueError("loss is nan")

    failure = failure_of(target, 3, tmp_path, failure_grace=0.5)
    assert failure.rank == 1
    assert str(failure).startswith("rank 1 of 3 failed:\nTraceback (most recent call last):\n")
    assert str(failure).endswith("\nValueError: loss is nan")
    assert not [pid for pid in read_pids(tmp_path).values() if is_running(pid)]


def fail_in_rank_1(rank: int) -> None:
    if rank == 1:
        raise KeyError("no such layer")
    sleep_for_long()


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_traceback_shows_the_failing_line_without_launcher_frames(
    tmp_path: Path, start_method: Literal["fork", "spawn"]
) -> None:
    detail = failure_of(fail_in_rank_1, 2, tmp_path, start_method=start_method).detail
    assert 'raise KeyError("no such layer")' in detail
    assert "rank_main" not in detail
    assert "multiprocessing" not in detail


def test_long_traceback_is_reported_in_full(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        if rank == 1:
            raise ValueError("begin " + "x" * 1_000_000 + " end")
        sleep_for_long()

    detail = failure_of(target, 2, tmp_path).detail
    assert "begin x" in detail
    assert detail.endswith("x end")


def test_reports_an_exception_that_cannot_be_pickled(tmp_path: Path) -> None:
    class Unpicklable(Exception):
        def __init__(self, lock: object) -> None:
            super().__init__("holds a lock")
            self.lock = lock

    def target(rank: int) -> None:
        raise Unpicklable(threading.Lock())

    assert failure_of(target, 1, tmp_path).detail.endswith("Unpicklable: holds a lock")


def test_traceback_is_written_to_the_log_of_the_rank(tmp_path: Path) -> None:
    failure_of(fail_in_rank_1, 2, tmp_path)
    assert "KeyError: 'no such layer'" in (tmp_path / "rank_1.log").read_text()


def test_rank_0_does_not_print_its_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def target(rank: int) -> None:
        raise ValueError("shown once")

    assert "shown once" in str(failure_of(target, 1, tmp_path))
    assert "shown once" not in "".join(capfd.readouterr())


def test_config_error_is_raised_unchanged(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        if rank == 1:
            raise ConfigError("run.dir", Path("/no/checkpoint"), "holds no checkpoint", "runs/1")
        sleep_for_long()

    with pytest.raises(ConfigError) as refused:
        run(target, 2, tmp_path)
    expected = ConfigError("run.dir", "/no/checkpoint", "holds no checkpoint", "runs/1")
    assert str(refused.value) == str(expected)
    assert vars(refused.value) == vars(expected)


def test_config_error_without_value_is_raised_unchanged(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        raise ConfigError("data.train", None, "is not set", "a glob")

    with pytest.raises(ConfigError, match=r"^data\.train: is not set") as refused:
        run(target, 1, tmp_path)
    assert refused.value.value is None


# --- which of several failures is reported
# -------------------------------------------------------------------


class DistBackendError(RuntimeError):
    """Stands for the torch exception with this name."""


LOST_PEERS = [
    RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]"
    ),
    RuntimeError("Application timeout caused pair closure"),
    ConnectionResetError(104, "Connection reset by peer"),
    BrokenPipeError(32, "Broken pipe"),
    DistBackendError("remote process exited or there was a network error"),
]


@pytest.mark.parametrize("lost", LOST_PEERS, ids=lambda error: type(error).__name__)
def test_failure_is_reported_before_earlier_lost_connections(tmp_path: Path, lost: Exception) -> None:
    """The causing rank reports late: it is still cleaning up when its peers lose the connection."""

    def target(rank: int) -> None:
        if rank == 2:
            try:
                raise ValueError("the cause")
            finally:
                (tmp_path / "disconnected").touch()
                wait_for(lambda: (tmp_path / "rank_1.log").stat().st_size > 0, "rank 1 to fail")
                time.sleep(0.5)
        wait_for((tmp_path / "disconnected").exists, "rank 2 to fail")
        raise lost

    failure = failure_of(target, 3, tmp_path)
    assert failure.rank == 2
    assert "the cause" in failure.detail


def test_lost_connection_during_cleanup_does_not_hide_the_cause(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        wait_for(lambda: rank == 1 or "reset" in (tmp_path / "rank_1.log").read_text(), "rank 1 to fail")
        if rank == 1:
            raise LOST_PEERS[2]
        try:
            raise ValueError("the cause")
        finally:
            raise LOST_PEERS[0]  # as from a barrier in the clean-up

    (tmp_path / "rank_1.log").touch()
    failure = failure_of(target, 2, tmp_path)
    assert failure.rank == 0
    assert "the cause" in failure.detail


def test_lost_connection_is_reported_without_other_failures(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        if rank == 0:
            sleep_for_long()
        raise LOST_PEERS[0]

    failure = failure_of(target, 2, tmp_path)
    assert failure.rank == 1
    assert "Connection closed by peer" in failure.detail


def test_killed_rank_is_reported_before_ranks_that_lost_it(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        write_pid(tmp_path, f"rank_{rank}", os.getpid())
        if rank == 2:
            wait_for(lambda: len(read_pids(tmp_path)) == 3, "the other ranks")
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for(lambda: not is_running(read_pids(tmp_path).get("rank_2", os.getpid())), "rank 2 to die")
        raise LOST_PEERS[0]

    failure = failure_of(target, 3, tmp_path)
    assert failure.rank == 2


def test_a_stopped_rank_is_reported_before_ranks_that_lost_it(tmp_path: Path) -> None:
    """The rank that somebody stopped is still cleaning up when its peers lose the connection."""

    def target(rank: int) -> None:
        if rank == 1:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                sleep_for_long()
            finally:
                (tmp_path / "disconnected").touch()
                wait_for(lambda: "Connection closed" in (tmp_path / "rank_2.log").read_text(), "rank 2")
        wait_for((tmp_path / "disconnected").exists, "rank 1 to be stopped")
        raise LOST_PEERS[0]

    (tmp_path / "rank_2.log").touch()
    failure = failure_of(target, 3, tmp_path)
    assert failure.rank == 1
    assert "stopped by SIGTERM" in failure.detail


def test_first_of_equal_failures_is_reported(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        if rank == 2:
            raise ValueError("first")
        wait_for(lambda: "first" in (tmp_path / "rank_2.log").read_text(), "rank 2 to fail")
        raise ValueError("later")

    (tmp_path / "rank_2.log").touch()
    for _ in range(3):
        (tmp_path / "rank_2.log").write_text("")
        assert failure_of(target, 4, tmp_path).rank == 2


def test_exception_of_a_stopped_rank_is_not_reported(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        if rank == 1:
            wait_for((tmp_path / "waiting").exists, "rank 0")
            raise LOST_PEERS[0]  # any other failure takes precedence over a lost connection
        try:
            (tmp_path / "waiting").touch()
            sleep_for_long()
        except BaseException as error:
            raise ValueError("aborted") from error

    assert failure_of(target, 2, tmp_path).rank == 1


# --- ends without an exception ---------------------------------------------------------------------------


def test_rank_killed_by_sigkill(tmp_path: Path) -> None:
    (tmp_path / "rank_1.log").write_text("earlier run\n")

    def target(rank: int) -> None:
        if rank == 1:
            for step in range(100):
                print("step", step)
            os.kill(os.getpid(), signal.SIGKILL)
        sleep_for_long()

    text = str(failure_of(target, 2, tmp_path))
    assert text.startswith("rank 1 of 2 was killed by SIGKILL (perhaps out of memory; see dmesg)\n")
    assert str(tmp_path / "rank_1.log") in text
    assert text.endswith("\nstep 98\nstep 99")
    assert "step 50\n" not in text


@pytest.mark.parametrize(
    ("kills", "said"), [(1, "by the kernel's out-of-memory killer (SIGKILL)"), (0, "by SIGKILL")]
)
def test_an_out_of_memory_kill_is_reported_as_one(
    kills: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = tmp_path / "count"

    def target(rank: int) -> None:
        if rank == 1:
            counted.write_text(str(kills))
            os.kill(os.getpid(), signal.SIGKILL)
        sleep_for_long()

    monkeypatch.setattr(
        "launcher.launch.local.memory_kills", lambda: int(counted.read_text()) if counted.exists() else 0
    )
    failure = failure_of(target, 2, tmp_path)
    assert failure.out_of_memory == bool(kills)
    assert str(failure).startswith(f"rank 1 of 2 was killed {said}")
    advised = failure.with_advice("training.micro_batch_size=1")
    assert str(advised) == f"{failure}\n  try: training.micro_batch_size=1"


@pytest.mark.parametrize(
    ("groups", "counter"),
    [
        ("0::/job_7\n", "sys/fs/cgroup/job_7/memory.events"),
        ("0::/job_7\n", "sys/fs/cgroup/memory.events"),  # as in a container
        ("8:pids:/\n4:memory:/job_7\n0::/\n", "sys/fs/cgroup/memory/job_7/memory.oom_control"),
        ("4:cpu,memory:/docker/x\n", "sys/fs/cgroup/memory/memory.oom_control"),
    ],
)
def test_memory_kills_are_counted_in_both_versions_of_control_groups(
    groups: str, counter: str, tmp_path: Path
) -> None:
    assert memory_kills(tmp_path) is None
    for name, text in {"proc/self/cgroup": groups, counter: "oom 9\nunder_oom 0\noom_kill 3\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_kills(tmp_path) == 3


def test_log_of_an_earlier_run_is_kept_but_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "rank_1.log").write_text("earlier run\n")

    def target(rank: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else sleep_for_long()

    assert str(failure_of(target, 2, tmp_path)) == (
        "rank 1 of 2 was killed by SIGKILL (perhaps out of memory; see dmesg)"
    )
    assert (tmp_path / "rank_1.log").read_text() == "earlier run\n"


def crash_in_rank_1(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    sleep_for_long()


def test_crash_shows_its_location(tmp_path: Path) -> None:
    text = str(failure_of(crash_in_rank_1, 2, tmp_path, start_method="spawn"))
    assert text.startswith("rank 1 of 2 was killed by SIGSEGV\n")
    assert "in crash_in_rank_1" in text


def test_sys_exit_with_a_code(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        sys.exit(3) if rank == 1 else sleep_for_long()

    assert str(failure_of(target, 2, tmp_path)) == "rank 1 of 2 exited with code 3"


def test_sys_exit_with_a_message(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        sys.exit("no such corpus") if rank == 1 else sleep_for_long()

    text = str(failure_of(target, 2, tmp_path))
    assert text.startswith("rank 1 of 2 exited with code 1\n")
    assert text.endswith("no such corpus")


def test_rank_stopped_by_another_process(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else sleep_for_long()

    assert (
        str(failure_of(target, 2, tmp_path))
        == "rank 1 of 2 exited with code 143 (stopped by SIGTERM or SIGUSR1)"
    )


def test_detects_the_death_of_a_rank_whose_forked_child_lives_on(tmp_path: Path) -> None:
    """The child keeps the dead rank's pipes open, as DataLoader workers do."""

    def target(rank: int) -> None:
        if rank == 1:
            child = os.fork()
            if child == 0:
                sleep_for_long()
            write_pid(tmp_path, "grandchild", child)
            os.kill(os.getpid(), signal.SIGKILL)
        sleep_for_long()

    assert failure_of(target, 2, tmp_path, failure_grace=0.5).rank == 1
    assert not is_running(read_pids(tmp_path)["grandchild"])


# --- how ranks are stopped -------------------------------------------------------------------------------


def test_stopped_ranks_run_finally_blocks(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        if rank == 1:
            wait_for((tmp_path / "waiting").exists, "rank 0")
            raise ValueError("stop")
        try:
            (tmp_path / "waiting").touch()
            sleep_for_long()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second SIGTERM does not interrupt the clean-up
            time.sleep(0.1)
            (tmp_path / "cleaned").touch()

    failure_of(target, 2, tmp_path, failure_grace=HANG)
    assert (tmp_path / "cleaned").exists()


def test_ranks_that_ignore_end_signal_are_killed(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        if rank == 0:
            signal.signal(END_SIGNAL, signal.SIG_IGN)
            write_pid(tmp_path, "ignores_signals", os.getpid())
            while True:
                time.sleep(1)
        wait_for(lambda: bool(read_pids(tmp_path)), "rank 0")
        raise ValueError("stop")

    assert failure_of(target, 2, tmp_path, failure_grace=0.3).rank == 1
    assert not is_running(read_pids(tmp_path)["ignores_signals"])


def test_child_processes_of_ranks_end(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        write_pid(tmp_path, f"near_{rank}", subprocess.Popen(sleeper).pid)
        write_pid(tmp_path, f"far_{rank}", subprocess.Popen(sleeper, start_new_session=True).pid)

    run(target, 2, tmp_path, failure_grace=0.3)
    assert len(read_pids(tmp_path)) == 4
    assert not [pid for pid in read_pids(tmp_path).values() if is_running(pid)]


def test_processes_of_the_caller_keep_running(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as bystander:
        run(partial(write_rank, tmp_path), 2, tmp_path, failure_grace=0.1)
        assert bystander.poll() is None
        bystander.kill()


# Rank 1 fails to start while rank 0 runs.
class PicklesOnce:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pickled = 0

    def __getstate__(self) -> dict[str, object]:
        self.pickled += 1
        if self.pickled > 1:
            raise OSError("no more processes")
        return self.__dict__

    def __call__(self, rank: int) -> None:
        write_pid(self.directory, f"rank_{rank}", os.getpid())
        sleep_for_long()


def test_a_directory_of_logs_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/logs: the logs .* cannot be written there: Not a directory"):
        run(print, 1, tmp_path / "file" / "logs")


def test_failed_start_ends_ranks_started_before(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no more processes"):
        run(PicklesOnce(tmp_path), 2, tmp_path, start_method="spawn", failure_grace=1.0)
    assert not [pid for pid in read_pids(tmp_path).values() if is_running(pid)]


# --- where output goes -----------------------------------------------------------------------------------


def talk(rank: int) -> None:
    print(f"print of {rank}")
    print(f"stderr of {rank} \u2713", file=sys.stderr)
    os.write(1, f"descriptor of {rank}\n".encode())
    subprocess.run(["sh", "-c", f"echo child of {rank}; echo complaint of {rank} >&2"], check=True)


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_output_of_ranks_above_0_goes_to_logs(
    tmp_path: Path, start_method: Literal["fork", "spawn"], capfd: pytest.CaptureFixture[str]
) -> None:
    run(talk, 3, tmp_path, start_method=start_method)
    terminal = "".join(capfd.readouterr())
    for rank, text in enumerate([terminal, *((tmp_path / f"rank_{n}.log").read_text() for n in (1, 2))]):
        for source in ("print", "stderr", "descriptor", "child", "complaint"):
            assert [line for line in text.splitlines() if line.startswith(f"{source} of ")] == [
                f"{source} of {rank}" + (" \u2713" if source == "stderr" else "")
            ]


def test_output_is_appended_to_logs(tmp_path: Path) -> None:
    for _ in range(2):
        run(talk, 2, tmp_path)
    assert (tmp_path / "rank_1.log").read_text().count("print of 1\n") == 2


def test_a_log_that_cannot_be_opened_ends_no_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank_1.log").mkdir()
    run(lambda rank: (tmp_path / f"ran_{rank}").touch(), 2, tmp_path)
    assert (tmp_path / "ran_1").exists()
    assert "this rank has no log, because" in capfd.readouterr().err


# --- signals to the parent -------------------------------------------------------------------------------

SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
from launcher.launch.local import run_local_ranks

directory, behaviour, start_method = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def write_pid(name, pid):
    (directory / f".{name}").write_text(str(pid))
    (directory / f".{name}").rename(directory / f"{name}.pid")

def target(rank):
    if behaviour == "ignores_signals":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # END_SIGNAL
    if behaviour == "starts_children":
        write_pid(f"child_{rank}", subprocess.Popen(["sleep", "600"], start_new_session=rank == 1).pid)
    try:
        write_pid(f"rank_{rank}", os.getpid())
        while True:
            time.sleep(1)
    finally:
        if behaviour == "slow":
            time.sleep(1)
        (directory / f"cleaned_{rank}").touch()
        if behaviour == "fails_in_cleanup":
            raise ValueError("in the clean-up")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent of the tests may ignore SIGINT
    signal.signal(signal.SIGHUP, signal.SIG_IGN if behaviour == "nohup" else signal.SIG_DFL)
    try:
        run_local_ranks(target, 2, log_dir=directory, start_method=start_method,
                        failure_grace=0.5, stop_grace=600 if behaviour in ("ignores_signals", "slow") else 5)
    except KeyboardInterrupt:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        sys.exit(130)
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Yield a function that starts a launcher in a new process group and waits until its two ranks run."""
    started: list[subprocess.Popen[str]] = []

    def start(behaviour: str = "plain", start_method: str = "fork") -> "subprocess.Popen[str]":
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(SCRIPT))
        launcher = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), behaviour, start_method],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(launcher)
        wait_for(
            lambda: launcher.poll() is not None or {"rank_0", "rank_1"} <= set(read_pids(tmp_path)), "ranks"
        )
        assert launcher.poll() is None, launcher.communicate()[0]
        return launcher

    yield start
    for launcher in started:
        launcher.kill()
        launcher.communicate()
    for pid in read_pids(tmp_path).values():
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def assert_nothing_left(directory: Path) -> None:
    wait_for(lambda: not any(map(is_running, read_pids(directory).values())), "processes left behind")


def press_ctrl_c(launcher: "subprocess.Popen[str]") -> None:
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("send", "code"),
    [
        pytest.param(press_ctrl_c, 130, id="Ctrl-C"),
        pytest.param(lambda launcher: launcher.send_signal(signal.SIGINT), 130, id="SIGINT"),
        pytest.param(lambda launcher: launcher.send_signal(signal.SIGTERM), 143, id="SIGTERM"),
        pytest.param(lambda launcher: launcher.send_signal(signal.SIGHUP), 129, id="SIGHUP"),
        pytest.param(lambda launcher: os.killpg(launcher.pid, signal.SIGTERM), 143, id="SIGTERM to group"),
        pytest.param(lambda launcher: os.killpg(launcher.pid, signal.SIGHUP), 129, id="SIGHUP to group"),
    ],
)
def test_stop_runs_cleanup_and_leaves_no_process(
    tmp_path: Path, start: Start, send: Callable[[Any], None], code: int, start_method: str
) -> None:
    launcher = start("plain", start_method)
    send(launcher)
    output, _ = launcher.communicate(timeout=HANG)
    assert launcher.returncode == code
    assert output == ""
    assert not [pid for pid in read_pids(tmp_path).values() if is_running(pid)]
    assert (tmp_path / "cleaned_0").exists()
    assert (tmp_path / "cleaned_1").exists()


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_ranks_die_with_a_killed_launcher(tmp_path: Path, start: Start, start_method: str) -> None:
    launcher = start("plain", start_method)
    launcher.kill()
    assert launcher.wait(timeout=HANG) == -signal.SIGKILL
    assert_nothing_left(tmp_path)
    assert not (tmp_path / "cleaned_0").exists()


def test_second_ctrl_c_kills_at_once(tmp_path: Path, start: Start) -> None:
    launcher = start("ignores_signals")  # with a grace period longer than any test
    press_ctrl_c(launcher)
    press_ctrl_c(launcher)  # the same Ctrl-C, forwarded by a wrapper
    time.sleep(AGAIN + 0.5)
    assert launcher.poll() is None
    press_ctrl_c(launcher)
    launcher.communicate(timeout=HANG)
    assert launcher.returncode == 130
    assert not [pid for pid in read_pids(tmp_path).values() if is_running(pid)]


def test_second_sigterm_lets_the_cleanup_finish(tmp_path: Path, start: Start) -> None:
    launcher = start("slow")
    for _ in range(3):
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    launcher.communicate(timeout=HANG)
    assert launcher.returncode == 143
    assert (tmp_path / "cleaned_0").exists()


def test_children_of_stopped_ranks_end(tmp_path: Path, start: Start) -> None:
    launcher = start("starts_children")
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=HANG)
    assert launcher.returncode == 143
    assert len(read_pids(tmp_path)) == 4
    assert not [pid for pid in read_pids(tmp_path).values() if is_running(pid)]


def test_error_during_cleanup_does_not_hide_the_stop(start: Start) -> None:
    launcher = start("fails_in_cleanup")
    press_ctrl_c(launcher)
    output, _ = launcher.communicate(timeout=HANG)
    assert launcher.returncode == 130
    assert output == ""


def test_respects_nohup(tmp_path: Path, start: Start) -> None:
    launcher = start("nohup")
    os.killpg(launcher.pid, signal.SIGHUP)
    time.sleep(0.5)
    assert launcher.poll() is None
    assert all(map(is_running, read_pids(tmp_path).values()))


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """Make SIGINT raise KeyboardInterrupt, even if the parent of the tests ignores SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c_interrupts")
@pytest.mark.parametrize("custom_handler", [True, False])
def test_exception_during_a_stop_is_the_cause_of_keyboard_interrupt(
    tmp_path: Path, custom_handler: bool
) -> None:
    def target(rank: int) -> None:
        def save(_number: int, _frame: object) -> NoReturn:
            raise ValueError("disk full")

        if custom_handler:
            signal.signal(END_SIGNAL, save)
        try:
            os.kill(os.getppid(), signal.SIGINT)
            sleep_for_long()
        finally:
            if not custom_handler:
                raise ValueError("disk full")

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(target, 1, tmp_path, stop_grace=HANG)
    assert isinstance(stopped.value.__cause__, RankFailure)
    assert "ValueError: disk full" in str(stopped.value.__cause__)


def test_stop_signal_that_reaches_ranks_first_is_a_stop(tmp_path: Path) -> None:
    """As with scancel, which signals all processes of a job in any order."""

    def target(rank: int) -> None:
        if rank == 0:
            wait_for(lambda: "disk full" in (tmp_path / "rank_1.log").read_text(), "rank 1")
            os.kill(os.getppid(), signal.SIGTERM)
            sleep_for_long()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            sleep_for_long()
        finally:
            raise ValueError("disk full")

    (tmp_path / "rank_1.log").touch()
    with pytest.raises(SystemExit) as stopped:
        run(target, 2, tmp_path)
    assert stopped.value.code == 143


def test_a_signal_in_a_finalizer_still_ends_the_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python discards what a finalizer raises."""

    class Signalled:
        def __del__(self) -> None:
            os.kill(os.getpid(), END_SIGNAL)
            time.sleep(0)

    def target(rank: int) -> None:
        Signalled()
        sleep_for_long()

    with pytest.raises(Stopped):
        run(target, 1, tmp_path / "logs")
    assert "Traceback" not in capfd.readouterr().err


# --- ranks of one node of several
# ----------------------------------------------------------------------------------


def test_starts_only_the_ranks_of_this_node(tmp_path: Path) -> None:
    run(partial(write_rank, tmp_path), 8, tmp_path / "logs", local_ranks=range(4, 6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5", "logs"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank_4.log", "rank_5.log"]
    assert "rank 5 of 8 exited with code 3" in str(
        failure_of(lambda rank: sys.exit(3 * (rank == 5)), 8, tmp_path / "logs", local_ranks=range(4, 6))
    )


def test_ranks_that_all_stop_by_themselves_raise_stopped(tmp_path: Path) -> None:
    """A rank of another node received the stop signal, and all ranks agreed to stop."""
    with pytest.raises(Stopped) as stopped:
        run(lambda rank: sys.exit(STOPPED_EXIT_CODE), 4, tmp_path, local_ranks=range(2, 4))
    assert stopped.value.exit_code == STOPPED_EXIT_CODE


def test_rank_that_stops_alone_has_failed(tmp_path: Path) -> None:
    def target(rank: int) -> None:
        sys.exit(STOPPED_EXIT_CODE) if rank == 1 else sleep_for_long()

    assert failure_of(target, 2, tmp_path).secondary
