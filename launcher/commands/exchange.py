"""The commands `launcher export` and `launcher import`. Imports torch after all checks."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from launcher.checkpoint.companions import CERTIFICATE, COMPANIONS, tokenizer_of_weights
from launcher.checkpoint.huggingface import NotConvertible
from launcher.checkpoint.manifest import UnusableCheckpoint, newest_complete_before
from launcher.checkpoint.sources import WeightsKind, WeightSource, weights_at
from launcher.checkpoint.tokenizer_files import has_tokenizer
from launcher.commands.path_arguments import is_path, typed_path
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError, as_typed, typed_text
from launcher.config.numbers import refuse_out_of_bounds
from launcher.config.paths import free_path, path_argument
from launcher.config.schema import ExchangeConfig
from launcher.launch.this_machine import memory_here

_RUN_DIR = "run.dir="  # before the path of a run, as other commands take it
_Result = TypeVar("_Result")


def export_main(arguments: list[str]) -> int:
    exchanged = _exchanged("export", arguments)
    if exchanged is None:
        return 0
    weights, target, options = exchanged
    try:
        converter = weights.converter
    except NotConvertible as error:
        remedy = "the run's weights/*.safetensors, by logical name"
        raise ConfigError("export", weights.path, str(error), remedy) from None
    if weights.lora is not None and not options.merged:
        return _export_adapters(weights, target, options)
    if options.merged and weights.lora is None:
        why = "only the adapters of a run with finetune.lora can be merged, and these are whole weights"
        raise ConfigError("merged", "true", why, "merged=false")
    from launcher.checkpoint.conversion import export
    from launcher.data.tokenizer import write_byte_tokenizer

    memory = memory_here()
    notes = _written(lambda: export(weights, target, options, write_byte_tokenizer, memory), weights, target)
    print(f"exported {weights.path}\n      to {target} (load it with transformers' from_pretrained)")
    print(f"      as {converter.architecture}, {certified(target)}")
    for note in notes:
        print(f"      {note}")
    return 0


def _export_adapters(weights: WeightSource, target: Path, options: ExchangeConfig) -> int:
    _refuse_unused(options, ("max_file_gb",), "PEFT loads an adapter from one file")
    from launcher.checkpoint.conversion import export_adapters

    memory = memory_here()
    _written(lambda: export_adapters(weights, target, options, memory), weights, target)
    print(f"exported the adapter of {weights.path}\n      to {target} (load it with peft's PeftModel)")
    print(f"      {certified(target, 'peft')}")
    print("      merged=true exports the whole model with the adapter added")
    return 0


def import_main(arguments: list[str]) -> int:
    exchanged = _exchanged("import", arguments)
    if exchanged is None:
        return 0
    weights, target, options = exchanged
    if weights.kind is not WeightsKind.huggingface:
        why = "no import is needed: these are already weights of the launcher"
        remedy = f"launcher model=NAME {typed_text('checkpoint.init_from', str(weights.path))}"
        raise ConfigError("import", weights.path, why, remedy)
    why = "only `launcher export` reads it: an import keeps all weights, in fp32"
    _refuse_unused(options, ("dtype", "merged", "certificate"), why)
    from launcher.checkpoint.conversion import import_

    _written(lambda: import_(weights, target, options), weights, target)
    print(f"imported {weights.path}\n      to {target}")
    if (tokenizer := tokenizer_of_weights(target)) is not None:
        print("data for it:")
        print(f"launcher prepare SOURCE TARGET {typed_text('tokenizer.path', str(tokenizer))}")
    elif not has_tokenizer(target / COMPANIONS):
        print("      without a tokenizer: the directory has none")
    print("train from it:")
    folder, weights_from = shlex.quote(f"{target}/conf"), typed_text("checkpoint.init_from", str(target))
    print(f"launcher --config-dir {folder} model=imported {weights_from}")
    return 0


def _exchanged(verb: str, arguments: list[str]) -> tuple[WeightSource, Path, ExchangeConfig] | None:
    """Return the source, the target and the settings; None for --help. Raises ConfigError."""
    paths: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        path = argument.removeprefix(_RUN_DIR)
        is_given = path != argument or is_path(argument, ExchangeConfig)
        (paths if is_given else overrides).append(path)
    jobs = compose_jobs("exchange", ExchangeConfig, overrides)
    if not jobs:
        return None  # --help
    if len(paths) != 2 or len(jobs) > 1:
        why = "the command needs a SOURCE and a TARGET directory"
        raise ConfigError(" ".join([verb, *paths, *overrides]), None, why, f"launcher {verb} SOURCE TARGET")
    source, target = (path_argument(verb, path) for path in paths)
    if target.exists():
        why = f"already exists, and `launcher {verb}` does not overwrite files"
        typed = typed_path(source), typed_path(free_path(target))
        remedy = shlex.join(["launcher", verb, *typed, *overrides])
        raise ConfigError("TARGET", target, why, remedy)
    refuse_out_of_bounds(jobs[0].config)
    return weights_at(source, verb), target, jobs[0].config


def _refuse_unused(options: ExchangeConfig, names: tuple[str, ...], why: str) -> None:
    """Raise ConfigError if a setting that has no effect is not its default."""
    for name in names:
        value, default = getattr(options, name), getattr(ExchangeConfig(), name)
        if value != default:
            raise ConfigError(name, as_typed(value), why, f"{name}={as_typed(default)}")


def certified(target: Path, package: str = "transformers") -> str:
    """Return in words the certificate of an export, which `package` loads."""
    path = target / CERTIFICATE
    if not path.exists():
        return f"not compared with {package}"
    certificate = json.loads(path.read_text())
    if not certificate["ok"]:
        return f"not compared with {package}: {certificate['reason']}"
    difference, version = certificate["largest_difference"], certificate[package]
    return f"logits differ from {package} {version} by at most {difference:.1e}: {path.name}"


def _written(write: Callable[[], _Result], weights: WeightSource, target: Path) -> _Result:
    try:
        return write()
    except NotConvertible as error:
        remedy = "another tokenizer, or the run's weights/*.safetensors, by logical name"
        raise ConfigError("export", weights.path, str(error), remedy) from None
    except UnusableCheckpoint as unusable:
        older = newest_complete_before(unusable.path)
        remedy = f"{older} instead" if older else "an intact one: see `launcher checkpoint check`"
        raise ConfigError("SOURCE", weights.path, str(unusable), remedy) from None
    except OSError as error:
        why = f"cannot be written: {error}"
        raise ConfigError("TARGET", target, why, "a TARGET on a disk with enough free space") from None
