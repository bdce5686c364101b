"""Check the `slurm` fields. Checked values can be written into a batch script, where they stay plain data.

All functions are pure.
"""

import re
from collections.abc import Iterator
from dataclasses import fields

from launcher.config.errors import ConfigError, as_typed, refusal, typed_text
from launcher.config.schema import Device, OnStop, RunConfig, SlurmConfig
from launcher.config.secrets import has_token, is_secret_name, is_secret_value

_NO_SECRETS = "this secret would be written into the script and the run's config, which others may read"
# Read by the running job from its overrides; other fields are written into the script.
READ_WHILE_RUNNING = {"on_stop", "srun", "container"}

# Options that the launcher sets itself, with the field to set instead; {} is the option's value.
_RANKS = "hardware.accelerators_per_node={} (ranks per node)"
_SBATCH = {
    "job-name": "slurm.job_name={}", "partition": "slurm.partition={}", "account": "slurm.account={}",
    "qos": "slurm.qos={}", "time": "slurm.time={}", "nodes": "slurm.nodes={}", "mem": "slurm.mem={}",
    "gpus-per-node": "slurm.gpus_per_node={}", "gres": "slurm.gpus_per_node=NUMBER",
    "cpus-per-task": "slurm.cpus_per_task={}", "constraint": "slurm.constraint={}",
    "exclude": "slurm.exclude={}", "reservation": "slurm.reservation={}", "output": "slurm.output={}",
    "signal": "slurm.signal_seconds=SECONDS", "requeue": "slurm.on_stop=requeue",
    "no-requeue": "slurm.on_stop=end", "array": "--multirun", "ntasks": _RANKS, "ntasks-per-node": _RANKS,
    "open-mode": "slurm.sbatch=[]", "wrap": "overrides of the launcher, or your own script that calls srun",
    "test-only": "submit.dry_run=true",
}  # fmt: skip
_SRUN = {
    "nodes": "hardware.nodes={}", "ntasks": _RANKS, "ntasks-per-node": _RANKS, "label": "slurm.srun=[]",
    "cpus-per-task": "slurm.cpus_per_task={}", "export": "slurm.environment.NAME=VALUE",
    "kill-on-bad-exit": "slurm.srun=[]",
}  # fmt: skip


def check_slurm(run: RunConfig) -> None:
    """Raise ConfigError for a value that Slurm does not accept or that cannot be written into a script."""
    _check_text(run.slurm)
    _check_forms(run)
    _check_chain(run)
    _check_environment(run)
    _check_options("slurm.sbatch", run.slurm.sbatch, _SBATCH, "--mail-type=END")
    _check_options("slurm.srun", run.slurm.srun, _SRUN, "--cpu-bind=none")


def check_submission(run: RunConfig) -> int:
    """Check a job; return its ranks per node. Raises ConfigError if nodes, GPUs and layout disagree."""
    check_slurm(run)
    h, s = run.hardware, run.slurm
    why = "`launcher submit` needs the hardware of the cluster's nodes"
    if h.device is Device.auto:
        on_cpu = "hardware=cpu hardware.accelerators_per_node=2"
        raise refusal(run, "hardware.device", why, "hardware=h100_80gb", on_cpu)
    if h.accelerators_per_node is None:
        raise refusal(run, "hardware.accelerators_per_node", why, "hardware.accelerators_per_node=2")
    if run.launch.max_restarts:
        why = "a Slurm job starts its run again by itself, until three failures are identical"
        raise refusal(run, "launch.max_restarts", why, "launch.max_restarts=0")
    most = nodes_of(run)[1]
    if most != h.nodes:
        why = f"the number of nodes, or its maximum, must be hardware.nodes={h.nodes}"
        raise refusal(run, "slurm.nodes", why, f"hardware.nodes={most}", "slurm.nodes=null")
    if nodes_of(run)[0] < most and run.parallelism.data is not None:
        why = f"slurm.nodes={s.nodes} leaves the number of data-parallel ranks open"
        raise refusal(run, "parallelism.data", why, "parallelism.data=null", "slurm.nodes=null")
    _check_gpus(run)
    return h.accelerators_per_node


def nodes_of(run: RunConfig) -> tuple[int, int]:
    """Return the minimum and maximum number of nodes of the job."""
    if not run.slurm.nodes:
        return run.hardware.nodes, run.hardware.nodes  # perhaps a number that is refused later
    ranges = [_range_of_nodes(part) for part in run.slurm.nodes.split(",")]
    return min(least for least, _ in ranges), max(most for _, most in ranges)


def _range_of_nodes(part: str) -> tuple[int, int]:
    """Return the minimum and maximum in `2`, `2-8`, `2-8:2` (2, 4, 6 or 8) or `1k` (1024)."""
    bounds, _, step = part.partition(":")
    numbers = [int(text.strip("kK")) * (1024 if text[-1] in "kK" else 1) for text in bounds.split("-")]
    least, most = numbers[0], numbers[-1]
    return least, most - (most - least) % int(step or 1)


