"""Hostile values stay data on a real Slurm, and every recipe equals the script rendered from conf/."""

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.config.fields import fields_of
from launcher.config.schema import RunConfig
from tests.forked_commands import environment, light
from tests.runtime.command import launcher
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import ON_TWO_NODES, command, submit

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.sbatch"))
# Each would make a file named pwned, were it run by a shell.
HOSTILE = ["$(touch pwned) `touch pwned` ; touch pwned ' ; touch pwned ; '", 'a" ; touch pwned ; "']
QUICK = ("slurm.sbatch",)
TEXTS = {name: kind for name, kind in fields_of(RunConfig).items() if name.startswith("slurm.")}


def hostile(name: str, kind: str, value: str) -> str:
    escaped = value.replace('"', '\\"')
    if kind == "list":
        option = f"--comment={escaped}" if name in ("slurm.sbatch", "slurm.srun") else escaped
        return f'{name}=["{option}"]'
    return f'{name}.CHOSEN="{escaped}"' if kind == "dictionary" else f'{name}="{escaped}"'


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name, kind in TEXTS.items()
        if kind.startswith(("text", "list", "dict"))
    ],
)
def test_a_hostile_value_is_never_run(name: str, cluster: Cluster, tmp_path: Path) -> None:
    """The value is refused by the launcher, refused by Slurm, or passed on unchanged."""
    for value in HOSTILE:
        done = command(
            cluster, "submit", *ON_TWO_NODES, "hardware=cpu", "training.global_batch_size=16",
            hostile(name, TEXTS[name], value), cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode in (0, 2), done.stderr
        if done.returncode == 0:
            job = done.stdout.rpartition("\njob ")[2].split()[0]
            wait_for(lambda job=job: cluster.state(job) != "PENDING", f"{value} runs")  # type: ignore[misc]
            cluster.run("scancel", "--full", "--signal=KILL", job, check=False)
            wait_for(lambda job=job: cluster.state(job) in ("CANCELLED", "FAILED"), f"{value} ends")  # type: ignore[misc]
    assert not list(tmp_path.rglob("pwned*"))
    assert not list(Path.home().glob("pwned*"))


def test_a_job_name_reaches_slurm_unchanged(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, 'slurm.job_name="a b\'c $(x) # d"', "slurm.environment.X=1")
    shown = cluster.run("scontrol", "show", "job", job.number)
    job.tell()
    assert "JobName=a b'c $(x) # d\n" in shown


def test_a_refusal_by_slurm_is_reported(cluster: Cluster, tmp_path: Path) -> None:
    done = command(
        cluster, "submit", *ON_TWO_NODES, "hardware=cpu", "slurm.partition=none_such", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "Slurm rejected the job: " in done.stderr
    assert "invalid partition specified: none_such" in done.stderr


def test_an_unreachable_controller_is_distinguished_from_a_refusal(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.alive(), "so that Slurm is there"
    away = tmp_path / "slurm.conf"
    away.write_text("ClusterName=away\nSlurmctldHost=localhost\nSlurmctldPort=1\nMessageTimeout=1\n")
    surroundings = {"SLURM_CONF": str(away), "PATH": os.environ["PATH"]}
    arguments = [*ON_TWO_NODES, "hardware=cpu", "submit.preflight=false"]
    done = launcher("submit", *arguments, cwd=tmp_path, **surroundings)
    assert done.returncode == 2
    assert "submit: Slurm does not answer: " in done.stderr
    assert "scontrol ping" in done.stderr


def test_every_promised_recipe_exists() -> None:
    assert {path.stem for path in RECIPES} == {
        "finetune_chat", "gpt2_small", "gpt2_small_dp", "gpt2_small_evaluate", "gpt2_small_sweep",
        "gpt2_xl_chain", "llama3_1_8b_continue", "llama3_70b_3d", "llama3_8b_128k", "llama3_8b_3d",
        "llama3_8b_tp8", "llama3_8b_zero3_offload", "qwen3_8b_lora", "stdlib_gpt",
    }  # fmt: skip


def test_a_recipe_equals_the_output_of_its_command(subtests: pytest.Subtests) -> None:
    for recipe in RECIPES:
        with subtests.test(recipe.stem):
            text = recipe.read_text()
            typed = shlex.split(text.splitlines()[1].removeprefix("# launcher "))
            done = light().run([*typed, "submit.dry_run=true"], cwd=ROOT, environment=environment())
            assert done.stdout == text, f"`make recipes` writes it anew\n{done.stderr}"


@pytest.fixture(scope="module")
def gpus() -> Iterator[Cluster]:
    """A cluster as large as the largest recipe needs; no job runs on it."""
    found = Cluster(nodes=32, cpus=128, gpus=8, memory_mb=1000000)
    try:
        found.up()
        yield found
    finally:
        found.down()


def test_slurm_accepts_every_recipe(cluster: Cluster, gpus: Cluster) -> None:
    assert cluster.alive(), "so that Slurm is there"
    for recipe in RECIPES:
        gpus.run("sbatch", "--test-only", str(recipe))


@pytest.mark.slow
def test_the_cpu_recipe_runs_unchanged(cluster: Cluster, tmp_path: Path) -> None:
    """Submit the recipe from a checkout; only the path of the interpreter is replaced."""
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    recipe = ROOT / "recipes" / "stdlib_gpt.sbatch"
    overrides = ["training.stop_at=3", "training.validation_batches=1", "logging=local"]
    job = cluster.run("sbatch", "--parsable", str(recipe), *overrides, cwd=tmp_path)
    wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), "its end", 120)
    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert cluster.state(job) == "COMPLETED", log
    assert (tmp_path / "runs" / f"slurm-{job}" / "weights").is_dir()
