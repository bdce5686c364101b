"""The text after `try:` works when it is pasted into a shell, whatever the value is."""

import subprocess

import pytest

from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError, typed_text
from launcher.config.schema import RunConfig
from launcher.config.validate import RULES
from tests.config.composing import composed, section_of

ODD = (
    "a b", " a ", "it's", 'say "hi"', "a,b", "[x", "{a: b", "x}", "${HOME}", "$HOME", "größe", "模型",
    "a\\b", "end\\",
    'back\\"slash', "x=y", "my run #5 (50%|x) @home", "$(touch x)", "`touch x`", "~", "1e3", "null",
    "True", "007",
    "*", "-m", "--help", "a; b", "!x", "a:b", "nan", "'", '"', "/tmp/a-b.c", "runs/a or b",
)  # fmt: skip


def words(line: str) -> list[str]:
    """Return the words that a shell makes of a line."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.split("\0")[:-1]


def checked(*arguments: str) -> None:
    """Compose a run and check it by each rule. Raises ConfigError."""
    run = composed(*arguments)
    for rule in RULES:
        rule(run)


def refused(*arguments: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        checked(*arguments)
    return raised.value


@pytest.mark.slow
def test_any_text_survives_the_shell_and_hydra(subtests: pytest.Subtests) -> None:
    fields = ("run.dir", "logging.wandb.name", "slurm.job_name", "slurm.environment.X")
    line = " ".join(typed_text(field, text) for text in ODD for field in fields)
    typed = iter(words(line))
    for text in ODD:
        with subtests.test(text):
            run = composed(*(next(typed) for _ in fields))
            assert [run.run.dir, run.logging.wandb.name, run.slurm.job_name] == [text] * 3
            assert run.slurm.environment == {"X": text}


# A mistyped argument -> the field that the remedy sets, and the value that it gives the field.
WORKS = {
    'logging.wandb.nam="my run"': ("logging.wandb.name", "my run"),
    "run.dri='größe (2)'": ("run.dir", "größe (2)"),
    "wandb.tags=[a b, 'c,d']": ("logging.wandb.tags", ["a b", "c,d"]),
    "logging.wandb.tags=a,b": None,
    "slurm.modules=cuda/12.4,gcc": None,
    "logging.wandb.name=a(b": ("logging.wandb.name", "a(b"),
    "run.dir=it's (1)": ("run.dir", "it's (1)"),
    'run.dir=back\\"x(': ("run.dir", 'back\\"x('),
    "slurm.exclude=node[1-4]": ("slurm.exclude", "node[1-4]"),
    "slurm.exclude=node1,node2": ("slurm.exclude", "node1,node2"),
    "slurm.constraint=[a100|h100]": ("slurm.constraint", "[a100|h100]"),
    "slurm.output='my logs %j/it.out'": ("slurm.output", "my logs %j-it.out"),
    "logging.wandb.project='my/pro ject'": ("logging.wandb.project", "my-pro ject"),
    f"logging.wandb.tags=[\"it's\", 'say \"x\"', {'t' * 65}]": (
        "logging.wandb.tags", ["it's",
    'say "x"', "t" * 64]),
    "data.train='my corpus/*.txt'": ("data.train", "my corpus/*.txt"),
    "logging.wandb.name=1_000": ("logging.wandb.name", "1_000"),
    "logging.wandb.tags=[v1, 1e3, true]": ("logging.wandb.tags", ["v1", "1e3", "true"]),
    "run=my runs/a": ("run.dir", "my runs/a"),
    "run.dir.x=my runs/a": ("run.dir", "my runs/a"),
}  # fmt: skip


def test_a_remedy_keeps_the_value(subtests: pytest.Subtests) -> None:
    for typed, expected in WORKS.items():
        with subtests.test(typed):
            remedy = refused(typed).remedy
            if expected is None:
                single, _, sweep = remedy.partition(" or ")
                assert composed(*words(single))
                assert len(compose_jobs("config", RunConfig, words(sweep))) == 2
                continue
            field, value = expected
            offers = [words(offer) for offer in remedy.split(" or ") if "--multirun" not in offer]
            assert value in [section_of(composed(*offer), field) for offer in offers]
