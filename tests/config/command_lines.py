"""Random command lines: legal, almost legal and absurd. The same random numbers give the same lines."""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from launcher.config.fields import fields_of, groups_of, options_of
from launcher.config.schema import (
    CalibrateConfig,
    ComparedRunConfig,
    EvaluateConfig,
    ExchangeConfig,
    GenerateConfig,
    PlannedRunConfig,
    PrepareConfig,
    ReplayConfig,
    RunConfig,
)

ROOTS: dict[str, type[Any]] = {
    "": RunConfig, "train": RunConfig, "plan": PlannedRunConfig, "verify": RunConfig, "submit": RunConfig,
    "preflight": RunConfig,
    "compare": ComparedRunConfig, "generate": GenerateConfig, "prepare": PrepareConfig,
    "replay": ReplayConfig, "evaluate": EvaluateConfig,
    "calibrate": CalibrateConfig, "export": ExchangeConfig, "import": ExchangeConfig,
}  # fmt: skip
OTHER_VERBS = ("job", "sync", "checkpoint", "tarin", "PLAN", "", "--", "\u00e9t\u00e9")

NUMBERS = (
    "0", "-0", "1", "-1", "2", "3", "7", "64", "1000", "65536", "200000000", "2147483648", "1000000007",
    "999999999999999989", "9223372036854775807", "-9223372036854775808", "1e3", "1e-300", "1e300",
    "1e309", "-1e308", "nan", "-nan", "inf", "-inf", ".5", "5.", "0x10", "1_000", "0.1e1", "1" * 310,
    "9" * 5000, "00007",
)  # fmt: skip
TEXTS = (
    "", "''", '""', "null", "true", "false", "yes", "none", "a", "a b", "'a b'", "\u6f22\u5b57",
    "\U0001f642", "a" * 256, "a/" * 2000, "x" * 5000, "../..", "/", "~", "~nobody_here/x", "/dev/null",
    "/dev/full/x", "README.md", "README.md/x", "a\nb", "a\tb", "\x07", "%s%n", "$(touch x)", "`touch x`",
    "; touch x", "--help", "-m", "???", "\udcff", "\ufeffa", "\u202e", "a\\", "\\", "'", "', ", ", ",
    ", ", ", ", ", ", ", ", ", ", ", ", ", ",
)  # fmt: skip
SYNTAX = (
    "[" * 200, "[" * 30 + "]" * 30, "]" * 50, "{" * 40, "(" * 40, "[1]", "[1,2]", "[a,[b]]", "[]", "{}",
    "{a:1}", "{a:{b:{c:1}}}", "{_target_:os.system}", "{1:2}", "1,2", "a,b,c", "range(0,3)",
    "range(0,100000)", "range(1,10,0)", "range(0.0,1.0,0.0)", "shuffle(range(0,999999999))", "glob(*)",
    "choice(1,2)", "choice()", "sort(3,1)", "int(5)", "float(1)", "json_str(1)", "str([1])",
    "extend_list(a)", "tag(t,choice(1))", "interval(0,1)", "${oc.env:HOME}", "${oc.env:NOT_SET}",
    "${oc.env:NOT_SET,3}", "${oc.env:}", "${oc.decode:'[1'}", "${oc.decode:'{a: 1}'}",
    "${oc.create:{a:1}}", "${model.hidden_size}", "${training.steps}", "${nothing.here}", "${.x}",
    "${...x}", "${", "$", "${}", "${a", "\\${x}", "${now:%Y}", "${hydra:job.num}",
    "${oc.env:${oc.env:HOME}}", "${run.dir}", "${eval:1}", "${oc.select:a.b}", "${oc.dict.keys:model}",
)  # fmt: skip
FLAGS = (
    "--help", "-h", "--hydra-help", "--version", "--cfg", "--cfg=job", "--cfg=all", "-c", "-m",
    "--multirun", "--run", "-r", "--resolve", "--package=model", "-p", "--info", "--info=all",
    "--info=plugins", "--config-name=config", "--config-name=plan", "-cn=x", "--config-path=.",
    "--config-path=pkg://os", "-cp=/", "--config-dir=.", "--config-dir=/none", "--config-dir=conf",
    "--experimental-rerun=x.pickle", "--shell-completion", "-sc", "--xyzzy", "-z", "---", "-",
    "--local_rank=0", "--local-rank", "--multi", "--conf", "--config-dir",
)  # fmt: skip
HYDRA = (
    "hydra.callbacks.x._target_=os.abort", "+hydra.callbacks.x={_target_:os.abort}", "hydra.mode=MULTIRUN",
    "hydra.launcher._target_=os.abort", "hydra/launcher=joblib", "hydra/sweeper=x", "hydra.searchpath=[pkg://os]",
    "hydra.run.dir=x", "hydra.sweep.dir=x", "hydra.job.chdir=true", "hydra.job.env_set.PATH=x",
    "hydra.verbose=true", "hydra.output_subdir=x", "hydra/job_logging=default", "~hydra", "hydra=x",
    "hydra.sweeper.params.optimizer.lr='1,2'", "+hydra.sweeper.params={optimizer.lr:1}", "hydra@x=y",
)  # fmt: skip

