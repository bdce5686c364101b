"""`launcher doctor`: report the versions, devices and limits of this machine, and the problems for runs.

Nothing here may need a package, because a broken package must be reported too.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.launch.machine_checks import Finding, checks, findings_of
from launcher.launch.this_machine import existing_gpus, visible_gpus
from launcher.text import plural, printable, size

USAGE = """\
launcher doctor [run.dir=PATH]   print versions, devices, memory, disks, W&B and Slurm, and what of it will be
                                 a problem. The exit code is 1 if something will not work."""
SECONDS = 60.0  # for a probe: a file server can make imports slow
# The name of each package and of its module.
_PACKAGES = {
    "deepspeed": "", "torch": "",  # probed with the devices
    "hydra-core": "hydra", "omegaconf": "omegaconf", "wandb": "wandb", "safetensors": "safetensors.torch",
    "numpy": "numpy", "rich": "rich", "tokenizers": "tokenizers", "zstandard": "zstandard",
    "pyarrow": "pyarrow.parquet", "pillow": "PIL.Image", "scikit-learn": "sklearn.datasets",
}  # fmt: skip
_OPTIONAL = {
    "matplotlib": ("matplotlib.figure", "`launcher compare` and plan.figure"),
    "tensorboard": ("tensorboard", "logging.tensorboard=true"),
}
_SHOWN = ("torch", "deepspeed", "hydra-core", "wandb", "safetensors")
_IMPORT = """
import importlib, json, os, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        error = ""
    except BaseException as problem:
        error = " ".join(f"{type(problem).__name__}: {problem}".split())
    print(json.dumps({name: error}), flush=True)
