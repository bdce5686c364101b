"""Check this machine for what runs need, with the standard library alone: `launcher doctor` prints it.

A check returns findings and may raise any exception: the rest of the report is printed nevertheless.
"""

import configparser
import getpass
import netrc
import os
import resource
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from launcher.launch.this_machine import memory_here, this_machine
from launcher.text import printable, size

SERVER_SECONDS = 2.0
_WANDB_SERVER = "https://api.wandb.ai"
_LITTLE_MEMORY, _LITTLE_SHARED, _LITTLE_DISK = 2e9, 64e6, 2e9  # bytes; below is a warning
_NO_DISK = 50e6  # bytes; with less, no run can save anything
_FEW_FILES = 1024


@dataclass(frozen=True)
class Finding:
    """A line of the report; `why` is what will be a problem, with a remedy to paste after `try:`."""

    name: str
    value: str
    why: str = ""
    remedy: str = ""
    is_fatal: bool = False  # something will not work; else it may be slow, or fail in some runs


Check = Callable[[], list[Finding]]


def findings_of(name: str, check: Check) -> list[Finding]:
    """Return the findings of a check; a check that fails is a finding too."""
    try:
        return check()
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return [Finding(name, "cannot be checked", f"{name} cannot be checked: {words}", "see the message")]


def user() -> list[Finding]:
    """Check the home directory and the user's name, which torch, W&B and Hugging Face ask for."""
    try:
        home = Path.home()
        is_there = home.is_dir() and os.access(home, os.W_OK)
    except (RuntimeError, OSError):
        home, is_there = Path("unknown"), False
    why = "" if is_there else f"the home directory {printable(home)} does not exist or cannot be written"
    findings = [Finding("home", printable(home), why, "export HOME=DIRECTORY that you may write to")]
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):
        why = f"the user id {os.getuid()} has no name, which some libraries ask for"
        return [*findings, Finding("user", str(os.getuid()), why, "export USER=NAME LOGNAME=NAME")]
    return [*findings, Finding("user", printable(name))]


def cores() -> list[Finding]:
    """Check how many CPU cores this process may use."""
    usable, quota = this_machine().cores, core_quota()
    value = f"{usable} of {os.cpu_count()}"
    if quota is None or quota >= usable:
        return [Finding("CPU cores", value)]
    why = f"the container gets the time of {quota:.3g} cores, but {usable} threads would be started"
    remedy = f"export OMP_NUM_THREADS={max(1, int(quota))}, and at most {max(1, int(quota))} CPU ranks"
    return [Finding("CPU cores", f"{value}, with the time of {quota:.3g}", why, remedy)]


def core_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the number of cores whose time a container may use; None without a limit."""
    limit = root / "cpu.max"
    if limit.is_file():
        quota, _, period = limit.read_text().partition(" ")
    elif (root / "cpu/cpu.cfs_quota_us").is_file():
        quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
        period = (root / "cpu/cpu.cfs_period_us").read_text()
    else:
        return None
    return int(quota) / int(period) if quota.isdecimal() and int(period) > 0 else None


def memory() -> list[Finding]:
    """Check the memory of this machine or container, and /dev/shm."""
    total, free = memory_here(), free_memory()
    why = remedy = ""
    if free is not None and free < _LITTLE_MEMORY:
        why = f"only {size(free)} of memory are free: ranks may be killed"
        remedy = "end other programs, or fewer ranks"
    shown = f"{'unknown' if free is None else size(free)} of {'unknown' if total is None else size(total)}"
    return [Finding("free memory", shown, why, remedy), *shared_memory(Path("/dev/shm"))]


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that are free for this process; None if unknown."""
    meminfo, values = root / "proc/meminfo", []
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else []:
        if line.startswith("MemAvailable:"):
            values.append(1024 * int(line.split()[1]))
    limit, used = root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdecimal():
        values.append(max(0, int(text) - int(used.read_text())))
    return min(values, default=None)


def shared_memory(path: Path) -> list[Finding]:
    """Check the memory that processes share: NCCL and the data loaders of other programs use it."""
    if not path.is_dir() or not os.access(path, os.W_OK):
        why, remedy = f"{path} cannot be written: NCCL needs it between GPUs", "docker run --ipc=host"
        return [Finding(str(path), "not writable", why, remedy)]
    free = shutil.disk_usage(path).free
    why = "" if free >= _LITTLE_SHARED else f"{path} has only {size(free)}: NCCL needs it between GPUs"
    return [Finding(str(path), f"{size(free)} free", why, "docker run --shm-size=8g")]