KEYS = ("a", "A_B", "fp16", "aio.block_size", "gradient_predivide_factor", "1", "_target_")  # of dictionaries


def random_command_line(rng: random.Random) -> list[str]:
    """Return the arguments of a command that may be legal, almost legal or absurd."""
    verb = rng.choice(list(ROOTS)) if rng.random() < 0.95 else rng.choice(OTHER_VERBS)
    root = ROOTS.get(verb, RunConfig)
    line = [verb] if verb else []
    if verb in ("prepare", "export", "import", "sync", "checkpoint", "job"):
        line += [rng.choice(TEXTS) for _ in range(rng.choice((0, 1, 2, 2, 3)))]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        kind = rng.random()
        if kind < 0.65:
            line.append(_field(rng, root))
        elif kind < 0.8:
            line.append(_group(rng, root))
        elif kind < 0.88:
            line.append(rng.choice(FLAGS))
        elif kind < 0.93:
            line.append(rng.choice(HYDRA))
        else:
            line.append(_scrambled(rng, _field(rng, root)))
    return line


def _field(rng: random.Random, root: type[Any]) -> str:
    fields = fields_of(root)
    name = rng.choice(list(fields))
    if fields[name].startswith("dictionary") and rng.random() < 0.8:
        name += f".{rng.choice(KEYS)}"
    prefix = rng.choices(("", "+", "++", "~"), (90, 4, 4, 2))[0]
    return f"{prefix}{name}={_value(rng, fields.get(name, 'text'))}"


def _value(rng: random.Random, kind: str) -> str:
    wild: tuple[Sequence[str], ...] = (NUMBERS, TEXTS, SYNTAX)
    words = kind.removesuffix(" | null")
    if words in ("whole number", "number") and rng.random() < 0.7:
        return str(rng.randint(1, 64)) if rng.random() < 0.5 else rng.choice(NUMBERS)
    if " | " in words and rng.random() < 0.5:
        return rng.choice(words.split(" | "))
    return rng.choice(rng.choice(wild))


def _group(rng: random.Random, root: type[Any]) -> str:
    groups = [*groups_of(root), "hydra/help", "none"]
    group = rng.choice(groups)
    options = options_of(group)
    option = (
        rng.choice(options) if options and rng.random() < 0.8 else rng.choice(rng.choice((TEXTS, SYNTAX)))
    )
    prefix, suffix = rng.choices(("", "+", "~"), (90, 5, 5))[0], rng.choices(("", "@x", "/x"), (94, 3, 3))[0]
    return f"{prefix}{group}{suffix}={option}"


def _scrambled(rng: random.Random, text: str) -> str:
    """Return the text after a few insertions, deletions and exchanges of characters."""
    letters = list(text[:200])
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(letters) + 1)
        if rng.random() < 0.5:
            letters.insert(place, rng.choice("=.,:[]{}()$\"'\\~+@/ \n\0%*#-_x1\u00e9"))
        elif letters:
            del letters[min(place, len(letters) - 1)]
    return "".join(letters)


class Started(Exception):
    """Raised in place of work: the command line was accepted."""


@contextmanager
def nothing_starts() -> Iterator[None]:
    """Let commands check their arguments in this process, and raise Started where their work would begin."""

    def started(*_: object, **__: object) -> None:
        raise Started

    heavy = {
        "launcher.runtime.start": ("join_ranks", "launch_on_this_machine", "launch_on_this_node"),
        "launcher.runtime.sampling": ("generate",),
        "launcher.runtime.metrics.upload": ("upload",),
        "launcher.calibrate.rounds": ("measure",),
        "launcher.checkpoint.conversion": ("export", "import_"),
        "launcher.tracing.formula_check": ("compare_with_trace",),
    }
    replaced = {name: sys.modules.get(name) for name in heavy}
    for name, functions in heavy.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(dict.fromkeys(functions, started))
    with ExitStack() as stack:
        stack.callback(_restore_modules, replaced)
        for work in (
            "verify._verify", "compare.claimed_run_dir", "prepare._run_with_progress", "submit.submit",
            "preflight.preflight",
            "job.listen_for_stops",
        ):  # fmt: skip
            stack.enter_context(mock.patch(f"launcher.commands.{work}", started))
        yield


def _restore_modules(modules: dict[str, ModuleType | None]) -> None:
    for name, module in modules.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module