def gpus_of_a_node(run: RunConfig) -> str | None:
    """Return the value for sbatch's --gpus-per-node, or None for a run on CPU."""
    if run.hardware.device is not Device.cuda:
        return None
    return run.slurm.gpus_per_node or str(run.hardware.accelerators_per_node)


def _check_gpus(run: RunConfig) -> None:
    gpus = run.slurm.gpus_per_node
    if gpus is None:
        return
    if run.hardware.device is not Device.cuda:
        why = "a run with hardware.device=cpu uses no GPU"
        raise refusal(run, "slurm.gpus_per_node", why, "slurm.gpus_per_node=null", "hardware=h100_80gb")
    kinds = [part.rpartition(":") for part in gpus.split(",")]
    number, per_node = sum(int(count) for _, _, count in kinds), run.hardware.accelerators_per_node
    if number != per_node:
        wanted = f"{kinds[0][0]}{kinds[0][1]}{per_node}"
        why = f"hardware.accelerators_per_node={per_node} needs one GPU for each rank of a node"
        remedies = f"slurm.gpus_per_node={wanted}", f"hardware.accelerators_per_node={number}"
        raise refusal(run, "slurm.gpus_per_node", why, *remedies)


def _check_text(slurm: SlurmConfig) -> None:
    for field, text in texts_in(slurm):
        # A line break would end the line of the script that contains the value.
        if control := re.search(r"[\x00-\x1f\x7f]", text):
            why = f"the text contains the control character {control[0]!r}"
            raise ConfigError(field, repr(text), why, "text of one line")
        if not text:
            default = getattr(SlurmConfig(), field.removeprefix("slurm."))
            raise ConfigError(field, "''", "the text is empty", f"{field}={as_typed(default)}")


def texts_in(slurm: SlurmConfig) -> Iterator[tuple[str, str]]:
    """Yield each text that is set, with its field; an item of a list has the field of the list."""
    for field in fields(slurm):
        value, name = getattr(slurm, field.name), f"slurm.{field.name}"
        if isinstance(value, str):
            yield name, value
        elif isinstance(value, list):
            yield from ((name, item) for item in value)
        elif isinstance(value, dict):
            # An environment variable may be set to the empty text.
            yield from ((f"{name}.{key}", item) for key, item in value.items() if item)


UNLIMITED = ("infinite", "unlimited")
_LEAST_MEGABYTES = 1024  # of a node; a rank that has loaded torch takes about half of it
_TIME = r"\d{1,9}|(\d{1,9}:)?\d{1,9}:\d{1,9}|\d{1,9}-\d{1,9}(:\d{1,9}){0,2}|(?i:infinite|unlimited)"
_NODES = r"[1-9]\d{0,4}[kK]?(-[1-9]\d{0,4}[kK]?(:[1-9]\d{0,4})?)?"
_GPUS = r"([A-Za-z0-9_.-]+:)?[1-9]\d{0,3}"
# The pattern of a field, as in sbatch's manual, the message for other values, and an example.
_FORMS: dict[str, tuple[str, str, str]] = {
    "time": (
        _TIME, "a time limit must be MINUTES, [HOURS:]MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]] or "
        "UNLIMITED", "24:00:00",
    ),
    "nodes": (
        f"{_NODES}(,{_NODES})*", "must be a number of nodes, MIN-MAX, MIN-MAX:STEP, or a list of these", "2",
    ),
    "gpus_per_node": (
        f"{_GPUS}(,{_GPUS})*", "must be a number of GPUs, TYPE:NUMBER, or a list of these", "8",
    ),
    "mem": (
        r"\d{1,12}[KMGTkmgt]?",
        "must be a number of megabytes, or a number with the unit K, M, G or T", "64G",
    ),
}  # fmt: skip