os._exit(0)
"""
_MODULES = [*filter(None, _PACKAGES.values()), *(module for module, _ in _OPTIONAL.values())]
_CRASHED = "its import crashes, or takes too long"


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    run_dir = _run_dir(arguments)
    # These load for seconds, while the other checks run.
    probe = _started("-m", "launcher.engine.machine_probe")
    imports = _started("-c", _IMPORT, *_MODULES)
    parts = [findings_of(name, check) for name, check in checks(run_dir)]
    probed, imported = _answers(probe), _answers(imports)
    return print_findings(
        [
            *findings_of("versions", lambda: versions(imported, probed)),
            *findings_of("devices", lambda: devices(probed)),
            *(finding for part in parts for finding in part),
        ]
    )


def _run_dir(arguments: list[str]) -> Path:
    run_dir = "runs"
    for argument in arguments:
        if not argument.startswith("run.dir="):
            from launcher.config.errors import ConfigError

            raise ConfigError(f"doctor {argument}", None, "takes run.dir=PATH only", "launcher doctor")
        run_dir = argument.removeprefix("run.dir=")
    return Path(os.path.expanduser(run_dir))


def print_findings(findings: list[Finding]) -> int:
    """Print the report and its problems; return the exit code."""
    for finding in findings:
        print(f"{finding.name:<12} {finding.value}")
    problems = sorted(
        (finding for finding in findings if finding.why), key=lambda finding: not finding.is_fatal
    )
    for finding in problems:
        print(f"\n{'problem' if finding.is_fatal else 'warning'}: {finding.why}\n  try: {finding.remedy}")
    fatal = sum(finding.is_fatal for finding in problems)
    print(f"\n{plural(fatal, 'problem')}, {plural(len(problems) - fatal, 'warning')}")
    return 1 if fatal else 0


def versions(imported: dict[str, Any], probed: dict[str, Any]) -> list[Finding]:
    """Check that every package is there and can be imported."""
    is_old = sys.version_info < (3, 11)
    why = "the launcher needs Python 3.11 or newer" if is_old else ""
    python = f"{sys.version.split()[0]}, {sys.executable}"
    errors = {package: _error(package, imported, probed) for package in _PACKAGES}
    return [
        Finding("launcher", f"{__version__}, in {printable(Path(__file__).resolve().parents[1])}"),
        Finding("python", python, why, "make setup PYTHON=python3.11", is_old),
        *(finding for package, error in errors.items() for finding in _package(package, error)),
        *(_optional(package, imported) for package in _OPTIONAL),
    ]


def _error(package: str, imported: dict[str, Any], probed: dict[str, Any]) -> str:
    """Return why a package cannot be used; empty if it can."""
    if _version(package) is None:
        return "it is not installed"
    if module := _PACKAGES[package]:
        # The imports follow each other: after a crash the others were not tried.
        crashed = next((name for name in _MODULES if name not in imported), None)
        return _CRASHED if module == crashed else str(imported.get(module, ""))
    return str(probed.get(package, {"error": _CRASHED}).get("error", ""))


def _package(package: str, error: str) -> list[Finding]:
    if not error:
        return [Finding(package, str(_version(package)))] if package in _SHOWN else []
    why, remedy = (
        f"{package} cannot be used: {error}",
        f"pip install --force-reinstall '{requirement(package)}'",
    )
    return [Finding(package, _version(package) or "missing", why, remedy, is_fatal=True)]


def _optional(package: str, imported: dict[str, Any]) -> Finding:
    version, (module, purpose) = _version(package), _OPTIONAL[package]
    if version is None:
        return Finding(package, f"not installed: {purpose} needs it")
    error = imported.get(module, "")
    why = f"{package}, which {purpose} needs, cannot be used: {error}" if error else ""
    return Finding(package, version, why, f"pip install --force-reinstall {package}")


def requirement(package: str) -> str:
    """Return the package with the versions that the launcher admits, as pip takes it."""
    try:
        required = importlib.metadata.requires("launcher") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    names = {re.split(r"[^\w-]", text, maxsplit=1)[0]: text for text in required if "extra ==" not in text}
    return names.get(package, package)


def devices(probed: dict[str, Any]) -> list[Finding]:
    """Check that torch can use the GPUs that this machine has, and that ranks can meet."""
    torch, existing = probed.get("torch", {}), existing_gpus()
    if not torch or "error" in torch:
        return [Finding("GPUs", f"{existing} in this machine, driver {driver()}")]
    visible, gpus, nccl = visible_gpus(os.environ, existing), torch["gpus"], torch.get("nccl")
    findings = [Finding("CUDA", f"{torch['cuda'] or 'none'}, NCCL {nccl or 'none'}, driver {driver()}")]
    findings += [_gpu(index, gpu) for index, gpu in enumerate(gpus)]
    if not gpus:
        findings.append(Finding("GPUs", f"none for torch, {existing} in this machine"))
    if len(gpus) < visible:
        reason = torch.get("cuda_error") or (
            "see nvidia-smi" if torch["cuda"] else "it is built for CPUs only"
        )
        why = f"torch can use {len(gpus)} of {plural(visible, 'GPU')}: {reason or 'see nvidia-smi'}"
        remedy = "a torch for this driver (https://pytorch.org/get-started/locally), or hardware=cpu"
        findings.append(Finding("torch", "GPUs are missing", why, remedy, is_fatal=True))
    if gpus and not nccl:
        why, remedy = (
            "torch has no NCCL, which GPU ranks need",
            "a torch for Linux with CUDA, or hardware=cpu",
        )
        findings.append(Finding("NCCL", "none", why, remedy, is_fatal=True))
    if not torch["gloo"]:
        why, remedy = "torch has no gloo, which CPU ranks need", f"pip install '{requirement('torch')}'"
        findings.append(Finding("gloo", "none", why, remedy, is_fatal=True))
    if accelerator := probed.get("deepspeed", {}).get("accelerator"):
        findings.append(Finding("DeepSpeed", f"can be imported, accelerator {accelerator}"))
    return findings


def _gpu(index: int, gpu: dict[str, Any]) -> Finding:
    free, total = size(gpu["free"]), size(gpu["total"])
    is_busy = gpu["free"] < 0.9 * gpu["total"]
    why = f"GPU {index} is used by other programs: {free} of {total} are free" if is_busy else ""
    remedy = "nvidia-smi (shows the programs), or CUDA_VISIBLE_DEVICES with other GPUs"
    return Finding(f"GPU {index}", f"{gpu['name']}, {free} of {total} free", why, remedy)


def driver(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the version of the NVIDIA driver, or `none`."""
    match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", path.read_text()) if path.is_file() else None
    return match[1] if match else "none"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _started(*arguments: str) -> subprocess.Popen[str] | None:
    command = [sys.executable, "-P", *arguments]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _answers(process: subprocess.Popen[str] | None) -> dict[str, Any]:
    """Return what a probe printed before it ended, crashed or took too long."""
    if process is None:
        return {}
    try:
        output = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0]
    answers: dict[str, Any] = {}
    for line in output.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue  # a line of a library
        answers |= answer if isinstance(answer, dict) else {}
    return answers
