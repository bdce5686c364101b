"""Secrets are not written or printed, and files of the user's directory do not run."""

import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.config.test_compose import PROGRAMS
from tests.config.test_secrets import SECRET_NAMES
from tests.faults.campaign import Ended, Family, Try
from tests.forked_commands import environment, light
from tests.runtime.command import SMALL

MARK = "exploded"
EXPLODING = f"import pathlib\npathlib.Path({{folder!r}}, {MARK!r}).touch()\n"
# Modules that a launcher imports and that `python -m` itself does not need.
SHADOWS = (
    "tokenize hydra torch random json numpy yaml omegaconf dataclasses typing logging subprocess secrets "
    "socket rich safetensors deepspeed wandb sitecustomize usercustomize copyreg platform ast difflib"
).split()
TRAINED = [*SMALL, "run.dir=r", "parallelism.data=1", "training.steps=1"]
SUBMITTED = ["submit", "submit.dry_run=true", "experiment=gpt2_small"]
# Settings of a text in which a variable of the environment is used.
REFERRING = (
    ["logging.wandb.name={}"], ["logging.wandb.tags=[a,'{}']"], ["logging.wandb.group={}"],
    ["logging.wandb.project={}"], ["slurm.environment.A={}"], ["slurm.job_name={}"], ["slurm.partition={}"],
    ["checkpoint.init_from={}"], ["data=text", "data.train={}"], ["model.hidden_size={}"],
    ["hardware.device={}"], ["optimizer.lr={}"], ["model={}"], ["+unknown={}"], ["{}=1"],
)  # fmt: skip


def attempt(this: Try) -> None:
    kind = this.rng.choices((_shadow, _program, _pickle, _reference, _assigned), (3, 3, 1, 5, 2))[0]
    kind(this)
    this.expect(not list(this.folder.rglob(MARK)), "exposed", "code of the user's directory ran")


def _shadow(this: Try) -> None:
    """A module of the user has the name of one that the launcher imports. A real interpreter starts."""
    name = this.rng.choice(SHADOWS)
    text = EXPLODING.format(folder=str(this.folder))
    if this.rng.random() < 0.3:
        (this.folder / name).mkdir()
        (this.folder / name / "__init__.py").write_text(text)
    else:
        (this.folder / f"{name}.py").write_text(text)
    verb = this.rng.choice((["plan", *SMALL], ["--version"], SUBMITTED, ["prepare", "--help"], TRAINED))
    this.case = f"{name} beside python -m launcher {' '.join(verb[:2])}"
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", *verb],
        cwd=this.folder,
        env=environment(TMPDIR=str(this.temporary), CUDA_VISIBLE_DEVICES=""),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    done = this.ended(process, 90, 0)
    this.expect(done.code == 0, "silent", done.brief)


def _program(this: Try) -> None:
    """A config directory has settings of Hydra that start a program."""
    name = this.rng.choice(sorted(PROGRAMS))
    verb = this.rng.choice(([], ["plan"], SUBMITTED[:2], ["verify"], ["compare"]))
    flags = this.rng.choice(([], ["--multirun"], ["--help"], ["--cfg", "job"]))
    this.case = f"launcher {' '.join([*verb, *flags])} with {name} in --config-dir"
    folder = this.folder / "conf"
    for group in ("hydra/callbacks", "experiment"):
        (folder / group).mkdir(parents=True)
    (folder / "hydra/callbacks/mine.yaml").write_text("x: {_target_: os.abort}\n")
    (folder / "experiment" / f"{name}.yaml").write_text(PROGRAMS[name])
    done = this.run(*verb, "--config-dir=conf", f"experiment={name}", *flags, server=light)
    this.expect(done.code == 2 and "hydra." in done.error, "exposed", f"refusal expected: {done.brief}")


class Exploding:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def _pickle(this: Try) -> None:
    """A pickle is passed to --experimental-rerun, or stands where a checkpoint or its parts belong."""
    file = this.folder / "x.pickle"
    file.write_bytes(pickle.dumps(Exploding(this.folder / MARK)))
    line = this.rng.choice(
        (
            ["--experimental-rerun=x.pickle"], ["plan", "--experimental-rerun", "x.pickle"],
            ["checkpoint.init_from=x.pickle"], ["generate", "tokenizer=x.pickle"],
            ["checkpoint", "check", "x.pickle"], ["import", "x.pickle", "out"],
            ["data=text", "data.train=x.pickle"],
            ["data=tokens", "data.train=x.pickle"], ["checkpoint.resume=x.pickle"],
        )
    )  # fmt: skip
    this.case = f"launcher {' '.join(line)}"
    done = this.run(*line, server=light)
    this.expect(done.code in (1, 2) and bool(done.error), "silent", f"refusal expected: {done.brief}")


def _secret(rng: random.Random) -> tuple[str, str]:
    """Return the name and the value of a variable; names of which no rule knows are among them."""
    name = rng.choice((*SECRET_NAMES, "LAUNCHER_TEST_VALUE", "MY_SETTING"))
    return name, f"hunter{rng.randrange(10**12):012d}z"


def _reference(this: Try) -> None:
    """A setting refers to a variable, or the variable is only there. Commands run to their end."""
    name, value = _secret(this.rng)
    settings = [text.replace("{}", f"${{oc.env:{name}}}") for text in this.rng.choice(REFERRING)]
    settings = settings if this.rng.random() < 0.85 else []
    verb = this.rng.choice(
        (["plan"], ["--cfg", "job"], ["--help"], SUBMITTED, ["verify", "--cfg", "job"], TRAINED, TRAINED)
    )
    wandb = ["logging=wandb"] if verb is TRAINED else []
    this.case = f"{name} in launcher {' '.join([*verb[:2], *settings])}"
    if verb is TRAINED:
        done = this.run(*verb, *wandb, *settings, **{name: value})
    else:
        done = this.run(*verb, *settings, server=light, **{name: value})
    this.expect(done.code in (0, 1, 2), "silent", done.brief)
    check_not_shown(this, done, value)


def _assigned(this: Try) -> None:
    """A value that is typed for a batch script is refused, and the refusal does not show it."""
    name, value = this.rng.choice(SECRET_NAMES), _secret(this.rng)[1]
    setting, shown = this.rng.choice(
        (
            (f"slurm.environment.{name}={value}", name),
            (f"slurm.sbatch=['--export=ALL,{name}={value}']", "slurm.sbatch"),
            (f"slurm.environment.A='https://me:{value}@host'", "slurm.environment"),
            (f"slurm.sbatch=['--comment=https://me:{value}@host']", "slurm.sbatch"),
            (f"slurm.environment.B=ghp_{value}", "slurm.environment"),
        )
    )  # fmt: skip
    this.case = f"launcher submit {setting.replace(value, 'VALUE')}"
    done = this.run(*SUBMITTED, setting, server=light)
    this.expect(done.code == 2 and shown in done.error, "exposed", f"refusal expected: {done.brief}")
    check_not_shown(this, done, value)


def check_not_shown(this: Try, done: Ended, value: str) -> None:
    this.expect(value not in done.said, "exposed", f"printed: {done.brief}")
    files = [str(path.relative_to(this.folder)) for path in _files_with(this.folder, value.encode())]
    this.expect(not files, "exposed", f"written into {files}")


def _files_with(folder: Path, value: bytes) -> Iterator[Path]:
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and value in path.read_bytes():
                yield path


FAMILY = Family("secrets", 40, attempt)