def _check_forms(run: RunConfig) -> None:
    for name, (pattern, words, example) in _FORMS.items():
        value = getattr(run.slurm, name)
        if value is not None and not re.fullmatch(pattern, value):
            example = (_plain_memory(value) if name == "mem" else None) or example
            raise refusal(run, f"slurm.{name}", words, f"slurm.{name}={example}", f"slurm.{name}=null")
    if run.slurm.mem and 0 < (megabytes := _megabytes(run.slurm.mem)) < _LEAST_MEGABYTES:
        has_unit = not run.slurm.mem[-1].isdigit()
        why = f"{'' if has_unit else 'without a unit '}this is {megabytes:,} MB, less than a rank needs"
        remedy = "slurm.mem=1G (or more)" if has_unit else f"slurm.mem={run.slurm.mem}G"
        raise refusal(run, "slurm.mem", why, remedy, "slurm.mem=0 (all memory of each node)")
    limit, signal = seconds_of(run.slurm.time or "0"), run.slurm.signal_seconds
    if 0 < limit <= signal:
        why = f"the time limit of {limit:,} s must be longer than slurm.signal_seconds={signal}"
        remedy = f"slurm.time={signal // 3600 + 1}:00:00 (or more)"
        raise refusal(run, "slurm.time", why, remedy, f"slurm.signal_seconds={limit // 2}")
    least, most = nodes_of(run)
    if least > most:
        why = "the minimum is above the maximum"
        raise refusal(run, "slurm.nodes", why, f"slurm.nodes={most}-{least}")
    if run.slurm.output.startswith("~"):
        why = "Slurm does not replace ~ by the home directory"
        remedy = "an absolute path, or a path relative to the directory where the job is submitted"
        raise refusal(run, "slurm.output", why, remedy)
    if "%" in run.slurm.output.rpartition("/")[0]:
        why = "Slurm does not create directories, and the value of % is unknown before the job starts"
        name = run.slurm.output.replace("/", "-")
        raise refusal(run, "slurm.output", why, typed_text("slurm.output", name))
    for module in run.slurm.modules:
        if module.startswith("-"):
            why = "this is an option, not a module"
            raise ConfigError("slurm.modules", module, why, "'slurm.modules=[cuda]'")


def _check_chain(run: RunConfig) -> None:
    if run.slurm.on_stop is OnStop.chain and run.slurm.max_parallel is not None:
        why = "follow-up jobs of slurm.on_stop=chain are outside the array, so the limit would not hold"
        raise refusal(run, "slurm.max_parallel", why, "slurm.on_stop=requeue", "slurm.max_parallel=null")


def _plain_memory(text: str) -> str | None:
    """Return what 80GB, 64 GiB or 1.5G are to sbatch; None for other text."""
    match = re.fullmatch(r"(\d{1,9})(\.\d{1,3})?\s*([KMGT])(i?B)?", text, re.IGNORECASE)
    if match is None:
        return None
    unit = match[3].upper()
    if not match[2]:
        return f"{match[1]}{unit}"
    smaller = {"M": "K", "G": "M", "T": "G"}.get(unit)
    return f"{round(float(match[1] + match[2]) * 1024)}{smaller}" if smaller else None


def _megabytes(memory: str) -> int:
    """Return the megabytes of a value of --mem, rounded up; 0 means all memory of the node."""
    number = memory.rstrip("KMGTkmgt")
    unit = memory.removeprefix(number).upper() or "M"
    kilobytes: int = int(number) * 1024 ** "KMGT".index(unit)
    return -(-kilobytes // 1024)


def seconds_of(time: str) -> int:
    """Return the seconds of a time limit in any form that Slurm accepts; 0 means no limit."""
    if time.lower() in UNLIMITED:
        return 0
    days, dash, clock = time.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    if not dash and len(numbers) < 3:
        numbers = [0, *numbers]  # without days and hours, the first number is minutes
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _check_environment(run: RunConfig) -> None:
    for name, value in run.slurm.environment.items():
        field = f"slurm.environment.{name}"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            why = f"{name} is not a valid name of an environment variable"
            raise ConfigError(field, value, why, "letters, digits and _, not beginning with a digit")
        if is_secret_name(name) or is_secret_value(value, name):
            # The value is not part of the message, because it may be a secret.
            remedy = f"export {name} in the shell that runs `launcher submit` or sbatch, which pass it on"
            remedy += " (or `wandb login`)" if "WANDB" in name else ""
            raise ConfigError(field, None, _NO_SECRETS, remedy)
    for field, text in texts_in(run.slurm):
        if has_token(text) or any(map(is_secret_name, re.findall(r"\b([A-Za-z_]\w*)=", text))):
            remedy = "a variable that you export in the shell that runs `launcher submit`"
            raise ConfigError(field, None, f"{_place_of(text, run.slurm, field)}{_NO_SECRETS}", remedy)


def _place_of(text: str, slurm: SlurmConfig, field: str) -> str:
    """Name the list item that holds the text, without its value: its option name, or else its number."""
    items = getattr(slurm, field.removeprefix("slurm."), None)
    if not isinstance(items, list):
        return ""
    option = re.match(r"--[a-z][a-z-]*(?==)", text)
    return f"{option[0]}: " if option else f"item {items.index(text) + 1}: "


def _check_options(field: str, options: list[str], ours: dict[str, str], example: str) -> None:
    for option in options:
        name = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=(.*))?", option)
        if name is None:
            why = "an option must have the form --NAME or --NAME=VALUE"
            raise ConfigError(field, option, why, f"'{field}=[\"{example}\"]'")
        if name[1] in ours:
            why = f"the launcher sets --{name[1]} itself"
            raise ConfigError(field, option, why, ours[name[1]].format(name[2] or "VALUE"))