def disks(run_dir: Path) -> list[Finding]:
    """Check the directories that a run writes to."""
    try:
        findings = _disk("directory", Path.cwd(), "cd DIRECTORY that you may write to", is_needed=False)
    except FileNotFoundError:
        why = "the working directory was deleted"
        return [Finding("directory", "none", why, "cd DIRECTORY that exists", is_fatal=True)]
    findings += _disk("run.dir", run_dir, "run.dir=DIRECTORY that you may write to", is_needed=True)
    try:
        scratch = Path(tempfile.gettempdir())
    except FileNotFoundError:
        why = "there is no temporary directory that can be written, and local ranks meet in one"
        remedy = "export TMPDIR=DIRECTORY that you may write to"
        return [*findings, Finding("TMPDIR", "none", why, remedy, is_fatal=True)]
    remedy = "export TMPDIR=DIRECTORY with free space"
    return findings + _disk("TMPDIR", scratch, remedy, is_needed=True)


def _disk(name: str, path: Path, remedy: str, *, is_needed: bool) -> list[Finding]:
    """Check a directory, or the directory above in which it would be made."""
    path = path.absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = (
            f"{printable(existing)} cannot be written"
            if existing.is_dir()
            else f"{printable(existing)} is not a directory"
        )
        return [Finding(name, printable(path), why, remedy, is_fatal=is_needed)]
    free = shutil.disk_usage(existing).free
    why = "" if free >= _LITTLE_DISK else f"only {size(free)} are free in {printable(existing)}"
    return [
        Finding(name, f"{printable(path)}, {size(free)} free", why, remedy, is_needed and free < _NO_DISK)
    ]


def open_files() -> list[Finding]:
    """Check how many files a process may open: token files and the sockets of ranks count."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = f"{soft}, at most {'unlimited' if hard == resource.RLIM_INFINITY else hard}"
    enough = hard == resource.RLIM_INFINITY or hard >= _FEW_FILES
    why = "" if enough else f"a process may open {hard} files: large corpora and many ranks need more"
    return [Finding("ulimit -n", shown, why, "ask the administrator for a higher limit (ulimit -Hn)")]


def wandb(seconds: float = SERVER_SECONDS) -> list[Finding]:
    """Check the key, the mode and the server of W&B. A run without them logs offline."""
    mode, server = os.environ.get("WANDB_MODE", ""), wandb_server()
    address = urlsplit(server)
    host = address.hostname or "of WANDB_BASE_URL"
    has_key = bool(os.environ.get("WANDB_API_KEY")) or has_netrc_entry(host)
    shown = f"{'key found' if has_key else 'no key (runs log offline)'}, mode {mode or 'auto'}"
    if mode in ("offline", "disabled", "dryrun"):
        return [Finding("W&B", shown)]
    if not has_key:
        why, remedy = "W&B has no key: runs log offline", "wandb login, or logging=local"
        return [Finding("W&B", shown, "" if mode != "online" else why, remedy)]
    # Without user and password, which an error would repeat.
    if error := why_silent(address._replace(netloc=address.netloc.rpartition("@")[2]).geturl(), seconds):
        why = f"the W&B server {host} does not answer ({error}): runs log offline"
        remedy = "export HTTPS_PROXY=URL or WANDB_MODE=offline, and later `launcher sync RUN.DIR`"
        return [Finding("W&B", f"{shown}, {host} not reachable", why, remedy)]
    return [Finding("W&B", f"{shown}, {host} answers")]


def wandb_server() -> str:
    """Return WANDB_BASE_URL, or the server of `wandb login --host`, or W&B's default."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(Path(folder) / "settings")
    return settings.get("default", "base_url", fallback=_WANDB_SERVER)


def has_netrc_entry(host: str) -> bool:
    path = Path(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def why_silent(url: str, seconds: float) -> str | None:
    """Return why the server does not answer within the time; None if it does, even with an error."""
    answer: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
            answer.append(None)
        except urllib.error.HTTPError:
            answer.append(None)
        except Exception as error:  # also InvalidURL, which is no OSError
            answer.append(str(getattr(error, "reason", error)))

    # In a thread: the timeout of urlopen does not bound the look-up of the name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answer[0] if answer else f"no answer within {seconds:g} s"


def slurm() -> list[Finding]:
    """Check Slurm's commands, and whether this is a job of Slurm."""
    names = ("sbatch", "srun", "scontrol")
    present = [name for name in names if shutil.which(name)]
    job = os.environ.get("SLURM_JOB_ID")
    where = f"inside job {job}" if job else "outside a job"
    if not present:
        shown = f"not found, {where}" if job else "not found: `launcher submit` needs it"
        return [Finding("Slurm", shown)]
    missing = [name for name in names if name not in present]
    why = f"Slurm's {', '.join(missing)} cannot be found in PATH" if missing else ""
    return [
        Finding("Slurm", f"{', '.join(present)} found, {where}", why, "module load slurm, or export PATH")
    ]


def checks(run_dir: Path) -> Iterator[tuple[str, Check]]:
    """Yield each check with its name."""
    yield "user", user
    yield "CPU cores", cores
    yield "memory", memory
    yield "disks", lambda: disks(run_dir)
    yield "open files", open_files
    yield "W&B", wandb
    yield "Slurm", slurm
