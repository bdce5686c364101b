"""A fault inside a run: at one call of one function, in the launcher or in one rank."""

import ctypes
import importlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRED = Path("fired")  # holds the names of the checkpoints that were complete at the moment of the fault
PAUSE = 0.5  # seconds
_CAPABILITY_VERSION, _CAP_DAC_OVERRIDE = 0x20080522, 1  # linux/capability.h
_LARGEST_FILE = 20 * 1024  # bytes on a full disk: metrics.jsonl fits, a checkpoint does not


@dataclass(frozen=True)
class Fault:
    """`action` happens to `victim` before or after call number `call` of `function` in `actor`."""

    action: str  # a signal's name, or a key of ACTIONS
    function: str  # module:name
    call: int = 1
    after: bool = False
    actor: int | None = None  # the rank that makes the call; None: the launcher
    victim: str = "actor"  # or launcher, other (rank), group

    def describe(self) -> str:
        who = "launcher" if self.actor is None else f"rank {self.actor}"
        when = "after" if self.after else "before"
        name = self.function.removeprefix("launcher.")
        return f"{self.action} of {self.victim}, {when} call {self.call} of {name} in {who}"


def install(fault: Fault) -> None:
    """Let the fault happen once, in this process or in a rank that it forks."""
    module_name, _, name = fault.function.partition(":")
    module = importlib.import_module(module_name)
    original, count = getattr(module, name), 0

    def hooked(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        if process_rank() == fault.actor:
            count += 1
        is_it = process_rank() == fault.actor and count == fault.call and not FIRED.exists()
        if is_it and not fault.after:
            act(fault, arguments)
        result = original(*arguments, **options)
        if is_it and fault.after:
            act(fault, arguments)
        return result

    setattr(module, name, hooked)


def process_rank() -> int | None:
    """Return the rank of this process; None for the launcher."""
    name = multiprocessing.current_process().name
    return int(name.removeprefix("rank ")) if name.startswith("rank ") else None


def act(fault: Fault, arguments: tuple[Any, ...]) -> None:
    from launcher.checkpoint.manifest import checkpoints_in

    FIRED.write_text(json.dumps([path.name for path in checkpoints_in(Path("r"))]))
    if fault.action in ACTIONS:
        ACTIONS[fault.action](arguments)
        return
    pids = victims(fault)
    if fault.action == "pause":
        # A session of its own, because the process group may be the victim.
        later = f"sleep {PAUSE}; kill -CONT {' '.join(map(str, pids))}"
        subprocess.Popen(["sh", "-c", later], start_new_session=True, cwd="/")
    number = signal.SIGSTOP if fault.action == "pause" else signal.Signals[fault.action]
    for pid in pids:
        os.kill(pid, number)


def victims(fault: Fault) -> list[int]:
    """Return the process ids to signal; the negative id of a group stands for all its processes."""
    launcher = os.getpid() if fault.actor is None else os.getppid()
    if fault.victim == "group":
        return [-os.getpgid(0)]
    if fault.victim == "launcher":
        return [launcher]
    if fault.victim == "actor":
        return [os.getpid()]
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    while not (others := [pid for pid in map(int, children.read_text().split()) if pid != os.getpid()]):
        time.sleep(0.01)  # this rank may be at its first call before the other has been started
    return others[:1]


def fail(_arguments: object) -> None:
    raise RuntimeError("the disk is on fire")


def fill_disk(_arguments: object) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, hard))


def forbid_writing(_arguments: object) -> None:
    for path in (Path("r/checkpoints"), Path("r")):
        if path.exists():
            path.chmod(0o555)


def allow_writing(folder: Path) -> None:
    for path in (folder, folder / "checkpoints"):
        if path.exists():
            path.chmod(0o755)


def flip_bit(arguments: tuple[Any, ...]) -> None:
    """Flip the lowest bit of a weight that is not split; the engine is the second argument of the call."""
    import torch

    from launcher.parallel.sharding import logical_of

    [weight] = [
        parameter
        for parameter in arguments[1].module.parameters()
        if logical_of(parameter).name == "blocks.1.mlp_norm.weight"
    ]
    weight.detach().view(-1).view(torch.int32)[5] ^= 1


def spoil_gradient(value: float) -> Callable[[tuple[Any, ...]], None]:
    def spoil(arguments: tuple[Any, ...]) -> None:
        """Add a number to a gradient in the backward pass that comes next."""
        parameter = next(iter(arguments[1].module.parameters()))
        handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient + value)[1])

    return spoil


ACTIONS: dict[str, Callable[[tuple[Any, ...]], object]] = {
    "raise": fail,
    "exit": lambda _: os._exit(3),
    "slow": lambda _: time.sleep(2 * PAUSE),
    "full disk": fill_disk,
    "read-only": forbid_writing,
    "flipped bit": flip_bit,
    "NaN": spoil_gradient(float("nan")),
    "infinity": spoil_gradient(float("inf")),
    "huge": spoil_gradient(1e30),
}


def obey_permissions() -> None:
    """Take root's right to write into directories that are read-only from this process and its children."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable; then their upper halves
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    sets[0] &= ~(1 << _CAP_DAC_OVERRIDE)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
